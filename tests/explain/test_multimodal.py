"""Explanations on multimodal models of transformers: rows with frames, pictures whose patches see each other, windows,
soft caps, layers without attention, pictures that are no grid. Small models of random weights, in float32.
"""

import functools
import os
import re
import tempfile

import numpy as np
import pytest
import torch
from choosing import few
from moon2_lab.config import EncoderConfig
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import LabError
from moon2_lab.explain import attention_recorder
from moon2_lab.explain.attention import _probe_attention, attention_gradient, attention_of, rollout, word_attention
from moon2_lab.explain.attention_recorder import attention_layers, other_layers
from moon2_lab.explain.attribution import METHODS, attribute_side, fitting_methods
from moon2_lab.explain.content_focus import focus_table
from moon2_lab.explain.expert_routing import token_routing
from moon2_lab.explain.explainer import Explainer
from moon2_lab.explain.faithfulness import redrawn_copy
from moon2_lab.explain.pair_score import fix_experts, frozen_copy, score_function
from moon2_lab.explain.side_tokens import side_tokens
from moon2_lab.model.certify import stock_hidden
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.model.hf_backbone import hf_backbone
from moon2_lab.tiny_models import TINY_FAMILIES, pictures, tiny_model

os.environ["MOON2_CACHE"] = tempfile.mkdtemp(prefix="moon2-multimodal-")
torch.set_num_threads(1)
SIZES = {"qwen2_vl": 112, "qwen2_5_vl": 112, "glm4v": 112}  # pixels; the other Qwens 128, others 64
SIZES |= dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), 128)
GRIDS = {"qwen3_vl": (4, 4), "gemma3": (4, 4), "paligemma": (4, 4), "paligemma2": (4, 4), "smolvlm": (4, 4)}
KINDS = (*GRIDS, "mistral3_window10", "internvl")
FEW = few(KINDS, "qwen3_vl", "internvl")
ALL = few(TINY_FAMILIES, "qwen3_vl", "gemma3", "paligemma2")


@functools.cache
def encoder_of(family, **fields):
    folder = tiny_model(family, tempfile.mkdtemp())
    size = {"num_layers": 0, "image_size": SIZES.get(family, 64), "num_experts": 4, "top_k": 2}
    size |= {"experts": "native"} if family.endswith("_moe") else {}
    return perturb_experts(Moon2Encoder.from_backbone(str(folder), **size | fields), 0.05).eval()


def pair(words="small red box no 4"):
    first, second = (ImageRef.from_pil(picture) for picture in pictures(2, seed=3))
    return Item("red ball", second, "query"), Item(words, first, "item")


@pytest.fixture
def exact_features(monkeypatch):
    "Picture vectors as the model makes them, instead of 16-bit ones from the cache."

    def apply(encoder):
        backbone = encoder.backbone
        exact = lambda refs: backbone.vision([ref.load() for ref in refs])[0].numpy()
        monkeypatch.setattr(backbone, "vision_features", exact, raising=False)
        return encoder

    return apply


def stock_rows(encoder, item, view):
    "(layers, heads, T, T) attention of the stock model, eager, over ids and pixels."
    backbone, side, kept = encoder.backbone, side_tokens(encoder, item, view), {}

    def keep(module, args, output):
        kept[module.layer_idx] = output[1]

    hooks = [layer.register_forward_hook(keep) for layer in attention_layers(backbone.decoder).values()]
    try:
        stock_hidden(backbone, side.row, [item.image.load()] if side.patches else [])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat([kept[number] for number in sorted(kept)]).numpy(), side


@pytest.mark.parametrize("family", ALL)
def test_rows_are_those_of_the_stock_model_inside_pictures_too(family, exact_features):
    encoder, (_, item) = exact_features(encoder_of(family)), pair()
    for view in ("mm", "i", "t"):
        stock, side = stock_rows(encoder, item, view)
        found = attention_of(encoder, item, view, rows="each")
        assert found.weights.shape[-2:] == (len(side), len(side))
        mine = stock[:, :, side.places][..., side.places]
        np.testing.assert_allclose(found.weights, mine, atol=2e-5)
        pooled = attention_of(encoder, item, view).weights[:, :, 0]
        halves = [part.mean(2) for part in np.split(mine, [side.patches], axis=2) if part.shape[2]]
        np.testing.assert_allclose(pooled, sum(halves) / len(halves), atol=2e-5)  # pooling=modalities
        assert (len(side.row) == len(side)) == np.allclose(pooled.sum(-1), 1, atol=1e-5)
    if family in ("gemma3", "paligemma", "paligemma2"):  # patches see the patches behind them
        assert np.triu(attention_of(encoder, item, rows="each").weights[-1, 0], 1).max() > 0.01


