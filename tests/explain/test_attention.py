"""Attention rows against eager attention, on our encoder and on Qwen-VL; what must be refused; probes for Captum;
routing of tokens.
"""

import copy
import os
import tempfile
import threading

import numpy as np
import pytest
import torch
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.explain.attention import (
    _probe_attention, _remove_probes, attention_gradient, attention_of, rollout, without_first, word_attention,
)
from moon2_lab.explain.attention_recorder import attention_layers, record_attention
from moon2_lab.explain.expert_routing import expert_load, token_routing
from moon2_lab.explain.heatmap_data import SideMaps
from moon2_lab.explain.pair_score import score_function
from moon2_lab.explain.side_tokens import side_tokens
from moon2_lab.model.packing import Packing
from PIL import Image
from small import picture, pretrained, product, tiny
from torch import nn
from torch.nn import functional as F

os.environ["MOON2_CACHE"] = tempfile.mkdtemp(prefix="moon2-attention-")
torch.set_num_threads(1)
EPS = {torch.float32: 1e-5, torch.float64: 1e-9}
TITLE = "Finest quality slim-fit kurta, hand block printed"


@pytest.fixture
def exact_softmax(monkeypatch):
    """Eager attention of transformers rounds its softmax to float32 even in a float64 model: take that away, and
    nothing else.
    """
    plain = F.softmax
    monkeypatch.setattr(
        F,
        "softmax",
        lambda x, dim=None, dtype=None, **rest: plain(
            x, dim=dim, dtype=torch.promote_types(x.dtype, dtype or x.dtype), **rest
        ),
    )


def encoder_of(name, monkeypatch, dtype=torch.float32, **fields):
    fields = {"num_layers": 2} | fields
    encoder = pretrained(monkeypatch, **fields) if name == "mini" else tiny(perturbed=True, **fields)
    return encoder.to(dtype).eval()


@torch.no_grad()
def eager_rows(encoder, item, view="mm"):
    "(layers, heads, T, T): the decoder itself, in eager attention, over the one row of the view."
    rows = encoder.rows_of([item], (view,))
    assert len(rows) == 1
    tokens, decoder = encoder.embed_rows([item], rows), encoder.backbone.decoder
    mask = None if encoder.config.attention == "causal" else tokens.new_zeros(1, 1, len(tokens), len(tokens))
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        out = decoder(inputs_embeds=tokens[None], attention_mask=mask, use_cache=False, output_attentions=True)
    finally:
        decoder.set_attn_implementation(before)
    return torch.cat(out.attentions).numpy()


def item_of(number=1, **changes):
    return Item(**({"text": TITLE, "image": picture(number), "item_id": f"p{number}"} | changes))


def pooled_rows(side, rows):
    "(layers, heads, C + L): the rows in the mean that the embedding is: half of it the picture's, half the title's."
    halves = [part.mean(2) for part in np.split(rows, [side.patches], axis=2) if part.shape[2]]
    return sum(halves) / len(halves)


def same(found, wanted, dtype):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=EPS[dtype])


# ---------------------------------------------------------------------------------------------- our encoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["tiny", "mini"])
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.filterwarnings("ignore:attention=bidirectional")
def test_rows_and_their_mean_equal_eager_attention(name, attention, dtype, monkeypatch, exact_softmax):
    "Grouped queries (tiny 4 heads on 2, mini 9 on 3), rotary positions, experts, packed attention."
    encoder = encoder_of(name, monkeypatch, dtype, attention=attention, visual_tokens=16)
    config = encoder.backbone.decoder.config
    assert config.num_attention_heads > config.num_key_value_heads > 1
    for view in ("mm", "t", "i"):
        wanted = eager_rows(encoder, side_tokens(encoder, item_of(), view).item, view)
        assert wanted.dtype == (np.float32 if dtype == torch.float32 else np.float64)
        found = attention_of(encoder, item_of(), view, rows="each")
        assert found.weights.shape == wanted.shape and found.layers == [0, 1]
        same(found.weights, wanted, dtype)
        same(attention_of(encoder, item_of(), view, chunk=5).weights[:, :, 0], pooled_rows(found.side, wanted), dtype)
    assert (np.triu(wanted[0, 0], 1) == 0).all() == (attention == "causal")


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.filterwarnings("ignore:attention=bidirectional")
def test_packed_rows_of_different_lengths(attention, monkeypatch, exact_softmax):
    "Several items in one pass: each gets its own rows, whatever the order in which they are packed."
    encoder = encoder_of("tiny", monkeypatch, torch.float64, attention=attention)
    items = [Item("red", None), item_of(1), Item(None, picture(2)), item_of(3, text="a b c"), Item(TITLE * 3, None)]
    for one, found in zip(items, attention_of(encoder, items, rows="each"), strict=True):
        same(found.weights, eager_rows(encoder, one), torch.float64)
    for one, found in zip(items, attention_of(encoder, items), strict=True):
        same(found.weights[:, :, 0], pooled_rows(found.side, eager_rows(encoder, one)), torch.float64)


