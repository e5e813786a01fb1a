"`moon2 map`: the map of a run, of the products it embedded while it trained, and of a file of vectors."
import json
import shutil

import pytest

from moon2_lab.cli.main import main

SMALL = [
    "--backbone", "tiny", "--set", "num_layers=1", "image_size=32", "visual_tokens=4", "max_steps=4", "eval_points=2",
    "per_device_train_batch_size=8", "num_threads=1",
]


@pytest.fixture(scope="module")
def trained(drawn_catalogue, tmp_path_factory):
    "A run folder of four steps that were scored twice, and its catalogue."
    folder = tmp_path_factory.mktemp("map")
    shutil.copytree(drawn_catalogue, folder / "shop")
    assert main(["train", "--catalog", str(folder / "shop"), "--out", str(folder / "run"), *SMALL]) == 0
    return folder / "run", folder / "shop"


def asked(capsys, *words):
    "(exit code, facts or None, stderr) of a command with --json."
    capsys.readouterr()
    code = main([str(word) for word in (*words, "--json")])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out.strip() else None, err


def test_a_run_is_drawn_and_played(trained, tmp_path, capsys):
    run, _ = trained
    assert [path.name for path in sorted((run / "frames").iterdir())] == [
        "step-000000.npz", "step-000002.npz", "step-000004.npz"
    ]
    code, facts, _ = asked(capsys, "map", run, "--out", tmp_path, "--device", "cpu")
    assert code == 0 and facts["views"] == ["t", "i", "mm"] and facts["frames"] == []
    assert {"strongest expert", "category, level 1"} <= set(facts["columns"])
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert f"moon2 heatmap {run} --query id:{{query}}" in page
    code, facts, _ = asked(capsys, "map", run, "--training", "--out", tmp_path / "course.html")
    assert code == 0 and facts["frames"] == ["step 0", "step 2", "step 4"] and facts["projections"][0] == "the training"


def test_the_filter_is_a_column_of_training_products(trained, tmp_path, capsys):
    import pandas as pd

    run, _ = trained
    ledger = pd.read_parquet(run / "filter_ledger.parquet")
    facts = asked(capsys, "map", run, "--split", "train", "--limit", "20", "--out", tmp_path, "--device", "cpu")[1]
    assert facts["products"] == 20 and facts["total"] > 20
    assert ("lowest phi in training" in facts["columns"]) == (len(ledger) > 0)


def test_bad_input_is_named_and_nothing_is_written(trained, tmp_path, capsys):
    run, shop = trained
    out = ("--out", tmp_path / "map.html")
    for words, told in (
        (("map", tmp_path / "none", *out), "no such folder"),
        (("map", run, "--split", "extra", *out), "extra"),
        (("map", run, "--columns", tmp_path / "none.csv", *out), "no such file"),
        (("map", shop / "products.parquet", *out), "vector"),
        (("map", run, "--limit", "1", *out), "--limit"),
    ):
        try:
            code, facts, err = asked(capsys, *words)
        except SystemExit as stopped:  # argparse
            code, facts, err = stopped.code, None, capsys.readouterr().err
        assert code == 2 and facts is None and told in err, (words, err)
    (tmp_path / "cut").mkdir()
    shutil.copytree(run, tmp_path / "cut" / "run")
    frame = tmp_path / "cut" / "run" / "frames" / "step-000002.npz"
    frame.write_bytes(frame.read_bytes()[:300])
    code, _, err = asked(capsys, "map", tmp_path / "cut" / "run", "--training", "--catalog", shop, *out)
    assert code == 2 and "step-000002.npz" in err
    assert not (tmp_path / "map.html").exists()