@pytest.mark.parametrize("family", ["gemma3", "paligemma", "paligemma2"])
def test_a_mask_without_blocks_is_refused_and_gives_other_rows(family, monkeypatch):
    "The control of the test above: what is recomputed without the blocks differs, and the recorder notices."
    encoder, (_, item) = encoder_of(family), pair()
    true = attention_of(encoder, item, rows="each").weights
    packed = attention_recorder._packed_mask
    without = lambda packing, row, window: None if (mask := packed(packing, row, window)) is None else mask.tril()
    monkeypatch.setattr(attention_recorder, "_packed_mask", without)
    with pytest.raises(LabError, match="no map is better than a wrong one"):
        attention_of(encoder, item, rows="each")
    monkeypatch.setattr(attention_recorder, "_require_same", lambda *args: None)
    assert np.abs(attention_of(encoder, item, rows="each").weights - true).max() > 0.01


def test_windows_and_soft_caps_are_refused_where_they_are_left_out(monkeypatch):
    for family, change in (
        ("mistral3_window10", lambda packed: lambda packing, row, window: packed(packing, row, None)),
        ("gemma3", lambda packed: lambda packing, row, window: packed(packing, row, None)),
    ):
        encoder, (_, item) = encoder_of(family), pair("small red box no 4 " * 6)
        attention_of(encoder, item)
        with monkeypatch.context() as patch:
            patch.setattr(attention_recorder, "_packed_mask", change(attention_recorder._packed_mask))
            with pytest.raises(LabError, match="recomputed attention"):
                attention_of(encoder, item)
    encoder, (_, item) = encoder_of("paligemma2"), pair()
    plain = attention_recorder.HeadInputs
    with monkeypatch.context() as patch:
        patch.setattr(attention_recorder, "HeadInputs", lambda *args: plain(*args[:-1]))
        with pytest.raises(LabError, match="recomputed attention"):
            attention_of(encoder, item)


@pytest.mark.parametrize("family", ALL)
def test_the_score_is_that_of_the_embeddings_and_its_parts_add_up(family):
    encoder, (query, item) = encoder_of(family), pair()
    vectors = encoder.encode([query, item])
    for mine, other in ((item, query), (query, item), (Item(None, item.image), query), (Item("red box", None), item)):
        score, real, blank = score_function(encoder, mine, other)
        with torch.no_grad():
            wanted = float(encoder.encode([mine])[0] @ encoder.encode([other])[0])
            assert float(score(*real)) == pytest.approx(wanted, abs=2e-6)
            fix_experts(score, real)
            assert float(score(*real)) == pytest.approx(wanted, abs=2e-6)
            both = score(*(torch.cat([a, b]) for a, b in zip(real, blank, strict=True)))
            assert float(both[0]) == pytest.approx(wanted, abs=2e-6) and abs(float(both[0] - both[1])) > 1e-4
    for side in ("item", "query"):
        # a score through GatedDeltaNet of random weights runs up and down too often for 512 points
        for name in ("shapley",) if "qwen3_5" in family else ("ig", "shapley"):
            found = attribute_side(encoder, query, item, side, name, samples=2)
            assert abs(found.delta) <= 0.01 * abs(found.values.sum() - found.delta) + 1e-3, (name, found.note)
    shown = Explainer(encoder, query, item, trials=0).pair.score
    assert float(vectors[0] @ vectors[1]) == pytest.approx(shown, abs=1e-6)


