"""The health of embeddings: for every check a made-up case that trips it beside one that does not, and what no check
may depend on: the rotation of the vectors and the order of the products.
"""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moon2_lab.errors import DataError
from moon2_lab.evaluation.embedding_figures import (
    EQUAL, equal_groups, hub_figures, neighbour_counts, pair_figures, sample_places, spread_figures,
)
from moon2_lab.evaluation.embedding_health import LIMITS, check_embeddings
from moon2_lab.evaluation.projection import project_pca

COUNT, DIM = 240, 32
IDS = [f"p{number:04}" for number in range(COUNT)]


def unit(rows):
    "Rows of length 1."
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cloud(seed=0, noise=0.7):
    "Vectors that a healthy model could give."
    rng = np.random.default_rng(seed)
    product = rng.normal(size=(COUNT, DIM))
    t, i = (unit(product + noise * rng.normal(size=(COUNT, DIM))) for _ in "ti")
    return {"t": t, "i": i, "mm": unit(t + i)}


def checks(views, severity=("error", "warning", "note"), **options):
    "(check, view) of each finding."
    options = {"contents": {view: IDS for view in views}} | options
    return {(x.check, x.view) for x in check_embeddings(views, IDS, **options).findings if x.severity in severity}


def changed(view, change):
    "The healthy vectors with one view changed."
    views = cloud()
    return views | {view: change(views[view].copy())}


def put(place, row):
    "A change that puts a row at a place, or at several."
    def change(rows):
        rows[place] = row
        return rows

    return change


def in_plane(rows):
    "All rows in a plane."
    rows = rows.copy()
    rows[:, 2:] = 0
    return unit(rows)


def star(rows):
    "Four rows in the middle of many that are at right angles to each other: everybody's neighbours."
    wide = np.zeros((COUNT, COUNT + 4))
    wide[:, :COUNT] = np.eye(COUNT)
    wide[-4:] = 1 / np.sqrt(COUNT)
    wide[-4:] += 0.01 * np.random.default_rng(0).normal(size=(4, COUNT + 4))
    return unit(wide)


# ---------------------------------------------------------------------------------------------- each check


def test_healthy_vectors_have_no_finding():
    health = check_embeddings(cloud(), IDS, contents={view: IDS for view in "ti"} | {"mm": IDS})
    assert health.healthy and health.findings == [] and sorted(health.figures) == ["i", "mm", "t", "t-i"]


@pytest.mark.parametrize(
    "view, change, check",
    [
        ("t", put(3, np.nan), "finite"), ("i", put([3, 5], np.inf), "finite"), ("mm", put(7, 0), "length"),
        ("t", lambda rows: rows * 1.5, "length"),
        ("i", lambda rows: np.repeat(rows[:1], COUNT, axis=0), "constant"),
        ("i", lambda rows: put(slice(0, 30), rows[0])(rows), "duplicates"),
        ("t", lambda rows: unit(np.eye(DIM)[:1] + 0.01 * rows), "collapse"), ("mm", in_plane, "collapse"),
    ],
    ids=["nan", "infinite", "zero", "length", "constant", "duplicates", "cone", "plane"],
)
def test_errors_of_one_view(view, change, check):
    assert (check, view) in checks(changed(view, change), ["error"])


@pytest.mark.parametrize(
    "view, change, check",
    [
        ("i", lambda rows: put(1, rows[0])(rows), "duplicates"),
        ("t", lambda rows: unit(np.eye(DIM)[:1] + 0.4 * rows), "collapse"),
    ],
    ids=["two equal", "crowded"],
)
def test_warnings_of_one_view(view, change, check):
    found = checks(changed(view, change))
    assert (check, view) in found and (check, view) not in checks(changed(view, change), ["error"])


