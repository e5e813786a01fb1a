"axe-core finds no serious violation on any tab of the demo, light and dark, after a search."
import pytest
from browsing import serious_violations, until

pytest.importorskip("gradio")
pytest.importorskip("axe_playwright_python")

from moon2_lab.app.interface import build_demo
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def catalog(drawn_catalogue) -> Catalog:
    return Catalog.load(drawn_catalogue)


@pytest.fixture(scope="module")
def demo(catalog):
    "The page of two models."
    first, second = (
        perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=seed), 0.05, seed=seed).eval()
        for seed in (1, 2)
    )
    return build_demo(first, second, catalog=catalog, names=("first", "second"))


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_no_serious_violation_on_any_tab(browser, address, scheme):
    page = browser.new_page(viewport={"width": 1200, "height": 1000}, color_scheme=scheme)
    page.goto(f"{address}?q=brown+lamp")
    page.locator(".moon2-hits button img").first.wait_for(timeout=60_000)
    tabs = page.get_by_role("tab")
    violations = lambda: "\n".join(serious_violations(page))
    names = [name for name in tabs.all_inner_texts() if name.strip()]
    assert {"Search", "Compare", "Heatmap", "About"} <= set(names), names
    for name in dict.fromkeys(names):
        page.get_by_role("tab", name=name, exact=True).click()
        until(page, lambda: not serious_violations(page), f"{name}, once nothing fades in", 3, violations)
    page.close()
