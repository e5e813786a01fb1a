"""The direction dual->mm, written a second time as plainly as it reads, and its counts on real catalogues."""
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest
from choosing import slow
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moon2_lab.config import DUAL
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Product
from moon2_lab.data.words import fold, words
from moon2_lab.evaluation.dual_evidence import Visibility, dual_direction
from moon2_lab.evaluation.evaluate import run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.evaluation.ranking import hit_at

PICTURE = ImageRef.from_pil(Image.new("RGB", (8, 8), "red"))


def plain_dual(catalog, products):
    "query text -> ids of the right products, for titles in scripts with blanks."
    split = lambda cell: [part.strip() for part in (cell or "").split("|") if part.strip()]
    folded = lambda text: [fold(word) for word in words(text or "")]
    times = Counter((n, v) for p in catalog for n, cell in p.attributes.items() for v in set(split(cell)))
    often = {pair for pair, count in times.items() if count >= 20}
    seen = lambda name: any(
        part in name.lower() for part in "colour color pattern material shape sleeve neck style".split()
    )
    unasked = {
        "brand", "series", "model", "season", "year", "size", "model name", "model number", "model id", "shop_title",
    }
    deepest = lambda p: [(i, c) for i, c in enumerate((p.category_l1, p.category_l2, p.category_l3)) if c][-1:]
    asked = {}
    for p in products:
        visible = [(n, v) for n in p.attributes for v in split(p.attributes[n]) if seen(n) and (n, v) in often]
        if not visible or not deepest(p):
            continue
        draws = {n: sha256(f"catalog-v2:dual:{p.product_id}:{n}".encode()).digest() for n, _ in visible}
        name = min(draws, key=draws.get)
        first = next(pair for pair in visible if pair[0] == name)
        hidden = {word for _, v in visible for word in folded(v)}
        bare = set(folded(p.title)) - hidden
        inside = lambda value, bare=bare: bool(folded(value)) and set(folded(value)) <= bare
        second = None
        for other in sorted(set(p.attributes) - {name}):
            fits = [v for v in split(p.attributes[other]) if (other, v) in often and inside(v)]
            if fits and other.lower() not in unasked:
                second = (other, fits[0])
                break
        if second or inside(deepest(p)[0][1]):
            asked[first, second, deepest(p)[0]] = None
    right = {}
    for first, second, category in asked:
        has = lambda p, pair: pair is None or pair[1] in split(p.attributes.get(pair[0]))
        ids = [p.product_id for p in products if has(p, first) and has(p, second) and deepest(p) == [category]]
        right[first, second, category] = ids
    return right


VALUES = {
    "colour": ["Red", "Navy Blue", "Red|Green", ""], "material": ["Oak", "Steel"], "usage": ["Party", "Home Office"],
}
PRODUCT = st.fixed_dictionaries({
    **{name: st.sampled_from(values) for name, values in VALUES.items()},
    "kind": st.sampled_from(["Mugs", "Lamps", None]),
    "title": st.lists(st.sampled_from("red navy blue oak mug lamps party home office nice".split()), max_size=6),
})


def shop_of(drawn, times=12):
    "Every drawn product some times, so that its values are frequent."
    return [
        Product(
            f"p{place}-{n}", " ".join(one["title"]) or f"no {place}", category_l2=one["kind"], refs=(PICTURE,),
            attributes={name: one[name] for name in VALUES}, split="test",
        )
        for n in range(times)
        for place, one in enumerate(drawn)
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(PRODUCT, min_size=2, max_size=5))
def test_queries_and_right_products_equal_the_plain_text(drawn):
    catalog = Catalog.from_products(shop_of(drawn))
    direction, _ = dual_direction(catalog, list(catalog))
    expected = plain_dual(catalog, list(catalog))
    if direction is None:
        assert not expected
        return
    found = {
        (item.text, tuple(catalog[int(place)].product_id for place in places))
        for item, places in zip(direction.queries.items, direction.queries.hit_keys)
    }
    texts = lambda key: " ".join(pair[1] for pair in key if pair).lower()
    assert found == {(texts(key), tuple(ids)) for key, ids in expected.items()}
    assert len(direction.queries) == len(expected)
    visibility = Visibility.of(catalog)
    for product, item in zip(catalog, direction.gallery.items):
        hidden = {fold(word) for _, value in visibility.visible_values(product) for word in words(value)}
        assert not hidden & {fold(word) for word in words(item.text or "")}


