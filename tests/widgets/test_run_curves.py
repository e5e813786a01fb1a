"""The curves of a run in a page of their own: values at the step that is pointed at, switches, keys, updates in place,
420 px, both colour schemes; what they weigh and how long an update takes.
"""
import base64
import json
import re
import time

import numpy as np
import pytest
from browsing import contrast, keep_screenshot, outside, settle, until

from choosing import PHONES
from moon2_lab.config import OBJECTIVES
from moon2_lab.testing import made_up_history
from moon2_lab.widgets.run_curves import RunCurves

HOSTILE = "<img src=x onerror=window.pwned=1> 红色 &amp;"
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>curves</title>
<style>body { margin: 0; background: light-dark(#fff, #000); color-scheme: light dark } CSS</style>
<main></main><script type="module">
ESM
const state = STATE, heard = {};
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (one) => one.charCodeAt(0)).buffer);
const tell = (name) => { for (const one of heard[name] ?? []) one(); };
state.data = bytes(state.data);
window.model = { get: (name) => state[name], set: (name, value) => { state[name] = value; tell(`change:${name}`); },
  save_changes: () => {}, on: (name, told) => (heard[name] ??= new Set()).add(told),
  off: (name, told) => heard[name].delete(told), heard, take: (curves, data) => {
    state.curves = curves; state.data = bytes(data); tell("change:curves"); tell("change:data"); } };
