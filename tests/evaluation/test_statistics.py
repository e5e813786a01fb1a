"""Intervals and tests against independent references: explicit resampling, enumeration, the textbook's formula,
simulation."""

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.statistics import (
    _difference_interval, _resampled_totals, _student_quantile, bootstrap_ci, holm, holm_corrected, key_sums, p_text,
    paired_test, paired_test_tables, percentile_ci, share_interval, with_interval,
)

# ---------------------------------------------------------------------------------------------- intervals


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=25), st.integers(0, 3))
def test_bootstrap_equals_explicit_resampling_of_keys(rows, seed):
    "The same draws, made by collecting the queries of every drawn key."
    keys, values = (np.array(column) for column in zip(*rows))
    names = np.unique(keys)
    draws = np.random.default_rng(seed).integers(0, len(names), size=(50, len(names)))
    means = [np.concatenate([values[keys == names[i]] for i in draw]).mean() for draw in draws]
    assert bootstrap_ci(values, keys, 50, seed) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))


def test_bootstrap_draws_do_not_depend_on_the_order_or_the_names_of_keys():
    values, keys = np.random.default_rng(0).random(300), np.random.default_rng(1).integers(0, 90, 300)
    order = np.random.default_rng(2).permutation(300)
    assert bootstrap_ci(values, keys) == pytest.approx(bootstrap_ci(values[order], keys[order]))
    assert bootstrap_ci(values, keys) == pytest.approx(bootstrap_ci(values, keys * 7 + 3))
    assert bootstrap_ci(values, keys, seed=1) != bootstrap_ci(values, keys, seed=2)


def test_bootstrap_in_blocks_draws_every_resample():
    "With many keys the resamples are made in blocks; each total still holds as many keys as there are."
    sums = key_sums(np.ones((9000, 1)), np.arange(9000))
    totals = _resampled_totals(sums, resamples=1001, seed=3)
    assert totals.shape == (1001, 1) and (totals == 9000).all()


def test_interval_covers_the_truth_about_as_often_as_it_says():
    "400 simulated evaluations with clustered queries: 95 % by key; by query it would be far less."
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for run in range(400):
        found, keys = np.repeat(rng.random(100) < 0.6, 5), np.repeat(np.arange(100), 5)
        low, high = bootstrap_ci(found, keys, 300, run)
        covered += low <= 0.6 <= high
        low, high = bootstrap_ci(found, np.arange(500), 300, run)
        naive += low <= 0.6 <= high
    assert 0.91 <= covered / 400 <= 0.98 and naive / 400 < 0.75


def test_interval_of_nothing_and_of_nan_is_refused():
    for values, keys, message in (
        ([], [], "no rows"),
        ([1.0, np.nan], [0, 1], "NaN"),
        ([1.0], [0, 1], "1 rows and 2 keys"),
    ):
        with pytest.raises(DataError, match=message):
            bootstrap_ci(values, keys)
    with pytest.raises(UsageError, match="resamples=0"):
        bootstrap_ci([1.0], [0], resamples=0)
    assert with_interval(np.array([True, False]), np.arange(2), wanted=False) == {"value": 0.5, "ci95": []}
    assert percentile_ci(np.zeros((10, 3))).shape == (3, 2)


# ---------------------------------------------------------------------------------------------- paired tests


def test_sign_flip_p_equals_exact_enumeration():
    "Ten keys have 1,024 sign patterns: the sampled p comes close to the exact one."
    rng = np.random.default_rng(4)
    keys = np.repeat(np.arange(10), 3)
    first, second = (rng.random(30) < 0.75).astype(float), (rng.random(30) < 0.45).astype(float)
    sums = key_sums((first - second)[:, None], keys)[:, 0]
    flipped = [abs(np.dot(signs, sums)) - abs(sums.sum()) for signs in itertools.product((-1, 1), repeat=10)]
    exact = np.mean([1.0 if more > 1e-9 else 0.5 if more > -1e-9 else 0.0 for more in flipped])  # as good counts half
    assert paired_test(first, second, keys, resamples=20000)["p"] == pytest.approx(exact, abs=0.012)


def test_paired_test_rejects_as_often_as_it_should():
    "Two equal models differ 'significantly' about once in twenty; a tenth better is found."
    rng, false, found = np.random.default_rng(5), 0, 0
    for run in range(200):
        base = rng.random(300) < 0.5
        noise = rng.random(300)
        other = np.where(noise < 0.2, rng.random(300) < 0.5, base)
        false += paired_test(other, base, resamples=199, seed=run)["p"] <= 0.05
        found += paired_test(base | (noise > 0.85), base, resamples=199, seed=run)["p"] <= 0.05
    assert false / 200 <= 0.10 and found == 200