def test_layers_heads_and_chunks(monkeypatch):
    "A choice is a slice of the whole, in the order asked; the size of the chunks changes nothing."
    encoder = encoder_of("tiny", monkeypatch)
    whole = attention_of(encoder, item_of(), rows="each").weights
    side = side_tokens(encoder, item_of())
    some = attention_of(encoder, item_of(), layers=[1], heads=[3, 1], rows="each")
    assert (some.layers, some.heads) == ([1], [3, 1])
    np.testing.assert_allclose(some.weights, whole[1:][:, [3, 1]], atol=1e-7)
    for chunk in (1, 2, 7, 1000):
        np.testing.assert_allclose(
            attention_of(encoder, item_of(), chunk=chunk).weights[:, :, 0], pooled_rows(side, whole), atol=1e-6
        )
        np.testing.assert_allclose(attention_of(encoder, item_of(), rows="each", chunk=chunk).weights, whole, atol=1e-6)


def test_an_encoder_with_lora_and_a_dense_one(monkeypatch):
    for fields in ({}, {"num_experts": 0}):
        encoder = encoder_of("tiny", monkeypatch, **fields)
        plain = attention_of(encoder, item_of(), rows="each").weights
        encoder.add_lora(rank=2, alpha=8)
        np.testing.assert_allclose(
            attention_of(encoder, item_of(), rows="each").weights, plain, atol=1e-6
        )  # B of LoRA is zero
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in encoder.named_parameters():
                if "lora" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        tuned = attention_of(encoder, item_of(), rows="each").weights
        assert np.abs(tuned - plain).max() > 0.01
        np.testing.assert_allclose(tuned, eager_rows(encoder, item_of()), atol=1e-5)
        np.testing.assert_allclose(tuned, attention_of(encoder.merged(), item_of(), rows="each").weights, atol=1e-4)


def test_an_encoder_is_left_as_it_was(monkeypatch):
    "Training mode, configs, embeddings; also when the pass breaks off."
    encoder = encoder_of("tiny", monkeypatch).train()
    before, modules = encoder.encode([item_of()]), attention_layers(encoder.backbone.decoder)
    configs = {number: module.config for number, module in modules.items()}
    attention_of(encoder, item_of())
    with pytest.raises(UsageError, match="no head 9"):
        attention_of(encoder, item_of(), heads=[9])
    block = encoder.moe_blocks[1]
    handle = block.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken on the way")))
    with pytest.raises(RuntimeError, match="broken on the way"):
        attention_of(encoder, item_of())
    handle.remove()
    assert encoder.training and all(module.config is configs[number] for number, module in modules.items())
    assert encoder.backbone.decoder.config._attn_implementation == "moon2_packed"
    assert np.array_equal(encoder.encode([item_of()]), before)


