"""Maps of a pair from a model: every method on every kind of pair, sums that hold, foreign backbones, bad input,
the command; two models side by side.
"""

import json
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from choosing import few
from PIL import Image
from small import pretrained, shop
from torch.nn import functional as F

from moon2_lab.cli.main import main
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.data.synthetic.generator import draw_product
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.explain.attribution import (
    AttributionInputs, Cancelled, METHODS, attribute_side, attribution_inputs, fitting_methods, run_method,
)
from moon2_lab.explain.explainer import Explainer, ExplainerCache
from moon2_lab.explain.faithfulness import measure_faithfulness
from moon2_lab.explain.pair_score import DecoderScore, mean_patch
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.reporting.heatmap_figures import static_png
from moon2_lab.reporting.heatmap_page import heat_page
from moon2_lab.widgets.heatmap import compare_heatmaps, heatmap

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore:attention=bidirectional")]
QUICK = ["gradient", "attention", "rollout", "attention_gradient"]


def tiny(**fields):
    "A small encoder whose experts differ."
    return perturb_experts(
        Moon2Encoder.from_backbone("tiny", **({"num_layers": 2, "image_size": 64} | fields)), std=0.1
    ).eval()


def pair(index=1):
    "A shopper's words and photo, and the product they mean."
    drawn = draw_product(3, index, image_size=96)
    return Item(" ".join(drawn.title.split()[-2:]).lower(), ImageRef.from_pil(drawn.pictures[1]), "query"), Item(
        drawn.title, ImageRef.from_pil(drawn.pictures[0]), "item"
    )


# ---------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_experts": 0}, {"top_k": 1}, {"attention": "bidirectional"}],
    ids=["experts", "dense", "one expert", "bidirectional"],
)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_gives_a_number_for_each_word_and_cell(method, fields):
    encoder, (query, item) = tiny(**fields), pair()
    for side, mine in (("item", item), ("query", query)):
        found = attribute_side(encoder, query, item, side, method, samples=6)
        assert (
            found.words.shape == (len(mine.text.split()),) and found.patches.shape == (4, 4) and found.method == method
        )
        assert np.abs(found.values).max() > 0 and found.signed == METHODS[method].signed
        if not found.signed:
            assert found.values.min() >= 0 and found.values.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", ["ig", "shapley"])
def test_sums_hold_with_the_experts_held(method):
    "|sum - (F(x) - F(blank))| <= 1 % + 0.001, on perturbed experts, several pairs, both sides, both baselines."
    encoder = tiny()
    mean = mean_patch(encoder, [pair(index)[1].image for index in range(4)])
    for index in range(3):
        query, item = pair(index)
        for side in ("item", "query"):
            for baseline in ("blank", "mean"):
                found = attribute_side(encoder, query, item, side, method, samples=4, baseline=baseline, mean=mean)
                rise = found.values.sum() - found.delta
                assert (
                    abs(found.delta) <= 0.01 * abs(rise) + 1e-3
                    and found.settings["baseline"] == baseline
                    and "add up" in found.note
                )


def test_free_routing_tells_its_gap():
    "The case that must fail: tokens change their experts on the way, and the map says by how much it misses."
    encoder, (query, item) = tiny(top_k=1), pair(4)
    free, held = (
        attribute_side(encoder, query, item, method="ig", routing=routing, most_steps=128)
        for routing in ("free", "fixed")
    )
    assert (
        abs(free.delta) > 20 * abs(held.delta)
        and "change their experts" in free.note
        and f"{abs(free.delta):.3f}" in free.note
    )


def test_occlusion_by_hand():
    "The score without one word is what the score function says when that word is blank."
    encoder, (query, item) = tiny(), pair(2)
    found, side = attribute_side(encoder, query, item, method="occlusion"), attribution_inputs(encoder, item, query)
    gone, first = side.inputs[1].clone(), side.features[1] == 16  # the first word comes after 16 patches
    gone[:, first] = side.baselines[1][:, first]
    with torch.no_grad():
        fall = side.score(*side.inputs) - side.score(side.inputs[0], gone)
    assert found.words[0] == pytest.approx(fall.item(), abs=1e-5)


def test_attention_of_a_layer_and_head():
    encoder, (query, item) = tiny(), pair()
    whole = attribute_side(encoder, query, item, method="attention").values
    heads = encoder.backbone.decoder.config.num_attention_heads
    parts = [
        attribute_side(encoder, query, item, method="attention", layer=layer, head=head).values
        for layer in range(2)
        for head in range(heads)
    ]
    np.testing.assert_allclose(np.mean(parts, 0), whole, atol=1e-6)
    assert whole[0] == 0, "the first cell, where attention is parked, is left out"
    with pytest.raises(UsageError, match="no layer 7"):
        attribute_side(encoder, query, item, method="attention", layer=7)


