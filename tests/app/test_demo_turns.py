"""Clicks that are quicker than the server: the last one is shown, a search clears what was opened meanwhile, and nobody
waits for a measurement that nobody wants any more."""
import threading
from types import SimpleNamespace

import pytest
from browsing import texts_in_frame, until

pytest.importorskip("gradio")

from moon2_lab.app.interface import build_demo
from moon2_lab.app.tabs import HitGallery
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

pytestmark = pytest.mark.usefixtures("own_cache")
WAIT = 60  # seconds


@pytest.fixture(scope="module")
def demo(drawn_catalogue):
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), 0.05, seed=1).eval()
    return build_demo(encoder, catalog=Catalog.load(drawn_catalogue), names=("first",))


@pytest.fixture
def page(browser, address):
    "The hits of a query in words."
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto(f"{address}?q=black+bag")
    page.locator(".moon2-hits button img").first.wait_for(timeout=WAIT * 1000)
    yield page
    page.close()


@pytest.fixture
def held(demo, monkeypatch):
    "An explanation of `held.hold`, (product, whether it is measured), waits for `held.release`; `asked` notes all."
    model, held = demo.service.model("A"), SimpleNamespace(hold=None, asked=[], given_up=[], release=threading.Event())
    plain = model.explain

    def explain(query, item, methods, tell=lambda share, what: None, measure=True, cancelled=lambda: False):
        held.asked.append((item.item_id, measure))
        if (item.item_id, measure) == held.hold:
            while not held.release.wait(0.01):
                if measure and cancelled():
                    held.given_up.append(item.item_id)
                    break
        return plain(query, item, methods, tell, measure, cancelled)

    monkeypatch.setattr(model, "explain", explain)
    yield held
    held.release.set()


def found(demo, words: str = "black bag") -> list[str]:
    "Ids of the hits."
    return [hit["product_id"] for hit in demo.service.search(words, None, "mm", 12)["hits"]]


def click(page, place: int):
    page.locator(".moon2-hits button img").nth(place - 1).click()


def mapped(page) -> str:
    "The product whose map is shown."
    heading = texts_in_frame(page, "#moon2-heat iframe", ".m2h-side[data-side=item] h3")
    return " ".join(heading).removeprefix("Item").strip()


def second_while_first_is_held(page, demo, held, measured: bool) -> tuple[str, str]:
    "Opens the second hit while the first one's map, or its measurement, is under way; both ids, once the map is there."
    first, second, *_ = found(demo)
    held.hold = (first, measured)
    click(page, 1)
    until(page, lambda: held.hold in held.asked, "the explanation of the first hit", WAIT)
    click(page, 2)
    until(page, lambda: mapped(page) == second, "the map of the second hit", WAIT)
    return first, second


def test_the_last_click_is_shown(page, demo, held):
    "The second hit's map comes while the first one's is still being made, and stays when that is done."
    _, second = second_while_first_is_held(page, demo, held, measured=False)
    assert "Hit 2 of" in page.locator("#moon2-details").inner_text()
    held.release.set()
    until(page, lambda: "Faithfulness" in page.locator("#moon2-trust").inner_text(), "its measurement", WAIT)
    assert mapped(page) == second and "Hit 2 of" in page.locator("#moon2-details").inner_text()


def test_a_measurement_is_given_up_by_the_next_click(page, demo, held):
    "The map of the second hit does not wait for the measurement of the first, which ends at once."
    first, second = second_while_first_is_held(page, demo, held, measured=True)
    assert set(held.given_up) == {first} and not held.release.is_set()
    until(page, lambda: "Faithfulness" in page.locator("#moon2-trust").inner_text(), "its measurement", WAIT)
    assert held.asked[-1] == (second, True)


def test_a_late_map_does_not_stand_beside_new_hits(page, demo, held):
    "A search while a hit is being explained: the new hits come, nothing is open, and the map of before stays away."
    first = found(demo)[0]
    held.hold = (first, False)
    click(page, 1)
    until(page, lambda: (first, False) in held.asked, "the explanation", WAIT)
    page.get_by_label("Words", exact=True).fill("white lamp")
    page.get_by_role("button", name="Search", exact=True).click()
    until(page, lambda: not page.locator("#moon2-details").inner_text().strip(), "the new hits", WAIT)
    held.release.set()
    page.wait_for_timeout(1500)
    assert mapped(page) == "" and not page.locator("#moon2-trust").inner_text().strip()
    click(page, 1)
    until(page, lambda: mapped(page) == found(demo, "white lamp")[0], "the map of the new first hit", WAIT)