def test_hubs_and_products_that_nobody_finds():
    views = {"mm": star(None)}
    found = check_embeddings(views, IDS, contents={"mm": IDS})
    hubs = {finding.what: finding for finding in found.findings if finding.check == "hubness"}
    assert len(hubs) == 2 and found.healthy
    assert set(IDS[-4:]) <= set(next(x for what, x in hubs.items() if "few products" in what).ids)


def test_title_and_picture():
    views = cloud()
    strangers = views | {"i": np.roll(views["i"], 1, axis=0)}
    assert ("alignment", "t-i") in checks(strangers, ["error"]) and ("alignment", "t-i") not in checks(views)
    axis = np.eye(DIM)[:1]
    apart = {"t": unit(views["t"] + axis), "i": unit(views["i"] - axis)}
    assert ("modality gap", "t-i") in checks(apart, ["warning"]) and ("modality gap", "t-i") not in checks(views)


@pytest.mark.parametrize("view", ["t", "i"])
def test_a_modality_that_is_not_read(view):
    views = cloud()
    found = check_embeddings(views | {"mm": views[view]}, IDS).findings
    assert [(x.check, x.view) for x in found if x.severity == "error"] == [("modalities", "t-i")]
    assert f"the {'picture' if view == 't' else 'title'} is not read" in found[0].advice


def test_every_limit_is_tripped_by_its_figure_alone():
    "And not by a figure at the limit."
    from moon2_lab.evaluation.embedding_health import judge

    for limit in LIMITS:
        beyond = limit.value - 0.01 if limit.least else limit.value + 0.01
        assert limit.broken(beyond) and not limit.broken(limit.value) and not limit.broken(float("nan"))
        assert [x.check for x in judge({limit.figure: beyond}, "t")] == [limit.check]
        assert judge({limit.figure: float("nan")}, "t") == []


# ---------------------------------------------------------------------------------------------- what is equal


def test_equal_vectors_of_equal_content_are_no_fault():
    views, titles = changed("t", lambda rows: put(slice(0, 40), rows[0])(rows)), list(IDS)
    titles[:40] = ["the same title"] * 40
    assert checks(views, contents={"t": titles, "i": IDS, "mm": IDS}) == set()
    titles[39] = "another title"
    found = [x for x in check_embeddings(views, IDS, contents={"t": titles}).findings if x.check == "duplicates"]
    assert [(x.severity, x.view, len(x.ids)) for x in found] == [("error", "t", 40)]
    told = [x for x in check_embeddings(views, IDS).findings if x.check == "duplicates"]
    assert [(x.severity, x.view, len(x.ids)) for x in told] == [("note", "t", 40)]  # content not known


def test_equal_groups_against_all_pairs():
    rng = np.random.default_rng(1)
    rows = unit(rng.normal(size=(400, 24)))
    for place in rng.integers(0, 400, 120):
        rows[rng.integers(0, 400)] = unit(rows[[place]] + rng.choice([1e-5, 1e-2]) * rng.normal(size=(1, 24)) / 5)[0]
    near = np.linalg.norm(rows[:, None] - rows[None], axis=2) <= EQUAL
    for _ in range(9):  # through others, too
        near = (near.astype(int) @ near.astype(int)) > 0
    group = equal_groups(rows)
    assert (near == (group[:, None] == group[None])).all()


def test_a_missing_view_is_no_fault_where_it_is_said():
    views, has = changed("i", put(slice(0, 20), np.nan)), np.arange(COUNT) >= 20
    assert checks(views, present={"i": has}) == set()
    assert checks(views) == {("finite", "i")}
    assert check_embeddings(views, IDS, present={"i": has}).figures["t-i"]["products"] == COUNT - 20


def test_few_products_are_not_judged():
    health = check_embeddings({view: rows[:15] for view, rows in cloud().items()}, IDS[:15])
    assert health.healthy and {x.severity for x in health.findings} == {"note"}
    assert "mean_cosine" not in health.figures["t"]