# ---------------------------------------------------------------------------------------------- other backbones


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_packed_backbone_through_its_connector_output(kind):
    "A random Qwen-VL: its cells and words are slots in a row of vectors, and the sums hold."
    from test_attention import qwen

    model, inputs = qwen(kind)
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        whole = model.model(**inputs, use_cache=False).last_hidden_state
    hook.remove()
    ids = inputs["input_ids"][0]
    slots = {"patches": (ids == 90).nonzero()[:, 0].tolist(), "words": (ids < 90).nonzero()[:, 0].tolist()[2:]}
    generator = torch.Generator().manual_seed(0)
    other = F.normalize(torch.randn(48, generator=generator), dim=0)
    score = DecoderScore(
        model.model.language_model,
        seen["inputs_embeds"],
        slots,
        other,
        slots["patches"] + slots["words"],
        position_ids=seen["position_ids"],
    )
    real = score.vectors()
    if (
        kind == "qwen2_5_vl"
    ):  # (Qwen3-VL also adds picture features in its first layers: the score is of the row as it stands)
        pooled = F.normalize(whole[0, score.pooled].mean(0), dim=0) @ other
        assert score(*real).item() == pytest.approx(pooled.item(), abs=1e-5)
    blank = tuple(part.mean(1, keepdim=True).expand_as(part) for part in real)
    features = [np.arange(len(slots["patches"])), len(slots["patches"]) + np.arange(len(slots["words"]))]
    for name in fitting_methods():
        side = AttributionInputs(score, real, blank, features, {"samples": 4})
        values = run_method(side, METHODS[name])
        assert values.shape == (side.count,) and np.isfinite(values).all() and np.abs(values).max() > 0
        assert side.delta is None or abs(side.delta) <= 0.01 * abs(side.rise) + 1e-3


def test_a_method_that_does_not_fit_is_named(monkeypatch):
    "A model that shows no attention has the other methods, and a pair is opened without attention."
    encoder, (query, item) = tiny(), pair()
    monkeypatch.setattr("moon2_lab.explain.attribution._shows_attention", lambda encoder: False)
    assert fitting_methods(encoder) == ["cross", "ig", "gradient", "occlusion", "shapley"]
    with pytest.raises(
        UsageError, match="'rollout': this model shows no attention to read .method. -> one of cross, ig, gradient"
    ):
        attribute_side(encoder, query, item, method="rollout")
    widget = heatmap(encoder, query, item, trials=0)
    assert widget.method == "cross" and "attention" not in widget.offered and widget.maps.item.pooled is None


def test_a_model_saved_without_its_vision_encoder():
    encoder, (query, item) = tiny(), pair()
    encoder.backbone.vision = None
    for ask in (lambda: attribute_side(encoder, query, item), lambda: Explainer(encoder, query, item)):
        with pytest.raises(DataError, match="no vision encoder.*explain texts only"):
            ask()
    found = attribute_side(encoder, Item("red box", None), Item("a nice red box", None))
    assert found.patches is None and len(found.words) == 4


# ---------------------------------------------------------------------------------------------- pairs


ODD = {
    "no picture": Item("red cotton dress", None),
    "no title": Item(None, ImageRef.from_pil(Image.new("RGB", (64, 64), "red"))),
    "one token": Item("red", None),
    "5:1": Item("a long scarf", ImageRef.from_pil(Image.new("RGB", (300, 60), "red"))),
    "emoji and Chinese": Item("红色 连衣裙 👗 dress", ImageRef.from_pil(Image.new("RGB", (64, 64), "red"))),
    "only blanks in the title": Item("   ", ImageRef.from_pil(Image.new("RGB", (64, 64), "blue"))),
    "markup": Item("<script>alert(1)</script> & dress", None),
}


@pytest.mark.parametrize("name", few(ODD, "no title", "emoji and Chinese", "markup"))
def test_odd_items_on_either_side(name):
    "All maps, a page and a still picture; one number for each word that is read."
    encoder, (query, item), odd = tiny(), pair(), ODD[name]
    for one, other in ((query, odd), (odd, item)):
        maps = Explainer(encoder, one, other, "a model", trials=3).maps(QUICK)
        mine = maps.item if other is odd else maps.query
        words = (odd.text or "").split()
        assert [word for word, *_ in mine.words] == words and (mine.grid == (4, 4)) == (odd.image is not None)
        for method in QUICK:
            assert mine.maps[method].words.shape == (len(words),) and np.isfinite(mine.maps[method].values).all()
        assert "<script>alert" not in heat_page(maps) and len(static_png(maps)) < 100_000
        expected = np.prod(encoder.encode([one, other]), axis=0).sum()
        assert maps.score == pytest.approx(expected, abs=1e-6)


