"""The cross map: exact for every kind of backbone, every grid, several pictures, both poolings; its margins are the
method `cross`; and what the widget sends is what was calculated.
"""

import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch
from families import FEW_FAMILIES, ITEMS, encoder_of, keep_exact

from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, UsageError
from moon2_lab.explain.attention import word_attention
from moon2_lab.explain.attribution import attribute_side
from moon2_lab.explain.cross_map import cross_map
from moon2_lab.explain.expert_routing import token_routing
from moon2_lab.explain.explainer import Explainer
from moon2_lab.explain.heatmap_data import pair_payload
from moon2_lab.explain.side_tokens import side_tokens
from moon2_lab.model.backbone import Backbone
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

QUERY, PRODUCT = ITEMS[1], ITEMS[0]


def read_back(pair):
    "The last layer of the cross map that travels to the browser."
    payload, data = pair_payload(pair)
    block = payload["cross"]
    layers, rows, columns = block["shape"]
    values = np.frombuffer(data[block["at"] : block["at"] + 2 * layers * rows * columns], "<i2")
    return values.reshape(block["shape"])[-1] * block["scales"][-1] / 32767, block


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_the_sum_is_the_score_for_every_kind_of_model(name):
    "Text against both, both against both, a picture alone; and a title with two pictures as training reads it."
    encoder = encoder_of(name, perturbed=True)
    layers = len(encoder.backbone.decoder.layers)
    for query, item in ((QUERY, PRODUCT), (ITEMS[3], PRODUCT), (ITEMS[2], ITEMS[3])):
        cross = cross_map(encoder, query, item)
        vectors = encoder.encode([query, item])
        assert cross.score == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
        assert cross.total() == pytest.approx(cross.score, abs=1e-6)
        assert len(cross.layer_names) == len(cross.values) == layers
        for side, read in (("query", query), ("item", item)):
            found = attribute_side(encoder, query, item, side, "cross")
            assert np.allclose(found.values, cross.part(side), atol=1e-6)
            tokens = side_tokens(encoder, read)
            assert len(cross.part(side)) == tokens.cells + len(tokens.words)
    augmented = cross_map(encoder, QUERY, ITEMS[4], augmented=True)
    assert augmented.total() == pytest.approx(augmented.score, abs=1e-6)
    views = encoder.eval().forward_items([QUERY, ITEMS[4]], ("mm",)).embedding["mm"]
    assert augmented.score == pytest.approx(float((views[0] @ views[1]).detach()), abs=1e-6)
    assert augmented.values.shape[2] > cross_map(encoder, QUERY, ITEMS[4]).values.shape[2]


@pytest.mark.parametrize("pooling", ["tokens", "modalities"])
@pytest.mark.parametrize("experts", ["full", "lowrank"])
def test_both_poolings_and_kinds_of_experts(pooling, experts):
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=3, pooling=pooling, experts=experts)
    encoder = perturb_experts(encoder, 0.1).eval()
    keep_exact(encoder.backbone)
    cross = cross_map(encoder, ITEMS[3], PRODUCT)
    assert cross.total() == pytest.approx(cross.score, abs=1e-6)
    weights = side_tokens(encoder, PRODUCT).weights
    assert np.allclose(cross.weights[1].sum(), 1) and np.allclose(cross.weights[1][:16], weights[:16])
    assert np.allclose(weights[:16].sum(), 0.5 if pooling == "modalities" else 16 / 19)
    assert np.allclose(cross.even().sum(), cross.total())


def test_lora_counts():
    "What LoRA learned is in the states, merged or not."
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=2)
    plain = cross_map(encoder.eval(), ITEMS[3], PRODUCT)
    encoder.add_lora(4, 8)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    cross = cross_map(encoder.eval(), ITEMS[3], PRODUCT)
    vectors = encoder.encode([ITEMS[3], PRODUCT])
    assert cross.total() == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-6)
    assert not np.allclose(cross.values, plain.values, atol=1e-3)


def test_a_search_in_another_thread_is_not_recorded():
    "The hooks sit on a copy."
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=3), 0.1).eval()
    wanted, wrong, stop = cross_map(encoder, ITEMS[3], PRODUCT), [], threading.Event()

    def search():
        while not stop.is_set():
            encoder.encode([ITEMS[0], ITEMS[1], ITEMS[2]])

    thread = threading.Thread(target=search)
    thread.start()
    try:
        for _ in range(10):
            found = cross_map(encoder, ITEMS[3], PRODUCT)
            wrong += [] if np.allclose(found.values, wanted.values, atol=1e-6) else [found]
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_an_explainer_has_it_and_sends_it():
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2), 0.1).eval()
    pair = Explainer(encoder, ITEMS[3], PRODUCT, trials=0).maps()
    assert pair.first_method == "cross" and pair.cross.total() == pytest.approx(pair.score, abs=1e-6)
    sent, block = read_back(pair)
    assert np.abs(sent - pair.cross.values[-1]).max() <= np.abs(pair.cross.values[-1]).max() / 32000
    assert block["sums"][-1] == pytest.approx(pair.score, abs=1e-6) and block["score"] == pair.score
    assert pair.item.first == 0 and set(pair.item.even) == {"pooled", "links", "word_links"}
    assert pair.cross_table().to_numpy().sum() == pytest.approx(100 * pair.score, abs=1e-4)