def test_paired_test_is_antisymmetric_and_counts():
    first, second = np.array([1, 1, 0, 1, 0.0]), np.array([0, 1, 1, 0, 0.0])
    ahead, behind = paired_test(first, second), paired_test(second, first)
    assert (ahead["won"], ahead["lost"], ahead["n"]) == (2, 1, 5) == (behind["lost"], behind["won"], behind["n"])
    assert ahead["difference"] == pytest.approx(0.2) == -behind["difference"]
    assert (ahead["lo"], ahead["hi"]) == pytest.approx((-behind["hi"], -behind["lo"])) and ahead["p"] == behind["p"]
    with pytest.raises(DataError, match="do not pair"):
        paired_test(first, second[:3])


def test_judged_corrects_over_all_tests_and_names_what_is_clear():
    tests = [
        {"difference": d, "p": p, "p_bound": False} for d, p in ((0.3, 0.01), (-0.2, 0.012), (0.1, 0.04), (-0.1, 0.5))
    ]
    found = holm_corrected(tests)
    assert (
        [test["p_holm"] for test in found]
        == holm([0.01, 0.012, 0.04, 0.5]).tolist()
        == pytest.approx([0.04, 0.04, 0.08, 0.5])
    )
    assert [test["verdict"] for test in found] == [
        "above",
        "below",
        "level",
        "level",
    ]  # 0.04 alone would have been "above"
    assert holm_corrected([]) == [] and "verdict" not in tests[0]


def test_p_is_written_as_what_it_is():
    "A p-value at the end of what the random signs can tell is a bound."
    better = np.ones(200)
    (only,) = holm_corrected([paired_test(better, better * 0, resamples=1000)])
    assert only["p_bound"] and p_text(only) == "p ≤ 0.001"
    first, *_ = holm_corrected([paired_test(better, better * 0, resamples=1000)] * 10)
    assert p_text(first) == "p ≤ 0.010"
    (known,) = holm_corrected([paired_test(np.array([1, 1, 0, 1.0]), np.array([0, 1, 1, 0.0]), resamples=100)])
    assert not known["p_bound"] and p_text(known) == f"p = {known['p_holm']:.3f}"
    assert p_text({"p_holm": 0.0001, "p_bound": True}) == "p < 0.001"


def test_equal_runs_have_p_one_and_an_interval_all_the_same():
    "Nothing differs in 40 queries: a difference of a few percent would not have shown."
    same = paired_test(np.ones(40), np.ones(40))
    assert (same["p"], same["p_bound"], same["difference"]) == (1.0, False, 0.0) and -0.1 < same["lo"] < 0 < same[
        "hi"
    ] < 0.1
    with pytest.raises(UsageError, match="resamples=0"):
        paired_test(np.ones(4), np.zeros(4), resamples=0)


def per_query(ranks, hits=None, direction="t->i"):
    names = [f"p{i}" for i in range(len(ranks))]
    return pd.DataFrame(
        {
            "query_id": names,
            "direction": direction,
            "rank": ranks,
            "hit_ids": hits or [[n] for n in names],
            "key": np.arange(len(ranks)) // 2,
        }
    )


def test_tables_of_two_runs_are_matched_by_query(tmp_path):
    "Through parquet, in any order; a query without a hit in the gallery is a miss in both."
    first, second = (
        per_query([1, 20, 3, 3], [["p0"], ["p1"], ["p2"], []]),
        per_query([30, 20, 3, 3], [["p0"], ["p1"], ["p2"], []]),
    )
    first.to_parquet(tmp_path / "a.parquet")
    second[::-1].to_parquet(tmp_path / "b.parquet")
    result = paired_test_tables(
        pd.read_parquet(tmp_path / "a.parquet"), pd.read_parquet(tmp_path / "b.parquet"), "t->i"
    )
    assert (result["won"], result["lost"], result["n"], result["difference"]) == (1, 0, 4, 0.25)
    for other, message in (
        (second[:2], "2 queries are in one run only"),
        (pd.concat([second, second]), "repeated queries"),
        (second.assign(direction="i->t"), "no queries for t->i"),
    ):
        with pytest.raises(DataError, match=message):
            paired_test_tables(first, other, "t->i")
    assert paired_test_tables(first.drop(columns="key"), second, "t->i")["n"] == 4


# ---------------------------------------------------------------------------------------------- intervals of shares


