"""The sample filter, its ledger, and the whole objective."""

import itertools
import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moon2_lab.config import CHOICES, OBJECTIVES, TrainConfig, VIEWS
from moon2_lab.errors import UsageError
from moon2_lab.files import read_json
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective.contrastive import _truncated, fits_dim, inter_product_loss, loss_receipt
from moon2_lab.objective.objective import (
    Moon2Objective, TripletKeys, TripletRouting, TripletViews, batch_masks, triplet_reliability,
)
from moon2_lab.objective.objective_weights import load_balance_loss
from moon2_lab.objective.recipes import DenseObjective, UnalignedObjective
from moon2_lab.objective.sample_filter import FilterLedger, filter_weights, margin_schedule, phi_quantiles, reliability
from moon2_lab.training.trainer import Trainer
from small import settings as small_run
from small import shop, tiny


@dataclass
class Layer:
    gates: torch.Tensor
    selected: torch.Tensor
    weight: torch.Tensor


def make_step(batch=6, width=16, experts=4, per_row=1, seed=0, dtype=torch.float64, filter_active=True):
    "Random views, routing and keys; every leaf wants a gradient."
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    shape = {"q": (batch,), "p": (batch,), "n": (batch, per_row)}
    embedding = {r: {v: F.normalize(draw(*s, width), dim=-1).requires_grad_() for v in VIEWS} for r, s in shape.items()}
    present = {r: {v: torch.ones(s, dtype=torch.bool) for v in VIEWS} for r, s in shape.items()}
    weights = {r: {v: draw(*s, experts).mul(2).softmax(-1).requires_grad_() for v in VIEWS} for r, s in shape.items()}
    gates = [draw(40, experts).softmax(1).requires_grad_() for _ in range(2)]
    layers = [Layer(g, g.topk(2).indices, torch.arange(40).remainder(3)) for g in gates]
    keys = TripletKeys(
        torch.arange(batch), torch.arange(batch), batch + torch.arange(batch * per_row).reshape(batch, per_row),
        torch.ones(batch, per_row, dtype=torch.bool), 0.5, filter_active,
    )
    return TripletViews(embedding, present), TripletRouting(weights, draw(experts, 5).requires_grad_(), layers), keys


def leaves(step):
    "All embeddings and routing weights of a step."
    return [
        tensor for table in (step[0].embedding, step[1].weights) for role in table.values() for tensor in role.values()
    ]


# ---- reliability


@settings(max_examples=50, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(1.0, 50.0), st.floats(-1.0, 1.0))
def test_threshold_is_a_gap(margin, kappa, sim_neg):
    sim_pos = torch.tensor([sim_neg + margin + math.log(1.5) / kappa], dtype=torch.float64)
    assert reliability(sim_pos, torch.tensor([[sim_neg]], dtype=torch.float64), margin, kappa).item() == pytest.approx(
        0.6, abs=1e-12
    )


def test_reliability_falls_with_the_margin_and_looks_at_the_hardest():
    sim_pos, sim_neg = torch.tensor([0.5, 0.5]), torch.tensor([[0.1, 0.4], [0.4, -0.3]])
    assert (reliability(sim_pos, sim_neg, 0.2, 10) < reliability(sim_pos, sim_neg, 0.1, 10)).all()
    torch.testing.assert_close(
        reliability(sim_pos, sim_neg, 0.2, 10), reliability(sim_pos, torch.tensor([[0.4], [0.4]]), 0.2, 10)
    )


def test_margin_schedule_is_monotone_between_its_ends():
    margins = [margin_schedule(i / 20, 0.2, 0.0) for i in range(21)]
    assert margins[0] == 0.2 and margins[-1] == pytest.approx(0.0) and all(a >= b for a, b in zip(margins, margins[1:]))


