"""Attributions of a score: what they add up to, on every kind of pair and encoder, and that the drawing functions
take them.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from small import pretrained

from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.data.synthetic.generator import draw_product
from moon2_lab.errors import LabError
from moon2_lab.explain.attribution import attribute_side, attribution_inputs
from moon2_lab.explain.explainer import Explainer
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.reporting.heatmap_figures import side_html

pytestmark = [pytest.mark.filterwarnings("ignore:attention=bidirectional"), pytest.mark.usefixtures("own_cache")]


def tiny(**fields) -> Moon2Encoder:
    "A small encoder whose experts differ."
    return perturb_experts(
        Moon2Encoder.from_backbone("tiny", **({"num_layers": 2, "image_size": 64} | fields)), std=0.1
    ).eval()


def pair(index: int = 1) -> tuple[Item, Item]:
    "A shopper's words and photo, and the product they mean."
    drawn = draw_product(3, index, image_size=96)
    return Item(" ".join(drawn.title.split()[-2:]).lower(), ImageRef.from_pil(drawn.pictures[1]), "query"), Item(
        drawn.title, ImageRef.from_pil(drawn.pictures[0]), "item"
    )


def view(item: Item, name: str) -> Item:
    "Title or picture alone, or both."
    return Item(None if name == "i" else item.text, None if name == "t" else item.image, item.item_id)


def adds_up(found, rise=None) -> bool:
    "Completeness: the sum misses the rise by 1 % of it + 0.001 at most."
    total = found.values.sum()
    rise = total - found.delta if rise is None else rise
    return total - rise == pytest.approx(found.delta, abs=1e-4) and abs(total - rise) <= 0.01 * abs(rise) + 1e-3


ENCODERS = {
    "experts": {},
    "dense": {"num_experts": 0},
    "one layer of experts": {"moe_layers": "1"},
    "all experts": {"top_k": 4},
    "one expert": {"top_k": 1},
    "bidirectional": {"attention": "bidirectional"},
    "49 cells": {"visual_tokens": 49},
}


@pytest.mark.parametrize("fields", ENCODERS.values(), ids=ENCODERS)
def test_parts_add_up_to_the_score(fields):
    "Completeness, whatever the encoder is made of; and the score is the one that a search gives."
    encoder, (query, item) = tiny(**fields), pair()
    vectors = encoder.encode([query, item])
    for side in ("item", "query"):
        found = attribute_side(encoder, query, item, side)
        inputs = attribution_inputs(encoder, *((item, query) if side == "item" else (query, item)))
        assert inputs.ends[0] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)
        assert adds_up(found, inputs.rise)
        grid = int(encoder.config.visual_tokens**0.5)
        assert found.patches.shape == (grid, grid) and np.isfinite(found.patches).all()


@pytest.mark.parametrize("product_view", ["t", "i", "mm"])
@pytest.mark.parametrize("query_view", ["t", "i", "mm"])
def test_every_direction(query_view, product_view):
    "Text only, picture only, both: on either side."
    encoder, (query, item) = tiny(), pair(2)
    query, item = view(query, query_view), view(item, product_view)
    for side, mine in (("item", item), ("query", query)):
        found = attribute_side(encoder, query, item, side)
        assert (
            adds_up(found)
            and len(found.words) == len((mine.text or "").split())
            and (found.patches is not None) == (mine.image is not None)
        )


def test_lora_is_explained_and_left_alone():
    "LoRA weights take part in the score; they are merged in a copy."
    encoder, (query, item) = tiny(), pair(3)
    plain = attribute_side(encoder, query, item)
    encoder.add_lora(4, 8)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    encoder.eval()
    found, inputs = attribute_side(encoder, query, item), attribution_inputs(encoder, item, query)
    vectors = encoder.encode([query, item])
    assert (
        inputs.ends[0] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-4)
        and np.abs(found.values - plain.values).max() > 1e-3
    )
    assert adds_up(found, inputs.rise) and encoder.lora


def test_explaining_changes_nothing():
    "Same weights, same modes, no hooks, no gradients; also when it fails half-way."
    encoder, (query, item) = tiny(), pair()
    encoder.train()
    before, vectors = encoder.fingerprint, encoder.encode([query, item])
    broken = Item(
        "red", ImageRef("broken", lambda: (_ for _ in ()).throw(LabError("cannot be read", where="shelf"))), "p1"
    )
    with pytest.raises(LabError, match="cannot be read"):
        attribute_side(encoder, query, broken)
    attribute_side(encoder, query, item)
    assert encoder.training and encoder.fingerprint == before and (encoder.encode([query, item]) == vectors).all()
    assert all(weight.grad is None for weight in encoder.parameters()) and not any(
        module._forward_hooks for module in encoder.modules()
    )


def test_damaged_weights_are_named():
    "NaN weights give an error with advice, not a picture of nothing."
    encoder, (query, item) = tiny(), pair()
    with torch.no_grad():
        encoder.backbone.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(LabError, match="not a number.*earlier checkpoint"):
        attribute_side(encoder, query, item)


@pytest.mark.parametrize(
    "text", ["😀 👟 😀", "x" * 300, "赤い 靴", "a", "  red\n\nshoe\t", "https://shop.example/a?b=1,2;3"]
)
def test_odd_titles(text):
    "Emoji, one endless word, other scripts, blanks: every word has its place, and the sum holds."
    encoder, (query, _) = tiny(), pair()
    found = attribute_side(encoder, query, Item(text, None))
    assert len(found.words) == len(text.split()) and adds_up(found)


def test_the_report_draws_a_map():
    """A side has all that a page without scripts asks for; the picture is the padded one, so that cells lie where they
    belong.
    """
    query, item = pair()
    wide = Item("a long scarf", ImageRef.from_pil(Image.new("RGB", (300, 100), "#7a3b2e")), "wide")
    for product in (item, view(item, "t"), view(item, "i"), wide):
        maps = Explainer(tiny(), query, product, trials=3).maps(["ig"])
        shown = side_html(maps.item, "ig")
        assert ("cells coloured" in shown) == (product.image is not None) and ("Numbers" in shown) == bool(product.text)
        assert ("Faithfulness" in shown) == bool(product.text)
    image, patches = maps.item.image, maps.item.maps["ig"].patches
    assert image.size[0] == image.size[1] and image.getpixel((5, 5)) == (255, 255, 255)
    assert np.abs(patches[[0, 3]]).max() < 0.2 * np.abs(patches[[1, 2]]).max(), "the padding gets nothing"


@pytest.mark.slow
def test_mini():
    "The pretrained backbone: sub-words become words, and the sum holds."
    with pytest.MonkeyPatch.context() as patch:
        encoder = perturb_experts(pretrained(patch, num_layers=2), 0.02).eval()
    query, item = pair(5)
    long = Item(f"Levi's 501® slim-fit {item.text} (pack of 3)", item.image)
    for side in ("item", "query"):
        found = attribute_side(encoder, query, long, side)
        assert adds_up(found) and len(found.words) == len((long if side == "item" else query).text.split())
