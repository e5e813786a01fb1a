#!/usr/bin/env python
"""Draw the picture of README.md from a finished run: `python scripts/make_picture.py runs/demo`. Needs Chromium (the figure is drawn by plotly)."""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from moon2_lab.core import read_json
from moon2_lab.figures import score_figure
from moon2_lab.tables import score_table

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 860, 380


def browser():
    "Chromium under one of its names."
    return next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def screenshot(page, target):
    "A PNG of a page, with few colours so that it stays small."
    program = browser() or sys.exit("no Chromium found: install it (Debian: chromium) to draw the picture")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars", f"--user-data-dir={profile}",
                   f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=5000", f"--screenshot={target}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(target).convert("RGB").quantize(64).save(target, optimize=True)


def main():
    "Draw the retrieval scores of a run."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run folder with metrics.json")
    parser.add_argument("--out", type=Path, default=ROOT / "nbs" / "images" / "scores.png")
    args = parser.parse_args()
    metrics = read_json(args.run / "metrics.json")
    figure = score_figure(score_table(metrics)).update_layout(width=WIDTH, height=HEIGHT, margin={"r": 30})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        page.write_text(f"<body style='margin:0'>{figure.to_html(include_plotlyjs=True, full_html=False, config={'displayModeBar': False})}</body>", encoding="utf-8")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        screenshot(page, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