def test_the_weight_carries_no_gradient():
    sim_pos = torch.tensor([0.0, 0.3], requires_grad=True)
    assert not filter_weights(reliability(sim_pos, torch.zeros(2, 1), 0.2, 10)).requires_grad
    step = make_step()
    objective = Moon2Objective(TrainConfig(omega_mode="detached"))
    weight = objective(*step)["filter_weight"]
    assert not weight.requires_grad and (weight < 1).any()
    query, positive, negatives = (
        step[0].embedding[role][view] for role, view in (("q", "t"), ("p", "mm"), ("n", "mm"))
    )
    (slope,) = torch.autograd.grad(objective(*step)["inter_t"], query)
    constant = inter_product_loss(query, positive, negatives, 0.05, weight=weight[0].clone())
    torch.testing.assert_close(slope, torch.autograd.grad(constant, query)[0])


def test_phi_per_query_view_against_the_hardest_usable_negative():
    views, _, keys = make_step(per_row=3)
    keys.negative_mask[0, 0] = False
    keys.negative[1, 1] = keys.positive[1]  # the same product: no evidence
    keys.negative_mask[2] = False
    phi = triplet_reliability(views, keys, 0.1, 10)
    for b, usable in ((0, [1, 2]), (1, [0, 2]), (3, [0, 1, 2])):
        for v, view in enumerate(VIEWS):
            query = views.embedding["q"][view][b]
            gap = query @ views.embedding["p"]["mm"][b] - max(query @ views.embedding["n"]["mm"][b, k] for k in usable)
            assert phi[v, b].item() == pytest.approx(torch.sigmoid(10 * (gap - 0.1)).item(), abs=1e-9)
    assert (phi[:, 2] == 1).all()  # nothing to doubt


# ---- the objective


@pytest.mark.parametrize(
    "preset,mode,routing_mode,times_m,intra_omega",
    itertools.product(("lab", "paper"), CHOICES["omega_mode"], ("per_view", "shared"), (False, True), (True, False)),
)
def test_total_is_the_weighted_sum_of_the_named_terms(preset, mode, routing_mode, times_m, intra_omega):
    config = TrainConfig(
        preset=preset, omega_mode=mode, omega_routing=routing_mode, omega_times_m=times_m, intra_omega=intra_omega,
        aux_weight=0.3, sparsity_weight=0.2,
    )
    terms = Moon2Objective(config)(*make_step(per_row=2))
    total = (
        sum(omega * terms[name] for omega, name in zip(terms["omega"], OBJECTIVES))
        + 0.3 * terms["aux"]
        + 0.2 * terms["sparsity"]
        + terms.get("balance", 0.0)
    )
    assert terms["loss"].item() == pytest.approx(total.item(), abs=1e-12) and terms["loss"].requires_grad
    assert ("balance" in terms) == (mode == "balanced")
    if mode != "faithful" and intra_omega:
        assert terms["omega"].sum().item() == pytest.approx(5 if times_m else 1)
    if routing_mode == "shared":
        assert terms["omega_sum_raw"].item() == pytest.approx(1)


def test_presets_read_the_intra_terms_differently():
    step = make_step(per_row=2, filter_active=False)
    lab, paper = (Moon2Objective(TrainConfig(preset=preset))(*step) for preset in ("lab", "paper"))
    assert [lab[f"inter_{view}"].item() for view in VIEWS] == [paper[f"inter_{view}"].item() for view in VIEWS]
    image, text, rivals = step[0].embedding["p"]["i"], step[0].embedding["p"]["t"], step[0].embedding["n"]["t"]
    logits = torch.cat([(image * text).sum(1, keepdim=True), torch.einsum("bd,bkd->bk", image, rivals)], 1) / 0.05
    assert paper["intra_p"].item() == pytest.approx((logits.logsumexp(1) - logits[:, 0]).mean().item(), abs=1e-12)
    image, text, rival = step[0].embedding["n"]["i"], rivals, text  # each negative is an anchor with one rival
    gap = (torch.einsum("bkd,bd->bk", image, rival) - (image * text).sum(-1)) / 0.05
    assert paper["intra_n"].item() == pytest.approx(F.softplus(gap).mean().item(), abs=1e-12)
    assert lab["intra_p"] > paper["intra_p"]  # more candidates


