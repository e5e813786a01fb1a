"""What the demo offers to begin with, phrases and pictures; its form on a telephone, where the first hit is seen."""
import pytest
from browsing import keep_screenshot, until

pytest.importorskip("gradio")

from moon2_lab.app.interface import build_demo
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.query_input import query_item

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def demo(drawn_catalogue):
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), 0.05, seed=1).eval()
    return build_demo(encoder, catalog=Catalog.load(drawn_catalogue), names=("first",))


@pytest.fixture
def page(browser, address, request):
    "The page with its first hits; afterwards it must have told no error."
    how = getattr(request, "param", {"viewport": {"width": 1200, "height": 1000}})
    page, wrong = browser.new_page(**how), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.locator(".moon2-hits button img").first.wait_for(timeout=60_000)
    yield page
    assert not wrong
    page.close()


def titles(page):
    return [caption.split("\n")[-1] for caption in page.locator(".moon2-hits .caption-label").all_inner_texts()]



@pytest.mark.slow
def test_a_phrase_and_a_picture_of_the_catalogue_are_searched_with(page, demo, tmp_path):
    "Phrases of a colour and a kind fill the box; a picture searches at once, alone, and can be opened by keyboard."
    phrases, products = demo.service.phrases(), demo.service.picture_examples
    kinds = {(product.category_l1, product.category_l2) for product in products}
    assert len(products) == len(kinds) == 6 and "black dress" in phrases and all(map(str.islower, phrases))
    page.get_by_role("button", name=phrases[1], exact=True).click()
    words = page.get_by_label("Words", exact=True)
    until(page, lambda: words.input_value() == phrases[1], "the phrase in the box", 20)
    row = page.locator(".picture-examples button")
    assert row.count() == 6 and row.nth(2).locator("img").evaluate("one => one.naturalWidth") == 96
    row.nth(2).focus()
    page.keyboard.press("Enter")
    products[2].image_ref().load().save(tmp_path / "example.png")
    hits = demo.service.find(query_item(None, tmp_path / "example.png"), "mm", 12)
    wanted = [hit.product.title for hit in hits]
    until(page, lambda: titles(page) == wanted, "hits of the picture", 20, lambda: f"{titles(page)} {wanted}")
    assert words.input_value() == "" and page.locator("#moon2-picture .image-frame img").count() == 1
    keep_screenshot(page, "demo-examples.png")


PHONE = {"viewport": {"width": 420, "height": 800}, "has_touch": True}
IN_THE_DARK = pytest.param(PHONE | {"color_scheme": "dark"}, marks=pytest.mark.slow)


@pytest.mark.parametrize("page", [PHONE, IN_THE_DARK], indirect=True)
def test_the_first_hit_is_seen_on_a_telephone(page):
    "At 420 x 800 its picture without scrolling, at the start and by a picture; after a search the whole card."
    card, fold = page.locator(".moon2-hits .gallery-item").first, page.locator("#moon2-options button.label-wrap")
    place = lambda: card.locator("img").bounding_box()
    until(page, lambda: "open" not in fold.get_attribute("class"), "options folded", 20)
    until(page, lambda: place()["y"] + place()["height"] <= 800, "the first picture", 10, lambda: str(place()))
    assert page.evaluate("scrollY") == 0 and page.evaluate("document.documentElement.scrollWidth") <= 420
    keep_screenshot(page, "demo-phone-start.png")
    page.get_by_label("Words", exact=True).fill("red chair")
    page.get_by_role("button", name="Search", exact=True).click()
    until(page, lambda: "q=red+chair" in page.url, "the address", 20)
    card.locator(".moon2-thumbs").wait_for(timeout=20_000)
    whole = lambda: (box := card.bounding_box())["y"] >= 0 and box["y"] + box["height"] <= 800
    until(page, whole, "the whole first card", 10, lambda: str(card.bounding_box()))
    keep_screenshot(page, "demo-phone.png")
    page.evaluate("scrollTo(0, 0)")
    assert not page.locator(".picture-examples").is_visible()
    page.get_by_role("button", name="Picture", exact=False).first.click()
    page.locator(".picture-examples button").nth(1).click()
    until(page, lambda: page.locator("#moon2-picture .image-frame img").is_visible(), "the picture it asks with", 20)
    until(page, whole, "the whole first card", 20, lambda: str(card.bounding_box()))
