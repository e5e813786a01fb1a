"""One pass through the language model gives what a forward pass for each view gives: embeddings, routing, every loss
term, gradients.
"""
import copy
import dataclasses
import json
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from moon2_lab.config import OBJECTIVES, VIEWS
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, LabError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.model.feature_cache import FeatureCache
from moon2_lab.model.item_views import ItemViews, LayerGates
from moon2_lab.model.moe import KERNELS, LayerRouting, MoEFeedForward, mix_experts
from moon2_lab.model.packing import Packing
from moon2_lab.objective.objective_weights import load_balance_loss
from moon2_lab.training.collate import collate
from moon2_lab.training.optim import prepare_trainable
from comparing import assert_same, distance, measured
from small import augmented_shop, picture, pretrained, settings, shop, some_triplets, tiny
from torch.nn import functional as F

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def whole():
    return some_triplets(shop(60))


@pytest.fixture(scope="module")
def mixed():
    return some_triplets(shop(60, mixed=True))


# ---------------------------------------------------------------------------------------------- the reference


def halves(hidden, seen, pooling):
    "The mean of a view whose first `seen` tokens are of pictures."
    parts = [hidden] if pooling == "tokens" else [part for part in (hidden[:seen], hidden[seen:]) if len(part)]
    return sum(part.mean(0) for part in parts) / len(parts)