@pytest.mark.parametrize("family", FEW)
def test_every_method_gives_each_patch_and_word_a_number(family):
    encoder, (query, item) = encoder_of(family), pair()
    assert fitting_methods(encoder) == list(METHODS)
    for name in METHODS:
        found = attribute_side(encoder, query, item, method=name, samples=2, steps=8, most_steps=16)
        assert found.words.shape == (5,) and found.patches.shape == GRIDS.get(family, (4, 4))
        assert np.isfinite(found.values).all() and np.abs(found.values).max() > 0
        framed = len(side_tokens(encoder, item).row) > len(found.values)
        assert ("went to the frame" in found.note) == (framed and not found.signed)
        if not found.signed:
            assert 0 < found.values.sum() < 1 - 1e-4 if framed else found.values.sum() == pytest.approx(1, abs=1e-4)
    by_word, routing = word_attention(encoder, item), token_routing(encoder, item)
    assert by_word.links.shape[2:] == (5, 16) and routing.experts.shape[1:] == (16 + 5, 4)
    np.testing.assert_allclose(routing.experts.sum(-1), 1, atol=1e-5)
    own = encoder.forward_items([item]).routing["mm"][0].detach().numpy()
    np.testing.assert_allclose(routing.weights.mean((0, 1)), own, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "paligemma2", "qwen3_vl"])
def test_attention_times_gradient_by_hand(family):
    "Blocks, windows, a soft cap and a frame: probes change no score, and the parts are those of autograd."
    encoder, (query, item) = encoder_of(family), pair()
    score, real, _ = score_function(encoder, item, query)
    plain = score(*real).item()
    probes, kept = _probe_attention(score.encoder.backbone.decoder), []
    hooks = [probe.register_forward_hook(lambda module, args, out: kept.append(out)) for probe in probes]
    value = score(*(part.clone().requires_grad_() for part in real))
    gradients = torch.autograd.grad(value.sum(), kept)
    for hook in hooks:
        hook.remove()
    assert value.item() == pytest.approx(plain, abs=1e-6)
    by_hand = sum((w * g)[0].mean((0, 1)) for w, g in zip(kept, gradients, strict=True))[score.side.places]
    found = np.concatenate(attention_gradient(score, real))
    np.testing.assert_allclose(found, by_hand.detach().numpy(), atol=1e-7)
    assert np.abs(found).max() > 1e-5


def test_layers_without_attention_are_passed_over_and_named():
    encoder, (query, item) = encoder_of("qwen3_5"), pair()
    assert other_layers(encoder.backbone.decoder) == [0, 1, 2]
    assert attention_of(encoder, item).layers == [3] and word_attention(encoder, item).layer_names == ["layer 3"]
    for name in ("attention", "rollout", "attention_gradient"):
        assert "without attention are passed over: 0, 1, 2." in attribute_side(encoder, query, item, method=name).note
    found = attribute_side(encoder, query, item, method="shapley", samples=2)
    assert abs(found.delta) < 1e-5 and "passed over" not in found.note
    assert rollout(encoder, item)[1].sum() < 1


def test_a_picture_that_is_no_grid_has_one_number():
    encoder, (query, item) = encoder_of("llava_onevision"), pair()
    side = side_tokens(encoder, item)
    assert side.whole and side.grid == (1, 1) and side.patches > 16
    for name in METHODS:
        found = attribute_side(encoder, query, item, method=name, samples=2, steps=8, most_steps=16)
        assert found.patches.shape == (1, 1) and len(found.words) == 5 and "one number, as a whole" in found.note
    maps = Explainer(encoder, query, item, trials=20).maps(["gradient", "attention"])
    assert maps.item.grid == (1, 1) and maps.item.links.shape[2:] == (5, 1)
    assert maps.item.faith["gradient"].features == 6
    rows = attention_of(encoder, item).weights[:, :, 0]
    np.testing.assert_allclose(maps.item.pooled[..., 0], rows[..., : side.patches].sum(-1), atol=1e-6)


def test_the_copy_that_is_explained_shares_weights_and_tower(monkeypatch):
    encoder, (query, item) = encoder_of("qwen3_vl"), pair()
    twin = frozen_copy(encoder)
    assert twin.backbone.vision is encoder.backbone.vision
    pointers = {name: weight.data_ptr() for name, weight in encoder.named_parameters()}
    assert {name: weight.data_ptr() for name, weight in twin.named_parameters()} == pointers
    redrawn = redrawn_copy(encoder)
    assert redrawn.backbone.vision is encoder.backbone.vision
    again = attribute_side(redrawn, query, item, method="gradient")
    assert not np.allclose(again.values, attribute_side(encoder, query, item, method="gradient").values)
    assert {name: weight.data_ptr() for name, weight in encoder.named_parameters()} == pointers


