"""Co-augmentation of a catalogue: the same files every time, nothing lost by an interruption, nothing outside the train
split, a reason for each refusal."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("cv2")

from moon2_lab.augment.consistency import real_pairs, score_pairs, unseen_products
from moon2_lab.augment.llm_client import NO_ANSWER
from moon2_lab.augment.pipeline import Recipe, STATE, augment_catalog, evaluation_hash, expand_pictures
from moon2_lab.augment.title_enrichment import Enriched
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.catalog_tables import AUGMENTED_FILE
from moon2_lab.data.synthetic.generator import make_catalog
from moon2_lab.errors import DataError, LabError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return make_catalog(tmp_path_factory.mktemp("shop") / "drawn", products=40, seed=2, image_size=96)


def brightness(pictures, titles):
    "Mean brightness, 0 to 1: a scorer that needs no model."
    return np.array([np.asarray(picture.load()).mean() / 255 for picture in pictures])


def content(folder):
    "Every file but the times that a run took."
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != STATE
    }


def test_nothing_but_the_train_split_is_touched(drawn, tmp_path):
    """Files of the shop byte for byte, evaluation items by content; every row, kept or not, is about a train product,
    and says how it was made."""
    summary = augment_catalog(drawn, tmp_path / "out", Recipe(scorer=brightness))
    before, after = Catalog.load(drawn), Catalog.load(tmp_path / "out")
    old, new = content(drawn), content(tmp_path / "out")
    assert {name: data for name, data in new.items() if name in old} == old
    assert all(
        re.fullmatch(r"expanded/[0-9a-f]{2}/[0-9a-f]{20}-(background|viewpoint|detail)\.jpg", name)
        for name in set(new) - set(old) - {AUGMENTED_FILE}
    )
    assert evaluation_hash(after) == evaluation_hash(before) == summary["evaluation_hash"]
    table = pd.read_parquet(tmp_path / "out" / AUGMENTED_FILE)
    assert {after.get(name).split for name in table.product_id} == {"train"}
    assert (
        table.method.notna().all()
        and table.source.notna().all()
        and table.seed.notna().all()
        and table.parameters.map(json.loads).map(type).eq(dict).all()
    )
    assert table[~table.kept].reason.notna().all() and table[table.kept].reason.isna().all()
    assert table.groupby("product_id").size().max() <= 4 and not (tmp_path / "out" / ".parts").exists()


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(drawn, tmp_path):
    "kill -9 while pictures are made; the second run makes what is missing."
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT / 'tests' / 'augment')!r})
from moon2_lab.augment import pipeline
from test_coaugment import brightness
whole, made = pipeline.expand_pictures, []
def slow(*given):
    made.append(1)
    if len(made) > 12:
        print("half", flush=True)
        time.sleep(30)
    return whole(*given)
pipeline.expand_pictures = slow
parts = pipeline.in_chunks
pipeline.in_chunks = lambda *given, **more: parts(*given, **more | {{"size": 5}})
pipeline.augment_catalog({str(drawn)!r}, {str(tmp_path / 'out')!r}, pipeline.Recipe(scorer=brightness), workers=1)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline().strip() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    done = sorted((tmp_path / "out" / ".parts").glob("pictures-*"))
    assert len(done) == 2 and not (tmp_path / "out" / AUGMENTED_FILE).exists()
    stamps = [path.stat().st_mtime_ns for path in done]
    import moon2_lab.augment.pipeline as module

    parts = module.in_chunks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "in_chunks", lambda *given, **more: parts(*given, **more | {"size": 5}))
        patch.setattr(module.shutil, "rmtree", lambda folder: stamps.append([path.stat().st_mtime_ns for path in done]))
        augment_catalog(drawn, tmp_path / "out", Recipe(scorer=brightness))
    assert stamps[-1] == stamps[:-1]  # what was done was not done again
    augment_catalog(drawn, tmp_path / "straight", Recipe(scorer=brightness))
    one, other = content(tmp_path / "out"), content(tmp_path / "straight")
    assert {name: data for name, data in one.items() if not name.startswith(".parts")} == other


def test_the_threshold_is_a_quantile_of_the_real_pairs(drawn, tmp_path):
    "Recomputed from the pictures themselves; a quantile of 0 refuses only what is below every real pair."
    strict, lax = (
        augment_catalog(drawn, tmp_path / str(q), Recipe(scorer=brightness, keep_quantile=q)) for q in (0.5, 0.0)
    )
    valid = list(Catalog.load(drawn).split("valid"))
    real = brightness([product.image_ref() for product in real_pairs(valid)], None)
    assert strict["filter"]["pairs_of"] == "valid" and strict["filter"]["real_pairs"] == len(valid) >= 2
    assert strict["filter"]["threshold"] == pytest.approx(np.quantile(real, 0.5)) and lax["filter"][
        "threshold"
    ] == pytest.approx(real.min())
    for folder, summary in ((tmp_path / "0.5", strict), (tmp_path / "0.0", lax)):
        table = Catalog.load(folder).augmentation.dropna(subset=["score"])
        assert ((table.score >= summary["filter"]["threshold"]) == table.kept).all() and len(table) > 50
        for row in table[table.field == "expanded_image"].head(3).itertuples():
            assert row.score == pytest.approx(
                np.asarray(Image.open(folder / row.value).convert("RGB")).mean() / 255, abs=1e-6
            )
    assert strict["filter"]["refused"] > lax["filter"]["refused"]


def test_the_threshold_is_not_taken_from_what_the_scorer_was_trained_on(drawn, tmp_path):
    """A scorer that knows the train pairs by heart gives them 1 and everything else its real worth: the threshold is
    what unseen pairs get."""
    catalog = Catalog.load(drawn)
    known = {(ref.key, product.title) for product in catalog.split("train") for ref in product.refs}

    def by_heart(pictures, titles):
        return np.array([1.0 if (picture.key, title) in known else 0.4 for picture, title in zip(pictures, titles)])

    found = augment_catalog(drawn, tmp_path / "out", Recipe(scorer=by_heart))["filter"]
    assert found["threshold"] == pytest.approx(0.4) and found["refused"] == 0
    ids = {product.product_id for product in unseen_products(catalog)}
    assert ids == {product.product_id for product in catalog.split("valid")}
    twins = Catalog.from_products(
        [replace(product, split="valid" if n else "train", title="One title") for n, product in enumerate(catalog)]
    )
    assert unseen_products(twins) == []  # all are the train product under other ids


@pytest.mark.parametrize(
    "answer", [np.zeros(3), np.full(7, np.nan), np.zeros((7, 1))], ids=["short", "nan", "two axes"]
)
def test_a_scorer_that_returns_rubbish(tmp_path, answer):
    with pytest.raises(DataError, match=r"the scorer returned shape .* for 7 pairs.*one finite similarity"):
        score_pairs(lambda pictures, titles: answer, [(None, "a")] * 7, tmp_path, "made")
    assert not list(tmp_path.iterdir())


class Stubborn:
    "An enricher that answers some, and then a server that is gone."
    name, model = "stubborn", "m-1"

    def __init__(self, after):
        self.after, self.asked, self.stopped = after, 0, None

    def enrich(self, requests):
        for request in requests:
            self.asked += 1
            if self.asked > self.after:
                self.stopped = LabError("the server does not answer", where="http://127.0.0.1:9", advice="start it")
            yield Enriched(request.product_id, f"{request.title} new", None, self.name, self.model)


def test_an_enricher_that_stops_keeps_what_was_done(drawn, tmp_path, monkeypatch):
    "Whole parts stay; the run that continues asks only for the rest."
    import moon2_lab.augment.pipeline as module

    parts = module.in_chunks
    monkeypatch.setattr(module, "in_chunks", lambda *given, **more: parts(*given, **more | {"size": 8}))
    with pytest.raises(LabError, match="the server does not answer"):
        augment_catalog(drawn, tmp_path / "out", Recipe(kinds=(), enricher=Stubborn(20)))
    again = Stubborn(1000)
    summary = augment_catalog(drawn, tmp_path / "out", Recipe(kinds=(), enricher=again))
    count = Catalog.load(drawn).splits["train"]
    assert again.asked == count - 16 and summary["kinds"]["text"]["kept"] == count


class Forgetful:
    "An enricher that leaves every third question of its first round without an answer."
    name, model, stopped = "forgetful", "m-1", None

    def __init__(self):
        self.asked = []

    def enrich(self, requests):
        first = not self.asked
        self.asked += [request.product_id for request in requests]
        for place, request in enumerate(requests):
            lost = first and place % 3 == 0
            yield Enriched(
                request.product_id, None if lost else f"{request.title} new", f"{NO_ANSWER}: timeout" if lost else None,
                self.name, self.model,
            )


def test_what_got_no_answer_is_asked_again(drawn, tmp_path):
    enricher = Forgetful()
    augment_catalog(drawn, tmp_path / "out", Recipe(kinds=(), enricher=enricher))
    out = Catalog.load(tmp_path / "out")
    train = [product.product_id for product in out if product.split == "train"]
    assert enricher.asked == train + train[::3] and all(out.get(name).enriched_title for name in train)
    assert sorted(out.augmentation.product_id) == sorted(train)


def test_odd_products(tmp_path):
    """Without picture, without title, a blank picture, a file that is none: a reason for each, and the others are
    augmented."""
    folder = make_catalog(tmp_path / "drawn", products=30, seed=4, image_size=96)
    table = pd.read_parquet(folder / "products.parquet")
    blank, broken, untitled, bare = table[table.split == "train"].product_id[:4]
    paths = {row.product_id: json.loads(row.image_paths) for row in table.itertuples()}
    for name in paths[blank]:
        (folder / name).unlink()
        Image.new("RGB", (80, 80), "white").save(folder / name)
    for name in paths[broken]:
        (folder / name).unlink()
        (folder / name).write_text("no picture")
    table.loc[table.product_id == untitled, "title"] = None
    table.loc[table.product_id == bare, "image_paths"] = "[]"
    table.to_parquet(folder / "products.parquet")
    (folder / "triplets.parquet").unlink()
    augment_catalog(folder, tmp_path / "out", Recipe(scorer=brightness))
    found = Catalog.load(tmp_path / "out").augmentation
    rows = {name: found[found.product_id == name] for name in (blank, broken, untitled, bare)}
    assert (
        rows[blank].query("field == 'expanded_image'").reason.str.contains("no foreground").all()
        and len(rows[blank].query("field == 'expanded_image'")) == 1
    )
    assert set(rows[broken].field) == set(rows[bare].field) == {"enriched_title"}
    assert (
        set(rows[untitled].field) == {"expanded_image"}
        and rows[untitled].score.isna().all()
        and rows[untitled].kept.all()
    )
    assert found.kept.sum() > 30


def test_one_failing_edit_costs_one_row(drawn, tmp_path):
    class Picky:
        name, model = "picky", None

        def edit(self, subject, title, kind, seed):
            if kind == "detail":
                raise DataError("no detail in this one", where="picky", advice="none")
            from moon2_lab.augment.image_edits import ClassicalEditor

            return ClassicalEditor().edit(subject, title, kind, seed)

    product = next(product for product in Catalog.load(drawn) if product.split == "train")
    rows = expand_pictures(product, Recipe(editor=Picky()), tmp_path)
    assert [(row["kind"], row["kept"], row["reason"]) for row in rows] == [
        ("background", True, None), ("viewpoint", True, None), ("detail", False, "no detail in this one"),
    ]


def test_a_source_without_a_train_split(drawn, tmp_path):
    table = pd.read_parquet(drawn / "products.parquet").assign(split="test")
    (tmp_path / "shop").mkdir()
    os.symlink(drawn / "images", tmp_path / "shop" / "images")
    table[["product_id", "title", "split"]].to_parquet(tmp_path / "shop" / "products.parquet")
    with pytest.raises(DataError, match="no usable product in split 'train'"):
        augment_catalog(tmp_path / "shop", tmp_path / "out")


def test_a_source_that_changes_meanwhile(drawn, tmp_path):
    "The check at the end notices it: no augmented.parquet of a catalogue that is no longer the one that was read."
    folder = make_catalog(tmp_path / "drawn", products=20, seed=6, image_size=64)

    def meddling(pictures, titles):
        table = pd.read_parquet(folder / "products.parquet")
        table.loc[table.split != "train", "title"] = "changed"
        table.to_parquet(folder / "products.parquet")
        return brightness(pictures, titles)

    with pytest.raises(LabError, match="evaluation splits differ"):
        augment_catalog(folder, tmp_path / "out", Recipe(scorer=meddling))


def test_the_state_file_names_what_differs(drawn, tmp_path):
    augment_catalog(drawn, tmp_path / "out", Recipe(kinds=()), limit=5)
    with pytest.raises(UsageError, match="made with another limit"):
        augment_catalog(drawn, tmp_path / "out", Recipe(kinds=()), limit=6)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("name, rate", [("fashion-product-images", 200), ("magento-luma", 100)])
def test_real_products(data_root, tmp_path, name, rate, capsys):
    """Most products get something, and it goes fast enough: 200 products a minute for titles and pictures (a tenth of
    it is asked for here, tests share the machine)."""
    started = time.perf_counter()
    summary = augment_catalog(data_root / name, tmp_path / "out", limit=40)
    per_minute = 60 * 40 / (summary["seconds"]["titles"] + summary["seconds"]["pictures"])
    with capsys.disabled():
        print(
            f"\n{name}: {per_minute:,.0f} products a minute ({time.perf_counter() - started:.0f} s in all), "
            f"{ ({kind: counts['kept'] for kind, counts in summary['kinds'].items()}) }",
            end=" ",
        )
    assert per_minute > rate / 10 and all(
        counts["kept"] >= 20 for kind, counts in summary["kinds"].items() if kind != "subject"
    )