def apart(encoder, items):
    """Each view of each item by a forward of its own: one row at a time, with the attention of transformers, nothing
    packed, nothing shared.
    """
    decoder, blocks = encoder.backbone.decoder, encoder.moe_blocks
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")
    found, gates, selected, zero = (
        ItemViews({}, {}, {}), [[] for _ in blocks], [[] for _ in blocks], encoder.alignment.new_zeros,
    )
    try:
        for view in VIEWS:
            vectors, routings, present = [], [], []
            for item in items:
                parts = []
                for picture in item.pictures if view != "t" else ():
                    features = torch.from_numpy(encoder.backbone.vision_features([picture])).to(encoder.alignment)
                    parts.append(encoder.backbone.connector(features))
                for text in item.texts if view != "i" else ():
                    parts.append(decoder.embed_tokens(torch.tensor(encoder.backbone.tokenize(text)[0])))
                present.append(bool(parts) and not (view == "i" and item.image is None))
                if not present[-1]:
                    vectors.append(zero(encoder.embedding_dim))
                    routings.append(zero(max(encoder.config.num_experts, 1)))
                    continue
                tape = []
                for block in blocks:
                    block.tape = tape
                hidden = decoder(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state[0]
                seen = sum(map(len, parts[: len(item.pictures) if view != "t" else 0]))
                vectors.append(F.normalize(halves(hidden, seen, encoder.config.pooling), dim=0))
                routings.append(torch.stack([layer.spread().mean(0) for layer in tape]).mean(0))
                for place, layer in enumerate(tape):
                    gates[place].append(layer.gates)
                    selected[place].append(layer.selected)
            found.embedding[view], found.routing[view], found.present[view] = (
                torch.stack(vectors), torch.stack(routings), torch.tensor(present),
            )
    finally:
        decoder.set_attn_implementation(before)
        for block in blocks:
            block.tape = None
    found.layers = [
        LayerGates(torch.cat(g), torch.cat(s), torch.ones(sum(map(len, g)), dtype=g[0].dtype))
        for g, s in zip(gates, selected)
    ]
    return found


# ---------------------------------------------------------------------------------------------- one pass equals three


@pytest.mark.parametrize(
    "mode, routing", [("balanced", "per_view"), ("faithful", "per_view"), ("floored", "shared"), ("detached", "shared")]
)
def test_one_pass_equals_three_forwards_in_float64(whole, mode, routing):
    "Experts, routers and W* are pushed apart by noise: with copies of one expert it would pass whatever the routing."
    encoder = tiny(perturbed=True, double=True)
    measure = partial(measured, encoder, whole, omega_mode=mode, omega_routing=routing)
    shared, three, reference = (
        measure(encoder.forward_items), measure(partial(encoder.forward_items, share=False)),
        measure(partial(apart, encoder)),
    )
    assert set(OBJECTIVES) <= shared[1].keys() and (mode == "balanced") == ("balance" in shared[1])
    assert_same(shared, reference, 1e-9)
    assert_same(three, reference, 1e-9)
    assert (
        shared[0].tokens
        < three[0].tokens
        < sum(len(layer.gates) for layer in reference[0].layers) / len(reference[0].layers)
    )


@pytest.mark.parametrize("first", range(4))
def test_any_mix_of_missing_views(mixed, first):
    "Triplets whose query, positive or negatives lack the picture or the title."
    triplets = some_triplets(shop(60, mixed=True), count=5, negatives=1 + first % 2, first=first)
    items, _ = collate(triplets)
    assert {(bool(item.text), item.image is not None) for item in items} == {(True, True), (True, False), (False, True)}
    encoder = tiny(perturbed=True, double=True)
    assert_same(
        measured(encoder, triplets, encoder.forward_items), measured(encoder, triplets, partial(apart, encoder)), 1e-9
    )


@pytest.mark.parametrize("expanded", ["one", "all", "none"])
def test_augmented_products(expanded):
    """Enriched titles and several pictures: images first, then title, then enriched title; three of four products have
    them.
    """
    triplets = some_triplets(augmented_shop(), count=5)
    items, _ = collate(triplets, expanded=expanded)
    assert {len(item.pictures) for item in items} == {"one": {1, 2}, "all": {1, 2, 3}, "none": {1}}[expanded] and {
        len(item.texts) for item in items
    } == {1, 2}
    encoder = tiny(perturbed=True, double=True)
    shared, three = (
        measured(encoder, triplets, encoder.forward_items, expanded),
        measured(encoder, triplets, partial(apart, encoder), expanded),
    )
    assert_same(shared, three, 1e-9)
    lengths = [
        (4 * len(item.pictures), sum(len(encoder.backbone.tokenize(text)[0]) for text in item.texts))
        for item in {item.content: item for item in items}.values()
    ]
    assert shared[0].tokens == sum(
        image + 2 * text for image, text in lengths
    )  # (n_c + 1) V + 2 L for mm and i, 2 L for t


@pytest.mark.parametrize(
    "fields",
    [{"moe_layers": "1"}, {"top_k": 1}, {"num_experts": 6, "top_k": 3}, {"visual_tokens": 9, "max_text_tokens": 3}],
    ids=str,
)
def test_other_shapes(mixed, fields):
    "Some layers dense, one expert per token, more experts, many image tokens and short texts."
    encoder = tiny(perturbed=True, double=True, **fields)
    assert_same(
        measured(encoder, mixed, encoder.forward_items), measured(encoder, mixed, partial(apart, encoder)), 1e-9
    )


def test_with_lora_too(mixed):
    encoder = tiny(perturbed=True)
    prepare_trainable(encoder, settings(lora_r=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    encoder.double()
    shared, three = measured(encoder, mixed, encoder.forward_items), measured(encoder, mixed, partial(apart, encoder))
    assert_same(shared, three, 1e-9)
    assert any("lora_" in name and "mlp" in name for name in shared[2]) and any(
        "lora_" in name and "q_proj" in name for name in shared[2]
    )


def test_both_expert_kernels(whole):
    encoder = tiny(perturbed=True)
    loop = measured(encoder, whole, encoder.forward_items)
    encoder.set_expert_kernel("grouped")
    assert_same(measured(encoder, whole, encoder.forward_items), loop, 1e-5)


def token_ties(found):
    "(tokens at the boundary, tokens), over all MoE layers."
    near = torch.cat([LayerRouting(layer.gates, layer.selected, layer.selected).near_ties() for layer in found.layers])
    return int(near.sum()), len(near)


def float32_pair(encoder, triplets, capsys):
    "Both ways on triplets none of whose items has a near tie; prints the share of ties."
    items, keys = collate(triplets)
    with torch.no_grad():
        found = encoder.forward_items(items)
    ties, tokens = token_ties(found)
    near = found.near_tie.view(-1)
    with capsys.disabled():
        print(
            f"\nnear ties at the top-k boundary (gates closer than 1e-5): {ties} of {tokens} tokens "
            f"({ties / tokens:.3%}), {int(near.sum())} of {len(near)} samples",
            end=" ",
        )
    assert ties / tokens < 0.01
    bad = (
        near[: len(triplets)]
        | near[len(triplets) : 2 * len(triplets)]
        | near[2 * len(triplets) :].view(len(triplets), -1).any(1)
    )
    kept = [triplet for triplet, tied in zip(triplets, bad.tolist()) if not tied]
    assert len(kept) >= 2
    return measured(encoder, kept, encoder.forward_items), measured(encoder, kept, partial(apart, encoder))


def test_one_pass_equals_three_forwards_in_float32(capsys):
    "Within 1e-5 where no choice of experts hangs on rounding; gradients relative to the largest."
    encoder = tiny(perturbed=True)
    assert_same(*float32_pair(encoder, some_triplets(shop(60, mixed=True), count=24, negatives=1), capsys), 1e-5)


def test_a_near_tie_is_found():
    "Two experts with the same router row: every token that has them at the boundary is marked, and with it the item."
    encoder = tiny(perturbed=True)
    items = [Item("small red ball", picture(3)), Item("large blue box", None)]
    assert not encoder.forward_items(items).near_tie.any()
    with torch.no_grad():
        for block in encoder.moe_blocks:
            block.router[2] = block.router[1]
            block.router[0] = block.router[1]
    assert encoder.forward_items(items).near_tie.all()


def test_a_bidirectional_mask_cannot_share_rows(whole):
    """The case that must fail: with image tokens that see the text, r^i of the shared row is not r^i. Left alone, the
    encoder makes separate passes and says so.
    """
    with pytest.warns(UserWarning, match="pass of its own"):
        encoder = tiny(perturbed=True, double=True, attention="bidirectional")
    right = measured(encoder, whole, encoder.forward_items)
    assert_same(right, measured(encoder, whole, partial(encoder.forward_items, share=False)), 1e-12)
    wrong = measured(encoder, whole, partial(encoder.forward_items, share=True))
    for table, least in (("embedding", 1e-3), ("routing", 1e-4)):
        assert distance(getattr(right[0], table)["i"], getattr(wrong[0], table)["i"]) > least
    assert (
        distance(right[0].embedding["mm"], wrong[0].embedding["mm"]) < 1e-12
        and distance(right[0].embedding["t"], wrong[0].embedding["t"]) < 1e-12
    )
    assert (
        distance(right[1]["inter_i"], wrong[1]["inter_i"]) > 1e-4
        and distance(right[1]["inter_t"], wrong[1]["inter_t"]) < 1e-12
    )
    with pytest.raises(AssertionError):
        assert_same(right, wrong, 1e-5)


def test_a_bidirectional_row_sees_its_end():
    "And nothing of its neighbours: the packed rows equal rows of their own."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder = tiny(perturbed=True, double=True, attention="bidirectional")
    items = [
        Item("one two three four five six", picture(1)), Item("seven", None), Item(None, picture(2)),
        Item("eight nine", picture(3)),
    ]
    together = encoder.forward_items(items)
    for place, item in enumerate(items):
        alone = encoder.forward_items([item])
        for view in VIEWS:
            assert distance(alone.embedding[view][0], together.embedding[view][place]) < 1e-12


# ---------------------------------------------------------------------------------------------- what must not move an
# embedding


ITEMS = [
    Item("small red ball", picture(3), "a"),
    Item("a very much longer title of a large blue box with many words in it " * 2, picture(8), "b"),
    Item("bar", None, "c"), Item(None, picture(20), "d"), Item("☕ 🙂", picture(21), "e"),
]


def test_neighbours_do_not_move_an_embedding():
    "No padding, no other row reaches r, G~ or the load-balance counts of an item."
    encoder = tiny(perturbed=True, double=True)
    together = encoder.forward_items(ITEMS)
    for place, item in enumerate(ITEMS):
        alone = encoder.forward_items([item])
        for view in VIEWS:
            assert (
                distance(alone.embedding[view][0], together.embedding[view][place]) < 1e-12
                and distance(alone.routing[view][0], together.routing[view][place]) < 1e-12
            )
    rows = encoder.rows_of(ITEMS)
    assert together.tokens == sum(map(len, rows)) == len(together.layers[0].gates)  # nothing is computed for padding


def test_order_of_the_batch_does_not_matter(mixed):
    encoder, order = tiny(perturbed=True, double=True), [3, 0, 4, 2, 1]
    straight, turned = encoder.forward_items(ITEMS), encoder.forward_items([ITEMS[place] for place in order])
    for view in VIEWS:
        assert distance(straight.embedding[view][order], turned.embedding[view]) < 1e-12
    one, other = measured(encoder, mixed, encoder.forward_items), measured(encoder, mixed[::-1], encoder.forward_items)
    per_row = {"phi", "filter_weight"}
    by_pair = {"same_key"}  # (B, B * (1 + K)): rows and columns turn with the batch
    assert max(distance(one[1][name], other[1][name]) for name in one[1].keys() - per_row - by_pair) < 1e-9
    assert one[1]["same_key"].sum() == other[1]["same_key"].sum()
    assert max(distance(one[1][name], other[1][name].flip(1)) for name in per_row) < 1e-9
    assert max(distance(one[2][name], other[2][name]) for name in one[2]) < 1e-9


def test_batch_size_of_encode_does_not_matter():
    encoder = tiny(perturbed=True)
    whole = encoder.encode_views(ITEMS)
    for size in (1, 2, 64):
        for view, vectors in encoder.encode_views(ITEMS, batch_size=size).items():
            np.testing.assert_allclose(vectors, whole[view], atol=1e-6)
    np.testing.assert_allclose(encoder.encode(ITEMS, batch_size=1), whole["mm"], atol=1e-6)


def test_text_is_truncated_alike_with_and_without_an_image():
    encoder = tiny(perturbed=True, double=True, max_text_tokens=5)
    words = "one two three four five six seven eight nine".split()
    long, cut, shorter = (encoder.forward_items([Item(" ".join(words[:n]), picture(1))]) for n in (9, 5, 4))
    for view in VIEWS:
        assert distance(long.embedding[view], cut.embedding[view]) == 0.0
    assert (
        all(distance(cut.embedding[view], shorter.embedding[view]) > 1e-4 for view in ("t", "mm"))
        and distance(cut.embedding["i"], shorter.embedding["i"]) < 1e-12
    )
    assert sorted(map(len, encoder.rows_of([Item(" ".join(words), picture(1))]))) == [5, 4 + 5]  # [text], [image, text]


def test_repeated_items_count_in_the_load_balance_as_often_as_they_stand():
    """An item is encoded once however often it is in the batch; L_aux and its gradient are as if it had been encoded
    each time.
    """
    encoder = tiny(perturbed=True, double=True)
    items = [ITEMS[place] for place in (0, 1, 1, 2, 0, 3, 0, 2)]

    def aux(found):
        encoder.zero_grad()
        value = torch.stack(
            [load_balance_loss(layer.gates, layer.selected, layer.weight) for layer in found.layers]
        ).mean()
        value.backward()
        return value, torch.cat([block.router.grad.flatten() for block in encoder.moe_blocks])

    once, each_time = encoder.forward_items(items), apart(encoder, items)
    assert once.tokens == encoder.forward_items(ITEMS[:4]).tokens
    assert float(once.layers[0].weight.sum()) == len(
        each_time.layers[0].gates
    )  # views times items that each token serves
    (value, gradient), (value_apart, gradient_apart) = aux(once), aux(each_time)
    assert distance(value, value_apart) < 1e-12 and distance(gradient, gradient_apart) < 1e-12
    assert (
        distance(value, aux(encoder.forward_items(ITEMS[:4]))[0]) > 1e-6
    )  # counting each once would be something else
    for view in VIEWS:
        assert distance(once.embedding[view], each_time.embedding[view]) < 1e-12


def test_items_with_equal_content_are_the_same_item():
    "The key is text and picture, not the object or the id."
    encoder = tiny()
    twice = [Item("small red ball", picture(3), "a"), Item("small red ball", picture(3), "other id")]
    assert encoder.forward_items(twice).tokens == encoder.forward_items(twice[:1]).tokens


# ---------------------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize("fields", [{}, {"top_k": 1}, {"num_experts": 6, "top_k": 6}, {"moe_layers": "0"}], ids=str)
def test_upcycled_equals_dense(fields):
    dense, mixture = tiny(num_experts=0), tiny(**fields)
    for view, vectors in dense.encode_views(ITEMS).items():
        np.testing.assert_allclose(mixture.encode_views(ITEMS)[view], vectors, atol=1e-4)
    other = perturb_experts(tiny(**fields)).encode_views(ITEMS)
    assert max(np.nanmax(np.abs(other[view] - vectors)) for view, vectors in dense.encode_views(ITEMS).items()) > 1e-3


class DenseFormula(torch.nn.Module):
    "sum_z softmax(W_g h)_z f_z(h), every expert for every token, as printed."

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, hidden):
        gates = F.linear(hidden, self.block.router).softmax(-1)
        total = torch.zeros_like(hidden)
        for z in range(len(self.block.router)):
            gate, up = F.linear(hidden, self.block.gate_up_proj[z]).chunk(2, -1)
            total = total + gates[..., z : z + 1] * F.linear(F.silu(gate) * up, self.block.down_proj[z])
        return total


@pytest.mark.parametrize("kernel", ["loop", "grouped"])
def test_all_experts_chosen_is_the_dense_formula(kernel):
    "k = Z, end to end: outputs and gradients."
    double = kernel == "loop"  # the grouped product has no float64
    encoder = tiny(perturbed=True, double=double, top_k=4)
    encoder.set_expert_kernel(kernel)
    blocks = encoder.moe_blocks

    def run(module):
        for layer, block in enumerate(blocks):
            encoder.backbone.set_ffn(layer, module(block))
        encoder.zero_grad()
        vectors = encoder.forward_items(ITEMS).embedding
        sum((vectors[view] * torch.linspace(-1, 1, vectors[view].shape[1])).sum() for view in VIEWS).backward()
        return vectors, [parameter.grad.clone() for block in blocks for parameter in block.parameters()]

    (vectors, grads), (printed, grads_printed) = run(lambda block: block), run(DenseFormula)
    eps = 1e-12 if double else 2e-6
    assert max(distance(vectors[view], printed[view]) for view in VIEWS) < eps
    assert max(distance(a, b) for a, b in zip(grads, grads_printed)) < (1e-11 if double else 2e-5)


def test_permuting_the_experts_changes_nothing_end_to_end(mixed):
    "Rows of W*, routers and experts together: all terms and embeddings stay; p and G~ are permuted."
    encoder, order = tiny(perturbed=True, double=True), [2, 0, 3, 1]
    turned = copy.deepcopy(encoder)
    with torch.no_grad():
        turned.alignment.copy_(encoder.alignment[order])
        for block, source in zip(turned.moe_blocks, encoder.moe_blocks):
            for name, parameter in block.named_parameters():
                parameter.copy_(getattr(source, name)[order])
    found, terms, grads = measured(encoder, mixed, encoder.forward_items)
    other, other_terms, other_grads = measured(turned, mixed, turned.forward_items)
    assert max(distance(found.embedding[view], other.embedding[view]) for view in VIEWS) < 1e-9
    assert max(distance(found.routing[view][:, order], other.routing[view]) for view in VIEWS) < 1e-9
    assert distance(terms.pop("preference")[order], other_terms.pop("preference")) < 1e-9
    assert max(distance(terms[name], other_terms[name]) for name in terms) < 1e-9
    of_experts = lambda name: (
        name == "alignment" or any(part in name for part in ("router", "gate_up_proj", "down_proj"))
    )
    assert max(distance(g[order] if of_experts(name) else g, other_grads[name]) for name, g in grads.items()) < 1e-9


def test_an_expert_without_tokens_is_harmless():
    "No NaN, and a gradient of exactly zero."
    block, rows = tiny(perturbed=True).moe_blocks[0], torch.randn(50, 64)
    chosen = LayerRouting(torch.full((50, 4), 0.25), torch.tensor([[0, 2]]).repeat(50, 1), torch.full((50, 2), 0.5))
    for kernel in KERNELS:
        weights = [p.detach().clone().requires_grad_() for p in (block.gate_up_proj, block.down_proj)]
        out = mix_experts(rows, chosen, *weights, block.act, kernel)
        out.sum().backward()
        assert bool(out.isfinite().all()) and all(bool(w.grad.isfinite().all()) for w in weights)
        assert all(
            float(w.grad[[1, 3]].abs().max()) == 0 < float(w.grad[[0, 2]].abs().min(0)[0].max()) for w in weights
        )


# ---------------------------------------------------------------------------------------------- encode, encode_views


def test_missing_views_are_rows_of_nan_and_are_listed():
    encoder = tiny()
    products = [*ITEMS[:4], Item(None, None, "nothing")]
    views = encoder.encode_views(products)
    assert {view: np.isnan(rows).all(1).tolist() for view, rows in views.items()} == {
        "t": [False, False, False, True, True], "i": [False, False, True, False, True], "mm": [False] * 4 + [True],
    }
    assert {view: np.isnan(rows).any(1).tolist() for view, rows in views.items()} == {
        view: np.isnan(rows).all(1).tolist() for view, rows in views.items()
    }
    assert encoder.last_missing == {"t": ["d", "nothing"], "i": ["c", "nothing"], "mm": ["nothing"]}
    assert all(rows.dtype == np.float32 and rows.shape == (5, 64) for rows in views.values())
    for rows in views.values():
        np.testing.assert_allclose(np.linalg.norm(rows[~np.isnan(rows[:, 0])], axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(views["mm"][2], views["t"][2], atol=1e-6)  # one modality: the embedding of what it has
    np.testing.assert_allclose(views["mm"][3], views["i"][3], atol=1e-6)


def test_encode_names_the_product_that_lacks_the_view():
    encoder, products = tiny(), list(shop(12, mixed=True))
    with pytest.raises(DataError, match=r"no image \[p004\]"):
        encoder.encode(products, view="i")
    with pytest.raises(DataError, match=r"no text \[p003\]"):
        encoder.encode(products, view="t")
    assert encoder.encode(products, view="mm").shape == (12, 64)
    with pytest.raises(DataError, match=r"\[nothing\]"):
        encoder.encode([Item(None, None, "nothing")])
    with pytest.raises(LabError, match="view"):
        encoder.encode(products[:1], view="mn")


def test_nothing_to_encode():
    encoder = tiny()
    assert encoder.encode([]).shape == (0, 64) and encoder.encode_views([])["mm"].shape == (0, 64)


def test_a_text_without_a_token_is_no_text():
    "Blank text must not become a vector of zeros that looks like an embedding."
    encoder = tiny()
    with pytest.raises(DataError, match=r"\[blank\]"):
        encoder.encode([Item("  \n", None, "blank")])
    assert np.isnan(encoder.encode_views([Item("  ", picture(1), "blank")])["t"]).all()


def test_encode_leaves_the_encoder_as_it_was():
    encoder = tiny(perturbed=True).train()
    encoder.compute_dtype = torch.bfloat16
    before = encoder.fingerprint
    vectors = encoder.encode(ITEMS)
    assert encoder.training and encoder.compute_dtype == torch.bfloat16 and encoder.fingerprint == before
    encoder.compute_dtype = torch.float32
    assert np.array_equal(encoder.encode(ITEMS), vectors)  # training arithmetic does not reach encode
    assert all(block.tape is None for block in encoder.moe_blocks)


def test_bfloat16_training_stays_close(whole):
    encoder = tiny(perturbed=True)
    exact = encoder.forward_items(collate(whole)[0])
    encoder.compute_dtype = torch.bfloat16
    found, terms, grads = measured(encoder, whole, encoder.forward_items)
    assert min((found.embedding[view] * exact.embedding[view]).sum(1).min().item() for view in VIEWS) > 0.99
    assert found.embedding["mm"].dtype == torch.float32 and all(
        g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads.values()
    )
    assert bool(terms["loss"].isfinite())


# ---------------------------------------------------------------------------------------------- on disk


def test_save_and_load(tmp_path):
    encoder = tiny(perturbed=True, visual_tokens=9, moe_layers="1")
    encoder.save_pretrained(tmp_path / "model")
    loaded = Moon2Encoder.from_pretrained(tmp_path / "model")
    assert (loaded.fingerprint, loaded.config, loaded.info) == (
        encoder.fingerprint, encoder.config, encoder.info,
    ) and not loaded.training
    for view, vectors in encoder.encode_views(ITEMS).items():
        assert np.array_equal(loaded.encode_views(ITEMS)[view], vectors, equal_nan=True)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "model" / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "SHA256SUMS", "config.json", "model.safetensors",
    ]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_cut_weights_are_named(tmp_path, share):
    tiny().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"model\.safetensors.*copy the model again"):
        Moon2Encoder.from_pretrained(tmp_path)


def test_files_of_another_model_are_named(tmp_path):
    tiny().save_pretrained(tmp_path / "four")
    tiny(num_experts=2).save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").replace(tmp_path / "four" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        Moon2Encoder.from_pretrained(tmp_path / "four")
    with pytest.raises(DataError, match=r"no such file.*model\.safetensors"):
        Moon2Encoder.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        '{"model_type": "bert"}', "[]", '{"model_type": "moon2"}',
        '{"model_type": "moon2", "encoder": {"backbone": "tiny", "colour": 3}}',
    ],
)
def test_broken_config_is_named(tmp_path, content):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(LabError, match=r"config\.json|colour"):
        Moon2Encoder.from_pretrained(tmp_path)


