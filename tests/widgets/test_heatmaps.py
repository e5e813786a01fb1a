"""The pair heatmap: what is sent, the widget without and with a browser, the page from disk, the figures; and
whatever a title or a map may hold.
"""

import base64
import dataclasses
import io
import json
import re
import threading

import numpy as np
import pytest
from browsing import contrast, jupyter_lab, keep_screenshot, luminance, open_notebook, outside, run_cell, settle, until
from choosing import LOOKS, few
from PIL import Image

from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.explain.faithfulness import Faithfulness
from moon2_lab.explain.heatmap_data import Attribution, PairMaps, _pack_shares, map_json, maps_json, pair_payload
from moon2_lab.reporting.attention_figures import layer_head_figure
from moon2_lab.reporting.heatmap_figures import plot_png, pair_map_figure, pair_map_plot, show_static, static_png
from moon2_lab.reporting.heatmap_page import _VIEW, heat_page, write_heat_page
from moon2_lab.reporting.html import inline_json
from moon2_lab.testing import made_up_cross, made_up_pair, made_up_side
from moon2_lab.widgets.heatmap import HeatmapWidget

MEBIBYTE = 2**20


def with_maps(side, **maps):
    "The side with these maps only, and nothing measured."
    return dataclasses.replace(side, maps=maps, faith={})


def with_sides(pair, **sides):
    "The pair with another query or item, and a cross map between them."
    changed = dataclasses.replace(pair, cross=None, **sides)
    cross = made_up_cross(changed.query, changed.item, np.random.default_rng(3), layers=2)
    return dataclasses.replace(changed, cross=cross)


def large_pair(layers, heads, words=64, grid=7, experts=4):
    "A pair with much attention and pictures that do not compress."
    random = np.random.default_rng(0)
    sides = [
        made_up_side(name, " ".join(f"word{place}" for place in range(words)), grid, random, layers, heads, experts)
        for name in ("query", "item")
    ]
    noise = Image.fromarray(random.integers(0, 255, (400, 400, 3), dtype=np.uint8))
    pair = PairMaps(*(dataclasses.replace(side, image=noise) for side in sides), 0.5)
    return dataclasses.replace(pair, cross=made_up_cross(*sides, random, layers=layers))


def state_size(widget):
    "Bytes that travel to the browser, script and style included."
    return sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value)) for value in widget.get_state().values()
    )


def edge_pairs():
    "Pairs that are unusual, by name."
    pair, random = made_up_pair(), np.random.default_rng(1)
    zero = Attribution("ig", np.zeros(7), np.zeros((4, 4)))
    hostile = made_up_side(
        "item",
        "<script>window.pwned=1</script> </script> <img/src=x/onerror=window.pwned=2> "
        "红色杯子 😀 \u202egnol $x_2$ &amp;",
        4,
        random,
    )
    no_picture = dataclasses.replace(made_up_side("item", "red mug", 0, random), links=None)
    return {
        "without picture": with_sides(pair, item=no_picture),
        "without title": with_sides(pair, item=made_up_side("item", "", 4, random)),
        "without attention": with_sides(
            pair, item=dataclasses.replace(pair.item, links=None, pooled=None, experts=None)
        ),
        "one word": with_sides(pair, item=made_up_side("item", "mug", 4, random)),
        "64 words": with_sides(pair, item=made_up_side("item", " ".join(["stoneware"] * 64), 7, random)),
        "all zero": with_sides(pair, item=with_maps(pair.item, ig=zero), query=with_maps(pair.query)),
        "no cells in the map": with_sides(pair, item=with_maps(pair.item, ig=Attribution("ig", np.ones(7)))),
        "long word": with_sides(pair, item=made_up_side("item", "x" * 400 + " mug", 4, random)),
        "three by seven patches": with_sides(pair, item=made_up_side("item", "red mug", (3, 7), random)),
        "a picture as a whole": with_sides(pair, item=made_up_side("item", "red mug", (1, 1), random)),
        "hostile": with_sides(
            PairMaps(
                pair.query, hostile, float("nan"), "<b>model</b>", ("</title><script>window.pwned=3</script>", "p")
            )
        ),
    }


# ---------------------------------------------------------------------------------------------- what is sent


def test_a_full_title_with_twelve_layers_and_nine_heads_stays_under_a_mebibyte():
    pair = large_pair(12, 9)
    widget = HeatmapWidget(pair)
    assert state_size(widget) < MEBIBYTE
    assert widget.payload["sides"]["item"]["links"]["shape"] == [12, 9]
    thinned = ["attention between words: mean over heads.", "the cross map has 3 of 12 layers."]
    assert widget.payload["remarks"] == [f"To keep this view small, {words}" for words in thinned]
    assert widget.payload["cross"]["layers"][-1] == "layer 11"
    usual = HeatmapWidget(large_pair(12, 9, words=14))
    assert usual.payload["remarks"] == [] and usual.payload["cross"]["shape"][0] == 12
    assert len(heat_page(pair)) < 1.4 * MEBIBYTE


def test_more_attention_than_fits_is_averaged_and_told():
    widget = HeatmapWidget(large_pair(24, 16, words=64, grid=14, experts=8))
    assert state_size(widget) < MEBIBYTE
    links = widget.payload["sides"]["item"]["links"]
    assert links["shape"] == [24, 1] and links["averaged"] == "heads"
    assert any("mean over heads" in remark for remark in widget.payload["remarks"])


