"""Every kind of multimodal model as backbone, on small ones with random weights: at step 0 the views are those of the
stock model's own forward pass over ids and pixels; one pass gives what three give; what is left out is found.
"""
import dataclasses
from functools import cache, partial

import pytest
import torch
from choosing import few
from comparing import assert_same, distance, measured
from families import (
    DENSE, FEW_FAMILIES, ITEMS, SPARSE, encoder_of, exact_softmax, folder_of, gaps, make_exact, pictures_of, stock,
)
from moon2_lab.config import VIEWS
from moon2_lab.model import packing
from moon2_lab.model.item_views import ItemViews, LayerGates
from moon2_lab.model.native_experts import NativeExperts
from moon2_lab.tiny_models import TINY_FAMILIES
from small import augmented_shop, shop, some_triplets
from torch.nn import functional as F
from transformers import AutoModel

pytestmark = pytest.mark.usefixtures("own_cache")
EXACT = 1e-12  # float64; the largest seen is 3e-14
CLOSE = 1e-4  # float32, in units of the root mean square; the largest seen is 2e-5


@cache
def dense(name, double):
    "The model as it is, without experts: the reference. Not to be changed."
    backbone = encoder_of(name, num_experts=0, experts="full").backbone
    return make_exact(backbone.double()) if double else backbone


