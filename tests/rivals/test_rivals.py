"""Other models behind `encode_views`: against their own forward pass, in the commands, on a clock, and with faults that
would give wrong figures without an error.
"""
import importlib.machinery
import itertools
import json
import sys
import types

import numpy as np
import pytest
import torch
from families import folder_of
from moon2_lab.config import VIEWS
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.evaluation.evaluate import evaluate, run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.model.certify import stock_hidden
from moon2_lab.rivals import two_tower
from moon2_lab.rivals.adapters import CheckedEncoder
from moon2_lab.rivals.last_token import LastTokenEncoder
from moon2_lab.rivals.late_fusion import LateFusion, choose_share, save_fusion
from moon2_lab.rivals.loading import load_encoder
from moon2_lab.rivals.pretrained import FrozenEncoder, SentenceEncoder
from moon2_lab.rivals.two_tower import CONNECTOR, TwoTower, TwoTowerConfig, load_two_tower, train_two_tower
from small import USERS_CACHE, picture, product, shop

pytestmark = pytest.mark.usefixtures("own_cache")
TOWER = TwoTowerConfig(
    backbone="tiny", text_layers=2, train_layers=1, dim=24, hidden=32, per_device_train_batch_size=16,
    head_learning_rate=1e-2,
)
CHAT = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
ITEMS = [
    Item("small red ball", picture(1), "both"), Item("large blue box no 7", None, "words"),
    Item(None, picture(2), "picture"), Item("green ring a nice plain new finest quality", picture(3), "longer"),
]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    "family -> the folder of a tiny multimodal LLM whose tokenizer knows a chat."
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    def make(family):
        folder = tmp_path_factory.mktemp(family)
        for file in folder_of(family).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"extra_special_tokens": [*tokenizer.extra_special_tokens, *CHAT]})
        tokenizer.save_pretrained(folder)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
        return str(folder)

    return make


# ---------------------------------------------------------------------------------------------- multimodal LLMs


@pytest.mark.parametrize(
    "family, kind",
    [("qwen2_vl", "gme"), ("qwen2_5_vl", "gme"), ("qwen3_vl", "qwen3-vl-embedding"), ("qwen3_5", "qwen3-vl-embedding"),
     ("smolvlm", "qwen3-vl-embedding")],
)
def test_last_token_is_that_of_the_models_own_forward_pass(chat_model, family, kind):
    "For each view, item and kind of decoder, whatever else is in the batch."
    encoder = LastTokenEncoder(chat_model(family), "cpu", kind=kind, image_side=128)
    together, one_by_one = encoder.encode_views(ITEMS), None
    encoder.batch_size = 1
    one_by_one = encoder.encode_views(ITEMS)
    for view in VIEWS:
        np.testing.assert_allclose(together[view], one_by_one[view], atol=1e-4)
        for item, vector in zip(ITEMS, together[view], strict=True):
            if np.isnan(vector).any():
                continue
            (row,), _ = encoder._last_states([item], (view,))
            stock = stock_hidden(encoder.backbone, row, [item.image.load()] if row.pictures else [])[-1].numpy()
            np.testing.assert_allclose(vector, stock / np.linalg.norm(stock), atol=1e-3)


def test_the_wrong_end_of_the_prompt_is_seen(chat_model):
    "The test above would not pass vacuously: a row without its end has another last state."
    encoder = LastTokenEncoder(chat_model("qwen3_vl"), "cpu", image_side=128)
    right = encoder.encode(ITEMS[:1], "t")
    encoder.behind = encoder.behind[:-1]
    assert np.abs(encoder.encode(ITEMS[:1], "t") - right).max() > 0.01


# ---------------------------------------------------------------------------------------------- wrong adapters


class Wrong:
    "The views of an encoder, spoiled in one way."

    fingerprint, embedding_dim = "wrong", 112

    def __init__(self, fault):
        self.inner, self.fault = FrozenEncoder("tiny", "cpu"), fault

    def encode_views(self, items):
        views = self.inner.encode_views(items)
        if self.fault == "swapped" and len(items) > 1:  # two neighbours in the middle
            half = len(items) // 2
            order = [*range(half), half + 1, half, *range(half + 2, len(items))] if len(items) > half + 1 else [1, 0]
            return {view: rows[order] for view, rows in views.items()}
        if self.fault == "batch mean":  # what stands beside an item changes it
            moved = {view: rows + 2 * np.nanmean(rows, axis=0) for view, rows in views.items()}
            return {view: rows / np.linalg.norm(rows, axis=1, keepdims=True) for view, rows in moved.items()}
        return {view: rows * {"doubled": 2.0, "nan": np.nan}.get(self.fault, 1.0) for view, rows in views.items()}