@pytest.mark.parametrize("preset", ("lab", "paper"))
def test_swapping_p_and_n_swaps_the_intra_terms(preset):
    step = make_step()
    views, routing, keys = step
    swapped = {
        "q": views.embedding["q"], "p": {v: e[:, 0] for v, e in views.embedding["n"].items()},
        "n": {v: e[:, None] for v, e in views.embedding["p"].items()},
    }
    other_keys = TripletKeys(
        keys.query, keys.negative[:, 0], keys.positive[:, None], keys.negative_mask, keys.progress, False
    )
    keys.filter_active = False
    objective = Moon2Objective(TrainConfig(preset=preset))
    a, b = objective(views, routing, keys), objective(TripletViews(swapped, views.present), routing, other_keys)
    assert (a["intra_p"].item(), a["intra_n"].item()) == pytest.approx(
        (b["intra_n"].item(), b["intra_p"].item()), abs=1e-12
    )


def test_permuting_experts_and_rows_changes_nothing():
    step = make_step(per_row=2)
    objective = Moon2Objective(TrainConfig(omega_mode="faithful"))
    expected = objective(*step)["loss"].item()
    z, b = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 5, 0, 2, 3])
    views, routing, keys = step
    experts = TripletRouting(
        {r: {v: w[..., z] for v, w in table.items()} for r, table in routing.weights.items()}, routing.alignment[z],
        [Layer(layer.gates[:, z], torch.argsort(z)[layer.selected], layer.weight) for layer in routing.layers],
    )
    assert objective(views, experts, keys)["loss"].item() == pytest.approx(expected, abs=1e-12)
    move = lambda table: {r: {v: t[b] for v, t in views.items()} for r, views in table.items()}
    moved = TripletKeys(
        keys.query[b], keys.positive[b], keys.negative[b], keys.negative_mask[b], keys.progress, keys.filter_active
    )
    moved_views, moved_routing = (
        TripletViews(move(views.embedding), move(views.present)),
        TripletRouting(move(routing.weights), routing.alignment, routing.layers),
    )
    assert objective(moved_views, moved_routing, moved)["loss"].item() == pytest.approx(expected, abs=1e-12)


def test_gradients_of_the_whole_objective():
    "Finite differences through embeddings, routing weights and W*, omega included."
    views, routing, keys = make_step(batch=2, width=3, experts=2, per_row=1)
    keys.filter_active = False  # the weight is a constant for autograd, but not for finite differences
    objective = Moon2Objective(TrainConfig(omega_mode="faithful", temperature=0.5, intra_temperature=0.5))
    inputs = (
        views.embedding["q"]["t"], views.embedding["p"]["i"], views.embedding["n"]["mm"], routing.weights["q"]["mm"],
        routing.alignment, routing.layers[0].gates,
    )

    def loss(*tensors):
        (
            views.embedding["q"]["t"], views.embedding["p"]["i"], views.embedding["n"]["mm"],
            routing.weights["q"]["mm"], routing.alignment, routing.layers[0].gates,
        ) = tensors
        return objective(views, routing, keys)["loss"]

    assert torch.autograd.gradcheck(loss, inputs)


def test_balanced_gives_the_router_no_way_to_lower_the_loss():
    for mode, expected in (("faithful", True), ("floored", True), ("detached", False), ("balanced", False)):
        step = make_step()
        Moon2Objective(TrainConfig(omega_mode=mode, sparsity_weight=0.0))(*step)["loss"].backward()
        assert (
            any(
                w.grad is not None and w.grad.abs().sum() > 0
                for role in step[1].weights.values()
                for w in role.values()
            )
            == expected
        )
        assert (step[1].alignment.grad is not None and step[1].alignment.grad.abs().sum().item() > 0) == (
            mode != "detached"
        )


