"""Every kind of multimodal model on disk: features kept, models saved and read again, weights in bfloat16, titles that
hold special tokens; and whatever cannot be a backbone says why.
"""
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from choosing import few
from families import FEW_FAMILIES, ITEMS, MOST_DIFFERENT, PIXELS, REFS, encoder_of, folder_of, keep_exact, stock
from moon2_lab.config import EncoderConfig, VIEWS
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError, LabError
from moon2_lab.files import read_json, write_json
from moon2_lab.model.certify import build_backbone
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.model.families import FAMILIES, REFUSED, family_of
from moon2_lab.model.hf_backbone import hf_backbone, image_token_id, pil_processor
from moon2_lab.tiny_models import TINY_FAMILIES, TINY_REFUSED, spoil_model, tiny_model
from PIL import Image
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("own_cache")
BOTH = [Item("small red ball", REFS[0]), Item("green ring no 7", None), Item(None, REFS[1])]


def load(name, folder=None, **fields):
    "A backbone on the small model of a kind."
    fields = {"backbone": str(folder or folder_of(name)), "image_size": PIXELS[name]} | fields
    return build_backbone(EncoderConfig(**fields))


def copied(name, tmp_path):
    return shutil.copytree(folder_of(name), tmp_path / name)


# ---------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_features_kept_are_fresh_ones_and_do_not_know_their_batch(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path))
    backbone = load(name)
    together, sizes = backbone.vision([ref.load() for ref in REFS])
    counts = [size.tokens for size in sizes]
    assert counts == [backbone.vision.picture_size.tokens] * len(REFS)
    assert together.shape == (sum(counts), backbone.vision.channels)
    for ref, part in zip(REFS, together.split(counts)):
        assert torch.allclose(backbone.vision([ref.load()])[0], part, atol=1e-5)
    assert backbone.cache_features(REFS) == len(REFS) and backbone.cache_features(REFS) == 0
    kept = torch.from_numpy(backbone.vision_features(REFS[::-1])).float()
    fresh = torch.cat(list(together.split(counts))[::-1])
    assert torch.allclose(kept, fresh, rtol=1e-3, atol=1e-3) and float(together.std()) > 0.01
    assert load(name).missing_features(REFS) == []  # another process, or day: the same name


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_rounding_kept_features_moves_an_embedding_little(name):
    "1 - cosine of a vector from the cache and from features not rounded to 16 bits."
    exact, rounded = encoder_of(name, perturbed=True), encoder_of(name, perturbed=True)
    del rounded.backbone.vision_features
    for view in VIEWS:
        one, other = (np.nan_to_num(encoder.encode_views(BOTH)[view]) for encoder in (exact, rounded))
        assert (1 - (one * other).sum(1))[np.linalg.norm(one, axis=1) > 0].max() < 1e-4


def test_the_name_of_the_cache_follows_weights_settings_and_size(tmp_path):
    name = "qwen3_vl"
    first = load(name).vision.identity
    assert load(name).vision.identity == first and first.startswith("qwen3_vl-")
    others = {first, load(name, image_size=96).vision.identity}
    settings = copied(name, tmp_path / "settings") / "preprocessor_config.json"
    write_json(settings, read_json(settings) | {"image_mean": [0.4, 0.4, 0.4]})
    others.add(load(name, settings.parent).vision.identity)
    others.add(load(name, tiny_model(name, tmp_path / "weights", seed=5)).vision.identity)
    assert len(others) == 4
    only_decoder = load(name)
    with torch.no_grad():
        only_decoder.decoder.norm.weight.add_(1)
    assert only_decoder.vision.identity == first  # what is trained does not ask for new features


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_features_that_are_no_16_bit_numbers_are_refused(value, tmp_path, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path))
    backbone = load("llava")
    with torch.no_grad():
        backbone.vision.base.multi_modal_projector.linear_2.bias[3] = value
    with pytest.raises(DataError, match="no finite 16-bit numbers"):
        backbone.cache_features(REFS[:2])
    assert backbone.missing_features(REFS[:2]) == [0, 1]


