"""The what-if widget in a page of its own: what is typed is sent after a quiet, the last edit wins, old numbers are
marked, errors are told; without a kernel the last state is shown; by keyboard, at 420 px, in both colour schemes.
"""

import pytest
from browsing import contrast, keep_screenshot, outside, settle, until, write_widget_page

from choosing import PHONES
from moon2_lab.data.products import Item, Product
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.testing import flat_picture, made_up_catalog
from moon2_lab.widgets.what_if import what_if_widget

HOSTILE = "<img src=x onerror=window.pwned=1></script><script>window.pwned=2</script> \u202egnol 红色 &amp;"



@pytest.fixture
def widget():
    "Of drawn products, one with a hostile title."
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=1, seed=0), std=0.1).eval()
    products = [*made_up_catalog(20), Product("bad", HOSTILE, refs=(flat_picture(3),))]
    return what_if_widget(encoder, Item("blue vase", None, "query"), products[8].item(), products, k=21)


@pytest.fixture
def page(browser, widget, tmp_path, request):
    "The widget's page, its kernel answering; with `dead` without one."
    how = dict(getattr(request, "param", {}))
    dead, requests, wrong = how.pop("dead", False), [], []
    page = browser.new_page(**{"viewport": {"width": 1100, "height": 1000}} | how)
    page.on("request", lambda asked: requests.append(asked.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.sent = []

    def kernel(message, asked):
        if message["do"] == "hello":
            return message
        page.sent.append(asked)
        widget.asked = asked
        widget.wait()
        return widget.shown

    if not dead:
        page.expose_function("kernel", kernel)
    path = write_widget_page(tmp_path / "page.html", widget, ("start", "asked", "shown"), "edit")
    page.goto(path.as_uri())
    page.locator(".m2w table").wait_for()
    settle(page)
    yield page
    assert not wrong and not outside(requests, path.as_uri()) and page.evaluate("window.pwned") is None
    page.close()


def rewrite(page, label, words):
    "Type in place of what stands in a box."
    page.get_by_label(label, exact=True).focus()
    page.keyboard.press("Control+a")
    page.keyboard.type(words, delay=20)


def answered(page, widget):
    "Until what was typed last is answered and shown."
    until(page, lambda: page.locator(".m2w-answer[aria-busy=false]").count() == 1, "an answer", 30)
    return page.locator(".m2w table").inner_text()


def test_an_edit_is_sent_once_and_moves_the_numbers(page, widget):
    assert "no difference" in page.locator(".m2w table").inner_text()
    rewrite(page, "Item: text", "zinc bucket")
    assert page.locator(".m2w-answer.m2w-old").count() == 1  # marked at once
    assert "the numbers below are old" in page.locator(".m2w-status").inner_text()
    told = answered(page, widget)
    assert [one["item"]["text"] for one in page.sent] == ["zinc bucket"]
    for words in (f"{widget.result.after.score:.4f}", widget.result.score_words, widget.result.rank_words):
        assert words in told
    assert "added 'zinc bucket'" in page.locator(".m2w fieldset").nth(1).inner_text()
    assert page.locator(".m2w-old").count() == 0
    assert HOSTILE in page.locator(".m2w-hits").inner_text()  # as text
    keep_screenshot(page, "what-if.png")
    page.get_by_role("button", name="Item as it was").click()
    assert "no difference" in answered(page, widget) and widget.result.after == widget.result.before


def test_pictures_are_dropped_and_swapped(page, widget):
    item = page.locator(".m2w fieldset").nth(1)
    item.get_by_label("without a picture").check()
    answered(page, widget)
    assert widget.result.edits[1].picture == "dropped" and item.locator("img").is_hidden()
    item.get_by_label("another product's picture").check()
    rewrite(page, "Item: whose picture", "bad")
    answered(page, widget)
    assert widget.result.edits[1].picture == "swapped" and widget.result.item.image.key == flat_picture(3).key
    assert item.locator("img").evaluate("one => one.naturalWidth > 0")


@pytest.mark.parametrize("page", PHONES, indirect=True)
def test_by_keyboard_on_a_phone_an_error_is_told_and_the_old_numbers_stay(page, widget):
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    before = page.locator(".m2w table").inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Query: text"
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    until(page, lambda: page.locator(".m2w-wrong").is_visible(), "the error", 30)
    assert "nothing is left to read of the query" in page.locator(".m2w-wrong").inner_text()
    assert page.locator(".m2w table").inner_text() == before and page.locator(".m2w-old").count() == 1
    assert "are old" in page.locator(".m2w-status").inner_text()
    page.keyboard.type("red tray", delay=20)
    assert answered(page, widget) != before and not page.locator(".m2w-wrong").is_visible()
    read = "one => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = one; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3); }"  # noqa: E501
    paper = page.evaluate(f"({read})(getComputedStyle(document.querySelector('.m2w')).backgroundColor)")
    for place in (".m2w-change", ".m2w-status", ".m2w fieldset .m2w-soft", ".m2w-score"):
        ink = page.evaluate(f"({read})(getComputedStyle(document.querySelector('{place}')).color)")
        assert contrast(ink, paper) >= 4.5, place
    keep_screenshot(page, "what-if-phone.png")


@pytest.mark.parametrize("page", [{"dead": True}], indirect=True)
def test_without_a_kernel_the_last_state_is_shown_and_said(page, widget):
    status = page.locator(".m2w-status")
    until(page, lambda: "Editing needs a running kernel" in status.inner_text(), "the note", 20)
    assert page.get_by_label("Item: text").is_disabled() and page.locator(".m2w-old").count() == 0
    assert f"{widget.result.before.score:.4f}" in page.locator(".m2w table").inner_text()