@pytest.mark.parametrize(
    "fault, said",
    [("swapped", "another order"), ("batch mean", "another vector alone than among others"),
     ("doubled", "not l2-normalised"), ("nan", "no finite vector")],
)
def test_a_wrong_adapter_is_refused_before_it_gets_a_score(fault, said):
    benchmark = make_benchmark(shop(41), "all")
    with pytest.raises(DataError, match=said):
        run_benchmark(CheckedEncoder(Wrong(fault)), benchmark, baselines=False, labels=False, resamples=0)
    run_benchmark(CheckedEncoder(Wrong("")), benchmark, baselines=False, labels=False, resamples=0)


def test_an_order_that_depends_on_the_batch_is_found_in_a_catalogue_of_equal_items():
    "Equal items have equal vectors, wherever they stand: no false alarm."
    items = [Item("red ball", None, f"q{number}") for number in range(8)] + [Item("blue box", None, "other")]
    views = CheckedEncoder(Wrong("")).encode_views(items)
    assert np.allclose(views["t"][:8], views["t"][0]) and np.isnan(views["i"]).all()


# ---------------------------------------------------------------------------------------------- the dual tower


def test_the_clock_is_kept_whatever_a_step_takes(monkeypatch):
    "Uneven steps, on a clock of their own: it ends within the minutes, and close to them."
    now, waits, usual = [0.0], itertools.cycle([1.0, 1.2, 0.8, 2.0, 1.0]), two_tower._Pairs.loss

    def slow(pairs):
        now[0] += next(waits)
        return usual(pairs)

    monkeypatch.setattr(two_tower._Pairs, "loss", slow)
    monkeypatch.setattr(two_tower, "clock_of", lambda name: lambda: now[0])
    tower = train_two_tower(shop(40), TOWER, minutes=0.5, device="cpu")
    assert 30 - 2.5 <= tower.info["seconds"] <= 30 and tower.info["trained_steps"] > 20


def test_states_that_take_long_leave_time_for_steps(monkeypatch):
    "What frozen layers compute once is on the clock, but no measure of how long a step takes."
    now, usual = [0.0], (two_tower._Pairs.loss, two_tower._Pairs.keep_states)

    def slow(method, seconds):
        def call(pairs):
            now[0] += seconds
            return method(pairs)

        return call

    monkeypatch.setattr(two_tower._Pairs, "loss", slow(usual[0], 1.0))
    monkeypatch.setattr(two_tower._Pairs, "keep_states", slow(usual[1], 20.0))
    monkeypatch.setattr(two_tower, "clock_of", lambda name: lambda: now[0])
    frozen = TwoTowerConfig(**{**TOWER.__dict__, "train_layers": 0})
    tower = train_two_tower(shop(40), frozen, minutes=0.5, device="cpu")
    assert tower.info["trained_steps"] == 9 and tower.info["seconds"] == 29.0


def test_what_lacks_a_side_is_no_pair_and_equal_keys_are_no_negatives():
    "Products without a picture or title are left out; a batch of one key alone has nothing to learn from."
    mixed = shop(60, mixed=True)
    complete = [one for one in mixed.split("train") if one.has_text and one.has_image]
    assert train_two_tower(mixed, TOWER, steps=1, device="cpu").info["products"] == len(complete) < 48
    same = Catalog.from_products([product(number, title="one title") for number in range(1, 20, 5)] * 1)
    tower = TwoTower(TwoTowerConfig(**{**TOWER.__dict__, "per_device_train_batch_size": 4}), "cpu")
    pairs = two_tower._Pairs(tower, list(same))
    assert pairs.loss().item() == 0.0


def test_frozen_layers_stay_and_trained_ones_move():
    before, tower = TwoTower(TOWER, "cpu"), train_two_tower(shop(40), TOWER, steps=3, device="cpu")
    layers = [
        {name: torch.equal(one, dict(new.named_parameters())[name]) for name, one in old.named_parameters()}
        for old, new in zip(before.backbone.decoder.layers, tower.backbone.decoder.layers)
    ]
    assert all(layers[0].values()) and not any(layers[1].values())
    linear = TwoTowerConfig(**{**CONNECTOR.__dict__, "backbone": "tiny", "text_layers": 2, "dim": 8,
                               "per_device_train_batch_size": 8})
    assert sum(one.numel() for one in TwoTower(linear, "cpu").parameters()) == 8 * (48 + 64 + 2)


@pytest.mark.parametrize("file, said", [("model.safetensors", "model.safetensors"), ("config.json", "config.json")])
def test_a_damaged_folder_is_named(tmp_path, file, said):
    train_two_tower(shop(40), TOWER, steps=1, out=tmp_path / "run", device="cpu")
    path = tmp_path / "run" / "model" / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LabError, match=said):
        load_two_tower(tmp_path / "run" / "model", "cpu")