# ---------------------------------------------------------------------------------------------- saved and read again


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_saved_and_read_again_after_the_original_is_gone(name, tmp_path):
    "The same bits, no tensor twice, nothing asked of the folder that it was made from."
    folder = copied(name, tmp_path / "original")
    encoder = encoder_of(name, perturbed=True, folder=folder)
    saved = tmp_path / "saved"
    encoder.save_pretrained(saved)
    shutil.rmtree(folder)
    again = Moon2Encoder.from_pretrained(saved, device="cpu")
    assert again.fingerprint == encoder.fingerprint and again.config.identity() == encoder.config.identity()
    assert again.backbone.vision.identity == encoder.backbone.vision.identity
    keep_exact(again.backbone)
    for view, vectors in encoder.encode_views(ITEMS).items():
        assert np.array_equal(again.encode_views(ITEMS)[view], vectors, equal_nan=True), view
    state = encoder.state_dict()
    held = [tensor.data_ptr() for tensor in state.values() if tensor.numel()]
    assert len(set(held)) == len(held)
    with safe_open(saved / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(state)


@pytest.mark.parametrize("name", few(MOST_DIFFERENT, "qwen3_vl"))
def test_a_saved_model_of_fewer_layers(name, tmp_path):
    encoder = encoder_of(name, num_layers=3)
    assert len(encoder.backbone.decoder.layers) == encoder.config.num_layers == 3
    encoder.save_pretrained(tmp_path)
    again = Moon2Encoder.from_pretrained(tmp_path, device="cpu")
    keep_exact(again.backbone)
    for view, vectors in encoder.encode_views(BOTH).items():
        assert np.array_equal(again.encode_views(BOTH)[view], vectors, equal_nan=True)


@pytest.mark.parametrize("experts", ["lowrank", "full"])
def test_a_saved_model_whose_weights_are_of_another_architecture(experts, tmp_path):
    "Files of two models in one folder: one sentence that names the file."
    for name in ("llava", "gemma3"):
        encoder_of(name, experts=experts).save_pretrained(tmp_path / name)
    shutil.copy(tmp_path / "gemma3/model.safetensors", tmp_path / "llava/model.safetensors")
    (tmp_path / "llava/checksums.sha256").unlink(missing_ok=True)
    with pytest.raises(DataError, match="model.safetensors"):
        Moon2Encoder.from_pretrained(tmp_path / "llava", device="cpu")


# ---------------------------------------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("name", few(TINY_FAMILIES, "qwen3_vl", "qwen3_5_moe"))
def test_gradient_checkpointing_gives_equal_gradients(name):
    "Of routers, experts and everything else; levels of DeepStack are added again when a layer is calculated again."
    found = []
    for on in (False, True):
        encoder = encoder_of(name, perturbed=True).train()
        encoder.checkpoint_gradients(on)
        views = encoder.forward_items(ITEMS)
        loss = sum((views.embedding[view] * torch.linspace(-1, 1, encoder.embedding_dim)).sum() for view in VIEWS)
        (loss + sum(views.routing[view].square().sum() for view in VIEWS)).backward()
        found.append({name: p.grad for name, p in encoder.named_parameters() if p.grad is not None})
        assert len(views.layers) == len(encoder.moe_blocks) == 4  # calculating again notes no routing again
    assert found[0].keys() == found[1].keys()
    assert sum("router" in name for name in found[0]) == 4
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    assert max(float((found[0][name] - found[1][name]).abs().max()) for name in found[0]) <= 1e-6 * largest


# ---------------------------------------------------------------------------------------------- titles and words


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_a_title_that_holds_special_tokens_is_a_title(name):
    encoder = encoder_of(name)
    inner, frame = encoder.backbone.tokenizer.inner, encoder.backbone.frame
    special = {encoder.backbone.picture_id, *frame.start, *frame.before, *frame.after, *inner.all_special_ids}
    tokens = inner.convert_ids_to_tokens(sorted(special - {inner.unk_token_id}))
    for token in (*tokens, "<|im_end|>", "<|image_pad|>"):
        title = f"red {token} box"
        ids, spans = encoder.backbone.tokenize(title)
        assert not set(ids) & (special - {inner.unk_token_id}), token
        assert [title[slice(*span)] for span in (spans[0], spans[-1])][0] == "red" and len(ids) == len(spans)
        rows = encoder.rows_of([Item(title, REFS[0])])
        assert [len(row.pictures) for row in rows] == [1, 0]
        assert np.isfinite(encoder.encode([Item(title, REFS[0])])).all()


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_weights_in_bfloat16_leave_buffers_alone(name):
    "Frequencies of positions are not rounded; the number that scales words is what the stock model multiplies by."
    config = EncoderConfig(backbone=str(folder_of(name)), image_size=PIXELS[name])
    exact, half = hf_backbone(config), hf_backbone(config, dtype=torch.bfloat16)
    assert half.embedding.weight.dtype == torch.bfloat16
    buffers, rounded = dict(half.named_buffers()), 0
    assert any("inv_freq" in key and key.startswith("decoder") for key in buffers)
    for key, right in exact.named_buffers():
        if "inv_freq" in key:
            assert buffers[key].dtype == torch.float32 and torch.equal(buffers[key], right), key
            rounded += int(not torch.equal(right.bfloat16().float(), right))
        if "embed_scale" in key:  # the stock model multiplies in the dtype of the weights
            assert torch.equal(buffers[key].bfloat16(), right.bfloat16()), key
    assert rounded  # the control: rounding would be seen


# ---------------------------------------------------------------------------------------------- no backbone


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_kinds_say_why(kind):
    with pytest.raises(DataError) as caught:
        family_of(kind, "some/model")
    assert REFUSED[kind] in str(caught.value) and kind in str(caught.value) and "some/model" in str(caught.value)


@pytest.mark.parametrize("kind", TINY_REFUSED)
def test_a_folder_of_a_refused_kind(kind, tmp_path):
    with pytest.raises(DataError, match=f"{kind} cannot be a backbone"):
        Moon2Encoder.from_backbone(str(tiny_model(kind, tmp_path / kind)))


def test_a_hub_id_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LabError) as caught:
        Moon2Encoder.from_backbone("nobody/such-a-model")
    assert "nobody/such-a-model" in str(caught.value) and "hub" in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(LabError) as caught:
        Moon2Encoder.from_backbone(str(tmp_path / "no folder"))
    assert "no folder" in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("processor", [True, False])