def test_half_a_config_is_named(tmp_path):
    tiny().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"not valid JSON.*config\.json"):
        Moon2Encoder.from_pretrained(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        Moon2Encoder.from_pretrained(tmp_path / "elsewhere")


def test_a_full_disk_leaves_the_saved_model_alone(tmp_path, monkeypatch):
    "safetensors reports a full disk with an error of its own."
    import safetensors.torch
    from safetensors import SafetensorError

    encoder = tiny()
    encoder.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturb_experts(encoder)

    def full(tensors, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(LabError, match="free some space"):
        encoder.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_untrained_twin(tmp_path):
    "The baseline: same backbone, same size, nothing learned, whatever has happened to this one."
    encoder = tiny()
    start = encoder.encode(ITEMS)
    twin = perturb_experts(encoder).untrained()
    np.testing.assert_allclose(twin.encode(ITEMS), start, atol=1e-4)
    assert twin.embedding_dim == encoder.embedding_dim and np.abs(encoder.encode(ITEMS) - start).max() > 1e-3


# ---------------------------------------------------------------------------------------------- LoRA


def test_lora_trains_what_it_should(whole):
    encoder = tiny(perturbed=True)
    before = encoder.encode(ITEMS)
    prepare_trainable(encoder, settings(lora_r=2))
    trained = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "router" in name or "connector" in name or name == "alignment" for name in trained)
    assert {part for part in ("q_proj", "k_proj", "v_proj", "o_proj") if any(part in name for name in trained)} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }
    assert (
        sum("router" in name for name in trained) == 2
        and "alignment" in trained
        and any("connector" in name for name in trained)
    )
    assert (
        sum("lora_" in name and "mlp" in name for name in trained) == 2 * 2 * 2
    )  # two layers, two expert tensors, A and B
    np.testing.assert_allclose(encoder.encode(ITEMS), before, atol=1e-6)  # B starts at zero
    *_, grads = measured(encoder, whole, encoder.forward_items)
    assert grads.keys() == trained