def test_other_threads_are_neither_disturbed_nor_recorded(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    decoder, tokens, answers = (
        encoder.backbone.decoder,
        torch.randn(7, 64, generator=torch.Generator().manual_seed(0)),
        [],
    )
    plain = encoder.backbone.decode(tokens, Packing([3, 4])).detach()

    def elsewhere():
        with torch.no_grad():
            answers.append(encoder.backbone.decode(tokens, Packing([3, 4])))

    def run():
        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join()
        encoder.backbone.decode(tokens, Packing([7]))

    found = record_attention(decoder, run, {0: None}, reduce=None)[0]
    assert found.shape == (2, 4, 7, 7) and torch.equal(answers[0], plain)


def test_two_recordings_take_turns(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    wanted, found = attention_of(encoder, item_of()).weights, {}
    workers = [
        threading.Thread(target=lambda number=number: found.update({number: attention_of(encoder, item_of()).weights}))
        for number in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and all(np.allclose(weights, wanted, atol=1e-6) for weights in found.values())
    assert encoder.backbone.decoder.layers[0].self_attn.config._attn_implementation == "moon2_packed"


@pytest.mark.parametrize(
    "item, view, says",
    [
        (Item(None, None, "p1"), "mm", "p1"),
        (Item("  \n", None, "p2"), "t", "no readable text"),
        (Item("red", None, "p3"), "i", "no picture"),
        (Item("red", None), "title", "t, i, mm"),
    ],
)
def test_items_without_the_view_are_refused(item, view, says, monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    for ask in (attention_of, word_attention, rollout, token_routing):
        with pytest.raises((DataError, UsageError), match=says):
            ask(encoder, item, view)


# ---------------------------------------------------------------------------------------- any decoder of transformers


def llama(**fields):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(
            **(
                {
                    "vocab_size": 50,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "attn_implementation": "sdpa",
                }
                | fields
            )
        )
    ).eval()


@torch.no_grad()
def eager_of(model, **inputs):
    "(layers, batch, heads, T, T) of the same model in eager attention."
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return torch.stack(twin(**inputs, use_cache=False, output_attentions=True).attentions)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_padded_batches(side, own, exact_softmax):
    model = llama().double()
    model.set_attn_implementation(own)
    ids, mask = (
        torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 9, dtype=torch.int64),
    )
    real = range(6) if side == "right" else range(3, 9)
    mask[0, [place for place in range(9) if place not in real]] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    wanted = eager_of(model, **inputs)
    run = lambda: model(**inputs, use_cache=False)
    found = record_attention(model, run, {0: real, 1: [8]}, reduce=None)
    same(found[0], wanted[:, 0, :, list(real)], torch.float64)
    same(found[1], wanted[:, 1, :, [8]], torch.float64)
    assert (found[0][..., [place for place in range(9) if place not in real]] == 0).all()
    same(
        record_attention(model, run, {0: real}, chunk=2)[0][:, :, 0], wanted[:, 0, :, list(real)].mean(2), torch.float64
    )
    if side == "left":
        with pytest.raises(UsageError, match="position 0 of sequence 0 is padding"):
            record_attention(model, run, {0: None})


def test_sliding_windows_are_read_from_their_mask(exact_softmax):
    from transformers import MistralConfig, MistralModel

    torch.manual_seed(0)
    model = (
        MistralModel(
            MistralConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=4,
                attn_implementation="sdpa",
            )
        )
        .double()
        .eval()
    )
    for length in (3, 11):
        ids = torch.arange(length)[None]
        wanted = eager_of(model, input_ids=ids)
        found = record_attention(model, lambda ids=ids: model(input_ids=ids, use_cache=False), {0: None}, reduce=None)[
            0
        ]
        same(found, wanted[:, 0], torch.float64)
    assert (found[..., 10, :7] == 0).all()


def qwen(kind):
    "A random Qwen-VL of two layers, and the inputs for one picture and some words."
    if kind == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig as Config
        from transformers import Qwen2_5_VLForConditionalGeneration as Model

        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        }
        patch = 14
    else:
        from transformers import Qwen3VLConfig as Config
        from transformers import Qwen3VLForConditionalGeneration as Model

        vision = {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 48,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        }
        patch = 16
    text = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    torch.manual_seed(0)
    model = Model(Config(text_config=text, vision_config=vision, **tokens)).eval()
    model.set_attn_implementation("sdpa")
    return model, qwen_inputs(patch)


