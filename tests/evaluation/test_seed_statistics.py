"""The test of two recipes against independent references: scipy's Student t, the explicit variances of the design,
simulation of equals."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from moon2_lab.evaluation.seed_statistics import (
    _Spread, _spread_of, _student_grid, _student_upper, queries_needed, seed_paired_test,
)
from moon2_lab.evaluation.statistics import paired_test

RNG = np.random.default_rng(0)


def arms(seeds_a=3, seeds_b=3, queries=300, gap=0.0, moody=0.0, rng=RNG):
    "Hits of two recipes; `moody` is what a seed moves, in units of the queries' difficulty."
    hard = rng.normal(size=queries)
    draw = lambda seeds, more: (
        hard + 0.5 * rng.normal(size=(seeds, queries)) + moody * rng.normal(size=(seeds, 1)) < 0.5 + more
    )
    return draw(seeds_a, gap), draw(seeds_b, 0.0)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 40), st.floats(1, 3000))
def test_tail_of_student_equals_scipy(value, freedom):
    stats = pytest.importorskip("scipy.stats")
    assert float(_student_upper(value, freedom)) == pytest.approx(stats.t.sf(value, freedom), rel=3e-5, abs=1e-13)
    assert float(_student_upper(-value, freedom)) == pytest.approx(stats.t.cdf(value, freedom), rel=1e-5)


def test_grid_of_student_gives_its_shares():
    for freedom in (4, 22, 900):
        numbers, weights = _student_grid(freedom)
        assert weights @ (numbers > 0) == pytest.approx(0.5)
        assert weights @ np.cos(numbers) == pytest.approx(
            2 * np.trapezoid(np.cos(grid := np.linspace(0, 60, 60_001)) * density(grid, freedom), grid), abs=2e-3
        )


def density(value, freedom):
    import math

    norm = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    return norm * (1 + value**2 / freedom) ** (-(freedom + 1) / 2)


@pytest.mark.parametrize("runs", [1e-12, 1e-3, 0.2, 1.0, 30.0])
@pytest.mark.parametrize("freedom", [1, 2, 8])
def test_tail_of_the_sum_equals_draws(runs, freedom):
    rng = np.random.default_rng(2)
    drawn = np.abs(rng.standard_t(40, 400_000) + np.sqrt(runs) * rng.standard_t(freedom, 400_000))
    spread = _Spread(0.0, 0.0, 1.0, 1.0, 1.0, runs, 0.0, 41, freedom, 41)
    for share, error in ((0.5, 0.02), (0.05, 0.05), (0.01, 0.3)):  # one degree of freedom has tails beyond any grid
        distance = float(np.quantile(drawn, 1 - share))
        assert spread.tail(distance) == pytest.approx(share, rel=error)


def test_variances_are_those_of_the_design():
    "Mean over 200 studies of the estimated variances; the truth from the same studies' own spread."
    rng, queries, runs, chance, gaps = np.random.default_rng(1), [], [], [], []
    for _ in range(200):
        a, b = arms(4, 4, 200, moody=0.15, rng=rng)
        spread = _spread_of([a.astype(float), b.astype(float)], np.arange(200))
        queries.append(spread.keys - spread.chance)
        runs.append(spread.runs)
        chance.append(spread.chance)
        gaps.append(spread.difference)
    assert abs(np.mean(queries)) < 0.2 * np.mean(chance)  # both recipes are one: nothing suits anybody
    assert np.mean(runs) == pytest.approx(np.var(gaps), rel=0.3)  # all that moves the difference are the runs
    assert np.mean(chance) < 0.5 * np.mean(runs)


def test_order_of_queries_and_names_of_keys_do_not_matter():
    a, b = arms()
    keys, order = RNG.integers(0, 120, 300), RNG.permutation(300)
    one, other = seed_paired_test(a, b, keys), seed_paired_test(a[:, order], b[:, order], keys[order] * 3 + 1)
    assert one == pytest.approx(other)
    assert seed_paired_test(a[::-1], b, keys) == pytest.approx(one)


def test_seeds_that_differ_more_make_the_interval_wider_and_queries_of_one_key_too():
    a, b = arms(gap=0.2)
    apart = a.copy()
    apart[0], apart[1] = apart[0] | (RNG.random(300) < 0.3), apart[1] & (RNG.random(300) < 0.7)
    width = lambda test: test["hi"] - test["lo"]
    assert width(seed_paired_test(apart, b)) > 2 * width(seed_paired_test(a, b))
    copies = [np.repeat(arm, 10, axis=1) for arm in (a, b)]
    keyed = seed_paired_test(*copies, np.repeat(np.arange(300), 10))
    assert width(keyed) == pytest.approx(width(seed_paired_test(a, b)), rel=1e-3)


def test_one_seed_is_the_paired_test_and_copies_are_too():
    a, b = arms(1, 1, gap=0.3)
    keys = np.arange(300) // 3
    plain = paired_test(a[0], b[0], keys, 500, 7)
    alone = seed_paired_test(a, b, keys, 500, 7)
    assert plain.items() <= alone.items() and not alone["seeds_covered"]
    copies = seed_paired_test(np.repeat(a, 3, axis=0), np.repeat(b, 2, axis=0), keys, 500, 7)
    assert {name: copies[name] for name in plain} == pytest.approx(plain, abs=1e-4)


@pytest.mark.parametrize("seeds, moody", [((3, 3), 0.0), ((3, 3), 0.3), ((2, 2), 0.3), ((3, 1), 0.1)])
def test_equals_are_told_apart_once_in_twenty(seeds, moody):
    "200 studies of equals; with seeds taken for queries it is far more where they are moody."
    rng, wrong, held = np.random.default_rng(5), 0, 0
    for turn in range(200):
        test = seed_paired_test(*arms(*seeds, 120, moody=moody, rng=rng), resamples=199, seed=turn)
        wrong += test["p"] <= 0.05
        held += test["lo"] <= 0 <= test["hi"]
    assert wrong / 200 <= 0.09 and held / 200 >= 0.91


def test_queries_alone_would_call_lucky_seeds_a_difference():
    rng, wrong = np.random.default_rng(6), 0
    for turn in range(100):
        a, b = arms(3, 3, 120, moody=0.5, rng=rng)
        wrong += paired_test(a.mean(0), b.mean(0), resamples=199, seed=turn)["p"] <= 0.05
    assert wrong / 100 > 0.3


def test_queries_needed_falls_with_the_gap_and_is_infinite_where_seeds_forbid_it():
    rng = np.random.default_rng(8)
    hard = rng.normal(size=800)
    runs = lambda gap, apart: hard + 0.4 * rng.normal(size=(3, 800)) + np.array([[-apart], [0], [apart]]) < gap
    needed = [queries_needed(runs(gap, 0.0), runs(0, 0.0)) for gap in (0.4, 0.2, 0.1)]
    assert needed == sorted(needed) and needed[0] < 800 and all(need == int(need) for need in needed)
    assert queries_needed(runs(0.4, 0.6), runs(0, 0.6)) == np.inf
    assert queries_needed(*arms(1, 1, gap=0.3)) < np.inf  # one seed each: seeds are not counted


def test_bench_draws_studies_of_equals():
    "R of both arms is what was asked for, whatever the seeds do."
    spec = importlib.util.spec_from_file_location("bench_stats", Path(__file__).parents[2] / "bench" / "statistics.py")
    bench = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_stats"] = bench
    spec.loader.exec_module(bench)
    rng = np.random.default_rng(9)
    for study in (bench.Study((3, 3), 0.0), bench.Study((2, 4), 2.0, 0.7)):
        drawn = [study.draw(0.9, 0.0, rng)[:2] for _ in range(150)]
        assert np.mean([a.mean() for a, _ in drawn]) == pytest.approx(0.9, abs=0.02)
        assert np.mean([b.mean() for _, b in drawn]) == pytest.approx(0.9, abs=0.02)
    found = bench.study_errors(bench.Study((3, 3), 0.5, queries=60), 0.7, 40)
    assert set(found) == {"coverage", "errors", "errors over queries alone"} and found["coverage"] >= 0.85
