"""Inside the experts: what is sent, the widget without and with a browser, still picture and figure; and whatever
an item or a history may lack.
"""

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from browsing import contrast, jupyter_lab, keep_screenshot, luminance, open_notebook, outside, run_cell, settle, until
from choosing import LOOKS, few
from PIL import Image
from small import product, tiny

from moon2_lab.config import OBJECTIVES, VIEWS
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, UsageError
from moon2_lab.explain.expert_routing import expert_load, token_routing
from moon2_lab.reporting.routing_figures import (
    _EXPERT_COLOURS, _ink_on, expert_map_figure, routing_picture, routing_png, show_routing,
)
from moon2_lab.reporting.routing_maps import RoutingMaps, _EVEN, routing_maps, routing_payload, training_steps
from moon2_lab.testing import made_up_history, made_up_routing
from moon2_lab.widgets.routing import RoutingWidget

MEBIBYTE = 2**20
HOSTILE = "<script>window.pwned=1</script> <img/src=x/onerror=window.pwned=2> 红色杯子 😀 \u202egnol &amp; $x_2$"


def sent_weights(payload, data):
    "The routing weights as the browser reads them."
    told = payload["side"]["experts"]
    return np.frombuffer(data, "<u2", int(np.prod(told["shape"])), told["at"]).reshape(told["shape"]) / 65535


def state_size(widget):
    "Bytes that travel to the browser, script and style included."
    return sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value)) for value in widget.get_state().values()
    )


def collapsed(steps=30):
    "A made-up history in which one objective takes over, and the sum of omega falls, in the last third."
    history = made_up_history(steps)
    late = history.step > 2 * steps // 3
    history.loc[late, [f"omega_{name}" for name in OBJECTIVES]] = 0.02, 0.36, 0.01, 0.01, 0.01
    return history.assign(omega_sum_raw=np.where(late, 0.41, 0.98))


def unusual():
    "Routing that is unusual, by name."
    maps = made_up_routing()
    even = dataclasses.replace(maps.side, experts=np.full(maps.weights.shape, 0.25))
    return {
        "without picture": made_up_routing("red mug", grid=0),
        "without title": made_up_routing("", grid=4),
        "one word": made_up_routing("mug"),
        "three by seven patches": made_up_routing("red mug", grid=(3, 7)),
        "a picture as a whole": made_up_routing("red mug", grid=(1, 1)),
        "64 words, 16 experts": made_up_routing(" ".join(["stoneware"] * 64), grid=7, layers=4, experts=16),
        "long word": made_up_routing("x" * 400 + " mug"),
        "hostile": dataclasses.replace(made_up_routing(HOSTILE), name="<b>p1</b>"),
        "even": RoutingMaps(even),
        "one expert": made_up_routing(experts=1, top_k=1, layers=1),
        "routing only": dataclasses.replace(maps, load={}, training=None),
        "no preferences": dataclasses.replace(
            maps, training=training_steps(made_up_history(20)[["step", *(f"omega_{name}" for name in OBJECTIVES)]])
        ),
        "no omega": dataclasses.replace(
            maps,
            training=training_steps(
                made_up_history(20)[["step", *(f"p_{z}_{name}" for z in range(4) for name in OBJECTIVES)]]
            ),
        ),
    }


# ---------------------------------------------------------------------------------------------- what is sent