# ---------------------------------------------------------------------------------------------- late fusion


def test_the_chosen_share_is_not_worse_than_either_side_on_the_split_it_was_chosen_on(tmp_path):
    catalog = shop(80)
    train_two_tower(catalog, TOWER, steps=40, out=tmp_path / "tower", device="cpu")
    tower, words = load_encoder(tmp_path / "tower", "cpu"), FrozenEncoder("tiny", "cpu")
    share, table = choose_share(tower, words, catalog, "valid")
    best = table.set_index("image_share").mrr
    assert best[share] == best.max() >= max(best[0.0], best[1.0])
    save_fusion(tmp_path / "fused", str(tmp_path / "tower"), "frozen:tiny", share, table)
    fused = load_encoder(tmp_path / "fused", "cpu")
    assert fused.fingerprint == LateFusion(tower, words, share).fingerprint
    scores = evaluate(fused, catalog, split="valid", resamples=0, baselines=False, labels=False)["directions"]
    own = evaluate(tower, catalog, split="valid", resamples=0, baselines=False, labels=False)["directions"]
    assert scores["t->i"]["R@1"] == own["t->i"]["R@1"] and scores["i->t"]["R@1"] == own["i->t"]["R@1"]


# ---------------------------------------------------------------------------------------------- sentence-transformers


class FakeSentenceTransformer:
    "What `SentenceEncoder` calls of a multimodal model of sentence-transformers 6, and what it was given."

    default_prompt_name, prompts = None, {}

    def __init__(self, where, device, local_files_only):
        self.where, self.local, self.calls = where, local_files_only, []

    def eval(self):
        return self

    def supports(self, modality):
        return modality in ("image", ("image", "text"))

    def get_embedding_dimension(self):
        return 4

    def encode_query(self, inputs, **how):
        return self.encode_document(inputs, **how)

    def encode_document(self, inputs, **how):
        self.calls.append((list(inputs), how))
        sums = [sum(map(ord, str(one.get("text", "")))) if isinstance(one, dict) else one.width for one in inputs]
        shown = [float(not isinstance(one, dict) or "image" in one) for one in inputs]
        return torch.tensor([[1.0, number % 7 + 1, seen, 0] for number, seen in zip(sums, shown)])


