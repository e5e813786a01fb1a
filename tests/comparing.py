"Two ways to encode the same triplets compared: embeddings, routing, every term of the objective, every gradient."
import torch
from moon2_lab.config import VIEWS
from moon2_lab.objective.objective import Moon2Objective
from moon2_lab.training.collate import collate, split_roles
from small import settings


def measured(encoder, triplets, forward, expanded="one", **config):
    "(ItemViews, terms of the objective, gradients by name)."
    items, keys = collate(triplets, expanded=expanded)
    keys.progress, keys.filter_active = 0.5, True
    found = forward(items)
    terms = Moon2Objective(settings(**config))(*split_roles(found, keys, encoder.alignment), keys)
    encoder.zero_grad()
    terms["loss"].backward()
    return found, terms, {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def distance(one, other):
    "The largest difference of two tensors; NaN must stand in the same places."
    assert one.shape == other.shape and torch.equal(one.isnan(), other.isnan())
    return torch.nan_to_num(one.detach().double() - other.detach().double()).abs().max().item() if one.numel() else 0.0


def assert_same(one, other, eps, gradient_eps=None, rows=None):
    "Embeddings, routing, all terms by name, all gradients by name."
    (found, terms, grads), (found_apart, terms_apart, grads_apart) = one, other
    for view in VIEWS:
        assert torch.equal(found.present[view], found_apart.present[view])
        assert distance(found.embedding[view], found_apart.embedding[view]) < eps, f"embedding {view}"
        assert distance(found.routing[view], found_apart.routing[view]) < eps, f"routing {view}"
    assert terms.keys() == terms_apart.keys() and {"aux", "sparsity", "loss"} <= terms.keys()
    far = {name: distance(terms[name], terms_apart[name]) for name in terms}
    assert max(far.values()) < eps, far
    assert grads.keys() == grads_apart.keys()
    scale = max(1.0, max(g.abs().max().item() for g in grads.values()))
    far = {name: distance(grads[name], grads_apart[name]) / scale for name in grads}
    assert max(far.values()) < (gradient_eps or eps), far
    assert (
        any("router" in name for name in grads)
        and "alignment" in grads
        and all(bool(g.isfinite().all()) for g in grads.values())
    )
