"""Two encoders on the same queries: the counts and tests by hand, what is refused, the page's size, and the page in a
browser.
"""
import base64
import dataclasses
import io
import json
import re
from urllib.parse import quote

import numpy as np
import pandas as pd
import pytest
from browsing import contrast, keep_screenshot, settle, until
from choosing import LOOKS
from PIL import Image
from small import product, shop, tiny

from moon2_lab.config import DIRECTIONS, DUAL, REPORTED
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Product
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.evaluate import run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.evaluation.statistics import holm, p_text, paired_test_tables
from moon2_lab.reporting.comparison import KINDS, _query_product, compare_encoders, compare_tables
from moon2_lab.reporting.comparison_report import _page_data, diff_page, explain_changes, write_diff_page
from moon2_lab.retrieval.query_input import matching_attributes
from moon2_lab.testing import MadeUpEncoder, made_up_catalog, made_up_comparison

HOSTILE = "<script>window.pwned=1</script> </script><img src=x onerror=window.pwned=2> 红色杯子 😀 \u202egnol &amp;"


def by_hand(catalog, ranks, direction="t->mm"):
    "A per_query table in which the queries have these ranks; the right product is the query's own."
    ids = [one.product_id for one in catalog][: len(ranks)]
    others = [one.product_id for one in catalog]
    rows = [
        {
            "query_id": name,
            "direction": direction,
            "rank": rank,
            "hit_ids": [name],
            "key": place,
            "top_ids": [other for other in others if other != name][: rank - 1][:10] + ([name] if rank <= 10 else []),
        }
        for place, (name, rank) in enumerate(zip(ids, ranks))
    ]
    return pd.DataFrame(rows).assign(
        top_scores=lambda t: [list(np.linspace(0.9, 0.1, len(found))) for found in t["top_ids"]]
    )


@pytest.fixture(scope="module")
def made():
    "A made-up comparison."
    return made_up_comparison(40)


@pytest.fixture(scope="module")
def catalog():
    "Products for tables made by hand."
    return made_up_catalog(20)


# ---------------------------------------------------------------------------------------------- counts and tests


def test_counts_by_hand(catalog):
    a, b = by_hand(catalog, [12, 1, 3, 15, 2]), by_hand(catalog, [1, 11, 2, 14, 2])
    found = compare_tables(a, b, catalog, resamples=50)
    assert found.table["kind"].tolist() == ["won", "lost", "moved", "moved", "same"]
    assert found.at(1).table["kind"].tolist() == ["won", "lost", "moved", "moved", "same"]
    assert found.at(2).table["kind"].tolist() == ["won", "lost", "won", "moved", "same"]
    assert found.counts("direction").iloc[0][["n", *KINDS, "net"]].tolist() == [5, 1, 1, 2, 1, 0]
    assert found.ordered().table["query_id"].tolist() == [f"made-up-{n:03d}" for n in (0, 1, 2, 3, 4)]
    assert np.allclose(found.table["change"], [1 - 1 / 12, 1 / 11 - 1, 1 / 6, 1 / 14 - 1 / 15, 0])
    test = found.tests([10]).iloc[0]
    assert (test["value_a"], test["value_b"], test["difference"], test["won"], test["lost"]) == (0.6, 0.6, 0, 1, 1)


def test_by_direction_and_category(catalog):
    ranks = np.array([1, 20, 3] * 4)
    a = pd.concat([by_hand(catalog, ranks, "t->mm"), by_hand(catalog, ranks[:5], "t->i")])
    b = pd.concat([by_hand(catalog, ranks[::-1], "t->mm"), by_hand(catalog, ranks[:5], "t->i")])
    found = compare_tables(a, b, catalog)
    assert found.directions == ["t->mm", "t->i"] and found.counts("direction")["n"].tolist() == [12, 5]
    both = found.counts("direction", "category_l1").set_index(["direction", "category_l1"])
    assert both.loc[("t->mm", "Garden"), "n"] == 4 and both["n"].sum() == 17 and both.xs("t->i")["same"].sum() == 5
    assert len(found.select("t->mm", "Garden")) == 4
    assert {
        row["category_l2"]
        for row in found.select(where="category_l2 == 'bowl' and colour != 'rust'").table.to_dict("records")
    } == {"Bowl"}


