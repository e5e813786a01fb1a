#!/usr/bin/env python
"""The moving picture of README.md: nbs/images/in_a_minute.gif, filmed in a real JupyterLab and a real comparison page.

    python scripts/make_animation.py [RUN]

Four scenes with drawn products: point at a word, pause a training, drop a triplet, see what another model won and lost.
RUN is the trained model of the first scene (default: data/pretrained). Needs Chromium.
"""
import argparse
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from browsing import CHROMIUM, FLAGS, jupyter_lab, open_notebook, run_cell, settle, until  # noqa: E402

TARGET = ROOT / "nbs" / "images" / "in_a_minute.gif"
LIMIT = 2_000_000  # bytes
VIEW, SCALE, CAPTION = {"width": 1180, "height": 720}, 0.68, 40  # of the page; film to page; pixels under each frame
SHORT, LONG = 500, 1600  # milliseconds

MATCHED = """
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.queries import Lexicon, make_query
from moon2_lab.data.synthetic.drawn_catalogue import drawn_catalogue
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.widgets.heatmap import heatmap

catalog = Catalog.load(drawn_catalogue(400, 7, noise=0))
encoder = Moon2Encoder.from_pretrained(RUN)
product = next(one for one in catalog if one.has_image and len((one.title or "").split()) > 4)
query = make_query(product, 0, Lexicon(catalog))
heatmap(encoder, query, product.item(), trials=0)
"""
TRAINED = """
from moon2_lab.config import TrainConfig
from moon2_lab.training.trainer import Trainer
from moon2_lab.widgets.training import LiveTraining

start = Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=32, visual_tokens=4)
config = TrainConfig(max_steps=600, learning_rate=2e-3, connector_learning_rate=2e-3, noise=0.2, num_threads=1)
trainer = Trainer(start, catalog, config.replace(per_device_train_batch_size=16))
live = LiveTraining(trainer)
live.start()
"""
DROPPED = """
from moon2_lab.training.triplet_review import triplet_phi
from moon2_lab.widgets.triplets import FilterInspector

live.want("stop")
await live
FilterInspector(trainer.triplets, triplet_phi(start, trainer.triplets), trainer.ledger)
"""
COMPARED = """
from moon2_lab.reporting.comparison import compare_encoders
from moon2_lab.reporting.comparison_report import write_diff_page

before = Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=32, visual_tokens=4)
made = compare_encoders(before, start, catalog, names=("before", "after"), resamples=100)
print(write_diff_page(made, "diff.html").name, "written")
"""


class Film:
    "Frames of a page with a caption and the pointer, which headless browsers do not draw."

    def __init__(self, page):
        self.page, self.frames, self.times, self.pointer, self.caption = page, [], [], None, ""

    def shot(self, milliseconds: int) -> None:
        "One frame that stays so long."
        settle(self.page)
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            self.page.screenshot(path=file.name)
            picture = Image.open(file.name).convert("RGB")
        picture = picture.resize([round(side * SCALE) for side in picture.size], Image.Resampling.LANCZOS)
        frame = Image.new("RGB", (picture.width, picture.height + CAPTION), "#1f2937")
        frame.paste(picture)
        pen = ImageDraw.Draw(frame)
        pen.text((14, picture.height + 9), self.caption, fill="white", font=ImageFont.load_default(19))
        if self.pointer:
            x, y = (place * SCALE for place in self.pointer)
            arrow = [(0, 0), (0, 19), (4, 15), (8, 23), (11, 21), (8, 14), (13, 14)]
            pen.polygon([(x + dx, y + dy) for dx, dy in arrow], fill="black", outline="white")
        self.frames.append(frame)
        self.times.append(milliseconds)

    def point(self, target, milliseconds: int = SHORT) -> None:
        "Move the pointer onto an element, and a frame of what that does."
        target.scroll_into_view_if_needed(timeout=20_000)
        box = target.bounding_box()
        self.pointer = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.move(*self.pointer)
        self.page.wait_for_timeout(300)
        self.shot(milliseconds)

    def click(self, target, milliseconds: int = SHORT) -> None:
        "Point at an element, click, and a frame of what that does."
        self.point(target)
        target.click()
        self.page.wait_for_timeout(500)
        self.shot(milliseconds)

    def save(self, path: Path) -> None:
        "The frames as one GIF, with one palette of theirs."
        sheet = Image.new("RGB", (self.frames[0].width, sum(frame.height for frame in self.frames)))
        for place, frame in enumerate(self.frames):
            sheet.paste(frame, (0, place * frame.height))
        palette = sheet.quantize(128)
        few = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames]
        few[0].save(path, save_all=True, append_images=few[1:], duration=self.times, loop=0, optimize=True)