def test_a_hard_objective_gains_weight_in_balanced_and_loses_it_in_faithful():
    "One step of gradient descent on W*, objective inter_t made hard."
    for mode, sign in (("balanced", 1), ("faithful", -1)):
        views, routing, keys = make_step(filter_active=False)
        with torch.no_grad():
            routing.alignment.zero_()
            for role, view, target in (("q", "i", "mm"), ("q", "mm", "mm"), ("p", "i", "t"), ("n", "i", "t")):
                views.embedding[role][view].copy_(views.embedding["p" if role == "q" else role][target])
        Moon2Objective(TrainConfig(omega_mode=mode, sparsity_weight=0.0))(views, routing, keys)["loss"].backward()
        assert (sign * -routing.alignment.grad[:, 0] > 0).all()


def test_aux_is_the_mean_over_layers():
    step = make_step()
    terms = Moon2Objective(TrainConfig())(*step)
    expected = sum(load_balance_loss(layer.gates, layer.selected, layer.weight) for layer in step[1].layers) / 2
    assert terms["aux"].item() == pytest.approx(expected.item(), abs=1e-12)


def test_mutual_pairs_count_once_and_are_receipted():
    views, routing, keys = make_step(batch=4, filter_active=False)
    swap = torch.tensor([1, 0, 3, 2])
    keys.negative = keys.positive[swap][:, None]
    views.embedding["n"] = {v: views.embedding["p"][v][swap][:, None] for v in VIEWS}
    terms = Moon2Objective(TrainConfig())(views, routing, keys)
    for view in VIEWS:
        plain = inter_product_loss(views.embedding["q"][view], views.embedding["p"]["mm"], None, 0.05)
        assert terms[f"inter_{view}"].item() == pytest.approx(plain.item(), abs=1e-12)
    assert terms["masked_pairs"] == 4 and terms["repeated_pairs"] == 12 and terms["negatives_per_query"] == 3
    receipt = loss_receipt(batch_masks(keys, views))
    assert receipt.hard.tolist() == [1] * 4 and "1.00 hard + 2.00 in-batch" in str(receipt)


def test_right_answers_of_one_query_are_left_out_of_loss_and_reliability():
    """Value and gradient of each view's loss are those of a batch that never had the columns; phi does not look at such
    a negative.
    """
    views, routing, keys = make_step(batch=4, per_row=2, filter_active=False)
    answers = torch.zeros(3, 4, 12, dtype=torch.bool)
    answers[0, 0, [1, 9]] = answers[:, 2, 3] = answers[1, 1, 6] = True  # column 6 is the first negative of row 1
    keys.answers = answers
    terms = Moon2Objective(TrainConfig())(views, routing, keys)
    candidates = torch.cat([views.embedding["p"]["mm"], views.embedding["n"]["mm"].flatten(0, 1)])
    for place, view in enumerate(VIEWS):
        rows = []
        for row in range(4):
            kept = [c for c in range(12) if not answers[place, row, c] or c == row]
            logits = views.embedding["q"][view][row] @ candidates[kept].T / 0.05
            rows.append(F.cross_entropy(logits[None], torch.tensor([kept.index(row)])))
        assert terms[f"inter_{view}"].item() == pytest.approx(torch.stack(rows).mean().item(), abs=1e-12)
        grads = [
            torch.autograd.grad(loss, candidates, retain_graph=True, allow_unused=True)[0]
            for loss in (terms[f"inter_{view}"],)
        ]
        assert all(g is None or g.isfinite().all() for g in grads)
    assert terms["masked_pairs"] == 1  # of all views: the third row's
    plain = triplet_reliability(views, dataclasses.replace(keys, answers=None), 0.1, 10.0)
    alone = dataclasses.replace(
        keys, answers=None, negative_mask=torch.tensor([[True, True], [False, True], [True, True], [True, True]])
    )
    wanted = plain.clone()
    wanted[1, 1] = triplet_reliability(views, alone, 0.1, 10.0)[1, 1]
    assert torch.equal(triplet_reliability(views, keys, 0.1, 10.0), wanted)