def test_paired_tests_are_those_of_metrics(made):
    runs = [
        run_benchmark(MadeUpEncoder(noise, seed), made.question, baselines=False, labels=False, resamples=0).per_query
        for noise, seed in ((1.1, 1), (0.9, 2))
    ]
    rows = made.tests([1, 3, 10]).to_dict("records")
    assert len(rows) == 15
    for row in rows:
        known = paired_test_tables(runs[1], runs[0], row["direction"], int(row["metric"][2:]))
        assert {name: row[name] for name in known} == known
    assert [row["p_holm"] for row in rows] == holm(
        [row["p"] for row in rows]
    ).tolist()  # over directions and k, all that stands side by side
    assert all(row["p_holm"] >= row["p"] for row in rows) and any(row["p_holm"] > row["p"] for row in rows)


def test_every_view_of_a_comparison_says_the_same_p(made):
    "Tab, endpoint, page and terminal: tested among all directions and both k, whatever is shown."
    from moon2_lab.app.components import tested_words
    from moon2_lab.cli.commands import compare_lines

    content, facts = diff_page(made), made.summary()
    page = {(row["direction"], row["metric"]): row for row in made.tests().to_dict("records")}
    for direction in made.directions:
        for kind in (None, "won", "same"):
            for row in made.as_json(direction, k=10, kind=kind)["tests"]:
                known = page[row["direction"], row["metric"]]
                assert row["direction"] == direction and (row["p"], row["p_holm"], row["n"]) == (
                    known["p"],
                    known["p_holm"],
                    known["n"],
                )
                said = p_text(known)
                assert said in tested_words(row) and f'<span class="ci">{said}</span>' in content
                line = next(line for line in compare_lines(facts) if line.startswith(direction))
                assert row["metric"] != "R@10" or said in line
    assert {
        entry["p_holm"]
        for block in facts["directions"].values()
        for name, entry in block.items()
        if name.startswith("R@")
    } == {row["p_holm"] for row in page.values()}


def test_holm_by_hand():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])


def test_identical_encoders_win_and_lose_nothing():
    encoder = tiny(perturbed=True)
    found = compare_encoders(encoder, encoder, shop(20), split="all", resamples=50)
    assert set(found.table["kind"]) == {"same"} and set(found.table["overlap"]) == {1.0}
    assert set(found.tests()["p"]) == {1.0} and set(found.tests()["difference"]) == {0.0}
    assert "Both models have the same weights" in diff_page(found)


def test_swapped_models_swap_won_and_lost(made):
    other = compare_encoders(MadeUpEncoder(0.9, 2), MadeUpEncoder(1.1, 1), made.catalog)
    ours, theirs = made.counts("direction"), other.counts("direction")
    assert (
        ours["won"].tolist() == theirs["lost"].tolist()
        and ours["lost"].tolist() == theirs["won"].tolist()
        and ours["won"].sum() > ours["lost"].sum() > 0
    )
    assert ours["moved"].tolist() == theirs["moved"].tolist()
    assert (
        np.allclose(made.tests()["difference"], -other.tests()["difference"])
        and made.tests()["p"].tolist() == other.tests()["p"].tolist()
    )


def test_tables_from_disk_give_the_same(made, tmp_path):
    "Without the encoders, after a trip through parquet."
    question = make_benchmark(made.catalog, "test")
    for name, encoder in (("a", MadeUpEncoder(1.1, 1)), ("b", MadeUpEncoder(0.9, 2))):
        run_benchmark(encoder, question, baselines=False, labels=False, resamples=0).write(tmp_path / name)
    found = compare_tables(
        *(pd.read_parquet(tmp_path / name / "per_query.parquet") for name in "ab"), made.catalog, names=made.names
    )
    pd.testing.assert_frame_equal(found.table, made.table)
    assert found.as_json("i->t", k=5) == made.as_json("i->t", k=5)


def test_nothing_to_find_is_no_hit(catalog):
    a = by_hand(catalog, [1, 1]).assign(hit_ids=[[], ["made-up-001"]])
    found = compare_tables(a.assign(rank=[5, 1]), a.assign(rank=[1, 1]), catalog, resamples=20)
    assert found.table["kind"].tolist() == ["moved", "same"]
    assert found.tests([10])["value_b"].tolist() == [0.5]