@contextmanager
def chromium():
    "Headless Chromium."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def show_output(page, cell: int, selector: str):
    "Run a cell, and bring what it shows to the top of the view."
    run_cell(page, cell)
    shown = page.locator(selector).first
    shown.wait_for(timeout=180_000)
    shown.evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(600)
    return shown


def point_at_a_word(film: Film) -> None:
    film.caption = "Why this match? Point at a word: what it met lights up. The sum is the score."
    page = film.page
    shown = show_output(page, 0, ".m2h")
    until(page, lambda: shown.locator(".m2h-arcs line, .m2h-arcs path").count() or shown.locator(".m2h-legend").count(),
          "the cross map")
    shown.locator(".m2h-sides").evaluate("element => element.scrollIntoView({block: 'start'})")
    page.wait_for_timeout(600)
    film.shot(LONG)
    words = shown.locator("[data-side=query] .m2h-word")
    for place in range(min(3, words.count())):
        film.point(words.nth(place), 1100)


def pause_a_training(film: Film) -> None:
    film.caption = "Step through training: pause it, take one step, go on."
    page = film.page
    show_output(page, 1, ".m2t .m2t-paths path")
    page.get_by_role("button", name="Pause").evaluate("element => element.scrollIntoView({block: 'start'})")
    for _ in range(4):
        page.wait_for_timeout(1500)
        film.shot(SHORT)
    film.click(page.get_by_role("button", name="Pause"), LONG)
    film.click(page.get_by_role("button", name="One step"), 1000)
    film.click(page.get_by_role("button", name="Continue"))
    page.wait_for_timeout(1500)
    film.shot(SHORT)


def drop_a_triplet(film: Film) -> None:
    film.caption = "What the filter doubts: look at the triplet, drop it or put it back, train again."
    shown = show_output(film.page, 2, ".m2i")
    film.page.wait_for_timeout(1500)
    film.shot(LONG)
    film.click(shown.locator(".m2i-row").nth(1), 1000)
    film.click(shown.locator("[data-verdict=drop]"), LONG)


def won_and_lost(film: Film) -> None:
    film.caption = "Two models, query by query: what was won, and what was lost."
    film.pointer = None
    film.shot(LONG)
    film.click(film.page.locator("article").first, LONG)
    film.page.mouse.wheel(0, 400)
    film.page.wait_for_timeout(400)
    film.shot(LONG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "data" / "pretrained")
    run = parser.parse_args().run.resolve()
    cells = [MATCHED.replace("RUN", repr(str(run))), TRAINED, DROPPED, COMPARED]
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        folder = Path(place)
        with jupyter_lab(folder, cells, "lab.ipynb", ROOT / "scripts" / "lab") as address:
            page = browser.new_page(viewport=VIEW)
            film = Film(page)
            open_notebook(page, address, "lab.ipynb")
            page.get_by_role("button", name="No", exact=True).click()  # no news of Jupyter
            page.keyboard.press("Control+b")  # no list of files
            point_at_a_word(film)
            pause_a_training(film)
            drop_a_triplet(film)
            run_cell(page, 3)
            page.get_by_text("diff.html written").first.wait_for(timeout=300_000)
            film.page = browser.new_page(viewport=VIEW)
            film.page.goto((folder / "diff.html").as_uri())
            film.page.locator("article").first.wait_for()
            won_and_lost(film)
        film.save(TARGET)
    size = TARGET.stat().st_size
    print(f"{TARGET.relative_to(ROOT)}: {len(film.frames)} frames, {sum(film.times) / 1000:.0f} s, {size:,} bytes")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT:,} bytes: fewer frames, or a smaller SCALE")


if __name__ == "__main__":
    main()