def test_a_grid_of_more_columns_than_rows(monkeypatch, tmp_path):
    "From an encoder whose 16 patches lie in 2 rows to maps, focus, routing, figures and the page."
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.model.token_rows import PictureSize
    from moon2_lab.model.vision import PatchColours
    from moon2_lab.reporting.heatmap_figures import pair_map_figure, pair_map_plot, static_png
    from moon2_lab.reporting.heatmap_page import write_heat_page
    from moon2_lab.reporting.routing_figures import expert_map_figure, routing_png
    from moon2_lab.reporting.routing_maps import routing_maps, routing_payload
    from small import product

    monkeypatch.setattr(PatchColours, "picture_size", property(lambda self: PictureSize(16, (2, 8))))
    encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2), 0.1).eval()
    query, item = pair()
    maps = Explainer(encoder, query, item, trials=20).maps(["gradient", "attention"])
    assert maps.item.grid == (2, 8) and maps.item.maps["gradient"].patches.shape == (2, 8)
    page = write_heat_page(maps, tmp_path).read_text()
    assert re.search(r'"grid":\s*\[\s*2,\s*8\s*\]', page)
    figure = pair_map_figure(maps, "gradient")
    assert np.shape(figure.data[0].z) == (2, 8) and figure.layout.yaxis.scaleratio == 4
    assert pair_map_plot(maps, "attention") is not None and static_png(maps)
    routing = routing_maps(token_routing(encoder, item))
    assert routing_payload(routing)[0]["side"]["grid"] == [2, 8] and routing_png(routing)
    drawn = expert_map_figure(routing)
    assert np.shape(drawn.data[0].z) == (2, 8) and drawn.layout.yaxis.scaleratio == 4
    table = focus_table(encoder, Catalog.from_products([product(1)]), split="all")
    assert table[(table.part == "cells") & (table.layer == "mean")].left_out.tolist() == [""]


@pytest.mark.parametrize(
    ("family", "experts", "pooling", "most_steps"),
    [
        ("smolvlm", "full", "tokens", 256),
        *(
            pytest.param(family, experts, pooling, most_steps, marks=pytest.mark.slow)
            for pooling, most_steps in (("tokens", 256), ("modalities", 511))
            for experts in ("full", "lowrank") for family in ("qwen3_vl", "smolvlm")
            if (family, experts, pooling) != ("smolvlm", "full", "tokens")
        ),
    ],
)
def test_weights_of_16_bits_are_explained_as_they_are(family, experts, pooling, most_steps):
    "No float32 copy; scores are float32, and the maps are those of the float32 model, nearly."
    folder, (query, item), found = tiny_model(family, tempfile.mkdtemp()), pair(), {}
    for dtype in (torch.float32, torch.bfloat16):
        size = {"num_layers": 0, "image_size": SIZES.get(family, 64), "num_experts": 4, "top_k": 2, "experts": experts}
        config = EncoderConfig(backbone=str(folder), pooling=pooling, **size)
        torch.manual_seed(0)
        encoder = Moon2Encoder._upcycled(hf_backbone(config, dtype=dtype), config)
        encoder = perturb_experts(encoder, 0.05).eval()
        score, real, _ = score_function(encoder, item, query)
        own = {name: weight.data_ptr() for name, weight in encoder.named_parameters()}
        assert {name: weight.data_ptr() for name, weight in score.encoder.named_parameters()} == own
        with torch.no_grad():
            value = score(*real)
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(float(np.dot(*encoder.encode([query, item]))), abs=0.02)
        found[dtype] = {name: attribute_side(encoder, query, item, method=name, samples=2) for name in METHODS}
    for name in METHODS:
        whole, coarse = (found[dtype][name] for dtype in (torch.float32, torch.bfloat16))
        assert np.corrcoef(whole.values, coarse.values)[0, 1] > 0.98, name
    gradients = found[torch.bfloat16]["ig"]
    assert "add up to" in gradients.note and gradients.settings["steps"] <= most_steps


def test_focus_leaves_the_frame_out():
    from small import product
    from moon2_lab.data.catalog import Catalog

    encoder = encoder_of("gemma3")
    table = focus_table(encoder, Catalog.from_products([product(1), product(5)]), split="all")
    known = table[table.left_out == ""]
    assert set(known.part) == {"words", "cells", "split"} and set(known.layer) == {"mean", "0", "1", "2", "3"}
    assert np.isfinite(known[["value", "even"]].to_numpy()).all()
    tiles = focus_table(encoder_of("llava_onevision"), Catalog.from_products([product(1)]), split="all")
    assert tiles[tiles.part == "cells"].left_out.tolist() == ["no grid of patches"]
