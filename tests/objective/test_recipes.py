"""The rival objectives against brute force: random batches, missing views, equal keys, other right answers."""
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from moon2_lab.config import TrainConfig, VIEWS
from moon2_lab.data.products import Product
from moon2_lab.objective.objective import TripletKeys, TripletRouting, TripletViews
from moon2_lab.objective.recipes import (
    AllViewsObjective, AttributeObjective, AttributeOverlap, HardnessObjective, MixedObjective, QueryObjective,
)

NO_ROUTING = TripletRouting({}, None, [])
PLAIN = TrainConfig(filter=False)


def batch(rows=5, per_row=2, seed=0, lacking=0.3):
    "Random float64 views (leaves), some missing (NaN), and keys of which some are equal."
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q": (rows,), "p": (rows,), "n": (rows, per_row)}
    embedding, present = {}, {}
    for role, shape in shapes.items():
        has = {v: torch.rand(shape, generator=generator) > lacking for v in "ti"}
        has["t"] |= ~has["i"]  # everything is something
        both = has["t"] & has["i"]
        present[role] = has | {"mm": both if role == "q" else torch.ones(shape, dtype=torch.bool)}
        embedding[role] = {}
        for view in VIEWS:
            vectors = F.normalize(torch.randn(*shape, 6, generator=generator, dtype=torch.float64), dim=-1)
            embedding[role][view] = torch.where(present[role][view][..., None], vectors, math.nan).requires_grad_()
    keys = torch.randint(0, 4, (rows,), generator=generator)
    negative = torch.randint(3, 9, (rows, per_row), generator=generator)
    exist = torch.rand(rows, per_row, generator=generator) > 0.2
    return TripletViews(embedding, present), TripletKeys(keys, keys, negative, exist)


def columns(views, keys):
    "(vector, key, exists) of the multimodal candidates: positives, then negatives row by row."
    found = [(views.embedding["p"]["mm"][b], int(keys.positive[b]), True) for b in range(len(keys.positive))]
    for b in range(len(keys.positive)):
        for k in range(keys.negative.shape[1]):
            vector = views.embedding["n"]["mm"][b, k]
            found.append((vector, int(keys.negative[b, k]), bool(keys.negative_mask[b, k])))
    return found


def brute_force(views, keys, b, query, log_weight=lambda column, score: 0.0, left_out=lambda column: False):
    "The weighted loss of one row, candidate by candidate; each product counts once, the row's own negatives first."
    per_row, rows = keys.negative.shape[1], len(keys.positive)
    own = [rows + b * per_row + k for k in range(per_row)]
    order = [*own, *(c for c in range(rows + rows * per_row) if c not in own)]
    all_columns, seen = columns(views, keys), set()
    terms = [query @ all_columns[b][0] / 0.05]
    for column in order:
        vector, key, exists = all_columns[column]
        if column == b or not exists or key == int(keys.positive[b]) or key in seen:
            continue
        seen.add(key)
        if not left_out(column):
            score = query @ vector
            terms.append(score / 0.05 + log_weight(column, score))
    return torch.stack(terms).logsumexp(0) - terms[0]


