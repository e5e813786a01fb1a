"""Triplets and their sampler: what must never happen (a negative that is the positive, two of one product in a batch),
on made-up catalogues of every shape and on real ones."""

import itertools
import random
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
from choosing import few
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.label_noise import WRITTEN_NOISE, spoil
from moon2_lab.data.negatives import NegativeFinder, mutual_partners
from moon2_lab.data.products import Product
from moon2_lab.data.queries import Lexicon
from moon2_lab.data.sampler import TripletSampler
from moon2_lab.data.triplets import build_triplets, image_refs, triplets_from_products
from moon2_lab.errors import DataError, UsageError

COLOURS, KINDS = ("red", "blue", "green"), ("Mugs", "Bowls", "Chairs", "Lamps")


def picture(number):
    return ImageRef.from_pil(Image.new("RGB", (4, 4), (number % 256, number // 256, 7)))


def product(number, kind="Mugs", colour="red", title=None, **more):
    fields = {
        "title": title or f"Brand thing number {number}",
        "category_l1": "Home",
        "category_l2": "Things",
        "category_l3": kind,
    }
    fields |= {"attributes": {"colour": colour}, "refs": (picture(number),), "split": "train"}
    return Product(f"p{number:04d}", **(fields | more))


def shop(count=48):
    return Catalog.from_products([product(i, KINDS[i % 4], COLOURS[i // 4 % 3]) for i in range(count)])


@st.composite
def shops(draw):
    "Catalogues with shared titles, missing categories, attributes, titles and pictures."
    products = []
    for i in range(draw(st.integers(2, 24))):
        depth = draw(st.integers(0, 3))
        levels = dict(
            zip(
                ("category_l1", "category_l2", "category_l3"),
                ["Home", "Things", draw(st.sampled_from(KINDS))][:depth] + [None] * (3 - depth),
            )
        )
        shared = draw(st.integers(0, 3)) == 0
        what = draw(st.sampled_from(("both", "both", "text", "picture")))
        attributes = {"colour": draw(st.sampled_from(COLOURS))} if draw(st.booleans()) else {}
        products.append(
            product(i, title="Shared title here" if shared else None, **levels, attributes=attributes)
            if what == "both"
            else product(i, **levels, attributes=attributes, refs=())
            if what == "text"
            else replace(product(i, **levels, attributes=attributes), title=None)
        )
    return Catalog.from_products(products)


@settings(max_examples=60, deadline=None)
@given(shops(), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 5))
def test_a_negative_is_never_the_positive(catalog, variants, count, paired, seed):
    "Whatever the catalogue: keys differ, negatives have different keys, as many as can be, and every one is counted."
    keys = {p.key for p in catalog}
    if len(keys) < 2:
        with pytest.raises(DataError, match="no negatives"):
            build_triplets(catalog, variants=variants)
        return
    triplets = build_triplets(catalog, None, variants, count, seed, paired)
    for triplet in triplets:
        negatives = [other.key for other in triplet.negatives]
        assert triplet.key not in negatives and len(set(negatives)) == len(negatives) == min(count, len(keys) - 1)
        assert triplet.query.has_text or triplet.query.has_image
    taken = sum(len(t.negatives) for t in triplets) + count_of_no_query(triplets, count, keys)
    assert sum(triplets.counts[level] for level in NegativeFinder.LEVELS) == taken
    assert len(triplets) + triplets.counts["no_query"] == variants * len(catalog)
    assert len(image_refs(triplets)) <= (variants + 1) * len(catalog)


def count_of_no_query(triplets, count, keys):
    return triplets.counts["no_query"] * min(count, len(keys) - 1)


def test_hard_negatives_first():
    "Same deepest category and another colour where there is one; each fall-back is counted under its own name."
    triplets = build_triplets(shop(), variants=2)
    assert triplets.counts == {"different_attribute": 96}
    assert all(
        t.positive.category_l3 == t.negatives[0].category_l3 and t.positive.attributes != t.negatives[0].attributes
        for t in triplets
    )
    alone = Catalog.from_products([product(0, "Mugs"), product(1, "Bowls"), product(2, "Bowls")])
    counts = build_triplets(alone, variants=1).counts
    assert counts == {"category_l2": 1, "same_category": 2}
    nothing_known = Catalog.from_products(
        [replace(product(i), category_l1=None, category_l2=None, category_l3=None, attributes={}) for i in range(4)]
    )
    assert build_triplets(nothing_known, variants=1).counts == {"anything": 4}


def plain_find(finder, product, count, rng, levels):
    "The rule in its plainest form: each level's products from a random place on, and round."
    chosen, used = [], {product.key}
    for level, pool in levels:
        start = rng.randrange(len(pool) or 1)
        for other in pool[start:] + pool[:start]:
            if (
                len(chosen) < count
                and other.key not in used
                and (level != "different_attribute" or finder.differs(product, other))
            ):
                chosen.append(other)
                used.add(other.key)
        if len(chosen) == count:
            break
    return chosen


def plain_match(group, fits):
    "Pairs by the plainest rule: each with the first before it that fits; then two that are left take a pair apart."
    free, pairs, left = [], [], []
    for product in group:
        other = next((other for other in free if fits(product, other)), None)
        free = free + [product] if other is None else [one for one in free if one is not other]
        pairs += [] if other is None else [(product, other)]
    while len(free) > 1:
        one, two = free.pop(), free.pop()
        place = next((place for place, (a, b) in enumerate(pairs) if fits(one, a) and fits(two, b)), None)
        if place is None:
            left.append(one)
            free.append(two)
        else:
            pairs[place : place + 1] = [(one, pairs[place][0]), (two, pairs[place][1])]
    return pairs, left + free


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from((0, 0.05, 0.4)))
def test_negatives_and_partners_are_those_of_the_plain_rule(seed, count, shared):
    "The indices give what looking at everything gives, with any attributes, categories and shared keys."
    rng = random.Random(seed)
    values = {"colour": COLOURS, "material": ("clay", "wood"), "pattern": ("plain", "dotted")}
    products = []
    for i in range(count):
        path = ["Home", "Things", rng.choice("ab")][: rng.choice((0, 1, 3, 3, 3))]
        attributes = {name: rng.choice(choice) for name, choice in values.items() if rng.random() < 0.5}
        products.append(
            Product(
                f"p{i}",
                f"t{i}",
                None,
                *(path + [None] * (3 - len(path))),
                attributes,
                key=999 if rng.random() < shared else i,
            )
        )
    if len({product.key for product in products}) < 2:
        return
    finder = NegativeFinder(products)
    for product in products:
        found = finder.find(product, 3, random.Random(seed))
        levels = [(level, finder.pools[path]) for level, path in finder._levels(product)]
        assert found == plain_find(finder, product, 3, random.Random(seed), levels)
    wanted, groups, order = {}, {}, random.Random(seed).sample(products, len(products))
    for product in order:
        if product.category_l1:
            groups.setdefault((product.category_l1, product.category_l2, product.category_l3), []).append(product)
    for group in groups.values():
        pairs, left = plain_match(group, finder.differs)
        alike = [product for product in left if not any(finder.differs(product, other) for other in group)]
        for one, other in pairs + plain_match(alike, lambda a, b: a.key != b.key)[0]:
            wanted[one.product_id], wanted[other.product_id] = other, one
    assert mutual_partners(finder, random.Random(seed)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("attributes", [{}, {"colour": ("red", "blue")}], ids=["without attributes", "two colours"])
@pytest.mark.parametrize("kind", ["Mugs", None])
def test_negatives_and_batches_of_one_large_category_take_linear_time(kind, attributes):
    "Eight times the products, at most sixteen times the processor's time (it was sixty-four)."
    import time

    def seconds(count):
        level = {
            "category_l1": "Home" if kind else None,
            "category_l2": "Things" if kind else None,
            "category_l3": kind,
        }
        products = [
            Product(
                f"p{i}",
                f"thing {i}",
                **level,
                attributes={name: choice[i % 2] for name, choice in attributes.items()},
                key=i,
            )
            for i in range(count)
        ]
        start = time.process_time()
        triplets = triplets_from_products(Catalog(products), Lexicon(Catalog(products)), 2, 1, 0, paired=True)
        TripletSampler(triplets, 32, paired=True).batches(0)
        return time.process_time() - start

    small = min(seconds(2000) for _ in range(2))
    assert min(seconds(16_000) for _ in range(2)) < 16 * small


def test_brand_and_size_make_no_negative():
    "Two red mugs that differ in brand and size are not told apart by a query."
    same = Catalog.from_products(
        [product(i, attributes={"colour": "red", "Brand": f"b{i}", "size": str(i)}) for i in range(3)]
    )
    assert build_triplets(same, variants=1).counts == {"same_category": 3}


def test_same_seed_same_triplets():
    "Queries and negatives follow from catalogue, seed, product and variant."
    catalog = shop(24)
    first, again = (triplets_from_products(catalog, Lexicon(catalog), 2, 2, seed=4) for _ in range(2))
    assert [(t.query_id, t.query.text, [n.product_id for n in t.negatives]) for t in first] == [
        (t.query_id, t.query.text, [n.product_id for n in t.negatives]) for t in again
    ]
    other = triplets_from_products(catalog, Lexicon(catalog), 2, 2, seed=5)
    assert [t.negatives[0].product_id for t in first] != [t.negatives[0].product_id for t in other]


def test_partners_are_mutual_and_rest_is_ordinary():
    "Nine mugs: four pairs and one that stays alone."
    catalog = Catalog.from_products([product(i, colour=COLOURS[i % 3]) for i in range(9)])
    triplets = build_triplets(catalog, variants=1, paired=True)
    negative = {t.positive.product_id: t.negatives[0].product_id for t in triplets}
    assert sum(negative.get(other) == name for name, other in negative.items()) == 8
    assert len(triplets) == 9
    sampler = TripletSampler(triplets, 4, paired=True)
    assert (
        sampler.ledger["mutual_pairs"] == 3
    )  # one pair gives way: the lonely triplet would be the one dropped in every epoch
    assert len({t.query_id for epoch in range(8) for batch in sampler.batches(epoch) for t in batch}) == 9


def test_paired_batches_encode_half():
    "In a batch of mutual pairs every negative is a positive, too."
    triplets = build_triplets(shop(), variants=2, paired=True)
    for batch in TripletSampler(triplets, 8, paired=True).batches(0):
        assert len({p.product_id for t in batch for p in (t.positive, *t.negatives)}) == 8


def test_a_file_is_used_as_it_is():
    "Rows keep query, negatives and label; a negative with the positive's key is replaced, missing ones are found."
    catalog = shop(12)
    twin = replace(catalog[0], product_id="p9999", refs=())
    catalog = Catalog.from_products([*catalog, twin])
    rows = [
        ("q1", "a thing", None, "p0000", ["p9999", "p0004"], "pseudo_negative"),
        ("q2", None, None, "p0001", ["p0005", "p0009", "p0002"], None),
    ]
    log = pd.DataFrame(rows, columns=["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"])
    triplets = build_triplets(Catalog(catalog.products, triplets=log), negatives_per_query=2)
    assert [t.noise for t in triplets] == ["pseudo_negative", None]
    assert triplets[0].negatives[0].product_id == "p0004" and "p9999" not in [
        n.product_id for n in triplets[0].negatives
    ]
    assert [n.product_id for n in triplets[1].negatives] == ["p0005", "p0009"]
    assert triplets.counts["same_key_left_out"] == 1 and triplets.counts["filled_different_attribute"] == 1


def relevance_list(queries=20, answers=6, products=240):
    "A catalogue and its table: each query has several right answers; two queries each ask with equal words."
    catalog = shop(products)
    rows = [
        (f"q{q}", f"words of {q // 2}", None, f"p{(q * answers + a) % products:04d}", [], None)
        for q in range(queries)
        for a in range(answers)
    ]
    return Catalog(
        catalog.products,
        triplets=pd.DataFrame(
            rows, columns=["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"]
        ),
    )


def test_no_right_answer_is_a_negative():
    "Of the same query or of one with equal words: not filled in, masked in the batch, and kept apart."
    from moon2_lab.training.collate import collate

    catalog = relevance_list()
    right = {}
    for row in catalog.triplets.itertuples():
        right.setdefault(row.query_text, set()).add(catalog.product_key(row.positive_id))
    sampler = TripletSampler(build_triplets(catalog, negatives_per_query=2), 6)
    for batch in sampler.batches(0):
        keys = collate(batch)[1]
        columns = keys.positive.tolist() + keys.negative.flatten().tolist()
        for row, triplet in enumerate(batch):
            wanted = [key in right[triplet.query.text] for key in columns]
            assert keys.answers[0, row].tolist() == keys.answers[2, row].tolist() == wanted
            assert not any(wanted[len(batch) + 2 * row : len(batch) + 2 * row + 2])  # its own negatives
        assert len({triplet.query.text for triplet in batch}) == len(batch)
    assert build_triplets(shop(), variants=1)[0].answers is None


def test_right_answers_follow_the_triplets_that_are_trained_on():
    "A sampler reads them from its own list: a positive that was changed takes its place, the old one is free again."
    triplets = build_triplets(relevance_list(queries=2, answers=3))
    other = next(p for p in shop(240) if p.product_id == "p0100")
    changed = TripletSampler([replace(triplets[0], positive=other, query_key=other.key), *triplets[1:]], 2).triplets
    assert changed[1].answers[0] == triplets[1].answers[0] - {triplets[0].key} | {other.key}
    alone = TripletSampler([triplets[0], *build_triplets(shop(), variants=1)[20:]], 2).triplets
    assert alone[0].answers is None


def test_a_negative_that_the_table_calls_right_is_left_out():
    "A contradiction within the file: the row's negative is a positive of the same query elsewhere."
    rows = [
        ("q1", "mug", None, "p0000", ["p0004", "p0001"], None),
        ("q1", "mug", None, "p0004", ["p0000"], None),
        ("q2", " MUG ", None, "p0008", ["p0000", "p0004"], None),
    ]
    log = pd.DataFrame(rows, columns=["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"])
    triplets = build_triplets(Catalog(shop(24).products, triplets=log))
    right = {t.key for t in triplets}
    assert [len(t.negatives) for t in triplets] == [1, 1, 1]
    assert not any(n.key in right for t in triplets for n in t.negatives)
    assert triplets[0].negatives[0].product_id == "p0001" and triplets.counts["answers_left_out"] == 4


def test_a_split_without_rows_is_made_from_its_products():
    "A file that says nothing about this split does not leave it empty."
    catalog = shop(12)
    empty = pd.DataFrame(columns=["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"])
    assert build_triplets(Catalog(catalog.products, triplets=empty), variants=1).source == "products"


def test_what_cannot_be_done_says_so():
    "Nothing to train on, nothing to tell apart, too few for a batch, an odd batch of pairs."
    one = Catalog.from_products([product(0)])
    with pytest.raises(DataError, match="no products"):
        build_triplets(Catalog([]))
    with pytest.raises(DataError, match="no usable product in split 'test'"):
        build_triplets(shop().split("test"))
    for catalog in (one, Catalog.from_products([product(0, title="Same"), product(1, title="same ")])):
        with pytest.raises(DataError, match="no negatives"):
            build_triplets(catalog)
    triplets = build_triplets(shop(12), variants=1)
    with pytest.raises(DataError, match="do not fill one batch"):
        TripletSampler(triplets, 13)
    with pytest.raises(UsageError, match="even number"):
        TripletSampler(triplets, 3, paired=True)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_injected_noise_is_what_its_label_says(share):
    "Pseudo positives are of another category, pseudo negatives of the same; the share is exact."
    clean = build_triplets(shop(), variants=2)
    noisy = spoil(clean, share, WRITTEN_NOISE, seed=2)
    counts = Counter(t.noise for t in noisy)
    assert counts["pseudo_positive"] + counts["pseudo_negative"] == round(share * 96)
    assert abs(counts["pseudo_positive"] - counts["pseudo_negative"]) <= 1
    for before, after in zip(clean, noisy):
        assert after.key not in {n.key for n in after.negatives}
        if after.noise == "pseudo_positive":
            assert (
                after.positive.category_l3 != before.positive.category_l3
                and after.query == before.query
                and after.query_key == after.key
            )
        elif after.noise == "pseudo_negative":
            assert (
                after.negatives[0].attributes == before.positive.attributes
                and after.negatives[0].category_l3 == before.positive.category_l3
            )
        else:
            assert after == before


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(4, 12), st.integers(1, 12), st.booleans())
def test_batches_avoid_equal_keys(seed, half, batches, repeated, paired):
    "One product listed up to once a batch (pairs: every second batch): kept apart; nothing is lost or doubled."
    size = 2 * half
    repeated = min(repeated, batches // 2 if paired else batches)
    products = [
        product(i, KINDS[i % 2], COLOURS[i % 3], title="Listed again" if i < repeated else None)
        for i in range(size * batches)
    ]
    triplets = build_triplets(Catalog.from_products(products), variants=1, seed=seed, paired=paired)
    sampler = TripletSampler(triplets, size, seed, paired)
    epoch = sampler.batches(3)
    assert [len(batch) for batch in epoch] == [size] * batches
    assert Counter(t.query_id for batch in epoch for t in batch) == Counter(t.query_id for t in triplets)
    assert sampler.ledger["left"] == sum(size - len({t.key for t in batch}) for batch in epoch) == 0
    assert [[t.query_id for t in batch] for batch in sampler.batches(3)] == [
        [t.query_id for t in batch] for batch in epoch
    ]


def test_what_cannot_be_avoided_is_counted():
    "Two of three products are one: in a batch of six there are three too many of it at least."
    products = [
        product(i, KINDS[i % 4], COLOURS[i // 4 % 3], title="Listed again" if i % 3 else None) for i in range(36)
    ]
    for paired in (False, True):
        sampler = TripletSampler(
            build_triplets(Catalog.from_products(products), variants=1, paired=paired), 6, paired=paired
        )
        surplus = sum(6 - len({t.key for t in batch}) for batch in sampler.batches(0))
        assert sampler.ledger["left"] == surplus >= 18


def test_resume_gives_the_batches_that_were_left():
    "Stopped anywhere, also at the end of an epoch, a sampler goes on as if nothing had happened."
    triplets = build_triplets(shop(), variants=1)
    names = [[t.query_id for t in batch] for batch in itertools.islice(TripletSampler(triplets, 8, seed=9), 14)]
    assert names[:6] != names[6:12]
    for stop in (0, 1, 5, 6, 7, 12):
        sampler = TripletSampler(triplets, 8, seed=9)
        list(itertools.islice(sampler, stop))
        resumed = TripletSampler(triplets, 8, seed=9)
        resumed.load_state_dict(sampler.state_dict())
        assert [[t.query_id for t in batch] for batch in itertools.islice(resumed, 14 - stop)] == names[stop:]
    with pytest.raises(UsageError, match="another seed"):
        TripletSampler(triplets, 8, seed=1).load_state_dict(sampler.state_dict())
    with pytest.raises(UsageError, match="another triplets"):
        TripletSampler(triplets[::-1], 8, seed=9).load_state_dict(sampler.state_dict())


def test_each_photo_of_a_product_asks():
    "Several photos of a product are real queries; the product with one photo asks with photo views."
    one, several, third = (
        Product(f"p{n}", f"red mug no {n}", refs=tuple(picture(10 * n + k) for k in range(count)))
        for n, count in enumerate((1, 5, 1))
    )
    catalog = Catalog.from_products([one, several, third])
    made = triplets_from_products(catalog, Lexicon(catalog), variants=2)
    asked = {
        name: [t.query.image.key for t in made if t.positive.product_id == name]
        for name in (one.product_id, several.product_id)
    }
    assert (
        {ref.key for ref in several.refs[1:]} <= set(asked[several.product_id])
        and len(asked[several.product_id]) == 8
        and len(asked[one.product_id]) == 2
    )
    assert all(t.positive.item().image == several.refs[0] for t in made if t.positive.product_id == several.product_id)


def test_pictures_are_bounded():
    "However many epochs: K query pictures and the main picture of each product."
    triplets = build_triplets(shop(), variants=4)
    assert len(image_refs(triplets)) == 5 * 48


@pytest.mark.data
@pytest.mark.parametrize("name", few(["fashion-product-images", "ikea-home", "flipkart-general"], "flipkart-general"))
def test_real_catalogue(data_root, name):
    "No equal keys anywhere, nearly all negatives hard, and no clash left in a batch of 32."
    catalog = Catalog.load(data_root / name)
    triplets = build_triplets(catalog.split("train"), Lexicon(catalog), variants=2, paired=True)
    assert all(t.key not in {n.key for n in t.negatives} for t in triplets)
    hard = triplets.counts["different_attribute"] + triplets.counts["same_category"]
    assert hard > (0.95 if name.startswith("fashion") else 0.6) * len(triplets)
    sampler = TripletSampler(triplets, 32, paired=True)
    assert all(len({t.key for t in batch}) == 32 for batch in sampler.batches(0))
    assert sampler.ledger["left"] == 0
    partner = mutual_partners(NegativeFinder(catalog.split("train")), random.Random(0))
    assert all(partner[other.product_id].product_id == mine for mine, other in partner.items())
