"""A study as a user has it: made, stopped, gone on with, refused, typed as a command, and looked at in a browser."""
import json
from dataclasses import replace

import pandas as pd
import pytest
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import DataError, UsageError
from moon2_lab.files import read_json
from moon2_lab.reporting.ablation_report import write_ablation_report
from moon2_lab.studies import ablation
from moon2_lab.studies.ablation import Study, ablation_table, finished_runs, run_study, seed_means, study_plan
from moon2_lab.testing import made_up_shop
from small import settings, shop

pytestmark = pytest.mark.usefixtures("own_cache")
TINY = ("num_layers=2", "image_size=32", "visual_tokens=4", "query_variants=1", "per_device_train_batch_size=8")


@pytest.fixture(scope="module")
def sample(root):
    "The committed sample."
    return Catalog.load(root / "data" / "sample")


def study_on(catalog, out, **changes):
    "A study of seconds."
    wanted = {"variants": ("full", "no-coaugment", "dense"), "seeds": (0,), "steps": 2, "products": 24}
    return Study(catalog, out, settings(query_variants=1), **wanted | changes)


@pytest.fixture
def trained(monkeypatch):
    "The runs that are really made, in order."
    made, make = [], ablation._make_run
    monkeypatch.setattr(ablation, "_make_run", lambda study, run, *rest: (made.append(run), make(study, run, *rest)))
    return made


@pytest.mark.slow
def test_only_what_is_missing_is_made(sample, trained, tmp_path):
    study = study_on(sample, tmp_path / "study")
    run_study(study)
    assert [(run.variant, run.seed) for run in trained] == [("full", 0), ("dense", 0)]
    before = {path: path.read_bytes() for path in (tmp_path / "study" / "runs").rglob("metrics.json")}
    run_study(replace(study, seeds=(0, 1), variants=("full", "no-coaugment", "dense", "gcl")))
    assert [(run.variant, run.seed) for run in trained[2:]] == [("gcl", 0), ("gcl", 1), ("dense", 1), ("full", 1)]
    assert all(path.read_bytes() == content for path, content in before.items())
    table = pd.read_parquet(tmp_path / "study" / "ablation.parquet")
    assert table.groupby("variant").seed.nunique().to_dict() == {"full": 2, "dense": 2, "gcl": 2}
    noted = read_json(tmp_path / "study" / "study.json")
    assert noted["variants"] == ["full", "no-coaugment", "dense", "gcl"] and noted["machine"]["cores"] >= 1
    assert noted["data_hash"] == sample.data_hash and noted["copies"]["no-coaugment"][0] == "full"
    assert not list((tmp_path / "study").rglob(".*.part*"))