def test_bytes_give_the_shares_back():
    shares = np.random.default_rng(0).dirichlet(np.ones(49), (3, 2, 10))
    told, data = _pack_shares(shares, 0, 10**6)
    back = np.frombuffer(data, np.uint8).reshape(shares.shape) * np.reshape(told["scales"], (3, 2, 1, 1)) / 255
    assert np.abs(back - shares).max() <= shares.max() / 500
    averaged, data = _pack_shares(shares, 0, 1500)
    assert averaged["averaged"] == "heads" and len(data) == 3 * 10 * 49
    assert (
        np.abs(
            np.frombuffer(data, np.uint8).reshape(3, 10, 49) * np.reshape(averaged["scales"], (3, 1, 1)) / 255
            - shares.mean(1)
        ).max()
        < 0.002
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_map_with_a_hole_is_refused_everywhere(bad):
    pair = made_up_pair()
    pair.item.maps["gradient"].words[0] = bad
    for show in (
        HeatmapWidget,
        heat_page,
        lambda maps: pair_map_figure(maps, "gradient"),
        lambda maps: pair_map_plot(maps, "gradient"),
        lambda maps: static_png(maps, "gradient"),
    ):
        with pytest.raises(DataError, match="gradient, item"):
            show(pair)


def test_attention_below_zero_or_with_a_hole_is_refused():
    pair = made_up_pair()
    for change in ({"links": -pair.item.links}, {"pooled": pair.item.pooled * np.nan}):
        with pytest.raises(DataError, match="NaN, infinite or below zero"):
            pair_payload(dataclasses.replace(pair, item=dataclasses.replace(pair.item, **change)))


def test_a_map_of_another_picture_is_refused():
    pair = made_up_pair()
    pair.item.maps["gradient"].patches = np.zeros((7, 7))
    with pytest.raises(UsageError, match="4 x 4 patches"):
        maps_json(pair)


UNUSUAL = few(list(edge_pairs()), "without picture", "three by seven patches", "a picture as a whole", "hostile")


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pairs_can_be_shown(name):
    "As a widget, a page, a still picture and as figures of either kind."
    pair = edge_pairs()[name]
    method = pair.first_method
    assert state_size(HeatmapWidget(pair)) < MEBIBYTE
    assert "<script>window" not in heat_page(pair)
    assert len(static_png(pair)) < 100_000
    assert pair_map_figure(pair, method).data
    assert Image.open(io.BytesIO(plot_png(pair_map_plot(pair, method, theme="dark")))).width == 600


def test_titles_are_text_in_plotly():
    "plotly understands some HTML."
    pair = edge_pairs()["hostile"]
    drawn = json.dumps(json.loads(pair_map_figure(pair, "attention").to_json())["data"])
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn


def test_inline_json_cannot_end_its_element():
    nasty = ["</script>", "<!--", "\u2028", "&lt;", "😀"]
    assert json.loads(inline_json(nasty)) == nasty and not re.search("[<>&]", inline_json(nasty))


def test_still_picture_and_mimebundle():
    pair = made_up_pair()
    assert show_static(pair).data.startswith(b"\x89PNG")
    bundle, _ = HeatmapWidget(pair)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle and len(base64.b64decode(bundle["image/png"])) < 100_000


def test_figures_carry_the_warning():
    pair = made_up_pair()
    pair.item.faith["gradient"] = Faithfulness(0.5, 0.5, np.linspace(-1, 1, 99), features=20)
    assert "item: Do not trust this map" in pair_map_figure(pair, "gradient").layout.title.subtitle.text.replace(
        "<br>", " "
    )
    assert "item: Do not trust this map" in pair_map_plot(pair, "gradient").texts[-1].get_text()
    told = map_json(pair.item.maps["gradient"], pair.item.faith["gradient"])["faith"]
    assert told["warning"].startswith("Do not trust") and "50 of 99 random maps" in told["line"]
    assert layer_head_figure(pair.item).data[0].z.shape == (3, 2)


# --------------------------------------------------------------------------------------- the widget without a browser


class Counting:
    "A method made up for the tests: it waits until it is let go, and counts its calls."

    def __init__(self, pair, faith=None, error=None):
        self.pair, self.faith, self.error, self.calls, self.go, self.began = (
            pair,
            faith,
            error,
            [],
            threading.Event(),
            threading.Event(),
        )
        self.saw_cancel = False

    def __call__(self, side, method, progress, cancelled):
        self.calls.append((side, method))
        progress(1, 4, note="a quarter")
        self.began.set()
        while not self.go.wait(0.01):
            if cancelled():
                self.saw_cancel = True
                raise KeyError("gave up")
        if self.error:
            raise self.error
        progress(1.0)
        found = self.pair.side(side)
        return Attribution(method, np.linspace(-1, 1, len(found.words)), np.eye(*found.grid)), self.faith


def test_computed_on_demand_once():
    pair = made_up_pair()
    compute = Counting(pair, Faithfulness(0.1, 0.5, np.zeros(99)))
    widget = HeatmapWidget(pair, compute)
    assert widget.job["state"] == "idle" and compute.calls == []
    widget.method = "ig"
    assert (
        compute.began.wait(10)
        and widget.job["state"] == "running"
        and widget.job["share"] == 0.25
        and widget.job["note"] == "a quarter"
    )
    assert "ig" not in widget.found["query"], "the old map must not stand under a new name"
    compute.go.set()
    widget.wait(10)
    assert widget.job["state"] == "done" and sorted(compute.calls) == [("item", "ig"), ("query", "ig")]
    assert (
        widget.found["item"]["ig"]["cells"] == np.eye(4).ravel().tolist()
        and widget.found["item"]["ig"]["faith"]["warning"] == ""
    )
    assert pair.item.maps["ig"].words[-1] == 1 and pair.item.faith["ig"].gain == pytest.approx(0.4)
    widget.method = "attention"
    widget.request("ig", wait=10)
    assert len(compute.calls) == 2, "the second choice comes from the cache"


def test_cancel_throws_the_result_away():
    pair = made_up_pair()
    compute = Counting(pair)
    widget = HeatmapWidget(pair, compute)
    widget.request("shapley")
    assert compute.began.wait(10)
    widget._on_message({"do": "cancel"})
    assert widget.job["state"] == "cancelled"
    widget.wait(10)
    assert (
        compute.saw_cancel
        and widget.job["state"] == "cancelled"
        and "shapley" not in widget.found["item"]
        and len(compute.calls) == 1
    )
    compute.go.set()
    widget.request("shapley", "item", wait=10)
    assert (
        widget.job["state"] == "done" and "shapley" in widget.found["item"] and "shapley" not in widget.found["query"]
    )


def test_a_method_that_does_not_listen_to_cancel():
    "The next one waits for it; its late result is not kept."
    pair = made_up_pair()
    compute = Counting(pair)

    def deaf(side, method, progress, cancelled):
        return compute(side, method, progress, lambda: False)

    widget = HeatmapWidget(pair, deaf)
    widget.request("ig")
    assert compute.began.wait(10)
    widget.method = "occlusion"
    assert widget.job["method"] == "occlusion" and "waiting" in widget.job["note"]
    compute.go.set()
    widget.wait(10)
    assert (
        "ig" not in widget.found["query"]
        and "occlusion" in widget.found["query"]
        and "occlusion" in widget.found["item"]
    )


@pytest.mark.parametrize(
    "error, words",
    [
        (DataError("no vision tower", advice="load all of it"), "no vision tower -> load all of it"),
        (ValueError("odd"), "ValueError: odd"),
    ],
)
def test_an_error_is_told_and_can_be_tried_again(error, words):
    pair = made_up_pair()
    compute = Counting(pair, error=error)
    compute.go.set()
    widget = HeatmapWidget(pair, compute)
    widget.request("ig", wait=10)
    assert (
        widget.job["state"] == "failed"
        and widget.job["message"] == words
        and "ig" not in widget.found["query"]
        and len(compute.calls) == 1
    )
    compute.error = None
    widget.request("ig", wait=10)
    assert widget.job["state"] == "done" and "ig" in widget.found["query"]


def test_a_map_that_does_not_fit_is_an_error_not_a_picture():
    pair = made_up_pair()
    for found in (Attribution("ig", np.full(2, np.nan), np.zeros((4, 4))), Attribution("ig", np.zeros(5)), None):
        widget = HeatmapWidget(pair, lambda *_, found=found: (found, None))
        widget.request("ig", "query", wait=10)
        assert widget.job["state"] == "failed" and widget.job["message"] and "ig" not in widget.found["query"]


def test_measure_keeps_the_map_and_adds_the_number():
    pair = made_up_pair()
    compute = Counting(pair, Faithfulness(0.3, 0.2, np.zeros(99)))
    compute.go.set()
    widget = HeatmapWidget(pair, compute)
    assert widget.found["item"]["attention"]["faith"] is None
    widget._on_message({"do": "measure", "side": "item", "method": "attention"})
    widget.wait(10)
    assert widget.found["item"]["attention"]["faith"]["warning"].startswith("Do not trust") and compute.calls == [
        ("item", "attention")
    ]
    widget._on_message({"do": "compute", "side": "item", "method": "no such"})
    widget._on_message("nonsense")
    assert len(compute.calls) == 1


def test_traits_refuse_what_is_not_there():
    widget = HeatmapWidget(made_up_pair())
    for name, value, advice in (
        ("layer", 3, "0 to 2"),
        ("head", 2, "0 to 1"),
        ("expert", 4, "0 to 3"),
        ("moe_layer", 3, "0 to 2"),
        ("method", "ig", "attention, gradient"),
        ("layer", -1, "0 to 2"),
    ):
        with pytest.raises(UsageError, match=advice):
            setattr(widget, name, value)
    with pytest.raises(UsageError, match="unknown method 'ig'"):
        widget.request("ig")
    with pytest.raises(UsageError, match="unknown side"):
        widget.request("gradient", "both sides")
    widget.layer, widget.head, widget.expert, widget.moe_layer, widget.side, widget.opacity = 2, 1, 3, 2, "item", 0.2
    assert (widget.layer, widget.method) == (2, "attention")


def test_waiting_ends():
    pair = made_up_pair()
    compute = Counting(pair)
    widget = HeatmapWidget(pair, compute)
    with pytest.raises(LabError, match="not done after"):
        widget.request("ig", wait=0.05)
    widget.cancel()
    widget.wait(10)


def test_a_pair_without_maps():
    "With attention it begins there; without, the first method is computed; and without either nothing can be shown."
    pair = made_up_pair()
    bare = dataclasses.replace(pair, query=with_maps(pair.query), item=with_maps(pair.item))
    assert HeatmapWidget(bare).method == "cross"
    bare = dataclasses.replace(bare, cross=None)
    assert HeatmapWidget(bare).method == "attention"
    nothing = PairMaps(*(dataclasses.replace(side, pooled=None, links=None) for side in (bare.query, bare.item)), 0.1)
    with pytest.raises(UsageError, match="no map to show"):
        HeatmapWidget(nothing)
    compute = Counting(nothing)
    compute.go.set()
    widget = HeatmapWidget(nothing, compute, methods=["occlusion"])
    widget.wait(10)
    assert widget.method == "occlusion" and sorted(compute.calls) == [("item", "occlusion"), ("query", "occlusion")]


# ---------------------------------------------------------------------------------------------- the page in a browser


@pytest.fixture
def opened(browser, tmp_path, monkeypatch):
    """A function that writes a pair as a page and opens it; at the end no error and no request to the outside may
    have been seen.
    """
    asked, wrong, pages = [], [], []

    def open_page(pair, width=1200, scheme="light", method=None, plain=True):
        "Plain: shares as they are, the first position among the others, patches as squares."
        if plain:
            for name, value in {"relative": False, "first_apart": False, "patches": True}.items():
                monkeypatch.setitem(_VIEW, name, value)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(write_heat_page(pair, tmp_path / f"map{len(pages)}.html", method).as_uri())
        page.locator(".m2h-side").first.wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file://", "blob:"))] == []


def colours(page, side="item", kind="cell"):
    "Background colours of the cells or words of a side."
    settle(page)
    return page.eval_on_selector_all(
        f"[data-side={side}] .m2h-{kind}", "all => all.map((one) => getComputedStyle(one).backgroundColor)"
    )


def control(page, name):
    "The slider or list of this name."
    return page.locator(f"[data-control='{name}'] :is(input, select)")


def slide(page, name, keys):
    "Move a slider as a reader without a mouse does; one that a choice has just enabled is so from the next frame on."
    settle(page)
    control(page, name).focus()
    for key in keys.split():
        page.keyboard.press(key)


def expected_cells(values, most, colour, strongest=0.7):
    "The colours that shares should have."
    return [f"rgba({colour}, {strongest * value / most:.3f})" for value in values]


def alpha(colour):
    "Opacity of a computed colour."
    found = re.fullmatch(r"rgba?\((\d+), (\d+), (\d+)(?:, ([\d.]+))?\)", colour)
    return float(found[4]) if found[4] is not None else 1.0


def test_page_shows_the_numbers_of_the_maps(opened):
    "Colour and opacity of each cell follow from its number; the sign decides the colour."
    pair = made_up_pair()
    page = opened(pair, method="gradient")
    found, most = pair.item.maps["gradient"], np.abs(pair.item.maps["gradient"].values).max()
    for kind, numbers, strongest in (("cell", found.patches.ravel(), 0.7), ("word", found.words, 0.6)):
        drawn = colours(page, kind=kind)
        assert np.allclose([alpha(colour) for colour in drawn], strongest * abs(numbers) / most, atol=0.006)
        assert [colour.startswith("rgba(213, 94, 0") for colour in drawn] == [bool(number > 0) for number in numbers]
    assert page.locator("[data-side=item] .m2h-cell").nth(5).get_attribute(
        "aria-label"
    ) == f"row 2, column 2: {found.patches[1, 1]:+.3f}".replace("-", "−")
    assert "do as well" in page.locator("[data-side=item] .m2h-trust").inner_text()


def test_method_layer_head_and_expert_change_the_map(opened):
    pair = made_up_pair()
    page = opened(pair, method="gradient")
    seen = [colours(page)]
    control(page, "method").select_option("attention")
    seen.append(colours(page))
    slide(page, "layer", "ArrowRight ArrowRight")
    seen.append(colours(page))
    slide(page, "head", "ArrowRight ArrowRight")
    seen.append(colours(page))
    share = pair.item.pooled[1, 1]
    assert np.allclose([alpha(colour) for colour in seen[-1]], 0.7 * share[:16] / share.max(), atol=0.006)
    assert (
        page.locator("[data-control=layer] output").inner_text() == "layer 1"
        and "layer 1, head 1" in page.locator("[data-side=item] .m2h-legend").inner_text()
    )
    assert "not for one layer" in page.locator("[data-side=item] .m2h-trust").inner_text()
    control(page, "expert").select_option("2")
    slide(page, "MoE layer", "ArrowRight")
    seen.append(colours(page))
    weights = pair.item.experts[1, :, 2]
    assert np.allclose([alpha(colour) for colour in seen[-1]], 0.7 * weights[:16] / weights.max(), atol=0.006)
    assert "expert 2, layer 1" in page.locator("[data-side=item] .m2h-legend").inner_text()
    assert len({tuple(map(tuple, [one])) for one in seen}) == 5, "each choice gives another map"
    slide(page, "opacity", "Home")
    assert {alpha(colour) for colour in colours(page)} == {0.0}
    control(page, "show").select_option("query")
    settle(page)
    assert page.locator("[data-side=query]").is_visible() and not page.locator("[data-side=item]").is_visible()


def test_a_word_lights_its_cells_and_a_cell_its_words(opened):
    pair = made_up_pair()
    page = opened(pair, method="attention")
    still = colours(page), colours(page, kind="word")
    page.locator("[data-side=item] .m2h-word").nth(3).hover()
    row = pair.item.links.mean((0, 1))[3]
    words = pair.item.word_links.mean((0, 1))[3]
    most = max(row.max(), words.max())
    assert np.allclose([alpha(colour) for colour in colours(page)], 0.7 * row / most, atol=0.01)
    assert np.allclose([alpha(colour) for colour in colours(page, kind="word")], 0.6 * words / most, atol=0.01)
    assert page.locator("[data-side=item] .m2h-arcs path").count() == 3
    told = page.locator("[data-side=item] .m2h-told").inner_text()
    strongest = pair.item.words[words.argmax()][0]
    assert told.startswith("“stoneware”") and f"It attends most to “{strongest}”" in told
    slide(page, "layer", "End")
    page.locator("[data-side=item] .m2h-cell").nth(6).hover()
    column = pair.item.links[2].mean(0)[:, 6]
    assert np.allclose([alpha(colour) for colour in colours(page, kind="word")], 0.6 * column / column.max(), atol=0.01)
    assert pair.item.words[column.argmax()][0] in page.locator("[data-side=item] .m2h-told").inner_text()
    page.mouse.move(2, 2)
    slide(page, "layer", "Home")
    page.evaluate("document.activeElement.blur()")
    assert (colours(page), colours(page, kind="word")) == still
    assert page.locator(".m2h-arcs path").count() == 0


def test_keyboard_alone(opened):
    "Tab reaches every control in its order; arrows move over words and cells; enter holds; escape lets go."
    pair = made_up_pair()
    page = opened(pair)
    order = []
    for _ in range(14):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "() => { const one = document.activeElement; return one.closest('label')?.dataset.control"
                " ?? (one.closest('section')?.dataset.side ?? one.tagName) + ' ' + one.getAttribute('role'); }"
            )
        )
    assert order == [
        "method",
        "show",
        "layer",
        "head",
        "expert",
        "opacity",
        "patches",
        "relative to even",
        "first position apart",
        "SUMMARY null",
        "query gridcell",
        "query option",
        "item gridcell",
        "item option",
    ]
    page.locator("[data-side=item] .m2h-word").first.focus()
    lit = colours(page)
    page.keyboard.press("ArrowRight")
    assert colours(page) != lit and page.evaluate("document.activeElement.textContent") == "quality"
    assert "quality" in page.locator("[aria-live=polite]").inner_text()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.textContent") == "handle"
    page.keyboard.press("Enter")
    held = colours(page)
    page.locator("[data-side=item] .m2h-cell").nth(2).hover()
    assert colours(page) == held
    page.keyboard.press("Escape")
    page.locator("[data-side=item] .m2h-cell").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row 2, column 1")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row 2, column 1"), (
        "the edge is an edge"
    )


