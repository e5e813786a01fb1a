"""Every variant trains on the committed sample, for real steps of a tiny encoder; what leaves a view out still learns.
"""
import math
from dataclasses import replace

import pytest
import torch
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import UsageError
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective.recipes import DenseObjective, RIVALS, mixed_queries
from moon2_lab.studies.ablation import chosen_products
from moon2_lab.studies.variants import VARIANTS, find_variant, same_as, variant_parts
from moon2_lab.training.trainer import Trainer
from small import settings, shop

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def sample(root):
    "The committed sample."
    return Catalog.load(root / "data" / "sample")


def trainer_of(name, catalog, config, products=24):
    "A trainer of a variant before its first step."
    own, objective, triplets = variant_parts(find_variant(name), chosen_products(catalog, products), config)
    fields = own.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=own.seed, **fields)
    return Trainer(encoder, catalog, own, objective=objective, triplets=triplets)


@pytest.mark.parametrize("name", [*VARIANTS, "mix-1-1-1", "Z-3"])
def test_a_variant_trains(sample, name):
    trainer = trainer_of(name, sample, settings(max_steps=2))
    before = {n: p.detach().clone() for n, p in trainer.encoder.named_parameters() if p.requires_grad}
    history = trainer.train()
    assert len(history) == 2 and history.loss.map(math.isfinite).all() and (history.skipped == 0).all()
    assert (history.loss > 0).all() and (history.grad_norm > 0).all()
    after = dict(trainer.encoder.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("name", ["full", "no-alignment", "mix-12-3-2", "dense", "gcl", "hardness", "agcl"])
def test_products_that_lack_a_title_or_a_picture_do_no_harm(name):
    catalog = shop(40, mixed=True)
    history = trainer_of(name, catalog, settings(max_steps=3), products=30).train()
    assert history.loss.map(math.isfinite).all() and (history.skipped == 0).all()


def test_the_fixed_mix_asks_in_one_view(sample):
    _, _, triplets = variant_parts(find_variant("mix-12-3-2"), chosen_products(sample, 24), settings())
    views = [(t.query.has_text, t.query.has_image) for t in triplets]
    assert {(False, True), (True, False)} <= set(views)
    assert views.count((False, True)) > views.count((True, False)) > 0
    _, _, other = variant_parts(find_variant("mix-12-3-2"), chosen_products(sample, 24), settings(seed=1))
    assert views != [(t.query.has_text, t.query.has_image) for t in other]  # another seed draws otherwise


def test_a_mix_is_the_same_whatever_else_is_in_the_list(sample):
    _, _, triplets = variant_parts(find_variant("full"), chosen_products(sample, 24), settings())
    alone = [mixed_queries([triplet])[0].query for triplet in triplets]
    assert alone == [triplet.query for triplet in mixed_queries(triplets)]


def test_one_registry_with_the_rivals(monkeypatch, sample):
    monkeypatch.setitem(RIVALS, "mine", replace(RIVALS["dense"], title="mine"))
    assert VARIANTS["mine"].title == "mine" and find_variant("mine") is RIVALS["mine"]
    assert same_as("mine", ["dense"], settings(), False) == ("dense", "these are its settings")
    monkeypatch.setitem(RIVALS, "mine", replace(RIVALS["mine"], objective=lambda config: DenseObjective(0.1)))
    assert same_as("mine", ["dense"], settings(), False) is None
    with pytest.raises(UsageError, match="nearest: no-filter"):
        find_variant("no-filtr")


def test_the_part_of_a_catalogue_keeps_its_triplets(sample):
    "A catalogue with triplets.parquet is trained on those of the chosen products."
    part = chosen_products(sample, 24)
    assert part.triplets is not None and len(part) == 24
    assert set(part.triplets.positive_id) <= {product.product_id for product in part}
    _, _, triplets = variant_parts(find_variant("full"), part, settings())
    assert triplets.source == "triplets.parquet" and len(triplets) == len(part.triplets)