def test_lora_is_merged_when_saved(tmp_path):
    encoder = tiny(perturbed=True)
    prepare_trainable(encoder, settings(lora_r=2))
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    vectors, names = encoder.encode(ITEMS), list(encoder.state_dict())
    encoder.save_pretrained(tmp_path)
    loaded = Moon2Encoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded.encode(ITEMS), vectors, atol=1e-5)
    assert (
        not any("lora" in name for name in loaded.state_dict()) and list(encoder.state_dict()) == names
    )  # the one in training keeps its LoRA
    np.testing.assert_array_equal(encoder.encode(ITEMS), vectors)
    assert all(isinstance(block, MoEFeedForward) for block in loaded.backbone.ffns())


# ---------------------------------------------------------------------------------------------- mini


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    "make(**fields) -> a pretrained encoder whose pictures have random features: the vision weights are not needed."
    folder = tmp_path_factory.mktemp("mini")
    with pytest.MonkeyPatch.context() as patch:
        pretrained(patch, num_layers=1)

        def make(items, **fields):
            encoder = Moon2Encoder.from_backbone(
                "mini", **({"num_layers": 2, "num_experts": 4, "top_k": 2, "visual_tokens": 16} | fields)
            )
            size = encoder.backbone.vision.picture_size
            store = FeatureCache(folder / str(size.tokens), encoder.backbone.vision.channels)
            refs = list({item.image.key: item.image for item in items if item.image is not None}.values())
            new = encoder.backbone._keys(refs)
            features = np.random.default_rng(0).standard_normal((len(new) * size.tokens, store.channels)) * 0.5
            store.add(new, features.astype(np.float16), [size] * len(new))
            encoder.backbone.vision.stored = store
            encoder.backbone.decoder.embed_tokens.requires_grad_(False)
            return encoder

        yield make


