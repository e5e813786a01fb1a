"""Attributions of a score: what they add up to, on every kind of pair and encoder, and that the drawing functions take them."""
import numpy as np
import pytest
import torch
from PIL import Image
from small import pretrained

from moon2_lab.attribute import attribute_pair, deletion_check, pair_heatmap
from moon2_lab.cases import integrate
from moon2_lab.catalog import ImageRef, Item
from moon2_lab.core import LabError
from moon2_lab.encoder import Moon2Encoder, perturb_experts
from moon2_lab.pairscore import row_score
from moon2_lab.synth import draw_product

pytestmark = [pytest.mark.filterwarnings("ignore:attention=bidirectional"), pytest.mark.usefixtures("own_cache")]


def tiny(**fields) -> Moon2Encoder:
    "A small encoder whose experts differ."
    return perturb_experts(Moon2Encoder.from_backbone("tiny", **({"num_layers": 2, "image_size": 64} | fields)), std=0.1).eval()


def pair(index: int = 1) -> tuple[Item, Item]:
    "A shopper's words and photo, and the product they mean."
    drawn = draw_product(3, index, image_size=96)
    return Item(" ".join(drawn.title.split()[-2:]).lower(), ImageRef.from_pil(drawn.pictures[1]), "query"), Item(drawn.title, ImageRef.from_pil(drawn.pictures[0]), "item")


def view(item: Item, name: str) -> Item:
    "Title or picture alone, or both."
    return Item(None if name == "i" else item.text, None if name == "t" else item.image, item.item_id)


ENCODERS = {
    "experts": {}, "dense": {"num_experts": 0}, "one layer of experts": {"moe_layers": "1"}, "all experts": {"top_k": 4}, "one expert": {"top_k": 1},
    "bidirectional": {"attention": "bidirectional"}, "49 cells": {"visual_tokens": 49},
}


@pytest.mark.parametrize("fields", ENCODERS.values(), ids=ENCODERS)
def test_parts_add_up_to_the_score(fields):
    "Completeness, whatever the encoder is made of; and the score is the one that a search gives."
    encoder, (query, item) = tiny(**fields), pair()
    vectors = encoder.encode([query, item])
    for side in ("item", "query"):
        found = attribute_pair(encoder, query, item, side)
        assert found.score == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
        assert found.total == pytest.approx(found.score - found.blank_score, abs=1e-3) and found.adds_up
        grid = int(encoder.config.visual_tokens**0.5)
        assert found.cells.shape == (grid, grid) and np.isfinite(found.cells).all()


@pytest.mark.parametrize("product_view", ["t", "i", "mm"])
@pytest.mark.parametrize("query_view", ["t", "i", "mm"])
def test_every_direction(query_view, product_view):
    "Text only, picture only, both: on either side."
    encoder, (query, item) = tiny(), pair(2)
    query, item = view(query, query_view), view(item, product_view)
    for side, mine in (("item", item), ("query", query)):
        found = attribute_pair(encoder, query, item, side)
        assert found.total == pytest.approx(found.score - found.blank_score, abs=1e-3)
        assert bool(found.words) == bool(mine.text) and (found.cells is not None) == (mine.image is not None)
        assert [mine.text[start:end] for _, start, end, _ in found.words] == [word for word, *_ in found.words]


def test_experts_that_may_change_break_the_sum():
    "The case that must fail: with free routing the score jumps on the way, and more steps do not help."
    encoder, (query, item) = tiny(top_k=1), pair(4)
    score, real, blank = row_score(encoder, item, query)
    with torch.no_grad():
        rise = (score(*real) - score(*blank)).item()
    tokens, delta = integrate(score, real, blank, steps=128)
    assert abs(sum(part.sum() for part in tokens) - rise) == pytest.approx(abs(delta), abs=1e-4)
    assert abs(delta) > 20 * abs(attribute_pair(encoder, query, item).delta)


def test_lora_is_explained_and_left_alone():
    "LoRA weights take part in the score; they are merged in a copy."
    encoder, (query, item) = tiny(), pair(3)
    plain = attribute_pair(encoder, query, item)
    encoder.add_lora(4, 8)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    encoder.eval()
    found = attribute_pair(encoder, query, item)
    vectors = encoder.encode([query, item])
    assert found.score == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-4) and abs(found.score - plain.score) > 1e-3
    assert found.adds_up and encoder.lora