def by_rows(views, keys, view, **how):
    "The mean of the rows whose query has the view."
    has = views.present["q"][view]
    rows = [brute_force(views, keys, b, views.embedding["q"][view][b], **how) for b in range(len(has)) if has[b]]
    return torch.stack(rows).mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_plain_loss_of_query_views(seed):
    views, keys = batch(seed=seed)
    terms = QueryObjective(PLAIN)(views, NO_ROUTING, keys)
    for view in VIEWS:
        if views.present["q"][view].any():
            torch.testing.assert_close(terms[f"inter_{view}"], by_rows(views, keys, view), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_hardness(seed):
    views, keys = batch(seed=seed)
    terms = HardnessObjective(PLAIN, alpha=4.0)(views, NO_ROUTING, keys)
    wanted = by_rows(views, keys, "t", log_weight=lambda column, score: 4.0 * score.detach())
    torch.testing.assert_close(terms["inter_t"], wanted, rtol=0, atol=1e-5)
    leaf = views.embedding["p"]["mm"]
    grads = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (terms["inter_t"], wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_attribute_weights_and_the_mask(seed):
    views, keys = batch(seed=seed)
    look = lambda k: {"colour": ("red", "blue", "green")[k % 3], "use": f"use{k % 2}"}
    products = [Product(f"p{k}", "a", attributes=look(k), key=k) for k in range(9)]
    overlap = AttributeOverlap(products)(torch.arange(9), torch.arange(9)).double()
    objective = AttributeObjective(PLAIN, delta=0.3).with_products(products)
    of = [key for _, key, _ in columns(views, keys)]
    weight = lambda b: lambda column, score: 1 + overlap[int(keys.positive[b]), of[column]].tanh()
    near = lambda b: lambda column: bool(
        views.embedding["p"]["mm"][b].detach() @ columns(views, keys)[column][0].detach() > 0.3
    )
    for progress, mask in ((0.0, lambda b: lambda column: False), (0.5, near)):
        terms = objective(views, NO_ROUTING, replace(keys, progress=progress))
        asked = views.present["q"]["t"].nonzero().flatten().tolist()
        query = views.embedding["q"]["t"]
        rows = [brute_force(views, keys, b, query[b], weight(b), mask(b)) for b in asked]
        torch.testing.assert_close(terms["inter_t"], torch.stack(rows).mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_all_views_against_all(seed):
    views, keys = batch(seed=seed)
    embedding, present = views.embedding["p"], views.present["p"]
    complete = (present["t"] & present["i"]).nonzero().flatten().tolist()
    if not complete:
        return
    terms = AllViewsObjective(0.05)(views, NO_ROUTING, keys)
    for anchor in VIEWS:
        for target in VIEWS:
            if anchor == target:
                continue
            rows = []
            for b in complete:
                rivals = [
                    embedding[v][j] for v in VIEWS for j in range(len(keys.positive))
                    if present[v][j] and keys.positive[j] != keys.positive[b]
                ]
                scores = torch.stack([embedding[target][b], *rivals]).float() @ embedding[anchor][b].float() / 0.05
                rows.append(scores.logsumexp(0) - scores[0])
            torch.testing.assert_close(terms[f"{anchor}_to_{target}"], torch.stack(rows).mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_the_fixed_mix_asks_each_query_as_what_it_has(seed):
    views, keys = batch(seed=seed)
    terms, rows = MixedObjective(PLAIN)(views, NO_ROUTING, keys), []
    for b in range(len(keys.positive)):
        has = [view for view in ("mm", "i", "t") if views.present["q"][view][b]]
        rows.append(brute_force(views, keys, b, views.embedding["q"][has[0]][b]))
    torch.testing.assert_close(terms["mix"], torch.stack(rows).mean(), rtol=0, atol=1e-10)


MAKERS = [
    lambda: AllViewsObjective(), lambda: MixedObjective(PLAIN), lambda: HardnessObjective(PLAIN),
    lambda: AttributeObjective(PLAIN), lambda: QueryObjective(PLAIN),
]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_missing_reaches_no_gradient(make):
    views, keys = batch(seed=3)
    loss = make()(views, NO_ROUTING, replace(keys, progress=0.5))["loss"]
    loss.backward()
    assert loss.isfinite()
    for role, rows in views.embedding.items():
        for view, vectors in rows.items():
            if vectors.grad is not None:
                assert vectors.grad.isfinite().all(), (role, view)
                assert (vectors.grad[~views.present[role][view]] == 0).all(), (role, view)


@pytest.mark.parametrize("make", MAKERS[1:])
def test_other_right_answers_are_no_negatives(make):
    views, keys = batch(seed=1, lacking=0.0)
    keys = replace(keys, positive=torch.arange(5), query=torch.arange(5), negative=5 + torch.arange(10).view(5, 2))
    keys.negative_mask[:] = True
    all_answers = torch.ones(3, 5, 15, dtype=torch.bool)
    assert make()(views, NO_ROUTING, replace(keys, answers=all_answers))["loss"].abs() < 1e-9  # nobody is left
    assert make()(views, NO_ROUTING, keys)["loss"] > 1e-3
