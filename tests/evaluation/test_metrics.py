"""Metrics against independent references: a naive O(N^2) ranking, all orders of a tie, scikit-learn, rank-bm25,
explicit resampling."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.evaluation.baselines import bm25
from moon2_lab.evaluation.ranking import (
    average_precision_at, classification_scores, dot_rows, expected_hit_at, hit_at, ndcg_at, nearest_class,
    precision_at, rank_scores, ranks_chunked, recall_at, recall_share_at,
)
from moon2_lab.evaluation.statistics import with_interval


def unit(count, width, seed=0):
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------------------------------------- ranks


def naive_list(scores, hits):
    "One query's gallery in the order of the protocol, by plain Python: worst case for the model first."

    def against(position):
        score = scores[position]
        if math.isnan(score):
            score = -math.inf if hits[position] else math.inf
        return (-score, hits[position], position)

    return sorted(range(len(scores)), key=against)


def naive_rank(scores, hits):
    "The sentence of the protocol, word by word."
    best = max((-math.inf if math.isnan(s) else s for s, hit in zip(scores, hits) if hit), default=-math.inf)
    return 1 + sum((math.inf if math.isnan(s) else s) >= best for s, hit in zip(scores, hits) if not hit)


small = st.integers(-3, 3).map(float)
vectors_of = lambda rows, width: arrays.arrays(np.float64, (rows, width), elements=small)


@st.composite
def retrieval(draw):
    "Small integer vectors: ties are exact and frequent; some rows NaN; keys with many positives and with none."
    queries, gallery, width = draw(st.integers(1, 8)), draw(st.integers(1, 14)), draw(st.integers(1, 3))
    query, wanted = draw(vectors_of(queries, width)), draw(vectors_of(gallery, width))
    query[draw(st.lists(st.integers(0, queries - 1), max_size=2))] = np.nan
    wanted[draw(st.lists(st.integers(0, gallery - 1), max_size=4))] = np.nan
    query_keys = np.array(draw(st.lists(st.integers(0, 5), min_size=queries, max_size=queries)))
    gallery_keys = np.array(draw(st.lists(st.integers(0, 5), min_size=gallery, max_size=gallery)))
    return query, wanted, query_keys, gallery_keys, draw(st.integers(1, 9)), draw(st.integers(1, 16))


@settings(max_examples=150, deadline=None)
@given(retrieval())
def test_ranks_equal_the_naive_ones(case):
    "Ranks, lists and every derived score, whatever the chunk, with ties, NaN and many positives."
    query, gallery, query_keys, gallery_keys, chunk, k = case
    ranks = ranks_chunked(query, gallery, query_keys, gallery_keys, chunk=chunk, k=k)
    for row in range(len(query)):
        scores = [
            float("nan") if np.isnan(query[row]).any() or np.isnan(vector).any() else float(query[row] @ vector)
            for vector in gallery
        ]
        hits = [bool(key == query_keys[row]) for key in gallery_keys]
        expected = naive_list(scores, hits)[:k]
        assert ranks.rank[row] == naive_rank(scores, hits)
        assert ranks.n_hits[row] == sum(hits)
        assert ranks.top_index[row].tolist() == expected + [-1] * (k - len(expected))
        np.testing.assert_array_equal(
            ranks.top_score[row, : len(expected)], [scores[position] for position in expected]
        )
        assert np.isnan(ranks.top_score[row, len(expected) :]).all()
        assert ranks.top_hit[row].tolist() == [hits[position] for position in expected] + [False] * (k - len(expected))
        assert bool(hit_at(ranks, k)[row]) == ranks.top_hit[row].any(), (
            "rank <= k exactly when the list of k holds a hit"
        )
    assert recall_at(ranks, k) == pytest.approx(np.mean(ranks.top_hit.any(axis=1)))


@settings(max_examples=60, deadline=None)
@given(retrieval(), st.data())
def test_several_keys_per_query_are_the_union(case, data):
    "A query with an array of keys is hit by any of them."
    query, gallery, _, gallery_keys, chunk, k = case
    several = [np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))) for _ in query]
    ranks = ranks_chunked(query, gallery, several, gallery_keys, chunk=chunk, k=k)
    for row, keys in enumerate(several):
        merged = np.where(np.isin(gallery_keys, keys), 99, gallery_keys)
        alone = ranks_chunked(query[row : row + 1], gallery, np.array([99]), merged, k=k)
        assert (alone.rank[0], alone.n_hits[0]) == (ranks.rank[row], ranks.n_hits[row])
        assert alone.top_index[0].tolist() == ranks.top_index[row].tolist()


def test_a_better_model_never_ranks_worse():
    "Raising a hit's score cannot raise its rank; a NaN in a non-hit cannot lower it."
    query, gallery = unit(30, 8), unit(50, 8, 1)
    keys, gallery_keys = np.arange(30), np.arange(50)
    before = ranks_chunked(query, gallery, keys, gallery_keys).rank
    closer = gallery.copy()
    closer[:30] = gallery[:30] * 0.5 + query * 0.5
    assert (ranks_chunked(query, closer, keys, gallery_keys).rank <= before).all()
    broken = gallery.copy()
    broken[40:] = np.nan
    assert (ranks_chunked(query, broken, keys, gallery_keys).rank >= before).all()


@pytest.mark.parametrize("width", [16, 577])
def test_equal_vectors_tie_exactly_wherever_they_stand(width):
    """Copies of the right answer count against the model, in every chunk and block,
    though a float32 kernel may give them different last bits."""
    query, gallery = unit(64, width), unit(700, width, 1)
    gallery[::7] = query[:1]
    ranks = ranks_chunked(query[:1], gallery, np.array([0]), np.arange(700), k=3)
    assert ranks.rank[0] == 100  # 99 equal copies stand before it
    assert (np.diff(dot_rows(query, gallery)[:, ::7], axis=1) == 0).all()
    for chunk in (1, 5, 64):
        np.testing.assert_array_equal(
            ranks_chunked(query, gallery, np.arange(64), np.arange(700), chunk=chunk).rank,
            ranks_chunked(query, gallery, np.arange(64), np.arange(700)).rank,
        )


def test_degenerate_models_score_nothing():
    "Constant, all-zero and all-NaN embeddings have R@10 = 0 in a gallery of more than ten."
    keys = np.arange(40)
    for vectors in (np.ones((40, 4)), np.zeros((40, 4)), np.full((40, 4), np.nan), np.full((40, 4), np.inf)):
        ranks = ranks_chunked(vectors, vectors, keys, keys)
        assert recall_at(ranks, 10) == 0 and (ranks.rank == 40).all()


def test_vectors_are_taken_as_they_are():
    "The score is the dot product; scaling queries changes nothing, scaling the gallery does: normalise first."
    query, gallery, keys = unit(20, 6), unit(20, 6, 1), np.arange(20)
    plain = ranks_chunked(query, gallery, keys, keys)
    np.testing.assert_array_equal(ranks_chunked(query * 8, gallery, keys, keys).rank, plain.rank)
    long = gallery * np.where(np.arange(20) == 3, 100, 1)[:, None].astype(np.float32)
    assert (ranks_chunked(query, long, keys, keys).top_index[:, 0] == 3).sum() > (plain.top_index[:, 0] == 3).sum()


def test_memory_is_a_chunk_not_a_matrix():
    "6,000 x 6,000 float32 scores would be 144 MB."
    vectors, keys = unit(6000, 4), np.arange(6000) // 2
    tracemalloc.start()
    ranks = ranks_chunked(vectors, vectors, keys, keys, chunk=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(ranks) == 6000 and peak < 30e6, f"{peak / 1e6:.0f} MB"


def test_misfits_are_refused_with_a_sentence():
    query, gallery, keys = unit(3, 4), unit(5, 4), np.arange(5)
    bad = [
        (lambda: ranks_chunked(query, gallery[:, :2], keys[:3], keys), "do not fit"),
        (lambda: ranks_chunked(query[0], gallery, keys[:1], keys), "do not fit"),
        (lambda: ranks_chunked(query, gallery, keys, keys), "5 keys for 3 query vectors"),
        (lambda: ranks_chunked(query, gallery, keys[:3], keys[:4]), "4 keys for 5 gallery vectors"),
        (lambda: ranks_chunked(query, gallery[:0], keys[:3], keys[:0]), "gallery is empty"),
        (lambda: ranks_chunked(query[:0], gallery, keys[:0], keys), "no query"),
        (lambda: rank_scores(lambda start, stop: np.zeros((stop - start, 2)), keys[:3], keys), "scores of shape"),
    ]
    for call, message in bad:
        with pytest.raises(DataError, match=message):
            call()
    with pytest.raises(UsageError, match="at least 1"):
        ranks_chunked(query, gallery, keys[:3], keys, k=0)
    ranks = ranks_chunked(query, gallery, keys[:3], keys, k=4)
    for measure in (precision_at, recall_share_at, average_precision_at, ndcg_at):
        with pytest.raises(UsageError, match="4 places"):
            measure(ranks, 5)
    with pytest.raises(UsageError, match="reachable or all"):
        average_precision_at(ranks, 4, over="some")


def test_ranked_list_measures_equal_sklearn():
    "Without ties: nDCG@k and, over the whole list, average precision."
    from sklearn.metrics import average_precision_score, ndcg_score

    query, gallery = unit(25, 12), unit(60, 12, 1)
    query_keys, gallery_keys = np.arange(25) % 6, np.arange(60) % 6
    ranks, scores = ranks_chunked(query, gallery, query_keys, gallery_keys, k=60), dot_rows(query, gallery)
    truth = query_keys[:, None] == gallery_keys
    for k in (1, 5, 10, 60):
        assert ndcg_at(ranks, k).mean() == pytest.approx(ndcg_score(truth, scores, k=k))
        top = np.argsort(-scores, axis=1)[:, :k]
        found = np.take_along_axis(truth, top, axis=1)
        np.testing.assert_allclose(precision_at(ranks, k), found.mean(axis=1))
        np.testing.assert_allclose(recall_share_at(ranks, k), found.sum(axis=1) / truth.sum(axis=1))
        by_hand = [sum(row[: i + 1].mean() for i in np.flatnonzero(row)) for row in found]
        np.testing.assert_allclose(average_precision_at(ranks, k), by_hand / np.minimum(truth.sum(axis=1), k))
        np.testing.assert_allclose(average_precision_at(ranks, k, over="all"), by_hand / truth.sum(axis=1))
    np.testing.assert_allclose(
        average_precision_at(ranks, 60, over="all"), [average_precision_score(t, s) for t, s in zip(truth, scores)]
    )


# ---------------------------------------------------------------------------------------------- ties of baselines


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=6), st.integers(1, 7))
def test_expected_hits_equal_the_mean_over_all_orders(gallery, k):
    """Every order of the gallery, sorted by score with ties as they come:
    the share of orders with a hit among the first k."""
    scores, hits = (np.array(column) for column in zip(*gallery))
    ranks = rank_scores(lambda start, stop: scores[None].astype(np.float32), np.array([1]), hits.astype(int), k=3)
    found = [
        any(hits[i] for i in sorted(order, key=lambda i: -scores[i])[:k])
        for order in itertools.permutations(range(len(scores)))
    ]
    assert expected_hit_at(ranks, k)[0] == pytest.approx(np.mean(found))
    assert hit_at(ranks, k)[0] <= expected_hit_at(ranks, k)[0] + 1e-12  # ties against the model: the lower end


def test_expected_hits_give_a_broken_vector_nothing():
    "All hits NaN: every non-hit stands above. No hit in the gallery: never."
    scores = np.array([[np.nan, 0.1, 0.2], [0.3, 0.3, 0.3]], dtype=np.float32)
    ranks = rank_scores(lambda start, stop: scores[start:stop], np.array([0, 9]), np.arange(3))
    assert expected_hit_at(ranks, 2).tolist() == [0, 0] and expected_hit_at(ranks, 3).tolist() == [1, 0]


def test_a_wide_gallery_gives_the_same_scores_bit_for_bit(monkeypatch):
    "Turned into float64 once or block by block, whatever the chunk; copies of a vector tie exactly."
    query, gallery = unit(30, 24), unit(70, 24, seed=1)
    gallery[[5, 40, 69]] = gallery[2]
    once = ranks_chunked(query, gallery, np.arange(30), np.arange(70), k=70)
    for chunk, limit in ((256, 0), (7, 0), (7, 2**30), (1, 2**30)):
        monkeypatch.setattr("moon2_lab.evaluation.ranking._WIDE_BYTES", limit)
        again = ranks_chunked(query, gallery, np.arange(30), np.arange(70), chunk=chunk, k=70)
        assert (again.top_score == once.top_score).all() and (again.rank == once.rank).all()
    copies = np.take_along_axis(once.top_score, np.argsort(once.top_index, axis=1), axis=1)[:, [2, 5, 40, 69]]
    assert (copies == copies[:, :1]).all()


# ---------------------------------------------------------------------------------------------- classes


def sklearn_scores(truth, predicted, labels):
    from sklearn.metrics import precision_recall_fscore_support

    return precision_recall_fscore_support(truth, predicted, labels=labels, average="macro", zero_division=0)[:3]


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 6).flatmap(
        lambda c: st.tuples(
            st.just(c), st.lists(st.tuples(st.integers(0, c - 1), st.integers(-1, c - 1)), min_size=1, max_size=40)
        )
    )
)
def test_classification_equals_sklearn(case):
    "Accuracy and macro scores over the classes present in the truth; -1 = no answer."
    n_classes, rows = case
    truth, predicted = (np.array(column) for column in zip(*rows))
    scores = classification_scores(truth, predicted, n_classes=n_classes, resamples=0)
    assert scores["accuracy"]["value"] == pytest.approx(np.mean(truth == predicted))
    expected = sklearn_scores(truth, predicted, np.unique(truth))
    assert [scores[name]["value"] for name in ("macro_precision", "macro_recall", "macro_f1")] == pytest.approx(
        list(expected)
    )


def test_several_right_values_equal_sklearn_multilabel():
    "Truth as a table of right values, prediction as one of them."
    rng = np.random.default_rng(0)
    truth, predicted = rng.random((200, 6)) < 0.3, rng.integers(0, 6, 200)
    truth[:, 5] = False  # a class of the catalogue that the split does not show
    chosen = predicted[:, None] == np.arange(6)
    scores = classification_scores(truth, predicted, resamples=0)
    expected = sklearn_scores(truth, chosen, np.flatnonzero(truth.any(axis=0)))
    assert scores["accuracy"]["value"] == pytest.approx(np.mean(truth[np.arange(200), predicted]))
    assert [scores[name]["value"] for name in ("macro_precision", "macro_recall", "macro_f1")] == pytest.approx(
        list(expected)
    )


def test_classification_intervals_equal_explicit_resampling():
    "Macro scores: every resample scored by scikit-learn on the rows of its keys. Accuracy: the interval of any share."
    rng = np.random.default_rng(1)
    truth, keys = rng.integers(0, 4, 160), rng.integers(0, 60, 160)
    predicted = np.where(rng.random(160) < 0.6, truth, rng.integers(0, 4, 160))
    names = np.unique(keys)
    samples = []
    for draw in np.random.default_rng(7).integers(0, len(names), size=(40, len(names))):
        rows = np.concatenate([np.flatnonzero(keys == names[i]) for i in draw])
        samples.append(sklearn_scores(truth[rows], predicted[rows], np.unique(truth[rows])))
    scores = classification_scores(truth, predicted, keys, n_classes=5, resamples=40, seed=7)
    for column, name in enumerate(("macro_precision", "macro_recall", "macro_f1")):
        assert scores[name]["ci95"] == pytest.approx(
            list(np.percentile([sample[column] for sample in samples], [2.5, 97.5])), abs=1e-6
        )
    assert scores["accuracy"] == with_interval(truth == predicted, keys)


def test_macro_interval_is_left_out_where_a_class_is_rare():
    """Nine keys of a class come and go from resample to resample; ten are enough. Accuracy keeps its interval;
    a class that is not in the split does not count."""
    for rare, shown in ((9, False), (10, True)):
        truth = np.r_[np.zeros(40, dtype=int), np.ones(rare, dtype=int)]
        scores = classification_scores(truth, truth, n_classes=3, resamples=20)
        assert [bool(scores[name]["ci95"]) for name in ("accuracy", "macro_precision", "macro_recall", "macro_f1")] == [
            True,
            shown,
            shown,
            shown,
        ]
    listings = classification_scores(
        truth, truth, np.r_[np.arange(40), np.zeros(10, dtype=int) + 50], n_classes=2, resamples=20
    )
    assert listings["macro_f1"]["ci95"] == []  # ten listings of one product are one key


def test_classification_needs_memory_for_marks_not_for_tables():
    "20,000 products and 400 classes: no (N, 3 C + 1) floats (96 MB in float32), which stood in memory three times."
    rng = np.random.default_rng(0)
    truth = np.zeros((20_000, 400), dtype=bool)
    truth[np.arange(20_000), rng.integers(0, 400, 20_000)] = True
    tracemalloc.start()
    classification_scores(truth, rng.integers(0, 400, 20_000), resamples=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_one_class_and_misfits_are_refused():
    with pytest.raises(UsageError, match="fewer than 2 classes"):
        classification_scores(np.zeros(4, dtype=int), np.zeros(4, dtype=int))
    with pytest.raises(DataError, match="4 true and 3 predicted"):
        classification_scores(np.arange(4), np.arange(3))
    with pytest.raises(DataError, match="do not fit"):
        nearest_class(unit(3, 4), unit(2, 5), np.zeros((3, 2), dtype=bool))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), st.data())
def test_nearest_class_gives_no_benefit_of_the_doubt(count, classes, data):
    "Right only if a right class scores strictly above every wrong one; NaN never helps."
    vectors, texts = data.draw(vectors_of(count, 2)), data.draw(vectors_of(classes, 2))
    truth = data.draw(arrays.arrays(bool, (count, classes)))
    vectors[data.draw(st.lists(st.integers(0, count - 1), max_size=1))] = np.nan
    texts[data.draw(st.lists(st.integers(0, classes - 1), max_size=1))] = np.nan
    predicted = nearest_class(vectors, texts, truth, chunk=2)
    for row in range(count):
        scores = vectors[row] @ texts.T
        right = max((s for s, t in zip(scores, truth[row]) if t and not math.isnan(s)), default=-math.inf)
        wrong = max((math.inf if math.isnan(s) else s for s, t in zip(scores, truth[row]) if not t), default=-math.inf)
        if np.isnan(vectors[row]).any():
            assert predicted[row] == -1
        elif truth[row].any() and not truth[row].all():
            assert truth[row, predicted[row]] == (right > wrong)


# ---------------------------------------------------------------------------------------------- BM25


def plain_bm25(query, documents, k1=1.2, b=0.75):
    "The formula, one document and one term at a time."
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        times, score = Counter(document), 0.0
        for term in query:
            containing = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
            score += (
                idf * times[term] * (k1 + 1) / (times[term] + k1 * (1 - b + b * len(document) / mean))
                if times[term]
                else 0.0
            )
        scores.append(score)
    return scores


terms = st.lists(st.sampled_from("abcdef"), max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.lists(terms, min_size=1, max_size=5), st.lists(terms, min_size=1, max_size=8))
def test_bm25_equals_the_plain_formula(queries, documents):
    rows = bm25(queries, documents, tokenize=list)
    expected = [plain_bm25(query, documents) if any(documents) else [0.0] * len(documents) for query in queries]
    np.testing.assert_allclose(rows(0, len(queries)), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(rows(len(queries) - 1, len(queries)), rows(0, len(queries))[-1:])


def test_bm25_equals_rank_bm25():
    "The library's own term weighting, given our idf (its Okapi idf has no + 1 and a floor)."
    library = pytest.importorskip("rank_bm25")
    rng = np.random.default_rng(0)
    documents = [[f"w{i}" for i in rng.integers(0, 40, rng.integers(1, 12))] for _ in range(80)]
    queries = [[f"w{i}" for i in rng.integers(0, 45, 4)] for _ in range(30)]
    other = library.BM25Okapi(documents, k1=1.2, b=0.75)
    containing = Counter(term for document in documents for term in set(document))
    other.idf = {term: math.log(1 + (80 - count + 0.5) / (count + 0.5)) for term, count in containing.items()}
    np.testing.assert_allclose(
        bm25(queries, documents, tokenize=list)(0, 30), [other.get_scores(query) for query in queries], rtol=1e-5
    )


def test_errors_are_lab_errors_of_one_line():
    with pytest.raises(LabError) as caught:
        ranks_chunked(unit(3, 4), unit(5, 3), np.arange(3), np.arange(5))
    assert "\n" not in str(caught.value) and "->" in str(caught.value)