def crossed(cross, side, layer=-1):
    "The colours that the parts of a side should have, full colour but for the first: (strengths, most)."
    part = cross.part(side, layer)
    return part, np.abs(part[1:16]).max()  # of the patches, which have a scale of their own


def test_the_cross_map_links_both_sides(opened):
    "Pointing at a word lights what it met on the other side, and back; what it says are the numbers of the map."
    pair = made_up_pair()
    page, cross = opened(pair, method="cross"), pair.cross
    heading = page.locator(".m2h-score").inner_text()
    assert f"18 × 23 pairs of parts add up to {cross.total():.7f}, the score is {cross.score:.7f}" in heading
    margin = cross.part("item")
    drawn = [alpha(colour) for colour in colours(page)]
    assert np.allclose(drawn, 0.7 * np.abs(margin[:16]) / np.abs(margin[:16]).max(), atol=0.006)
    words = [alpha(colour) for colour in colours(page, kind="word")]
    assert np.allclose(words, 0.6 * np.abs(margin[16:]) / np.abs(margin[16:]).max(), atol=0.006)
    still = colours(page), colours(page, kind="word"), colours(page, "query")
    page.locator("[data-side=query] .m2h-word").nth(1).hover()  # mug, the last part of the query
    row = cross.values[-1, 17]
    for kind, numbers, strongest in (("cell", row[:16], 0.7), ("word", row[16:], 0.6)):
        drawn = colours(page, kind=kind)
        wanted = strongest * np.abs(numbers) / np.abs(numbers).max()
        assert np.allclose([alpha(colour) for colour in drawn], wanted, atol=0.006)
        assert [colour.startswith("rgba(213, 94, 0") for colour in drawn] == [bool(number > 0) for number in numbers]
    told = page.locator("[data-side=query] .m2h-told").inner_text().replace("−", "-")
    assert told.startswith(f"“mug”: {100 * row.sum():+.1f} points of {100 * cross.total():.1f}")
    assert f"the picture ({100 * row[:16].sum():+.1f})" in told or "It met most" in told
    assert "points with “mug” of the query" in page.locator("[data-side=item] .m2h-legend").inner_text()
    assert colours(page, "query") == still[2], "the side that is pointed at keeps its own map"
    page.keyboard.press("Escape")
    page.mouse.move(2, 2)
    assert (colours(page), colours(page, kind="word"), colours(page, "query")) == still
    page.locator("[data-side=item] .m2h-cell").nth(5).hover()
    column = cross.values[-1, :, 5]
    drawn = [alpha(colour) for colour in colours(page, "query", "word")]
    assert np.allclose(drawn, 0.6 * np.abs(column[16:]) / np.abs(column[16:]).max(), atol=0.006)
    page.locator("[data-side=item] .m2h-cell").nth(5).click()  # held: the other side tells the pair
    page.locator("[data-side=query] .m2h-word").first.hover()
    both = cross.values[-1, 16, 5]
    told = page.locator("[data-side=query] .m2h-told").inner_text().replace("−", "-")
    assert told.startswith("“red” with row 2, column 2: ") and f"{100 * both:+.2f}"[:4] in told


