"""The command `moon2`: exit codes, what goes to stdout and what to stderr, bad input, and the main job end to end on a
small drawn catalogue."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from moon2_lab.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--backbone", "tiny", "--set", "num_layers=2", "image_size=32", "visual_tokens=4", "max_steps=6", "save_steps=3",
    "per_device_train_batch_size=8", "num_threads=1",
]
COMMANDS = (
    ["data", "check"], ["data", "synth"], ["backbone", "check"],
    ["train"], ["eval"], ["embed"], ["index"], ["search"], ["compare"], ["doctor"], ["map"], ["demo"],
    ["report"], ["push"], ["export"], ["run"],
)


@pytest.fixture(scope="module")
def trained(drawn_catalogue, tmp_path_factory):
    "A run folder of six steps."
    run = tmp_path_factory.mktemp("runs") / "trained"
    assert main(["train", "--catalog", str(drawn_catalogue), "--out", str(run), *SMALL]) == 0
    return run


def one_line(err):
    "The error message; fails unless it is a single line without a traceback."
    lines = [line for line in err.splitlines() if line.startswith("moon2: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


# ---------------------------------------------------------------------------------------------- help and usage


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_has_an_example(moon2, words):
    code, out, err = moon2(*words, "--help")
    assert (code, err) == (0, "") and f"example:\n  moon2 {' '.join(words)} " in out


def test_a_real_process_answers_at_once_and_loads_nothing_heavy():
    "The installed command is this function; --help must not wait for torch."
    code = (
        "import sys; from moon2_lab.cli.main import main; code = main(['--help']); heavy = {'torch', 'pandas', "
        "'numpy', "
        "'transformers'}; sys.exit(code or 90 * bool(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "moon2 COMMAND --help" in done.stdout
    spent = sum(
        int(line.split(":")[1].split("|")[0])
        for line in done.stderr.splitlines()
        if line.startswith("import time:") and "[us]" not in line
    )
    assert spent < 1_000_000, f"imports took {spent / 1e6:.1f} s"


@pytest.mark.slow
def test_exit_codes_and_streams_of_a_real_process(drawn_catalogue, tmp_path):
    "As a script sees it."
    def moon2(*words):
        return subprocess.run(
            [
                sys.executable, "-c", "import sys; from moon2_lab.cli.main import main; sys.exit(main())",
                *map(str, words),
            ],
            cwd=ROOT, capture_output=True, text=True,
        )

    good = moon2("data", "check", drawn_catalogue, "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["products"] == 80 and good.stderr == ""
    bad = moon2("eval", tmp_path, "--catalog", drawn_catalogue)
    assert (bad.returncode, bad.stdout) == (2, "") and "no model in this folder" in one_line(bad.stderr)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "required"), (["frobnicate"], "frobnicate"), (["train"], "--catalog"), (["data"], "COMMAND"),
        (["data", "check", ".", "--jason"], "--jason"), (["data", "synth", "x", "--products", "many"], "many"),
        (["eval", "x", "--catalog", "y", "--protocol", "other"], "other"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line_and_exit_code_2(moon2, words, message):
    code, out, err = moon2(*words)
    assert (code, out) == (2, "") and message in one_line(err) and "--help" in err


def test_version(moon2):
    from moon2_lab import __version__

    assert moon2("--version") == (0, f"moon2_lab {__version__}\n", "")


# ---------------------------------------------------------------------------------------------- data


def test_data_check_tells_what_is_usable(moon2, drawn_catalogue):
    code, out, err = moon2("data", "check", drawn_catalogue)
    assert code == 0 and "80 of 80 records usable" in out and "set aside: 0" in out
    assert err.splitlines() == [f"next: moon2 run --catalog {drawn_catalogue} --out runs/mine"]


def test_data_check_lists_what_was_set_aside(moon2, tmp_path):
    "A text file called .jpg, a path out of the folder, an empty record: each with product, file and reason."
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("this is no picture")
    rows = [
        ("p1", "A cup", '["images/a.jpg"]'), ("p2", "A bowl", '["../secret.jpg"]'), ("p3", None, "[]"),
        ("p4", "A plate", "[]"),
    ]
    pd.DataFrame(rows, columns=["product_id", "title", "image_paths"]).to_parquet(tmp_path / "products.parquet")
    code, out, _ = moon2("data", "check", tmp_path, "--json")
    facts = json.loads(out)
    aside = {(entry["product_id"], entry["file"]) for entry in facts["set_aside"]}
    assert (
        code == 0
        and facts["products"] == 3
        and {("p1", "images/a.jpg"), ("p2", "../secret.jpg")} <= aside
        and "p3" in {name for name, _ in aside}
    )
    assert all(entry["reason"] for entry in facts["set_aside"])
    code, out, _ = moon2("data", "check", tmp_path, "--show", 1)
    assert "and 2 more" in out


def test_data_check_says_no_when_nothing_is_usable(moon2, tmp_path):
    pd.DataFrame({"product_id": ["p1"], "title": [None], "image_paths": ["[]"]}).to_parquet(
        tmp_path / "products.parquet"
    )
    code, out, _ = moon2("data", "check", tmp_path, "--json")
    assert code == 1 and json.loads(out)["usable"] is False


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: None, "no such folder"), (lambda folder: folder.mkdir(), "no products.parquet"),
        (
            lambda folder: (folder.mkdir(), (folder / "products.parquet").write_text("no parquet"))[0],
            "products.parquet",
        ),
        (
            lambda folder: (folder.mkdir(), pd.DataFrame({"id": ["p1"]}).to_parquet(folder / "products.parquet"))[0],
            "product_id",
        ),
    ],
    ids=["missing folder", "empty folder", "no parquet file", "no product_id"],
)
def test_folders_that_cannot_be_used(moon2, tmp_path, make, message):
    make(tmp_path / "shop")
    for words in (
        ["data", "check", tmp_path / "shop"],
        ["train", "--catalog", tmp_path / "shop", "--out", tmp_path / "run", *SMALL],
        ["run", "--catalog", tmp_path / "shop", "--out", tmp_path / "run", *SMALL],
    ):
        code, out, err = moon2(*words)
        assert (code, out) == (2, "") and message in one_line(err), err
    assert not (tmp_path / "run").exists()


def test_backbone_check_prints_one_object_or_one_line(moon2, tmp_path):
    "The facts of a certificate as JSON, exit code 0; a damaged model and one that cannot be a backbone: exit code 2."
    from moon2_lab.tiny_models import spoil_model, tiny_model

    model = tiny_model("smolvlm", tmp_path / "model")
    code, out, err = moon2("backbone", "check", model, "--set", "image_size=64", "--device", "cpu", "--json")
    facts = json.loads(out)
    assert (code, facts["certified"], facts["certificate"]["grid"]) == (0, True, [4, 4]), err
    assert facts["experts"]["lowrank"]["layers"] == 4 and max(facts["certificate"]["gaps"].values()) < 1e-3
    code, out, err = moon2("backbone", "check", spoil_model(model, "processor"))
    assert (code, out) == (2, "") and "image processor" in one_line(err)
    code, out, err = moon2("backbone", "check", tiny_model("aria", tmp_path / "aria"))
    assert (code, out) == (2, "") and "cannot be a backbone" in one_line(err)


def test_backbone_check_says_no_where_rows_differ(moon2, tmp_path, monkeypatch):
    "A kind that is not known and mixes otherwise: exit code 1, and which views are off."
    from moon2_lab.model.families import FAMILIES
    from moon2_lab.tiny_models import tiny_model

    monkeypatch.delitem(FAMILIES, "gemma3")
    model = tiny_model("gemma3", tmp_path / "model")
    code, out, _ = moon2("backbone", "check", model, "--set", "image_size=64", "--device", "cpu")
    assert code == 1 and "not known" in out and "NOT certified" in out


def test_data_synth_draws_what_was_asked_and_spares_what_is_there(moon2, tmp_path):
    code, out, _ = moon2("data", "synth", tmp_path / "shop", "--products", 20, "--seed", 5, "--json")
    assert (
        code == 0
        and json.loads(out)["products"] == 20
        and len(pd.read_parquet(tmp_path / "shop" / "products.parquet")) == 20
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep")
    code, out, err = moon2("data", "synth", tmp_path / "mine", "--products", 20)
    assert (
        (code, out) == (2, "")
        and one_line(err)
        and [path.name for path in (tmp_path / "mine").iterdir()] == ["precious.txt"]
    )
    for wrong in (["--products", 0], ["--products", 20, "--noise", 2]):
        assert moon2("data", "synth", tmp_path / "new", *wrong)[0] == 2 and not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------- train


def test_train_leaves_what_is_promised(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"model", "history.parquet", "run_settings.json", "quarantine.parquet", "checkpoints"} <= names and not {
        "metrics.json", "report.html",
    } & names
    settings = json.loads((trained / "run_settings.json").read_text())
    assert settings["command"].startswith("moon2 train --catalog") and settings["config"]["max_steps"] == 6
    assert len(pd.read_parquet(trained / "history.parquet")) == 6


def test_a_run_folder_that_is_not_empty_is_refused(moon2, trained, drawn_catalogue):
    before = sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*"))
    code, out, err = moon2("train", "--catalog", drawn_catalogue, "--out", trained, *SMALL)
    assert (code, out) == (2, "") and "--resume" in one_line(err)
    assert sorted((path, path.stat().st_mtime_ns) for path in trained.rglob("*")) == before


def test_plan_says_what_it_costs_and_writes_nothing(moon2, drawn_catalogue, tmp_path):
    code, out, _ = moon2("train", "--catalog", drawn_catalogue, "--out", tmp_path / "run", *SMALL, "--plan", "--json")
    plan = json.loads(out)
    assert code == 0 and not (tmp_path / "run").exists()
    assert {
        "products", "triplets", "hard_negatives_per_query", "tokens_per_step", "parameters_trained",
        "predicted_memory_mb", "predicted_minutes",
    } <= set(plan)
    assert "triplets" in moon2("train", "--catalog", drawn_catalogue, "--out", tmp_path / "run", *SMALL, "--plan")[1]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("temprature=1", "nearest: temperature"), ("temperature", "key=value"), ("temperature=warm", "is no float"),
        ("omega_mode=fair", "omega_mode"), ("num_experts=2.5", "num_experts"), ("top_k=9", "top_k"),
    ],
)
def test_wrong_settings_are_named(moon2, drawn_catalogue, tmp_path, setting, message):
    code, out, err = moon2("train", "--catalog", drawn_catalogue, "--out", tmp_path / "run", "--set", setting)
    assert (code, out) == (2, "") and message in one_line(err) and not (tmp_path / "run").exists()


def test_config_file_under_set(moon2, drawn_catalogue, tmp_path):
    "--config FILE, then --backbone, then --set."
    (tmp_path / "mine.yaml").write_text(
        "temperature: 0.1\nseed: 4\nbackbone: mini\nnum_layers: 2\nimage_size: 32\nvisual_tokens: 4\nmax_steps: "
        "2\nper_device_train_batch_size: 8\nnum_threads: 1\n"
    )
    run = tmp_path / "run"
    assert (
        moon2(
            "train", "--catalog", drawn_catalogue, "--out", run, "--config", tmp_path / "mine.yaml", "--backbone",
            "tiny", "--set", "seed=5",
        )[0]
        == 0
    )
    config = json.loads((run / "run_settings.json").read_text())["config"]
    assert (config["temperature"], config["seed"], config["backbone"]) == (0.1, 5, "tiny")
    for text, message in (
        ("temperatur: 1", "nearest: temperature"), ("- a\n- b", "key: value"),
        ("a: [", "cannot read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        code, _, err = moon2(
            "train", "--catalog", drawn_catalogue, "--out", tmp_path / "other", "--config", tmp_path / "bad.yaml"
        )
        assert code == 2 and message in one_line(err)


def test_resume_continues_to_the_same_weights(moon2, trained, drawn_catalogue, tmp_path):
    "A run that was cut off after three steps ends with the weights of the run that was not."
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for name in ("model", "checkpoints/step-000006"):
        shutil.rmtree(run / name)
    code, out, err = moon2("train", "--catalog", drawn_catalogue, "--out", run, "--resume", "--json")
    assert code == 0 and json.loads(out)["steps"] == 6, err
    assert (run / "model" / "model.safetensors").read_bytes() == (trained / "model" / "model.safetensors").read_bytes()
    code, _, err = moon2("train", "--catalog", drawn_catalogue, "--out", run, "--resume", "--set", "temperature=0.2")
    assert code == 2 and "temperature: 0.05 -> 0.2" in one_line(err)
    code, _, err = moon2("train", "--catalog", drawn_catalogue, "--out", run, "--resume", "--set", "num_threads=2")
    assert code == 2 and "--allow-drift" in one_line(err)
    assert (
        moon2(
            "train", "--catalog", drawn_catalogue, "--out", run, "--resume", "--allow-drift", "--set", "num_threads=2"
        )[0]
        == 0
    )
    code, _, err = moon2("train", "--catalog", drawn_catalogue, "--out", tmp_path / "nothing", "--resume")
    assert code == 2 and "no checkpoint" in one_line(err)


# ---------------------------------------------------------------------------------------------- eval, report, run


def test_eval_prints_scores_and_writes_them(moon2, trained, drawn_catalogue, tmp_path):
    code, out, _ = moon2("eval", trained, "--catalog", drawn_catalogue)
    assert code == 0 and all(direction in out for direction in ("t->mm", "i->mm", "mm->mm", "t->i", "i->t"))
    code, out, _ = moon2(
        "eval", trained / "model", "--catalog", drawn_catalogue, "--split", "all", "--out", tmp_path / "scores.json",
        "--json",
    )
    metrics = json.loads(out)
    assert code == 0 and metrics["protocol"]["name"] == "catalog-v2" and metrics["protocol"]["split"] == "all"
    assert json.loads((tmp_path / "scores.json").read_text())["directions"] == metrics["directions"]
    assert (tmp_path / "scores.per_query.parquet").is_file() and not (tmp_path / "per_query.parquet").exists()


@pytest.mark.slow
def test_eval_under_triplets_v1(moon2, trained, drawn_catalogue, tmp_path):
    code, out, _ = moon2(
        "eval", trained, "--catalog", drawn_catalogue, "--protocol", "triplets-v1", "--split", "all", "--json"
    )
    assert code == 0 and json.loads(out)["protocol"]["name"] == "triplets-v1"
    (tmp_path / "ids.txt").write_text("nobody\n")
    code, _, err = moon2(
        "eval", trained, "--catalog", drawn_catalogue, "--protocol", "triplets-v1", "--gallery", tmp_path / "ids.txt"
    )
    assert code == 2 and "nobody" in one_line(err)
    assert moon2("eval", trained, "--catalog", drawn_catalogue, "--gallery", tmp_path / "ids.txt")[0] == 2


def test_eval_of_what_is_no_model(moon2, trained, drawn_catalogue, tmp_path):
    import shutil

    shutil.copytree(trained / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    for model, message in (
        (tmp_path / "none", "no such folder"), (drawn_catalogue, "no model"), (tmp_path / "cut", "model.safetensors"),
    ):
        code, out, err = moon2("eval", model, "--catalog", drawn_catalogue)
        assert (code, out) == (2, "") and message in one_line(err)
    code, _, err = moon2("eval", trained, "--catalog", drawn_catalogue, "--split", "nowhere")
    assert code == 2 and "nowhere" in one_line(err)


def test_debug_shows_the_traceback(moon2, drawn_catalogue):
    assert "Traceback" in moon2("eval", "none", "--catalog", drawn_catalogue, "--debug")[2]


def test_stopping_by_hand(moon2, monkeypatch, drawn_catalogue):
    "Exit code 130, and word of --resume."
    import moon2_lab.data.catalog

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(moon2_lab.data.catalog.Catalog, "load", stop)
    code, out, err = moon2("data", "check", drawn_catalogue)
    assert (code, out) == (130, "") and "--resume" in one_line(err)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_training_that_the_system_stops_can_be_resumed(drawn_catalogue, tmp_path, name):
    "Like Ctrl-C: a checkpoint, one line, exit code 130. It was saved by time before, without being asked."
    run = tmp_path / "run"
    words = [
        "train", "--catalog", str(drawn_catalogue), "--out", str(run), *SMALL[:-3], "max_steps=100000",
        "save_minutes=0.002", *SMALL[-2:],
    ]
    heard = f"import signal; signal.signal(signal.{name}, signal.SIG_DFL)"  # under nohup a hang-up is not heard
    code = f"{heard}; import sys; from moon2_lab.cli.main import main; sys.exit(main({words!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 240
        while not list(run.glob("checkpoints/step-*")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and err.splitlines()[-1].startswith("moon2: stopped"), err
    newest = max(run.glob("checkpoints/step-*"))
    assert len(pd.read_parquet(newest / "history.parquet")) == int(newest.name[5:]) >= 1


def test_the_main_job_end_to_end(moon2, drawn_catalogue, tmp_path):
    "Train, evaluate, report."
    out = tmp_path / "runs" / "demo"
    code, printed, err = moon2("run", "--catalog", drawn_catalogue, "--out", out, *SMALL)
    assert code == 0 and "t->mm" in printed and str(out / "report.html") in printed, err
    assert {
        "model", "metrics.json", "history.parquet", "run_settings.json", "quarantine.parquet", "report.html",
        "per_query.parquet",
    } <= {path.name for path in out.iterdir()}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count('class="query"') == 12 and not re.search(r"https?://(?!www\.w3\.org/)", page)


@pytest.mark.slow
def test_a_second_main_job_moves_the_first_aside_and_is_laid_beside_it(moon2, drawn_catalogue, tmp_path):
    out = tmp_path / "runs" / "demo"
    assert moon2("run", "--catalog", drawn_catalogue, "--out", out, *SMALL)[0] == 0
    code, printed, _ = moon2("run", "--catalog", drawn_catalogue, "--out", out, *SMALL, "--json")
    moved = Path(json.loads(printed)["moved"])
    assert code == 0 and (moved / "report.html").is_file() and (out / "report.html").is_file()
    (out / "report.html").unlink()
    code, printed, _ = moon2("report", out, "--catalog", drawn_catalogue)
    assert code == 0 and printed.strip() == str(out / "report.html") and (out / "report.html").is_file()
    assert 'id="beside"' not in (out / "report.html").read_text(encoding="utf-8")
    assert moon2("report", out, "--catalog", drawn_catalogue, "--beside", moved)[0] == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    part = page[page.index('id="beside"') : page.index('id="details"')]
    assert "The settings of both are the same" in part and part.count("level") >= 5, part  # equal weights and answers
    (moved / "per_query.parquet").unlink()
    code, _, err = moon2("report", out, "--catalog", drawn_catalogue, "--beside", moved)
    assert code == 2 and "no per_query.parquet" in err, err


def test_the_main_job_spares_the_old_run_when_the_catalogue_is_wrong(moon2, tmp_path):
    "Nothing is moved before the catalogue has been found usable, with a test split."
    out = tmp_path / "demo"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    (tmp_path / "shop").mkdir()
    pd.DataFrame({"product_id": ["p1", "p2"], "title": ["a cup", "a bowl"], "split": ["train", "train"]}).to_parquet(
        tmp_path / "shop" / "products.parquet"
    )
    code, _, err = moon2("run", "--catalog", tmp_path / "shop", "--out", out, *SMALL)
    assert code == 2 and "test" in one_line(err) and (out / "metrics.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("demo")] == ["demo"]


def piped(command):
    "(exit status of moon2, stderr) when its output goes where `command` says."
    program = f"{sys.executable} -c 'import sys; from moon2_lab.cli.main import main; sys.exit(main())'"
    done = subprocess.run(
        ["bash", "-c", command.replace("moon2", program) + "; exit ${PIPESTATUS[0]}"], cwd=ROOT, capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_an_error(drawn_catalogue):
    code, err = piped(f"moon2 data check {drawn_catalogue} --json > /dev/full")
    assert code == 2 and "the disk is full" in one_line(err) and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(drawn_catalogue):
    assert piped(f"moon2 data check {drawn_catalogue} | true") == (0, "")


# ---------------------------------------------------------------------------------------------- what is there is spared


def contents(*folders):
    "Path -> bytes of every file below the folders."
    return {path: path.read_bytes() for folder in folders for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [
    ["embed", "RUN", "--catalog", "SHOP", "--out", "SHOP/products.parquet"],
    ["embed", "RUN", "--catalog", "SHOP", "--out", "RUN/history.parquet"],
    ["embed", "RUN", "--catalog", "SHOP", "--out", "RUN/model/config.json"],
    ["heatmap", "RUN", "--catalog", "SHOP", "--query", "red", "--out", "SHOP/products.parquet"],
    ["compare", "RUN", "RUN", "--catalog", "SHOP", "--out", "RUN/model/model.safetensors"],
    ["eval", "RUN", "--catalog", "SHOP", "--out", "RUN/run_settings.json"],
    ["run", "--catalog", "SHOP", "--out", "SHOP", *SMALL],
    ["run", "--catalog", "SHOP", "--out", "NOTES", *SMALL],
    ["run", "--catalog", "SHOP", "--out", "NOTES/mine.txt", *SMALL],
    ["run", "--catalog", "SHOP", "--out", ".", *SMALL],
], ids=" ".join)
def test_no_command_writes_over_what_another_thing_is(moon2, trained, drawn_catalogue, tmp_path, words):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "mine.txt").write_text("mine")
    places = {"RUN": str(trained), "SHOP": str(drawn_catalogue), "NOTES": str(notes)}
    before = contents(trained, drawn_catalogue, notes)
    for name, place in places.items():
        words = [place + word[len(name):] if word.split("/")[0] == name else word for word in words]
    code, out, err = moon2(*words)
    assert (code, out) == (2, "") and re.search(
        "there is a file|is no run|lies here|where the command runs", one_line(err)
    ), err
    assert contents(trained, drawn_catalogue, notes) == before and [path.name for path in tmp_path.iterdir()] == [
        "notes"
    ]


@pytest.mark.slow
def test_what_such_a_command_wrote_is_replaced(moon2, trained, drawn_catalogue, tmp_path):
    for _ in range(2):
        assert (
            moon2("embed", trained, "--catalog", drawn_catalogue, "--out", tmp_path / "v.parquet", "--split", "test")[0]
            == 0
        )
        assert moon2("eval", trained, "--catalog", drawn_catalogue, "--out", tmp_path / "Scores.JSON")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Scores.JSON", "Scores.per_query.parquet", "v.parquet"]


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "RUN", "--catalog", "SHOP", "--out", ""], ["eval", "RUN", "--catalog", ""],
        ["train", "--catalog", "SHOP", "--out", " "], ["data", "check", ""],
    ],
    ids=" ".join,
)
def test_an_option_with_nothing_in_it_is_an_error(moon2, trained, drawn_catalogue, words):
    "Such as a variable of a script that is not set."
    code, out, err = moon2(*[{"RUN": trained, "SHOP": drawn_catalogue}.get(word, word) for word in words])
    assert (code, out) == (2, "") and "there is nothing in it" in one_line(err)


@pytest.mark.parametrize(
    "text, message",
    [
        ("1: 2", "unknown config field [1]"), ("true: 3", "unknown config field [True]"),
        ("temperature: true", "is no float"), ("max_steps: yes", "is no int"),
        ("temperature: 0.1\ntemperature: 0.2", "temperature stands there twice"),
        ("temperature: 2024-13-45", "cannot read the config file"), ("temperature: .nan", "finite"),
        ("- temperature", "key: value"),
    ],
)
def test_config_files_that_say_something_else(moon2, drawn_catalogue, tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    code, out, err = moon2(
        "train", "--catalog", drawn_catalogue, "--out", tmp_path / "run", "--config", tmp_path / "c.yaml", "--plan"
    )
    assert (code, out) == (2, "") and message in one_line(err)


def test_a_cache_folder_that_cannot_be_made_is_named(moon2, drawn_catalogue, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "file" / "cache"))
    code, out, err = moon2("data", "check", drawn_catalogue)
    assert (code, out) == (2, "") and "MOON2_CACHE" in one_line(err) and str(tmp_path / "file" / "cache") in err


@pytest.mark.parametrize("limit", [0, -1])
def test_augment_refuses_a_limit_below_one(moon2, drawn_catalogue, tmp_path, limit):
    code, out, err = moon2("data", "augment", drawn_catalogue, tmp_path / "new", "--scorer", "none", "--limit", limit)
    assert (code, out) == (2, "") and f"--limit: '{limit}' is no whole number, 1 or more" in one_line(err)


@pytest.mark.slow
def test_a_plan_of_a_model_of_transformers_reads_no_weights(moon2, drawn_catalogue, tmp_path):
    from moon2_lab.tiny_models import tiny_model

    folder = tiny_model("qwen3_vl", tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"cut")
    options = ("--backbone", folder, "--set", "image_size=128", "experts=lowrank", "lora_r=2", "max_steps=3")
    code, out, _ = moon2("train", "--catalog", drawn_catalogue, "--out", tmp_path / "run", *options, "--plan", "--json")
    plan = json.loads(out)
    assert code == 0 and not (tmp_path / "run").exists() and plan["weights_read"] is False
    assert plan["checkpoint_mb"] >= 1 and plan["parameters_trained"] < plan["parameters"]
    assert plan["tokens_per_step"] > 16 * plan["triplets_per_step"] and plan["memory_gb"]["total"] >= 0


def test_the_closing_line_is_the_next_step(moon2, drawn_catalogue, tmp_path):
    "On stderr, a command that parses; not with --json, and not where there is nothing to go on with."
    from moon2_lab.cli import commands, lookup_commands, study_commands
    from moon2_lab.cli.options import build_parser

    _, out, err = moon2("data", "check", drawn_catalogue)
    last = err.strip().splitlines()[-1]
    assert last == f"next: moon2 run --catalog {drawn_catalogue} --out runs/mine" and "next:" not in out
    build_parser(commands, lookup_commands, study_commands).parse_args(shlex.split(last)[2:])
    assert "next:" not in moon2("data", "check", drawn_catalogue, "--json")[2]
    (tmp_path / "none").mkdir()
    assert "next:" not in moon2("data", "check", tmp_path / "none")[2]


def test_each_step_names_the_next(moon2, trained, drawn_catalogue, tmp_path):
    "From vectors over a search to the heatmap of its first hit: each closing line parses and goes on."
    from moon2_lab.cli import commands, lookup_commands, study_commands
    from moon2_lab.cli.options import build_parser

    vectors, store = tmp_path / "vectors.parquet", tmp_path / "vectors.db"
    steps = [
        (["embed", trained, "--out", vectors], "moon2 search"), (["index", vectors, "--uri", store], "moon2 search"),
        (["search", trained, "--uri", store, "--text", "it's red"], "moon2 heatmap"),
        (["heatmap", trained, "--query", "red", "--quick", "--out", tmp_path / "page.html"], "moon2 demo"),
        (["map", trained, "--out", tmp_path / "map.html"], "moon2 doctor"),
        (["data", "show", drawn_catalogue], "moon2 run"),
    ]
    parser, asked = build_parser(commands, lookup_commands, study_commands), {}
    for words, then in steps:
        code, out, err = moon2(*words)
        line = err.strip().splitlines()[-1]
        assert code == 0 and line.startswith(f"next: {then}") and "next:" not in out, (words, err)
        asked[then] = parser.parse_args(shlex.split(line)[2:])
    hits = json.loads(moon2("search", trained, "--uri", store, "--text", "it's red", "--json")[1])["hits"]
    assert (asked["moon2 heatmap"].query, asked["moon2 heatmap"].item) == ("it's red", hits[0]["product_id"])
    assert "next:" not in moon2("search", trained, "--uri", store, "--text", "red", "--json")[2]
    assert "next:" not in moon2("search", trained, "--uri", store, "--text", "red", "--filter", "colour == 'none'")[2]
