#!/usr/bin/env python
"""Product search in the browser (`make app`): runs/demo/model if it is there, else a tiny model trained in seconds.
--help lists the options.
"""
import sys
from pathlib import Path

from moon2_lab.app.interface import run_demo

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.exit(run_demo(model=ROOT / "runs" / "demo" / "model", sample=ROOT / "data" / "sample"))