def test_layers_even_shares_and_the_first_position_of_a_cross_map(opened):
    pair = made_up_pair()
    page, cross = opened(pair, method="cross", plain=False), pair.cross
    control(page, "patches").check()
    part, most = crossed(cross, "item")
    drawn = [alpha(colour) for colour in colours(page)]
    assert drawn[0] == 0 and np.allclose(drawn[1:], 0.7 * np.abs(part[1:16]) / most, atol=0.006)
    assert page.locator("[data-side=item] .m2h-cell.m2h-apart").count() == 1
    legend = page.locator("[data-side=item] .m2h-legend").inner_text().replace("−", "-")
    assert f"First position, apart: {100 * part[0]:+.1f} at row 1, column 1." in legend
    control(page, "relative to even").check()
    beyond = (cross.values[-1] - cross.even()).sum(0)
    drawn = [alpha(colour) for colour in colours(page)]
    assert np.allclose(drawn[1:], 0.7 * np.abs(beyond[1:16]) / np.abs(beyond[1:16]).max(), atol=0.01)
    legend = page.locator("[data-side=item] .m2h-legend").inner_text().replace("−", "-")
    largest = 100 * np.abs(beyond[1:16]).max()
    assert f"for a word, {largest:+.2f} for a patch" in legend or f"for a word, {largest:+.1f} for a patch" in legend
    control(page, "relative to even").uncheck()
    slide(page, "states", "Home")
    part, most = crossed(cross, "item", 0)
    drawn = [alpha(colour) for colour in colours(page)]
    assert np.allclose(drawn[1:], 0.7 * np.abs(part[1:16]) / most, atol=0.006)
    assert "if the model ended at this layer" in page.locator("[data-side=item] .m2h-trust").inner_text()
    assert "layer 0 the 18 × 23 pairs of parts add up to" in page.locator(".m2h-score").inner_text()


