"""Bad input from end to end: whatever can be encoded is trained on and scored, the rest is named, nothing good is lost.

Damaged pictures and tables are in test_catalog.py, NaN vectors in scoring in test_evaluate.py, cut models in
test_encoder.py, cut checkpoints in test_train.py, options in test_cli.py."""
import errno
import io
import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.data.queries import Lexicon, search_phrase
from moon2_lab.errors import DataError, LabError
from moon2_lab.evaluation.evaluate import evaluate
from moon2_lab.files import write_json, write_parquet
from moon2_lab.model import feature_cache, vision
from moon2_lab.model.feature_cache import FeatureCache
from moon2_lab.model.token_rows import PictureSize
from moon2_lab.training.trainer import Trainer
from PIL import Image
from small import picture, pretrained, product, settings, shop, tiny

LONG = "word " * 2_000  # 10,000 characters
UNBROKEN = "x" * 10_000
ODD = {
    "p001": LONG, "p002": UNBROKEN, "p006": "👟👟👟", "p007": "‼️", "p011": "\u200b\u200b", "p012": "日本語の商品名",
    "p016": "a\0b", "p017": "مزهرية زرقاء",
}

pytestmark = pytest.mark.usefixtures("own_cache")


def odd_shop(count=60):
    "Odd titles, blank titles, no titles, no pictures, a grey and a one-pixel picture."
    changes = {name: {"title": title} for name, title in ODD.items()} | {
        "p003": {"title": None}, "p004": {"refs": ()}, "p008": {"title": " \t "},
    }
    changes |= {
        "p013": {"refs": (ImageRef.from_pil(Image.new("L", (300, 2), 9)),)},
        "p014": {"refs": (ImageRef.from_pil(Image.new("RGB", (1, 1))),)},
    }
    made = [product(number) for number in range(count)]
    return Catalog.from_products(
        [product(number, **changes.get(one.product_id, {})) for number, one in enumerate(made)]
    )


def test_odd_products_are_encoded():
    catalog, encoder = odd_shop(), tiny()
    views = encoder.encode_views(list(catalog))
    assert encoder.last_missing == {"t": ["p003", "p008"], "i": ["p004"], "mm": []}
    assert {
        view: [catalog[row].product_id for row in np.flatnonzero(np.isnan(rows).any(1))] for view, rows in views.items()
    } == {"t": ["p003", "p008"], "i": ["p004"], "mm": []}
    for rows in views.values():
        there = rows[~np.isnan(rows[:, 0])]
        np.testing.assert_allclose(np.linalg.norm(there, axis=1), 1, atol=1e-5)


def test_long_titles_cost_no_more_than_their_cut():
    encoder = tiny()
    assert [len(row) for row in encoder.rows_of([Item(LONG, None), Item(UNBROKEN, None), Item("👟👟👟", None)])] == [
        64, 3, 1,
    ]
    same = encoder.encode([Item(LONG, None), Item("word " * 64, None)], view="t")
    np.testing.assert_allclose(same[0], same[1], atol=1e-6)


def test_odd_titles_give_a_phrase_or_none():
    "A title without a word asks no text query, and says so by being None."
    catalog = odd_shop()
    lexicon = Lexicon(catalog)
    phrases = {name: search_phrase(catalog.get(name), 1, lexicon) for name in ODD}
    assert phrases["p006"] is None and phrases["p007"] is None and phrases["p011"] is None
    assert all(phrase is None or phrase.strip() for phrase in phrases.values()) and len(phrases["p001"]) <= len(LONG)


def test_odd_products_are_trained_on_and_scored(tmp_path):
    "From the catalogue to the scores, without a NaN and without leaving out what can be used."
    catalog = odd_shop()
    trainer = Trainer(tiny(), catalog, settings(max_steps=12), out=tmp_path / "run")
    assert {"p001", "p002", "p003", "p004", "p006", "p008", "p013", "p014"} <= {
        triplet.positive.product_id for triplet in trainer.triplets
    }
    history = trainer.train()
    assert np.isfinite(history["loss"]).all() and not history["skipped"].any()
    metrics = evaluate(trainer.encoder, catalog, split="all", baselines=False, resamples=0)
    asked = {name: block["n_queries"] for name, block in metrics["directions"].items()}
    assert (asked["i->t"], asked["i->mm"], asked["t->i"]) == (59, 59, 58) and asked[
        "t->mm"
    ] == 55  # three titles have no word
    assert all(block["n_nan_vectors"] == 0 and block["n_gallery"] >= 58 for block in metrics["directions"].values())
    json.dumps(metrics, allow_nan=False)