@pytest.fixture
def fake_library(monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    module.SentenceTransformer = FakeSentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


def test_words_and_picture_are_read_together_where_the_model_can(fake_library, tmp_path):
    "A text that is the address of a picture stays a text; nothing is asked of a hub for a folder."
    items = [Item("https://shop.example/a.jpg", picture(1), "address"), Item("red ball", None, "words"), ITEMS[2]]
    encoder = SentenceEncoder(str(tmp_path), "cpu", prompt="Represent: ")
    views = encoder.encode_views(items)
    assert encoder.network.local is True and encoder.own_views == VIEWS
    given = [one for inputs, how in encoder.network.calls for one in inputs if isinstance(one, dict)]
    assert {"text": items[0].text} in given
    assert any(set(one) == {"image", "text"} for one in given)
    assert all(how["prompt"] == "Represent: " for _, how in encoder.network.calls)
    assert (views["mm"][0] != views["t"][0]).any() and (views["mm"][1] == views["t"][1]).all()


def test_an_evaluation_reads_queries_with_their_own_prompt(fake_library, tmp_path, drawn_catalogue):
    "Words of products and of queries meet the prompt that is theirs, in each direction that asks with queries."
    encoder = SentenceEncoder(str(tmp_path), "cpu", prompt="passage: ", query_prompt="query: ")
    catalog = Catalog.load(drawn_catalogue)
    evaluate(encoder, catalog, split="valid", resamples=0, baselines=False, labels=False)
    read = {how["prompt"]: set() for _, how in encoder.network.calls}
    for inputs, how in encoder.network.calls:
        read[how["prompt"]] |= {one["text"] for one in inputs if isinstance(one, dict) and set(one) == {"text"}}
    benchmark = make_benchmark(catalog, "valid")
    texts = {items.name: {item.text for item in items.items if item.has_text} for items in benchmark.item_sets}
    assert set(read) == {"passage: ", "query: "}
    assert texts["products"] <= read["passage: "] and texts["queries"] <= read["query: "]
    assert texts["conditions"] <= read["query: "] and not texts["conditions"] & read["passage: "]


def test_a_fusion_reads_queries_as_its_parts_do(fake_library, tmp_path, monkeypatch):
    "One part that is both is read once; no weight is looked at again, as it would be for each search."
    encoder = SentenceEncoder(str(tmp_path), "cpu", query_prompt="query: ")
    fused = LateFusion(encoder)
    monkeypatch.setattr(SentenceEncoder, "fingerprint", property(lambda self: pytest.fail("weights were read")))
    asking = fused.for_queries()
    assert asking.inner[0] is asking.inner[1] is not encoder and fused.inner == (encoder, encoder)
    encoder.network.calls.clear()
    asking.encode_views(ITEMS[:1])
    assert {how["prompt"] for _, how in encoder.network.calls} == {"query: "}


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("moon2_lab.rivals.pretrained.find_spec", lambda name: None)
    with pytest.raises(LabError, match=r"moon2_lab\[rivals\]"):
        SentenceEncoder(str(tmp_path), "cpu")


# ---------------------------------------------------------------------------------------------- commands


def test_eval_and_compare_take_rivals(moon2, drawn_catalogue, tmp_path):
    train_two_tower(Catalog.load(drawn_catalogue), TOWER, steps=3, out=tmp_path / "tower", device="cpu")
    scores = tmp_path / "frozen.json"
    asked = ("--catalog", drawn_catalogue, "--split", "all")
    code, out, _ = moon2("eval", "frozen:tiny", *asked, "--out", scores, "--json")
    metrics = json.loads(out)
    assert code == 0 and metrics["protocol"]["model"] == FrozenEncoder("tiny", "cpu").fingerprint
    assert metrics["directions"]["i->mm"]["R@10"]["value"] > metrics["directions"]["t->i"]["R@10"]["value"]
    page = tmp_path / "diff.html"
    code, out, err = moon2("compare", "frozen:tiny", tmp_path / "tower", "--catalog", drawn_catalogue, "--out", page)
    assert code == 0 and page.is_file() and "frozen:tiny" in page.read_text(encoding="utf-8"), err


def test_embed_and_search_take_rivals(moon2, drawn_catalogue, tmp_path):
    "The vectors say who made them; another model may not ask."
    code, out, err = moon2("embed", "frozen:tiny", "--catalog", drawn_catalogue, "--out", tmp_path / "v.parquet")
    assert code == 0, err
    search = ("--vectors", tmp_path / "v.parquet", "--text", "red mug", "--k", 3, "--json")
    code, out, err = moon2("search", "frozen:tiny", *search)
    assert code == 0 and len(json.loads(out)["hits"]) == 3, err
    assert moon2("search", "frozen:tiny?image_weight=0.9", *search)[0] == 2


def test_the_demo_searches_with_a_rival_and_says_that_it_cannot_explain_it():
    from moon2_lab.app.interface import build_demo

    catalog = shop(24)
    words = CheckedEncoder(Wrong(""), own_views=("t", "i", "mm"))
    service = build_demo(FrozenEncoder("tiny", "cpu"), words, catalog=catalog).service
    own = catalog.products[5]
    assert service.find(own.item("i"), "mm", 3)[0].product.key == own.key
    assert "no heatmaps" in service.model("A").label
    with pytest.raises(UsageError, match="cannot be explained here"):
        service.model("A").explain(own.item(), own.item())
    assert service.comparison().counts("direction")["moved"].sum() == 0  # the same model twice


@pytest.mark.parametrize(
    "name, said",
    [("bert:some", "there is no kind of model"), ("clip:nowhere", "no such folder"),
     ("frozen:tiny?colour=red", "no option"), ("two-tower:nowhere", "no such folder"),
     ("frozen:huge", "no frozen parts")],
)
def test_a_wrong_name_is_one_sentence(moon2, drawn_catalogue, name, said):
    code, out, err = moon2("eval", name, "--catalog", drawn_catalogue)
    assert code == 2 and said in err and not out and len(err.strip().splitlines()[-1]) < 300


def test_an_unknown_kind_is_a_usage_error_in_python_too():
    with pytest.raises(UsageError, match="frozen:"):
        load_encoder("bert:some")


# ---------------------------------------------------------------------------------------------- real products


@pytest.mark.slow
@pytest.mark.data
def test_frozen_features_find_the_same_picture_and_no_words(data_root, monkeypatch):
    "On 150 real products: what a model without training can and cannot do."
    monkeypatch.setenv("MOON2_CACHE", USERS_CACHE) if USERS_CACHE else monkeypatch.delenv("MOON2_CACHE")
    catalog = Catalog.load(data_root / "fashion-product-images")
    scores = evaluate(FrozenEncoder("mini", "cpu"), catalog, limit=150, resamples=0, baselines=False, labels=False)
    recall = {name: block["R@1"]["value"] for name, block in scores["directions"].items()}
    assert recall["i->mm"] > 0.9 and recall["t->mm"] > 0.5 and recall["t->i"] < 0.05, recall
