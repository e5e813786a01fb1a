"""axe-core finds no serious violation on the pages that the commands write, light and dark; and it does find one where
there is one.
"""
import numpy as np
import pytest
from browsing import serious_violations, watched_page

from moon2_lab.data.products import Product
from moon2_lab.reporting.comparison_report import write_diff_page
from moon2_lab.reporting.embedding_map import embedding_map, write_map_page
from moon2_lab.reporting.heatmap_page import write_heat_page
from moon2_lab.reporting.run_report import write_report
from moon2_lab.testing import made_up_comparison, made_up_history, made_up_metrics, made_up_pair, made_up_query

pytest.importorskip("axe_playwright_python")


def write_made_up_map(path):
    "A map of 30 products with three views, in two frames."
    rng, ids = np.random.default_rng(0), [f"p{number}" for number in range(30)]
    drawn = lambda: {view: rng.normal(size=(30, 8)).astype(np.float32) for view in ("t", "i", "mm")}
    products = {name: Product(name, f"Thing {name}", category_l1="ab"[n % 2]) for n, name in enumerate(ids)}
    shown = embedding_map(drawn(), ids, products, frames=[("step 1", drawn()), ("step 2", drawn())], name="made up")
    return write_map_page(shown, path, "moon2 heatmap RUN --query id:{query} --item {item}")


PAGES = {
    "report": lambda path: write_report(
        path / "report.html", metrics=made_up_metrics(), history=made_up_history(), queries=[made_up_query(0)],
    ),
    "diff": lambda path: write_diff_page(made_up_comparison(12), path),
    "heatmap": lambda path: write_heat_page(made_up_pair(), path),
    "map": write_made_up_map,
}
DRAWN = {"report": "#scores svg", "diff": "main li, main tr", "heatmap": ".m2h-word", "map": ".m2m canvas"}


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PAGES)
def test_no_serious_violation(browser, tmp_path, name, scheme):
    with watched_page(browser, PAGES[name](tmp_path), f"{DRAWN[name]} >> nth=0", color_scheme=scheme) as page:
        assert serious_violations(page) == []


def test_the_check_can_fail(browser, tmp_path):
    "A button without a name, a picture without words, grey on grey."
    bad = "<main><button></button><img src=x.png><p style='color:#999;background:#aaa'>grey</p></main>"
    page = browser.new_page()
    page.set_content(f"<html lang=en><title>made up</title>{bad}")
    assert {line.split(":")[0] for line in serious_violations(page)} == {"button-name", "image-alt", "color-contrast"}
    page.close()