def test_a_model_without_pictures(processor, tmp_path):
    "Also as such models are published, without a processor."
    folder = copied("llava", tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    if not processor:
        (folder / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="llama cannot be a backbone: it reads no pictures"):
        Moon2Encoder.from_backbone(str(folder))


def test_a_processor_that_needs_torchvision(tmp_path):
    folder = copied("llava", tmp_path)
    path = folder / "preprocessor_config.json"
    write_json(path, read_json(path) | {"image_processor_type": "Cohere2VisionImageProcessorFast"})
    with pytest.raises(DataError, match="needs torchvision"):
        load("llava", folder)


def test_a_guard_is_no_need(monkeypatch):
    "transformers 5.17 asks for torchvision where the class does not: its own module decides."
    module = "transformers.models.smolvlm.image_processing_pil_smolvlm"
    wanted = pil_processor(folder_of("smolvlm"))
    guard = type("SmolVLMImageProcessorPil", (), {"__module__": module})  # cannot read a folder
    monkeypatch.setattr(transformers, guard.__name__, guard)
    found = pil_processor(folder_of("smolvlm"))
    assert type(found) is type(wanted) and found.to_dict() == wanted.to_dict()
    monkeypatch.setitem(sys.modules, module, None)  # where it does need what is not there
    with pytest.raises(DataError, match="SmolVLMImageProcessor needs torchvision"):
        load("smolvlm")


@pytest.mark.parametrize("fault", ["tokenizer", "processor", "weights", "cut"])
@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_a_folder_that_lacks_something(name, fault, tmp_path):
    "Also where transformers makes up a tokenizer of five tokens without a word."
    folder = spoil_model(copied(name, tmp_path), fault)
    with pytest.raises(DataError) as caught:
        load(name, folder)
    assert {"processor": "image processor", "cut": "weights"}.get(fault, fault) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in TINY_FAMILIES if name != "llava_onevision"])
def test_a_tokenizer_without_the_token_of_pictures(name, tmp_path):
    """Tokens behind it move up: the frame is then in its place, or not where the config says. (In llava_onevision the
    token of videos takes it.) Also where a word of texts has its id."""
    config = AutoConfig.from_pretrained(folder_of(name))
    number = image_token_id(config)
    token = AutoTokenizer.from_pretrained(folder_of(name)).convert_ids_to_tokens(number)
    folder = copied(name, tmp_path)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        write_json(path, _without(read_json(path), token))
    with pytest.raises(DataError, match=f"the config says {number}, which is|_token_i.* of the config is"):
        load(name, folder)
    folder = copied(name, tmp_path / "word")
    field = next(field for field in ("image_token_id", "image_token_index") if field in config.to_dict())
    write_json(folder / "config.json", read_json(folder / "config.json") | {field: 4})
    with pytest.raises(DataError, match="the config says 4, which is '"):
        load(name, folder)