@pytest.fixture
def passes(monkeypatch):
    "Counts the passes through the decoder: (tokens,) of each."
    seen, own = [], Backbone.decode

    def decode(backbone, tokens, packing, **more):
        seen.append(len(tokens))
        return own(backbone, tokens, packing, **more)

    monkeypatch.setattr(Backbone, "decode", decode)
    return seen


def test_one_pass_opens_a_pair(passes):
    "Also with the maps that the widget opens with; every further map has passes of its own."
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2), 0.1).eval()
    tokens = sum(len(side_tokens(encoder, item)) for item in (ITEMS[3], PRODUCT))
    explainer = Explainer(encoder, ITEMS[3], PRODUCT, trials=0)
    explainer.maps(explainer.first_methods)
    assert passes == [tokens] and explainer.first_methods == ["cross", "attention"]
    cross_map(encoder, ITEMS[3], PRODUCT)
    assert passes == [tokens] * 2
    explainer.map("item", "attention", layer=1)
    assert len(passes) > 2


def test_vectors_in_bfloat16_need_a_second_pass(passes):
    "The score is made in bfloat16, what explains it in float32, as ever."
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=2, experts="lowrank", weights_dtype="bfloat16").eval()
    pair = Explainer(encoder, ITEMS[3], PRODUCT, trials=0).maps(["cross", "attention"])
    assert len(passes) == 2
    assert np.array_equal(pair.cross.values, cross_map(encoder, ITEMS[3], PRODUCT).values)
    one, other = encoder.encode([ITEMS[3], PRODUCT])
    assert pair.score == pytest.approx(float(one @ other), abs=1e-6)


@pytest.mark.parametrize("name", ["tiny", *FEW_FAMILIES])
def test_the_recorded_pass_shows_what_each_explanation_shows(name):
    "Attention, routing, cross map and both maps, each with passes of its own."
    make = lambda: perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2), 0.1).eval()
    encoder = make() if name == "tiny" else encoder_of(name, perturbed=True)
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-6)
    for query, item in ((QUERY, PRODUCT), (ITEMS[3], ITEMS[2])):
        explainer = Explainer(encoder, query, item, trials=0)
        pair = explainer.maps(explainer.first_methods)
        same(pair.cross.values, cross_map(encoder, query, item).values)
        for side, asked in ((pair.query, query), (pair.item, item)):
            routing = token_routing(encoder, asked)
            same(side.experts, routing.experts)
            for method in explainer.first_methods:
                alone = attribute_side(encoder, query, item, side.side, method)
                same(side.maps[method].values, alone.values)
                assert (side.maps[method].note, side.maps[method].settings) == (alone.note, alone.settings)
            if "attention" in explainer.methods:
                attention = word_attention(encoder, asked)
                for part in ("links", "word_links", "pooled"):
                    one, other = getattr(side, part), getattr(attention, part)
                    assert (one is None) == (other is None)
                    same(0 if one is None else one, 0 if other is None else other)


def test_choices_of_an_explainer_hold_for_recorded_maps():
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2), 0.1).eval()
    found = Explainer(encoder, ITEMS[3], PRODUCT, trials=0, layer=1).map("item", "attention")
    of_layer = attribute_side(encoder, ITEMS[3], PRODUCT, method="attention", layer=1)
    assert np.array_equal(found.values, of_layer.values)
    for wrong in ({"routing": "loose"}, {"baseline": "mean"}, {"steps": 1}, {"pace": 2}):
        explainer = Explainer(encoder, ITEMS[3], PRODUCT, trials=0, **wrong)
        with pytest.raises(UsageError):
            explainer.map("item", "cross")


def test_even_attention_is_what_a_blank_head_would_do():
    "Causal: the token at place p looks at p + 1; a word of several pieces is their mean."
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=2, pooling="tokens").eval()
    item = Item("red mug", PRODUCT.image, "p")
    side = Explainer(encoder, item, item, trials=0).pair.item
    pieces = side_tokens(encoder, item)
    table, first = pieces.word_table(), pieces.patches
    rows = np.tril(np.ones((len(pieces), len(pieces))))
    rows /= rows.sum(1, keepdims=True)
    merged = np.concatenate([rows[:, :first], rows[:, first:] @ table.T], 1)
    of_words = (table / table.sum(1, keepdims=True)) @ merged[first:]
    assert np.allclose(side.even["pooled"], merged.mean(0), atol=1e-6)
    assert np.allclose(side.even["links"], of_words[:, :first], atol=1e-6)
    assert np.allclose(side.even["word_links"], of_words[:, first:], atol=1e-6)
    assert np.allclose(side.word_links.sum(-1) + side.links.sum(-1), 1, atol=1e-5)


def test_what_cannot_be_read_is_refused():
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=2).eval()
    with pytest.raises(DataError, match="p7"):
        cross_map(encoder, Item(" ", None, "p7"), PRODUCT)
    pair = Explainer(encoder, ITEMS[1], PRODUCT, trials=0).pair
    holes = dataclasses.replace(pair.cross, values=pair.cross.values * np.inf)
    with pytest.raises(DataError, match="NaN or infinite"):
        pair_payload(dataclasses.replace(pair, cross=holes))