class Reader:
    "Reads words or sees nothing: vectors of the words of a text; of a picture, its colour name."
    fingerprint = "reader"

    def __init__(self, sees):
        self.sees = sees

    def encode_views(self, items):
        def vector(text, image):
            made = np.full(4096, 1e-6)
            for word in words(text or ""):
                made[int(sha256(fold(word).encode()).hexdigest(), 16) % 4096] += 1
            if image and self.sees:
                colour = (b"red", b"", b"blue")[np.asarray(image.load())[0, 0].argmax()]
                made[int(sha256(colour).hexdigest(), 16) % 4096] += 1
            return made / np.linalg.norm(made)

        views = {"t": lambda i: (i.text, None), "i": lambda i: (None, i.image), "mm": lambda i: (i.text, i.image)}
        return {
            view: np.stack([vector(*of(item)) for item in items]).astype(np.float32) for view, of in views.items()
        }

    def encode(self, items, view="t"):
        return self.encode_views(items)[view]


@pytest.fixture(scope="module")
def coloured():
    pictures = {name: ImageRef.from_pil(Image.new("RGB", (8, 8), name)) for name in ("red", "blue")}
    return Catalog.from_products([
        Product(
            f"p{n}", f"{colour} {kind} no {n}", category_l2=kind, attributes={"colour": colour}, split="test",
            refs=(pictures[colour],),
        )
        for n in range(80)
        for colour, kind in [(("red", "blue")[n % 2], ("mug", "lamp", "chair", "rug")[n // 2 % 4])]
    ])


def test_both_modalities_beat_either_and_the_entry_says_so(coloured):
    "An oracle that sees and reads answers every query; alone, its titles or pictures answer by chance."
    result = run_benchmark(Reader(True), make_benchmark(coloured), labels=False)
    block = result.metrics["directions"][DUAL]
    assert block["n_queries"] == 8 and block["mean_hits"] == 10
    assert {"R@1", "R@5", "R@10", "P@10", "nDCG@10", "MAP@10"} <= set(block)
    assert block["R@1"]["value"] == block["P@10"]["value"] == block["MAP@10"]["value"] == 1
    single = block["best_single"]
    assert single["view"] in ("t", "i") and single["ci95"][0] <= single["difference"] <= single["ci95"][1]
    assert single["difference"] == pytest.approx(block["R@10"]["value"] - single["R@10"]["value"])
    trivial = result.metrics["trivial"][DUAL]
    assert max(trivial["title_only"]["R@10"]["value"], trivial["picture_only"]["R@10"]["value"]) == pytest.approx(
        single["R@10"]["value"]
    )
    assert trivial["bm25"]["R@1"]["value"] < 1
    table = result.per_query[result.per_query.direction == DUAL]
    assert set(table.hit_ids.map(len)) == {10} and table.query_id.is_unique


def test_who_only_reads_gains_nothing(coloured):
    "The gain over the better modality of an encoder that is blind is not above 0: its ties stand against it."
    block = run_benchmark(Reader(False), make_benchmark(coloured), labels=False).metrics["directions"][DUAL]
    assert block["best_single"]["view"] == "t" and block["best_single"]["difference"] <= 0


def test_catalogues_that_cannot_ask_say_why(coloured):
    without = Catalog.from_products([Product(p.product_id, p.title, split="test") for p in coloured])
    result = run_benchmark(Reader(True), make_benchmark(without), labels=False)
    assert result.metrics["skipped"][DUAL] == "no product has a picture" and DUAL not in result.metrics["directions"]


def test_a_product_without_a_picture_stays_in_the_gallery(coloured):
    "It keeps its bare title; alone by pictures it is not there."
    bare = Product("bare", "red mug no 99", category_l2="mug", attributes={"colour": "red"}, split="test")
    benchmark = make_benchmark(Catalog.from_products([*coloured, bare]))
    assert benchmark.dual.gallery.items[-1].text == "mug no 99"
    views = {items.name: items.encode(Reader(True)) for items in benchmark.item_sets}
    assert benchmark.dual.ranks(views).n_gallery == 81 and hit_at(benchmark.dual.ranks(views), 1).all()


@pytest.mark.data
@pytest.mark.parametrize(
    "name, split, queries, hits",
    [
        slow("fashion-product-images", "test", 367, 3.1), slow("ikea-home", "all", 581, 1.4),
        ("flipkart-general", "all", 146, 2.6), ("magento-luma", "all", 37, 7.8),
    ],
)
def test_counts_on_real_catalogues(data_root, name, split, queries, hits):
    catalog = Catalog.load(data_root / name)
    products = list(catalog if split == "all" else catalog.split(split))
    direction, _ = dual_direction(catalog, products)
    assert len(direction.queries) == queries
    assert np.mean([len(places) for places in direction.queries.hit_keys]) == pytest.approx(hits, abs=0.05)
    right = plain_dual(catalog, products)
    assert sorted(map(len, right.values())) == sorted(len(places) for places in direction.queries.hit_keys)