@pytest.mark.slow
def test_mini_one_pass_equals_three_forwards(mini, capsys):
    "The pretrained backbone: float64 within 1e-9, float32 within 1e-5 away from near ties."
    triplets = some_triplets(shop(60, mixed=True), count=6, negatives=1)
    encoder = perturb_experts(mini(collate(triplets)[0]), 0.02, seed=1)
    assert_same(*float32_pair(encoder, triplets, capsys), 1e-5)
    encoder.double()
    together = measured(encoder, triplets, encoder.forward_items)
    assert_same(together, measured(encoder, triplets, partial(apart, encoder)), 1e-9)


@pytest.mark.slow
def test_mini_upcycled_equals_dense(mini):
    items = [*ITEMS, Item("Turtle Check Men Navy Blue Shirt", picture(30))]
    dense, mixture = mini(items, num_experts=0), mini(items)
    for view, vectors in dense.encode_views(items).items():
        np.testing.assert_allclose(mixture.encode_views(items)[view], vectors, atol=1e-4)


@pytest.mark.slow
def test_mini_saved_and_cut(mini, tmp_path):
    "The saved folder is complete without the fetched assets; a cut tokenizer is named."
    encoder = mini(ITEMS, num_layers=1)
    encoder.save_pretrained(tmp_path)
    loaded = Moon2Encoder.from_pretrained(tmp_path)
    loaded.backbone.vision.stored = encoder.backbone.features
    assert np.array_equal(loaded.encode(ITEMS), encoder.encode(ITEMS))
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(LabError, match="tokenizer"):
        Moon2Encoder.from_pretrained(tmp_path)


def test_packing_groups_hold_every_token_once():
    "The padded groups of the attention: each token in one group, in order, in a slot of its own."
    for lengths in ([1], [9, 9, 8, 3, 3, 1], [64, 20, 20, 4], [5] * 7):
        packing = Packing(lengths)
        places = [place for tokens, *_ in packing.groups for place in range(tokens.start, tokens.stop)]
        assert places == list(range(sum(lengths))) and sum(rows for _, rows, _, _ in packing.groups) == len(lengths)
        for tokens, rows, longest, slot in packing.groups:
            assert (
                len(slot) == tokens.stop - tokens.start == len(set(slot.tolist())) and int(slot.max()) < rows * longest
            )
        padded = sum(rows * longest for _, rows, longest, _ in packing.groups)
        assert padded <= 2 * sum(lengths)


def test_config_json_says_what_the_model_is(tmp_path):
    encoder = tiny(num_experts=2, top_k=1)
    encoder.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (
        saved["model_type"] == "moon2"
        and saved["encoder"] == dataclasses.asdict(encoder.config)
        and saved["info"]["pretrained_backbone"] is False
    )
