"""Experts, LoRA and memory on decoders of many kinds: small models of each family, made from its config."""
import functools
import tempfile

import numpy as np
import pytest
import torch
from choosing import few, slow
from moon2_lab.config import TrainConfig, VIEWS
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.errors import DataError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.model.low_rank_experts import LowRankExperts
from moon2_lab.model.memory import base_digest
from moon2_lab.model.moe import MoEFeedForward
from moon2_lab.model.native_experts import NativeExperts
from moon2_lab.tiny_models import pictures, tiny_model
from moon2_lab.training.optim import make_optimizer, prepare_trainable

DENSE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "glm4v", "smolvlm", "qwen3_5")
SPARSE = ("qwen3_vl_moe", "qwen3_5_moe")
KINDS = [(family, kind) for family in DENSE for kind in ("full", "lowrank")] + [(family, "native") for family in SPARSE]
FAST = [("qwen3_vl", "full"), ("gemma3", "lowrank"), ("qwen3_5", "lowrank"), ("qwen3_vl_moe", "native")]
FEW_KINDS = [one if one in FAST else slow(*one) for one in KINDS]
OTHERS = [one if one in FAST else slow(*one) for one in KINDS if one[0] not in ("glm4v", "smolvlm")]
BLOCKS = {"full": MoEFeedForward, "lowrank": LowRankExperts, "native": NativeExperts}
SHOWN = pictures(3)
ITEMS = [
    Item("a nice red ball", ImageRef.from_pil(SHOWN[0]), "a"), Item("blue box no 7", ImageRef.from_pil(SHOWN[1]), "b"),
    Item("large green ring", None, "c"), Item(None, ImageRef.from_pil(SHOWN[2]), "d"),
]


@functools.cache
def folder_of(family):
    return str(tiny_model(family, tempfile.mkdtemp()))


def encoder_of(family, apart=0.0, **fields):
    "An encoder on a small model of a family; apart: how far its experts are pushed from each other."
    given = {"num_layers": 4, "image_size": 64, "num_experts": 4, "top_k": 2, "expert_rank": 4} | fields
    encoder = Moon2Encoder.from_backbone(folder_of(family), **given).eval()
    return perturb_experts(encoder, apart) if apart else encoder


def vectors(encoder):
    with torch.no_grad():
        return {view: x.numpy() for view, x in encoder.forward_items(ITEMS).embedding.items()}


def gap(one, other):
    return max(np.abs(one[view] - other[view]).max() for view in VIEWS)


@pytest.mark.parametrize(("family", "kind"), FEW_KINDS, ids=str)
def test_step_0_is_the_model_itself(family, kind):
    "Three views; the same numbers as without experts of ours, and others once the experts differ."
    plain, encoder = vectors(encoder_of(family, num_experts=0)), encoder_of(family, experts=kind)
    assert {type(block) for block in encoder.moe_blocks} == {BLOCKS[kind]} and len(encoder.moe_blocks) == 4
    assert gap(vectors(encoder), plain) < 1e-5
    assert gap(vectors(perturb_experts(encoder, 0.1)), plain) > 1e-3
    assert (encoder.config.num_experts, encoder.config.top_k) == (4, 2) == (len(encoder.alignment), 2)


@pytest.mark.parametrize("family", DENSE)
def test_low_rank_experts_as_full_ones(family):
    encoder = encoder_of(family, apart=0.1, experts="lowrank")
    full = encoder.with_full_experts()
    assert {type(block) for block in full.moe_blocks} == {MoEFeedForward}
    assert gap(vectors(full), vectors(encoder)) < 1e-5


@pytest.mark.parametrize(("family", "kind"), OTHERS, ids=str)
def test_one_pass_is_three_passes_and_every_expert_learns(family, kind):
    encoder = encoder_of(family, apart=0.1, experts=kind).train()
    target, grads = torch.randn(len(ITEMS), encoder.embedding_dim), []
    for share in (True, False):
        encoder.zero_grad()
        out = encoder.forward_items(ITEMS, share=share)
        loads = ((layer.gates * layer.weight[:, None]).sum(0) / layer.weight.sum() for layer in out.layers)
        aligned = sum((out.embedding[view] * target).sum() + out.routing[view].square().sum() for view in VIEWS)
        (aligned + sum(load.square().sum() for load in loads)).backward()
        grads.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    with torch.no_grad():
        shared, apart = (encoder.forward_items(ITEMS, share=share).embedding for share in (True, False))
    assert max(float((shared[view] - apart[view]).abs().max()) for view in VIEWS) < 1e-5
    scale = max(float(g.abs().max()) for g in grads[0].values())
    assert max(float((grads[0][name] - grads[1][name]).abs().max()) for name in grads[0]) < 1e-4 * scale
    for block in encoder.moe_blocks:
        for parameter in (block.router, *block.expert_parameters()):
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all()  # each of the Z


