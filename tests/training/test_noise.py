"""Noise on purpose and what phi finds of it: labels that are true, an AUC that agrees with scikit-learn, a watch that
does not disturb the run.
"""
import dataclasses
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from moon2_lab.data.catalog import Catalog
from moon2_lab.data.label_noise import inject_noise
from moon2_lab.data.negatives import category_path
from moon2_lab.data.queries import Lexicon
from moon2_lab.data.triplets import build_triplets
from moon2_lab.errors import UsageError
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective.objective import batch_masks
from moon2_lab.training.collate import collate
from moon2_lab.training.noise_watch import FilterWatch, auc, filter_auc, triplet_gaps
from moon2_lab.training.trainer import Trainer
from small import product, settings, shop, tiny

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def catalog():
    return shop(60)


@pytest.fixture(scope="module")
def clean(catalog):
    return build_triplets(catalog, Lexicon(catalog), variants=2)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 1.0])
def test_the_labels_are_true(catalog, clean, share):
    """The share is exact, the kinds are equal in number, the queries stay; pseudo positives are other products, half of
    them of the same finest category.
    """
    noisy = inject_noise(clean, share, Lexicon(catalog), seed=3)
    counts = Counter(triplet.noise for triplet in noisy)
    assert (
        counts["pseudo_positive"] + counts["pseudo_negative"] == round(share * len(clean))
        and abs(counts["pseudo_positive"] - counts["pseudo_negative"]) <= 1
    )
    alike = 0
    for before, after in zip(clean, noisy, strict=True):
        assert after.query == before.query and after.query_id == before.query_id
        if after.noise == "pseudo_positive":
            assert (
                after.key not in {before.key, *(other.key for other in before.negatives)}
                and after.query_key == after.key
                and after.negatives == before.negatives
            )
            alike += category_path(after.positive) == category_path(before.positive)
        elif after.noise == "pseudo_negative":
            assert (
                after.positive == before.positive
                and after.negatives[0].product_id == f"{before.positive.product_id}:again"
            )
            assert (
                after.negatives[0].title != before.positive.title
                and after.negatives[0].refs[0].key != before.positive.refs[0].key
            )
        else:
            assert after == before
    assert share < 0.5 or 0.3 * counts["pseudo_positive"] < alike < 0.85 * counts["pseudo_positive"]


def test_another_listing_is_the_negative_where_there_is_one(catalog):
    "Two listings of one product: each is the other's pseudo negative."
    doubled = Catalog.from_products(
        [*catalog, *(dataclasses.replace(one, product_id=one.product_id + "b") for one in catalog)]
    )
    lexicon = Lexicon(doubled)
    for triplet in inject_noise(build_triplets(doubled, lexicon, variants=1), 0.4, lexicon):
        if triplet.noise == "pseudo_negative":
            other = triplet.negatives[0].product_id
            assert other != triplet.positive.product_id and doubled.get(other).key == triplet.key


def test_no_mask_gives_it_away(catalog, clean):
    "A pseudo negative counts as a negative of its query: its key is no product's, and no two share one."
    noisy = [triplet for triplet in inject_noise(clean, 0.5, Lexicon(catalog)) if triplet.noise == "pseudo_negative"]
    assert (
        len({triplet.negatives[0].key for triplet in noisy}) == len(noisy)
        and max(triplet.negatives[0].key for triplet in noisy) < -1
    )
    _, keys = collate(noisy[:6])
    masks = batch_masks(keys)
    assert masks.allowed[:, 6:].diagonal().all()


@examples(max_examples=80, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.integers(-5, 5), min_size=1, max_size=30))
def test_auc_agrees_with_scikit_learn(spoilt, clean):
    from sklearn.metrics import roc_auc_score

    expected = roc_auc_score([1] * len(spoilt) + [0] * len(clean), [-gap for gap in spoilt + clean])
    assert auc(np.array(spoilt), np.array(clean)) == pytest.approx(expected)


def test_the_interval_of_auc_draws_product_keys():
    """Twelve triplets of each product say no more than one: as wide as without the copies, where triplets drawn one by
    one would be far too sure.
    """
    rng = np.random.default_rng(0)
    gaps = pd.DataFrame({"key": np.arange(60), "noise": [None, "pseudo_positive"] * 30}).assign(
        **{f"{kind}_{view}": rng.normal(size=60) for kind in ("gap", "random") for view in ("t", "i", "mm")}
    )
    copies = gaps.loc[gaps.index.repeat(12)].reset_index(drop=True)
    alone, together, naive = (
        filter_auc(table).iloc[0] for table in (gaps, copies, copies.assign(key=np.arange(len(copies))))
    )
    assert together.auc == pytest.approx(alone.auc) and (together.lo, together.hi) == pytest.approx(
        (alone.lo, alone.hi)
    )
    assert naive.hi - naive.lo < 0.5 * (alone.hi - alone.lo)
    assert np.isnan(filter_auc(gaps, resamples=0).lo).all()


def test_gaps_are_what_the_loss_compares(catalog, clean):
    "By hand, one triplet at a time, several negatives, views that are missing."
    mixed = shop(60, mixed=True)
    triplets = inject_noise(
        build_triplets(mixed, Lexicon(mixed), variants=1, negatives_per_query=2), 0.3, Lexicon(mixed)
    )[:20]
    encoder = tiny(perturbed=True).eval()
    gaps = triplet_gaps(encoder, triplets)
    for row, triplet in zip(gaps.itertuples(), triplets, strict=True):
        products = encoder.encode([triplet.positive.item(), *(other.item() for other in triplet.negatives)], "mm")
        views = {
            "t": triplet.query.has_text, "i": triplet.query.has_image,
            "mm": triplet.query.has_text and triplet.query.has_image,
        }
        for view, there in views.items():
            if there:
                scores = products @ encoder.encode([triplet.query], view)[0]
                assert getattr(row, f"gap_{view}") == pytest.approx(scores[0] - scores[1:].max(), abs=1e-5)
            else:
                assert np.isnan(getattr(row, f"gap_{view}"))
    assert gaps.gap_mm.isna().any() and gaps.gap_mm.notna().any()
    assert triplet_gaps(encoder, triplets).equals(gaps)