@pytest.mark.slow
def test_odd_titles_with_the_pretrained_tokenizer(monkeypatch):
    "Emoji, control characters and 10,000 letters become at most 64 tokens of its vocabulary."
    encoder = pretrained(monkeypatch, num_layers=1, num_experts=0)
    for title in ODD.values():
        ids, spans = encoder.backbone.tokenize(title)
        assert 1 <= len(ids) == len(spans) <= 64 and max(ids) < len(encoder.backbone.decoder.embed_tokens.weight)
        assert all(0 <= start <= stop <= len(title) for start, stop in spans)
    vectors = encoder.encode([Item(title, None) for title in ODD.values()], view="t")
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_picture_that_vanishes_is_named(tmp_path):
    "Between opening the catalogue and the first look at its pictures; what was encoded before stays."
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    Image.new("RGB", (40, 40), "blue").save(tmp_path / "b.png")
    pd.DataFrame({"product_id": ["a", "b"], "image_paths": ['["a.png"]', '["b.png"]']}).to_parquet(
        tmp_path / "products.parquet"
    )
    catalog, encoder = Catalog.load(tmp_path), tiny()
    known = encoder.encode([catalog.get("a")])
    (tmp_path / "b.png").unlink()
    with pytest.raises((LabError, OSError), match=r"b\.png"):
        encoder.encode(list(catalog))
    np.testing.assert_array_equal(encoder.encode([catalog.get("a")]), known)


# ---------------------------------------------------------------------------------------------- the feature store


def store_of(folder, count, shape=(4, 6)):
    keys = [bytes([number]) * 32 for number in range(count)]
    features = np.arange(count * np.prod(shape), dtype=np.float16).reshape(-1, shape[1])
    FeatureCache(folder, shape[1]).add(keys, features, [PictureSize(shape[0], (2, 2))] * count)
    return keys, features


@pytest.mark.parametrize("fails_at", [0, 1], ids=["features", "index"])
def test_a_full_disk_while_features_are_stored(tmp_path, monkeypatch, fails_at):
    "What was stored is read as before; half a record is cut away by the next writer."
    keys, features = store_of(tmp_path, 5)
    store, calls, real = FeatureCache(tmp_path, 6), [], feature_cache._write_at

    def half(path, offset, data):
        calls.append(path)
        if len(calls) - 1 == fails_at:
            real(path, offset, data[: len(data) // 2 - 3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, offset, data)

    new, more = [b"\xff" * 32, b"\xfe" * 32], np.ones((2 * 4, 6), np.float16)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "_write_at", half)
        with pytest.raises(LabError, match=r"cannot write vision features.*MOON2_CACHE"):
            store.add(new, more, [PictureSize(4, (2, 2))] * 2)
    for reader in (store, FeatureCache(tmp_path, 6)):
        np.testing.assert_array_equal(reader.get(keys), features)
        assert reader.missing(new) == [0, 1]
    store.add(new, more, [PictureSize(4, (2, 2))] * 2)
    np.testing.assert_array_equal(store.get(new + keys), np.concatenate([more, features]))
    again = FeatureCache(tmp_path, 6)
    np.testing.assert_array_equal(again.get(new + keys), np.concatenate([more, features]))


@pytest.mark.parametrize("name", ["features.f16", "index.bin"])
def test_a_cut_feature_file_costs_the_cut_features_only(tmp_path, name):
    keys, features = store_of(tmp_path, 5)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-10])
    store = FeatureCache(tmp_path, 6)
    assert store.missing(keys) == [4]
    np.testing.assert_array_equal(store.get(keys[:4]), features[: 4 * 4])
    store.add(keys[4:], features[4 * 4 :], [PictureSize(4, (2, 2))])
    np.testing.assert_array_equal(FeatureCache(tmp_path, 6).get(keys), features)