def test_a_query_of_its_own_belongs_to_what_it_should_find(catalog):
    assert _query_product(catalog, "query 7", ["made-up-003"]).product_id == "made-up-003"
    assert (
        _query_product(catalog, "made-up-001", ["made-up-003"]).product_id == "made-up-003"
    )  # an id that only looks like a product's
    assert (
        _query_product(catalog, "made-up-001", []).product_id == "made-up-001"
        and _query_product(catalog, "query 7", []) is None
    )


def test_attributes_that_match():
    one, other = product(7), product(7, product_id="x", attributes={"Colour": "GREEN|red", "size": "large"})
    assert matching_attributes(one, other) == [("category", "shapes > ball"), ("Colour", "GREEN")]
    assert matching_attributes(one, product(0)) == [("category", "shapes"), ("size", "small")]


def test_answers_are_plain_and_bounded(made):
    found = made.as_json("t->mm", "Home", k=3, most=4, hits=2)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    part = made.at(3).select("t->mm", "Home")
    assert {kind: found[kind] for kind in KINDS} == {kind: int((part.table["kind"] == kind).sum()) for kind in KINDS}
    assert (
        len(found["rows"]) == 4
        and found["rows_left_out"] == len(part) - 4
        and {len(row["hits_a"]) for row in found["rows"]} == {2}
    )
    changes = [abs(row["change"]) for row in found["rows"]]
    assert changes == sorted(changes, reverse=True)
    summary = json.loads(json.dumps(made.summary(), allow_nan=False))
    assert summary["won"] == sum(entry["won"] for entry in summary["directions"].values()) and set(
        summary["directions"]
    ) == set(DIRECTIONS)


# ---------------------------------------------------------------------------------------------- what is refused


def test_unequal_runs_are_refused(catalog):
    a = by_hand(catalog, [1, 2, 3])
    for other, words in (
        (by_hand(catalog, [1, 2]), "1 queries are in one run only, first 'made-up-002' .*same split"),
        (by_hand(catalog, [1, 2, 3], "t->i"), "in one run only"),
        (a.assign(hit_ids=[["made-up-005"]] * 3), "other right answers"),
        (a.drop(columns="top_ids"), "run B has no column top_ids"), (a[:0], "run B has no queries"),
    ):
        with pytest.raises(DataError, match=words):
            compare_tables(a, other, catalog)


def test_another_catalogue_is_refused(catalog):
    a = by_hand(catalog, [1, 2, 3])
    with pytest.raises(DataError, match="not asked by split test"):
        compare_tables(*[a.assign(query_id=["p1", "p2", "p3"])] * 2, catalog)
    with pytest.raises(DataError, match="1 products that were found are not in the catalogue, first 'elsewhere'"):
        strange = a.assign(top_ids=[["elsewhere"]] * 3, top_scores=[[0.1]] * 3)
        compare_tables(strange, strange, catalog)