def test_one_piece_cannot_be_compared_and_says_so():
    found = Explainer(tiny(), Item("red", None), Item("box", None), trials=5).maps(["gradient"])
    faith = found.item.faith["gradient"]
    assert (faith.verdict, faith.warning) == ("too_few", "") and "Too few parts to measure" in faith.remark


@pytest.mark.parametrize("item, says", [(Item(None, None, "p7"), "p7"), (Item("  ", None, "p8"), "p8")])
def test_nothing_to_explain(item, says):
    with pytest.raises(DataError, match=says):
        Explainer(tiny(), pair()[0], item)


def test_a_picture_that_cannot_be_read_names_the_product():
    gone = Item("red", ImageRef("gone", lambda: (_ for _ in ()).throw(LabError("cannot be read", where="p9"))), "p9")
    with pytest.raises(LabError, match="p9.*cannot be read|cannot be read.*p9"):
        Explainer(tiny(), pair()[0], gone)


def test_damaged_weights_give_no_picture():
    encoder, (query, item) = tiny(), pair()
    with torch.no_grad():
        encoder.backbone.decoder.norm.weight.fill_(float("nan"))
    with pytest.raises(LabError):
        Explainer(encoder, query, item).maps(["gradient"])


def test_progress_and_cancel():
    encoder, (query, item), told = tiny(), pair(), []
    explainer = Explainer(encoder, query, item, trials=4)
    explainer.compute("item", "shapley", lambda done, total: told.append((done, total)), lambda: False)
    assert told and all(0 <= done <= total for done, total in told) and told[-1][0] == told[-1][1]
    shares = [done / total for done, total in told]
    assert shares == sorted(shares) and len(set(shares)) > 4, "a bar that goes back says nothing"
    with pytest.raises(Cancelled):
        explainer.compute("query", "shapley", None, lambda: True)
    assert explainer.compute("query", "shapley")[0].words.shape == (2,), "after a cancel it can be asked again"


def test_a_map_is_faithful_where_the_score_is_known():
    "Over several pairs occlusion beats random maps far more often than chance, and a reversed map is worse than them."
    encoder, found = tiny(), []
    for index in range(8):
        query, item = pair(index)
        explainer = Explainer(encoder, query, item, trials=20)
        side, values = explainer._free_inputs("item"), explainer.map("item", "occlusion").values
        found.append([measure_faithfulness(side, signed, 20).better_than for signed in (values, -values)])
    mine, reversed_one = np.mean(found, 0)
    assert mine > 0.85 and reversed_one < 0.15


def test_explaining_leaves_the_encoder_alone():
    encoder, (query, item) = tiny(), pair()
    encoder.train()
    before, vectors = encoder.fingerprint, encoder.encode([query, item])
    Explainer(encoder, query, item, trials=3, redrawn=True).maps(QUICK)
    assert encoder.training and encoder.fingerprint == before and (encoder.encode([query, item]) == vectors).all()
    assert all(weight.grad is None for weight in encoder.parameters()) and not any(
        module._forward_hooks or module._forward_pre_hooks for module in encoder.modules()
    )


def test_two_models_follow_one_another():
    query, item = pair()
    both = compare_heatmaps({"before": tiny(), "after": tiny(num_experts=0)}, query, item, trials=0)
    one, other = both.widgets.values()
    one.method, one.head = "attention", 1
    assert (other.method, other.head) == ("attention", 1)
    one.expert = 2  # the dense model has no experts: it stays with its map
    assert (one.expert, other.expert) == (2, None)
    assert [child.maps.model for child in both.children] == ["before", "after"]


def test_the_cache_keeps_the_last_pairs():
    cache, (query, item) = ExplainerCache(tiny(), size=2, trials=0), pair()
    first = cache.get(query, item)
    assert cache.get(query, item) is first
    cache.get(Item("a", None), item), cache.get(Item("b", None), item)
    assert cache.get(query, item) is not first


def test_mini_is_open_within_two_seconds():
    "The pretrained backbone: words of several sub-tokens, and the first picture in time."
    with pytest.MonkeyPatch.context() as patch:
        encoder = perturb_experts(pretrained(patch, num_layers=4), 0.02).eval()
    query, item = pair(5)
    item = Item(f"Levi's 501® slim-fit {item.text} (pack of 3)", item.image, "p")
    Explainer(encoder, *pair(6), trials=0).maps()  # loads what it needs
    started = time.process_time()  # of this process, all threads: at least the wall time of a free machine
    widget = heatmap(encoder, query, item, measure=False)
    seconds, started = time.process_time() - started, time.process_time()
    Explainer(encoder, *pair(7), trials=0).maps()  # half of the work, also on a slow machine
    alone = time.process_time() - started
    assert seconds < max(2, 3 * alone), f"{seconds:.1f} s, a cross map alone {alone:.1f} s"
    assert [word for word, *_ in widget.maps.item.words] == item.text.split() and set(widget.maps.methods) == {
        "cross",
        "attention",
    }


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def model_and_catalogue(tmp_path_factory, drawn_catalogue, own_cache):
    "A saved model and a catalogue folder."
    folder = tmp_path_factory.mktemp("model")
    tiny().save_pretrained(folder)
    return folder, drawn_catalogue


