"""The live view in a real JupyterLab, in a real browser: it appears, its curves move, its buttons work, and a still figure takes its place."""
import json
import re

import pytest
from browsing import jupyter_lab, open_notebook, run_cell, until

pytestmark = pytest.mark.slow
SETUP = """
import plotly.io as pio
from moon2_lab.catalog import Catalog
from moon2_lab.encoder import Moon2Encoder
from moon2_lab.train import TrainConfig, Trainer
from moon2_lab.widgets import LiveTraining

pio.renderers.default = "plotly_mimetype"
encoder = Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=32, visual_tokens=4)
trainer = Trainer(encoder, Catalog.load(FOLDER), TrainConfig(max_steps=STEPS, per_device_train_batch_size=8, num_threads=1))
live = LiveTraining(trainer)
live.start()
"""


@pytest.fixture
def lab(request, tmp_path, drawn_catalogue):
    "A JupyterLab with a live view of so many steps; its address."
    cells = [SETUP.replace("FOLDER", repr(str(drawn_catalogue))).replace("STEPS", str(request.param)), "print('seen', trainer.step > 0, live.state)", "history = await live\nprint('rows', len(history))"]
    with jupyter_lab(tmp_path, cells, "live.ipynb") as address:
        yield address


def status(page):
    "The status line of the live view."
    return page.locator(".widget-html-content", has_text=re.compile("step \\d+ of")).first.inner_text(timeout=60_000)


def step_now(page):
    "The step that the status line tells."
    return int(re.search(r"step (\d+)", status(page))[1])


def wait_until(page, holds, what):
    "Poll until `holds()`."
    until(page, holds, what, tell=lambda: f"status: {status(page)}")


@pytest.fixture
def page(lab, browser):
    "The notebook in a browser, its kernel ready."
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    open_notebook(page, lab, "live.ipynb")
    yield page
    page.close()


def press(page, name):
    "Click a button of the live view."
    page.get_by_role("button", name=name).click()


def assert_still(page, folder):
    "The still figure stands where the live view was, also in the saved notebook."
    page.locator(".jupyter-widgets .js-plotly-plot").first.wait_for(state="detached", timeout=120_000)
    page.locator(".jp-OutputArea .js-plotly-plot .scatterlayer .trace").nth(10).wait_for(timeout=30_000)
    assert page.get_by_role("button", name="Pause").count() == 0
    page.keyboard.press("Control+s")
    page.get_by_text("Saving completed").first.wait_for(timeout=30_000)
    saved = json.loads((folder / "live.ipynb").read_text())
    mimes = {mime for cell in saved["cells"] for output in cell["outputs"] for mime in output.get("data", {})}
    assert "application/vnd.plotly.v1+json" in mimes and not any("widget" in mime for mime in mimes), mimes


CURVES = ".jupyter-widgets .js-plotly-plot .scatterlayer .trace"


@pytest.mark.parametrize("lab", [600], indirect=True)
def test_buttons_of_the_live_view(page, tmp_path):
    "Pause, one step, continue, another cell meanwhile; then `await`, which does not hold the kernel."
    run_cell(page, 0)
    page.locator(CURVES).first.wait_for(timeout=120_000)  # drawn by the browser
    press(page, "Pause")
    wait_until(page, lambda: status(page).startswith("paused"), "the pause")
    held = step_now(page)
    page.wait_for_timeout(1000)
    assert step_now(page) == held, "it went on although it was paused"
    press(page, "One step")
    wait_until(page, lambda: step_now(page) == held + 1 and status(page).startswith("paused"), "one step")
    press(page, "Continue")
    wait_until(page, lambda: step_now(page) > held + 1, "the run going on")
    run_cell(page, 1)
    page.get_by_text(re.compile("seen True (running|done)")).first.wait_for(timeout=60_000)
    run_cell(page, 2)
    page.wait_for_timeout(500)
    press(page, "Pause")
    wait_until(page, lambda: status(page).startswith("paused"), "a pause while a cell awaits the run")
    assert page.get_by_text("rows 600").count() == 0
    press(page, "Continue")
    page.get_by_text("rows 600").first.wait_for(timeout=120_000)
    assert_still(page, tmp_path)


@pytest.mark.parametrize("lab", [120], indirect=True)
def test_a_run_that_ends_in_the_background(page, tmp_path):
    "Stop, continue, and no other cell: at the end the still figure is there."
    run_cell(page, 0)
    page.locator(CURVES).first.wait_for(timeout=120_000)
    press(page, "Stop")
    wait_until(page, lambda: status(page).startswith("stopped"), "the stop")
    press(page, "Continue")
    assert_still(page, tmp_path)