@pytest.mark.parametrize(
    "views, ids, words",
    [
        ({"t": np.eye(4)}, IDS[:3], "3 ids"), ({}, IDS[:3], "3 ids"), ({"title": np.eye(3)}, IDS[:3], "title"),
        ({"t": np.eye(3), "i": np.ones((3, 5))}, IDS[:3], "shapes"), ({"t": np.ones(3)}, IDS[:3], "shapes"),
        ({"t": np.eye(3)}, ["a", "b", "a"], "twice"), ({"t": np.zeros((0, 4))}, [], "0 ids"),
    ],
    ids=str,
)
def test_views_that_do_not_fit(views, ids, words):
    with pytest.raises(DataError, match=words):
        check_embeddings(views, ids)


# ---------------------------------------------------------------------------------------------- what nothing depends on


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_figures_do_not_depend_on_rotation_or_order(seed):
    rng = np.random.default_rng(seed)
    views = cloud(seed)
    views["t"][1] = views["t"][0]
    rotation, order = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0], rng.permutation(COUNT)
    turned = {view: (rows @ rotation)[order] for view, rows in views.items()}
    names = [IDS[place] for place in order]
    one = check_embeddings(views, IDS, contents={"t": IDS})
    other = check_embeddings(turned, names, contents={"t": names})
    assert [(x.check, x.view, x.ids) for x in one.findings] == [(x.check, x.view, x.ids) for x in other.findings]
    for part, figures in one.figures.items():
        for name, value in figures.items():
            slack = 0.05 if name in ("hub_skewness", "largest_hub", "anti_hubs") else 1e-4  # neighbours may be level
            assert other.figures[part][name] == pytest.approx(value, rel=slack, abs=slack), (part, name)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60))
def test_the_sample_does_not_depend_on_the_order(seed, count):
    order = np.random.default_rng(seed).permutation(len(IDS))
    names = [IDS[place] for place in order]
    places = sample_places(names, count)
    assert len(places) == count and (np.diff(places) > 0).all()
    assert {names[place] for place in places} == {IDS[place] for place in sample_places(IDS, count)}


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(12, 90), dim=st.integers(2, 40))
def test_bounds_of_the_figures(seed, count, dim):
    rng = np.random.default_rng(seed)
    rows, others = unit(rng.normal(size=(count, dim))), unit(rng.normal(size=(count, dim)))
    spread, pair = spread_figures(rows), pair_figures(rows, others)
    assert -1 / (count - 1) - 1e-9 <= spread["mean_cosine"] <= 1 and -8.001 <= spread["uniformity"] <= 0
    assert 1 <= spread["effective_rank"] <= min(count, dim) + 1e-6 and spread["participation_ratio"] <= dim + 1e-6
    assert 0 <= pair["own_pair"] <= 1 and 0 <= pair["alignment"] <= 4 and pair["modality_gap"] >= 0
    counts = neighbour_counts(rows, 5)
    assert counts.sum() == 5 * count and 0 <= hub_figures(counts)["anti_hubs"] < 1


def test_more_rows_than_a_sample(monkeypatch):
    "Above the sample the figures are those of a part, and faults are still counted over all."
    noise = np.random.default_rng(0).normal(size=(20 * COUNT, DIM))
    views = {"mm": unit(np.repeat(cloud()["mm"], 20, axis=0) + 1e-2 * noise)}
    views["mm"][4321] = np.nan
    names = [f"q{number:05}" for number in range(20 * COUNT)]
    health = check_embeddings(views, names)
    assert health.figures["mm"]["products"] == 20 * COUNT - 1 and [x.ids for x in health.findings][0] == ("q04321",)


def test_the_projection_keeps_what_lies_in_a_plane():
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, 50)
    rows = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ np.linalg.qr(rng.normal(size=(20, 20)))[0][:2]
    points = project_pca({"t": rows[:30], "mm": rows[30:]}).points
    flat = np.concatenate([points["t"], points["mm"]])
    between = lambda x: np.linalg.norm(x[:, None] - x[None], axis=2)
    assert np.allclose(between(flat), between(rows), atol=1e-5)
