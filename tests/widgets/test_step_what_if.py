"""The what-if of a training step in a page of its own: sliders are sent once after a quiet, both steps are drawn with
the difference in words, errors are told; without a kernel, before the first step, by keyboard, at 420 px.
"""
import re
from choosing import PHONES
from types import SimpleNamespace

import pytest
from browsing import contrast, keep_screenshot, outside, settle, until, write_widget_page

from moon2_lab.config import TrainConfig
from moon2_lab.testing import made_up_history
from moon2_lab.widgets.step_what_if import StepWhatIf

HOSTILE = "<img src=x onerror=window.pwned=1> 红色"



class Straw:
    "A trainer whose loss is colder as the temperature falls, and whose omega leans with the mode."
    config, objective = TrainConfig(), SimpleNamespace(with_config=None)

    def what_if(self, **changes):
        row = made_up_history(30).to_dict("records")[20] | {f"loss_{HOSTILE}": 1.0}
        if changes.get("temperature") == 0.5:
            raise ValueError(f"no luck {HOSTILE}")
        moved = {"loss": row["loss"] * changes.get("temperature", 0.05) / 0.05}
        moved |= {"omega_inter_t": 0.5} if "omega_mode" in changes else {}
        return [[SimpleNamespace(data={"row": each})] for each in (row, row | moved)]


@pytest.fixture
def widget():
    return StepWhatIf(Straw())


@pytest.fixture
def page(browser, widget, tmp_path, request):
    "The widget's page, its kernel answering; with `dead` without one, with `early` before the first step."
    how, requests, wrong = dict(getattr(request, "param", {})), [], []
    dead, widget.ready = how.pop("dead", False), not how.pop("early", False)
    if dead:
        widget.asked = {"number": 1, "temperature": 0.1}
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 800}} | how)
    page.on("request", lambda asked: requests.append(asked.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.sent = []

    def kernel(message, asked):
        if message["do"] == "hello":
            return message
        page.sent.append(asked)
        widget.asked = asked
        return widget.shown

    if not dead:
        page.expose_function("kernel", kernel)
    names = ("settings", "ready", "asked", "shown")
    path = write_widget_page(tmp_path / "page.html", widget, names, "asked")
    page.goto(path.as_uri())
    page.locator(".m2s fieldset").wait_for()
    settle(page)
    yield page
    assert not wrong and not outside(requests, path.as_uri()) and page.evaluate("window.pwned") is None
    page.close()


def slide(page, name, *keys):
    "Press keys on a slider."
    page.locator(f"[data-control={name}] input").focus()
    for key in keys:
        page.keyboard.press(key)


def answered(page):
    "Until what was asked last is answered and shown."
    until(page, lambda: page.locator(".m2s-answer[aria-busy=false]").count() == 1, "an answer", 30)
    return page.locator(".m2s-status").inner_text()


def numbers(page, name):
    "The two numbers and the words of a row."
    row = page.locator(f".m2s tr[data-name={name}]").first
    return [*row.locator(".m2s-number").evaluate_all("all => all.map((one) => Number(one.lastChild.data))"),
            row.locator("td").last.inner_text()]


def test_sliders_are_sent_once_and_both_steps_are_drawn(page, widget):
    slide(page, "temperature", "ArrowRight", "ArrowRight")  # 0.07, 0.1: one wish
    assert "0.1" in page.locator("[data-control=temperature] output").inner_text()
    words = answered(page)
    assert [asked["temperature"] for asked in page.sent] == [0.1]
    assert words == widget.shown["summary"] and "temperature 0.1 instead of 0.05" in words
    before, after = widget.shown["losses"][0][1:3]
    assert numbers(page, "total") == [round(before, 3), round(after, 3), f"{before:.3f} higher"] and after == 2 * before
    assert numbers(page, "inter_i")[2] == "no difference"
    assert page.locator(".m2s table").nth(0).inner_text().count(HOSTILE) == 1  # as text
    page.locator("[data-control=omega_mode] select").select_option("faithful")
    assert "omega mode faithful instead of balanced" in answered(page)
    omega = page.locator(".m2s table").nth(1).locator("tr[data-name=inter_t]")
    wide = omega.locator(".m2s-fill").evaluate_all("all => all.map((one) => parseFloat(one.style.width))")
    assert wide[1] == 100 and 30 < wide[0] < 50 and "higher" in omega.inner_text()
    keep_screenshot(page, "step_what_if.png")
    page.get_by_role("button", name="as configured").click()
    until(page, lambda: page.locator(".m2s table").count() == 0, "nothing to compare")
    assert page.evaluate("window.model.get('asked').temperature") == 0.05


def test_an_error_is_told_and_the_last_comparison_is_marked_as_old(page):
    slide(page, "temperature", "Home")
    answered(page)
    slide(page, "temperature", "End")
    answered(page)
    assert f"ValueError: no luck {HOSTILE}" in page.locator(".m2s-wrong").inner_text()
    assert page.locator(".m2s-answer.m2s-old tr").count() > 5


@pytest.mark.parametrize("page", [{"early": True}], indirect=True)
def test_before_the_first_step_nothing_can_be_tried(page):
    assert page.locator(".m2s select").is_disabled()
    assert page.locator(".m2s-status").inner_text() == "The settings can be tried after the first step."
    page.evaluate("window.model.set('ready', true)")
    assert page.locator(".m2s select").is_enabled()


@pytest.mark.parametrize("page", [{"dead": True}], indirect=True)
def test_without_a_kernel_the_last_comparison_is_shown(page, widget):
    page.locator(".m2s-status", has_text="No kernel answers").wait_for(timeout=20_000)
    assert page.locator(".m2s select").is_disabled() and numbers(page, "total")[2].endswith("higher")
    assert "0.1" in page.locator("[data-control=temperature] output").inner_text()


@pytest.mark.parametrize("page", PHONES, indirect=True)
def test_by_keyboard_on_a_phone(page):
    slide(page, "intra_temperature", "Tab")
    page.keyboard.press("ArrowDown")  # the list of modes
    words = answered(page)
    assert "omega mode" in words and page.evaluate("document.documentElement.scrollWidth") <= 420
    scheme = page.evaluate("matchMedia(`(prefers-color-scheme: dark)`).matches")
    keep_screenshot(page, f"step_what_if_420_{scheme}.png")
    rgb = lambda colour: [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    seen = page.locator(".m2s-status, .m2s-number, .m2s td, .m2s th").evaluate_all(
        "all => all.map((one) => getComputedStyle(one).color)")
    paper = page.evaluate("getComputedStyle(document.querySelector('.m2s')).backgroundColor")
    assert min(contrast(rgb(colour), rgb(paper)) for colour in seen) >= 4.5


def test_nothing_is_left_of_a_view_that_is_closed(page):
    page.evaluate("window.stop()")
    assert page.evaluate("Object.values(window.model.heard).every((heard) => heard.size === 0)")