def test_the_table_of_a_cross_map_adds_up(opened):
    "Words against words, a picture as a whole, the sum in the corner; the table of Python says the same."
    pair = made_up_pair()
    page, table = opened(pair, method="cross"), pair.cross_table()
    rows = page.locator(".m2h-matrix tbody tr").all()
    read = [[float(cell.inner_text().replace("−", "-")) for cell in row.locator("td").all()] for row in rows]
    assert page.locator(".m2h-matrix thead th").all_inner_texts() == [*table.columns, "sum"]
    assert np.allclose(np.array(read)[:-1, :-1], table.to_numpy(), atol=0.051)
    assert abs(read[-1][-1] - 100 * pair.score) < 0.051
    page.locator(".m2h-matrix tbody th").nth(2).hover()  # mug
    assert "points with “mug”" in page.locator("[data-side=item] .m2h-legend").inner_text()
    page.locator(".m2h-matrix td").nth(3).hover()
    control(page, "method").select_option("gradient")
    settle(page)
    assert not page.locator(".m2h-matrix").is_visible()


def test_controls_that_would_do_nothing_are_off(opened):
    "Layer and head steer attention, states the cross map, the MoE layer an expert."
    page = opened(made_up_pair(), method="gradient", plain=False)
    steers = {"layer": "attention", "head": "attention", "states": "cross", "MoE layer": "expert"}
    for mode in ("gradient", "attention", "cross", "expert"):
        control(page, "expert").select_option("1" if mode == "expert" else "")
        if mode != "expert":
            control(page, "method").select_option(mode)
        settle(page)
        on = {name for name in steers if control(page, name).is_enabled()}
        assert on == {name for name, wanted in steers.items() if wanted == mode}
        assert control(page, "relative to even").is_enabled() == (mode in ("attention", "cross"))


