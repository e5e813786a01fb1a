"""Public benchmarks: metrics against other implementations, files end to end, what was trained on, the command."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from moon2_lab.config import TrainConfig
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.benchmark_run import run_public_benchmark
from moon2_lab.evaluation.public_benchmarks import query_scores
from moon2_lab.evaluation.ranking import ranks_chunked
from moon2_lab.evaluation.relevance_judgements import askable_queries, read_ground_truth
from moon2_lab.training.holdout import find_holdout, training_products
from PIL import Image

METRICS = ("recall_share@1", "recall_share@10", "hit@1", "hit@10", "P@1", "P@10", "MRR@10", "MAP@10", "nDCG@10")


# ---------------------------------------------------------------------------------------------- metrics


def by_hand(ranking, grades):
    "The measures of trec_eval for one query, from their definitions: documents, best first; document -> grade."
    relevant = {name for name, grade in grades.items() if grade > 0}
    found = [name in relevant for name in ranking]
    precisions = [sum(found[: place + 1]) / (place + 1) for place in range(10) if found[place]]
    gain = sum(grades.get(name, 0) / math.log2(place + 2) for place, name in enumerate(ranking[:10]))
    best = sorted((grades[name] for name in relevant), reverse=True)[:10]
    return {
        "recall_share@1": sum(found[:1]) / len(relevant), "recall_share@10": sum(found[:10]) / len(relevant),
        "hit@1": float(any(found[:1])), "hit@10": float(any(found[:10])), "P@1": float(found[0]),
        "P@10": sum(found[:10]) / 10, "MRR@10": next((1 / (n + 1) for n in range(10) if found[n]), 0.0),
        "MAP@10": sum(precisions) / len(relevant),
        "nDCG@10": gain / sum(grade / math.log2(place + 2) for place, grade in enumerate(best)),
    }


def drawn_task(seed, queries=40, gallery=60):
    "Random vectors, and for each query one to 25 relevant candidates with grades 1 to 3."
    rng = np.random.default_rng(seed)
    vectors = [rng.standard_normal((count, 8)).astype(np.float32) for count in (queries, gallery)]
    gains = [
        {int(place): float(rng.integers(1, 4)) for place in rng.choice(gallery, rng.integers(1, 26), replace=False)}
        for _ in range(queries)
    ]
    return *vectors, gains


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_trec_eval(seed):
    "Every query of random tasks against the definitions, and nDCG against scikit-learn."
    from sklearn.metrics import ndcg_score

    query, gallery, gains = drawn_task(seed)
    ranks = ranks_chunked(query, gallery, [np.array(sorted(table)) for table in gains], np.arange(len(gallery)))
    measured = query_scores(ranks, gains, METRICS)
    scores = query.astype(np.float64) @ gallery.T.astype(np.float64)
    for row, table in enumerate(gains):
        expected = by_hand(np.argsort(-scores[row]).tolist(), table)
        assert {metric: pytest.approx(measured[metric][row]) for metric in METRICS} == expected
        truth = np.array([[table.get(place, 0.0) for place in range(len(gallery))]])
        assert measured["nDCG@10"][row] == pytest.approx(ndcg_score(truth, scores[row : row + 1], k=10))


def test_a_constant_model_gets_nothing():
    "All scores equal: every wrong candidate stands before the right one."
    ranks = ranks_chunked(np.ones((3, 4)), np.ones((30, 4)), [np.array([place]) for place in range(3)], np.arange(30))
    measured = query_scores(ranks, [{place: 1.0} for place in range(3)], METRICS)
    assert all(values.max() == 0 for values in measured.values())


# ---------------------------------------------------------------------------------------------- files end to end

COLOURS = {"red": (220, 20, 20), "green": (20, 160, 20), "blue": (20, 20, 220), "white": (250, 250, 250)}


class ColourModel:
    "Reads colour words, sees the mean colour: its vectors can be worked out by hand. Grey is what it knows nothing of."
    fingerprint = "colours"

    def __init__(self):
        self.seen = []

    def encode_views(self, items):
        self.seen += items
        text = np.stack([self.words(item.text) for item in items])
        image = np.stack([self.look(item.image) for item in items])
        both = np.where(np.isnan(text), image, np.where(np.isnan(image), text, text + image))
        return {"t": self.unit(text), "i": self.unit(image), "mm": self.unit(both)}

    def words(self, text):
        known = [COLOURS[word] for word in (text or "").lower().split() if word in COLOURS] or [(90, 90, 90)]
        return np.mean(known, axis=0) - 70.0 if text else np.full(3, np.nan)

    def look(self, image):
        return np.asarray(image.load(), dtype=float).mean((0, 1)) - 70.0 if image else np.full(3, np.nan)

    @staticmethod
    def unit(vectors):
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def untrained(self):
        return self


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def value(metrics, metric):
    (block,) = metrics["directions"].values()
    return block[metric]["value"]


@pytest.fixture
def beir(tmp_path):
    lines(
        tmp_path / "corpus.jsonl", {"_id": "d1", "title": "red", "text": "mug"}, {"_id": "d2", "text": "green vase"},
        {"_id": "d3", "text": "blue bowl"}, {"_id": "d4", "title": "", "text": ""},
    )
    lines(
        tmp_path / "queries.jsonl", {"_id": "q1", "text": "something red"}, {"_id": "q2", "text": "a blue thing"},
        {"_id": "q3", "text": "green"}, {"_id": "train", "text": "white"},
    )
    rows = ("q1\td1\t2", "q1\td3\t1", "q2\td2\t1", "q3\td4\t1")
    lines(tmp_path / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", *rows)
    return tmp_path


def test_beir_by_hand(beir):
    """q1 finds d1 (grade 2), then blue (grade 1) at place 2 or 3; q2 finds green behind blue; q3's answer is an empty
    document."""
    metrics = run_public_benchmark(ColourModel(), "qrels", beir, resamples=100)
    about = metrics["protocol"]
    block = metrics["directions"]["t->mm"]
    assert (block["n_queries"], block["n_gallery"], about["n_queries_all"]) == (2, 3, 3)
    assert (about["n_without_positive"], about["n_unknown"], about["unknown"]) == (1, 1, ["d4"])
    assert about["n_candidates_left_out"] == 1 and metrics["published"] == []
    vectors = {name: ColourModel.unit(ColourModel().words(name)[None])[0] for name in COLOURS}
    place = 2 if vectors["red"] @ vectors["blue"] > vectors["red"] @ vectors["green"] else 3
    rank = 2 if vectors["blue"] @ vectors["green"] > vectors["blue"] @ vectors["red"] else 3
    assert value(metrics, "MRR@10") == pytest.approx((1 + 1 / rank) / 2)
    assert value(metrics, "MAP@10") == pytest.approx(((1 + 2 / place) / 2 + 1 / rank) / 2)
    perfect = 2 + 1 / math.log2(3)
    assert value(metrics, "nDCG@10") == pytest.approx(
        ((2 + 1 / math.log2(place + 1)) / perfect + 1 / math.log2(rank + 1)) / 2
    )
    assert set(metrics["trivial"]["t->mm"]) == {"bm25", "untrained"}


@pytest.mark.parametrize(
    ("file", "row", "contains"),
    [
        ("qrels/test.tsv", "q1\td1\tmuch", "test.tsv:1, query q1"),
        ("qrels/test.tsv", "q9\td1\t1", "1 queries of the qrels have no words: q9"),
        ("qrels/test.tsv", "q1\td9\t1", "1 of 1 relevant documents are no candidate: d9"),
        ("qrels/test.tsv", "q1\td1\t0", "no candidate"),
        ("qrels/test.tsv", "", "no candidate"),
        ("corpus.jsonl", '{"_id": "d1"', "corpus.jsonl:1"),
        ("corpus.jsonl", '{"text": "red"}', "no _id or id ["),
        ("queries.jsonl", '{"_id": "q1"}', "query q1 is empty"),
    ],
)
def test_broken_beir(beir, file, row, contains):
    lines(beir / file, row)
    if file == "queries.jsonl":
        lines(beir / "qrels" / "test.tsv", "q1\td1\t1")
    with pytest.raises(DataError) as caught:
        run_public_benchmark(ColourModel(), "qrels", beir)
    assert contains in str(caught.value)


@pytest.fixture
def mcmr(tmp_path):
    "Four candidates whose words and pictures disagree, and one without a picture."
    (tmp_path / "images").mkdir()
    rows = []
    for name, (words, look) in {"a": ("red", "blue"), "b": ("blue", "red"), "c": ("green", "green")}.items():
        Image.new("RGB", (30, 30), COLOURS[look]).save(tmp_path / "images" / f"{name}.png")
        rows.append({"candidate_id": name, "title": words, "images": [{"large": f"https://x.org/{name}.png"}]})
    lines(tmp_path / "candidate.jsonl", *rows, {"candidate_id": "d", "title": "red", "images": []})
    lines(
        tmp_path / "query.jsonl", {"qid": "q1", "query": "red mug", "pos_ids": ["a", "d"]},
        {"qid": "q2", "query": "green", "pos_ids": ["c"]}, {"qid": "q3", "query": "white", "pos_ids": ["d"]},
    )
    return tmp_path


@pytest.mark.parametrize(("candidates", "hits"), [("text", [1, 1]), ("image", [0, 1]), ("fused", [0, 1])])
def test_mcmr_candidates(mcmr, candidates, hits):
    "By its words a is red, by its picture blue; the gallery and the queries are the same in all three."
    model = ColourModel()
    metrics = run_public_benchmark(model, "mcmr", mcmr, candidates=candidates, baselines=False, out=mcmr / "out")
    about, table = metrics["protocol"], pd.read_parquet(mcmr / "out" / "per_query.parquet")
    (block,) = metrics["directions"].values()
    assert (block["n_queries"], block["n_gallery"], about["n_unknown"], about["n_candidates_left_out"]) == (2, 3, 1, 1)
    if candidates != "fused":
        assert table["hit@1"].tolist() == hits
    seen = [item for item in model.seen if item.item_id in "abc"]
    assert {item.has_text for item in seen} == {candidates != "image"}
    assert {item.has_image for item in seen} == {candidates != "text"}
    models = {row["model"] for row in metrics["published"]}
    published = {"fused": {"CORAL-3B", "LLaVE", "MM-Embed", "GME-7B", "VLM2Vec"}, "image": {"GME-7B", "LLaVE"}}
    assert models == published.get(candidates, set())
    assert not any(row["comparable"] for row in metrics["published"])


def test_a_document_of_two_views(tmp_path):
    "Categories look for .9 picture + .1 title: the picture decides."
    products = []
    for number, (words, look) in enumerate((("red", "blue"), ("blue", "red"))):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (30, 30), COLOURS[look]).save(tmp_path / "images" / f"{number}.png")
        paths = json.dumps([f"images/{number}.png"])
        products.append({"product_id": f"fpi-{number}", "title": words, "image_paths": paths})
    pd.DataFrame(products).to_parquet(tmp_path / "products.parquet")
    (tmp_path / "ground_truth_baseColour-image+text.json").write_text('{"red": {"1": 1}, "blue": {"0": 1}}')
    catalog = Catalog.load(tmp_path)
    metrics = run_public_benchmark(ColourModel(), "kagl", tmp_path, catalog=catalog, task="baseColour-image+text")
    assert list(metrics["directions"]) == ["t->.9i+.1t"] and value(metrics, "P@1") == 1.0
    assert value(metrics, "P@10") == pytest.approx(0.1)
    assert {"model", "values", "source"} <= set(metrics["published"][0]) and len(metrics["published"]) == 2
    assert metrics["trivial"]["t->.9i+.1t"]["bm25"]["P@1"]["value"] == 0.0  # by the words it is the other one
    (tmp_path / "t.json").write_text('{"red": {"1": 1}}')
    with pytest.raises(UsageError, match="what is a document of"):
        run_public_benchmark(ColourModel(), "kagl", tmp_path / "t.json", catalog=catalog, task="colour")


# ---------------------------------------------------------------------------------------------- what was trained on

PAIR = ("held", "plain")
TINY = {
    "backbone": "tiny", "num_layers": 1, "image_size": 32, "visual_tokens": 4, "query_variants": 1, "max_steps": 2,
    "per_device_train_batch_size": 4, "num_threads": 1, "device": "cpu",
}


@pytest.fixture(scope="module")
def truth_of_drawn(drawn_catalogue, tmp_path_factory):
    "A ground truth about ten training and five test products of the drawn catalogue, and one of another shop."
    catalog, path = Catalog.load(drawn_catalogue), tmp_path_factory.mktemp("truth") / "ground_truth_text-image.json"
    asked = [*catalog.split("train")[:10], *catalog.split("test")[:5]]
    truth = {f"looking for {product.title} {n}": {product.product_id: 1} for n, product in enumerate(asked)}
    path.write_text(json.dumps(truth | {"x": {"?": 1}}))
    return path


@pytest.fixture(scope="module")
def runs(drawn_catalogue, truth_of_drawn, tmp_path_factory):
    "Two runs of two steps: with the holdout, and without."
    from moon2_lab.cli.pipeline import train_run

    place, catalog = tmp_path_factory.mktemp("runs"), Catalog.load(drawn_catalogue)
    for name, holdout in (("held", str(truth_of_drawn)), ("plain", "")):
        train_run(catalog, place / name, TrainConfig(**TINY, holdout=holdout))
    return place


def test_a_run_says_what_it_held_out(runs, drawn_catalogue, truth_of_drawn):
    "run_settings.json has the products; no triplet has one of them; the other run has nothing."
    from moon2_lab.training.trainer import training_triplets

    trained = {name: set(pd.read_parquet(runs / name / "training_products.parquet")["product_id"]) for name in PAIR}
    held, plain = (json.loads((runs / name / "run_settings.json").read_text()) for name in PAIR)
    catalog = Catalog.load(drawn_catalogue)
    keys = {catalog.product_key(name) for name in read_ground_truth(truth_of_drawn).relevant_ids() if name in catalog}
    expected = [product.product_id for product in catalog.split("train") if product.key in keys]
    assert held["holdout"]["product_ids"] == expected and len(expected) >= 10
    assert (held["holdout"]["named"], held["holdout"]["unknown"], plain["holdout"]) == (16, 1, None)
    assert held["data_hash"] == plain["data_hash"] == catalog.data_hash
    assert trained["plain"] >= set(expected) and not trained["held"] & set(expected)
    triplets = training_triplets(catalog, TrainConfig(**TINY, holdout=str(truth_of_drawn)))
    used = {product.key for triplet in triplets for product in (triplet.positive, *triplet.negatives)}
    assert used and not used & keys
    everything = training_triplets(catalog, TrainConfig(**TINY))
    assert {triplet.positive.product_id for triplet in everything} >= set(expected)


def test_triplets_of_ones_own_must_not_have_the_held_out(drawn_catalogue, truth_of_drawn):
    "Whoever brings triplets makes them of what is left."
    from moon2_lab.training.trainer import training_triplets

    catalog = Catalog.load(drawn_catalogue)
    config = TrainConfig(**TINY)
    given = training_triplets(catalog, config)
    with pytest.raises(UsageError, match="which is held out"):
        training_triplets(catalog, config.replace(holdout=str(truth_of_drawn)), given)
    left = training_products(catalog, truth_of_drawn)
    assert len(left) == len(catalog.split("train")) - len(find_holdout(catalog, truth_of_drawn).product_ids)


def test_holding_out_by_triplets_of_a_file(tmp_path):
    "A catalogue with triplets loses those whose positive is held out, and held-out negatives."
    rows = [{"product_id": f"p{n}", "title": f"thing {n}", "split": "train"} for n in range(6)]
    pd.DataFrame(rows).to_parquet(tmp_path / "products.parquet")
    asked = [("q0", "p0", ["p1", "p2"]), ("q1", "p1", ["p0"]), ("q2", "p2", ["p0", "p1"])]
    pd.DataFrame([
        {"query_id": q, "query_text": q, "query_image": None, "positive_id": p, "negative_ids": json.dumps(n)}
        for q, p, n in asked
    ]).to_parquet(tmp_path / "triplets.parquet")
    (tmp_path / "held.txt").write_text("p1\n")
    left = training_products(Catalog.load(tmp_path), tmp_path / "held.txt")
    assert left.triplets["positive_id"].tolist() == ["p0", "p2"]
    assert left.triplets["negative_ids"].tolist() == [["p2"], ["p0"]]


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_warns_where_answers_were_trained_on(moon2, runs, drawn_catalogue, truth_of_drawn, tmp_path):
    "The run without the holdout is told so, loudly; with it the score is in-domain all the same."
    call = ("benchmark", "kagl", truth_of_drawn.parent, "--catalog", drawn_catalogue, "--device", "cpu")
    code, out, err = moon2(*call, "--model", runs / "plain", "--out", tmp_path / "plain.json")
    assert code == 0, err
    assert "IN-DOMAIN: " in out and "relevant products were trained on" in out and "not comparable" in out
    assert "IN-DOMAIN: " in err
    code, out, err = moon2(*call, "--model", runs / "held", "--json")
    metrics = json.loads(out)
    assert code == 0 and "IN-DOMAIN" not in err
    assert metrics["protocol"]["training_overlap"]["n_trained"] == 0
    assert metrics["protocol"]["warnings"][0].startswith("in-domain: trained on ")
    assert any("in-domain" in reason for reason in metrics["published"][0]["why_not"])
    assert list(metrics["trivial"]["t->i"]) == ["untrained"] and "bm25" in metrics["skipped_baselines"]
    table = pd.read_parquet(tmp_path / "plain.per_query.parquet")
    stored = json.loads((tmp_path / "plain.json").read_text())
    assert table["MRR@10"].mean() == pytest.approx(stored["directions"]["t->i"]["MRR@10"]["value"])


@pytest.mark.parametrize(
    ("words", "contains"),
    [
        (["kagle", "{truth}", "--catalog", "{catalog}"], "invalid choice"),
        (["kagl", "{truth}"], "--catalog"),
        (["kagl", "{truth}", "--catalog", "{catalog}", "--task", "usage-image+text"], "tasks there: text-image"),
        (["kagl", "{truth}", "--catalog", "{catalog}", "--unknown-limit", "0"], "1 of 16 relevant documents are no"),
        (["kagl", "{truth}", "--catalog", "{catalog}", "--unknown-limit", "2"], "a share, 0 to 1"),
        (["mcmr", "{truth}"], "query.jsonl"),
        (["mbe2", "{truth}"], "products.parquet"),
    ],
)
def test_bad_calls(moon2, runs, drawn_catalogue, truth_of_drawn, words, contains):
    "One line, exit code 2."
    filled = [word.format(truth=truth_of_drawn.parent, catalog=drawn_catalogue) for word in words]
    code, out, err = moon2("benchmark", *filled, "--model", runs / "plain", "--device", "cpu")
    assert code == 2 and contains in err.splitlines()[-1] and not out


# ---------------------------------------------------------------------------------------------- real products


@pytest.mark.data
def test_kagl_on_the_fashion_set(data_root):
    "459 of the 2,000 queries have a relevant product in our part of the catalogue, 380 have all of theirs."
    path = data_root / "benchmarks" / "kagl" / "ground_truth_text-image.json"
    if not path.is_file():
        pytest.skip("the ground truth of KAGL is not there")
    table = pd.read_parquet(data_root / "fashion-product-images" / "products.parquet")
    asked = askable_queries(read_ground_truth(path), table["product_id"].tolist(), prefix="fpi-")
    assert asked.counts["n_queries_all"] == 2000 and asked.counts["n_relevant_all"] == 2774
    assert (len(asked.ids), len(asked.ids) - asked.counts["n_incomplete"]) == (459, 380)
    assert asked.counts["n_unknown"] == 2774 - sum(map(len, asked.places))
