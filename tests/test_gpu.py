"""The whole path on a CUDA device: train in bfloat16, save, resume, evaluate, embed, explain; and the numbers of the
CPU in float32 within bounds that are stated here."""
import numpy as np
import pytest
import torch
from moon2_lab.config import TrainConfig
from moon2_lab.data.catalog import Catalog
from moon2_lab.evaluation.evaluate import evaluate
from moon2_lab.explain.attribution import attribute_side
from moon2_lab.model.certify import certify
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.tiny_models import tiny_model
from moon2_lab.training.trainer import Trainer
from small import TRAIN, product, shop

DEVICE = "cuda"
KINDS = {"tiny": (32, "full"), "qwen3_vl": (128, "lowrank"), "gemma3": (64, "full"), "qwen3_vl_moe": (128, "native")}
LOSS = {"float32": 2e-3, "bfloat16": 0.05}  # largest relative difference of a step's loss, over five steps
DOT = {"float32": 0.9999, "bfloat16": 0.98}  # smallest dot product with the CPU's vectors

gpu = pytest.mark.gpu


def fields_of(kind, folder):
    pixels, experts = KINDS[kind]
    name = kind if kind == "tiny" else str(tiny_model(kind, folder / kind))
    small = {"num_layers": 2, "visual_tokens": 4} if kind == "tiny" else {}
    return {
        "backbone": name, "image_size": pixels, "num_experts": 4, "top_k": 2, "max_text_tokens": 16,
        "experts": experts, **small,
    }


def made(fields):
    "An encoder with experts pushed apart, the same each time."
    rest = dict(fields)
    return perturb_experts(Moon2Encoder.from_backbone(rest.pop("backbone"), **rest), 0.02)


def trained(fields, device, dtype, **changes):
    "A trainer after five steps, and the loss of each."
    config = TrainConfig(**(TRAIN | fields | {"device": device, "dtype": dtype, "max_steps": 5} | changes))
    trainer = Trainer(made(fields), shop(40), config)
    trainer.train()
    return trainer, [row["loss"] for row in trainer.history]


def catalog_of():
    return Catalog.from_products([product(number, split="test") for number in range(12)])


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", LOSS)
def test_training_and_vectors_are_those_of_the_cpu(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "cache"))
    fields = fields_of(kind, tmp_path)
    _, expected = trained(fields, "cpu", "float32")
    trainer, losses = trained(fields, DEVICE, dtype)
    gaps = np.abs(np.array(losses) / expected - 1)
    items = [entry.item("mm") for entry in catalog_of()]
    here, there = made(fields).place("cpu", "float32"), made(fields).place(DEVICE, dtype)
    dots = (here.encode(items) * there.encode(items)).sum(1)
    print(f"{kind} {dtype}: losses {losses} against {expected}; dot products at least {dots.min():.6f}")
    assert trainer.encoder.backbone.device.type == torch.device(DEVICE).type
    assert gaps[0] < LOSS[dtype] / 2 and gaps.max() < LOSS[dtype]
    assert dots.min() > DOT[dtype]


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_saved_resumed_evaluated_embedded_and_explained_there(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "cache"))
    fields = fields_of(kind, tmp_path)
    config = TrainConfig(
        **(TRAIN | fields | {"device": DEVICE, "dtype": "bfloat16", "max_steps": 5, "save_steps": 2})
    )
    for event in Trainer(made(fields), shop(40), config, out=tmp_path / "run"):
        if event.phase == "step" and event.step == 3:
            break  # the run dies here; there is a checkpoint of step 2
    resumed = Trainer(made(fields), shop(40), config, out=tmp_path / "run", resume=True)
    resumed.train()
    assert len(resumed.history) == 5 and np.isfinite(resumed.history[-1]["loss"])
    resumed.encoder.save_pretrained(tmp_path / "model")
    loaded = Moon2Encoder.from_pretrained(tmp_path / "model", DEVICE)
    catalog = catalog_of()
    items = [entry.item("mm") for entry in catalog]
    vectors = loaded.encode(items)
    assert loaded.backbone.device.type == torch.device(DEVICE).type
    here = Moon2Encoder.from_pretrained(tmp_path / "model", "cpu")
    assert (vectors * here.encode(items)).sum(1).min() > DOT["bfloat16"]
    metrics = evaluate(loaded, catalog, split="test", labels=False, resamples=0)
    assert metrics["directions"] and metrics["trivial"]
    query = catalog.products[0].item("t")
    attribution = attribute_side(loaded, query, items[0], steps=16)
    assert np.isfinite(attribution.values).all()


@gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiny"])
def test_packed_rows_are_certified_there(kind, tmp_path):
    fields = fields_of(kind, tmp_path)
    name = fields["backbone"]
    encoder = Moon2Encoder.from_backbone(name, image_size=fields["image_size"], num_experts=0)
    certificate = certify(encoder.place(DEVICE).backbone)
    print(kind, certificate.gaps)
    assert certificate.holds