def test_explaining_changes_nothing():
    "Same weights, same modes, no hooks, no gradients; also when it fails half-way."
    encoder, (query, item) = tiny(), pair()
    encoder.train()
    before, vectors = encoder.fingerprint, encoder.encode([query, item])
    broken = Item("red", ImageRef("broken", lambda: (_ for _ in ()).throw(LabError("cannot be read", where="shelf"))), "p1")
    with pytest.raises(LabError, match="cannot be read"):
        attribute_pair(encoder, query, broken)
    attribute_pair(encoder, query, item)
    assert encoder.training and encoder.fingerprint == before and (encoder.encode([query, item]) == vectors).all()
    assert all(weight.grad is None for weight in encoder.parameters()) and not any(module._forward_hooks for module in encoder.modules())


def test_damaged_weights_are_named():
    "NaN weights give an error with advice, not a picture of nothing."
    encoder, (query, item) = tiny(), pair()
    with torch.no_grad():
        encoder.backbone.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(LabError, match="not a number.*earlier checkpoint"):
        attribute_pair(encoder, query, item)


@pytest.mark.parametrize("text", ["😀 👟 😀", "x" * 300, "赤い 靴", "a", "  red\n\nshoe\t", "https://shop.example/a?b=1,2;3"])
def test_odd_titles(text):
    "Emoji, one endless word, other scripts, blanks: every word has its place, and the sum holds."
    encoder, (query, _) = tiny(), pair()
    found = attribute_pair(encoder, query, Item(text, None))
    assert [word for word, *_ in found.words] == text.split() and found.words_unread == 0
    assert found.total == pytest.approx(found.score - found.blank_score, abs=1e-3)


def test_strong_parts_are_the_ones_that_count():
    "Over many pairs, the strongest words and cells cost more score than random ones."
    encoder, falls = tiny(), {"words": [], "cells": []}
    for index in range(24):
        query, item = pair(index)
        found = attribute_pair(encoder, query, item, steps=16)
        for part in ("words", "cells"):
            if part == "cells" or len(found.words) > 2:
                check = deletion_check(encoder, query, item, found, part)
                falls[part].append((check.top_fall, check.random_fall))
    for part, pairs in falls.items():
        top, chance = np.mean(pairs, axis=0)
        assert top > chance + 0.005, f"{part}: {top:.4f} against {chance:.4f}"


def test_the_drawing_functions_take_it():
    "A heatmap has all that figures and reports ask for."
    from moon2_lab.figures import pair_figure
    from moon2_lab.page import heat_pictures, heat_words

    query, item = pair()
    for product in (item, view(item, "t"), view(item, "i")):
        heat = pair_heatmap(tiny(), query, product)
        figure = pair_figure(heat)
        assert len(figure.data[-1].x or ()) == len(heat.words) and (figure.data[0].type == "image") == (product.image is not None)
        assert ("cells coloured" in heat_pictures(heat)) == (product.image is not None) and bool(heat_words(heat)) == bool(product.text)


def test_cells_lie_where_the_product_is():
    "A wide picture is padded above and below: the padding gets nothing, and the drawn picture is padded alike."
    encoder, (query, _) = tiny(), pair()
    wide = Item(None, ImageRef.from_pil(Image.new("RGB", (300, 100), "#7a3b2e")))
    heat = pair_heatmap(encoder, query, wide)
    assert heat.image.size[0] == heat.image.size[1] and heat.image.getpixel((5, 5)) == (255, 255, 255)
    assert np.abs(heat.cells[[0, 3]]).max() < 0.2 * np.abs(heat.cells[[1, 2]]).max()


@pytest.mark.slow
def test_mini():
    "The pretrained backbone: sub-words become words, and the sum holds."
    with pytest.MonkeyPatch.context() as patch:
        encoder = perturb_experts(pretrained(patch, num_layers=2), 0.02).eval()
    query, item = pair(5)
    long = Item(f"Levi's 501® slim-fit {item.text} (pack of 3)", item.image)
    for side in ("item", "query"):
        found = attribute_pair(encoder, query, long, side)
        assert found.adds_up and [word for word, *_ in found.words] == (long if side == "item" else query).text.split()