def test_share_interval_is_wilsons_where_every_query_is_its_own_key():
    """Brown, Cai and DasGupta (2001), formula (4), with Student's t for few queries;
    a tenth of a key of either outcome is all that differs."""
    for right, count in ((0, 20), (1, 30), (40, 50), (49, 50), (50, 50), (190, 200)):
        z, p = _student_quantile(count - 1), right / count
        middle, half = (
            (p + z * z / (2 * count)) / (1 + z * z / count),
            z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count**2)),
        )
        found = share_interval(np.arange(count) < right, np.arange(count))
        assert found == pytest.approx((max(0, middle - half), min(1, middle + half)), abs=5e-3)
        assert 0 <= found[0] <= p <= found[1] <= 1


def test_share_interval_has_width_at_both_ends():
    "All 50 right: 93 to 100 %, where resampling says 100 to 100 %. The same queries ten times over say no more."
    low, high = share_interval(np.ones(50), np.arange(50))
    assert (
        high == 1 and low == pytest.approx(0.925, abs=0.005) and bootstrap_ci(np.ones(50), np.arange(50)) == (1.0, 1.0)
    )
    assert share_interval(np.zeros(50), np.arange(50)) == pytest.approx((0, 1 - low))
    assert share_interval(np.ones(500), np.repeat(np.arange(50), 10)) == pytest.approx((low, 1), abs=1e-9)
    assert share_interval(np.ones(7), np.zeros(7)) == (0.0, 1.0)  # one key says nothing about others


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_share_interval_holds_the_mean_and_stays_within_0_and_1(rows):
    "Also of shares of a query (Prec@k, expected R@k). What is no share is refused."
    values, keys = (np.array(column) for column in zip(*rows))
    low, high = share_interval(values, keys)
    assert 0 <= low <= values.mean() <= high <= 1
    with pytest.raises(DataError, match="outside 0 to 1"):
        share_interval(np.r_[values, 1.5], np.r_[keys, 9])


def test_copies_of_queries_make_no_interval_narrower():
    "Ten copies of each query, by key: as wide as without the copies; by query it would be a third."
    found = np.random.default_rng(0).random(300) < 0.7
    alone, copies = (
        share_interval(found, np.arange(300)),
        share_interval(np.repeat(found, 10), np.repeat(np.arange(300), 10)),
    )
    assert copies == pytest.approx(alone, abs=1e-3)
    assert _difference_interval(np.repeat(found, 10) * 1.0, np.repeat(np.arange(300), 10)) == pytest.approx(
        _difference_interval(found * 1.0, np.arange(300))
    )


def test_student_quantile_equals_the_tables():
    for freedom, value in (
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (5, 2.5706),
        (10, 2.2281),
        (22, 2.0739),
        (120, 1.9799),
        (10**6, 1.95997),
    ):
        assert _student_quantile(freedom) == pytest.approx(value, abs=4e-3)


# ---------------------------------------------------------------------------------------------- simulation


def simulations():
    "bench/statistics.py as a module of another name."
    spec = importlib.util.spec_from_file_location(
        "bench_statistics", Path(__file__).parents[2] / "bench" / "statistics.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_intervals_near_the_end_hold_the_truth():
    "50 queries at R = .98: resampling holds the truth in about two thirds of the evaluations."
    bench = simulations()
    found = bench.coverage(bench.Design(50), 0.98, 150)
    assert found["around"] >= 0.91 and found["percentile"] <= 0.80


@pytest.mark.slow
@pytest.mark.parametrize("place", range(9))
def test_coverage_and_errors_by_simulation(place):
    """Every cell of bench/statistics.py, 400 evaluations each: intervals hold,
    and the test errs no more often than it may."""
    bench = simulations()
    design = bench.DESIGNS[place]
    for recall in bench.RECALLS:
        share, pair = bench.coverage(design, recall, 400, seed=1), bench.errors(design, recall, 400, seed=1)
        least = (
            0.87 if (design.most, design.rho) == (15, 0.5) else 0.92
        )  # a few large keys that fail as a whole: the worst cell
        assert least <= share["around"] <= 0.995, (str(design), recall, share)
        assert 0.92 <= pair["no difference"] and 0.86 <= pair["difference"], (str(design), recall, pair)
        assert pair["errors"] <= 0.08, (str(design), recall, pair)


def test_the_bench_folder_keeps_the_standard_library(tmp_path):
    "A benchmark that imports `statistics` gets the standard library's."
    bench = Path(__file__).parents[2] / "bench"
    code = f"import sys; sys.path.insert(0, {str(bench)!r}); import statistics; print(statistics.median([1, 2, 4]))"
    import subprocess
    import sys

    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path).stdout.strip() == "2"
    )