window.stop = widget.render({ model: window.model, el: document.querySelector("main") });
</script></html>"""
TRAITS = ("panels", "curves", "hidden", "expert")


def encoded(widget):
    return base64.b64encode(widget.data).decode()


def recalls(steps):
    "A history with recall at every tenth step."
    history = made_up_history(steps)
    return history.assign(**{"valid_R@10_t->mm": np.where(history.step % 10 == 0, history.step / steps, np.nan)})


@pytest.fixture
def widget(request):
    return RunCurves(getattr(request, "param", recalls(120)))


@pytest.fixture
def page(browser, widget, tmp_path, request):
    "The widget's page."
    requests, wrong = [], []
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 1000}} | dict(getattr(request, "param", {})))
    page.on("request", lambda asked: requests.append(asked.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    state = json.dumps({name: getattr(widget, name) for name in TRAITS} | {"data": encoded(widget)})
    esm, path = widget._esm.replace("export default", "const widget ="), tmp_path / "page.html"
    page_text = PAGE.replace("CSS", widget._css).replace("ESM", esm).replace("STATE", state.replace("<", "\\u003c"))
    path.write_text(page_text, encoding="utf-8")
    page.goto(path.as_uri())
    page.locator(".m2t h4").first.wait_for()
    settle(page)
    yield page
    assert not wrong and not outside(requests, path.as_uri()) and page.evaluate("window.pwned") is None
    page.close()


def panel(page, key):
    return page.locator(f".m2t-panel[data-panel={key}]")


def names_drawn(page, key):
    "The names of the curves that a panel draws now."
    return set(panel(page, key).locator(".m2t-paths path").evaluate_all("all => all.map((one) => one.dataset.name)"))


def value_of(page, key, name):
    "What stands beside a name in the legend of a panel."
    switch = panel(page, key).locator("button", has_text=re.compile(f"^{re.escape(name)}"))
    return switch.locator(".m2t-value").inner_text()


def test_every_panel_has_its_curves_and_the_values_of_the_step_that_is_pointed_at(page, widget):
    assert names_drawn(page, "loss") == {"total", *OBJECTIVES} and names_drawn(page, "p") == set(OBJECTIVES)
    assert panel(page, "loss").locator("path[data-kind=unfiltered]").count() == 12 - 6
    assert panel(page, "recall").locator(".m2t-paths path").count() == 1
    history = recalls(120).set_index("step")
    assert float(value_of(page, "omega", "inter_t")) == pytest.approx(history.omega_inter_t[120], abs=6e-4)
    box = panel(page, "loss").locator("svg[role=slider]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    settle(page)
    step = int(re.search(r"step (\d+)", page.locator(".m2t-where").inner_text())[1])
    assert 45 <= step <= 75
    for key, name, column in (("omega", "intra_n", "omega_intra_n"), ("phi", "median", "phi_q50")):
        assert float(value_of(page, key, name)) == pytest.approx(history[column][step], rel=6e-3)
    first, second = re.findall(r"[\d.]+", value_of(page, "loss", "inter_mm"))
    assert float(first) == pytest.approx(history.loss_inter_mm[step], rel=6e-3)
    assert float(second) == pytest.approx(history.unfiltered_inter_mm[step], rel=6e-3)
    assert page.locator(".m2t-cursor:not([hidden])").count() == 6  # one step in all panels
    keep_screenshot(page, "curves.png")
    page.mouse.move(2, 2)
    settle(page)
    assert "last step, 120" in page.locator(".m2t-where").inner_text()


def test_a_switch_takes_a_name_out_of_all_panels(page):
    panel(page, "loss").get_by_role("button", name="inter_t", exact=False).first.click()
    settle(page)
    for key in ("loss", "omega", "p"):
        assert names_drawn(page, key) >= {"inter_i"} and "inter_t" not in names_drawn(page, key)
    panel(page, "loss").get_by_role("button", name="unfiltered", exact=False).click()
    settle(page)
    assert panel(page, "loss").locator("path[data-kind=unfiltered]").count() == 0
    assert page.evaluate("window.model.get('hidden')") == ["name inter_t", "kind unfiltered"]
    page.get_by_role("button", name="show all curves").click()
    settle(page)
    assert "inter_t" in names_drawn(page, "omega") and page.locator(".m2t-all").is_hidden()


def test_preferences_of_one_expert(page):
    history = recalls(120).set_index("step")
    mean = history[[f"p_{z}_inter_t" for z in range(4)]].mean(axis=1)
    assert float(value_of(page, "p", "inter_t")) == pytest.approx(mean[120], abs=6e-4)
    panel(page, "p").locator("select").select_option("0")
    settle(page)
    assert float(value_of(page, "p", "inter_t")) == pytest.approx(history.p_0_inter_t[120], abs=6e-4)


@pytest.mark.parametrize("page", PHONES, indirect=True)
def test_by_keyboard_on_a_phone(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    picture = panel(page, "omega").locator("svg[role=slider]")
    picture.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert picture.get_attribute("aria-valuenow") == "2"
    assert "step 2: inter_t 0.2" in picture.get_attribute("aria-valuetext")
    page.keyboard.press("Escape")
    settle(page)
    assert picture.get_attribute("aria-valuenow") == "120"
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    settle(page)
    assert "inter_t" not in names_drawn(page, "omega")
    keep_screenshot(page, f"curves_420_{page.evaluate('matchMedia(`(prefers-color-scheme: dark)`).matches')}.png")
    colours = page.locator(".m2t-paths path, .m2t-value, .m2t-where").evaluate_all("""all => all.map((one) => {
      const style = getComputedStyle(one); return one.matches('path') ? style.stroke : style.color; })""")
    paper = page.evaluate("getComputedStyle(document.querySelector('.m2t')).backgroundColor")
    rgb = lambda colour: [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    assert min(contrast(rgb(colour), rgb(paper)) for colour in colours) >= 3


@pytest.mark.parametrize("widget", [made_up_history(500)], indirect=True)
def test_an_update_moves_the_curves_that_are_there_and_takes_few_milliseconds(page, widget):
    page.evaluate("window.kept = document.querySelector('.m2t-panel[data-panel=loss] .m2t-paths path')")
    before = page.evaluate("window.kept.getAttribute('d')")
    rows = made_up_history(520).to_dict("records")
    spent = []
    for row in rows[500:]:
        started = time.perf_counter()
        widget.add(row)
        widget.draw()
        spent.append(time.perf_counter() - started)
    drawing = page.evaluate("""async ([curves, data]) => {
        const took = [], frame = window.requestAnimationFrame;
        window.requestAnimationFrame = (draw) => frame(() => {
          const start = performance.now();
          draw();
          took.push(performance.now() - start); });
        for (let turn = 0; turn < 5; turn += 1) {
          window.model.take(curves, data);
          await new Promise((done) => frame(() => frame(done))); }
        window.requestAnimationFrame = frame;
        return took; }""", [widget.curves, encoded(widget)])
    print(f"an update at 500 steps: kernel {1000 * min(spent):.1f} ms, browser {min(drawing):.1f} ms")
    assert min(spent) < 0.05 and min(drawing) < 50
    until(page, lambda: page.evaluate("window.kept.getAttribute('d')") != before, "moved curves")
    assert page.evaluate("window.kept.isConnected")
    assert "last step, 520" in page.locator(".m2t-where").inner_text()


def test_the_state_of_500_steps_is_small():
    widget = RunCurves(made_up_history(500))
    state = {name: value for name, value in widget.get_state().items() if name in (*TRAITS, "data")}
    size = sum(len(encoded(widget)) if name == "data" else len(json.dumps(value)) for name, value in state.items())
    whole = size + len(widget._esm) + len(widget._css)
    print(f"state of 500 steps: {size:,} bytes; with script and style {whole:,}")
    assert size < 50_000 and len(RunCurves(made_up_history(3000)).data) == len(widget.data)


@pytest.mark.parametrize(
    "widget", [[{"step": n, "loss": 3.0 - n / 9, f"omega_{HOSTILE}": n / 9} for n in range(9)], []], indirect=True
)
def test_names_are_text_and_an_empty_history_says_so(page, widget):
    if widget.curves:
        assert HOSTILE in panel(page, "omega").inner_text() and page.locator(".m2t img").count() == 0
    else:
        assert page.locator(".m2t-where").inner_text() == "No step has been taken yet."
    assert page.locator(".m2t-none").count() == (4 if widget.curves else 6)


def test_nothing_is_left_of_a_view_that_is_closed(page):
    page.evaluate("window.stop()")
    assert page.evaluate("Object.values(window.model.heard).every((heard) => heard.size === 0)")
