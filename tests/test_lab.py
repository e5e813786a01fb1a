"""The live view in a real JupyterLab, in a real browser: it appears, its curves move, its buttons work, and a still figure takes its place."""
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
import pytest

pytestmark = pytest.mark.slow
CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
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


def free_port():
    "A port nobody listens on."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def lab(request, tmp_path, drawn_catalogue):
    "A JupyterLab in a folder of its own, with one notebook; its address."
    steps = request.param
    cells = [SETUP.replace("FOLDER", repr(str(drawn_catalogue))).replace("STEPS", str(steps)).strip(), "print('seen', trainer.step > 0, live.state)", "history = await live\nprint('rows', len(history))"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, tmp_path / "live.ipynb")
    port, home = free_port(), tmp_path / "home"
    env = os.environ | {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "JUPYTER_DATA_DIR": str(home / "data"), "OMP_NUM_THREADS": "1"}
    home.mkdir()
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0", "--IdentityProvider.token=", "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True", "--allow-root"]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options, str(tmp_path)], env=env, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, server, tmp_path / "server.log")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, server, log):
    "Until the server answers."
    for _ in range(240):
        try:
            with urllib.request.urlopen(f"{address}/api", timeout=2):
                return
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.5)
    raise AssertionError(f"no answer from JupyterLab\n{log.read_text()[-2000:]}")


def run_cell(page, number):
    "Click into a cell and run it."
    page.locator(".jp-Notebook .jp-CodeCell .jp-InputArea-editor").nth(number).click(position={"x": 300, "y": 8})
    page.keyboard.press("Shift+Enter")


def status(page):
    "The status line of the live view."
    return page.locator(".widget-html-content", has_text=re.compile("step \\d+ of")).first.inner_text(timeout=60_000)


def step_now(page):
    "The step that the status line tells."
    return int(re.search(r"step (\d+)", status(page))[1])


def wait_until(page, holds, what, seconds=60):
    "Poll until `holds()`."
    for _ in range(seconds * 5):
        if holds():
            return
        page.wait_for_timeout(200)
    raise AssertionError(f"waited {seconds} s for: {what}; status: {status(page)}")


@contextmanager
def notebook_page(address):
    "The notebook in a browser, its kernel ready."
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(f"{address}/lab/tree/live.ipynb?reset", wait_until="domcontentloaded")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
        page.get_by_text("Python 3").first.wait_for(timeout=60_000)
        yield page
        browser.close()


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
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install it to test JupyterLab")


@needs_browser
@pytest.mark.parametrize("lab", [600], indirect=True)
def test_buttons_of_the_live_view(lab, tmp_path):
    "Pause, one step, continue, another cell meanwhile; then `await`, which does not hold the kernel."
    with notebook_page(lab) as page:
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


@needs_browser
@pytest.mark.parametrize("lab", [120], indirect=True)
def test_a_run_that_ends_in_the_background(lab, tmp_path):
    "Stop, continue, and no other cell: at the end the still figure is there."
    with notebook_page(lab) as page:
        run_cell(page, 0)
        page.locator(CURVES).first.wait_for(timeout=120_000)
        press(page, "Stop")
        wait_until(page, lambda: status(page).startswith("stopped"), "the stop")
        press(page, "Continue")
        assert_still(page, tmp_path)
