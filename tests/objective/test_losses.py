"""The losses against brute force, closed forms and finite differences; the two hazards of the printed objective and
their cure.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from choosing import few
from hypothesis import given, settings
from hypothesis import strategies as st

from moon2_lab.config import CHOICES, OBJECTIVES
from moon2_lab.errors import LabError
from moon2_lab.objective.contrastive import (
    _truncated, candidate_masks, contrastive_loss, fits_dim, inter_product_loss, intra_product_loss, prefix_loss,
)
from moon2_lab.objective.objective_weights import (
    balance_loss, balance_target, collective_support, load_balance_loss, objective_weights, preference, sparsity_loss,
)
from moon2_lab.objective.omega_alarm import omega_alarms


def unit(*shape, seed=0):
    "Random l2-normalised float64 vectors."
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def brute_force(anchor, own, others, keys, other_keys, temperature, in_batch, unique):
    "Row by row, candidate by candidate, as the paper words it."
    losses = []
    for b in range(len(anchor)):
        mine = [(others[b, k], int(other_keys[b, k])) for k in range(others.shape[1])]
        rest = [(own[j], int(keys[j])) for j in range(len(own)) if j != b]
        rest += [
            (others[j, k], int(other_keys[j, k])) for j in range(len(own)) if j != b for k in range(others.shape[1])
        ]
        seen, logits = set(), [float(anchor[b] @ own[b]) / temperature]
        for vector, key in mine + (rest if in_batch else []):
            if key == int(keys[b]) or (unique and key in seen):
                continue
            seen.add(key)
            logits.append(float(anchor[b] @ vector) / temperature)
        losses.append(math.log(sum(math.exp(x - logits[0]) for x in logits)))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("per_row,in_batch,unique", itertools.product((1, 3), (True, False), (True, False)))
def test_inter_equals_brute_force(per_row, in_batch, unique):
    generator = torch.Generator().manual_seed(per_row)
    keys, negative_keys = (
        torch.randint(0, 7, (6,), generator=generator), torch.randint(0, 7, (6, per_row), generator=generator),
    )
    query, positive, negatives = unit(6, 5, seed=1), unit(6, 5, seed=2), unit(6, per_row, 5, seed=3)
    loss = inter_product_loss(
        query, positive, negatives, 0.3, keys=keys, negative_keys=negative_keys, in_batch=in_batch, unique=unique,
        reduction="none",
    )
    torch.testing.assert_close(
        loss, brute_force(query, positive, negatives, keys, negative_keys, 0.3, in_batch, unique), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("in_batch", (True, False))
def test_intra_equals_brute_force(in_batch):
    keys, other_keys = torch.tensor([1, 1, 2, 3]), torch.tensor([[4, 5], [6, 6], [3, 2], [9, 1]])
    image, text, other_image, other_text = (
        unit(4, 5, seed=1), unit(4, 5, seed=2), unit(4, 2, 5, seed=3), unit(4, 2, 5, seed=4),
    )
    options = {"keys": keys, "other_keys": other_keys, "in_batch": in_batch, "reduction": "none"}
    forward = brute_force(image, text, other_text, keys, other_keys, 0.2, in_batch, False)
    backward = brute_force(text, image, other_image, keys, other_keys, 0.2, in_batch, False)
    torch.testing.assert_close(intra_product_loss(image, text, other_text, 0.2, **options), forward, rtol=0, atol=1e-12)
    symmetric = intra_product_loss(image, text, other_text, 0.2, symmetric=True, other_image=other_image, **options)
    torch.testing.assert_close(symmetric, (forward + backward) / 2, rtol=0, atol=1e-12)


def test_symmetric_in_batch_intra_is_the_clip_loss():
    image, text = unit(6, 5, seed=1), unit(6, 5, seed=2)
    logits, labels = image @ text.T / 0.07, torch.arange(6)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(intra_product_loss(image, text, None, 0.07, in_batch=True, symmetric=True), expected)


@pytest.mark.parametrize("rows,per_row,in_batch", itertools.product((1, 2, 5), (0, 1, 4), (True, False)))
@pytest.mark.parametrize("value", (0.0, 1.0))
def test_vectors_that_know_nothing_give_the_log_of_the_number_of_candidates(rows, per_row, in_batch, value):
    vector = F.normalize(torch.full((1, 8), value, dtype=torch.float64), dim=-1)
    negatives = vector.expand(rows, per_row, 8) if per_row else None
    candidates = rows * (1 + per_row) if in_batch else 1 + per_row
    loss = inter_product_loss(vector.expand(rows, 8), vector.expand(rows, 8), negatives, 0.05, in_batch=in_batch)
    assert loss.item() == pytest.approx(math.log(candidates), abs=1e-9)


def test_without_negatives_exactly_zero_and_no_gradient():
    query = unit(4, 8, seed=1).requires_grad_()
    for options in ({"in_batch": False}, {"keys": torch.full((4,), 7)}):
        loss = inter_product_loss(query, unit(4, 8, seed=2), None, 0.05, **options)
        (slope,) = torch.autograd.grad(loss, query)
        assert loss.item() == 0.0 and (slope == 0).all()
    one_key = torch.full((4, 1), 7)
    assert (
        intra_product_loss(
            query, unit(4, 8, seed=2), unit(4, 1, 8, seed=3), 0.05, keys=one_key[:, 0], other_keys=one_key,
            in_batch=True, symmetric=True,
        ).item()
        == 0.0
    )


@pytest.mark.parametrize("in_batch", (True, False))
def test_gradcheck_of_the_contrastive_losses(in_batch):
    query, positive, negatives = (
        unit(*shape, seed=i).requires_grad_() for i, shape in enumerate(((3, 4), (3, 4), (3, 2, 4)))
    )
    keys, negative_keys = torch.tensor([1, 2, 2]), torch.tensor([[3, 1], [4, 4], [5, 6]])
    mask, weight = torch.tensor([True, False, True]), torch.tensor([0.3, 1.0, 0.9], dtype=torch.float64)
    options = {"keys": keys, "in_batch": in_batch, "weight": weight, "mask": mask, "unique": True}
    assert torch.autograd.gradcheck(
        lambda *v: inter_product_loss(*v, 0.5, negative_keys=negative_keys, **options), (query, positive, negatives)
    )
    other = unit(3, 2, 4, seed=9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *v: intra_product_loss(
            *v[:3], 0.5, other_keys=negative_keys, symmetric=True, other_image=v[3], **options
        ),
        (query, positive, negatives, other),
    )


def test_gradcheck_of_the_routing_terms():
    alignment, routing = (
        torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        unit(5, 4).abs().requires_grad_(),
    )
    gates, relative = unit(6, 4, seed=2).softmax(1).requires_grad_(), torch.rand(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda g: load_balance_loss(g, torch.tensor([[0, 1], [2, 3], [0, 3], [1, 1], [2, 0], [3, 1]]), torch.arange(6)),
        gates,
    )
    assert torch.autograd.gradcheck(sparsity_loss, alignment)
    assert torch.autograd.gradcheck(lambda w: balance_loss(w, routing, relative), alignment)
    for mode in ("faithful", "floored"):
        assert torch.autograd.gradcheck(
            lambda w, g, mode=mode: objective_weights(w, g, mode=mode), (alignment, routing)
        )
    for mode in ("detached", "balanced"):
        assert not objective_weights(alignment, routing, mode=mode).requires_grad


def test_a_product_that_stands_in_two_columns_counts_once():
    "Mutual pairs: n of one triplet is p of the other, as the paired sampler makes them."
    query, positive = unit(4, 8, seed=1), unit(4, 8, seed=2)
    swap = torch.tensor([1, 0, 3, 2])
    keys = torch.arange(4)
    loss = lambda **options: inter_product_loss(
        query, positive, positive[swap][:, None], 0.1, keys=keys, negative_keys=keys[swap][:, None], reduction="none",
        **options,
    )
    torch.testing.assert_close(
        loss(unique=True), inter_product_loss(query, positive, None, 0.1, reduction="none")
    )  # the same four products
    assert (loss() > loss(unique=True)).all()
    masks = candidate_masks(4, 1, keys=keys, negative_keys=keys[swap][:, None], unique=True)
    assert masks.allowed.sum(1).tolist() == [4, 4, 4, 4] and masks.same_key.sum(1).tolist() == [1, 1, 1, 1]
    assert masks.allowed[:, 4:].diagonal().all()  # the row's own hard negative is the copy that stays


def test_duplicates_ignore_negatives_that_do_not_exist():
    "A padded negative must not take the place of the real one."
    negative_mask = torch.tensor([[False, True], [True, True], [False, False]])
    masks = candidate_masks(
        3, 2, keys=torch.tensor([1, 2, 3]), negative_keys=torch.tensor([[9, 9], [9, 5], [9, 9]]),
        negative_mask=negative_mask, unique=True,
    )
    assert masks.allowed[0].tolist() == [True, True, True, False, True, False, True, False, False]
    assert masks.allowed[2].tolist() == [True, True, True, False, True, False, True, False, False]
    assert masks.allowed[1].tolist() == [True, True, True, False, False, True, True, False, False]


def test_query_keys_are_masked_too():
    """A pseudo positive: the query was made from product 8, the label says product 1; product 8 is in the batch as the
    positive of row 1.
    """
    masks = candidate_masks(
        2, 1, keys=torch.tensor([1, 8]), negative_keys=torch.tensor([[5], [6]]), query_keys=torch.tensor([8, 8])
    )
    assert masks.allowed.tolist() == [[True, False, True, True], [True, True, True, True]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_masks_partition_the_candidates(rows, per_row, in_batch, unique, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, negative_keys = (
        torch.randint(-2, 4, (rows,), generator=generator), torch.randint(-2, 4, (rows, per_row), generator=generator),
    )
    negative_mask = torch.rand(rows, per_row, generator=generator) < 0.7
    masks = candidate_masks(
        rows, per_row, keys=keys, negative_keys=negative_keys, negative_mask=negative_mask, in_batch=in_batch,
        unique=unique,
    )
    parts = masks.allowed.int() + masks.same_key.int() + masks.repeated.int()
    assert (parts <= 1).all() and masks.allowed.diagonal().all()
    columns = torch.cat([keys, negative_keys.flatten()])
    for b in range(rows):
        others = [int(columns[c]) for c in range(len(columns)) if masks.allowed[b, c] and c != b]
        assert int(keys[b]) not in others and (not unique or len(set(others)) == len(others))
        if in_batch:  # no product of the batch is lost by leaving out its copies
            valid = torch.cat([torch.ones(rows, dtype=torch.bool), negative_mask.flatten()])
            assert set(others) == {int(k) for k, v in zip(columns, valid) if v} - {int(keys[b])}


def test_masked_rows_may_hold_nan():
    query, positive, negatives = unit(4, 8, seed=1), unit(4, 8, seed=2), unit(4, 2, 8, seed=3)
    rows, some = (
        torch.tensor([True, False, True, True]),
        torch.tensor([[True, True], [False, True], [True, False], [False, False]]),
    )
    expected = inter_product_loss(query, positive, negatives, 0.1, mask=rows, positive_mask=rows, negative_mask=some)
    tensors = [query.clone(), positive.clone(), negatives.clone()]
    tensors[0][~rows], tensors[1][~rows], tensors[2][~some] = math.nan, math.nan, math.nan
    for tensor in tensors:
        tensor.requires_grad_()
    loss = inter_product_loss(*tensors, 0.1, mask=rows, positive_mask=rows, negative_mask=some)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert all(tensor.grad.isfinite().all() for tensor in tensors)


def test_order_of_the_batch_does_not_matter():
    query, positive, negatives, order = (
        unit(5, 8, seed=1), unit(5, 8, seed=2), unit(5, 2, 8, seed=3), torch.tensor([3, 0, 4, 1, 2]),
    )
    keys, negative_keys = torch.tensor([1, 1, 2, 3, 4]), torch.tensor([[3, 5], [6, 6], [5, 1], [7, 8], [2, 9]])
    loss = inter_product_loss(query, positive, negatives, 0.1, keys=keys, negative_keys=negative_keys, reduction="none")
    moved = inter_product_loss(
        query[order], positive[order], negatives[order], 0.1, keys=keys[order], negative_keys=negative_keys[order],
        reduction="none",
    )
    torch.testing.assert_close(moved, loss[order], rtol=0, atol=1e-12)


def test_weight_and_reduction():
    query, positive, weight = (
        unit(4, 8, seed=1), unit(4, 8, seed=2),
        torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True),
    )
    plain = inter_product_loss(query, positive, None, 0.1, reduction="none")
    weighted = inter_product_loss(query, positive, None, 0.1, weight=weight)
    torch.testing.assert_close(
        weighted, (plain * weight.detach()).sum() / 4
    )  # over the batch count, not over the sum of the weights
    assert not weighted.requires_grad  # the weight is a constant
    with pytest.raises(LabError, match="reduction"):
        inter_product_loss(query, positive, None, 0.1, reduction="sum")
    with pytest.raises(LabError, match="temperature"):
        contrastive_loss(query, positive, torch.eye(4, dtype=torch.bool), -1.0)


def test_low_precision_vectors_are_scored_in_float32():
    query, positive = unit(8, 64, seed=1).bfloat16(), unit(8, 64, seed=2).bfloat16()
    loss = inter_product_loss(query, positive, None, 0.05)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, inter_product_loss(query.float(), positive.float(), None, 0.05))


# ---- prefixes


def prefixes(dim, *tensors):
    "The first `dim` numbers of each, normalised, without the function under test."
    return [tensor[..., :dim] / tensor[..., :dim].pow(2).sum(-1, keepdim=True).sqrt() for tensor in tensors]


@pytest.mark.parametrize("per_row,in_batch,unique", itertools.product((1, 3), (True, False), (True, False)))
def test_prefixes_equal_brute_force(per_row, in_batch, unique):
    "The mean over the lengths, each with the same candidates."
    generator = torch.Generator().manual_seed(per_row)
    keys = torch.randint(0, 7, (6,), generator=generator)
    negative_keys = torch.randint(0, 7, (6, per_row), generator=generator)
    vectors = unit(6, 8, seed=1), unit(6, 8, seed=2), unit(6, per_row, 8, seed=3)
    expected = (
        sum(brute_force(*prefixes(d, *vectors), keys, negative_keys, 0.3, in_batch, unique) for d in (8, 3, 5)) / 3
    )
    loss = inter_product_loss(
        *vectors, 0.3, keys=keys, negative_keys=negative_keys, in_batch=in_batch, unique=unique, reduction="none",
        dims=(3, 5),
    )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    assert (
        loss - brute_force(*vectors, keys, negative_keys, 0.3, in_batch, unique)
    ).abs().max() > 1e-3  # they do count


@pytest.mark.parametrize("dims", ((1,), (2, 4), (1, 2, 3, 4, 5, 6, 7)))
def test_prefixes_that_know_nothing_give_the_log_of_the_number_of_candidates(dims):
    for value in (0.0, 1.0):
        vector = F.normalize(torch.full((1, 8), value, dtype=torch.float64), dim=-1)
        loss = inter_product_loss(vector.expand(5, 8), vector.expand(5, 8), vector.expand(5, 2, 8), 0.05, dims=dims)
        assert loss.item() == pytest.approx(math.log(15), abs=1e-9)
    assert (
        inter_product_loss(unit(4, 8, seed=1), unit(4, 8, seed=2), None, 0.05, in_batch=False, dims=dims).item() == 0.0
    )  # without negatives


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_no_prefixes_is_the_plain_loss_bit_for_bit(dtype):
    query, positive = (unit(6, 8, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    allowed = candidate_masks(6, 0, keys=torch.tensor([1, 1, 2, 3, 4, 5])).allowed
    plain = contrastive_loss(query, positive, allowed, 0.05)
    assert torch.equal(prefix_loss(query, positive, allowed, 0.05), plain)
    slopes = [
        torch.autograd.grad(loss, (query, positive))
        for loss in (
            plain.sum() / 6,
            inter_product_loss(query, positive, None, 0.05, keys=torch.tensor([1, 1, 2, 3, 4, 5]), dims=()),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(*slopes))


def test_gradcheck_of_prefixes():
    query, positive, negatives = (
        unit(*shape, seed=i).requires_grad_() for i, shape in enumerate(((3, 5), (3, 5), (3, 2, 5)))
    )
    options = {
        "keys": torch.tensor([1, 2, 2]), "negative_keys": torch.tensor([[3, 1], [4, 4], [5, 6]]),
        "weight": torch.tensor([0.3, 1.0, 0.9], dtype=torch.float64), "dims": (2, 3),
    }
    assert torch.autograd.gradcheck(lambda *v: inter_product_loss(*v, 0.5, **options), (query, positive, negatives))
    (slope,) = torch.autograd.grad(_truncated(query, 2).pow(3).sum(), query)
    assert (slope[:, 2:] == 0).all() and (slope[:, :2] != 0).any()


def test_a_prefix_of_zeros_stays_zero_and_its_gradient_is_small():
    rows = unit(3, 6, seed=1)
    rows[1, :2], rows[2, :2] = 0.0, 1e-9
    rows.requires_grad_()
    short = _truncated(rows, 2)
    assert (short[1] == 0).all() and short[2].abs().max() < 1e-6 and short[0].norm().item() == pytest.approx(1)
    (slope,) = torch.autograd.grad(inter_product_loss(rows, unit(3, 6, seed=2), None, 0.05, dims=(2,)), rows)
    assert slope.isfinite().all() and slope.abs().max() < 100


def test_masked_rows_may_hold_nan_with_prefixes():
    rows = torch.tensor([True, False, True, True])
    some = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    tensors = [unit(4, 8, seed=1), unit(4, 8, seed=2), unit(4, 2, 8, seed=3)]
    options = {"mask": rows, "positive_mask": rows, "negative_mask": some, "dims": (2, 4)}
    expected = inter_product_loss(*tensors, 0.1, **options).item()
    tensors[0][~rows], tensors[1][~rows], tensors[2][~some] = math.nan, math.nan, math.nan
    loss = inter_product_loss(*(tensor.requires_grad_() for tensor in tensors), 0.1, **options)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12) and all(tensor.grad.isfinite().all() for tensor in tensors)


def test_prefixes_of_low_precision_vectors_are_scored_in_float32():
    query, positive = unit(8, 64, seed=1).bfloat16(), unit(8, 64, seed=2).bfloat16()
    assert _truncated(query, 16).dtype == torch.float32
    torch.testing.assert_close(
        inter_product_loss(query, positive, None, 0.05, dims=(16,)),
        inter_product_loss(query.float(), positive.float(), None, 0.05, dims=(16,)),
    )


def test_prefixes_that_cannot_be_are_refused():
    for dim in (0, -1, 9):
        with pytest.raises(
            LabError, match=rf"a prefix of {dim} numbers from vectors of 8 \[matryoshka_dims\] -> 1 to 8"
        ):
            inter_product_loss(unit(4, 8, seed=1), unit(4, 8, seed=2), None, 0.1, dims=(4, dim))
    assert [fits_dim({"matryoshka_dims": [4, 8]}, dim, 64) for dim in (4, 8, 16, 64)] == [True, True, False, True]
    assert [fits_dim(info, 4, 64) for info in ({}, {"matryoshka_dims": None}, {"matryoshka_dims": []})] == [False] * 3


def recall_of_a_linear_encoder(dims, seed):
    """R@1 at the lengths 4, 8, 32, of products it never saw; a query repeats the first 8 of 32 numbers of its product
    well, the others badly.
    """
    generator = torch.Generator().manual_seed(seed)
    products, noise = torch.randn(512, 32, generator=generator), torch.tensor([0.1] * 8 + [1.0] * 24)
    matrix = (torch.randn(32, 32, generator=generator) / 32**0.5).requires_grad_()
    encode = lambda rows: F.normalize((rows + noise * torch.randn(rows.shape, generator=generator)) @ matrix, dim=1)
    optimizer = torch.optim.Adam([matrix], lr=0.03)
    for _ in range(100):
        batch = products[torch.randperm(256, generator=generator)[:32]]
        optimizer.zero_grad()
        inter_product_loss(encode(batch), encode(batch), None, 0.05, dims=dims).backward()
        optimizer.step()
    with torch.no_grad():
        query, item = encode(products[256:]), encode(products[256:])
        return [
            ((_truncated(query, d) @ _truncated(item, d).T).argmax(1) == torch.arange(256)).float().mean().item()
            for d in (4, 8, 32)
        ]


@pytest.mark.parametrize("seed", few(range(3), 0))
def test_trained_prefixes_find_more(seed):
    plain, nested = recall_of_a_linear_encoder((), seed), recall_of_a_linear_encoder((4, 8), seed)
    gain = [after - before for before, after in zip(plain, nested)]
    assert gain[0] > 0.3 and gain[1] > 0.2 and gain[2] > -0.05, (plain, nested)  # seen: +0.5, +0.4, +0.01


# ---- experts and objective weights


def test_permuting_the_experts_changes_nothing():
    order = torch.tensor([2, 0, 3, 1])
    alignment, routing, gates = (
        torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64).softmax(1),
        torch.randn(9, 4, dtype=torch.float64).softmax(1),
    )
    relative = torch.rand(5, dtype=torch.float64)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for mode in CHOICES["omega_mode"]:
        close(
            objective_weights(alignment[order], routing[:, order], mode=mode),
            objective_weights(alignment, routing, mode=mode),
        )
    close(sparsity_loss(alignment[order]), sparsity_loss(alignment))
    close(balance_loss(alignment[order], routing[:, order], relative), balance_loss(alignment, routing, relative))
    close(
        load_balance_loss(gates[:, order], gates[:, order].topk(2).indices),
        load_balance_loss(gates, gates.topk(2).indices),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 6.0))
def test_bounds_of_preference_sparsity_and_omega(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    alignment = scale * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    per_view = torch.randn(5, 4, generator=generator, dtype=torch.float64).mul(3).softmax(1)
    present = torch.rand(5, generator=generator) < 0.7
    torch.testing.assert_close(preference(alignment).sum(1), torch.ones(4, dtype=torch.float64))
    assert -1e-12 <= sparsity_loss(alignment).item() <= math.log(5) + 1e-12
    assert collective_support(alignment, per_view[:1].expand(5, 4)).sum().item() == pytest.approx(1)
    for mode, times_m in itertools.product(CHOICES["omega_mode"], (False, True)):
        omega = objective_weights(alignment, per_view, mode=mode, present=present, times_m=times_m)
        total, most = omega.sum().item(), 5 if times_m else 1
        assert (omega[~present] == 0).all() and (omega >= 0).all()
        assert 0 <= total <= 5 * most if mode == "faithful" else total == pytest.approx(most if present.any() else 0)
        if mode in ("floored", "balanced") and present.any():
            assert omega[present].min().item() >= 0.5 / int(present.sum()) * most - 1e-12


@pytest.mark.parametrize("mode", CHOICES["omega_mode"])
def test_uniform_preferences_give_equal_weights(mode):
    routing = torch.randn(5, 4).softmax(1)
    torch.testing.assert_close(objective_weights(torch.zeros(4, 5), routing, mode=mode), torch.full((5,), 0.2))
    assert sparsity_loss(torch.zeros(4, 5)).item() == pytest.approx(math.log(5))


# ---- hazards and cure

LEVELS = torch.tensor([3.0, 1.5, 1.0, 2.0, 2.0], dtype=torch.float64)
RELATIVE = LEVELS / math.log(32)


def descend(mode, router_learns, steps, seed=0, sparsity=0.01):
    "Plain gradient descent on W* and a router per view, rate 0.1, the losses fixed."
    generator = torch.Generator().manual_seed(seed)
    alignment, router = (
        (0.02 * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for shape in ((8, 5), (5, 8))
    )
    for _ in range(steps):
        routing = router.softmax(1) if router_learns else router.detach().softmax(1).mean(0, keepdim=True).expand(5, 8)
        loss = (objective_weights(alignment, routing, mode=mode) * LEVELS).sum() + sparsity * sparsity_loss(alignment)
        loss = loss + (balance_loss(alignment, routing, RELATIVE) if mode == "balanced" else 0)
        slopes = torch.autograd.grad(loss, (alignment, router), allow_unused=True)
        alignment, router = (
            (x if g is None else x - 0.1 * g).detach().requires_grad_() for x, g in zip((alignment, router), slopes)
        )
    routing = router.softmax(1) if router_learns else router.softmax(1).mean(0, keepdim=True).expand(5, 8)
    return objective_weights(alignment, routing, mode=mode).detach(), collective_support(
        alignment, routing
    ).sum().item()


def test_hazard_1_is_real_and_cured():
    omega, _ = descend("faithful", False, 1000)
    assert (
        omega.argmax() == 2
        and omega[2] > 0.8
        and omega_alarms(omega, 1.0) == [f"inter_mm holds {omega[2]:.2f} of the objective weight"]
    )
    omega, total = descend("balanced", False, 1000)
    assert omega.argmax() == 0 and omega_alarms(omega, total) == []
    torch.testing.assert_close(omega, 0.1 + 0.5 * balance_target(RELATIVE, 0.5), rtol=0, atol=0.01)


def test_hazard_2_is_real_and_cured():
    omega, total = descend("faithful", True, 1000)
    assert total < 0.5 and "sum to" in omega_alarms(omega, total)[-1]
    omega, total = descend("balanced", True, 1000)
    assert abs(total - 1) < 0.02 and omega_alarms(omega, total) == []


@pytest.mark.parametrize("seed", few(range(3), 0))
def test_balanced_reaches_its_closed_form_from_anywhere(seed):
    "Any start, any routing per view, the optimizer of the trainer: the printed omega goes to softmax(relative / tau)."
    generator = torch.Generator().manual_seed(seed)
    alignment = (2 * torch.randn(4, 5, generator=generator, dtype=torch.float64)).requires_grad_()
    routing = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(1)
    relative = torch.rand(5, generator=generator, dtype=torch.float64)
    optimizer = torch.optim.AdamW([alignment], lr=0.02, weight_decay=0.0)
    for _ in range(800):
        optimizer.zero_grad()
        balance_loss(alignment, routing, relative).backward()
        optimizer.step()
    torch.testing.assert_close(
        collective_support(alignment.detach(), routing), balance_target(relative, 0.5), rtol=0, atol=2e-3
    )


def test_balance_target_bounds_and_absent_objectives():
    extreme, tau = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]), 0.5
    target = balance_target(extreme, tau)
    assert target.max().item() == pytest.approx(math.exp(1 / tau) / (math.exp(1 / tau) + 4)) and target.max() < 0.8
    assert balance_target(1 - extreme, tau).min().item() == pytest.approx(1 / (1 + 4 * math.exp(1 / tau)))
    torch.testing.assert_close(
        balance_target(torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0]), tau), torch.full((5,), 0.2)
    )  # clipped: worse than chance is chance
    present = torch.tensor([True, False, True, True, True])
    target = balance_target(extreme, tau, present)
    assert target[1] == 0 and target.sum().item() == pytest.approx(0.8)
    alignment = torch.zeros(4, 5, requires_grad=True)
    routing = torch.full((5, 4), 0.25) * present[:, None]  # an absent objective has no routing
    balance_loss(alignment, routing, extreme, present=present).backward()
    assert alignment.grad.isfinite().all()


def test_omega_alarms_is_about_shares():
    assert omega_alarms(torch.tensor([5 * 0.81, 5 * 0.19, 0.0, 0.0, 0.0]), 1.0) == [
        f"{OBJECTIVES[0]} holds 0.81 of the objective weight"
    ]
    assert omega_alarms(torch.full((5,), 0.2), torch.tensor(1.0)) == []
    assert len(omega_alarms(torch.zeros(5), 0.0)) == 1