def test_one_product_everywhere_leaves_nothing_to_learn():
    views, routing, keys = make_step()
    keys.query, keys.positive, keys.negative = (
        torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.long), torch.zeros(6, 1, dtype=torch.long),
    )
    terms = Moon2Objective(TrainConfig(aux_weight=0.0, sparsity_weight=0.0))(views, routing, keys)
    assert [terms[name].item() for name in OBJECTIVES] == [0.0] * 5 and terms["relative"].tolist() == [0.0] * 5
    terms["loss"].backward()
    assert all(t.grad is None or t.grad.isfinite().all() for t in leaves((views, routing)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 100_000), st.sampled_from(CHOICES["omega_mode"]), st.sampled_from(("lab", "paper")),
    st.integers(0, 2), st.booleans(), st.sampled_from(((), (2, 8))),
)
def test_any_mix_of_views_is_finite(seed, mode, preset, per_row, shared, dims):
    "Items without text, without image, without anything; missing negatives; NaN in every hole."
    step = views, routing, keys = make_step(batch=4, per_row=per_row, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand((), generator=generator).item()
    for role in "qpn":
        present = views.present[role]
        for view in "ti":
            present[view] &= torch.rand(present[view].shape, generator=generator) < share
        present["mm"] = present["t"] | present["i"]
    keys.negative_mask &= torch.rand(keys.negative_mask.shape, generator=generator) < 0.7
    with torch.no_grad():
        for role, view in itertools.product("qpn", VIEWS):
            hole = ~views.present[role][view] | (~keys.negative_mask if role == "n" else False)
            views.embedding[role][view][hole] = math.nan
            routing.weights[role][view][hole] = math.nan
    terms = Moon2Objective(
        TrainConfig(
            preset=preset, omega_mode=mode, omega_routing="shared" if shared else "per_view", filter_on_intra=True,
            matryoshka_dims=dims,
        )
    )(*step)
    terms["loss"].backward()
    there = [name for name in OBJECTIVES if name in terms]
    assert terms["loss"].isfinite() and all(
        t.grad is None or t.grad.isfinite().all() for t in [*leaves(step), routing.alignment]
    )
    assert [omega.item() > 0 for omega in terms["omega"]] == [name in there for name in OBJECTIVES]
    if mode != "faithful" and there:
        assert terms["omega"].sum().item() == pytest.approx(1)
    assert 0 <= terms["share_down_weighted"] <= 1
    assert torch.equal(
        terms["phi"].isnan(), ~(torch.stack([views.present["q"][v] for v in VIEWS]) & views.present["p"]["mm"])
    )


def test_filter_warm_up_and_switch():
    step = make_step()
    active, off = Moon2Objective(TrainConfig())(*step), Moon2Objective(TrainConfig(filter=False))(*step)
    step[2].filter_active = False
    warm = Moon2Objective(TrainConfig())(*step)
    assert active["share_down_weighted"] > 0 and warm["share_down_weighted"] == off["share_down_weighted"] == 0
    assert torch.equal(active["phi"], warm["phi"]) and warm["loss"].item() == off["loss"].item()
    step[2].progress = 0.05  # within the warm-up the margin waits
    assert Moon2Objective(TrainConfig())(*step)["margin"].item() == pytest.approx(0.2)


def test_without_experts_all_objectives_weigh_alike():
    "Plain FFN: omega = 1 / M and neither aux nor sparsity, whatever stands in W*."
    views, routing, keys = make_step()
    for alignment in (None, torch.randn(1, 5), routing.alignment):
        terms = Moon2Objective(TrainConfig())(views, TripletRouting(routing.weights, alignment, []), keys)
        assert terms["omega"].tolist() == pytest.approx([0.2] * 5) and not {
            "aux", "sparsity", "balance", "preference",
        } & set(terms)


def test_a_batch_without_samples_or_experts_still_has_a_gradient():
    views, routing, keys = make_step()
    for role in views.present.values():
        for present in role.values():
            present[:] = False
    terms = Moon2Objective(TrainConfig())(views, TripletRouting(routing.weights, None), keys)
    terms["loss"].backward()
    assert terms["loss"].item() == 0.0 and (views.embedding["q"]["mm"].grad == 0).all()


def test_autocast_does_not_round_the_scores():
    step = make_step(dtype=torch.float32)
    objective = Moon2Objective(TrainConfig())
    expected = objective(*step)["loss"].item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert objective(*step)["loss"].item() == expected


def test_objective_has_no_memory():
    objective, step = Moon2Objective(TrainConfig()), make_step()
    first = objective(*step)["loss"].item()
    objective(*make_step(seed=1))
    assert objective(*step)["loss"].item() == first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_objective_on_a_gpu():
    views, routing, keys = make_step(dtype=torch.float32)
    expected = Moon2Objective(TrainConfig())(views, routing, keys)["loss"].item()
    there = lambda table: {r: {v: t.detach().cuda() for v, t in row.items()} for r, row in table.items()}
    layers = [
        Layer(*(t.detach().cuda() for t in (layer.gates, layer.selected, layer.weight))) for layer in routing.layers
    ]
    moved = TripletKeys(
        *(t.cuda() for t in (keys.query, keys.positive, keys.negative, keys.negative_mask)), keys.progress,
        keys.filter_active,
    )
    moved_routing = TripletRouting(there(routing.weights), routing.alignment.detach().cuda().requires_grad_(), layers)
    terms = Moon2Objective(TrainConfig())(
        TripletViews(there(views.embedding), there(views.present)), moved_routing, moved
    )
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-4)