def test_attention_begins_beyond_even_and_without_the_first_position(opened):
    pair = made_up_pair()
    page = opened(pair, method="attention", plain=False)
    control(page, "patches").check()
    slide(page, "layer", "ArrowRight")
    slide(page, "head", "ArrowRight")
    beyond = pair.item.pooled[0, 0] - pair.item.even["pooled"][0]
    drawn = colours(page)
    wanted = 0.7 * np.abs(beyond[1:16]) / np.abs(beyond[1:]).max()
    assert np.allclose([alpha(colour) for colour in drawn[1:]], wanted, atol=0.01) and alpha(drawn[0]) == 0
    assert [colour.startswith("rgba(213, 94, 0") for colour in drawn[1:]] == [bool(one > 0) for one in beyond[1:16]]
    assert "beyond even attention" in page.locator("[data-side=item] .m2h-legend").inner_text()


def test_all_layers_and_heads_at_a_glance(opened):
    "A small picture of each; a click chooses it."
    page = opened(made_up_pair(), method="attention", plain=False)
    page.locator(".m2h-overview summary").click()
    thumbs = page.locator(".m2h-overviews section").nth(1).locator("button")
    thumbs.last.wait_for()
    assert thumbs.count() == 6
    drawn = "all => all.map((one) => one.getContext('2d').getImageData(0, 0, one.width, one.height).data.join())"
    assert len(set(page.eval_on_selector_all(".m2h-overviews section:nth-of-type(2) canvas:first-child", drawn))) == 6
    thumbs.nth(3).click()
    settle(page)
    assert [thumbs.nth(place).get_attribute("aria-pressed") for place in (2, 3)] == ["false", "true"]
    assert "layer 1, head 1" in page.locator("[data-side=item] .m2h-legend").inner_text()


def test_heat_is_smooth_until_patches_are_asked_for(opened):
    page = opened(made_up_pair(), method="cross", plain=False)
    heat = page.locator("[data-side=item] .m2h-heat")
    assert heat.is_visible() and {alpha(colour) for colour in colours(page)} == {0.0}
    assert heat.evaluate("one => one.getContext('2d').getImageData(0, 0, 4, 4).data.some((value) => value > 0)")
    control(page, "patches").check()
    settle(page)
    assert not heat.is_visible() and max(alpha(colour) for colour in colours(page)) > 0.6


