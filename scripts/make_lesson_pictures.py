#!/usr/bin/env python
"""One small picture of each lesson for README.md, taken from its saved outputs: nbs/images/lesson_90.png and so on.

Run it after a lesson's outputs were made anew.
"""
import base64
import io
import json
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 340  # pixels
SHOWN = {  # lesson -> words of the cell whose picture stands for it
    "90_first_training_run": "live.start()", "91_inside_the_experts": "show_routing(after, layer=1)",
    "92_why_this_match": 'show_static(widget.maps, "cross")', "93_what_was_filtered": "inspector.still(3)",
    "94_noise_and_filtering": "px.line(found", "95_co_augmentation": "for product in both]",
    "96_search_and_compare": 'as_cards("red sneakers", hits)',
    "97_a_bigger_backbone": 'show_static(widget.maps, "cross")',
    "98_does_it_hold": "difference_figure(steps",
}


def picture_of(lesson: str, words: str) -> Image.Image:
    "The first saved picture of the cell that holds these words."
    notebook = json.loads((ROOT / "nbs" / "lessons" / f"{lesson}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []) if words in "".join(cell["source"]) else []:
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    data = base64.b64decode("".join(output["data"][kind]))
                    return Image.open(io.BytesIO(data)).convert("RGB")
    raise SystemExit(f"{lesson}: no saved picture of a cell with {words!r}")


def main() -> None:
    for lesson, words in SHOWN.items():
        picture = picture_of(lesson, words)
        height = round(picture.height * WIDTH / picture.width)
        small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS).crop((0, 0, WIDTH, min(height, 230)))
        frame = Image.new("RGB", (WIDTH, 230), picture.getpixel((picture.width - 1, picture.height - 1)))
        frame.paste(small)
        target = ROOT / "nbs" / "images" / f"lesson_{lesson[:2]}.png"
        frame.quantize(128).save(target, optimize=True)
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