# ---------------------------------------------------------------------------------------------- step 0


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_the_reference_is_the_model_of_transformers(name):
    "What the comparisons call stock is what the folder gives, loaded by transformers alone and never changed here."
    backbone, calls = dense(name, True), []
    row, item = encoder_of(name, num_experts=0, experts="full").rows_of(ITEMS[4:], share=False)[0], ITEMS[4]
    assert len(row.pictures) == 2
    watch = backbone.vision.base.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    found = stock(backbone, row, pictures_of(item, row))
    watch.remove()
    model = AutoModel.from_pretrained(folder_of(name), dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad(), exact_softmax():
        right = make_exact(model.eval().double())(**calls[0]).last_hidden_state[0]
    assert "pixel_values" in calls[0] and len(found) == len(row) and distance(found, right) < EXACT


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_step_0_equals_the_stock_forward(name):
    """Full experts (or the model's own): three views of items with a picture, without, with two, with two texts, with
    rows longer than a sliding window.
    """
    found = gaps(encoder_of(name), dense(name, False))
    assert len(found) == 3 + 2 + 2 + 3 + 3 and max(found.values()) < CLOSE, found


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_step_0_equals_the_stock_forward_in_float64(name):
    found = gaps(encoder_of(name, double=True), dense(name, True))
    assert len(found) == 3 + 2 + 2 + 3 + 3 and max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", few(DENSE, "qwen3_vl"))
def test_step_0_with_low_rank_experts(name):
    encoder = encoder_of(name, double=True, experts="lowrank", expert_rank=2)
    found = gaps(encoder, dense(name, True))
    assert len(encoder.moe_blocks) == 4 and max(found.values()) < EXACT, found


@pytest.mark.parametrize("name", SPARSE)
def test_the_experts_of_a_sparse_model_are_taken_over(name):
    encoder = encoder_of(name)
    assert all(isinstance(block, NativeExperts) for block in encoder.moe_blocks) and len(encoder.moe_blocks) == 4
    assert encoder.alignment.shape[0] == encoder.config.num_experts == 4


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_what_is_compared_depends_on_the_experts(name):
    "The control of step 0: with experts pushed apart every view moves."
    assert min(gaps(encoder_of(name, perturbed=True), dense(name, False)).values()) > 0.01


# ---------------------------------------------------------------------------------------------- controls that fail


def on_one_axis(backbone, patch):
    "Pictures placed as text is."
    def flat(size):
        return torch.arange(size.tokens).expand(3, -1).numpy()

    patch.setattr(backbone, "picture_positions", flat)


def vectors_alone(backbone, patch):
    "What stands behind the word's or patch's own vector is not given: levels of DeepStack, inputs of each layer."
    own, width = backbone.decode, backbone.width

    def plain(tokens, packing):
        return own(torch.cat([tokens[:, :width], torch.zeros_like(tokens[:, width:])], 1), packing)

    patch.setattr(backbone, "decode", plain)


def no_blocks(backbone, patch):
    "A patch sees only what stands before it."
    patch.setattr(backbone, "placing", dataclasses.replace(backbone.placing, blocks="none"))


def state_runs_on(backbone, patch):
    "Linear attention goes over the packed sequence as one row."
    for layer in backbone.decoder.layers:
        for part in layer.children():
            if isinstance(part, packing._RowWise):
                part.__class__ = type(part).__mro__[2]


def no_window(backbone, patch):
    own = packing.Packing.mask
    patch.setattr(packing.Packing, "mask", lambda self, group, window=None: own(self, group))


def no_softcap(backbone, patch):
    own = packing._capped_attention
    patch.setattr(packing, "_capped_attention", lambda *given: own(*given[:-1], 1e9))


QWENS = tuple(name for name in TINY_FAMILIES if name.startswith("qwen"))
CONTROLS = [
    (on_one_axis, (*QWENS, "glm4v"), "i"), (vectors_alone, ("qwen3_vl", "qwen3_vl_moe"), "i"),
    (vectors_alone, ("gemma4",), "t"), (no_blocks, ("gemma3", "gemma4", "paligemma", "paligemma2"), "i"),
    (state_runs_on, ("qwen3_5", "qwen3_5_moe"), "t"), (no_softcap, ("paligemma2",), "t"),
    (no_window, ("gemma3", "gemma4", "paligemma2", "mistral3_window10"), "mm"),
]


SPOILT = [(spoil, name, view) for spoil, names, view in CONTROLS for name in names]
FEW_SPOILT = [(spoil, name, view) for spoil, name, view in SPOILT if (spoil, name) in {
    (on_one_axis, "qwen3_vl"), (vectors_alone, "qwen3_vl"), (vectors_alone, "gemma4"), (no_blocks, "gemma3"),
    (state_runs_on, "qwen3_5_moe"), (no_softcap, "paligemma2"), (no_window, "gemma3"),
}]


@pytest.mark.parametrize(
    "spoil, name, view",
    [case if case in FEW_SPOILT else pytest.param(*case, marks=pytest.mark.slow) for case in SPOILT],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_left_out_is_found(spoil, name, view, monkeypatch):
    "The cases that must fail, each beside the same encoder as it is."
    encoder = encoder_of(name)
    assert max(gaps(encoder, dense(name, False)).values()) < CLOSE
    spoil(encoder.backbone, monkeypatch)
    found = gaps(encoder, dense(name, False))
    assert max(gap for (_, seen), gap in found.items() if seen == view) > 0.1, found
    if view == "i":
        assert max(gap for (_, seen), gap in found.items() if seen == "t") < CLOSE  # text alone is not concerned


@pytest.mark.slow
def test_each_peculiarity_has_its_control(monkeypatch):
    "A family whose line or decoder says something special stands in a control."
    named, own = {spoil: names for spoil, names, _ in CONTROLS}, packing.packed_attention
    asked, name = {"sliding_window": set(), "softcap": set()}, ""

    def noting(*given, **more):
        for argument, names in asked.items():
            names |= {name} if more.get(argument) is not None else set()
        return own(*given, **more)

    monkeypatch.setattr(packing, "packed_attention", noting)  # loading a model registers it
    try:
        for name in TINY_FAMILIES:
            encoder = encoder_of(name)
            backbone = encoder.backbone
            encoder.forward_items(ITEMS)
            mixers = [isinstance(part, packing._RowWise) for part in backbone.decoder.modules()]
            assert (backbone.placing.axes == 3) == (name in named[on_one_axis]), name
            assert (backbone.placing.blocks != "none") == (name in named[no_blocks]), name
            assert any(mixers) == (name in named[state_runs_on]), name
            assert bool(backbone.levels or backbone.per_layer) == (name in ("qwen3_vl", "qwen3_vl_moe", "gemma4")), name
    finally:
        monkeypatch.undo()
        packing.register_packed_attention()
    assert asked["sliding_window"] == set(named[no_window]) and asked["softcap"] == set(named[no_softcap])


# ---------------------------------------------------------------------------------------------- one pass equals three


def apart(encoder, items):
    """Each view of each item by a forward pass of the stock model over ids and pixels, with our experts in its decoder:
    nothing packed, nothing shared, nothing cached.
    """
    blocks, found = encoder.moe_blocks, ItemViews({}, {}, {})
    gates, selected = [[] for _ in blocks], [[] for _ in blocks]
    width, experts, tape = encoder.embedding_dim, encoder.config.num_experts, []
    for block in blocks:
        block.tape = tape
    for view in VIEWS:
        vectors, routings, present = [], [], []
        for item in items:
            rows = encoder.rows_of([item], (view,), share=False)
            present.append(bool(rows))
            if not rows:
                vectors.append(encoder.alignment.new_zeros(width))
                routings.append(encoder.alignment.new_zeros(experts))
                continue
            tape.clear()
            hidden = stock(encoder.backbone, rows[0], pictures_of(item, rows[0]), gradients=True)
            places = [place for span in rows[0].serves[view] for place in range(span.start, span.stop)]
            spans = [rows[0].patches, [rows[0].words]] if view == "mm" else [rows[0].serves[view]]
            halves = [torch.cat([hidden[span] for span in some]) for some in spans if some]
            halves = [part.mean(0) for part in halves if len(part)]  # pooling=modalities
            vectors.append(F.normalize(sum(halves) / len(halves), dim=0))
            routings.append(torch.stack([layer.spread()[places].mean(0) for layer in tape]).mean(0))
            for place, layer in enumerate(tape):  # frame tokens serve no view: no load of theirs is balanced
                gates[place].append(layer.gates[places])
                selected[place].append(layer.selected[places])
        found.embedding[view], found.routing[view] = torch.stack(vectors), torch.stack(routings)
        found.present[view] = torch.tensor(present)
    for block in blocks:
        block.tape = None
    found.layers = [
        LayerGates(torch.cat(g), torch.cat(s), torch.ones(sum(map(len, g)), dtype=g[0].dtype))
        for g, s in zip(gates, selected)
    ]
    return found


def triplets_of(kind):
    "mixed: some without picture or title; augmented: with enriched titles and several pictures."
    return some_triplets(shop(60, mixed=True) if kind == "mixed" else augmented_shop(), count=2, negatives=1)


def assert_one_pass_equals_three(encoder, kind="augmented", **config):
    "Gradients within 1e-9 of the largest; 1e-6 where linear attention calculates in float32, whatever it is given."
    triplets, eps = triplets_of(kind), 1e-6 if "qwen3_5" in encoder.config.backbone else 1e-9
    shared = measured(encoder, triplets, encoder.forward_items, **config)
    assert_same(shared, measured(encoder, triplets, partial(encoder.forward_items, share=False), **config), 1e-9, eps)
    assert_same(shared, measured(encoder, triplets, partial(apart, encoder), **config), 1e-9, eps)
    assert {"inter_i", "inter_t"} <= shared[1].keys()
    return shared


@pytest.mark.parametrize("name", few(TINY_FAMILIES, "qwen3_vl", "qwen3_5_moe"))
def test_one_pass_equals_three_stock_forwards(name):
    "Experts, routers and W* pushed apart; embeddings, routing, all terms, all gradients, in float64."
    shared = assert_one_pass_equals_three(encoder_of(name, perturbed=True, double=True))
    assert all(f"layers.{layer}." in " ".join(shared[2]) for layer in range(4))
    assert not any("vision" in grad for grad in shared[2])  # the vision side is frozen


@pytest.mark.parametrize("kind", few(("qwen3_vl", "gemma3", "paligemma", "qwen3_5_moe"), "gemma3"))
def test_one_pass_of_items_that_lack_a_view(kind):
    assert_one_pass_equals_three(encoder_of(kind, perturbed=True, double=True), "mixed")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_one_pass_with_other_settings(name):
    "Items that lack a view, other weightings, low-rank experts, some layers dense, one expert a token."
    how = {"omega_mode": "floored", "omega_routing": "shared"}
    assert_one_pass_equals_three(encoder_of(name, perturbed=True, double=True), "mixed", **how)
    if name in DENSE:
        fields = {"experts": "lowrank", "expert_rank": 2, "moe_layers": "half"}
        assert_one_pass_equals_three(encoder_of(name, perturbed=True, double=True, **fields))
        assert_one_pass_equals_three(encoder_of(name, perturbed=True, double=True, top_k=1, moe_layers="last:2"))


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_neighbours_do_not_move_an_embedding(name):
    "Alone, in any order, in a batch: the same vectors and the same routing."
    encoder = encoder_of(name, perturbed=True, double=True)
    with torch.no_grad():
        together, turned = encoder.forward_items(ITEMS), encoder.forward_items(ITEMS[::-1])
        assert together.tokens == len(together.layers[0].gates)  # nothing is computed for padding
        for place, item in enumerate(ITEMS):
            alone = encoder.forward_items([item])
            for view in VIEWS:
                assert distance(alone.embedding[view][0], together.embedding[view][place]) < EXACT
                assert distance(alone.routing[view][0], together.routing[view][place]) < EXACT
                assert distance(alone.embedding[view][0], turned.embedding[view][len(ITEMS) - 1 - place]) < EXACT


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_frame_tokens_are_in_no_mean(name):
    "Of each row exactly patches and words count; the views of one row do not share more than patches."
    encoder = encoder_of(name)
    frame, tokens = encoder.backbone.frame, encoder.backbone.vision.picture_size.tokens
    for row in encoder.rows_of(ITEMS):
        spans = {view: [place for s in found for place in range(s.start, s.stop)] for view, found in row.serves.items()}
        outside = len(frame.start) + len(row.pictures) * (len(frame.before) + len(frame.after))
        most = max(len(places) for places in spans.values())
        assert most == len(row) - outside == len(row.pictures) * tokens + len(row.ids)
        assert all(len(set(places)) == len(places) for places in spans.values())