def test_wrong_choices_name_what_there_is(made):
    for choice, words in (
        ({"direction": "mm"}, "one of dual->mm, t->mm"), ({"category": "Gardn"}, "nearest: Garden"),
        ({"kind": "better"}, "one of won"), ({"where": "colour = 'red'"}, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=words):
            made.select(**choice)
    with pytest.raises(UsageError, match="a whole number"):
        made.as_json(k=0)
    with pytest.raises(UsageError, match="1000 is the protocol"):
        dataclasses.replace(made, resamples=0).tests()


# ---------------------------------------------------------------------------------------------- why


def test_explanations_belong_to_the_first_products(tmp_path):
    encoders = [tiny(perturbed=True, router_std=std) for std in (0.02, 0.2)]
    found = compare_encoders(*encoders, shop(24, mixed=True), split="all", resamples=20)
    told = explain_changes(found, *encoders, first=3, method="gradient", trials=2)
    rows = found.ordered().table.head(3).to_dict("records")
    assert list(told) == [(row["direction"], row["query_id"]) for row in rows]
    for row, why in zip(rows, told.values()):
        for letter in "ab":
            assert why[letter]["product_id"] == row[f"top_ids_{letter}"][0] and why[letter]["score"] == pytest.approx(
                row[f"top_scores_{letter}"][0], abs=1e-4
            )
            assert list(why[letter]["routing"]) == row[f"top_ids_{letter}"] and np.allclose(
                [sum(shares) for shares in why[letter]["routing"].values()], 1, atol=1e-5
            )
    data = _page_data(found, told)
    with_reasons = [row for row in data["rows"] if "why" in row]
    assert len(with_reasons) == 3 and all(
        len(shares) == 4 for row in with_reasons for shares in row["why"]["a"]["routing"].values()
    )


# ---------------------------------------------------------------------------------------------- the page as a file


@pytest.mark.slow
def test_size_of_500_queries_in_five_directions(tmp_path):
    "Pictures with fine detail, which JPEG does not shrink as well as flat colours."
    rng = np.random.default_rng(0)

    def detailed(place):
        small = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize(
            (110, 110), Image.Resampling.BICUBIC
        )
        return ImageRef.from_pil(small)

    catalog = Catalog.from_products(
        [
            dataclasses.replace(one, refs=(detailed(place), detailed(place)))
            for place, one in enumerate(made_up_catalog(500))
        ]
    )
    found = compare_encoders(MadeUpEncoder(1.1, 1), MadeUpEncoder(0.9, 2), catalog, resamples=50)
    asked = len(found.select(DUAL))  # few: the made-up shop has few conditions
    assert len(found) == 2500 + asked and 0 < asked < 100
    path = write_diff_page(found, tmp_path)
    data = _page_data(found)
    assert len(data["rows"]) == len(found) and data["left_out"] == 0 and len(data["pictures"]) == 1000
    assert 4_000_000 < path.stat().st_size < 15_000_000
    small = write_diff_page(found, tmp_path / "small.html", limit=5_000_000)
    assert small.stat().st_size < 5_000_000 and re.search(
        r"[\d,]+ pictures were left out to keep the file small", small.read_text(encoding="utf-8")
    )


def test_rows_that_are_not_shown_are_counted(made):
    content = diff_page(made, most=7)
    assert f"{7 * 5} of {len(made):,} queries are in this page" in content
    data = _page_data(made, most=7)
    assert sum(sum(row[2:]) for row in data["counts"]) == len(made)
    shown = {
        direction: sorted(abs(row["change"]) for row in data["rows"] if row["d"] == place)
        for place, direction in enumerate(REPORTED)
    }
    assert not shown.pop(DUAL), "this shop is too small to ask by conditions"
    for direction, changes in shown.items():
        assert np.allclose(changes, sorted(made.select(direction).table["change"].abs())[-7:], atol=1e-6)


def test_each_picture_is_embedded_once(made):
    data = _page_data(made)
    assert len(set(data["pictures"])) == len(data["pictures"])
    for picture in data["pictures"][:5]:
        assert picture.startswith("data:image/jpeg;base64,")
    assert (
        max(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).size for picture in data["pictures"])[0]
        <= 96
    )


def hostile_comparison():
    "Titles, names and categories that want to be HTML; a product without picture, one without title."
    products = [
        Product(
            f"p{n}",
            f"{HOSTILE} no {n}" if n % 2 else f"plain red mug number {n}",
            category_l1="</script><b>x</b>" if n % 2 else "红色 😀",
            attributes={"<i>colour</i>": "<u>red</u>|blue"},
            refs=() if n == 3 else product(n).refs,
            split="test",
        )
        for n in range(8)
    ]
    products[4] = dataclasses.replace(products[4], title=None)
    return compare_encoders(
        MadeUpEncoder(1.2, 1),
        MadeUpEncoder(0.8, 2),
        Catalog.from_products(products),
        names=("<b>old</b>", "new 😀"),
        resamples=20,
    )


def test_titles_stay_text_in_the_file():
    content = diff_page(hostile_comparison())
    assert (
        content.count("<script") == 2
        and content.count("</script>") == 2
        and "<b>old" not in content
        and "&lt;b&gt;old" in content
    )
    data = json.loads(re.search(r'id="data">(.*?)</script>', content)[1])
    assert any("<script>window.pwned=1" in one["title"] for one in data["products"])