@pytest.mark.parametrize("family", few(("qwen3_vl", "qwen3_5", "gemma3", "qwen3_vl_moe"), "qwen3_vl", "qwen3_vl_moe"))
def test_lora_reaches_every_layer_and_never_the_vision_side(family):
    "Adapted, merged, saved and loaded: the same vectors."
    kind = "native" if family in SPARSE else "lowrank"
    encoder = encoder_of(family, apart=0.1, experts=kind)
    encoder.add_lora(2, 4, "frozen")
    trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "vision" in name]
    adapted = {name.split(".")[3] for name in trained if "lora_B" in name}
    assert adapted == set("0123")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    merged = encoder.merged()
    assert gap(vectors(merged), vectors(encoder)) < 1e-5
    assert gap(vectors(encoder_of(family, apart=0.1, experts=kind)), vectors(encoder)) > 1e-3
    folder = tempfile.mkdtemp()
    encoder.save_pretrained(folder)
    assert gap(vectors(Moon2Encoder.from_pretrained(folder)), vectors(merged)) < 1e-6


@pytest.mark.parametrize("family", few(("qwen3_vl", "gemma3", "qwen3_5"), "qwen3_5"))
def test_a_step_in_bfloat16_with_checkpointing(family):
    "Frozen weights bfloat16, trained ones float32, buffers untouched; checkpointing changes no gradient; a step moves."
    buffers = {name: b.clone() for name, b in encoder_of(family, num_experts=0).backbone.decoder.named_buffers()}
    grads = {}
    for checkpointing in (False, True):
        config = TrainConfig(
            backbone=folder_of(family), num_layers=4, image_size=64, experts="lowrank", expert_rank=4, lora_r=2,
            weights_dtype="bfloat16", gradient_checkpointing=checkpointing, max_steps=1, learning_rate=0.01,
        )
        fields = config.encoder_fields()
        encoder = perturb_experts(Moon2Encoder.from_backbone(fields.pop("backbone"), **fields), 0.05).train()
        torch.manual_seed(0)
        prepare_trainable(encoder, config)
        decoder, before = encoder.backbone.decoder, base_digest(encoder)
        kinds = {(p.requires_grad, p.dtype) for p in decoder.parameters()}
        assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
        assert all(torch.equal(b, buffers[n]) for n, b in decoder.named_buffers() if b.is_floating_point())
        optimizer, out = make_optimizer(encoder, config), encoder.forward_items(ITEMS)
        loss = out.embedding["mm"].sum() + sum(layer.gates.square().sum() for layer in out.layers)
        loss.backward()
        grads[checkpointing] = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        optimizer.step()
        assert not torch.equal(encoder.forward_items(ITEMS).embedding["mm"], out.embedding["mm"])
        assert base_digest(encoder) == before  # the base is what it was
    assert grads[False].keys() == grads[True].keys() and any("router" in name for name in grads[True])
    assert all(torch.equal(g, grads[True][name]) for name, g in grads[False].items())


def test_the_untrained_baseline_is_no_second_model():
    encoder = encoder_of("qwen3_vl", apart=0.1, experts="lowrank")
    encoder.add_lora(2, 4)
    fresh = encoder.untrained()
    known = {p.data_ptr() for p in encoder.backbone.decoder.parameters()}
    assert {p.data_ptr() for p in fresh.backbone.decoder.parameters()} <= known
    assert gap(vectors(fresh), vectors(encoder_of("qwen3_vl", num_experts=0))) == 0


def test_what_does_not_fit_is_refused_before_anything_is_trained():
    for family, kind, message in (
        ("qwen3_vl_moe", "full", "experts=native"), ("qwen3_vl_moe", "lowrank", "experts=native"),
        ("qwen3_vl", "native", "no layer of it has experts"),
    ):
        with pytest.raises(DataError, match=message):
            encoder_of(family, experts=kind)
