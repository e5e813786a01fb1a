"""The live view in a real JupyterLab, in a real browser: it appears, its curves move, its buttons work, it stays at the
end of the run, and a still picture is saved under it.
"""

import json
import re
import urllib.request
from pathlib import Path

import pytest
from browsing import choose_on_map, jupyter_lab, keep_picture, keep_screenshot, open_notebook, run_cell, until

pytestmark = pytest.mark.slow
SETUP = """
from moon2_lab.config import TrainConfig
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.training.trainer import Trainer
from moon2_lab.widgets.training import LiveTraining

encoder = Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=32, visual_tokens=4)
config = TrainConfig(max_steps=STEPS, per_device_train_batch_size=8, num_threads=1)
trainer = Trainer(encoder, Catalog.load(FOLDER), config)
live = LiveTraining(trainer)
live.start()
"""


@pytest.fixture
def lab(request, tmp_path, drawn_catalogue):
    "A JupyterLab with a live view of so many steps; its address."
    cells = [
        SETUP.replace("FOLDER", repr(str(drawn_catalogue))).replace("STEPS", str(request.param)),
        "print('seen', trainer.step > 0, live.state)",
        "history = await live\nprint('rows', len(history))",
    ]
    with jupyter_lab(tmp_path, cells, "live.ipynb") as address:
        yield address


def status(page):
    "The status line of the live view."
    return page.locator(".widget-html-content", has_text=re.compile("step \\d+ of")).first.inner_text(timeout=120_000)


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


def assert_done(page, folder):
    """The view stands there with its curves and the button that goes on; what is saved has a still picture in the same
    output.
    """
    wait_until(page, lambda: status(page).startswith("done"), "the end")
    assert page.get_by_role("button", name="50 more steps").is_enabled()
    assert not page.get_by_role("button", name="Pause").is_enabled()
    page.locator(CURVES).nth(10).wait_for(timeout=30_000)
    page.keyboard.press("Control+s")
    page.get_by_text("Saving completed").first.wait_for(timeout=30_000)
    saved = json.loads((folder / "live.ipynb").read_text())
    mimes = [set(output.get("data", {})) for cell in saved["cells"] for output in cell["outputs"]]
    assert any({"application/vnd.jupyter.widget-view+json", "image/png"} <= kinds for kinds in mimes), mimes


def points(page):
    "How many curves the live view draws, and how many points the longest has."
    lengths = page.locator(CURVES).evaluate_all("all => all.map((one) => one.getAttribute('d').split('L').length)")
    return len(lengths), max(lengths, default=0)


CURVES = ".jupyter-widgets .m2t .m2t-paths path"


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
    page.get_by_text(re.compile("seen True (running|done)")).first.wait_for(timeout=120_000)
    run_cell(page, 2)
    page.wait_for_timeout(500)
    press(page, "Pause")
    wait_until(page, lambda: status(page).startswith("paused"), "a pause while a cell awaits the run")
    assert page.get_by_text("rows 600").count() == 0
    press(page, "Continue")
    page.get_by_text("rows 600").first.wait_for(timeout=300_000)
    assert_done(page, tmp_path)


@pytest.mark.parametrize("lab", [120], indirect=True)
def test_a_run_that_ends_in_the_background(page, tmp_path):
    "Stop, continue, and no other cell: at the end the view stays, and 50 more steps can be had."
    run_cell(page, 0)
    page.locator(CURVES).first.wait_for(timeout=120_000)
    press(page, "Stop")
    wait_until(page, lambda: status(page).startswith("stopped"), "the stop")
    press(page, "Continue")
    assert_done(page, tmp_path)
    keep_screenshot(page, "done.png")
    press(page, "50 more steps")
    wait_until(page, lambda: step_now(page) == 170 and status(page).startswith("done"), "fifty more steps")