@pytest.mark.parametrize("shape", few([(3, 7), (5, 2)], (3, 7)))
def test_a_picture_of_more_columns_than_rows(opened, shape):
    "Colours, names, links and arrow keys follow the grid; a page of a square picture has one number for it."
    rows, columns = shape
    item = made_up_side("item", "finest red mug", shape, np.random.default_rng(4))
    pair = with_sides(made_up_pair(), item=item)
    sides = pair_payload(pair)[0]["sides"]
    assert (sides["item"]["grid"], sides["query"]["grid"]) == ([rows, columns], 4)
    page = opened(pair, method="gradient")
    found, most = item.maps["gradient"], np.abs(item.maps["gradient"].values).max()
    drawn = colours(page)
    assert np.allclose([alpha(colour) for colour in drawn], 0.7 * abs(found.patches.ravel()) / most, atol=0.006)
    cells = page.locator("[data-side=item] .m2h-cell")
    last = cells.last.bounding_box()
    frame = page.locator("[data-side=item] .m2h-cells").bounding_box()
    assert np.isclose(last["width"] * columns, frame["width"], atol=1)
    assert np.isclose(last["height"] * rows, frame["height"], atol=1)
    assert np.isclose(last["y"] + last["height"], frame["y"] + frame["height"], atol=1)
    control(page, "method").select_option("attention")
    page.locator("[data-side=item] .m2h-word").nth(2).hover()
    row = item.links.mean((0, 1))[2]
    most = max(row.max(), item.word_links.mean((0, 1))[2].max())
    assert np.allclose([alpha(colour) for colour in colours(page)], 0.7 * row / most, atol=0.01)
    named = page.locator("[data-side=item] .m2h-cell").nth(int(row.argmax())).get_attribute("aria-label")
    assert named.startswith(f"row {row.argmax() // columns + 1}, column {row.argmax() % columns + 1}:")
    cells.first.focus()
    above = f"row {rows - 1}, column {columns}"
    moves = {"ArrowDown": "row 2, column 1", "End": f"row {rows}, column {columns}", "ArrowUp": above}
    for key, name in (moves | {"ArrowRight": above}).items():
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(name)


@pytest.mark.parametrize("size", few([(320, 107), (107, 320), (320, 320)], (320, 107)))
def test_the_frame_has_the_aspect_of_the_picture(opened, size):
    "Not distorted, and its longer side no longer than that of a square."
    item = made_up_side("item", "finest red mug", (2, 6), np.random.default_rng(4))
    item = dataclasses.replace(item, image=Image.new("RGB", size, "red"))
    pair = with_sides(made_up_pair(), item=item)
    sent = pair_payload(pair)[0]["sides"]["item"]["image"]
    assert ("aspect" in sent) == (size[0] != size[1])
    frame = opened(pair, method="gradient").locator("[data-side=item] .m2h-picture").bounding_box()
    assert np.allclose((frame["width"], frame["height"]), size, atol=1.5)


def test_attention_on_a_frame_is_told_layer_by_layer(opened):
    pair = made_up_pair()
    layers = np.array([0.5, 0.8, 0.99])[:, None, None]
    framed = dataclasses.replace(pair.item, pooled=pair.item.pooled * layers)
    page = opened(dataclasses.replace(pair, item=framed), method="attention")
    trust = page.locator("[data-side=item] .m2h-trust")
    for keys, share in (("ArrowRight", 50), ("ArrowRight", 20), ("ArrowRight", 1)):
        slide(page, "layer", keys)
        settle(page)
        assert f"{share} % of it went to the frame of the row" in trust.inner_text()
    assert "frame" not in page.locator("[data-side=query] .m2h-trust").inner_text()


def rgb(text):
    return np.array([float(part) for part in re.findall(r"[\d.]+", text)[:3]])


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_fits_and_can_be_read(opened, scheme, width):
    "No sideways scrolling; every text, also on a word in full colour, has a contrast of 4.5."
    pair = edge_pairs()["64 words"]
    pair.item.faith["gradient"] = Faithfulness(0.5, 0.5, np.linspace(-1, 1, 99))
    page = opened(pair, width, scheme, "gradient")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = rgb(page.eval_on_selector(".m2h", "one => getComputedStyle(one).backgroundColor"))
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    for chosen in (
        ".m2h-score",
        ".m2h-told",
        ".m2h-what",
        ".m2h-ends",
        ".m2h-trust p:not(.m2h-warning)",
        ".m2h-note",
        "label",
        "h3",
    ):
        assert contrast(rgb(page.eval_on_selector(chosen, "one => getComputedStyle(one).color")), paper) >= 4.5, chosen
    warning = page.locator(".m2h-warning")
    assert warning.is_visible() and "Do not trust" in warning.inner_text()
    assert (
        contrast(
            *(rgb(warning.evaluate(f"one => getComputedStyle(one).{name}")) for name in ("color", "backgroundColor"))
        )
        >= 4.5
    )
    ink = rgb(page.eval_on_selector(".m2h-word", "one => getComputedStyle(one).color"))
    for method in ("gradient", "attention"):
        control(page, "method").select_option(method)
        for colour in colours(page, kind="word"):
            assert contrast(ink, paper + alpha(colour) * (rgb(colour) - paper)) >= 4.5
    boxes = [page.locator(f"[data-side={side}]").bounding_box() for side in ("query", "item")]
    assert (boxes[0]["y"] < boxes[1]["y"]) == (width == 400), "side by side, or one under the other"


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pairs_in_the_page(opened, name):
    pair = edge_pairs()[name]
    page = opened(pair, 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert (
        page.evaluate("window.pwned === undefined")
        and page.locator("main script, main b:text-is('model')").count() == 0
    )
    words = page.locator("[data-side=item] .m2h-word").all_inner_texts()
    assert (
        words == [word.replace("\u202e", "") for word, *_ in pair.item.words]
        or name == "hostile"
        and "红色杯子" in words
        and "</script>" in words
    )
    said = {
        "without picture": "no picture",
        "without title": "no title",
        "all zero": "Every number of this map is zero",
        "no cells in the map": "no numbers for cells",
    }
    if name == "a picture as a whole":
        page.locator("[data-side=item] .m2h-cell").hover()
        assert page.locator("[data-side=item] .m2h-told").inner_text().startswith("the picture:")
    if name == "no cells in the map":
        control(page, "method").select_option("ig")
        settle(page)
    assert said.get(name, "") in page.locator("[data-side=item]").inner_text()
    if name == "all zero":
        assert "no map of this method" in page.locator("[data-side=query]").inner_text() and {
            alpha(colour) for colour in colours(page)
        } == {0.0}


def test_the_policy_of_the_page_holds(browser, tmp_path):
    "What a page asks for is refused by the browser, not by luck."
    page = browser.new_page()
    page.goto(write_heat_page(made_up_pair(), tmp_path).as_uri())
    told = []
    page.on("console", lambda message: told.append(message.text))
    refused = page.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'fetched', (error) => String(error))")
    assert "TypeError" in refused and "violates the following Content Security Policy" in told[0]
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    page.close()