def test_a_study_that_was_stopped_goes_on(sample, monkeypatch, tmp_path):
    study, make = study_on(sample, tmp_path / "study", variants=("full", "dense", "gcl")), ablation._make_run

    def stopped(study, run, *rest):
        if run.variant == "dense":
            raise KeyboardInterrupt
        make(study, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "_make_run", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_study(study)
    assert pd.read_parquet(tmp_path / "study" / "ablation.parquet").variant.unique().tolist() == ["full"]
    assert study_plan(study)["to_make"] == 2
    run_study(study)
    assert {run.variant for run in finished_runs(tmp_path / "study")} == {"full", "dense", "gcl"}


def test_the_same_run_twice_gives_the_same_scores(sample, tmp_path):
    one, two = (run_study(study_on(sample, tmp_path / name, variants=("mix-12-3-2",))) for name in ("one", "two"))
    pd.testing.assert_frame_equal(one.drop(columns="minutes"), two.drop(columns="minutes"))


def test_unlike_runs_are_refused(sample, tmp_path):
    study = study_on(sample, tmp_path / "study", variants=("dense",))
    run_study(study)
    other = replace(study, catalog=shop(40))
    for changed, words in (
        (other, "made with another catalogue"), (replace(study, products=20), "products: 24 -> 20"),
        (replace(study, split="valid"), "split: test -> valid"), (replace(study, steps=3), "steps: 2 -> 3"),
        (replace(study, config=study.config.replace(temperature=0.1)), "temperature: 0.05 -> 0.1"),
    ):
        with pytest.raises(UsageError, match=words):
            run_study(changed)
    (tmp_path / "study" / "study.json").unlink()  # a run knows for itself what it is of
    with pytest.raises(UsageError, match="made with another catalogue"):
        run_study(other)
    with pytest.raises(UsageError, match="max_steps: 2 -> 3"):
        run_study(replace(study, steps=3))


def test_a_run_without_its_queries_is_named(sample, tmp_path):
    run_study(study_on(sample, tmp_path / "study", variants=("dense",)))
    next((tmp_path / "study").rglob("per_query.parquet")).unlink()
    with pytest.raises(DataError, match=r"no per_query.parquet \[.*dense-0\]"):
        seed_means(tmp_path / "study")


@pytest.mark.slow
def test_steps_are_calibrated_once_and_minutes_are_kept(sample, tmp_path):
    study = study_on(sample, tmp_path / "study", variants=("full", "dense"), budgets=("steps", "minutes"), steps=0)
    table = run_study(replace(study, minutes=0.02))
    by_budget = table.groupby(["budget", "variant"]).steps.first()
    assert by_budget["steps", "full"] == by_budget["steps", "dense"] == read_json(study.out / "study.json")["steps"] > 0
    assert table[table.budget == "minutes"].minutes.max() < 0.1
    assert ablation_table(study.out).equals(table)


def test_the_command(moon2, root, tmp_path):
    words = ("ablate", "--catalog", root / "data" / "sample", "--out", tmp_path / "study", "--backbone", "tiny")
    words += ("--seeds", 1, "--steps", 2, "--products", 24, "--set", *TINY, "num_threads=1", "device=cpu")
    code, out, err = moon2(*words, "--variants", "full,no-moo")
    assert code == 2 and "nearest: no-moe" in err and not (tmp_path / "study").exists()
    code, out, _ = moon2(*words, "--variants", "full,dense", "--plan")
    assert code == 0 and "2 runs to make on 24 products" in out and not (tmp_path / "study").exists()
    code, out, _ = moon2(*words, "--variants", "full,dense", "--json")
    facts = json.loads(out)
    assert code == 0 and {row["variant"] for row in facts["scores"]} == {"full", "dense"}
    assert facts["page"].endswith("ablation.html")
    code, out, _ = moon2(*words[:-1], "device=cpu", "--variants", "full,dense", "--seeds", 1, "--split", "nowhere")
    assert code == 2


def test_measured_steps_do_not_depend_on_the_load(sample, monkeypatch, tmp_path):
    "With `calibrate` a run takes the steps that were measured, the middle of three, whatever the clock says."
    asked, answers = [], iter([3, 9, 8, 4, 2, 10])
    monkeypatch.setattr(ablation, "_fitting_steps", lambda study, name: (asked.append(name), next(answers))[1])
    study = study_on(
        sample, tmp_path / "study", variants=("full", "dense"), budgets=("minutes",), minutes=1e-4, calibrate=True
    )
    table = run_study(study)
    assert asked == ["full", "dense", "dense", "full", "full", "dense"]
    steps = {"full": 3, "dense": 9}  # the middle of 3, 4, 2 and of 9, 8, 10
    assert table.groupby("variant").steps.first().to_dict() == steps
    assert read_json(study.out / "study.json")["timed_steps"] == steps
    assert run_study(study).equals(table) and len(asked) == 6  # measured once


def test_steps_of_a_tower_are_measured_too(tmp_path):
    "In twice the minutes about twice the steps fit, of a rival that is trained in another way."
    many = made_up_shop(160)
    study = study_on(many, tmp_path / "study", variants=("connector",), budgets=("minutes",), split="all", products=160)
    short, long = (ablation._fitting_steps(replace(study, minutes=minutes), "connector") for minutes in (1, 8))
    assert 3 * short < long < 20 * short


def test_the_page_in_a_browser(browser, sample, tmp_path):
    from browsing import keep_screenshot

    study = study_on(sample, tmp_path / "study", variants=("full", "no-moe", "no-coaugment", "dense"), seeds=(0,))
    run_study(replace(study, budgets=("steps", "minutes"), minutes=0.01))
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(write_ablation_report(study.out).as_uri())
    keep_screenshot(page, "ablation.png")
    assert asked == [page.url] and page.locator("section table").count() >= 3
    assert page.locator("#steps tbody tr").count() == 4
    assert "the catalogue is not augmented" in page.locator("#steps").inner_text()
    assert "different data" in page.locator("#steps tr.ours").inner_text()
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    page.close()
