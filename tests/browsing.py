"What the tests in a real browser share: a JupyterLab of one's own, cells that are run by clicks, and waiting."
import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import nbformat
from PIL import Image

from bench.demo_load import free_port

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def jupyter_lab(folder, cells, name="test.ipynb", settings=None):
    """A JupyterLab in `folder` with one notebook of these cells, and the settings of `make lab` where `settings` names
    their folder; gives its address.
    """
    cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in cells]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
        ),
        folder / name,
    )
    port, home = free_port(), folder / "home"
    home.mkdir()
    env = os.environ | {
        "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_DATA_DIR": str(home / "data"), "OMP_NUM_THREADS": "1",
    }
    options = [
        "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--port-retries=0", "--IdentityProvider.token=",
        "--ServerApp.password=", "--ServerApp.disable_check_xsrf=True", "--allow-root",
    ]
    options += [f"--LabApp.app_settings_dir={settings}"] if settings else []
    log, address = folder / "server.log", f"http://127.0.0.1:{port}"
    with open(log, "w") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options, str(folder)], env=env, stdout=file, stderr=subprocess.STDOUT,
            cwd=folder,
        )
    try:
        wait_for(address, server, log)
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


def close_dialog(dialog):
    """Accept what JupyterLab asks (on a busy machine it may ask for the kernel or report a late save); its words go
    into the test's output.
    """
    print("JupyterLab asked:", " ".join(dialog.inner_text().split()))
    dialog.locator(".jp-Dialog-button.jp-mod-accept").last.click()


def open_notebook(page, address, name="test.ipynb"):
    "The notebook in JupyterLab, its kernel ready."
    page.add_locator_handler(page.locator("dialog.jp-Dialog").first, close_dialog)
    page.goto(f"{address}/lab/tree/{name}?reset", wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=90_000)
    page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached", timeout=60_000)


def run_cell(page, number):
    "Click into a cell and run it; once more where JupyterLab, still starting, lost it."
    cell = page.locator(".jp-Notebook .jp-CodeCell").nth(number)
    for _ in range(10):
        cell.locator(".jp-InputArea-editor").click(position={"x": 300, "y": 8})
        page.keyboard.press("Shift+Enter")
        page.wait_for_timeout(1000)
        if "[ ]" not in cell.locator(".jp-InputPrompt").inner_text():
            return
    raise AssertionError(f"cell {number} does not run")


def texts_in_frame(page, frame: str, inside: str) -> list[str]:
    "Texts of what `inside` selects in a frame; none while the frame is being replaced."
    from playwright.sync_api import Error

    try:
        return page.frame_locator(frame).locator(inside).all_inner_texts()
    except Error as error:
        if "detached" not in str(error):
            raise
        return []


def until(page, holds, what, seconds=60, tell=lambda: ""):
    "Poll until `holds()`; `tell()` says how things stand when it never does."
    for _ in range(seconds * 10):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"waited {seconds} s for: {what}; {tell()}")


def settle(page):
    "Until what was asked for is drawn."
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


@contextmanager
def watched_page(browser, file, drawn, **how):
    """The page of a file in a browser, once `drawn` is there; afterwards it must have asked nothing of the network,
    told no error, and run nothing that a title holds (`window.pwned`).
    """
    page, asked, wrong = browser.new_page(**{"viewport": {"width": 1200, "height": 950}} | how), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    page.locator(drawn).wait_for()
    settle(page)
    yield page
    assert not outside(asked, file.as_uri()) and wrong == []
    assert page.evaluate("window.pwned") is None
    page.close()


_WIDGET_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>widget</title>
<style>body { margin: 0; background: light-dark(#fff, #000); color-scheme: light dark } CSS</style>
<main></main><script type="module">
ESM
const state = STATE, heard = {};
const tell = (name, ...values) => { for (const one of heard[name] ?? []) one(...values); };
const set = (name, value) => { state[name] = value; tell(`change:${name}`); };
const ask = async (message) => {
  const answer = await window.kernel?.(message, state.asked);
  if (answer?.do) tell("msg:custom", answer); else if (answer) set("shown", answer);
};
window.model = { get: (name) => state[name], set, save_changes: () => ask({ do: "SAVED" }), send: ask,
  on: (name, told) => (heard[name] ??= new Set()).add(told), off: (name, told) => heard[name].delete(told), heard };
window.stop = widget.render({ model: window.model, el: document.querySelector("main") });
</script></html>"""


def write_widget_page(path, widget, traits, saved):
    """The page of an anywidget with these traits; its kernel is the function `window.kernel`, where a test exposes one,
    and hears {do: saved} when a trait is saved.
    """
    state = json.dumps({name: getattr(widget, name) for name in traits}).replace("<", "\\u003c")
    esm = widget._esm.replace("export default", "const widget =")
    filled = _WIDGET_PAGE.replace("CSS", widget._css).replace("ESM", esm).replace("SAVED", saved)
    path.write_text(filled.replace("STATE", state), encoding="utf-8")
    return path


def choose_on_map(page, title):
    "Find a product of an embedding map by its title, and choose it by keys."
    page.locator(".m2m input[type=search]").fill(title)
    page.locator(".m2m canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    settle(page)
    until(page, lambda: title in page.locator(".m2m-product").inner_text(), f"{title} beside the map")


def serious_violations(page):
    "What axe-core finds on the page that is serious or critical: rule, place and words, one line each."
    from axe_playwright_python.sync_playwright import Axe

    rules = [rule for rule in Axe().run(page).response["violations"] if rule["impact"] in ("serious", "critical")]
    return [
        f"{rule['id']}: {node['target']}: {' '.join(node['failureSummary'].split())}"
        for rule in rules for node in rule["nodes"]
    ]


def assert_cut_connections(told):
    "What a page of Gradio told when it was left while it asked: nothing but its cut connections."
    assert all("AbortError" in one or "Connection errored out" in one for one in told), told


def keep_screenshot(page, name):
    "A picture to be looked at, where MOON2_SCREENSHOTS names a folder."
    if os.environ.get("MOON2_SCREENSHOTS"):
        page.screenshot(path=os.path.join(os.environ["MOON2_SCREENSHOTS"], name))


def rewrite(page, box, words):
    "Type in place of what stands in a box."
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(words, delay=20)


def keep_picture(page, name, width=860):
    """A picture for the docs, `width` pixels wide in few colours, where MOON2_SCREENSHOTS names a folder; an empty page
    is an error everywhere.
    """
    seen = """[...document.images].every((one) => one.complete || !one.getClientRects().length
        || one.getBoundingClientRect().top > innerHeight)"""
    until(page, lambda: page.evaluate(seen), "pictures", 20)
    settle(page)
    taken = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    assert len(taken.getcolors(1 << 24)) > 50, f"{name}: an empty page"
    if os.environ.get("MOON2_SCREENSHOTS"):
        small = taken.resize((width, round(taken.height * width / taken.width)), Image.Resampling.LANCZOS)
        small = small.quantize(256, Image.Quantize.FASTOCTREE)
        small.save(os.path.join(os.environ["MOON2_SCREENSHOTS"], name), optimize=True)


def outside(urls, address):
    "The requests that went to another place than `address`."
    return [url for url in urls if not url.startswith((address, address.replace("http", "ws"), "blob:", "data:"))]


def luminance(colour):
    "Relative luminance of (r, g, b)."
    linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    "Contrast ratio of two colours, 1 to 21."
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