@pytest.mark.parametrize("lab", [2000], indirect=True)
def test_the_live_view_after_a_reload(page, tmp_path):
    """The page is loaded again while the run is paused: all curves come back with their points, the buttons work,
    and the curves go on.
    """
    run_cell(page, 0)
    page.locator(CURVES).first.wait_for(timeout=120_000)
    wait_until(page, lambda: step_now(page) > 20, "some steps")
    press(page, "Pause")
    wait_until(page, lambda: status(page).startswith("paused"), "the pause")
    page.wait_for_timeout(1500)
    before = points(page)
    page.keyboard.press("Control+s")
    page.get_by_text("Saving completed").first.wait_for(timeout=30_000)
    page.reload(wait_until="domcontentloaded")
    page.locator(CURVES).first.wait_for(timeout=120_000)
    wait_until(page, lambda: points(page) == before, f"the curves of before, {before}")
    assert before[0] > 10 and before[1] > 20
    keep_screenshot(page, "reloaded.png")
    press(page, "Continue")
    wait_until(page, lambda: points(page)[1] > before[1], "longer curves")
    press(page, "Stop")


def test_the_live_view_without_a_kernel(tmp_path, browser, drawn_catalogue):
    """With the settings of `make lab` the saved notebook shows the curves, what was switched off, the values of the
    step that is pointed at, and the last what-if, without a kernel; nothing of plotly is on the page.
    """
    cell = SETUP.replace("FOLDER", repr(str(drawn_catalogue))).replace("STEPS", "16")
    with jupyter_lab(tmp_path, [cell], "kept.ipynb", Path(__file__).parents[2] / "scripts" / "lab") as address:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        open_notebook(page, address, "kept.ipynb")
        run_cell(page, 0)
        until(page, lambda: status(page).startswith("done"), "the end", 240)
        until(page, lambda: points(page)[1] == 16, "all points")
        page.locator(".m2t [data-panel=omega] button", has_text="inter_t").click()
        until(page, lambda: page.locator(".m2t-paths path[data-name=inter_t]").count() == 0, "the switch")
        before = points(page)
        page.locator(".m2s [data-control=omega_mode] select").select_option("faithful")
        summary = page.locator(".m2s-status", has_text="omega mode faithful instead of balanced: the total loss is")
        summary.wait_for(timeout=60_000)
        page = save_and_reopen(page, browser, address, tmp_path / "kept.ipynb")
        page.locator(CURVES).first.wait_for(timeout=90_000)
        until(page, lambda: points(page) == before, f"the curves of before, {before}")
        assert page.get_by_text("model not found").count() == 0 and page.locator(".js-plotly-plot").count() == 0
        page.locator(".m2t [data-panel=loss] svg[role=slider]").focus()
        page.keyboard.press("Home")
        until(page, lambda: page.locator(".m2t-where").inner_text() == "Values of step 0.", "the first step")
        page.locator(".m2t [data-panel=omega] button", has_text="inter_t").click()
        until(page, lambda: page.locator(".m2t-paths path[data-name=inter_t]").count() > 0, "the curve again")
        page.locator(".m2s-status", has_text="No kernel answers").wait_for(timeout=30_000)
        assert page.locator(".m2s select").is_disabled() and page.locator(".m2s tbody tr").count() > 10
        page.add_style_tag(content=".Toastify { display: none }")  # JupyterLab asks whether it may tell of its news
        page.locator(".m2t").first.evaluate("one => one.scrollIntoView({ block: 'start' })")
        keep_picture(page, "seen_lab.png")
        page.close()


WIDGETS = """
from moon2_lab.testing import made_up_routing
from moon2_lab.widgets.routing import RoutingWidget
widget = RoutingWidget(made_up_routing())
widget
"""