def test_numbers_sent_equal_those_of_an_encoder():
    "From the encoder to the state of the widget: weights, load, and the history's own rows."
    encoder = tiny(perturbed=True)
    item, history = product(3).item(), made_up_history(90)
    found, load = token_routing(encoder, item), expert_load(encoder, [product(number).item() for number in range(6)])
    maps = routing_maps(found, load, history)
    widget = RoutingWidget(maps)
    assert np.abs(sent_weights(widget.payload, widget.data) - found.experts).max() < 1e-5
    for view in VIEWS:
        assert np.allclose(widget.payload["load"][view], load[view], atol=1e-5)
    run = widget.payload["training"]
    rows = history.set_index("step").loc[run["steps"]]
    assert len(run["steps"]) == 60 and run["steps"][0] == 1 and run["steps"][-1] == 90
    assert np.allclose(np.array(run["preference"])[:, 2, 3], rows["p_2_intra_p"], atol=1e-5)
    assert np.allclose(np.array(run["omega"])[:, 1], rows["omega_inter_i"], atol=1e-5)
    assert np.allclose(np.array(run["weights"]["i"])[:, 3], rows["load_i_3"], atol=1e-5)
    assert [word for _, word in widget.payload["side"]["words"]] == [
        word for word, *_ in found.side.words
    ] and widget.payload["side"]["expert_layers"] == [0, 1]
    jpeg = Image.open(io.BytesIO(widget.data[: widget.payload["side"]["image"]["size"]]))
    assert jpeg.format == "JPEG" and jpeg.size == (320, 320)


@pytest.mark.parametrize("view, cells, words", [("t", 0, 6), ("i", 4, 0), ("mm", 4, 6)])
def test_views_of_an_item(view, cells, words):
    maps = routing_maps(token_routing(tiny(perturbed=True), product(3).item(), view))
    assert (maps.side.patches, len(maps.side.words), maps.weights.shape) == (cells, words, (2, cells + words, 4))


@pytest.mark.parametrize("title, words", [("mug", 1), ("红色 杯子", 2), ("mug 😀", 2), (None, 0)])
def test_titles_of_an_encoder(title, words):
    "A title of one token, in Chinese, with emoji, and none: all that is read has weights."
    maps = routing_maps(token_routing(tiny(perturbed=True), Item(title, product(3).refs[0], "p")))
    assert len(maps.side.words) == words and maps.weights.shape[1] == 4 + words
    assert state_size(RoutingWidget(maps)) < MEBIBYTE and len(routing_png(maps)) < 100_000
    assert expert_map_figure(maps).data


def test_chosen_layers():
    encoder = tiny(perturbed=True)
    found, load = token_routing(encoder, product(3).item()), expert_load(encoder, [product(3).item()])
    maps = routing_maps(found, load, layers=[1])
    assert (
        maps.side.expert_layers == [1]
        and np.array_equal(maps.weights, found.experts[1:])
        and np.array_equal(maps.load["t"], load["t"][1:])
    )
    with pytest.raises(UsageError, match="layer 7 has no experts"):
        routing_maps(found, layers=[7])


def test_the_largest_state_stays_under_a_mebibyte():
    widget = RoutingWidget(
        made_up_routing(
            " ".join(f"stoneware{place}" for place in range(64)), grid=14, layers=24, experts=16, steps=5000
        )
    )
    assert 200_000 < state_size(widget) < MEBIBYTE and len(widget.payload["training"]["steps"]) == 60
    with pytest.raises(UsageError, match="choose some layers"):
        RoutingWidget(made_up_routing(grid=10, layers=48, experts=128, steps=0))


UNUSUAL = few(list(unusual()), "without picture", "64 words, 16 experts", "hostile", "no omega")


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_routing_can_be_shown(name):
    "As a widget, a still picture, and a figure of either kind."
    maps = unusual()[name]
    widget = RoutingWidget(maps)
    assert state_size(widget) < MEBIBYTE
    assert len(routing_png(maps)) < 100_000
    bundle, _ = widget._repr_mimebundle_()
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).width == 640
    for theme in ("light", "dark"):
        drawn = expert_map_figure(maps, theme=theme).to_json()
        assert "<script" not in drawn and "<img" not in drawn and "u003cscript" not in drawn and "u003cimg" not in drawn


# ---------------------------------------------------------------------------------------------- what is refused


def test_no_experts_no_picture_no_words():
    "The errors of moon2_lab.explain.expert_routing reach the reader."
    with pytest.raises(UsageError, match="this encoder has no experts"):
        token_routing(tiny(num_experts=0), product(3).item())
    encoder = tiny()
    for item, view, words in (
        (Item("red mug", None, "p1"), "i", "no picture"),
        (Item(None, product(3).refs[0], "p2"), "t", "no readable text"),
        (Item(None, None, "p3"), "mm", "neither"),
    ):
        with pytest.raises(DataError, match=words):
            token_routing(encoder, item, view)


