"""The Map tab of the demo: drawn when it is opened; a product leads to its hits and to a search."""
import pytest
from browsing import keep_screenshot, outside, until

pytest.importorskip("gradio")

from moon2_lab.app.interface import build_demo
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def demo(drawn_catalogue):
    encoders = [Moon2Encoder.from_backbone("tiny", num_layers=2, seed=seed) for seed in (1, 2)]
    encoders = [perturb_experts(encoder, 0.05, seed=seed).eval() for seed, encoder in enumerate(encoders)]
    return build_demo(*encoders, catalog=Catalog.load(drawn_catalogue), names=("first", "second"))


@pytest.fixture
def page(browser, address, request):
    "The page with its first hits; afterwards it must have told no error and asked nobody else."
    path, how = getattr(request, "param", ("", {"viewport": {"width": 1200, "height": 1000}}))
    page, wrong, asked = browser.new_page(**how), [], []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address + path)
    page.locator("#moon2-map iframe" if path else ".moon2-hits button img").first.wait_for(timeout=120_000)
    yield page
    assert not wrong and not outside([url for url in asked if url != "about:srcdoc"], address.rstrip("/"))
    page.close()


def opened_map(page):
    "The map in its frame, as high as what is in it."
    page.get_by_role("tab", name="Map", exact=True).click()
    frame = page.frame_locator("#moon2-map iframe")
    frame.locator(".m2m canvas").wait_for(timeout=60_000)
    tall = lambda: page.locator("#moon2-map iframe").evaluate("one => parseInt(one.style.height) > 400")
    until(page, tall, "the height of the map", 20)
    return frame


def choose(page, frame, title):
    "Find a product by its title, and choose it by keys."
    frame.locator("input[type=search]").fill(title)
    frame.locator("canvas").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(page, lambda: title in frame.locator(".m2m-product").inner_text(), f"{title} beside the map", 20)


def test_a_product_of_the_map_shows_its_hits_and_is_searched_with(page, demo):
    frame, product = opened_map(page), demo.service.catalog[5]
    assert "tab=map" in page.url and "first" in frame.locator(".m2m-heading").inner_text()
    choose(page, frame, product.title)
    wanted = [hit.product for hit in demo.service.find(product.item("t"), "mm", 8)]
    shown = frame.locator(".m2m-hits bdi").all_inner_texts()
    names = ["its own product" if one is product else one.title for one in wanted]
    assert [one.removesuffix("…") for one in shown] == names
    assert frame.locator(".m2m-product img").evaluate("one => one.naturalWidth > 0")
    keep_screenshot(page, "demo-map.png")
    frame.get_by_role("button", name="Search like this").click()
    words = page.get_by_label("Words", exact=True)
    until(page, lambda: words.is_visible() and words.input_value() == f"id:{product.product_id}", "the search", 20)
    hits = [hit["title"] for hit in demo.service.search(f"id:{product.product_id}", None, "mm", 12)["hits"]]
    captions = page.locator(".moon2-hits").first.locator(".caption-label")
    until(page, lambda: [one.split("\n")[-1] for one in captions.all_inner_texts()] == hits, "products like it", 20)
    page.go_back()
    until(page, lambda: page.locator("#moon2-map").is_visible() and "tab=map" in page.url, "the map again", 20)


@pytest.mark.slow
def test_the_other_model_has_a_map_of_its_own(page, demo):
    frame = opened_map(page)
    page.get_by_role("tabpanel").filter(has=page.locator("#moon2-map")).get_by_label("B: second").check()
    until(page, lambda: "second" in frame.locator(".m2m-heading").inner_text(), "the map of B", 60)


PHONE = {"viewport": {"width": 420, "height": 800}, "color_scheme": "dark"}


@pytest.mark.slow
@pytest.mark.parametrize("page", [("?tab=map", PHONE)], indirect=True)
def test_on_a_telephone_in_the_dark_by_its_address(page, demo):
    "No wider than the screen; a link opens it; the theme reaches into the frame."
    frame = page.frame_locator("#moon2-map iframe")
    frame.locator(".m2m canvas").wait_for(timeout=60_000)
    frame.locator("html[data-jp-theme-light=false]").wait_for(timeout=20_000)
    choose(page, frame, demo.service.catalog[7].title)
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    assert frame.locator("html").evaluate("one => one.scrollWidth <= one.clientWidth")
    page.locator("#moon2-map").scroll_into_view_if_needed()
    keep_screenshot(page, "demo-map-phone.png")
