"""The pictures of docs/seen.md, of the trained model in the repository on drawn products: each test does what its
picture shows, and takes it where MOON2_SCREENSHOTS names a folder.
"""
import pytest
from browsing import choose_on_map, keep_picture, rewrite, until, watched_page

pytest.importorskip("gradio")

from moon2_lab import Item
from moon2_lab.explain.explainer import Explainer
from moon2_lab.reporting.embedding_map import heatmap_command_of, map_of_model, write_map_page
from moon2_lab.reporting.heatmap_page import write_heat_page

QUERY = "red mug"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(its_demo):
    return its_demo


@pytest.fixture
def opened(browser, address):
    "A function that opens the demo at an address; no script of it may fail."
    pages, wrong = [], []

    def at(query, **how):
        page = browser.new_page(**{"viewport": {"width": 1180, "height": 820}} | how)
        pages.append(page)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(f"{address}{query}")
        return page

    yield at
    for page in pages:
        page.close()
    assert not wrong


@pytest.fixture(scope="module")
def best(demo):
    "The first hit of the query."
    return demo.service.find(Item(QUERY, None), "mm", 1)[0].product


def test_what_a_word_met(browser, pretrained, best, tmp_path):
    "Point at a word of the query: the words and patches of the product that it met."
    pair = Explainer(pretrained, Item(QUERY, None, "query"), best.item(), "data/pretrained", trials=0).maps(["cross"])
    tall = {"viewport": {"width": 1200, "height": 1250}}  # down to the table that adds up
    with watched_page(browser, write_heat_page(pair, tmp_path), "[data-side=item] .m2h-word >> nth=0", **tall) as page:
        page.locator("[data-side=query] .m2h-word", has_text="mug").hover()
        met = page.locator("[data-side=query] .m2h-told")
        until(page, lambda: met.inner_text().startswith("“mug”"), "the word that is pointed at")
        assert "points with “mug” of the query" in page.locator("[data-side=item] .m2h-legend").inner_text()
        keep_picture(page, "seen_cross.png")


def test_the_map_of_the_products(browser, pretrained, its_catalog, best, tmp_path):
    "Choose a product on the map: its hits in the full space."
    shown = map_of_model(pretrained, its_catalog.products, name="data/pretrained")
    with watched_page(browser, write_map_page(shown, tmp_path, heatmap_command_of("RUN")), ".m2m canvas") as page:
        choose_on_map(page, best.title)
        assert page.locator(".m2m-hits bdi").count() == 8
        keep_picture(page, "seen_map.png")


def test_a_search_by_words(opened):
    "Hits with what of the words each has, and phrases to try."
    page = opened(f"?q={QUERY.replace(' ', '+')}")
    page.locator(".moon2-hits button img").first.wait_for(timeout=120_000)
    assert "Mug" in page.locator(".moon2-hits .caption-label").first.inner_text()
    keep_picture(page, "seen_search.png")


def test_a_search_on_a_telephone(opened):
    page = opened("?q=black+camera", viewport={"width": 420, "height": 820}, color_scheme="dark")
    page.locator(".moon2-hits button img").first.wait_for(timeout=120_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    keep_picture(page, "seen_phone.png", width=420)


def test_what_if_the_words_were_others(opened, best):
    "Edit the query of a pair: score, rank and hits before and after."
    page = opened(f"?tab=heatmap&q={QUERY.replace(' ', '+')}&item={best.product_id}")
    word = page.frame_locator("#moon2-pair-heat iframe").locator("[data-side=query] .m2h-word")
    word.first.wait_for(timeout=120_000)
    page.get_by_role("button", name="What if").click()
    box = page.get_by_label("Query: words").last
    rewrite(page, box, "blue mug")
    shown = page.locator("#moon2-edit-shown")
    until(page, lambda: "blue" in shown.inner_text(), "the numbers", tell=shown.inner_text)
    until(page, lambda: "blue" in word.all_inner_texts(), "the heatmap of the edited pair")
    page.locator("#moon2-edit").evaluate("one => window.scrollTo(0, one.getBoundingClientRect().top + scrollY - 20)")
    keep_picture(page, "seen_what_if.png")