WRONG = {
    "hole": (lambda w: w * np.nan, "not shares"),
    "sum": (lambda w: 1.1 * w, "not shares"),
    "below zero": (lambda w: w * np.array([1, -1, 1, 1]), "not shares"),
    "places": (lambda w: w[:, :3], "patches come first"),
    "layers": (lambda w: w[:2], "names for 2 MoE layers"),
    "none": (lambda w: None, "no routing weights"),
}


@pytest.mark.parametrize("bad, words", WRONG.values(), ids=WRONG)
def test_weights_that_are_none_are_refused(bad, words):
    maps = made_up_routing()
    with pytest.raises((DataError, UsageError), match=words):
        RoutingMaps(dataclasses.replace(maps.side, experts=bad(maps.weights)))


def test_histories_of_something_else_are_refused():
    maps, history = made_up_routing(), made_up_history(20)
    others = {
        "says nothing of experts": history[["step", "loss"]],
        "no rows": history.iloc[:0],
        r"\[1, 2, 3\] only": history.drop(columns=[f"p_0_{name}" for name in OBJECTIVES]),
    }
    backwards = [("do not rise", history.iloc[::-1]), ("do not rise", history.assign(step=np.nan))]
    for words, wrong in [*others.items(), *backwards]:
        with pytest.raises(DataError, match=words):
            training_steps(wrong)
    with pytest.raises(UsageError, match="8 experts, the item's routing 4"):
        dataclasses.replace(maps, training=training_steps(made_up_history(20, experts=8)))
    with pytest.raises(UsageError, match=r"\(3, 5\), not \(layers, experts\) = \(3, 4\)"):
        dataclasses.replace(maps, load={"t": np.full((3, 5), 0.2)})


def test_missing_numbers_of_a_step_stay_missing():
    "An objective that was absent in a step is no zero, and the sum is that of the others."
    history = made_up_history(5)
    history.loc[2, "omega_inter_t"] = np.nan
    run = routing_payload(dataclasses.replace(made_up_routing(), training=training_steps(history)))[0]["training"]
    assert run["omega"][2][0] is None and abs(run["total"][2] - sum(run["omega"][2][1:])) < 1e-4
    assert (
        routing_picture(dataclasses.replace(made_up_routing(), training=training_steps(history)), step=3).width == 640
    )


def test_the_strongest_and_the_even():
    "No expert is named where the first is not ahead."
    maps = made_up_routing()
    weights = maps.weights.copy()
    weights[0, 5] = 0.5, 0.5, 0, 0
    weights[0, 6] = 0.5 - _EVEN, 0.5 + _EVEN, 0, 0
    strongest = RoutingMaps(dataclasses.replace(maps.side, experts=weights)).strongest
    assert strongest[0, 5:7].tolist() == [-1, 1] and np.array_equal(strongest[1:], weights[1:].argmax(-1))


def test_traits_refuse_what_is_not_there():
    widget = RoutingWidget(made_up_routing(steps=200))
    for name, value, words in (
        ("layer", 3, "0 to 2"),
        ("layer", -1, "0 to 2"),
        ("expert", 4, "0 to 3, or None"),
        ("step", 2, "nearest: 1, 4"),
        ("step", -7, "nearest"),
    ):
        with pytest.raises(UsageError, match=words):
            setattr(widget, name, value)
    assert (widget.layer, widget.expert, widget.step) == (0, None, 200)
    bare = RoutingWidget(made_up_routing(steps=0))
    with pytest.raises(UsageError, match="without one there are no steps"):
        bare.step = 1
    assert bare.step == 0 and bare.payload["training"] is None


def test_alarms_of_the_whole_run():
    alarms = training_steps(collapsed()).alarms
    assert any("inter_i held 88%" in text for _, text in alarms) and any("sum to 0.41" in text for _, text in alarms)
    assert [level for level, _ in training_steps(made_up_history(30)).alarms if level == "warning"] == []


# ------------------------------------------------------------------------------------------- still picture and figure