# ---- prefixes


@pytest.mark.parametrize("preset,mode", itertools.product(("lab", "paper"), CHOICES["omega_mode"]))
def test_prefixes_are_in_the_inter_losses_and_nowhere_else(preset, mode):
    "Same terms, same filter, same masks; each inter loss is the mean over the lengths."
    step = views, _, keys = make_step(per_row=2)
    keys.negative[0, 1] = keys.positive[2]  # a product twice, and one masked
    keys.negative_mask[4, 0] = False
    config = TrainConfig(preset=preset, omega_mode=mode)
    plain, nested = Moon2Objective(config)(*step), Moon2Objective(config.replace(matryoshka_dims=(4, 9)))(*step)
    assert list(plain) == list(nested)
    assert all(
        torch.equal(plain[name], nested[name])
        for name in (
            "phi", "filter_weight", "intra_p", "intra_n", "aux", "sparsity", "masked_pairs", "repeated_pairs",
            "share_down_weighted",
        )
    )
    options = {
        "keys": keys.positive, "negative_keys": keys.negative, "query_keys": keys.query,
        "negative_mask": keys.negative_mask, "unique": True,
    }
    for row, view in enumerate(VIEWS):
        lengths = [
            inter_product_loss(
                *(
                    F.normalize(views.embedding[r][v][..., :d], dim=-1)
                    for r, v in (("q", view), ("p", "mm"), ("n", "mm"))
                ),
                config.temperature, weight=plain["filter_weight"][row], **options,
            )
            for d in (16, 4, 9)
        ]
        assert plain[f"inter_{view}"].item() == pytest.approx(lengths[0].item(), abs=1e-12)
        assert nested[f"inter_{view}"].item() == pytest.approx(sum(lengths).item() / 3, abs=1e-12)
        ratio = nested[f"inter_{view}"] / plain[f"inter_{view}"]  # chance is the same
        assert (nested["relative"][row] / plain["relative"][row]).item() == pytest.approx(ratio.item(), abs=1e-9)
    total = (
        sum(omega * nested[name] for omega, name in zip(nested["omega"], OBJECTIVES))
        + 0.01 * nested["aux"]
        + 0.01 * nested["sparsity"]
        + nested.get("balance", 0.0)
    )
    assert nested["loss"].item() == pytest.approx(total.item(), abs=1e-12)