# ------------------------------------------------------------------------------------------- the widget in JupyterLab

CELL = """
import time
import numpy as np
from moon2_lab.explain.faithfulness import Faithfulness
from moon2_lab.explain.heatmap_data import Attribution
from moon2_lab.testing import made_up_pair
from moon2_lab.widgets.heatmap import HeatmapWidget

pair = made_up_pair()

def compute(side, method, progress, cancelled):
    if method == "occlusion":
        raise ValueError("this backbone has no cells")
    for step in range(400 if method == "shapley" else 10):
        if cancelled():
            return None
        progress(step, 400 if method == "shapley" else 10, "samples")
        time.sleep(0.05)
    mine = pair.side(side)
    faith = Faithfulness(0.5, 0.5, np.linspace(-1, 1, 99))
    return Attribution(method, np.linspace(-1, 1, len(mine.words)), np.eye(4)), faith

widget = HeatmapWidget(pair, compute)
widget.method, widget.patches = "cross", True
widget
"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with the heatmap; its address."
    with jupyter_lab(
        tmp_path,
        [
            CELL,
            "print('seen', widget.method, widget.layer, sorted(widget.maps.item.maps))",
            "widget.layer, widget.method = None, 'attention'",
        ],
    ) as address:
        yield address


def test_widget_in_jupyterlab(lab, browser, tmp_path):
    """It renders, a slider and Python change the map, pointing links words and cells, methods are computed with
    progress, cancel and errors; nothing is asked of the outside.
    """
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    open_notebook(page, lab)
    run_cell(page, 0)
    page.locator(".jp-OutputArea .m2h-side").first.wait_for(timeout=60_000)
    first = colours(page, "query", "word")
    assert page.locator("[data-side=item] img").evaluate("one => one.complete && one.naturalWidth > 0")
    page.locator("[data-side=item] .m2h-word").nth(3).hover()
    assert colours(page, "query", "word") != first
    assert "stoneware" in page.locator("[data-side=item] .m2h-told").inner_text()
    page.locator("[data-side=item] .m2h-word").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.textContent") == "red", "the notebook must not take the arrow keys"
    control(page, "method").select_option("attention")
    control(page, "layer").focus()
    before = colours(page)
    slide(page, "layer", "ArrowRight ArrowRight")
    until(page, lambda: colours(page) != before, "another layer")
    assert control(page, "layer").input_value() == "2"
    run_cell(page, 1)
    page.get_by_text("seen attention 1 ['attention', 'gradient']").first.wait_for(timeout=30_000)
    run_cell(page, 2)
    until(page, lambda: control(page, "layer").input_value() == "0" and colours(page) == before, "what Python sets")

    control(page, "method").select_option("ig")
    page.locator(".m2h-progress progress[value]").wait_for(timeout=20_000)
    assert {alpha(colour) for colour in colours(page, "query")} == {0.0}, "no old map under a new name"
    until(
        page,
        lambda: "Do not trust this map" in page.locator("[data-side=item] .m2h-trust").inner_text(),
        "the computed map and its warning",
    )
    assert not page.locator(".m2h-progress").is_visible() and sum(alpha(colour) > 0.6 for colour in colours(page)) == 4
    control(page, "method").select_option("shapley")
    page.locator(".m2h-progress button").click(timeout=20_000)
    until(
        page,
        lambda: "Cancelled: there is no map." in page.locator("[data-side=query] .m2h-trust").inner_text(),
        "the cancel",
    )
    control(page, "method").select_option("occlusion")
    until(
        page,
        lambda: (
            "this backbone has no cells" in page.locator("[data-side=query] .m2h-warning").all_inner_texts().__str__()
        ),
        "the error",
    )
    control(page, "method").select_option("ig")
    until(page, lambda: sum(alpha(colour) > 0.6 for colour in colours(page)) == 4, "the kept map")
    assert not page.locator(".m2h-progress").is_visible()
    assert outside(asked, lab) == []
    keep_screenshot(page, "lab.png")
    page.close()