def test_still_picture_shows_the_strongest_expert():
    "The number in the middle of each cell stands on the colour of its expert."
    maps = made_up_routing(steps=0)
    picture = np.asarray(routing_picture(dataclasses.replace(maps, load={}), layer=2))
    grounds = [
        tuple(picture[34 + 65 * (place // 4) + 24, 12 + 65 * (place % 4) + 32].tolist()) for place in range(16)
    ]  # cells of 65 pixels from (12, 34) on; just above the digit
    assert grounds == [_EXPERT_COLOURS[z] for z in maps.strongest[2, :16]]
    assert routing_png(maps, 0) != routing_png(maps, 2)
    shown = show_routing(maps, 2)
    assert "layer 2" in shown.alt and shown.data.startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="layer 5 of 3"):
        routing_picture(maps, 5)


def test_figure_holds_the_numbers():
    maps = made_up_routing()
    figure = expert_map_figure(maps, layer=1, theme="dark")
    cells = next(trace for trace in figure.data if trace.type == "heatmap")
    assert np.array_equal(cells.z.astype(int).ravel(), maps.strongest[1, :16])
    bars = [trace for trace in figure.data if trace.type == "bar"]
    words = np.stack([trace.x for trace in bars if len(trace.x) == len(maps.side.words)], 1)
    assert np.allclose(words, maps.weights[1, 16:], atol=1e-5)
    load = np.stack([trace.x for trace in bars if len(trace.x) == 3], 1)
    assert np.allclose(load, [maps.load[view][1] for view in VIEWS], atol=1e-5)
    assert {text for trace in bars for text in trace.text if text} <= set(
        "0123"
    ) and figure.layout.paper_bgcolor == "#12161d"


# ------------------------------------------------------------------------------------ the widget in a page of its own

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>experts</title>
<style>body { margin: 0; background: light-dark(#fff, #000); color-scheme: light dark } CSS</style>
<main></main><script type="module">
ESM
const state = STATE, heard = {};
state.data = Uint8Array.from(atob(state.data), (one) => one.charCodeAt(0));
const set = (name, value) => { state[name] = value; for (const told of heard[`change:${name}`] ?? []) told(); };
window.model = { get: (name) => state[name], set, save_changes: () => {},
  on: (name, told) => (heard[name] ??= new Set()).add(told), off: (name, told) => heard[name].delete(told), heard };
window.stop = widget.render({ model: window.model, el: document.querySelector("main") });
</script></html>"""


def page_of(widget):
    "The widget's module and state as a page; the model is the simplest that has the methods of anywidget's."
    state = {
        "payload": widget.payload,
        "data": base64.b64encode(widget.data).decode(),
        "layer": widget.layer,
        "expert": widget.expert,
        "step": widget.step,
    }
    esm = widget._esm.replace("export default", "const widget =")
    return (
        PAGE.replace("CSS", widget._css).replace("ESM", esm).replace("STATE", json.dumps(state).replace("<", "\\u003c"))
    )


@pytest.fixture
def opened(browser, tmp_path):
    "A function that opens routing in a page; at the end no error and no request to the outside may have been seen."
    asked, wrong, pages = [], [], []

    def open_page(maps, width=1200, scheme="light", **traits):
        page, widget = (
            browser.new_page(viewport={"width": width, "height": 1400}, color_scheme=scheme, offline=True),
            RoutingWidget(maps),
        )
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        for name, value in traits.items():
            setattr(widget, name, value)
        path = tmp_path / f"page{len(pages)}.html"
        path.write_text(page_of(widget), encoding="utf-8")
        page.goto(path.as_uri())
        page.locator(".m2r").wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file://", "blob:"))] == []


def colours(page, kind="cell"):
    "Background colours of the cells or words."
    settle(page)
    return page.eval_on_selector_all(f".m2r-{kind}", "all => all.map((one) => getComputedStyle(one).backgroundColor)")


def parts(colour):
    "(r, g, b), alpha of a computed colour."
    found = [float(part) for part in re.findall(r"[\d.]+", colour)]
    return tuple(found[:3]), found[3] if len(found) > 3 else 1.0


def marks(page, kind="cell"):
    settle(page)
    return page.locator(f".m2r-{kind} .m2r-chip").all_inner_texts()


def control(page, name):
    return page.locator(f"[data-control='{name}'] :is(input, select)")


def slide(page, name, keys):
    "Move a slider as a reader without a mouse does."
    control(page, name).focus()
    for key in keys.split():
        page.keyboard.press(key)
    settle(page)


def table(page, caption):
    "The numbers of the table with this caption, as text."
    rows = page.locator(f"table:has(caption:text('{caption}')) tbody tr")
    return [row.locator("td").all_inner_texts() for row in rows.all()]


def test_page_shows_the_numbers(opened):
    "Number, colour and strength of each cell and word follow from the weights; the layer slider changes them."
    maps = made_up_routing()
    page = opened(maps)
    assert page.locator(".m2r img").evaluate("one => one.complete && one.naturalWidth > 0")
    for layer in (0, 2):
        if layer:
            slide(page, "MoE layer", "ArrowRight ArrowRight")
        for kind, chosen, strongest in (("cell", slice(0, 16), 0.75), ("word", slice(16, None), 0.5)):
            weights, best = maps.weights[layer, chosen], maps.strongest[layer, chosen]
            assert marks(page, kind) == [str(z) for z in best]
            drawn = [parts(colour) for colour in colours(page, kind)]
            assert [colour for colour, _ in drawn] == [_EXPERT_COLOURS[z] for z in best]
            assert np.allclose([alpha for _, alpha in drawn], strongest * weights.max(-1), atol=0.006)
        assert page.locator("[data-control='MoE layer'] output").inner_text() == f"layer {layer}"
        shown = page.locator("[data-view=i] .m2r-value").all_inner_texts()
        assert shown == [f"{share:.1%}".replace("%", " %") for share in maps.load["i"][layer]]
        widths = page.eval_on_selector_all(
            "[data-view=i] .m2r-fill", "all => all.map((one) => one.getBoundingClientRect().width)"
        )
        assert np.allclose(
            np.array(widths) / max(widths), maps.load["i"][layer] / maps.load["i"][layer].max(), atol=0.02
        )
    assert np.abs(maps.strongest[0] - maps.strongest[2]).max() > 0


def test_one_expert_as_a_heatmap(opened):
    maps = made_up_routing()
    page = opened(maps)
    before = colours(page)
    control(page, "colour").select_option("2")
    share = maps.weights[0, :, 2]
    assert colours(page) != before
    assert np.allclose([parts(colour)[1] for colour in colours(page)], 0.75 * share[:16] / share.max(), atol=0.006)
    assert {parts(colour)[0] for colour in colours(page)} == {(128, 48, 152)}
    assert marks(page) == [f"{100 * value:.0f}" for value in share[:16]]
    page.evaluate("model.set('expert', null)")
    assert colours(page) == before and control(page, "colour").input_value() == ""


def test_pointing_shows_all_weights(opened):
    maps = made_up_routing()
    page = opened(maps)
    still = page.locator(".m2r-weights .m2r-value").all_inner_texts()
    assert (
        still == [f"{share:.1%}".replace("%", " %") for share in maps.weights[0].mean(0)]
        and "16 cells and 7 words" in page.locator(".m2r-weights h4").inner_text()
    )
    page.locator(".m2r-word").nth(3).hover()
    settle(page)
    assert page.locator(".m2r-weights .m2r-value").all_inner_texts() == [
        f"{share:.1%}".replace("%", " %") for share in maps.weights[0, 19]
    ]
    assert "“stoneware”" in page.locator(".m2r-weights h4").inner_text() and page.locator(
        ".m2r-told"
    ).inner_text().startswith(f"“stoneware”: expert {maps.strongest[0, 19]} ")
    page.locator(".m2r-cell").nth(6).hover()
    settle(page)
    assert page.locator(".m2r-weights h4").inner_text() == "Weights: row 2, column 3"
    page.mouse.move(1, 1)
    settle(page)
    assert page.locator(".m2r-weights .m2r-value").all_inner_texts() == still


def test_the_step_slider_changes_the_numbers(opened):
    "Preferences, omegas and routing weights are the history's at that step; the alarm comes and goes."
    history = collapsed()
    maps = dataclasses.replace(made_up_routing(), training=training_steps(history))
    page = opened(maps, step=1)
    for place, keys in ((0, ""), (29, "End"), (28, "ArrowLeft")):
        if keys:
            slide(page, "step", keys)
        row = history.iloc[place]
        assert table(page, "Preference p") == [[f"{row[f'p_{z}_{name}']:.2f}" for name in OBJECTIVES] for z in range(4)]
        assert table(page, "Mean routing weight") == [
            [f"{row[f'load_{view}_{z}']:.2f}" for view in VIEWS] for z in range(4)
        ]
        assert page.locator(".m2r-omega .m2r-value").all_inner_texts() == [
            f"{row[f'omega_{name}']:.3f}" for name in OBJECTIVES
        ]
        assert page.locator("[data-control=step] output").inner_text() == f"step {place + 1} of 30"
        told = page.locator("[role=alert]").inner_text()
        assert ("inter_i holds 88 %" in told and "sum to 0.41" in told) if place else told == ""
        assert f"Sum of ω as printed in the paper: {row.omega_sum_raw:.2f}" in page.locator(".m2r-omega").inner_text()
    assert page.locator(".m2r-course > .m2r-warning").count() == 2, "the run's own alarms stay"


def test_keyboard_alone(opened):
    "Tab reaches every part in its order; arrows move over cells and words; enter holds; escape lets go."
    page = opened(made_up_routing())
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "() => { const one = document.activeElement;"
                " return one.closest('label')?.dataset.control ?? one.getAttribute('role'); }"
            )
        )
    assert order == ["MoE layer", "colour", "gridcell", "option", "step", "region", "region"]
    page.locator(".m2r-word").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.querySelector('bdi').textContent") == "quality"
    assert "quality" in page.locator("[aria-live=polite]").inner_text()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Enter")
    held = page.locator(".m2r-told").inner_text()
    page.locator(".m2r-cell").nth(2).hover()
    settle(page)
    assert page.locator(".m2r-told").inner_text() == held
    page.keyboard.press("Escape")
    page.locator(".m2r-cell").first.focus()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row 2, column 1: expert ")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row 2, column 1: expert "), (
        "the edge is an edge"
    )


def style(page, chosen, name):
    return parts(page.locator(chosen).first.evaluate(f"one => getComputedStyle(one).{name}"))


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_fits_and_can_be_read(opened, scheme, width):
    """No sideways scrolling; texts, also those on colours, have a contrast of 4.5; all eight colours are those of
    Python.
    """
    maps = dataclasses.replace(
        made_up_routing(" ".join(["stoneware"] * 30), grid=7, experts=8, top_k=1),
        training=training_steps(collapsed_of(8)),
    )
    page = opened(maps, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper = np.array(style(page, ".m2r", "backgroundColor")[0])
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    for chosen in (".m2r-heading", ".m2r-told", ".m2r-note", ".m2r-value", "label", "h3", "h4", "caption", "th"):
        assert contrast(style(page, chosen, "color")[0], paper) >= 4.5, chosen
    assert contrast(style(page, ".m2r-warning", "color")[0], style(page, ".m2r-warning", "backgroundColor")[0]) >= 4.5
    for chosen, places in ((".m2r-word", 30), ("td", 40)):
        ink = style(page, chosen, "color")[0]
        found = [
            parts(colour)
            for colour in page.eval_on_selector_all(
                chosen, "all => all.map((one) => getComputedStyle(one).backgroundColor)"
            )
        ]
        assert (
            len(found) >= places
            and min(contrast(ink, paper + alpha * (np.array(colour) - paper)) for colour, alpha in found) >= 4.5
        ), chosen
    chips = page.locator(".m2r-weights .m2r-chip")
    for expert in range(8):
        ground, ink = (
            parts(chips.nth(expert).evaluate(f"one => getComputedStyle(one).{name}"))[0]
            for name in ("backgroundColor", "color")
        )
        assert (ground, ink) == (_EXPERT_COLOURS[expert], _ink_on(expert)) and contrast(ground, ink) >= 4.5
    keep_screenshot(page, f"experts_{scheme}_{width}.png")


def collapsed_of(experts):
    "`collapsed` for a number of experts."
    return made_up_history(30, experts).assign(
        **{name: values for name, values in collapsed().items() if name.startswith("omega")}
    )


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_routing_in_the_page(opened, name):
    maps = unusual()[name]
    page = opened(maps, 400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    assert (
        page.evaluate("window.pwned === undefined") and page.locator("main script, main b:text-is('p1')").count() == 0
    )
    words = page.locator(".m2r-word bdi").all_inner_texts()
    assert (
        words == [word.replace("\u202e", "") for word, *_ in maps.side.words]
        or name == "hostile"
        and {"红色杯子", "😀", "&amp;"} <= set(words)
    )
    said = {
        "without picture": "no picture",
        "without title": "no title",
        "routing only": "No training history was given",
        "no preferences": "holds no preferences",
        "no omega": "holds no objective weights",
    }
    assert said.get(name, "") in page.locator(".m2r").inner_text()
    if name == "even":
        assert (
            set(marks(page)) == {"="}
            and {parts(colour)[1] for colour in colours(page)} == {0.0}
            and "No load by view was given" in page.locator(".m2r").inner_text()
        )
    if name == "64 words, 16 experts":
        assert marks(page) == [str(z) for z in maps.strongest[0, :49]], "a colour that comes again has another number"
    assert page.locator("[data-control='MoE layer']").is_visible() == (name != "one expert")


def test_it_lets_go(opened):
    "After the view is removed nothing listens, and the picture's memory is free."
    page = opened(made_up_routing())
    picture = page.locator(".m2r img").get_attribute("src")
    page.evaluate("window.freed = []; URL.revokeObjectURL = (address) => freed.push(address); stop()")
    assert page.evaluate("Object.values(model.heard).map((all) => all.size)") == [0, 0, 0] and page.evaluate(
        "freed"
    ) == [picture]


# ------------------------------------------------------------------------------------------- the widget in JupyterLab

CELL = """
from moon2_lab.testing import made_up_routing
from moon2_lab.widgets.routing import RoutingWidget

widget = RoutingWidget(made_up_routing())
widget
"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with the widget; its address."
    with jupyter_lab(
        tmp_path,
        [
            CELL,
            "print('seen', widget.layer, widget.expert, widget.step)",
            "widget.layer, widget.expert, widget.step = 2, None, 1",
        ],
    ) as address:
        yield address


@pytest.mark.slow
def test_widget_in_jupyterlab(lab, browser):
    """It renders, sliders reach Python and Python the sliders, the notebook leaves the arrow keys alone; nothing
    is asked of the outside.
    """
    maps, page, asked = made_up_routing(), browser.new_page(viewport={"width": 1300, "height": 1500}), []
    page.on("request", lambda request: asked.append(request.url))
    open_notebook(page, lab)
    run_cell(page, 0)
    page.locator(".jp-OutputArea .m2r-cell").first.wait_for(timeout=60_000)
    first = colours(page)
    page.locator(".m2r-word").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.querySelector('bdi').textContent") == "red", (
        "the notebook must not take the arrow keys"
    )
    slide(page, "MoE layer", "ArrowRight")
    control(page, "colour").select_option("3")
    slide(page, "step", "Home")
    until(page, lambda: colours(page) != first, "another layer")
    run_cell(page, 1)
    page.get_by_text("seen 1 3 1", exact=True).first.wait_for(timeout=30_000)
    run_cell(page, 2)
    until(page, lambda: marks(page) == [str(z) for z in maps.strongest[2, :16]], "what Python sets")
    assert control(page, "MoE layer").input_value() == "2"
    assert outside(asked, lab) == []
    keep_screenshot(page, "experts_lab.png")
    page.close()
