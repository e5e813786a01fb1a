#!/usr/bin/env python
"""Draw the pictures of README.md into nbs/images.

    python scripts/make_picture.py catalogue         drawn products, one row per view
    python scripts/make_picture.py scores runs/demo  the retrieval scores of a finished run (needs Chromium: plotly draws them)
"""
import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from moon2_lab.data.synthetic.generator import describe, draw_product
from moon2_lab.files import read_json
from moon2_lab.reporting.run_figures import score_figure
from moon2_lab.reporting.tables import score_table

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"
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


def scores(run):
    "The retrieval scores of a run, with intervals and baselines."
    figure = score_figure(score_table(read_json(run / "metrics.json"))).update_layout(width=WIDTH, height=HEIGHT, margin={"r": 30})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        page.write_text(f"<body style='margin:0'>{figure.to_html(include_plotlyjs=True, full_html=False, config={'displayModeBar': False})}</body>", encoding="utf-8")
        screenshot(page, IMAGES / "scores.png")
    return IMAGES / "scores.png"


def catalogue(columns=14, side=84):
    "The first product of each kind, three views under one another."
    first = {}
    for place in range(400):
        first.setdefault(describe(0, place).kind, place)
    products = [draw_product(seed=0, index=place, image_size=128) for place in list(first.values())[:columns]]
    sheet = Image.new("RGB", (columns * side, 3 * side), "white")
    for place, product in enumerate(products):
        for row, picture in enumerate(product.pictures[:3]):
            sheet.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (place * side, row * side))
    target = IMAGES / "catalogue.jpg"
    sheet.save(target, quality=82, optimize=True)
    return target


def main():
    "Draw what was asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["catalogue", "scores"])
    parser.add_argument("run", type=Path, nargs="?", help="a run folder with metrics.json")
    args = parser.parse_args()
    if args.what == "scores" and args.run is None:
        parser.error("scores needs a run folder")
    IMAGES.mkdir(parents=True, exist_ok=True)
    target = catalogue() if args.what == "catalogue" else scores(args.run)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
