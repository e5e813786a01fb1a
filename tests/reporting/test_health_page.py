"""health.html in a browser: nothing is asked of the network, titles stay text, the map answers to pointer, keys and
choices; readable in both colour schemes and on a phone.
"""
from choosing import few
from types import SimpleNamespace

import numpy as np
import pytest
from browsing import contrast, keep_screenshot, settle, until, watched_page

from moon2_lab.data.products import Product
from moon2_lab.evaluation.embedding_health import check_embeddings
from moon2_lab.reporting.health_report import write_health_page

HOSTILE = "<img src=x onerror=window.pwned=1></script><script>window.pwned=2</script> \u202egnol 红色 &amp;"


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    "The page about vectors of 60 products, some of them broken, one with a hostile title."
    rng = np.random.default_rng(0)
    product = rng.normal(size=(60, 12)) + 2 * rng.normal(size=(3, 12))[np.arange(60) % 3]
    rows = lambda: product + 0.5 * rng.normal(size=(60, 12))
    views = {view: (x := rows()) / np.linalg.norm(x, axis=1, keepdims=True) for view in ("t", "i", "mm")}
    views["i"][[5, 6]] = views["i"][4]
    views["t"][7] = np.nan
    ids = [f"p{number:02}" for number in range(60)]
    products = {name: Product(name, f"Thing {n}", category_l1="abc"[n % 3]) for n, name in enumerate(ids)}
    products["p07"] = Product("p07", HOSTILE, category_l1=HOSTILE)
    health = check_embeddings(views, ids, contents={view: ids for view in views})
    examined = SimpleNamespace(name=HOSTILE, kind="vectors", health=health, ids=ids, views=views, products=products)
    return write_health_page(examined, tmp_path_factory.mktemp("page"))


@pytest.fixture
def page(browser, page_file):
    "The page, opened."
    with watched_page(browser, page_file, "#map canvas") as opened:
        yield opened


def test_findings_name_products(page):
    text = page.locator(".alarms").inner_text()
    assert "Error: finite" in text and "Warning: duplicates" in text
    page.locator(".alarms summary").first.click()
    assert "onerror=window.pwned" in page.locator(".alarms .named").first.inner_text()  # as text
    assert page.locator("h1").inner_text().startswith("<img src=x")


def test_the_map_tells_titles(page):
    canvas, tip = page.locator("#map canvas"), page.locator("#map .m2m-tip")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    until(page, tip.is_visible, "a title")
    first = tip.inner_text()
    assert "Thing" in first or "onerror" in first
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    keep_screenshot(page, "health.png")


def test_the_map_is_of_all_products(page):
    canvas, key = page.locator("#map canvas"), page.locator("#map .m2m-key")
    assert "60 products" in canvas.get_attribute("aria-label")
    assert page.locator("#map .m2m-key li").count() == 4  # a, b, c, the hostile one
    page.locator("#map select").nth(1).select_option(label="view")
    settle(page)
    assert [line.strip() for line in key.inner_text().split("\n")] == ["■ text", "▲ image", "● image + text"]


@pytest.mark.parametrize("scheme", few(["light", "dark"], "dark"))
def test_readable_in_both_schemes_and_on_a_phone(browser, page_file, scheme):
    opened = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    opened.goto(page_file.as_uri())
    opened.locator("#map canvas").wait_for()
    settle(opened)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    style = "getComputedStyle(document.body)[name].match(/\\d+/g).map(Number)"
    colours = opened.evaluate(f"() => ['color', 'backgroundColor'].map((name) => {style})")
    assert contrast(*colours) > 7
    keep_screenshot(opened, f"health-{scheme}.png")
    opened.close()


def test_without_javascript(browser, page_file):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page_file.as_uri())
    assert "The map needs JavaScript" in opened.locator("#map").inner_text()
    assert opened.locator("table.figures").count() == 2
    context.close()