def save_and_reopen(page, browser, address, path):
    "Save the notebook with the state of its widgets, end its kernel, and open it in a new page, which is returned."
    page.wait_for_timeout(500)
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").first.click(position={"x": 300, "y": 8})
    page.keyboard.press("Control+s")

    def state():
        try:
            kept = json.loads(path.read_text())["metadata"].get("widgets", {})
        except ValueError:  # it is being written
            return None
        return kept.get("application/vnd.jupyter.widget-state+json", {}).get("state")

    until(page, state, "the state of the widget in the file")
    page.close()
    for kernel in json.load(urllib.request.urlopen(f"{address}/api/sessions")):
        urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions/{kernel['id']}", method="DELETE"))
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{address}/lab/tree/{path.name}?reset", wait_until="domcontentloaded")
    return page


def test_a_saved_widget_is_alive_without_a_kernel(tmp_path, browser):
    """With the settings of `make lab` a notebook that is saved, closed and opened without a kernel shows the
    widget, its choices and its order of views; it can be used.
    """
    with jupyter_lab(tmp_path, [WIDGETS], "saved.ipynb", Path(__file__).parents[2] / "scripts" / "lab") as address:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        open_notebook(page, address, "saved.ipynb")
        run_cell(page, 0)
        page.locator(".m2r-load h4").first.wait_for(timeout=120_000)
        views = page.locator(".m2r-load h4").all_inner_texts()
        page.locator("[data-control=colour] select").select_option("1")
        step = lambda: page.locator("[data-control=step] output").inner_text()
        last = step()
        page.locator("[data-control=step] input").focus()
        page.keyboard.press("Home")
        until(page, lambda: step() != last, "the first step")
        first = step()
        page = save_and_reopen(page, browser, address, tmp_path / "saved.ipynb")
        page.locator(".m2r-load h4").first.wait_for(timeout=90_000)
        assert (
            page.locator(".m2r-load h4").all_inner_texts() == views and page.get_by_text("model not found").count() == 0
        )
        assert page.locator("[data-control=colour] select").input_value() == "1"
        assert step() == first
        page.locator("[data-control=colour] select").select_option("2")
        until(
            page,
            lambda: "weight of expert 2" in page.locator(".m2r-note").first.inner_text(),
            "another expert, without a kernel",
        )
        keep_screenshot(page, "saved_widget.png")
        page.close()


MAP = """
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.testing import made_up_shop
from moon2_lab.widgets.embedding_map import embedding_map_widget

encoder = Moon2Encoder.from_backbone("tiny", num_layers=1, image_size=32, visual_tokens=4)
box = embedding_map_widget(encoder, made_up_shop(40).products)
box
"""


def test_the_embedding_map_asks_the_kernel_and_lives_without_it(tmp_path, browser):
    "A choice reaches Python, \"why?\" draws the heatmap below; re-opened without a kernel the map can still be used."
    cells = [MAP, "print('active', box.map.active, 'selected', len(box.map.selected))"]
    with jupyter_lab(tmp_path, cells, "map.ipynb", Path(__file__).parents[2] / "scripts" / "lab") as address:
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        open_notebook(page, address, "map.ipynb")
        run_cell(page, 0)
        page.locator(".m2m canvas").wait_for(timeout=120_000)
        choose_on_map(page, "number 17")
        page.locator(".m2m .m2m-why").first.click()
        page.locator(".m2h .m2h-sides").first.wait_for(timeout=120_000)
        page.get_by_role("button", name="select these").click()
        until(page, lambda: "1 product selected" in page.locator(".m2m-chosen").inner_text(), "the selection")
        run_cell(page, 1)
        printed = page.locator(".jp-OutputArea-output", has_text="active p017 selected 1")
        printed.wait_for(timeout=60_000)
        page = save_and_reopen(page, browser, address, tmp_path / "map.ipynb")
        page.locator(".m2m canvas").wait_for(timeout=90_000)
        assert "number 17" in page.locator(".m2m-product").inner_text()
        page.get_by_role("button", name="clear").click()
        choose_on_map(page, "number 30")
        assert page.locator(".m2m-hits li").count() == 8
        keep_screenshot(page, "saved_map.png")
        page.close()
