"How long a click on a hit takes to its cross map, in the browser, with the trained model of the repository."
import statistics
import time

import pytest
from browsing import texts_in_frame, until

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def demo(its_demo):
    return its_demo


@pytest.mark.slow
def test_from_a_click_to_the_cross_map(browser, address, demo):
    "Median over ten hits of a search."
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto(f"{address}?q=red+mug")
    page.locator(".moon2-hits button img").first.wait_for(timeout=120_000)

    def named() -> str:
        return next(iter(texts_in_frame(page, "#moon2-heat iframe", ".m2h-side[data-side=item] h3")), "")

    seen, took = "", []
    for place in range(11):
        began = time.monotonic()
        page.locator(".moon2-hits button img").nth(place).click()
        until(page, lambda: named() not in ("", seen), f"the map of hit {place + 1}", 30)  # noqa: B023
        took.append(time.monotonic() - began)
        seen = named()
    print("seconds from click to cross map:", *(f"{one:.2f}" for one in took))
    page.close()
    assert statistics.median(took[1:]) < 1