def test_without_prefixes_the_objective_is_unchanged_bit_for_bit():
    "Against the loss without the argument, value and gradient."
    views, routing, keys = make_step(dtype=torch.float32)
    terms = Moon2Objective(TrainConfig())(views, routing, keys)
    vectors = [views.embedding["q"]["t"], views.embedding["p"]["mm"], views.embedding["n"]["mm"]]
    plain = inter_product_loss(
        *vectors, 0.05, keys=keys.positive, negative_keys=keys.negative, query_keys=keys.query,
        weight=terms["filter_weight"][0], unique=True,
    )
    assert torch.equal(terms["inter_t"], plain)
    assert all(
        torch.equal(a, b)
        for a, b in zip(torch.autograd.grad(terms["inter_t"], vectors), torch.autograd.grad(plain, vectors))
    )


def test_prefixes_of_the_ablation_without_alignment():
    step = make_step()
    plain, nested = (UnalignedObjective(TrainConfig(matryoshka_dims=dims)) for dims in ((), (4,)))
    assert (plain.matryoshka_dims, nested.matryoshka_dims) == ((), (4,)) and not hasattr(
        DenseObjective(), "matryoshka_dims"
    )
    assert (
        nested(*step)["inter_mm"].item()
        == Moon2Objective(TrainConfig(matryoshka_dims=(4,)))(*step)["inter_mm"].item()
        != plain(*step)["inter_mm"].item()
    )


def test_prefixes_longer_than_the_vectors_are_refused():
    with pytest.raises(UsageError, match=r"a prefix of 17 numbers from vectors of 16 \[matryoshka_dims\]"):
        Moon2Objective(TrainConfig(matryoshka_dims=(4, 17)))(*make_step())
    for value, told in (
        ("0,4", "at least 1"), ("4,4", "named once"), ("-4", "at least 1"), ("four", "'four' is no int"),
        ([4, 2.5], "2.5 is no int"), ({"a": 1}, "is no int"),
    ):
        with pytest.raises(UsageError, match=rf"{told}.*\[matryoshka_dims\]"):
            TrainConfig(matryoshka_dims=value)
    assert (
        TrainConfig(matryoshka_dims="[8, 4]").matryoshka_dims
        == TrainConfig(matryoshka_dims=(4, 8)).matryoshka_dims
        == (4, 8)
        and TrainConfig().matryoshka_dims == ()
    )


@pytest.fixture
def small_runs(own_cache):
    "A cache of their own, and the threads as they were."
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def trained_shop(folder, dims, steps=80, **options):
    "A trainer of the tiny encoder, after its run."
    config = small_run(
        max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-3, connector_learning_rate=3e-3, filter=False,
        matryoshka_dims=dims,
    )
    trainer = Trainer(tiny(), shop(96), config, out=folder, **options)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_an_encoder_trained_with_prefixes_has_better_ones(small_runs, tmp_path):
    """Same seed, same steps, the same columns of history; the loss of the first 4 of 64 numbers over the products
    trained on. And the saved model says what it was trained for.
    """
    found = {}
    for dims in ((), (4, 8)):
        trainer = trained_shop(tmp_path / f"run-{len(dims)}", dims)
        own = {triplet.positive.product_id: triplet for triplet in trainer.triplets}.values()
        query, item = (
            torch.from_numpy(trainer.encoder.encode(rows, view=view))
            for rows, view in (([t.query for t in own], "t"), ([t.positive for t in own], "mm"))
        )
        found[dims] = (
            inter_product_loss(_truncated(query, 4), _truncated(item, 4), None, 0.05).item(),
            list(trainer.table().columns),
        )
        loaded = Moon2Encoder.from_pretrained(tmp_path / f"run-{len(dims)}" / "model")
        assert loaded.info["matryoshka_dims"] == list(dims) and [
            fits_dim(loaded.info, dim, 64) for dim in (4, 5, 64)
        ] == [bool(dims), False, True]
    assert found[4, 8][0] < 0.7 * found[()][0], found  # seen: 1.14 and 2.39
    assert found[4, 8][1] == found[()][1]