def test_a_hit_that_is_opened_during_a_search_goes_with_it(page, demo, monkeypatch):
    "The old hits can be clicked until the new ones are there; then nothing of them is left, neither facts nor a map."
    find, began, release = demo.service.find, threading.Event(), threading.Event()

    def late(query, *given, **named):
        if query.text == "white lamp":
            began.set()
            release.wait(WAIT)
        return find(query, *given, **named)

    monkeypatch.setattr(demo.service, "find", late)
    page.get_by_label("Words", exact=True).fill("white lamp")
    page.get_by_role("button", name="Search", exact=True).click()
    assert began.wait(WAIT)
    click(page, 1)
    details = page.locator("#moon2-details")
    until(page, lambda: "Hit 1 of" in details.inner_text(), "the facts of an old hit", WAIT)
    release.set()
    until(page, lambda: not details.inner_text().strip(), "the new hits", WAIT)
    page.wait_for_timeout(1500)
    assert not details.inner_text().strip() and mapped(page) == "" and not page.locator("#moon2-alike").is_visible()


def test_another_method_during_an_answer_is_not_of_two_searches(page, demo, held, monkeypatch):
    "The new hits are found, and are on their way to the page: a map that is asked for now is of none of them."
    first, write, began, release = found(demo)[0], HitGallery.postprocess, threading.Event(), threading.Event()
    click(page, 1)
    until(page, lambda: "Faithfulness" in page.locator("#moon2-trust").inner_text(), "the first hit", WAIT)

    def late(gallery, value):
        began.set()
        release.wait(WAIT)
        return write(gallery, value)

    monkeypatch.setattr(HitGallery, "postprocess", late)
    page.get_by_label("Words", exact=True).fill("white lamp")
    page.get_by_role("button", name="Search", exact=True).click()
    assert began.wait(WAIT)
    asked, held.hold = len(held.asked), (first, True)
    page.get_by_label("Explained by").click()
    page.get_by_role("option", name="occlusion").click()
    page.wait_for_timeout(1500)  # long enough to be asked
    release.set()
    until(page, lambda: not page.locator("#moon2-details").inner_text().strip(), "the new hits", WAIT)
    held.release.set()
    page.wait_for_timeout(1500)
    assert mapped(page) == "" and not page.locator("#moon2-trust").inner_text().strip()
    assert len(held.asked) == asked


def test_pictures_come_after_a_search_that_was_overtaken(page, demo, monkeypatch):
    "A search is called off by the next one; what is found after that has its pictures, from the folder of this page."
    find, began, release, refused = demo.service.find, threading.Event(), threading.Event(), []

    def late(query, *given, **named):
        if query.text == "white lamp" and not began.is_set():
            began.set()
            release.wait(WAIT)
        return find(query, *given, **named)

    monkeypatch.setattr(demo.service, "find", late)
    page.on("response", lambda reply: refused.append(reply.url) if reply.status >= 400 else None)
    words, go = page.get_by_label("Words", exact=True), page.get_by_role("button", name="Search", exact=True)
    words.fill("white lamp")
    go.click()
    assert began.wait(WAIT)
    page.get_by_label("title", exact=True).check()  # asks again, beside the first
    captions = page.locator(".moon2-hits .caption-label")
    titles = [hit["title"] for hit in demo.service.search("white lamp", None, "t", 12)["hits"]]
    until(page, lambda: [one.split("\n")[-1] for one in captions.all_inner_texts()] == titles, "second hits", WAIT)
    release.set()
    words.fill("red mug")
    go.click()
    titles = [hit["title"] for hit in demo.service.search("red mug", None, "t", 12)["hits"]]
    until(page, lambda: [one.split("\n")[-1] for one in captions.all_inner_texts()] == titles, "third hits", WAIT)
    drawn = "[...document.querySelectorAll('.moon2-hits button img')].every((one) => one.complete && one.naturalWidth)"
    until(page, lambda: page.evaluate(drawn), "the pictures", WAIT)
    assert not refused


def test_an_edit_takes_the_place_of_a_measurement(page, demo, address, held):
    "The fold below a pair: its map is of the edited pair, and what was measured of the plain one is not told of it."
    first = found(demo)[0]
    held.hold = (first, True)
    page.goto(f"{address}?tab=heatmap&q=black+bag&item={first}&view=mm&method=cross")
    until(page, lambda: (first, True) in held.asked, "the measurement of the pair of the address", WAIT)
    page.get_by_role("button", name="What if").click()
    box = page.get_by_label("Query: words", exact=True)
    box.wait_for()
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.type("white bag")
    trust = page.locator("#moon2-pair-trust")
    until(page, lambda: "press Explain" in trust.inner_text(), "the map of the edited pair", WAIT, trust.inner_text)
    held.release.set()
    page.wait_for_timeout(1000)
    assert set(held.given_up) == {first} and "press Explain" in trust.inner_text()


def test_a_pair_of_an_address_is_measured(page, demo, address):
    "A page that is opened at a pair says in the end how far its map can be trusted."
    first = found(demo)[0]
    page.goto(f"{address}?tab=heatmap&q=black+bag&item={first}&view=mm&method=cross")
    until(page, lambda: "Faithfulness" in page.locator("#moon2-pair-trust").inner_text(), "the measurement", WAIT)
