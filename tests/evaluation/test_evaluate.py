"""The protocols against a plain re-implementation: one product at a time, plain Python, straight from the rules."""

import itertools
import json
import math
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from moon2_lab.config import DIRECTIONS, DUAL, REPORTED
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item, Product
from moon2_lab.data.queries import Lexicon, PROTOCOLS, query_image_ref, search_phrase
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.baselines import string_match
from moon2_lab.evaluation.evaluate import evaluate, run_benchmark
from moon2_lab.evaluation.item_sets import gallery_items, pick_products
from moon2_lab.evaluation.label_tasks import label_tasks
from moon2_lab.evaluation.protocol import catalog_queries, make_benchmark
from moon2_lab.evaluation.statistics import holm, p_text, paired_test_tables
from moon2_lab.reporting.alarms import _baseline_alarms, _query_alarms
from moon2_lab.reporting.tables import against_baselines, score_table
from PIL import Image, ImageDraw

COLOURS, KINDS, BRANDS = (
    ("red", "green", "blue", "orange", "purple"),
    ("Mug", "Lamp", "Chair", "Vase"),
    ("Alba", "Borg", "Cura"),
)


class FakeEncoder:
    "Random vectors of words and of a few pixels. It knows nothing; it stands for the interface."

    def __init__(self, seed=0, change=None):
        self.seed, self.change, self.fingerprint, self.calls = seed, change or (lambda views: views), f"fake-{seed}", []
        self.pixels = np.random.default_rng(seed).standard_normal((48, 16))

    def words(self, text):
        return sum(
            np.random.default_rng([self.seed, zlib.crc32(word.encode())]).standard_normal(16)
            for word in text.lower().split()
        )

    def encode_views(self, items):
        self.calls.append([item.item_id for item in items])
        views = {view: np.full((len(items), 16), np.nan) for view in ("t", "i", "mm")}
        for row, item in enumerate(items):
            assert item.has_text or item.has_image, "an empty item must not be sent"
            if item.has_text:
                views["t"][row] = self.words(item.text)
            if item.has_image:
                views["i"][row] = (np.asarray(item.image.load().resize((4, 4))).ravel() / 255 - 0.7) @ self.pixels
            views["mm"][row] = np.nansum([views["t"][row], views["i"][row]], axis=0)
        return self.change(
            {
                view: (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
                for view, vectors in views.items()
            }
        )

    def encode(self, items, view="mm"):
        return self.encode_views(items)[view]

    def vision_features(self, refs):
        return np.stack([np.asarray(ref.load().resize((5, 5)), dtype=np.float32).ravel() for ref in refs])

    def untrained(self):
        return FakeEncoder(self.seed + 100)


def picture(colour, size):
    image = Image.new("RGB", (40, 40), "white")
    ImageDraw.Draw(image).ellipse([size, size // 2, 39 - size, 36], fill=colour)
    return ImageRef.from_pil(image)


def shop(count=160):
    "Shared titles, shared pictures, products without one half, second photos, a title without a word, all splits."
    for i in range(count):
        colour, kind, brand = COLOURS[i % 5], KINDS[i // 5 % 4], BRANDS[i // 20 % 3]
        refs = [picture(colour, 1 + i // 11)] + ([picture(colour, 16)] if i % 17 == 0 else [])
        title = "☕ ☕" if i == 33 else None if i in (13, 23, 43) else f"{brand} {colour.title()} {kind} Nice {i // 40}"
        yield Product(
            f"p{i:03}",
            title,
            category_l1="Home",
            category_l2=kind,
            category_l3=f"{kind}s" if i % 3 else None,
            split=("test", "train", "valid", "train", "test", "train")[i % 6],
            attributes={"base_colour": colour.title(), "care": "Wash|Dry" if i % 2 else "Dry"}
            | ({} if i % 7 else {"brand": brand}),
            refs=() if title and i % 19 == 4 else tuple(refs),
        )


@pytest.fixture(scope="module")
def catalog():
    return Catalog.from_products(list(shop()))


@pytest.fixture(scope="module")
def metrics(catalog):
    return evaluate(FakeEncoder(), catalog, resamples=200)


# ---------------------------------------------------------------------------------- the five directions by hand


def by_hand(encoder, catalog, split, protocol):
    "direction -> [(query id, key, rank)], one query at a time."
    lexicon, products = Lexicon(catalog, protocol), [product for product in catalog if product.split == split]
    one = lambda text, image, view: encoder.encode([Item(text, image)], view=view)[0] if text or image else None
    title = lambda product: product.title if product.has_text else None
    views = {
        "c_t": {p.product_id: one(title(p), None, "t") for p in products if p.has_text},
        "c_i": {p.product_id: one(None, p.image_ref(), "i") for p in products if p.has_image},
        "c_mm": {p.product_id: one(title(p), p.image_ref(), "mm") for p in products},
    }
    phrase = {p.product_id: search_phrase(p, 0, lexicon) for p in products if p.has_text}
    photo = {p.product_id: query_image_ref(p, 0, protocol) for p in products if p.has_image}
    views["q_t"] = {name: one(text, None, "t") for name, text in phrase.items() if text}
    views["q_i"] = {name: one(None, image, "i") for name, image in photo.items()}
    views["q_mm"] = {name: one(phrase[name], image, "mm") for name, image in photo.items() if phrase.get(name)}
    pairs = {
        "t->mm": ("q_t", "c_mm"),
        "i->mm": ("q_i", "c_mm"),
        "mm->mm": ("q_mm", "c_mm"),
        "t->i": ("c_t", "c_i"),
        "i->t": ("c_i", "c_t"),
    }
    found = {}
    for direction, (asking, gallery) in pairs.items():
        found[direction] = []
        for name, query in views[asking].items():
            key = catalog.product_key(name)
            scores = {
                other: float(np.float32(query.astype(float) @ vector.astype(float)))
                for other, vector in views[gallery].items()
            }
            hits = [score for other, score in scores.items() if catalog.product_key(other) == key]
            best = max(hits, default=-math.inf)
            rank = 1 + sum(score >= best for other, score in scores.items() if catalog.product_key(other) != key)
            found[direction].append((name, key, rank if hits else math.inf))
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("split", ["test", "valid"])
def test_the_five_directions_equal_the_rules_by_hand(catalog, split, protocol, tmp_path):
    """Ranks of every query, counts, R@k, unseen titles; queries with half a product;
    hits by shared title and shared picture."""
    options = {"protocol": protocol, "baselines": False, "labels": False, "resamples": 50}
    metrics = evaluate(FakeEncoder(), catalog, split, out=tmp_path, **options)
    table = pd.read_parquet(tmp_path / "per_query.parquet")
    train = {product.key for product in catalog if product.split == "train"}
    expected = by_hand(FakeEncoder(), catalog, split, protocol)
    assert set(metrics["directions"]) - {DUAL} == set(DIRECTIONS)
    assert (DUAL in metrics["directions"]) == (protocol == "catalog-v2")
    for direction, rows in expected.items():
        block, mine = metrics["directions"][direction], table[table["direction"] == direction].set_index("query_id")
        assert set(mine.index) == {name for name, _, _ in rows} and block["n_queries"] == len(rows)
        assert block["n_keys"] == len({key for _, key, _ in rows})
        for name, key, rank in rows:
            assert mine.loc[name, "key"] == key
            assert (mine.loc[name, "rank"] == rank) if rank < math.inf else len(mine.loc[name, "hit_ids"]) == 0
        unseen = [rank for _, key, rank in rows if key not in train]
        assert block["unseen_title"]["n_queries"] == len(unseen) > 0
        assert 0 < len(unseen) < len(rows), "the catalogue should show both cases"
        for k in (1, 5, 10):
            assert block[f"R@{k}"]["value"] == pytest.approx(np.mean([rank <= k for _, _, rank in rows]))
            assert block["unseen_title"][f"R@{k}"]["value"] == pytest.approx(np.mean([rank <= k for rank in unseen]))
    assert any(block["n_gallery"] != block["n_queries"] for block in metrics["directions"].values())
    assert split == "valid" or any(len(names) > 1 for names in table["hit_ids"]), (
        "the test split should have products that share a key"
    )


def test_the_dictionary_has_the_documented_form(catalog, metrics):
    "Names of the interface; intervals around the values; strict JSON."
    protocol = metrics["protocol"]
    assert (protocol["name"], protocol["split"], protocol["hit_rule"], protocol["model"], protocol["seed"]) == (
        "catalog-v2",
        "test",
        "same product key",
        "fake-0",
        0,
    )
    assert sum(protocol["query_images"].values()) == metrics["directions"]["i->mm"]["n_queries"] and all(
        protocol["query_images"].values()
    )
    for block in [
        *metrics["directions"].values(),
        *(b for found in metrics["trivial"].values() for b in found.values()),
    ]:
        for k in (1, 5, 10):
            score = block[f"R@{k}"]
            assert score["ci95"][0] <= score["value"] <= score["ci95"][1]
    for kind in ("classification", "attributes"):
        for by_view in metrics[kind].values():
            assert list(by_view) == ["mm", "i", "t"]
            for block in by_view.values():
                assert {"accuracy", "macro_f1", "majority", "string_match", "n_classes", "n_left_out"} <= set(block)
                assert {"value", "ci95"} == set(block["accuracy"]) and isinstance(block["majority"], float)
    recalls = [metrics["directions"][name]["R@10"]["value"] for name in DIRECTIONS]
    assert metrics["balance"] == {
        "min_R@10": min(recalls),
        "max_R@10": max(recalls),
        "ratio": min(recalls) / max(recalls),
    }
    assert metrics["timing"]["encode_seconds"] > 0 and metrics["timing"]["products_per_second"] > 0
    json.dumps(metrics, allow_nan=False)


def test_files_are_written_where_asked(catalog, metrics, tmp_path):
    "A folder, or a .json name; per_query.parquet beside it; the same content as the return value, whatever the run."
    evaluate(FakeEncoder(), catalog, out=tmp_path / "a", resamples=200)
    again = evaluate(FakeEncoder(), catalog, out=tmp_path / "b" / "scores.json", resamples=200)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"metrics.json", "per_query.parquet"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"scores.json", "scores.per_query.parquet"}
    kept = json.loads((tmp_path / "a" / "metrics.json").read_text())
    without_time = lambda found: {name: value for name, value in found.items() if name != "timing"}
    assert without_time(kept) == without_time(again) == without_time(metrics)
    first, second = (pd.read_parquet(tmp_path / name) for name in ("a/per_query.parquet", "b/scores.per_query.parquet"))
    pd.testing.assert_frame_equal(first, second)
    assert list(first.columns[:6]) == ["query_id", "direction", "rank", "hit_ids", "top_ids", "top_scores"]
    assert (first["top_ids"].map(len) == first["top_scores"].map(len)).all() and (first["top_ids"].map(len) <= 10).all()
    assert paired_test_tables(first, second, "mm->mm")["p"] == 1.0


def test_everything_is_encoded_once(catalog):
    "Products, queries and label texts: one call each; another two for the untrained encoder, which is another object."
    encoder = FakeEncoder()
    evaluate(encoder, catalog, resamples=0)
    products, queries, bare, conditions, texts = encoder.calls
    assert bare == products and set(conditions) <= set(products)
    assert products == [product.product_id for product in catalog if product.split == "test"]
    assert len(queries) == len(set(queries)) and set(queries) <= set(products)
    assert len(texts) == len(set(texts)) > 2
    quick = FakeEncoder()
    evaluate(quick, catalog, baselines=False, labels=False, resamples=0)
    assert len(quick.calls) == 4


def test_a_part_of_the_catalogue_gives_the_scores_of_the_whole(catalog, metrics):
    "catalog.split('test') knows the catalogue it comes from."
    part = evaluate(FakeEncoder(), catalog.split("test"), resamples=200)
    assert part["directions"] == metrics["directions"] and part["classification"] == metrics["classification"]


def test_all_is_every_product(catalog):
    metrics = evaluate(FakeEncoder(), catalog, "all", baselines=False, resamples=0)
    assert metrics["directions"]["mm->mm"]["n_gallery"] == len(catalog)


def test_a_limit_is_a_nested_sample_independent_of_the_order(catalog):
    "The first N products by the hash of their id."
    ids = lambda products: {product.product_id for product in products}
    shuffled = Catalog.from_products(list(shop())[::-1])
    small, large = pick_products(catalog, "test", 7), pick_products(catalog, "test", 20)
    assert ids(small) < ids(large) and len(small) == 7 and len(large) == 20
    assert ids(pick_products(shuffled, "test", 7)) == ids(small)
    assert len(pick_products(catalog, "test", 10**6)) == len(catalog.split("test"))
    metrics = evaluate(FakeEncoder(), catalog, limit=7, baselines=False, labels=False, resamples=0)
    assert metrics["protocol"]["limit"] == 7 == metrics["directions"]["mm->mm"]["n_gallery"]


# ---------------------------------------------------------------------------------------------- baselines


def test_baselines_stand_beside_the_directions_they_apply_to(catalog, metrics):
    assert {name: sorted(found) for name, found in metrics["trivial"].items()} == {
        "t->mm": ["bm25", "untrained"],
        "i->mm": ["frozen_vision", "untrained"],
        "mm->mm": ["bm25", "frozen_vision", "untrained"],
        "t->i": ["untrained"],
        "i->t": ["untrained"],
        DUAL: ["bm25", "picture_only", "string_match", "title_only", "untrained"],
    }
    untrained = evaluate(FakeEncoder(100), catalog, baselines=False, labels=False, resamples=200)
    for direction, block in untrained["directions"].items():
        assert {name: metrics["trivial"][direction]["untrained"]["R@10"][name] for name in ("value", "ci95")} == block[
            "R@10"
        ]  # without ties the rules agree


def test_directions_not_above_a_baseline_are_named(metrics):
    """Below and level are listed apart, by the paired test after Holm over directions and metrics of one baseline,
    each with the interval of the difference."""
    lists = {
        name: {(e["direction"], e["baseline"], e["metric"]): e for e in metrics[name]}
        for name in ("below_baseline", "level_with_baseline")
    }
    families = defaultdict(list)
    for direction, found in metrics["trivial"].items():
        for baseline, block in found.items():
            for metric in ("R@1", "R@5", "R@10", *(["nDCG@10"] if direction == "dual->mm" else [])):
                test, value = block[metric]["paired"], metrics["directions"][direction][metric]["value"]
                families[baseline].append(test)
                assert test["difference"] == pytest.approx(value - block[metric]["value"])
                assert [(direction, baseline, metric) in lists[name] for name in lists] == [
                    test["verdict"] == "below",
                    test["verdict"] == "level",
                ]
                assert test["verdict"] == (
                    "level" if test["p_holm"] >= 0.05 else "above" if test["difference"] > 0 else "below"
                )
    for tests in families.values():
        assert [test["p_holm"] for test in tests] == holm([test["p"] for test in tests]).tolist()
    named = lists["below_baseline"] | lists["level_with_baseline"]
    assert all(
        entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1] and 0 < entry["p"] <= entry["p_holm"] <= 1
        for entry in named.values()
    )
    assert any(entry["difference"] < 0 for entry in lists["level_with_baseline"].values()), (
        "a difference within its noise is level, not below"
    )


def test_the_report_says_what_metrics_json_says(metrics):
    "One rule: table, alarms and terminal take verdict and p from the paired tests; without tests nothing is claimed."
    scores = score_table(metrics)
    for metric in ("R@1", "R@10"):
        for row in against_baselines(scores, metric).itertuples():
            entry = metrics["trivial"][row.direction][row.baseline][metric]
            assert (row.verdict, row.p) == (entry["paired"]["verdict"], p_text(entry["paired"]))
    below = {entry["direction"] for entry in metrics["below_baseline"]}
    assert {alarm.text.split(" ")[0] for alarm in _baseline_alarms(scores) if alarm.level == "warning"} <= below
    untested = {
        d: {
            b: {k: {n: v for n, v in e.items() if n != "paired"} for k, e in block.items()}
            for b, block in found.items()
        }
        for d, found in metrics["trivial"].items()
    }
    assert (
        set(against_baselines(score_table(metrics | {"trivial": untested})).verdict) == {"unknown"}
        and _baseline_alarms(score_table(metrics | {"trivial": untested})) == []
    )


def test_a_baseline_of_ties_gets_what_a_random_order_would_give():
    """24 titles of the same four words: BM25 scores all of them alike. Ties against it would give it 0 at every k;
    a random order gives k of 24."""
    titles = [" ".join(order) for order in itertools.permutations(("red", "oak", "big", "mug"))]
    metrics = evaluate(
        FakeEncoder(),
        Catalog.from_products([Product(f"p{n:02}", title, split="test") for n, title in enumerate(titles)]),
        resamples=20,
    )
    block = metrics["trivial"]["t->mm"]["bm25"]
    assert [block[f"R@{k}"]["value"] for k in (1, 5, 10)] == pytest.approx([1 / 24, 5 / 24, 10 / 24])
    assert set(metrics["protocol"]["ties"]) == {"model", "baselines"}
    constant = evaluate(
        FakeEncoder(change=lambda views: {view: np.broadcast_to(np.eye(16)[0], v.shape) for view, v in views.items()}),
        Catalog.from_products(list(shop(60))),
        resamples=0,
    )
    assert {block["R@10"]["value"] for block in constant["directions"].values()} == {
        0.0
    }  # the model's own ties go against it


def test_an_encoder_without_baselines_says_so(catalog):
    "encode_views, encode and fingerprint are enough."

    class Least:
        fingerprint = "least"
        encode_views, encode = FakeEncoder().encode_views, FakeEncoder().encode

    metrics = evaluate(Least(), catalog, resamples=0)
    assert set(metrics["skipped_baselines"]) == {"frozen_vision", "untrained"}
    assert list(metrics["trivial"]) == ["t->mm", "mm->mm", DUAL]


def test_vision_features_are_normalised_and_checked(catalog):
    "Their length plays no part; a wrong number of rows is refused."
    scaled, wrong = FakeEncoder(), FakeEncoder()
    scaled.vision_features = lambda refs: FakeEncoder().vision_features(refs) * np.arange(1, len(refs) + 1)[:, None]
    wrong.vision_features = lambda refs: FakeEncoder().vision_features(refs)[1:]
    ours, theirs = (
        evaluate(encoder, catalog, labels=False, resamples=0)["trivial"]["i->mm"]["frozen_vision"]
        for encoder in (scaled, FakeEncoder())
    )
    assert ours == theirs
    with pytest.raises(DataError, match="vision_features returned shape"):
        evaluate(wrong, catalog, labels=False, resamples=0)


# ---------------------------------------------------------------------------------------------- labels


def test_labels_equal_sklearn_by_hand(catalog, metrics):
    "Nearest class text, one product at a time; macro scores by scikit-learn over the classes present."
    from sklearn.metrics import f1_score, precision_score, recall_score

    encoder, products = FakeEncoder(), [product for product in catalog if product.split == "test"]
    counts = Counter(f"Home > {product.category_l2}" for product in catalog)
    classes = sorted(name for name, count in counts.items() if count >= 20)
    texts = np.stack([encoder.encode([Item(name, None)], view="t")[0] for name in classes])
    for view in ("t", "i", "mm"):
        shown = [
            p
            for p in products
            if {"t": p.has_text, "i": p.has_image, "mm": True}[view] and f"Home > {p.category_l2}" in classes
        ]
        truth = [f"Home > {p.category_l2}" for p in shown]
        guess = [classes[int(np.argmax(texts @ encoder.encode([p.item(view)], view=view)[0]))] for p in shown]
        block = metrics["classification"]["category_l2"][view]
        options = {"labels": sorted(set(truth)), "average": "macro", "zero_division": 0}
        assert block["accuracy"]["value"] == pytest.approx(np.mean([t == g for t, g in zip(truth, guess)]))
        assert block["macro_f1"]["value"] == pytest.approx(f1_score(truth, guess, **options))
        assert block["macro_precision"]["value"] == pytest.approx(precision_score(truth, guess, **options))
        assert block["macro_recall"]["value"] == pytest.approx(recall_score(truth, guess, **options))
        assert block["majority"] == pytest.approx(max(Counter(truth).values()) / len(truth))
        assert block["string_match"] == pytest.approx(
            np.mean([bool(p.title) and f" {p.category_l2} " in p.title for p in shown])
        )
        assert (block["n_classes"], block["n_left_out"], block["n_products"]) == (
            len(classes),
            len(counts) - len(classes),
            len(shown),
        )


def test_label_tasks_follow_the_rules(catalog):
    "At least 20 products, at least two classes, nulls dropped from the path, values split at the bar."
    tasks = {task.name: task for task in label_tasks(catalog, pick_products(catalog, "test"))}
    assert set(tasks) == {
        "category_l2",
        "category_l3",
        "base_colour",
        "care",
    }  # category_l1 has one class, brand fewer than 20 products each
    assert tasks["care"].texts == ["care: Dry", "care: Wash"] and tasks["base_colour"].texts[0] == "base colour: Blue"
    assert all(text.startswith("Home > ") for text in tasks["category_l3"].texts)
    empty = Catalog.from_products(
        [Product(f"e{i}", f"thing {i}", category_l1=("A", "B")[i % 2], attributes={"care": " | "}) for i in range(50)]
    )
    assert [task.name for task in label_tasks(empty, empty)] == ["category_l1"]  # levels that nobody fills are absent


def test_a_catalogue_with_one_class_has_no_label_scores():
    lonely = Catalog.from_products(
        [
            Product(f"e{i}", f"thing number {i}", category_l1="A", attributes={"care": "Dry"}, split="test")
            for i in range(30)
        ]
    )
    metrics = evaluate(FakeEncoder(), lonely, resamples=0, baselines=False)
    assert metrics["classification"] == {} == metrics["attributes"]


def test_string_match_takes_the_longest_and_needs_every_word(catalog):
    task = next(task for task in label_tasks(catalog, pick_products(catalog, "test")) if task.name == "base_colour")
    names = [
        task.leaves[i] if i >= 0 else None for i in string_match(["a BLUE thing", "Bluebell", "☕", None, "reds"], task)
    ]
    assert names == ["Blue", None, None, None, "Red"]


# ---------------------------------------------------------------------------------------------- bad input


def test_nan_vectors_count_against_the_model(catalog, metrics):
    "Broken rows never help, are counted per direction, and the file stays valid JSON."

    def some(views):
        for vectors in views.values():
            vectors[::3] = np.nan
        return views

    def infinite(views):
        return {view: np.where(np.arange(16) == 3, np.inf, vectors) for view, vectors in views.items()}

    partly = evaluate(FakeEncoder(change=some), catalog, baselines=False, resamples=0)
    wholly = evaluate(FakeEncoder(change=infinite), catalog, baselines=False, resamples=0)
    for direction, block in metrics["directions"].items():
        assert partly["directions"][direction]["R@10"]["value"] < block["R@10"]["value"]
        assert partly["directions"][direction]["n_nan_vectors"] > 0 == block["n_nan_vectors"]
        assert wholly["directions"][direction]["R@10"]["value"] == 0
        assert partly["directions"][direction]["n_gallery"] == block["n_gallery"], (
            "a broken product stays in the gallery"
        )
    assert wholly["classification"]["category_l2"]["mm"]["accuracy"]["value"] == 0
    json.dumps([partly, wholly], allow_nan=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda views: {view: vectors * 1.5 for view, vectors in views.items()}, "not l2-normalised, first norm 1.5"),
        (lambda views: {view: vectors[:-1] for view, vectors in views.items()}, "returned shape"),
        (lambda views: {view: vectors[:, :, None] for view, vectors in views.items()}, "returned shape"),
        (lambda views: {"t": views["t"], "mm": views["mm"]}, "returned no i"),
        (lambda views: views | {"i": views["i"][:, :8] * 0}, "do not fit"),
    ],
)
def test_wrong_vectors_are_refused(catalog, change, message):
    with pytest.raises(DataError, match=message):
        evaluate(FakeEncoder(change=change), catalog, resamples=0, baselines=False)


def test_half_precision_norms_are_accepted(catalog):
    "float16 vectors are normalised up to a thousandth."
    metrics = evaluate(
        FakeEncoder(change=lambda views: {view: vectors.astype(np.float16) for view, vectors in views.items()}),
        catalog,
        resamples=0,
        baselines=False,
        labels=False,
    )
    assert metrics["directions"]["t->mm"]["n_nan_vectors"] == 0


def test_views_that_nobody_has_are_skipped_with_a_reason():
    "A catalogue of titles has one direction; one of pictures another; the reason is in the file."
    titles = Catalog.from_products([Product(f"e{i}", f"thing number {i}", split="test") for i in range(12)])
    metrics = evaluate(FakeEncoder(), titles, resamples=10)
    assert list(metrics["directions"]) == ["t->mm"] and set(metrics["skipped"]) == {*REPORTED} - {"t->mm"}
    assert (
        "no images" in metrics["skipped_baselines"]["frozen_vision"]
        or "no image" in metrics["skipped_baselines"]["frozen_vision"]
    )
    pictures = Catalog.from_products([Product(f"e{i}", refs=(picture("red", i + 1),), split="test") for i in range(12)])
    assert list(evaluate(FakeEncoder(), pictures, resamples=10)["directions"]) == ["i->mm"]
    wordless = Catalog.from_products([Product(f"e{i}", "☕" * (i + 1), split="test") for i in range(12)])
    with pytest.raises(DataError, match="no direction can be scored"):
        evaluate(FakeEncoder(), wordless, resamples=10)


def test_one_product_is_enough():
    "A gallery of one: every rank is 1, and one key says nothing about others."
    one = Catalog.from_products([Product("only", "blue lamp", refs=(picture("blue", 3),), split="test")])
    metrics = evaluate(FakeEncoder(), one, resamples=20)
    assert [block["R@1"] for block in metrics["directions"].values()] == [{"value": 1.0, "ci95": [0.0, 1.0]}] * 5
    assert "unseen_title" not in metrics["directions"]["t->mm"], "there is no train split"


def test_usage_errors_name_the_option(catalog, tmp_path):
    calls = [
        (lambda: evaluate(FakeEncoder(), catalog, "holdout"), DataError, "holdout"),
        (lambda: evaluate(FakeEncoder(), catalog, protocol="mteb"), UsageError, "unknown protocol"),
        (lambda: evaluate(FakeEncoder(), catalog, limit=0), UsageError, "limit=0"),
        (lambda: evaluate(FakeEncoder(), catalog, gallery=["p000"]), UsageError, "fixed gallery"),
        (lambda: evaluate(FakeEncoder(), catalog, protocol="triplets-v1"), DataError, "no triplets"),
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()


# ---------------------------------------------------------------------------------------------- triplets-v1


def triplets(catalog, rows):
    "The catalogue with triplets of (query id, text, image path, positive, noise)."
    columns = ["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"]
    table = pd.DataFrame(
        [(q, text, image, positive, [], noise) for q, text, image, positive, noise in rows],
        columns=columns,
        dtype=object,
    )
    return Catalog(catalog.products, triplets=table, images={"photos/q.jpg": picture("green", 5)})


@pytest.fixture(scope="module")
def asked(catalog):
    test = [product.product_id for product in catalog if product.split == "test"]
    rows = [
        (
            f"q{i}",
            f"{catalog.get(name).attributes['base_colour']} thing {i}",
            "photos/q.jpg" if i % 2 else None,
            name,
            None,
        )
        for i, name in enumerate(test[:20])
    ]
    rows += [(f"q{i}", rows[i][1], rows[i][2], name, None) for i, name in enumerate(test[20:30])]  # a second positive
    rows += [
        ("q0", rows[0][1], None, test[40], "pseudo_positive"),
        ("q99", None, "photos/q.jpg", test[5], "pseudo_negative"),
    ]
    rows += [("train", "red thing", None, next(p.product_id for p in catalog if p.split == "train"), None)]
    return triplets(catalog, rows)


def test_triplets_v1_equals_the_rules_by_hand(asked, tmp_path):
    "Several positives of one query, image queries, known noise, mAP and precision: by plain Python."
    metrics = evaluate(FakeEncoder(), asked, out=tmp_path, protocol="triplets-v1", resamples=20)
    table = pd.read_parquet(tmp_path / "per_query.parquet").set_index(["direction", "query_id"])
    encoder, gallery = FakeEncoder(), [product for product in asked if product.split == "test"]
    rows = [
        row
        for row in asked.triplets.itertuples()
        if asked.get(row.positive_id).split == "test" and row.noise != "pseudo_positive"
    ]
    queries = {
        row.query_id: Item(row.query_text, asked.image_ref(row.query_image) if row.query_image else None)
        for row in rows
    }
    scores = {}
    for name, item in queries.items():
        keys = {asked.product_key(row.positive_id) for row in rows if row.query_id == name}
        for direction in DIRECTIONS:
            asking, wanted = direction.split("->")
            if not {"t": item.has_text, "i": item.has_image, "mm": item.has_text and item.has_image}[asking]:
                continue
            query = encoder.encode([item], view=asking)[0].astype(float)
            there = [p for p in gallery if {"t": p.has_text, "i": p.has_image, "mm": True}[wanted]]
            order = sorted(
                (
                    -float(np.float32(query @ encoder.encode([p.item(wanted)], view=wanted)[0].astype(float))),
                    p.key in keys,
                )
                for p in there
            )
            found = [hit for _, hit in order]
            top = found[:10]
            precision = sum(sum(top[: i + 1]) / (i + 1) for i, hit in enumerate(top) if hit) / max(
                1, min(10, sum(found))
            )
            scores.setdefault(direction, []).append((any(top), sum(top) / 10, precision))
            assert table.loc[(direction, name), "rank"] == (found.index(True) + 1 if any(found) else len(found) + 1)
    assert set(scores) == set(metrics["directions"]) == set(DIRECTIONS)
    for direction, values in scores.items():
        block = metrics["directions"][direction]
        assert [block[name]["value"] for name in ("R@10", "Prec@10", "mAP@10")] == pytest.approx(
            np.mean(values, axis=0).tolist()
        )
        assert block["n_queries"] == len(values)
    assert metrics["protocol"]["n_pseudo_positive_left_out"] == 1 and metrics["protocol"]["name"] == "triplets-v1"
    assert "classification" not in metrics and set(metrics["trivial"]["t->mm"]) == {"bm25", "untrained"}


def test_a_gallery_file_replaces_the_split(asked, tmp_path):
    "One id per line; ids of other splits are welcome, unknown ones are not."
    names = [product.product_id for product in asked][:25]
    (tmp_path / "gallery.txt").write_text("\n".join([*names, "", names[0]]) + "\n")
    metrics = evaluate(
        FakeEncoder(), asked, protocol="triplets-v1", gallery=tmp_path / "gallery.txt", resamples=0, baselines=False
    )
    assert metrics["directions"]["t->mm"]["n_gallery"] == 25 and metrics["directions"]["t->mm"]["n_without_hit"] > 0
    assert metrics == evaluate(
        FakeEncoder(), asked, protocol="triplets-v1", gallery=names, resamples=0, baselines=False
    ) | {"timing": metrics["timing"]}
    for bad, message in (
        (["p000", "gone"], "1 of 2 gallery ids"),
        ([], "the gallery is empty"),
        (str(tmp_path / "none.txt"), "not a readable list"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate(FakeEncoder(), asked, protocol="triplets-v1", gallery=bad)


def test_triplets_that_cannot_be_asked_are_refused(catalog):
    test = [product.product_id for product in catalog if product.split == "test"]
    with pytest.raises(DataError, match="one query id, several queries"):
        evaluate(
            FakeEncoder(),
            triplets(catalog, [("q", "red", None, test[0], None), ("q", "blue", None, test[1], None)]),
            protocol="triplets-v1",
        )
    with pytest.raises(DataError, match="no queries are left"):
        evaluate(
            FakeEncoder(), triplets(catalog, [("q", "red", None, test[0], "pseudo_positive")]), protocol="triplets-v1"
        )
    limited = evaluate(
        FakeEncoder(),
        triplets(catalog, [(f"q{i}", f"red {i}", None, test[i], None) for i in range(9)]),
        protocol="triplets-v1",
        limit=4,
        resamples=0,
        baselines=False,
    )
    assert (limited["directions"]["t->mm"]["n_queries"], limited["directions"]["t->mm"]["n_gallery"]) == (4, len(test))


def test_catalog_v1_ignores_triplets(asked, metrics):
    assert evaluate(FakeEncoder(), asked, resamples=200)["directions"] == metrics["directions"]


def test_one_question_serves_many_encoders(catalog):
    question = make_benchmark(catalog)
    first, second = (
        run_benchmark(FakeEncoder(0), question, resamples=0),
        run_benchmark(FakeEncoder(1), question, resamples=0),
    )
    assert set(first.per_query["query_id"]) == set(second.per_query["query_id"])
    assert first.metrics["protocol"]["model"] != second.metrics["protocol"]["model"]
    assert question.gallery.encode(FakeEncoder())["mm"].shape == (len(question.products), 16)


# ---------------------------------------------------------------------------------------------- drawn and real products


def test_a_drawn_catalogue_in_its_folder(drawn_catalogue, tmp_path):
    "Both protocols on the layout of the generator, pictures from files."
    catalog = Catalog.load(drawn_catalogue)
    metrics = evaluate(FakeEncoder(), catalog, out=tmp_path, resamples=50)
    assert (
        set(DIRECTIONS) <= set(metrics["directions"])
        and metrics["protocol"]["catalog"] == Path(drawn_catalogue).resolve().name
    )
    by_triplets = evaluate(FakeEncoder(), catalog, protocol="triplets-v1", resamples=50)
    assert by_triplets["directions"]["t->mm"]["n_queries"] > 0


@pytest.mark.slow
@pytest.mark.data
def test_fashion_counts(data_root):
    "974 test products; a shared title or picture is one key; 274 test titles also stand in train."
    catalog = Catalog.load(data_root / "fashion-product-images")
    products = pick_products(catalog, "test")
    gallery, queries = gallery_items(products), catalog_queries(products, Lexicon(catalog))
    train = {product.key for product in catalog if product.split == "train"}
    assert len(products) == 974 and len(set(gallery.group.tolist())) < 974
    assert {view: len(side.places_with(view)) for side in (gallery, queries) for view in ("t", "i", "mm")} == {
        "t": 974,
        "i": 974,
        "mm": 974,
    }
    assert sum(key in train for key in gallery.group) >= 274
    tasks = {task.name: len(task.texts) for task in label_tasks(catalog, products)}
    assert tasks["category_l2"] == 23 and tasks["gender"] == 5


# ------------------------------------------------------------ what a reader must know of the queries


def test_queries_that_are_the_title_are_counted_everywhere(tmp_path):
    "A title of one word is its own phrase: said in metrics.json, in the score lines and on the report."
    from moon2_lab.cli.pipeline import score_lines

    products = [
        Product(
            f"p{n:02}", f"shirt{n}" if n < 24 else f"red cotton shirt no {n} new", split="test"
        )
        for n in range(30)
    ]
    metrics = evaluate(FakeEncoder(), Catalog.from_products(products), resamples=0)
    equal = metrics["directions"]["t->mm"]["n_equal_title"]
    assert 24 <= equal < 30 and metrics["directions"]["t->mm"]["n_queries"] == 30
    assert metrics["protocol"]["queries_equal_title"] == {"n": equal, "of": 30, "share": equal / 30}
    assert f"{equal} of 30 queries equal the title" in score_lines(metrics)
    assert [alarm.level for alarm in _query_alarms(metrics)] == ["warning"] and f"{equal} of 30" in _query_alarms(
        metrics
    )[0].text


def test_large_keys_are_named_in_metrics_score_lines_and_alarms():
    from moon2_lab.cli.pipeline import score_lines

    shared = picture("grey", 3)
    products = [
        Product(
            f"p{n:02}",
            f"{COLOURS[n % 5]} {KINDS[n % 4]} no {n}",
            refs=(shared if n % 2 else picture(COLOURS[n % 5], 1 + n % 15),),
            split="test",
        )
        for n in range(40)
    ]
    metrics = evaluate(FakeEncoder(), Catalog.from_products(products), resamples=0)
    (group,) = metrics["protocol"]["large_keys"]
    assert group["products"] == 20 and group["by"] == "picture"
    assert "20 products (50%) share one picture" in score_lines(metrics)
    assert any("20 products (50%)" in alarm.text and alarm.level == "warning" for alarm in _query_alarms(metrics))


def test_gallery_files_get_clear_words(catalog, tmp_path):
    test = [product.product_id for product in catalog.split("test")]
    asked = triplets(catalog, [("q1", "red mug", None, test[0], None)])
    (tmp_path / "marked.txt").write_bytes("\n".join([*test[:2], ""]).encode("utf-8-sig"))
    marked = evaluate(
        FakeEncoder(), asked, protocol="triplets-v1", gallery=tmp_path / "marked.txt", resamples=0, baselines=False
    )
    assert marked["directions"]["t->mm"]["n_gallery"] == 2
    others = [name for name in test if catalog.product_key(name) != catalog.product_key(test[0])][:5]
    for name, content, message in (
        ("empty.txt", "\n\n", "the gallery is empty"),
        ("others.txt", "\n".join(others), "none of the 1 queries has a right answer among the 5 products"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            evaluate(FakeEncoder(), asked, protocol="triplets-v1", gallery=tmp_path / name, resamples=0)


def test_a_drawn_catalogue_carries_the_version_of_its_generator(tmp_path):
    from moon2_lab.data.synthetic.generator import GENERATOR_VERSION, make_catalog

    drawn = Catalog.load(make_catalog(tmp_path / "drawn", 12, image_size=64))
    about = make_benchmark(drawn, "all").about
    assert (about["catalog_version"], about["catalog_hash"]) == (GENERATOR_VERSION, drawn.data_hash)


def test_cut_texts_are_counted_in_metrics_score_lines_and_alarms():
    "A title of 30 words where 8 tokens are read."
    from moon2_lab.cli.pipeline import score_lines
    from moon2_lab.model.encoder import Moon2Encoder

    products = [Product(f"p{n}", f"mug no {n} " + "very " * (26 if n < 3 else 1), split="test") for n in range(6)]
    metrics = evaluate(
        Moon2Encoder.from_backbone("tiny", num_layers=1, max_text_tokens=8),
        Catalog.from_products(products),
        resamples=0,
        baselines=False,
    )
    cut = metrics["protocol"]["text_tokens"]
    assert (
        cut["max_text_tokens"] == 8 and cut["cut"] == 6 and cut["texts"] >= 9
    )  # three titles, and their three phrases
    assert cut["tokens_cut"] >= 3 * (29 - 8) and f"6 of {cut['texts']} texts are longer than 8 tokens" in score_lines(
        metrics
    )
    assert any("longer than 8 tokens" in alarm.text for alarm in _query_alarms(metrics))


def test_a_direction_without_any_right_answer_is_not_scored():
    """Half of the products have words only, the others a picture only:
    no title's own picture is among those that are searched."""
    from moon2_lab.cli.pipeline import score_lines
    from small import product, tiny

    catalog = Catalog.from_products(
        [product(number, **({"title": None} if number % 2 else {"refs": ()})) for number in range(20)]
    )
    metrics = evaluate(tiny(), catalog, split="all", resamples=0, baselines=False, labels=False)
    assert (
        sorted(metrics["directions"]) == ["i->mm", "t->mm"]
        and "no query has a right answer" in metrics["skipped"]["t->i"]
        and "t->i" in score_lines(metrics)
    )


def test_pictures_have_no_words_to_be_equal_to():
    from moon2_lab.cli.pipeline import score_lines
    from small import product, tiny

    metrics = evaluate(
        tiny(),
        Catalog.from_products([product(number) for number in range(20)]),
        split="all",
        resamples=0,
        baselines=False,
        labels=False,
    )
    assert (
        "n_equal_title" not in metrics["directions"]["t->i"]
        and "n_equal_title" in metrics["directions"]["t->mm"]
        and "measure no search" not in score_lines(metrics)
    )


def test_a_gallery_of_ten_products_or_less_is_said_to_measure_nothing_at_ten():
    from moon2_lab.cli.pipeline import score_lines
    from small import product, tiny

    few, more = (
        score_lines(
            evaluate(
                tiny(),
                Catalog.from_products([product(number) for number in range(count)]),
                split="all",
                resamples=0,
                baselines=False,
                labels=False,
            )
        )
        for count in (10, 11)
    )
    assert "no more than 10 products are searched" in few and "products are searched" not in more


def test_a_second_evaluation_into_one_file_is_refused_while_the_first_one_works(tmp_path):
    from moon2_lab.folders import held
    from small import product, tiny

    catalog = Catalog.from_products([product(number) for number in range(12)])
    with held(tmp_path / "metrics.json", folder=False), pytest.raises(UsageError, match="another process writes here"):
        evaluate(tiny(), catalog, split="all", out=tmp_path, resamples=0, baselines=False, labels=False)
    assert (
        evaluate(tiny(), catalog, split="all", out=tmp_path, resamples=0, baselines=False, labels=False)
        and (tmp_path / "per_query.parquet").is_file()
    )
