"""What if, in the demo's Heatmap tab: an edit moves score, rank and hits, and the heatmap follows; the last edit wins;
an edit that cannot be read is told; all of it by keyboard and on a telephone.
"""
import pytest
from browsing import keep_screenshot, rewrite, until

pytest.importorskip("gradio")

from moon2_lab.app.interface import build_demo
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.products import Item
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.what_if import what_if_pair

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def catalog(drawn_catalogue) -> Catalog:
    return Catalog.load(drawn_catalogue)


@pytest.fixture(scope="module")
def encoder() -> Moon2Encoder:
    return perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), 0.05, seed=1).eval()


@pytest.fixture(scope="module")
def demo(catalog, encoder):
    return build_demo(encoder, catalog=catalog, names=("first",))


@pytest.fixture
def page(browser, address, catalog, request):
    "The Heatmap tab of a pair, opened by its address; the fold is open."
    how = getattr(request, "param", {})
    page, wrong = browser.new_page(viewport={"width": 1200, "height": 1000} | how), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"{address}?tab=heatmap&q=brown+lamp&item={catalog[3].product_id}")
    page.locator("#moon2-edit").wait_for(timeout=60_000)
    heat(page).locator("[data-side=item] .m2h-word").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="What if").click()
    page.get_by_label("Product: words").wait_for()
    yield page
    assert not wrong
    page.close()


def heat(page):
    "What is in the frame of the heatmap."
    return page.frame_locator("#moon2-pair-heat iframe")


def shown(page) -> str:
    "The numbers, or nothing; minus signs as hyphens."
    return page.locator("#moon2-edit-shown").inner_text().replace("−", "-")


def expected(encoder, catalog, **edits):
    query, item = Item("brown lamp", None, "query"), catalog[3].item()
    return what_if_pair(encoder, query, item, catalog.products, k=8, **edits)


def test_an_edited_title_moves_the_numbers_and_the_heatmap(page, catalog, encoder):
    assert page.get_by_label("Product: words").input_value() == catalog[3].title
    assert shown(page) == ""
    rewrite(page, page.get_by_label("Product: words"), "zinc bucket")
    told = expected(encoder, catalog, edited_item=Item("zinc bucket", catalog[3].image_ref()))
    words = told.score_words.replace("−", "-")
    until(page, lambda: words in shown(page), words, tell=lambda: shown(page))
    for name in (f"{told.before.score:.4f}", f"{told.after.score:.4f}", told.rank_words.replace("−", "-")):
        assert name in shown(page)
    word = heat(page).locator("[data-side=item] .m2h-word")
    until(page, lambda: word.first.inner_text() == "zinc" and word.count() == 2, "the words of the heatmap")
    assert f"score {told.after.score:.3f}" in heat(page).locator(".m2h-score").inner_text()
    keep_screenshot(page, "demo-what-if.png")
    page.get_by_role("button", name="Query and product as they were").click()
    until(page, lambda: shown(page) == "", "no numbers")
    assert page.get_by_label("Product: words").input_value() == catalog[3].title
    until(page, lambda: word.first.inner_text() != "zinc", "the heatmap of before")


@pytest.mark.slow
def test_the_picture_is_dropped_and_swapped(page, catalog, encoder):
    box = page.get_by_label("Product: picture")
    for choice, picture in (("no picture", None), (catalog[7].product_id, catalog[7].image_ref())):
        box.fill(choice)
        box.press("Enter")
        told = expected(encoder, catalog, edited_item=Item(catalog[3].title, picture))
        words = told.score_words.replace("−", "-")
        until(page, lambda words=words: words in shown(page), words, tell=lambda: shown(page))
    assert "picture swapped" in shown(page)


@pytest.mark.slow
def test_the_last_of_many_keys_wins_and_what_cannot_be_read_is_told(page, catalog, encoder):
    box = page.get_by_label("Query: words").last
    rewrite(page, box, "red dress")
    told = expected(encoder, catalog, edited_query=Item("red dress", None))
    words = told.score_words.replace("−", "-")
    until(page, lambda: words in shown(page), words, tell=lambda: shown(page))
    box.focus()
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.get_by_text("Nothing is left to read of the query").first.wait_for(timeout=20_000)
    assert words in shown(page) and page.locator("#moon2-edit-shown.moon2-old").count() == 1  # marked as old


@pytest.mark.slow
@pytest.mark.parametrize("page", [{"width": 420, "height": 900}], indirect=True)
def test_by_keyboard_on_a_telephone(page):
    rewrite(page, page.get_by_label("Product: words"), "green hat")
    until(page, lambda: "added 'green hat'" in shown(page), "the numbers", tell=lambda: shown(page))
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.locator("#moon2-edit").scroll_into_view_if_needed()
    keep_screenshot(page, "demo-what-if-phone.png")