def ids_of(folder):
    from moon2_lab.data.catalog import Catalog

    return [product.product_id for product in Catalog.load(folder)]


def test_the_command_writes_a_page(model_and_catalogue, tmp_path, capsys):
    model, folder = model_and_catalogue
    ids, page = ids_of(folder), tmp_path / "map.html"
    assert (
        main(
            [
                "heatmap",
                str(model),
                "--catalog",
                str(folder),
                "--query",
                f"id:{ids[3]}",
                "--item",
                ids[3],
                "--method",
                "ig,attention",
                "--out",
                str(page),
                "--json",
            ]
        )
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert {(fact["side"], fact["method"]) for fact in facts["maps"]} == {
        (side, method) for side in ("query", "item") for method in ("ig", "attention")
    }
    assert (
        facts["page"] == str(page)
        and page.stat().st_size < 2**20
        and all(fact["redrawn"] is not None for fact in facts["maps"])
    )
    assert (
        main(
            [
                "heatmap",
                str(model),
                "--catalog",
                str(folder),
                "--query",
                "red mug",
                "--item-text",
                "a mug",
                "--quick",
                "--out",
                str(page),
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    assert told.startswith("score ") and told.rstrip().endswith("map.html") and "random maps" not in told


@pytest.mark.parametrize(
    "words, says",
    [
        (["--query", "mug", "--item", "nobody"], "nobody"),
        (["--item", "FIRST"], "nothing to search for"),
        ([], "nothing to search for"),
        (["--query", "mug", "--item", "FIRST", "--method", "guess"], "one of cross, ig"),
        (["--query", "mug", "--item", "FIRST", "--query-image", "missing.jpg"], "cannot be opened"),
    ],
)
def test_the_command_says_what_is_wrong(model_and_catalogue, tmp_path, capsys, words, says):
    model, folder = model_and_catalogue
    first = ids_of(folder)[0]
    code = main(
        [
            "heatmap",
            str(model),
            "--catalog",
            str(folder),
            *[first if word == "FIRST" else word for word in words],
            "--out",
            str(tmp_path / "map.html"),
        ]
    )
    assert code == 2 and says in capsys.readouterr().err and not (tmp_path / "map.html").exists()


def test_without_an_item_the_best_hit_is_explained(model_and_catalogue, tmp_path, capsys):
    "One word of one token against the product that it finds first; the rows of the cross map add up."
    model, folder = model_and_catalogue
    words = ["heatmap", str(model), "--catalog", str(folder), "--query", "mug", "--quick", "--json"]
    assert main([*words, "--out", str(tmp_path / "map.html")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert "the best hit among" in facts["query_note"]
    assert [one["method"] for one in facts["maps"]] == ["cross", "cross"]
    cross = facts["cross"]
    assert cross["query"] == ["mug"] and cross["item"][:2] == [[0, 0], [0, 1]]
    assert abs(sum(map(sum, cross["matrix"])) - cross["score"]) < 1e-5 and abs(cross["sum"] - cross["score"]) < 1e-6


def test_shop_items_can_be_explained():
    "A product of a catalogue, whatever it lacks."
    encoder, catalog = tiny(), shop(12, mixed=True)
    for product in catalog:
        maps = Explainer(encoder, Item("red box", None), product.item(), trials=0).maps(["gradient"])
        assert bool(maps.item.words) == product.has_text and bool(maps.item.patches) == product.has_image


@pytest.mark.slow
def test_a_script_that_ends_while_maps_are_computed_ends_well(tmp_path):
    "The process tells the thread to stop and waits for it; a thread inside native code would abort it (exit 134)."
    script = tmp_path / "show.py"
    script.write_text(
        textwrap.dedent("""
        from moon2_lab.data.products import Item
        from moon2_lab.model.encoder import Moon2Encoder
        from moon2_lab.widgets.heatmap import heatmap

        encoder, query = Moon2Encoder.from_backbone("tiny", seed=0), Item("a red mug", None)
        widget = heatmap(encoder, query, Item("a very red mug with a handle", None), trials=2000)
        print("still at work:", widget.computing)
    """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "still at work: True"), done.stderr[-500:]