def test_a_place_that_cannot_be_written_to(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be written"):
        write_diff_page(made, tmp_path / "file" / "diff.html")


# ---------------------------------------------------------------------------------------------- the page in a browser


@pytest.fixture(scope="module")
def page_path(made, tmp_path_factory):
    "The made-up comparison as a file; the first query has a made-up explanation."
    row = made.ordered().table.to_dict("records")[0]
    cells = np.linspace(-1, 1, 16).reshape(4, 4)
    why = {
        letter: {
            "product_id": row[f"top_ids_{letter}"][0],
            "score": 0.5,
            "method": "invented",
            "words": [["Made-up", 0.02], ["lamp", -0.4]],
            "cells": cells,
            "image": Image.new("RGB", (64, 64), "white"),
            "note": "Invented numbers.",
            "trust": "Faithfulness: not measured.",
            "routing": {name: [0.7, 0.3] for name in row[f"top_ids_{letter}"]},
        }
        for letter in "ab"
    }
    why["b"] = {"product_id": row["top_ids_b"][0], "error": "no text [p]", "routing": {}}
    return write_diff_page(
        made, tmp_path_factory.mktemp("diff") / "diff.html", {(row["direction"], row["query_id"]): why}
    )


@pytest.fixture
def opened(browser, page_path):
    "Opens the page at an address; afterwards: nothing was asked from outside, nothing was complained about."
    pages, asked, complaints = [], [], []

    def go(after="", path=page_path, **options):
        page = browser.new_page(**({"viewport": {"width": 1200, "height": 900}} | options))
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        pages.append(page)
        page.goto(f"file://{path}{after}")
        page.locator("#status").wait_for()
        settle(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] and len(
        [url for url in asked if url.startswith("file:")]
    ) == len(pages)
    assert complaints == []


def kinds_shown(page):
    return [words.split()[-1] for words in page.locator("article .kind").all_inner_texts()]


def ranks_shown(page, place):
    "First (0) or second (1) number of `rank 3 → 1` of each query."
    return [
        int(re.findall(r"[\d,]+", words)[place].replace(",", ""))
        for words in page.locator("article .asked b").all_inner_texts()
    ]


def titles_shown(page):
    return page.locator("article h3").all_inner_texts()


def test_filters(opened, made):
    page = opened()
    labels = {
        label.split()[-2] if len(label.split()) > 2 else label.split()[0]: int(label.split()[-1])
        for label in page.locator(".kinds label").all_inner_texts()
    }
    counts = made.counts().iloc[0]
    assert labels == {"all": len(made), **{kind: int(counts[kind]) for kind in KINDS}}
    page.locator(".kinds input[value=won]").check()
    assert set(kinds_shown(page)) == {"won"}
    page.select_option("#direction", "i->mm")
    page.select_option("#category", "Home")
    settle(page)
    wanted = made.select("i->mm", "Home", "won")
    assert page.locator("article").count() == len(wanted) > 0
    assert page.locator("#status").inner_text() == f"{len(wanted)} quer{'y' if len(wanted) == 1 else 'ies'}."
    page.locator(".kinds input[value='']").check()
    page.select_option("#direction", "t->i")
    page.fill("#text", "LAMP series")
    texts = [
        row["text"] for row in made.select("t->i", "Home").table.to_dict("records") if row["category_l2"] == "Lamp"
    ]
    assert sorted(title.strip("“”") for title in titles_shown(page)) == sorted(texts) and texts
    page.fill("#text", "no such words")
    assert page.locator("article").count() == 0 and "Choose something else" in page.locator("#status").inner_text()
    page.get_by_role("button", name="Reset").click()
    assert page.locator("#status").inner_text() == f"{len(made)} queries." and page.evaluate("location.hash") in (
        "",
        "#",
    )


def test_order(opened, made):
    page = opened("#direction=t->mm")
    part = made.select("t->mm").ordered()
    assert ranks_shown(page, 0)[:20] == part.table["rank_a"].tolist()[:20]
    for sort, place, column in (("a", 0, "rank_a"), ("b", 1, "rank_b")):
        page.select_option("#sort", sort)
        settle(page)
        assert ranks_shown(page, place)[:20] == sorted(part.table[column])[:20]
    page.select_option("#sort", "worse")
    settle(page)
    first = part.table.sort_values("change").iloc[0]
    assert (ranks_shown(page, 0)[0], ranks_shown(page, 1)[0]) == (first["rank_a"], first["rank_b"])


def test_category_table_sorts_and_filters(opened, made):
    page = opened()
    def names():
        return page.locator("#categories tbody th").all_inner_texts()

    counts = made.counts("category_l1").set_index("category_l1")
    assert names() == ["Home", "Garden"]
    assert [
        int(words) for words in page.locator("#categories tbody tr").first.locator("td").all_inner_texts()[:3]
    ] == counts.loc["Home", ["n", "won", "lost"]].tolist()
    page.locator("#categories [data-by=name]").click()
    assert names() == ["Garden", "Home"] and page.locator(
        "#categories th[aria-sort=ascending]"
    ).inner_text().startswith("Category")
    page.locator("#categories tbody button").first.click()
    assert (
        page.evaluate("document.getElementById('category').value") == "Garden"
        and page.evaluate("document.activeElement.textContent") == "Garden"
    )
    assert page.locator("#status").inner_text().startswith(f"{counts.loc['Garden', 'n']} queries")


def test_keyboard(opened):
    page = opened()
    focused = lambda: page.evaluate("[...document.querySelectorAll('article')].indexOf(document.activeElement)")
    page.keyboard.press("j")
    assert focused() == 0
    page.keyboard.press("j")
    page.keyboard.press("ArrowDown")
    assert focused() == 2
    page.keyboard.press("k")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert focused() == 0
    page.keyboard.press("Enter")
    assert (
        page.locator("article .details").count() == 1
        and page.locator("article button").first.get_attribute("aria-expanded") == "true"
    )
    page.keyboard.press("Escape")
    assert page.locator("article .details").count() == 0 and focused() == 0
    for _ in range(25):
        page.keyboard.press("j")
    assert focused() == 25, "the list grows while one goes down"
    page.keyboard.press("/")
    page.keyboard.type("jk")
    assert page.input_value("#text") == "jk" and page.evaluate("document.activeElement.id") == "text"
    assert page.locator("article[tabindex='0']").count() == min(1, page.locator("article").count())


def test_address_keeps_the_view(opened, made):
    row = made.select("mm->mm").ordered().table.to_dict("records")[3]
    page = opened(f"#direction=mm->mm&sort=b&query={quote('mm->mm ' + row['query_id'])}")
    assert page.input_value("#direction") == "mm->mm" and page.input_value("#sort") == "b"
    details = page.locator("article .details")
    assert details.count() == 1 and row["query_id"] in details.inner_text()
    page.select_option("#sort", "a")
    page.locator(".kinds input[value=lost]").check()
    told = page.evaluate("location.hash")
    assert "sort=a" in told and "kind=lost" in told and "query" not in told
    again = opened(told)
    assert titles_shown(again) == titles_shown(page) and set(kinds_shown(again)) <= {"lost"}
    again.evaluate("location.hash = '#kind=won'")
    until(again, lambda: set(kinds_shown(again)) == {"won"}, "the view of the new address", seconds=5)


def test_an_address_that_does_not_fit_says_so(opened, made):
    page = opened("#direction=x->y&category=Nowhere&sort=price")
    assert (
        page.locator("#status").inner_text()
        == f"This page has no direction “x->y”, no category “Nowhere”, no sort “price”. {len(made)} queries."
    )


def test_details_tell_what_matches(opened, made):
    page = opened()
    row = made.ordered().table.to_dict("records")[0]
    page.locator("article button").first.click()
    details = page.locator("article .details")
    rows = details.locator("section").first.locator("tbody tr")
    assert rows.count() == len(row["top_ids_a"])
    own = made.catalog.get(row["product_id"])
    for place, name in enumerate(row["top_ids_a"]):
        words = (
            ", ".join(f"{label}: {value}" for label, value in matching_attributes(own, made.catalog.get(name)))
            or "nothing"
        )
        assert rows.nth(place).locator("td.common").inner_text().lower() == words.lower()
    assert [("✓" in words) for words in rows.locator("th").all_inner_texts()] == [
        name in row["hit_ids"] for name in row["top_ids_a"]
    ]
    assert rows.first.locator("td.experts").inner_text().split() == ["0:", "70", "%", "1:", "30", "%"]
    assert (
        "invented, score 0.500" in details.inner_text()
        and "−0.400" in details.locator(".words").inner_text()
        and details.locator(".why img").count() == 1
    )
    assert "No heatmap of B's first product: no text [p]" in details.inner_text()


def test_right_products_are_marked_by_sign_and_frame(opened, made):
    page = opened()
    row = made.ordered().table.to_dict("records")[0]
    marks = [
        words.startswith("✓")
        for words in page.locator("article").first.locator(".answer").nth(1).locator(".place").all_inner_texts()
    ]
    assert marks == [name in row["hit_ids"] for name in row["top_ids_b"][:5]] and any(marks)
    style = page.locator("article .hits .right .picture").first.evaluate(
        "element => getComputedStyle(element).outlineWidth"
    )
    assert style == "3px"


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_looks(opened, scheme, width):
    "No horizontal scrolling, details open or not; words can be read."
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    keep_screenshot(page, f"diff-{scheme}-{width}.png")
    page.locator("article button").first.click()
    page.locator("article").first.scroll_into_view_if_needed()
    keep_screenshot(page, f"diff-{scheme}-{width}-details.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("""() => {
        const of = (what, name) => getComputedStyle(what)[name].match(/[\\d.]+/g).slice(0, 3).map(Number);
        const back = of(document.body, "backgroundColor");
        const texts = "article .kind, article .soft:not(.details *), article .hits .right b, .kinds span span";
        return [...document.querySelectorAll(texts)].slice(0, 80)
            .filter((e) => !e.closest("label:has(:checked)")).map((e) => [of(e, "color"), back]);
    }""")
    assert colours and min(contrast(*pair) for pair in colours) >= 4.5


def test_hostile_text_does_nothing(opened, tmp_path):
    page = opened(path=write_diff_page(hostile_comparison(), tmp_path))
    for button in page.locator("article button").all()[:6]:
        button.click()
    assert (
        page.evaluate("window.pwned") is None
        and page.locator("article i, article u, article img[onerror], #categories b").count() == 0
    )
    shown = page.locator("main").inner_text()
    assert (
        "<script>window.pwned=1</script>" in shown
        and "红色" in shown
        and "no picture" in shown
        and "no title (p4)" in shown
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


def test_the_policy_forbids_requests(browser, page_path):
    page = browser.new_page()
    blocked = []
    page.on("console", lambda message: blocked.append(message.text))
    page.goto(f"file://{page_path}")
    page.evaluate(
        "() => { const image = new Image(); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image); }"
    )
    page.evaluate(
        "() => { const script = document.createElement('script'); script.textContent = 'window.pwned = 3'; "
        "document.body.append(script); }"
    )
    until(page, lambda: len(blocked) >= 2, "two refusals", seconds=5)
    assert page.evaluate("window.pwned") is None and all("Content Security Policy" in words for words in blocked)
    page.close()


def test_without_script_the_numbers_stand(browser, page_path, made):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{page_path}")
    assert (
        page.locator("#directions tbody tr").count() == 5 and "needs JavaScript" in page.locator("#list").inner_text()
    )
    assert [
        int(words) for words in page.locator("#directions tbody tr td:nth-child(9)").all_inner_texts()
    ] == made.counts("direction")["won"].tolist()
    context.close()


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_writes_the_page(drawn_catalogue, tmp_path, capsys):
    "`moon2 compare A B`: page, one JSON object, the names of the runs; a model against itself wins and loses nothing."
    from moon2_lab.cli.main import main
    for name, seed in (("before", 0), ("after", 1)):
        tiny(seed=seed).save_pretrained(tmp_path / name / "model")
    words = ["--catalog", str(drawn_catalogue), "--split", "all", "--limit", "30", "--explain", "1", "--json"]
    assert (
        main(
            ["compare", str(tmp_path / "before"), str(tmp_path / "after"), "--out", str(tmp_path / "diff.html"), *words]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert (
        facts["names"] == ["before", "after"]
        and facts["won"] + facts["lost"] + facts["moved"] + facts["same"] == facts["n"]
    )
    assert (
        facts["page"] == str(tmp_path / "diff.html") and "after against before" in (tmp_path / "diff.html").read_text()
    )
    assert (
        main(
            [
                "compare",
                str(tmp_path / "before"),
                str(tmp_path / "before"),
                "--out",
                str(tmp_path / "same.html"),
                *words[:-1],
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("won 0, lost 0, moved 0") == len(REPORTED) and "p = 1.000" in out
    assert (
        main(["compare", str(tmp_path / "before"), str(tmp_path / "gone"), "--out", str(tmp_path / "x.html"), *words])
        == 2
    )
    assert "no such folder" in capsys.readouterr().err
