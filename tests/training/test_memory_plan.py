"The memory plan of every kind of model, from its config, beside the model itself on the CPU."
import shutil

import pytest
from families import FEW_FAMILIES, PIXELS, SPARSE, folder_of
from moon2_lab.config import TrainConfig
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.model.memory import checkpoint_gradients
from moon2_lab.model.packing import Packing
from moon2_lab.tiny_models import published_config
from moon2_lab.training.memory_plan import activation_bytes, plan_memory
from moon2_lab.training.optim import prepare_trainable
from transformers import AutoConfig

FROZEN = {"weights_dtype": "bfloat16", "gradient_checkpointing": True}


def settings(name, **fields):
    how = {"experts": "native" if name in SPARSE else "lowrank", "expert_rank": 4, "lora_r": 2}
    how |= {"image_size": PIXELS[name], "max_steps": 1, "num_layers": 0}
    return TrainConfig(backbone=str(folder_of(name)), **how | fields)


def beside(config):
    "The plan, the weights and trained bytes that the model really has, and the bytes that its step holds."
    plan = plan_memory(config, AutoConfig.from_pretrained(config.backbone), tokens=512, row=64)
    names = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(names.pop("backbone"), **names).train()
    prepare_trainable(encoder, config)
    decoder = encoder.backbone.decoder
    encoder.set_expert_kernel(encoder.moe_blocks[0].kernels[-1])
    checkpoint_gradients(decoder, on=False)
    reduced = config.weights_dtype == "bfloat16"
    axes = encoder.backbone.placing.axes
    held = activation_bytes(decoder, Packing([64] * 8), axes, config.gradient_checkpointing, reduced)
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    return plan, weights, sum(p.numel() for p in decoder.parameters() if p.requires_grad), sum(held)


@pytest.mark.parametrize("name", FEW_FAMILIES)
def test_a_plan_is_what_the_model_holds(name):
    plan, weights, trained, held = beside(settings(name, **FROZEN))
    assert (plan.weights, plan.trained) == (weights, trained)
    assert 0.9 < (plan.activations + plan.layer) / held < 1.1


def test_the_copy_of_full_experts_that_lora_makes_is_counted():
    adapted, in_full = ({"experts": "full", "lora_experts": how} for how in ("lora", "train"))
    plan, weights, trained, held = beside(settings("qwen3_vl", **adapted))
    assert (plan.weights, plan.trained) == (weights, trained)
    assert 0.9 < (plan.activations + plan.layer) / held < 1.1
    without = plan_memory(settings("qwen3_vl", **in_full), AutoConfig.from_pretrained(folder_of("qwen3_vl")), 512, 64)
    stack = 4 * 3 * 64 * 96 * 4 * 4  # layers, matrices, their sizes, experts, bytes
    assert plan.activations - without.activations > 0.9 * stack


def test_published_shapes_are_planned_from_their_configs_alone(tmp_path):
    config = TrainConfig(backbone="Qwen3-VL-8B", experts="lowrank", lora_r=16, num_layers=0, max_steps=1, **FROZEN)
    plan = plan_memory(config, published_config("Qwen3-VL-8B"), tokens=22_072)
    assert plan.parameters > 8e9 and round(plan.trained / 1e6) == 120
    folder = shutil.copytree(folder_of("qwen3_vl"), tmp_path / "cut")
    whole = plan_memory(settings("qwen3_vl"), AutoConfig.from_pretrained(folder), 512, 64)
    (folder / "model.safetensors").write_bytes(b"cut")
    assert plan_memory(settings("qwen3_vl"), AutoConfig.from_pretrained(folder), 512, 64) == whole