def qwen_inputs(patch):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    image = Image.new("RGB", (8 * patch, 6 * patch), "white")
    image.paste((200, 60, 40), (20, 20, 80, 60))
    found = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, min_pixels=patch * patch, max_pixels=10**6)(
        images=[image], return_tensors="pt"
    )
    pads = int(found["image_grid_thw"][0].prod()) // 4
    assert pads > 4
    ids = torch.tensor([[1, 2, 92] + [90] * pads + [93, 5, 6, 7, 8, 9, 10, 11]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 90).int(),
        "pixel_values": found["pixel_values"],
        "image_grid_thw": found["image_grid_thw"],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_qwen_with_a_picture(kind, dtype, exact_softmax):
    "Whole model with its vision tower; positions in three dimensions; three query heads to a key head."
    model, inputs = qwen(kind)
    model, inputs["pixel_values"] = model.to(dtype), inputs["pixel_values"].to(dtype)
    wanted, length = eager_of(model, **inputs)[:, 0], inputs["input_ids"].shape[1]
    assert wanted.shape == (2, 6, length, length)
    run = lambda: model(**inputs, use_cache=False)
    before = run().logits
    same(record_attention(model, run, {0: None}, reduce=None)[0], wanted, dtype)
    same(
        record_attention(model, run, {0: [length - 1, 3]}, layers=[1], heads=[5], reduce=None)[0],
        wanted[1:, 5:, [length - 1, 3]],
        dtype,
    )
    same(record_attention(model, run, {0: None}, chunk=4)[0][:, :, 0], wanted.mean(2), dtype)
    assert torch.equal(run().logits, before) and model.config._attn_implementation == "sdpa"


def test_qwen_rows_depend_on_the_picture():
    "The comparison above is not one of two blind models."
    model, inputs = qwen("qwen2_5_vl")
    seen = record_attention(model, lambda: model(**inputs, use_cache=False), {0: None})[0]
    other = record_attention(
        model, lambda: model(**(inputs | {"pixel_values": -inputs["pixel_values"]}), use_cache=False), {0: None}
    )[0]
    assert (seen - other).abs().max() > 1e-4


class OwnAttention(nn.Module):
    "An attention that never asks transformers' table of functions, though it looks as if it did."

    def __init__(self, config):
        super().__init__()
        self.config, self.layer_idx = config, 0

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_models_that_cannot_be_recorded_are_refused():
    with pytest.raises(UsageError, match="cannot be picked up"):
        record_attention(nn.Transformer(8, 2, 1, 1), lambda: None, {0: None})
    own = OwnAttention(llama().config)
    with pytest.raises(UsageError, match="not called through"):
        record_attention(own, lambda: own(torch.zeros(1, 1, 3, 4)), {0: None})
    assert own.config._attn_implementation == "sdpa"
    flash = llama()
    flash.config._attn_implementation = "flex_attention"
    with pytest.raises(UsageError, match="flex_attention.*sdpa"):
        record_attention(flash, lambda: None, {0: None})
    training = llama(attention_dropout=0.5).train()
    with pytest.raises(UsageError, match="dropout"):
        record_attention(training, lambda: training(input_ids=torch.arange(5)[None]), {0: None})
    cached = llama()
    past = cached(input_ids=torch.arange(4)[None], use_cache=True).past_key_values
    with pytest.raises(UsageError, match="without a cache"):
        record_attention(cached, lambda: cached(input_ids=torch.arange(2)[None], past_key_values=past), {0: None})


def test_bloom_has_an_attention_of_its_own():
    from transformers import BloomConfig, BloomModel

    model = BloomModel(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(UsageError, match="cannot be picked up|not called through|not known here"):
        record_attention(model, lambda: model(input_ids=torch.arange(5)[None]), {0: None})


@pytest.mark.parametrize("cap", [0.3, 50.0])
def test_soft_caps_are_recomputed_where_the_attention_heeds_them(cap):
    from transformers import Gemma2Config, Gemma2Model

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8, "sliding_window": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_logit_softcapping": cap}
    torch.manual_seed(0)
    more = {"initializer_range": 0.5, "attn_implementation": "eager"}
    model = Gemma2Model(Gemma2Config(vocab_size=50, **sizes, **heads, **more)).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        eager = torch.cat(model(input_ids=ids, use_cache=False, output_attentions=True).attentions)
    found = record_attention(model, lambda: model(input_ids=ids, use_cache=False), {0: None}, reduce=None)[0]
    torch.testing.assert_close(found, eager, atol=1e-6, rtol=0)


def test_attention_that_is_not_what_it_says_gives_no_picture():
    "The recorder proves itself: here the layer's queries are doubled behind its back."
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model = llama()
    AttentionInterface.register(
        "sdpa", lambda module, query, *rest, **more: sdpa_attention_forward(module, 20 * query, *rest, **more)
    )
    try:
        with pytest.raises(LabError, match="does not give what layer 0 computed"):
            record_attention(model, lambda: model(input_ids=torch.arange(9)[None], use_cache=False), {0: None})
    finally:
        AttentionInterface._global_mapping["sdpa"] = sdpa_attention_forward
    assert model.layers[0].self_attn.config is model.config
    assert record_attention(model, lambda: model(input_ids=torch.arange(9)[None], use_cache=False), {0: None})[
        0
    ].shape == (3, 4, 1, 9)


@pytest.mark.parametrize(
    "ask, says",
    [
        ({"layers": [3]}, "no layer 3"),
        ({"layers": []}, "no layer was chosen"),
        ({"heads": [-1]}, "no head -1"),
        ({"chunk": 0}, "at least 1"),
        ({"reduce": "sum"}, "'mean' or None"),
    ],
)
def test_wrong_choices(ask, says):
    model = llama()
    with pytest.raises(UsageError, match=says):
        record_attention(model, lambda: model(input_ids=torch.arange(5)[None], use_cache=False), {0: None}, **ask)
    for rows, what in (
        ({1: None}, "no sequence 1"),
        ({0: [5]}, "no position 5"),
        ({0: []}, "no position was chosen"),
        ({0: [-1]}, "no position -1"),
    ):
        with pytest.raises(UsageError, match=what):
            record_attention(model, lambda: model(input_ids=torch.arange(5)[None], use_cache=False), rows)


# ---------------------------------------------------------------------------------------------- words, cells, rollout


@pytest.mark.parametrize("name", ["tiny", "mini"])
@pytest.mark.parametrize(
    "text, wide",
    [
        (TITLE, False),
        ("kurta", False),
        ("红色 连衣裙 👗 dress", False),
        (None, False),
        (TITLE, None),
        ("a five to one picture", True),
    ],
)
def test_word_attention_fits_the_side_maps(name, text, wide, monkeypatch):
    encoder = encoder_of(name, monkeypatch, visual_tokens=16)
    image = None if wide is None else ImageRef.from_pil(Image.new("RGB", (300, 60), "red")) if wide else picture(4)
    item = Item(text, image, "p")
    side, found, rows = (
        side_tokens(encoder, item),
        word_attention(encoder, item),
        attention_of(encoder, item, rows="each").weights,
    )
    grid = (4, 4) if image is not None else (0, 0)
    maps = SideMaps(
        "item",
        text or "",
        side.words,
        None,
        grid,
        links=found.links,
        pooled=found.pooled,
        experts=token_routing(encoder, item).experts,
        layer_names=found.layer_names,
    )
    assert "".join(word for word, *_ in side.words) == "".join((text or "").split()) and maps.unread == side.unread == 0
    if text and text.isascii():
        assert [word for word, *_ in side.words] == text.split()
    np.testing.assert_allclose(found.pooled.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(found.pooled, side.merge(pooled_rows(side, rows)), atol=1e-6)
    assert (found.links is None) == (text is None or image is None)
    table = side.word_table()
    if found.links is not None:
        by_hand = np.stack([rows[:, :, 16:][:, :, owned.astype(bool), :16].mean(2) for owned in table], 2)
        np.testing.assert_allclose(found.links, by_hand, atol=1e-6)
    np.testing.assert_allclose(maps.experts.sum(-1), 1, atol=1e-5)
    assert table.sum() == len(side.spans) and (table.sum(0) == 1).all()


def test_pieces_of_words_are_merged(monkeypatch):
    "mini's tokenizer cuts words: more tokens than words, and the words keep their places."
    encoder = encoder_of("mini", monkeypatch)
    side = side_tokens(encoder, Item("Levi's  anthracite kurta", None))
    assert len(side.spans) > len(side.words) == 3 and [(start, end) for _, start, end in side.words] == [
        (0, 6),
        (8, 18),
        (19, 24),
    ]
    values = np.random.default_rng(0).normal(size=(2, len(side)))
    np.testing.assert_allclose(side.merge(values).sum(-1), values.sum(-1))


def test_a_long_title_says_how_much_was_not_read(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    side = side_tokens(encoder, Item("cotton " * 100, None))
    assert (len(side), len(side.words), side.unread) == (64, 64, 36)


def test_without_the_first_position(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    rows, left = attention_of(encoder, item_of()), attention_of(encoder, item_of()).without_first()
    assert (rows.weights[..., 0] > 0).all() and (left.weights[..., 0] == 0).all()
    np.testing.assert_allclose(left.weights[..., 1:], rows.weights[..., 1:] / (1 - rows.weights[..., :1]), atol=1e-6)
    np.testing.assert_allclose(
        word_attention(encoder, item_of(), drop_first=True).pooled, left.side.merge(left.weights[:, :, 0]), atol=1e-6
    )
    assert np.array_equal(without_first(np.array([[1.0, 0, 0]])), np.zeros((1, 3)))  # a first token sees itself only


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.filterwarnings("ignore:attention=bidirectional")
def test_rollout_equals_the_product_of_matrices(attention, monkeypatch):
    encoder = encoder_of("tiny", monkeypatch, attention=attention, num_layers=4)
    side, shares = rollout(encoder, item_of(), chunk=3)
    product_of_layers = np.eye(len(side))
    for layer in eager_rows(encoder, item_of()).astype(np.float64):
        product_of_layers = (0.5 * layer.mean(0) + 0.5 * np.eye(len(side))) @ product_of_layers
    np.testing.assert_allclose(shares, pooled_rows(side, product_of_layers[None, None])[0, 0], atol=1e-6)
    assert abs(shares.sum() - 1) < 1e-6
    assert rollout(encoder, Item("kurta", None))[1].tolist() == [pytest.approx(1)]


# ---------------------------------------------------------------------------------------------- Captum


def scored(monkeypatch, name="tiny", **fields):
    encoder = encoder_of(name, monkeypatch, **fields)
    return score_function(encoder, item_of(), Item("a red box", picture(5)))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.filterwarnings("ignore:attention=bidirectional")
@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_probes_change_nothing_and_show_the_weights(name, attention, monkeypatch):
    score, real, blank = scored(monkeypatch, name, attention=attention)
    pairs = tuple(torch.cat(pair) for pair in zip(real, blank, strict=True))
    plain, wanted = score(*pairs).detach(), eager_rows(score.encoder, item_of())
    probes, seen = _probe_attention(score.encoder.backbone.decoder), []
    for probe in probes:
        probe.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    torch.testing.assert_close(score(*pairs).detach(), plain, rtol=0, atol=1e-5)
    assert len(probes) == 2 and seen[0].shape == (2, *wanted.shape[1:])
    np.testing.assert_allclose(torch.stack(seen)[:, 0].numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(
        attention_of(score.encoder, item_of(), rows="each").weights, wanted, atol=1e-5
    )  # the recorder reads a probed model, too
    assert _probe_attention(score.encoder.backbone.decoder) == probes
    _remove_probes(score.encoder.backbone.decoder)
    torch.testing.assert_close(score(*pairs).detach(), plain, rtol=0, atol=0)


def test_probes_in_a_padded_batch_of_another_model():
    model = llama()
    ids, mask = torch.arange(18).view(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 6:] = 0
    plain = model(input_ids=ids, attention_mask=mask).last_hidden_state.detach()
    wanted, seen = eager_of(model, input_ids=ids, attention_mask=mask), []
    for probe in _probe_attention(model):
        probe.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()].detach(),
        plain[mask.bool()],
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(torch.stack(seen)[:, 0, :, :6], wanted[:, 0, :, :6], rtol=0, atol=1e-5)


def test_captum_takes_the_probes_as_layers(monkeypatch):
    from captum.attr import LayerActivation, LayerGradientXActivation

    score, real, _ = scored(monkeypatch)
    probes, kept = _probe_attention(score.encoder.backbone.decoder), []
    found = LayerGradientXActivation(score, probes).attribute(real)
    activation = LayerActivation(score, probes[0]).attribute(real)
    length = sum(part.shape[1] for part in real)
    handles = [probe.register_forward_hook(lambda module, inputs, output: kept.append(output)) for probe in probes]
    gradients = torch.autograd.grad(score(*(part.clone().requires_grad_() for part in real)).sum(), kept)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(activation.detach(), kept[0].detach())
    for one, weights, gradient in zip(found, kept, gradients, strict=True):
        assert one.shape == (1, 4, length, length)
        torch.testing.assert_close(one.detach(), (weights * gradient).detach(), rtol=1e-4, atol=1e-8)
    by_hand = sum(
        (weights * gradient)[0].mean((0, 1)) for weights, gradient in zip(kept, gradients, strict=True)
    ).detach()
    parts = attention_gradient(score, real)
    assert [len(part) for part in parts] == [part.shape[1] for part in real]
    np.testing.assert_allclose(np.concatenate(parts), by_hand.numpy(), atol=1e-8)
    assert np.abs(by_hand.numpy()).max() > 1e-5


def test_attention_gradient_takes_its_probes_out_again(monkeypatch):
    score, real, _ = scored(monkeypatch)
    before = score(*real).detach()
    words = attention_gradient(score, real)[-1]
    assert not hasattr(score.encoder.backbone.decoder.layers[0].self_attn, "attention_probe") and torch.equal(
        score(*real).detach(), before
    )
    text = score_function(encoder_of("tiny", monkeypatch), Item("kurta", None), item_of())
    assert [part.shape for part in attention_gradient(text[0], text[1])] == [(1,)] and np.isfinite(words).all()


def test_probes_want_rows_of_one_length(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    _probe_attention(encoder.backbone.decoder)
    with pytest.raises(UsageError, match="different lengths"):
        encoder.encode([item_of(), Item("red", None)])
    with pytest.raises(UsageError, match="cannot be picked up"):
        _probe_attention(nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------- routing


def test_token_routing_is_the_encoders_own(monkeypatch):
    for fields in ({}, {"top_k": 1}):
        encoder = encoder_of("tiny", monkeypatch, **fields)
        with torch.no_grad():
            own = encoder.forward_items([item_of()]).routing
        for view in ("t", "i", "mm"):
            found = token_routing(encoder, item_of(), view)
            np.testing.assert_allclose(found.weights.mean((0, 1)), own[view][0].numpy(), atol=1e-6)
            np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-6)
            assert (
                found.selected.shape[-1] == encoder.config.top_k
                and (np.take_along_axis(found.weights, found.selected, -1) > 0).all()
            )
    assert all(block.tape is None for block in encoder.moe_blocks)


def test_load_counts_every_choice_once(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    items = [product(number).item() for number in range(7)] + [
        Item("red", None),
        Item(None, picture(9)),
        Item(None, None),
    ]
    load = expert_load(encoder, items, batch_size=4)
    for view, shares in load.items():
        having = [
            item
            for item in items
            if (item.text if view == "t" else item.image if view == "i" else item.text or item.image)
        ]
        chosen = np.concatenate([token_routing(encoder, item, view).selected for item in having], 1)
        wanted = np.stack([np.bincount(layer.ravel(), minlength=4) for layer in chosen])
        np.testing.assert_allclose(shares, wanted / wanted.sum(1, keepdims=True), atol=1e-12)
    assert list(expert_load(encoder, [Item("red", None)])) == ["t", "mm"]


def test_routing_of_a_dense_encoder_is_refused(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch, num_experts=0)
    for ask in (lambda: token_routing(encoder, item_of()), lambda: expert_load(encoder, [item_of()])):
        with pytest.raises(UsageError, match="no experts"):
            ask()
    with pytest.raises(DataError, match="none of 1 items"):
        expert_load(encoder_of("tiny", monkeypatch), [Item(" ", None)])
    with pytest.raises(UsageError, match="unknown view"):
        expert_load(encoder_of("tiny", monkeypatch), [item_of()], views=("title",))


def test_routing_with_lora(monkeypatch):
    encoder = encoder_of("tiny", monkeypatch)
    plain = token_routing(encoder, item_of())
    encoder.add_lora(rank=2, alpha=8)
    np.testing.assert_allclose(token_routing(encoder, item_of()).weights, plain.weights, atol=1e-6)
