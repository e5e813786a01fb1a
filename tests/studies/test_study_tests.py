"""Run folders compared: against the test of two tables by hand, in any order of queries and seeds; what is refused."""
import json

import numpy as np
import pandas as pd
import pytest
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.evaluate import evaluate
from moon2_lab.evaluation.statistics import holm, paired_test_tables
from moon2_lab.studies.modality_balance import balance_table, trade_off_table, worst_direction_tests
from moon2_lab.studies.study_tests import study_folders, study_tests
from moon2_lab.testing import MadeUpEncoder, made_up_catalog
from small import tiny

QUICK = {"baselines": False, "labels": False, "resamples": 0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Three recipes on made-up products: full and twin are alike, worse has more noise; three, two and three seeds."
    place, catalog, made = tmp_path_factory.mktemp("study"), made_up_catalog(80), {}
    for name, noise, seeds in (("full", 0.9, (0, 1, 2)), ("twin", 0.9, (3, 4)), ("worse", 1.5, (5, 6, 7))):
        made[name] = [place / f"{name}-{place_of}" for place_of in range(len(seeds))]
        for folder, seed in zip(made[name], seeds):
            evaluate(MadeUpEncoder(noise, seed), catalog, out=folder, **QUICK)
    return made


def copy_run(folder, out, table=None, **protocol):
    "A run folder with another table or other words in its protocol."
    out.mkdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["protocol"] |= protocol
    (out / "metrics.json").write_text(json.dumps(metrics))
    rows = pd.read_parquet(folder / "per_query.parquet") if table is None else table
    rows.to_parquet(out / "per_query.parquet")
    return out


def test_one_run_each_is_the_paired_test_of_two_tables(runs):
    pair = {"full": runs["full"][:1], "worse": runs["worse"][:1]}
    tests = study_tests(pair, metrics=["R@5"], resamples=500, seed=3)
    tables = [pd.read_parquet(pair[name][0] / "per_query.parquet") for name in ("worse", "full")]
    for row in tests.to_dict("records"):
        by_hand = paired_test_tables(*tables, row["direction"], k=5, resamples=500, seed=3)
        assert {name: row[name] for name in by_hand} == pytest.approx(by_hand)
    assert tests.p_holm.tolist() == pytest.approx(holm(tests.p).tolist()) and not tests.seeds_covered.any()


def test_order_of_queries_and_seeds_does_not_matter(runs, tmp_path):
    first = study_tests(runs)
    shuffled = pd.read_parquet(runs["worse"][1] / "per_query.parquet").sample(frac=1, random_state=0)
    other = copy_run(runs["worse"][1], tmp_path / "worse-1", shuffled)
    again = study_tests(runs | {"worse": [other, runs["worse"][2], runs["worse"][0]]})
    for name in ("difference", "lo", "hi", "p_holm", "queries_needed"):
        assert again[name].tolist() == pytest.approx(first[name].tolist())


def test_what_is_worse_is_below_and_twins_are_level(runs):
    tests = study_tests(runs)
    assert set(tests[tests.variant_a == "twin"].verdict) == {"level"}
    assert "below" in set(tests[tests.variant_a == "worse"].verdict)
    level = tests[(tests.verdict == "level") & (tests.difference != 0)]
    assert (level.queries_needed > level.n).mean() > 0.9  # more than there were
    assert set(tests[tests.variant_a == "twin"].seeds_a) == {2}


def test_holm_runs_over_the_whole_table(runs):
    wide, narrow = study_tests(runs), study_tests(runs, metrics=["R@10"])
    assert wide.p_holm.tolist() == pytest.approx(holm(wide.p).tolist())
    assert len(wide) == 2 * len(narrow)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"split": "valid"}, "split test and valid"), ({"catalog_hash": "other"}, "catalogue "),
        ({"name": "catalog-v1"}, "protocol catalog-v2 and catalog-v1"), ({"limit": 9}, "limit None and 9"),
        ({"n_products": 12}, "gallery 80 and 12"),
    ],
)
def test_unlike_questions_are_named(runs, tmp_path, changed, said):
    other = copy_run(runs["full"][0], tmp_path / "other", **changed)
    with pytest.raises(DataError, match=said):
        study_tests(runs | {"other": [other]})