def _without(content, token):
    "JSON without a key, value or object that is the token, or has it as content."
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if key != token and value != token}
        return {key: _without(value, token) for key, value in kept.items() if not _names(value, token)}
    return [_without(value, token) for value in content if not _names(value, token)] if isinstance(content, list) else (
        content
    )


def _names(value, token):
    return value == token or (isinstance(value, dict) and value.get("content") == token)


@pytest.mark.parametrize("name, field", [
    ("qwen3_vl", "vision_start_token_id"), ("gemma3", "boi_token_index"), ("gemma4", "eoi_token_id"),
    ("glm4v", "image_end_token_id"),
])
def test_a_frame_that_the_config_denies(name, field, tmp_path):
    "Packed rows and the stock forward pass would agree on it."
    folder = copied(name, tmp_path)
    before = read_json(folder / "config.json")
    write_json(folder / "config.json", before | {field: before[field] - 1})
    with pytest.raises(DataError, match=f"{field[:-5]}\\w+ of the config is {before[field] - 1}, but '"):
        load(name, folder)


def test_a_folder_without_tokenizer_of_a_kind_that_is_not_known(tmp_path, monkeypatch):
    "No frame token can be missing there."
    monkeypatch.delitem(FAMILIES, "internvl")
    with pytest.raises(DataError, match="there is no tokenizer"):
        load("internvl", spoil_model(copied("internvl", tmp_path), "tokenizer"))


def test_files_of_two_models_in_one_folder(tmp_path):
    "Weights or a tokenizer of another model: named, not drawn at random."
    for what, other, message in (
        ("model.safetensors", "gemma3", "weights are of another model"),
        ("tokenizer.json", "qwen3_vl", "the word embedding has 36"),
    ):
        folder = copied("smolvlm", tmp_path / what)
        shutil.copy(folder_of(other) / what, folder / what)
        with pytest.raises(DataError, match=message):
            load("smolvlm", folder)
    folder = copied("smolvlm", tmp_path / "words")
    more = tiny_model("smolvlm", tmp_path / "more", words=[f"word{number}" for number in range(99)])
    shutil.copy(more / "tokenizer.json", folder / "tokenizer.json")
    with pytest.raises(DataError, match="the word embedding has 36 rows"):
        load("smolvlm", folder)


@pytest.mark.parametrize("name", few(["qwen3_vl", "smolvlm", "llava_onevision", "gemma4"], "qwen3_vl", "smolvlm"))
def test_pictures_of_one_pixel_by_four_thousand(name):
    "Padded to squares, they are pictures like others."
    encoder = encoder_of(name)
    thin = [ImageRef.from_pil(Image.new("RGB", size, "red")) for size in ((1, 4000), (4000, 1), (1, 1))]
    sizes = encoder.backbone.picture_sizes(thin)
    assert sizes == [encoder.backbone.vision.picture_size] * 3
    vectors = encoder.encode([Item("red bar", ref) for ref in thin], view="i")
    assert np.isfinite(vectors).all() and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


@pytest.mark.parametrize("name", few(["qwen3_vl", "gemma3", "paligemma", "qwen3_5"], "gemma3"))
def test_forty_pictures_an_item(name):
    "A row of 40 pictures equals the stock forward; it is longer than these small models were made for."
    encoder = encoder_of(name, double=True)
    item = Item("small red ball", REFS[0], "forty", None, tuple(REFS[place % 6] for place in range(1, 40)))
    with torch.no_grad():
        found = encoder.forward_items([item], ("i", "mm"))
        (row,) = encoder.rows_of([item], ("mm",))
        assert len(row.pictures) == 40 and found.tokens >= 40 * 16
        hidden, _ = encoder.run_rows([item], [row])
        right = stock(encoder.backbone, row, [ref.load() for ref in item.pictures])
    assert float((hidden - right).abs().max()) < 1e-11
