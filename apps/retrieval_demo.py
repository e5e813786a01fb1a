#!/usr/bin/env python
"""Product search in the browser (`make app`): runs/demo/model if it is there, else data/pretrained on drawn products,
else a tiny model trained in seconds. --help lists the options.
"""
import sys
from pathlib import Path

from moon2_lab.app.interface import run_demo

ROOT = Path(__file__).resolve().parent.parent

if __name__ == "__main__":
    sys.exit(run_demo(None, ROOT / "runs" / "demo" / "model", ROOT / "data" / "pretrained", ROOT / "data" / "sample"))
