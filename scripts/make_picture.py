#!/usr/bin/env python
"""Draw the pictures of README.md into nbs/images.

    python scripts/make_picture.py catalogue         drawn products, one row per view
    python scripts/make_picture.py scores runs/demo  the retrieval scores of a finished run (needs Chromium: plotly
    draws them)
    python scripts/make_picture.py rooms             the rooms of the package and what imports from what
"""
import argparse
import ast
import collections
import subprocess
import sys
import tempfile
from pathlib import Path

from measure_house import imported_modules, module_files, room_of
from PIL import Image
from rooms import PURPOSES, ROOMS

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from browsing import CHROMIUM  # noqa: E402

from moon2_lab.data.synthetic.generator import describe, draw_product  # noqa: E402
from moon2_lab.files import read_json  # noqa: E402
from moon2_lab.reporting.run_figures import score_figure  # noqa: E402
from moon2_lab.reporting.tables import score_table  # noqa: E402

IMAGES = ROOT / "nbs" / "images"
WIDTH, HEIGHT = 860, 380


def screenshot(page, target):
    "A PNG of a page, with few colours so that it stays small."
    program = CHROMIUM or sys.exit("no Chromium found: install it (Debian: chromium) to draw the picture")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--hide-scrollbars", f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}",
            "--virtual-time-budget=5000", f"--screenshot={target}", page.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    Image.open(target).convert("RGB").quantize(64).save(target, optimize=True)


def scores(run):
    "The retrieval scores of a run, with intervals and baselines."
    figure = score_figure(score_table(read_json(run / "metrics.json"))).update_layout(
        width=WIDTH, height=HEIGHT, margin={"r": 30}
    )
    drawn = figure.to_html(include_plotlyjs=True, full_html=False, config={"displayModeBar": False})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        page.write_text(f"<body style='margin:0'>{drawn}</body>", encoding="utf-8")
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
            sheet.paste(
                picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (place * side, row * side)
            )
    target = IMAGES / "catalogue.jpg"
    sheet.save(target, quality=82, optimize=True)
    return target


def rooms():
    "The rooms from top to bottom, as wide as they have lines, and an arc for each room that imports from another."
    from matplotlib import pyplot
    from matplotlib.patches import FancyArrowPatch

    files = module_files(IMAGES.parents[1])
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    lines = collections.Counter()
    for name, path in files.items():
        lines[room_of(name)] += len(path.read_text(encoding="utf-8").splitlines())
    imports = collections.Counter(
        (room_of(name), room_of(other))
        for name, tree in trees.items()
        if name != "testing"
        for other in imported_modules(tree, name, set(files))
    )
    figure, axes = pyplot.subplots(figsize=(9.5, 7.2))
    for place, room in enumerate(ROOMS):
        axes.barh(-place, lines[room] / 1000, height=0.62, color="#4c78a8", alpha=0.85)
        axes.text(-0.12, -place, room, ha="right", va="center", fontsize=11, weight="bold")
        axes.text(
            lines[room] / 1000 + 0.1, -place, PURPOSES[room], ha="left", va="center", fontsize=9.5, color="#333333"
        )
    for (room, other), count in imports.items():
        if room != other:
            ends = [(-2.7, -ROOMS.index(name)) for name in (room, other)]
            width = 0.4 + min(count, 12) / 5
            axes.add_patch(
                FancyArrowPatch(
                    *ends, connectionstyle="arc3,rad=-0.45", arrowstyle="-|>", mutation_scale=7, lw=width, alpha=0.25,
                    color="#555555",
                )
            )
    axes.set_xlim(-6.4, 9)
    axes.set_ylim(-len(ROOMS) + 0.4, 0.6)
    axes.axis("off")
    axes.set_title(
        "The rooms of moon2_lab: bars are thousands of lines, arrows are imports, all of them upwards", fontsize=10.5,
        loc="left",
    )
    target = IMAGES / "rooms.png"
    figure.savefig(target, dpi=96, bbox_inches="tight")
    Image.open(target).convert("RGB").quantize(64).save(target, optimize=True)
    return target


def main():
    "Draw what was asked for."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["catalogue", "scores", "rooms"])
    parser.add_argument("run", type=Path, nargs="?", help="a run folder with metrics.json")
    args = parser.parse_args()
    if args.what == "scores" and args.run is None:
        parser.error("scores needs a run folder")
    IMAGES.mkdir(parents=True, exist_ok=True)
    target = {"catalogue": catalogue, "rooms": rooms}[args.what]() if args.what != "scores" else scores(args.run)
    print(f"{target}: {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
