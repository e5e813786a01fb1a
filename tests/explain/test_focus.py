"""Where attention goes as a number: known attention gives known focus, what cannot be measured is counted, models
are compared in pairs.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small import product, tiny

from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.errors import DataError, UsageError
from moon2_lab.explain import content_focus
from moon2_lab.explain.attention import AttentionRows
from moon2_lab.explain.attention_recorder import HeadInputs
from moon2_lab.explain.content_focus import (
    _content_tokens, _subject_patches, compare_focus, focus_table, left_out_counts,
)
from moon2_lab.explain.side_tokens import side_tokens
from moon2_lab.reporting.attention_figures import focus_figure

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore:attention=bidirectional")]

HALF = Image.new("RGB", (32, 32), "white")
HALF.paste((200, 30, 30), (14, 0, 28, 14))  # most of the upper right of four cells
ATTRIBUTES = {"colour": "red", "brand": "acme"}


def mug(number=0, title="very fine acme red stoneware thing in a shop", picture=HALF, **changes):
    "A mug of the test split whose title has one content word among nine."
    refs = () if picture is None else (ImageRef.from_pil(picture),)
    return dataclasses.replace(
        product(number),
        title=title,
        category_l1="mugs",
        category_l2=None,
        attributes=ATTRIBUTES,
        refs=refs,
        split="test",
        **changes,
    )


def known_attention(monkeypatch, weigh):
    "Let `weigh(side)` be the attention of both layers and heads."

    def attention_of(encoder, items, view):
        sides = [side_tokens(encoder, item, view) for item in items]
        return [
            AttentionRows(
                side, np.broadcast_to(weigh(side).astype(np.float32), (2, 2, 1, len(side))), [0, 1], [0, 1],
                even=np.full((2, len(side)), 1 / len(side)),
            )
            for side in sides
        ]

    monkeypatch.setattr(content_focus, "attention_of", attention_of)


def values(table, part, view, layer="mean"):
    "The focus of each product."
    return (
        table[(table.part == part) & (table.view == view) & (table.layer == layer) & (table.left_out == "")]
        .set_index("product_id")
        .value
    )


# ---------------------------------------------------------------------------------------------- the number


def test_uniform_attention_has_focus_one(monkeypatch):
    "Whatever the title, the picture and the weight of the first position."
    known_attention(monkeypatch, lambda side: np.array([0.7] + [0.3 / (len(side) - 1)] * (len(side) - 1)))
    table = focus_table(
        tiny(), Catalog.from_products([mug(0), mug(1, "a red cup and a white mug"), mug(2, "mugs - red ones, new")])
    )
    for part, view in (("words", "t"), ("words", "mm"), ("cells", "mm"), ("split", "mm")):
        for layer in ("mean", "0", "1"):
            found = values(table, part, view, layer)
            assert len(found) == 3 and found.to_numpy() == pytest.approx(1, abs=1e-6)


def test_twice_the_attention_has_focus_two(monkeypatch):
    """One content word among the eight behind the first gets a quarter of the attention; in view mm one of nine
    gets two ninths, and so does the cell of three.
    """

    def weigh(side):
        place = side.patches + 3  # red
        weights = np.ones(len(side))
        weights[place] = 2 * (len(side.spans) - (side.patches == 0)) / 8 * (7 / 6 if side.patches == 0 else 1)
        if side.patches:
            weights[place] = 2 * 8 / 7  # 16/7 of 8 + 16/7 = 2/9
            weights[1] = 4  # of the three cells behind the first: 4 of 6
        return weights / weights.sum()

    known_attention(monkeypatch, weigh)
    table = focus_table(tiny(), Catalog.from_products([mug()]))
    row = table[(table.view == "t") & (table.layer == "mean")].iloc[0]
    assert (row.attention, row.tokens, row.value) == pytest.approx((0.25, 0.125, 2), abs=1e-6)
    row = table[(table.view == "mm") & (table.part == "words") & (table.layer == "mean")].iloc[0]
    assert (row.attention, row.tokens, row.value) == pytest.approx((2 / 9, 1 / 9, 2), abs=1e-6)
    row = table[(table.part == "cells") & (table.layer == "mean")].iloc[0]
    assert (row.attention, row.tokens, row.value) == pytest.approx((2 / 3, 1 / 3, 2), abs=1e-6)
    row = table[(table.part == "split") & (table.layer == "mean")].iloc[0]
    title = 8 + 16 / 7
    assert (row.attention, row.tokens) == pytest.approx((title / (title + 6), 9 / 12), abs=1e-6)


def test_the_first_position_does_not_count(monkeypatch):
    "Nor does a content word that stands there."
    tables = []
    for first in (0.0, 0.9):
        known_attention(
            monkeypatch,
            lambda side, first=first: np.array(
                [first, *np.linspace(1, 2, len(side) - 1) * (1 - first) / 1.5 / (len(side) - 1)]
            ),
        )
        tables.append(focus_table(tiny(), Catalog.from_products([mug(title="red shop stoneware mug")])))
    assert values(tables[0], "words", "t").to_list() == pytest.approx(
        values(tables[1], "words", "t").to_list(), abs=1e-6
    )
    row = tables[0][(tables[0].view == "t") & (tables[0].layer == "mean")].iloc[0]
    assert (row.tokens, row.attention) == pytest.approx(
        (1 / 3, 2 / (1 + 1.5 + 2)), abs=1e-6
    )  # of shop, stoneware and mug


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_a_model_that_looks_evenly_is_its_own_even_reference(attention):
    "Queries of zero make every softmax flat: the measured focus is the computed one, and 1 without a mask."
    encoder = tiny(attention=attention)
    for layer in encoder.backbone.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    table = focus_table(encoder, Catalog.from_products([mug(0), mug(1, "new red mugs with a handle")]))
    found = table[table.left_out == ""]
    assert len(found) == 2 * 4 * 3 and found.value.to_numpy() == pytest.approx(found.even.to_numpy(), abs=1e-5)
    assert (found.even.to_numpy() == pytest.approx(1)) == (attention == "bidirectional")


def test_even_attention():
    "By hand, and a distribution."
    by_rows = np.tril(np.ones((6, 6))) / np.arange(1, 7)[:, None]
    inputs = HeadInputs(torch.randn(2, 6, 4), torch.randn(2, 6, 4), 0.5, causal=True)
    assert inputs.even(torch.arange(6)).numpy() == pytest.approx(by_rows.mean(0))
    assert dataclasses.replace(inputs, causal=False).even(torch.arange(6)).numpy() == pytest.approx(np.full(6, 1 / 6))


# ---------------------------------------------------------------------------------------------- what counts


def test_content_words_are_found_by_their_letters():
    "Plural, hyphens, signs, blanks before a piece, letters of other scripts; brands are no content."
    title = "ACME Red-Mugs, mugs (rouge) 赤い"
    spans = [(0, 4), (4, 8), (8, 13), (13, 14), (14, 19), (19, 21), (21, 26), (26, 27), (27, 30)]
    assert _content_tokens(title, spans, {"mug", "rouge", "赤い"}).tolist() == [
        False,
        False,
        False,
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    assert _content_tokens(title, spans, {"redmug"}).tolist() == [False, True, True] + [False] * 6


def test_cells_of_the_subject():
    "By quarters of a cell, on backdrops of any colour; padding is backdrop, too."
    for backdrop in ("white", (90, 120, 90), "black"):
        for pixels, expected in (
            (9, []),
            (10, [3]),
            (20, [3]),
        ):  # 9 x 9 of 20 x 20 is less than a quarter, 10 x 10 just that
            picture = Image.new("RGB", (40, 40), backdrop)
            picture.paste((200, 30, 30), (20, 20, 20 + pixels, 20 + pixels))
            assert np.flatnonzero(_subject_patches(picture, (2, 2), fine=20)).tolist() == expected
    wide = Image.new("RGB", (64, 16), (120, 120, 120))  # padded above and below to 64 x 64
    wide.paste((0, 0, 0), (0, 4, 32, 12))
    assert np.flatnonzero(_subject_patches(wide, (4, 4))).tolist() == [4, 5, 8, 9]
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert not _subject_patches(scene, (4, 4)).any()
    assert _subject_patches(Image.new("RGB", (1, 1), "red"), (2, 2)).shape == (4,)


def test_what_cannot_be_measured_is_counted():
    "Each product has a row in each part; the reasons are named."
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    shop = {
        "whole": mug(0, product_id="whole"),
        "no content": mug(1, "a thing of beauty", product_id="no content"),
        "no filler": mug(2, "mug red", product_id="no filler"),
        "one word": mug(3, "mug", product_id="one word"),
        "no picture": mug(4, picture=None, product_id="no picture"),
        "no title": mug(5, None, product_id="no title"),
        "scene": mug(6, picture=scene, product_id="scene"),
    }
    table = focus_table(tiny(), Catalog.from_products(shop.values()), batch_size=2)
    told = {
        name: {(row.view, row.part): row.left_out for row in rows.itertuples() if row.left_out}
        for name, rows in table.groupby("product_id")
    }
    assert told == {
        "whole": {},
        "no content": {("t", "words"): "no content word", ("mm", "words"): "no content word"},
        "no filler": {("t", "words"): "no filler word", ("mm", "words"): "no filler word"},
        "one word": {("t", "words"): "nothing behind the first position", ("mm", "words"): "no filler word"},
        "no picture": {("mm", "words"): "no picture", ("mm", "cells"): "no picture", ("mm", "split"): "no picture"},
        "no title": {
            ("t", "words"): "no title",
            ("mm", "words"): "no title",
            ("mm", "cells"): "no title",
            ("mm", "split"): "no title",
        },
        "scene": {("mm", "cells"): "no subject on a plain backdrop"},
    }
    means = table[table.layer == "mean"]
    assert means.groupby(["view", "part"]).product_id.nunique().tolist() == [7] * 4 and len(means) == 28
    counts = left_out_counts(table).set_index(["view", "part", "left_out"]).products
    assert counts["mm", "words", "no filler word"] == 2 and counts.sum() == 14
    compared = compare_focus(table.assign(model="m"))
    assert compared[compared.minus == ""].set_index(["view", "part"]).left_out.to_dict() == {
        ("t", "words"): 4,
        ("mm", "words"): 5,
        ("mm", "cells"): 3,
        ("mm", "split"): 2,
    }


def test_titles_that_hold_no_token():
    "A tokenizer may find nothing in a title: that is a product without title, not an error."
    encoder = tiny()
    own, encoder.backbone.tokenizer = encoder.backbone.tokenizer, lambda text: own(text.replace("\u200b", ""))
    table = focus_table(encoder, Catalog.from_products([mug(0), mug(1, "\u200b")]))
    assert table[table.product_id == "p001"].left_out.tolist() == ["no title"] * 4


def test_the_table_does_not_depend_on_batches():
    "Nor on the other products, nor on training mode, which stays."
    encoder, products = (
        tiny(perturbed=True).train(),
        [mug(n, " ".join(["nice"] * n + ["red", "mug", "for", "tea"])) for n in range(7)],
    )
    place = ["product_id", "view", "part", "layer"]
    one, many = (
        focus_table(encoder, Catalog.from_products(products), batch_size=size).set_index(place).sort_index()
        for size in (1, 5)
    )
    assert encoder.training and (one.left_out == many.left_out).all()
    np.testing.assert_allclose(one.value, many.value, atol=1e-5)
    alone = focus_table(encoder, Catalog.from_products(products[3:4])).set_index(place).sort_index()
    np.testing.assert_allclose(alone.value, one.loc[alone.index].value, atol=1e-5)


@pytest.mark.parametrize(
    ("choice", "says", "kind"),
    [
        ({"views": ("i",)}, "views of t and mm", UsageError),
        ({"views": ()}, "views of t and mm", UsageError),
        ({"batch_size": 0}, "batch_size=0", UsageError),
        ({"split": "train"}, "no usable product", DataError),
        ({"limit": 0}, "limit=0", UsageError),
    ],
)
def test_wrong_choices(choice, says, kind):
    with pytest.raises(kind, match=says):
        focus_table(tiny(), Catalog.from_products([mug()]), **choice)


def test_a_model_without_eyes_is_told():
    encoder, catalog = tiny(), Catalog.from_products([mug()])
    encoder.backbone.vision = None
    with pytest.raises(DataError, match="no vision encoder"):
        focus_table(encoder, catalog)
    assert set(focus_table(encoder, catalog, views=("t",)).view) == {"t"}


# ---------------------------------------------------------------------------------------------- comparing


def made_up(model, numbers, keys=None, missing=(), even=0.5):
    "A table of one part with these values."
    place = {"view": "t", "part": "words", "layer": "mean"}
    rows = [
        {
            "product_id": f"p{n}",
            "key": n if keys is None else keys[n],
            "value": value,
            "attention": value / 4,
            "tokens": 0.25,
            "even": even,
            "left_out": "",
        }
        | place
        for n, value in enumerate(numbers)
    ]
    for n in missing:
        rows[n] |= {
            "value": np.nan,
            "attention": np.nan,
            "tokens": np.nan,
            "even": np.nan,
            "left_out": "no filler word",
        }
    return pd.DataFrame(rows).assign(model=model)


def test_means_and_paired_differences():
    "A difference that all products share has hardly any width, however wide the means are."
    base = np.random.default_rng(0).uniform(0.5, 1.5, 60)
    found = compare_focus(pd.concat([made_up("a", base), made_up("b", base + 0.25)])).set_index(["model", "minus"])
    assert (
        found.value["a", ""] == pytest.approx(base.mean()) and found.lower["a", ""] < base.mean() < found.upper["a", ""]
    )
    spread = 1.96 * base.std() / np.sqrt(60)
    assert found.upper["a", ""] - found.lower["a", ""] == pytest.approx(2 * spread, rel=0.15)
    assert [found[name]["b", "a"] for name in ("value", "lower", "upper")] == pytest.approx(
        [0.25] * 3, abs=0.01
    ) and found.p["b", "a"] < 0.01
    assert found.value["a", "even"] == pytest.approx(base.mean() - 0.5)
    assert set(found.index) == {("a", ""), ("b", ""), ("a", "even"), ("b", "even"), ("b", "a")}


def test_nothing_but_noise_is_no_difference():
    noise = np.random.default_rng(3).normal(0, 0.2, 200)
    found = compare_focus(pd.concat([made_up("a", np.ones(200)), made_up("b", 1 + noise - noise.mean())])).set_index(
        ["model", "minus"]
    )
    assert found.lower["b", "a"] < 0 < found.upper["b", "a"] and found.p["b", "a"] > 0.5


def test_products_of_one_key_are_one_witness():
    "Ten copies of six products are as wide as six products."
    six = np.array([0.2, 0.6, 0.9, 1.3, 1.6, 2.0])
    copies = compare_focus(made_up("a", np.repeat(six, 10), keys=np.repeat(np.arange(6), 10))).iloc[0]
    alone, apart = compare_focus(made_up("a", six)).iloc[0], compare_focus(made_up("a", np.repeat(six, 10))).iloc[0]
    assert copies.upper - copies.lower == pytest.approx(alone.upper - alone.lower)
    assert copies.upper - copies.lower > 2 * (apart.upper - apart.lower)


def test_pairs_are_the_products_that_both_have():
    "Left out of one model: out of the difference, and counted; order does not matter."
    a, b = made_up("a", [1.0, 2.0, 3.0, 4.0], missing=[3]), made_up("b", [2.0, 2.0, 9.0, 5.0], missing=[2]).iloc[::-1]
    found = compare_focus(pd.concat([a, b])).set_index(["model", "minus"])
    assert (found.products["a", ""], found.left_out["a", ""], found.value["a", ""]) == (3, 1, 2.0)
    assert (found.products["b", "a"], found.left_out["b", "a"], found.value["b", "a"]) == (2, 2, 0.5)
    none = compare_focus(
        pd.concat([made_up("a", [1.0, 2.0], missing=[0]), made_up("b", [1.0, 2.0], missing=[1])])
    ).set_index(["model", "minus"])
    assert none.products["b", "a"] == 0 and np.isnan(none.value["b", "a"])


def test_layers():
    "Each layer has its mean; what is left out is left out of each."
    table = pd.concat(
        [made_up("a", [1.0, 2.0, 3.0], missing=[0]), made_up("a", [1.0, 4.0, 6.0]).iloc[1:].assign(layer="0")]
    )
    found = compare_focus(table, layer=None)
    means = found[found.minus == ""].set_index("layer")
    assert means.value.to_dict() == {"mean": 2.5, "0": 5.0} and means.left_out.to_dict() == {"mean": 1, "0": 1}
    assert compare_focus(table, layer="0").layer.unique().tolist() == ["0"]


def test_tables_that_cannot_be_compared():
    with pytest.raises(UsageError, match="no column model"):
        compare_focus(made_up("a", [1.0]).drop(columns="model"))
    with pytest.raises(UsageError, match="no layer '9'"):
        compare_focus(made_up("a", [1.0]), layer="9")
    with pytest.raises(DataError, match="p0.*stands twice|stands twice.*p0"):
        compare_focus(pd.concat([made_up("a", [1.0]), made_up("a", [2.0])]))


# ---------------------------------------------------------------------------------------------- the figure


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figure(theme):
    "Values, intervals and differences stand where they belong; a single model has one panel."
    compared = compare_focus(
        pd.concat(
            [made_up("one", [1.0, 1.5, 2.0]), made_up("two", [1.5, 2.0, 2.5]), made_up("<three>", [1.0, 1.4, 2.1])]
        )
    )
    figure = focus_figure(compared, theme)
    row = compared[(compared.model == "two") & (compared.minus == "")].iloc[0]
    dots = {(trace.name, trace.xaxis): trace for trace in figure.data}
    two = dots["two", "x"]
    assert (two.x[0], two.error_x.array[0], two.error_x.arrayminus[0]) == pytest.approx(
        (row.value, row.upper - row.value, row.value - row.lower), abs=1e-4
    )
    assert (
        dots["two", "x2"].x[0] == pytest.approx(0.5)
        and dots["even attention", "x"].x[0] == 0.5
        and ("&lt;three&gt;", "x2") in dots
    )
    assert figure.layout.width == 600 and "3 (left out 0)" in figure.layout.title.subtitle.text
    assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data}) == 4
    assert {trace.xaxis for trace in focus_figure(compare_focus(made_up("one", [1.0, 2.0])), theme).data} == {"x"}


def test_figures_that_are_refused():
    compared = compare_focus(made_up("one", [1.0, 2.0]))
    for wrong, says in (
        (compared[:0], "0 layers"),
        (pd.concat([compared, compared.assign(layer="1")]), "2 layers"),
        (compare_focus(made_up("one", [1.0], missing=[0])), "no product could be measured"),
    ):
        with pytest.raises(DataError, match=says):
            focus_figure(wrong)