def test_tables_that_do_not_fit_are_refused(runs, tmp_path):
    rows = pd.read_parquet(runs["full"][0] / "per_query.parquet")
    made = lambda name, table: {"full": runs["full"], "other": [copy_run(runs["full"][0], tmp_path / name, table)]}
    with pytest.raises(DataError, match="queries of .* are in one of these runs only"):
        study_tests(made("fewer", rows[rows.query_id != rows.query_id[0]]))
    with pytest.raises(DataError, match="no common queries"):
        study_tests(made("elsewhere", rows[rows.direction == "t->i"].assign(direction="x->y")))
    with pytest.raises(DataError, match="asks a query twice"):
        study_tests(made("twice", pd.concat([rows, rows[:1]])))
    with pytest.raises(DataError, match="has no column rank"):
        study_tests(made("no_rank", rows.drop(columns="rank")))
    with pytest.raises(DataError, match="has no queries"):
        study_tests(made("empty", rows[:0]))
    unlike = copy_run(runs["full"][0], tmp_path / "damaged")
    (unlike / "per_query.parquet").write_bytes(b"PAR1 and nothing")
    with pytest.raises(DataError, match="of two evaluations|cannot be read"):
        study_tests({"full": runs["full"], "other": [unlike]})


def test_directions_that_only_some_runs_have_are_left_out(runs, tmp_path):
    rows = pd.read_parquet(runs["full"][0] / "per_query.parquet")
    other = copy_run(runs["full"][0], tmp_path / "words", rows[rows.direction.isin(["t->mm", "i->t"])])
    assert set(study_tests({"full": runs["full"], "words": [other]}).direction) == {"t->mm", "i->t"}


def test_folders_of_a_study_are_found_by_their_names(runs):
    found = study_folders(runs["full"][0].parent)
    assert {name: len(folders) for name, folders in found.items()} == {"full": 3, "twin": 2, "worse": 3}
    with pytest.raises(UsageError, match="named twice"):
        study_tests({"full": runs["full"], "again": runs["full"][:1]})


def test_command_compares_folders_and_says_what_is_not_covered(runs, moon2):
    code, out, _ = moon2("tests", *runs["worse"], "--against", *runs["full"], "--json")
    facts = json.loads(out)
    assert code == 0 and {row["seeds_a"] for row in facts["tests"]} == {3}
    assert all(row["queries_needed"] is None or row["queries_needed"] > 1 for row in facts["tests"])
    code, out, _ = moon2("tests", runs["worse"][0], "--against", runs["full"][0])
    assert code == 0 and "the seeds are not covered" in out
    code, out, err = moon2("tests", runs["worse"][0].parent, "--against", "ful")
    assert (code, out) == (2, "") and "no variant 'ful'" in err


# ---------------------------------------------------------------------------------------------- balance


def test_ratio_spread_and_worst_direction_are_those_of_the_metrics(runs):
    table = balance_table(runs).set_index("variant")
    for name, folders in runs.items():
        blocks = [json.loads((folder / "metrics.json").read_text())["directions"] for folder in folders]
        means = {d: np.mean([block[d]["R@10"]["value"] for block in blocks]) for d in blocks[0] if d != "dual->mm"}
        row = table.loc[name]
        assert row.worst_value == pytest.approx(min(means.values())) and means[row.worst] == min(means.values())
        assert row.ratio == pytest.approx(min(means.values()) / max(means.values()))
        assert row.spread == pytest.approx(max(means.values()) - min(means.values()))
        assert row.ratio_lo <= row.ratio <= row.ratio_hi and row.worst_lo <= row.worst_value <= row.worst_hi


def test_intervals_of_balance_grow_when_seeds_disagree(runs):
    alike = balance_table({"same": runs["full"], "other": runs["worse"]}).set_index("variant").loc["same"]
    mixed = balance_table({"same": [runs["full"][0], runs["worse"][0]], "other": runs["worse"][1:]})
    mixed = mixed.set_index("variant").loc["same"]
    assert mixed.worst_hi - mixed.worst_lo > alike.worst_hi - alike.worst_lo


def test_worst_direction_is_tested_and_the_trade_off_has_every_cell(runs):
    worst = worst_direction_tests(runs)
    assert worst.variant_a.tolist() == ["twin", "worse"]
    assert worst.set_index("variant_a").verdict["worse"] == "below"
    trade = trade_off_table({"full": runs["full"], "mix-12-3-2": runs["worse"]})
    assert len(trade) == 2 * 5 and trade.image_share.dropna().unique().tolist() == [12 / 17]
    assert ((0 <= trade.lo) & (trade.lo <= trade.value) & (trade.value <= trade.hi) & (trade.hi <= 1)).all()


def test_a_model_on_the_committed_sample_can_be_compared(root, tmp_path, own_cache):
    catalog, folders = Catalog.load(root / "data" / "sample"), []
    for seed in (0, 1):
        folders.append(tmp_path / f"tiny-{seed}")
        evaluate(tiny(seed=seed), catalog, "all", out=folders[-1], **QUICK)
    tests = study_tests({"a": folders[:1], "b": folders[1:]}, against="b")
    assert set(tests.n) >= {60} and set(tests.verdict) == {"level"}  # two untrained models
