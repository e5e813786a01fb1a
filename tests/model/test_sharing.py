"""Saved models on backbones of transformers, with their base or naming it: equal vectors, damage, foreign parts."""
import shutil

import numpy as np
import pytest
import torch
from families import ITEMS, folder_of
from moon2_lab.config import TrainConfig
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.model.memory import freeze_base
from moon2_lab.tiny_models import spoil_model, tiny_model
from moon2_lab.training.optim import prepare_trainable

PIXELS = {"qwen3_vl": 128, "qwen3_vl_moe": 128, "gemma3": 64, "smolvlm": 64}


def trained(name, lora=True, base=None, **fields):
    "An encoder on a small model whose trained part was moved, with or without LoRA."
    how = {"experts": "native"} if name.endswith("moe") else {"experts": "lowrank", "expert_rank": 2, "num_experts": 2}
    source = str(base or folder_of(name))
    encoder = Moon2Encoder.from_backbone(source, image_size=PIXELS[name], **(how | fields)).eval()
    encoder.add_lora(rank=2, alpha=4, experts="train") if lora else freeze_base(encoder.backbone.decoder, torch.float32)
    noise = torch.Generator().manual_seed(0)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return encoder


@pytest.mark.parametrize("name", PIXELS)
@pytest.mark.parametrize("lora", [True, False])
def test_with_its_base_or_naming_it_the_vectors_are_the_same(tmp_path, name, lora):
    "Trained with adapters, merged, saved with all weights, saved as the trained part: one and the same encoder."
    encoder = trained(name, lora)
    expected = encoder.encode_views(ITEMS)
    for base in ("included", "named"):
        encoder.save_pretrained(tmp_path / base, base)
        loaded = Moon2Encoder.from_pretrained(tmp_path / base, "cpu")
        for view, vectors in loaded.encode_views(ITEMS).items():
            assert np.allclose(vectors, expected[view], atol=2e-5, equal_nan=True)
    assert not (tmp_path / "named" / "model.safetensors").exists()
    sizes = [(tmp_path / where).stat().st_size for where in ("named/trained.safetensors", "included/model.safetensors")]
    assert sizes[0] < sizes[1] / 2


@pytest.mark.parametrize("experts", ["full", "lowrank"])
def test_in_bfloat16(tmp_path, experts):
    "What is frozen in two bytes has the digest that it had when it was trained, with LoRA on full experts too."
    how = {"experts": experts, "expert_rank": 2, "num_experts": 2, "weights_dtype": "bfloat16"}
    config = TrainConfig(backbone=str(folder_of("smolvlm")), image_size=64, lora_r=2, **how)
    encoder = Moon2Encoder.from_backbone(config.backbone, image_size=64, **how)
    prepare_trainable(encoder, config)
    encoder.eval().save_pretrained(tmp_path, "named")
    loaded = Moon2Encoder.from_pretrained(tmp_path, "cpu")
    assert (1 - (loaded.encode(ITEMS) * encoder.encode(ITEMS)).sum(1)).max() < 1e-3


def test_a_named_model_can_be_named_again(tmp_path):
    "What was loaded without LoRA knows which part was trained; a second save is the same."
    trained("smolvlm", lora=False).save_pretrained(tmp_path / "once", "named")
    Moon2Encoder.from_pretrained(tmp_path / "once", "cpu").save_pretrained(tmp_path / "twice", "named")
    once, twice = ((tmp_path / name / "trained.safetensors").read_bytes() for name in ("once", "twice"))
    assert once == twice
    adapted = trained("smolvlm")
    adapted.save_pretrained(tmp_path / "adapted", "named")
    with pytest.raises(UsageError, match="base='included'"):  # merged when it was loaded: not the base's weights
        Moon2Encoder.from_pretrained(tmp_path / "adapted", "cpu").save_pretrained(tmp_path / "x", "named")
    with pytest.raises(UsageError, match="included or named"):
        adapted.save_pretrained(tmp_path / "x", "both")
    assert not (tmp_path / "x").exists()


def test_another_base_is_refused(tmp_path):
    "Moved, it is read where one says; other weights, fewer layers and a base that is gone are one sentence each."
    base = tiny_model("smolvlm", tmp_path / "base")
    encoder = trained("smolvlm", base=base)
    encoder.save_pretrained(tmp_path / "model", "named")
    shutil.move(base, tmp_path / "moved")
    with pytest.raises(LabError, match="cannot have the config"):
        Moon2Encoder.from_pretrained(tmp_path / "model", "cpu")
    loaded = Moon2Encoder.from_pretrained(tmp_path / "model", "cpu", base=tmp_path / "moved")
    assert np.allclose(loaded.encode(ITEMS[:2]), encoder.encode(ITEMS[:2]), atol=2e-5)
    other = tiny_model("smolvlm", tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="trained on another base: its weights are others"):
        Moon2Encoder.from_pretrained(tmp_path / "model", "cpu", base=other)
    llava = tiny_model("llava", tmp_path / "llava")
    with pytest.raises(DataError, match="trained on another base"):
        Moon2Encoder.from_pretrained(tmp_path / "model", "cpu", base=llava)


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("base", ["included", "named"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_folder_cut_in_half_is_named(tmp_path, base, listed):
    "Each file missing, and each weight file cut: a `DataError`, with the list of checksums or without."
    trained("smolvlm").save_pretrained(tmp_path / "model", base)
    needed = [name for name in _files(tmp_path / "model") if name != "SHA256SUMS"]
    optional = {"backbone/generation_config.json", "backbone/tokenizer_config.json", "backbone/chat_template.jinja"}
    for name in needed if listed else [name for name in needed if name not in optional]:
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "model", copy)
        if not listed:
            (copy / "SHA256SUMS").unlink()
        (copy / name).unlink()
        with pytest.raises(DataError):
            Moon2Encoder.from_pretrained(copy, "cpu")
        data = (tmp_path / "model" / name).read_bytes()
        (copy / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(DataError):
            Moon2Encoder.from_pretrained(copy, "cpu")
        shutil.rmtree(copy)


def test_a_damaged_base_is_named(tmp_path):
    base = tiny_model("smolvlm", tmp_path / "base")
    trained("smolvlm", base=base).save_pretrained(tmp_path / "model", "named")
    spoil_model(base, "cut")
    with pytest.raises(DataError, match="cannot read the weights"):
        Moon2Encoder.from_pretrained(tmp_path / "model", "cpu")