def test_the_trainer_refuses_prefixes_that_are_none_and_notes_what_the_objective_trains(small_runs, tmp_path):
    with pytest.raises(UsageError, match=r"each shorter than the embedding, which has 64 numbers.*\[matryoshka_dims\]"):
        trained_shop(tmp_path / "run", (8, 64))
    assert not (tmp_path / "run").exists()
    own = lambda views, routing, keys: {"loss": views.embedding["q"]["mm"].pow(4).sum()}
    assert trained_shop(None, (8,), steps=1, objective=own).encoder.info["matryoshka_dims"] == []  # it trains none
    own.matryoshka_dims = (16,)
    assert trained_shop(None, (8,), steps=1, objective=own).encoder.info["matryoshka_dims"] == [16]


@pytest.mark.slow
def test_prefixes_in_the_best_model_after_a_resume_and_with_tensorboard(small_runs, tmp_path):
    config = small_run(max_steps=2, matryoshka_dims=(8, 16), report_to="tensorboard", eval_steps=1)
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    Trainer(tiny(), shop(60), config, out=tmp_path / "run", evaluate_fn=lambda encoder: {"score": 0.5}).train()
    told = [
        read_json(tmp_path / "run" / folder / "config.json")["info"]["matryoshka_dims"]
        for folder in ("checkpoints/best", "model")
    ]
    assert told == [[8, 16]] * 2 and read_json(tmp_path / "run" / "run_settings.json")["differs_from_paper"][
        "matryoshka_dims"
    ] == {"paper": [], "here": [8, 16]}
    (tmp_path / "run" / "model" / "config.json").unlink()
    Trainer(
        tiny(), shop(60), config.replace(report_to="none"), out=tmp_path / "run", resume=True
    ).train()  # no step is left
    assert read_json(tmp_path / "run" / "model" / "config.json")["info"]["matryoshka_dims"] == [8, 16]


# ---- the ledger


def test_ledger_tables():
    ledger = FilterLedger(max_rows=3)
    phi = torch.tensor([[0.2, 0.9, 0.5], [math.nan, 0.9, 0.9], [0.7, 0.9, 0.9]])
    assert ledger.add(1, ["a", "b", "c"], phi, filter_weights(phi)) == 2
    assert ledger.add(2, ["a", "b", "c"], phi, filter_weights(phi)) == 2
    frame = ledger.to_frame()
    assert frame["query_id"].tolist() == ["c", "a", "c"] and ledger.dropped == 1 and frame["step"].tolist() == [1, 2, 2]
    assert frame.columns.tolist() == [
        "step", "query_id", "phi_t", "phi_i", "phi_mm", "weight_t", "weight_i", "weight_mm",
    ]
    assert ledger.summary()["query_id"].tolist() == ["c", "a"] and ledger.summary()["times"].tolist() == [2, 1]
    restored = FilterLedger(max_rows=3)
    restored.load_state_dict(ledger.state_dict())
    assert restored.to_frame().equals(frame)


def test_ledger_names_the_masked_pairs():
    _, _, keys = make_step(batch=3)
    keys.positive = torch.tensor([0, 0, 2])
    ledger = FilterLedger()
    same_key = batch_masks(keys).same_key
    assert ledger.add_masked(5, ["q0", "q1", "q2"], ["p0", "p1", "p2", "n0", "n1", "n2"], same_key) == 2
    assert sorted(ledger.masked_frame()[["query_id", "item_id", "role"]].itertuples(index=False, name=None)) == [
        ("q0", "p1", "positive"), ("q1", "p0", "positive"),
    ]


def test_phi_quantiles():
    quantiles = phi_quantiles(torch.tensor([[0.0, 0.5, 1.0], [math.nan] * 3]))
    assert quantiles == pytest.approx({"phi_q05": 0.05, "phi_q50": 0.5, "phi_q95": 0.95})