def test_two_processes_may_write_features(tmp_path):
    "Each sees what the other has added, and nothing is stored twice."
    one, two, sizes = FeatureCache(tmp_path, 2), FeatureCache(tmp_path, 2), [PictureSize(1, (1, 1))] * 2
    one.add([b"a" * 32, b"b" * 32], np.ones((2, 2)), sizes)
    two.add([b"b" * 32, b"c" * 32], np.full((2, 2), 2), sizes)
    one.refresh()
    np.testing.assert_array_equal(one.get([b"a" * 32, b"b" * 32, b"c" * 32])[:, 0], [1, 1, 2])
    assert (tmp_path / "index.bin").stat().st_size == 3 * 44


def test_a_picture_is_encoded_once_in_its_life(monkeypatch):
    "The second encoder of the same kind finds the features; another resolution does not take them."
    encoder, other = tiny(), tiny(image_size=16)
    item = Item(None, ImageRef.from_pil(Image.new("RGB", (30, 20), "teal")))
    first = encoder.encode([item])
    monkeypatch.setattr(vision.PatchColours, "forward", lambda *_: pytest.fail("encoded again"))
    np.testing.assert_array_equal(tiny().encode([item]), first)
    with pytest.raises(pytest.fail.Exception, match="encoded again"):
        other.encode([item])


# ---------------------------------------------------------------------------------------------- files that are whole or
# absent


@pytest.mark.parametrize(
    "write", [lambda path: write_json(path, {"a": 1}), lambda path: write_parquet(path, pd.DataFrame({"a": [1]}))],
    ids=["json", "parquet"],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write, number):
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()

    def full(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match="the disk is full.*free some space"):
        write(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_scores_on_a_full_disk_leave_the_old_ones(tmp_path, monkeypatch):
    catalog, encoder = shop(30), tiny()
    evaluate(encoder, catalog, split="valid", out=tmp_path, baselines=False, resamples=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"metrics.json", "per_query.parquet"}

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match="the disk is full"):
        evaluate(encoder, catalog, split="valid", out=tmp_path, baselines=False, resamples=0, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ---------------------------------------------------------------------------------------------- NaN


def test_broken_weights_give_vectors_that_are_counted():
    "NaN in a trained model: scoring counts the broken vectors against it instead of crashing or helping it."
    encoder, catalog = tiny(), shop(30)
    with torch.no_grad():
        encoder.backbone.connector[1].weight[0, 0] = float("nan")
    metrics = evaluate(encoder, catalog, split="valid", baselines=False, resamples=0)
    text_only, with_image = metrics["directions"]["t->mm"], metrics["directions"]["i->mm"]
    assert (
        with_image["n_nan_vectors"] == 12
        and text_only["n_nan_vectors"] == 6
        and with_image["R@1"]["value"] == text_only["R@1"]["value"] == 0
    )
    json.dumps(metrics, allow_nan=False)


def test_nothing_to_train_on():
    with pytest.raises(LabError):
        Trainer(tiny(), Catalog.from_products([]), settings())
    with pytest.raises(DataError, match=r"no usable product in split 'train'.*valid \(20\)"):
        Trainer(tiny(), Catalog.from_products([product(number, split="valid") for number in range(20)]), settings())
    same = [product(0, product_id=f"same{number}", split="train") for number in range(20)]
    with pytest.raises(DataError, match="no negatives: 20 product.*one product key"):
        Trainer(tiny(), Catalog.from_products(same), settings())


def test_item_without_anything_is_named():
    with pytest.raises(DataError, match=r"neither text nor image \[empty\].*leave it out"):
        tiny().forward_items([Item("ball", None), Item("", picture(1)), Item(None, None, "empty")])


def test_bytes_that_are_no_picture_are_named():
    ref = ImageRef("no-picture", lambda: Image.open(io.BytesIO(b"text")).convert("RGB"))
    with pytest.raises(Exception, match="cannot identify image|not an image"):
        tiny().encode([Item("ball", ref, "p")])
