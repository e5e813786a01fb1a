"`moon2 doctor`: exit codes, reasons and JSON for healthy models, for broken ones, for runs, for files of vectors."
import json
import shutil

import numpy as np
import pandas as pd
import pytest

from moon2_lab.cli.main import main
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.testing import MadeUpEncoder

SMALL = [
    "--backbone", "tiny", "--set", "num_layers=2", "image_size=32", "visual_tokens=4", "max_steps=2",
    "per_device_train_batch_size=8", "num_threads=1",
]


@pytest.fixture(scope="module")
def trained(drawn_catalogue, tmp_path_factory):
    "A run folder of two steps, and its catalogue."
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(drawn_catalogue, folder / "shop")
    assert main(["train", "--catalog", str(folder / "shop"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run", folder / "shop"


def findings(out):
    "(healthy, checks that are errors, all checks) of what --json printed."
    facts = json.loads(out)
    assert {"healthy", "findings", "figures"} <= facts.keys()
    assert all({"check", "severity", "detail"} <= x.keys() for x in facts["findings"])
    errors = [x["check"] for x in facts["findings"] if x["severity"] == "error"]
    assert facts["healthy"] == (not errors)
    return facts["healthy"], errors, [x["check"] for x in facts["findings"]]


# ---------------------------------------------------------------------------------------------- models


class Dropout(MadeUpEncoder):
    "Each call gives other vectors."
    calls = 0

    def encode_views(self, items):
        self.calls += 1
        rng = np.random.default_rng(self.calls)
        views = super().encode_views(items)
        noisy = {view: rows * (rng.random(rows.shape) > 0.1) for view, rows in views.items()}
        return {view: rows / np.linalg.norm(rows, axis=1, keepdims=True) for view, rows in noisy.items()}


class Sorted(MadeUpEncoder):
    "The vectors come back in the order of the ids."

    def encode_views(self, items):
        return super().encode_views(sorted(items, key=lambda item: item.item_id))


class OfTheBatch(MadeUpEncoder):
    "The mean of the batch is in every vector."

    def encode_views(self, items):
        views = super().encode_views(items)
        moved = {view: rows + 0.3 * np.nanmean(rows, axis=0) for view, rows in views.items()}
        return {view: rows / np.linalg.norm(rows, axis=1, keepdims=True) for view, rows in moved.items()}


@pytest.mark.parametrize(
    "make, exit_code, errors",
    [(MadeUpEncoder, 0, []), (Dropout, 1, ["determinism"]), (Sorted, 1, ["order"]), (OfTheBatch, 1, ["batch"])],
    ids=["healthy", "dropout", "reordered", "batch"],
)
def test_models(moon2, trained, monkeypatch, make, exit_code, errors):
    run, shop = trained
    encoder = make(0.5)
    given = encoder.encode_views
    encoder.encode_views = lambda products: given([getattr(x, "item", lambda view, x=x: x)("mm") for x in products])
    monkeypatch.setattr(Moon2Encoder, "from_pretrained", classmethod(lambda cls, *args, **options: encoder))
    code, out, _ = moon2("doctor", run, "--catalog", shop, "--split", "all", "--json")
    assert code == exit_code
    healthy, found, _ = findings(out)
    assert (healthy, [check for check in found if check != "alignment"]) == (not errors, errors)
    text = moon2("doctor", run, "--catalog", shop, "--split", "all")[1]
    assert text.splitlines()[0].startswith(f"{run}: {'un' if errors else ''}healthy") and all(x in text for x in errors)


def test_a_run_knows_its_catalogue(moon2, trained):
    run, shop = trained
    code, out, err = moon2("doctor", run, "--split", "all", "--json", "--device", "cpu")
    facts = json.loads(out)
    assert code in (0, 1) and (facts["catalog"], facts["split"], facts["products"]) == (str(shop), "all", 80), err
    assert facts["figures"]["model"]["trained_steps"] == 2 and facts["figures"]["run"]["steps"] == 2
    assert facts["figures"]["repeats"]["batch"] < 1e-5 and facts["figures"]["experts"]["never_chosen"] == 0
    assert sum(facts["figures"]["omega"].values()) == pytest.approx(1, abs=1e-4)
    other = json.loads(moon2("doctor", run, "--json", "--device", "cpu", "--limit", "6")[1])
    assert (other["split"], other["products"]) == ("test", 6)


def test_a_catalogue_that_is_not_what_it_was(moon2, trained, tmp_path):
    run, shop = trained
    copied = shutil.copytree(run, tmp_path / "run")
    settings = json.loads((copied / "run_settings.json").read_text())
    for words, said in ((f"moon2 train --catalog {tmp_path}/none", "not there"), ("moon2 eval", "not known")):
        (copied / "run_settings.json").write_text(json.dumps(settings | {"command": words}))
        code, out, err = moon2("doctor", copied)
        assert (code, out) == (2, "") and said in err and "--catalog" in err
    changed = shutil.copytree(shop, tmp_path / "shop")
    products = pd.read_parquet(changed / "products.parquet")
    products.iloc[:-1].to_parquet(changed / "products.parquet")
    (copied / "run_settings.json").write_text(json.dumps(settings | {"command": f"moon2 train --catalog {changed}"}))
    code, _, err = moon2("doctor", copied)
    assert code == 2 and "not any more" in err


@pytest.mark.parametrize(
    "words, said",
    [(["none"], "no such folder"), (["no.parquet"], "no such file"), (["frozen:tiny"], "no catalogue"), ([], "--help")],
    ids=str,
)
def test_wrong_usage(moon2, words, said):
    code, out, err = moon2("doctor", *words)
    assert (code, out) == (2, "") and said in err


def test_a_rival(moon2, trained):
    "Any model behind encode_views; frozen features of a random vision encoder say nothing of titles."
    code, out, err = moon2("doctor", "frozen:tiny", "--catalog", trained[1], "--split", "all", "--json")
    healthy, errors, _ = findings(out)
    assert code == (0 if healthy else 1) and not {"determinism", "order", "batch"} & set(errors), err


# ---------------------------------------------------------------------------------------------- files of vectors


def written(path, rows, names=None, **columns):
    "A parquet file with one view."
    names = [f"p{number:03}" for number in range(len(rows))] if names is None else names
    pd.DataFrame({"product_id": names, "view": "mm", "vector": [list(row) for row in rows], **columns}).to_parquet(path)
    return path


def healthy_rows(count=120, dim=16):
    "Rows of length 1 in all directions."
    rows = np.random.default_rng(0).normal(size=(count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nan(rows):
    rows[5] = np.nan
    return rows


def in_plane(rows):
    rows[:, 2:] = 0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def equal(rows):
    rows[1:10] = rows[0]
    return rows


@pytest.mark.parametrize(
    "change, exit_code, check",
    [
        (lambda rows: rows, 0, None), (nan, 1, "finite"), (lambda rows: rows * 3, 1, "length"),
        (lambda rows: np.repeat(rows[:1], len(rows), axis=0), 1, "constant"),
        (in_plane, 1, "collapse"), (equal, 0, "duplicates"),
    ],
    ids=["healthy", "nan", "length", "constant", "plane", "equal"],
)
def test_files(moon2, tmp_path, change, exit_code, check):
    path = written(tmp_path / "vectors.parquet", change(healthy_rows()))
    code, out, _ = moon2("doctor", path, "--json")
    assert code == exit_code and (check is None or check in findings(out)[2])
    assert check in (None, "collapse") or "p005" in out  # the products are named


def test_equal_vectors_of_other_titles(moon2, tmp_path):
    titles = [f"title {number}" for number in range(120)]
    path = written(tmp_path / "vectors.parquet", equal(healthy_rows()), title=titles)
    code, out, _ = moon2("doctor", path, "--json")
    assert code == 1 and findings(out)[1] == ["duplicates"]
    path = written(tmp_path / "same.parquet", equal(healthy_rows()), title=["one"] * 10 + titles[10:])
    assert moon2("doctor", path)[0] == 0


def test_a_file_of_moon2_embed(moon2, trained, tmp_path):
    run, shop = trained
    made = tmp_path / "vectors.parquet"
    assert moon2("embed", run, "--catalog", shop, "--out", made, "--view", "all")[0] == 0
    code, out, _ = moon2("doctor", made, "--catalog", shop, "--json")
    facts = json.loads(out)
    assert code in (0, 1) and sorted(facts["figures"]) == ["file", "i", "mm", "t", "t-i"]
    assert facts["figures"]["mm"]["products"] == 80 and facts["figures"]["file"]["model_fingerprint"]
    known = {"duplicates", "unexplained"} & facts["figures"]["mm"].keys()
    assert known == {"duplicates"} and facts["figures"]["mm"]["duplicates"] == 0
    strangers = written(tmp_path / "strangers.parquet", healthy_rows(30))
    facts = json.loads(moon2("doctor", strangers, "--catalog", shop, "--json")[1])
    assert [(x["check"], x["products"]) for x in facts["findings"]] == [("catalogue", 30)]


def test_a_file_that_is_none(moon2, tmp_path):
    (tmp_path / "text.parquet").write_text("no vectors")
    code, out, err = moon2("doctor", tmp_path / "text.parquet")
    assert (code, out) == (2, "") and "text.parquet" in err and err.count("\n") == 1


def test_the_page_and_a_place_that_cannot_be_written(moon2, tmp_path):
    path = written(tmp_path / "vectors.parquet", healthy_rows(), title="<script>alert(1)</script>")
    code, out, _ = moon2("doctor", path, "--out", tmp_path)
    page = (tmp_path / "health.html").read_text(encoding="utf-8")
    assert code == 0 and str(tmp_path / "health.html") in out and "<script>alert" not in page
    code, out, err = moon2("doctor", path, "--out", "/dev/null/health.html")
    assert (code, out) == (2, "") and "/dev/null" in err


@pytest.mark.slow
def test_a_trained_model_is_healthy(moon2, drawn_catalogue, tmp_path, monkeypatch):
    "And the same before training is not."
    from moon2_lab.data.synthetic.generator import make_catalog

    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "cache"))
    shop, run = tmp_path / "shop", tmp_path / "run"
    make_catalog(shop, products=400, seed=5)
    options = ["--backbone", "tiny", "--set", "max_steps=150", "per_device_train_batch_size=32", "num_threads=1"]
    assert moon2("train", "--catalog", shop, "--out", run, *options)[0] == 0
    code, out, err = moon2("doctor", run, "--split", "all", "--device", "cpu")
    assert code == 0, out + err
    Moon2Encoder.from_backbone("tiny").save_pretrained(tmp_path / "untrained")
    assert moon2("doctor", tmp_path / "untrained", "--catalog", shop, "--split", "all", "--device", "cpu")[0] == 1


def test_what_was_trained_beside_a_base(trained, tmp_path):
    "LoRA that stands beside a named base is merged for a check, and the numbers that were trained are counted."
    import torch

    from moon2_lab.data.catalog import Catalog
    from moon2_lab.studies.doctor import examine_model
    from moon2_lab.tiny_models import tiny_model

    base = tiny_model("qwen3_vl", tmp_path / "base")
    options = {"image_size": 64, "num_experts": 2, "top_k": 1, "experts": "lowrank", "expert_rank": 2}
    encoder = Moon2Encoder.from_backbone(str(base), **options)
    encoder.add_lora(2, 4)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    encoder.save_pretrained(tmp_path / "model", base="named")
    health = examine_model(tmp_path / "model", Catalog.load(trained[1]), "cpu", most=20).health
    figures, notes = health.figures, {x.check: x.what for x in health.findings if x.severity == "note"}
    assert figures["adapter"]["rank"] == 2 and figures["adapter"]["by_merging"] < 1e-4
    assert "LoRA of rank 2" in notes["adapter"]
    assert figures["base"]["lora"]["rank"] == 2 and figures["base"]["trained"]["LoRA"] > 0
    assert "numbers" in notes["base"]
    merged = Moon2Encoder.from_pretrained(tmp_path / "model", "cpu")
    beside = Moon2Encoder.from_pretrained(tmp_path / "model", "cpu", merge=False)
    assert (bool(merged.lora), bool(beside.lora)) == (False, True)