def test_second_looks_of_one_product_are_measured_each_with_its_own_picture(catalog, clean):
    "They share an id; alone and together they must have the same gap."
    noisy = [triplet for triplet in inject_noise(clean, 1.0, Lexicon(catalog)) if triplet.noise == "pseudo_negative"]
    shared = [
        triplet
        for triplet in noisy
        if sum(other.negatives[0].product_id == triplet.negatives[0].product_id for other in noisy) == 2
    ]
    assert len(shared) >= 4
    encoder = tiny(perturbed=True).eval()
    together, alone = (
        triplet_gaps(encoder, shared).gap_mm, [triplet_gaps(encoder, [triplet]).gap_mm[0] for triplet in shared],
    )
    assert together.to_list() == pytest.approx(alone, abs=1e-5)


def test_a_spoilt_triplet_is_no_longer_trusted(catalog, clean):
    noisy = inject_noise([dataclasses.replace(triplet, trusted=True) for triplet in clean], 0.3, Lexicon(catalog))
    assert {triplet.trusted for triplet in noisy if triplet.noise} == {False} and all(
        triplet.trusted for triplet in noisy if not triplet.noise
    )


def test_a_perfect_encoder_finds_all(catalog, clean):
    """An encoder that knows the product behind every text and picture: the gap of a pseudo positive is negative, that
    of a pseudo negative 0.
    """
    noisy = inject_noise(clean, 0.4, Lexicon(catalog), seed=1)
    names = {one.product_id: place for place, one in enumerate(catalog)}

    class Knowing:
        def encode(self, items, view="mm"):
            return np.eye(len(names), dtype=np.float32)[[names[item.item_id.split(":")[0]] for item in items]]

        def encode_views(self, items):
            return {view: self.encode(items) for view in ("t", "i", "mm")}

    table = filter_auc(triplet_gaps(Knowing(), noisy), resamples=20)
    assert (
        (table.auc == 1.0).all()
        and (table.lo == 1.0).all()
        and set(table.spoilt) == {24}
        and set(table.clean) == {len(noisy) - 48}
    )


def test_the_trainer_spoils_what_it_is_told_to(catalog):
    trainer = Trainer(tiny(), catalog, settings(noise=0.25, max_steps=3))
    assert sum(bool(triplet.noise) for triplet in trainer.triplets) == round(0.25 * len(trainer.triplets))
    assert np.isfinite(trainer.train().loss).all() and not any(
        triplet.noise for triplet in Trainer(tiny(), catalog, settings()).triplets
    )
    with pytest.raises(UsageError, match="between 0 and 1"):
        settings(noise=2)


def test_watching_changes_nothing(catalog):
    "Measured at every tenth, spoilt triplets first; the weights are those of a run without a watch."
    def run(watched):
        trainer = Trainer(tiny(), catalog, settings(noise=0.3, max_steps=20))
        watch = FilterWatch(trainer, most=40)
        trainer.callbacks += [watch] if watched else []
        trainer.train()
        return trainer.encoder.fingerprint, watch

    (plain, _), (looked_at, watch) = run(False), run(True)
    assert plain == looked_at
    table = watch.table()
    assert sorted(set(table.progress)) == [round(0.1 * tenth, 3) for tenth in range(1, 11)]
    assert sum(bool(triplet.noise) for triplet in watch.triplets) == 20 and len(watch.triplets) == 40


@pytest.mark.slow
def test_phi_is_not_blind_after_training():
    """A short run of the tiny backbone on 200 drawn shapes. Untrained it sees much of the noise already, since words
    and photos of a product are near each other in any space; what a run learns by heart it no longer finds.
    """
    catalog = shop(200)
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=32, visual_tokens=4)
    trainer = Trainer(
        encoder, catalog,
        settings(
            noise=0.2, max_steps=120, per_device_train_batch_size=16, learning_rate=2e-3, connector_learning_rate=2e-3
        ),
    )
    tables = [
        filter_auc(triplet_gaps(encoder.eval(), trainer.triplets), resamples=0)
        .set_index(["noise", "negatives", "view"])
        .auc
    ]
    trainer.train()
    tables.append(
        filter_auc(triplet_gaps(encoder.eval(), trainer.triplets), resamples=0)
        .set_index(["noise", "negatives", "view"])
        .auc
    )
    for kind, least in (("pseudo_positive", 0.65), ("pseudo_negative", 0.9)):
        print(
            f"\n{kind}: {tables[0][kind, 'random', 'mm']:.3f} untrained, {tables[1][kind, 'random', 'mm']:.3f} trained"
        )
        assert tables[1][kind, "random", "mm"] > least


def test_no_product_but_one(catalog):
    "Where no other product is left to be a pseudo positive, only pseudo negatives are made."
    lonely = Catalog.from_products([product(1), product(2)])
    noisy = inject_noise(build_triplets(lonely, Lexicon(lonely), variants=2), 1.0, Lexicon(lonely))
    assert {triplet.noise for triplet in noisy} == {"pseudo_negative"}
