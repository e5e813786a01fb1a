"""One device for everything: on a machine without a GPU shown with a fake device (fake_device.py), which refuses what
CUDA refuses.
"""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from types import SimpleNamespace

import fake_device
import numpy as np
import pytest
import torch
from bench.common import noted_waits
from choosing import few, slow
from fake_device import counted
from moon2_lab import files, runtime
from moon2_lab.cli.main import main
from moon2_lab.data.products import Item
from moon2_lab.errors import UsageError
from moon2_lab.evaluation.evaluate import evaluate
from moon2_lab.explain import attention_recorder
from moon2_lab.model import backbone, encoder, moe, vision
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.objective import contrastive, recipes
from moon2_lab.objective.objective import Moon2Objective, TripletViews, batch_masks
from moon2_lab.tiny_models import tiny_model
from moon2_lab.training import step as step_module, trainer as trainer_module
from moon2_lab.training.step import PHASES
from moon2_lab.training.trainer import Trainer
from small import picture, settings, shop, tiny

METHODS = ("ig", "shapley", "occlusion", "attention_gradient", "rollout", "attention", "gradient")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    "The fake device as the fastest there is, and a cache of one's own: vision features are made anew."
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "cache"))
    if not fake_device.possible():
        pytest.skip(f"torch {torch.__version__} takes no device that is written in Python")
    device = fake_device.start()
    monkeypatch.setattr(runtime, "device_counts", lambda: {"fake": 1, "cpu": 1})
    return device


def without_device(monkeypatch):
    "The machine as it is, with a cache that knows nothing."
    monkeypatch.setattr(runtime, "device_counts", lambda: {"cpu": 1})
    monkeypatch.setenv("MOON2_CACHE", os.environ["MOON2_CACHE"] + "-cpu")


# ---------------------------------------------------------------------------------------------- the fake device itself


def test_the_fake_device_is_the_cpu_under_another_name(fake):
    rows, weight = torch.randn(5, 8), torch.randn(8, 8)
    there = (rows.to(fake) @ weight.to(fake)).softmax(-1)
    assert there.device.type == "fake" and torch.equal(there.cpu(), (rows @ weight).softmax(-1))
    with pytest.raises(RuntimeError, match="same device"):
        rows.to(fake) + rows
    with pytest.raises(RuntimeError, match="same device"):
        rows.to(fake).index_select(0, torch.tensor([1]))
    assert float((rows.to(fake) * torch.tensor(2.0)).sum()) == float(
        (rows * 2).sum()
    )  # a single number may come from the CPU, as on CUDA


@pytest.mark.parametrize(
    ("wait", "act"),
    [
        ("_local_scalar_dense", lambda x: x.sum().item()), ("nonzero", lambda x: x[x > 0]),
        ("copy to cpu", lambda x: x.tolist()), ("copy to device", lambda x: torch.ones(2).to(x.device)),
        ("copy to device", lambda x: x.new_tensor(0.5)), (None, lambda x: runtime.to_device([1, 2], x.device)),
        ("bincount", lambda x: torch.bincount(x.long().flatten().abs())),
        ("_unique2", lambda x: torch.unique(x)), ("_grouped_mm", lambda x: by_group(x)),
        (None, lambda x: by_group(x.bfloat16())), ("copy to device", lambda x: x[torch.tensor([1, 0])]),
        ("repeat_interleave", lambda x: torch.repeat_interleave(x.long().flatten().abs())),
        (None, lambda x: torch.where(x > 0, x, 0).sum(0).cumsum(0)),
    ],
)
def test_what_a_gpu_is_waited_for_is_counted(fake, wait, act):
    values = torch.randn(4, 8).to(fake)
    with counted() as waits:
        act(values)
    assert set(waits) == ({wait} if wait else set())


def by_group(rows):
    "Rows times a matrix for each half of them."
    matrices = torch.ones(2, rows.shape[1], 8, dtype=rows.dtype, device=rows.device)
    return moe._GROUPED_MM(rows, matrices, offs=torch.arange(2, 5, 2, dtype=torch.int32, device=rows.device))


# ---------------------------------------------------------------------------------------------- choosing


def test_a_device_that_is_not_there_is_one_line_that_names_what_is(monkeypatch):
    monkeypatch.setattr(runtime, "device_counts", lambda: {"cuda": 2, "cpu": 1})
    assert (runtime.pick_device("auto"), runtime.pick_device("cuda:1")) == (
        torch.device("cuda"), torch.device("cuda:1"),
    )
    for wrong in ("cuda:2", "mps", "gpu", "cuda:x"):
        with pytest.raises(UsageError, match=f"no device '{wrong}'.*there is cuda:0 to cuda:1, cpu"):
            try:
                runtime.pick_device(wrong)
            except UsageError as error:
                raise UsageError(str(error)) from error


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has cuda")
@pytest.mark.parametrize(
    "words",
    [
        "train --catalog none --out {out} --backbone tiny", "run --catalog none --out {out} --backbone tiny",
        "eval {model} --catalog none", "embed {model} --catalog none --out {out}",
        "heatmap {model} --catalog none --query x --item y --out {out}",
        "compare {model} {model} --catalog none --out {out}", "demo {model} --catalog none",
        "search {model} --uri {out} --text x",
    ],
)
def test_every_command_refuses_it_before_anything_is_read(words, tmp_path, capsys):
    tiny().save_pretrained(tmp_path / "model")
    line = words.format(model=tmp_path / "model", out=tmp_path / "out").split()
    assert main([*line, "--device", "cuda"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "no device 'cuda' [device] -> there is cpu" in error[0]
    assert not (tmp_path / "out").exists()


def test_the_setting_is_the_same_thing(monkeypatch, tmp_path, capsys):
    (tmp_path / "settings.ini").write_text("[lab]\ndevice = mps\n")
    monkeypatch.setenv("MOON2_SETTINGS", str(tmp_path / "settings.ini"))
    monkeypatch.setattr(runtime, "device_counts", lambda: {"cpu": 1})
    tiny().save_pretrained(tmp_path / "model")
    assert main(["eval", str(tmp_path / "model"), "--catalog", "none"]) == 2
    assert "no device 'mps'" in capsys.readouterr().err
    assert (
        main(["eval", str(tmp_path / "model"), "--catalog", str(tmp_path / "none"), "--device", "cpu"]) == 2
    )  # typed over the setting
    assert "mps" not in capsys.readouterr().err


def test_kernel_and_dtype_are_measured_after_moving_and_kept_under_the_devices_name(fake, monkeypatch):
    seen = []
    monkeypatch.setattr(Moon2Encoder, "embedding_dim", property(lambda self: 256))  # tiny is too small to be measured
    monkeypatch.setattr(encoder, "pick_dtype", lambda device: seen.append(("dtype", device.type)) or torch.bfloat16)
    monkeypatch.setattr(
        encoder, "faster_kernel",
        lambda block, tokens, dtype: seen.append(("kernel", block.gate_up_proj.device.type, dtype)) or ("grouped", {}),
    )
    model = tiny()
    choices = trainer_module.choose_numerics(model, settings(device="auto"))
    assert (choices.device, choices.dtype, choices.expert_kernel) == ("fake", "bfloat16", "grouped")
    assert seen == [("dtype", "fake"), ("kernel", "fake", torch.bfloat16)]
    known = files.read_json(files.cache_dir("probes") / "answers.json")
    assert sorted(key.split(" torch-")[1].split(" ", 1)[1].split(" MoE")[0] for key in known) == [
        "dtype fake", "experts fake bfloat16",
    ]
    placed = tiny().place("auto")  # a model that is loaded is asked about in the same way
    assert (placed.compute_dtype, {block.kernel for block in placed.moe_blocks}) == (torch.bfloat16, {"grouped"})
    assert (tiny().place("cpu").compute_dtype, tiny().place("cpu").moe_blocks[0].kernel) == (torch.float32, "loop")


def test_a_busy_machine_does_not_choose_the_kernel(monkeypatch):
    "grouped is 1.3 times faster, but the first rounds are disturbed: rounds go on until the answer is clear."
    clock, turns = SimpleNamespace(now=0.0), {"loop": 0, "grouped": 0}
    plain = moe.mix_experts

    def slow(hidden, routing, gate_up, down, act, kernel, gate_scale):
        turns[kernel] += 1
        busy = kernel == "grouped" and turns[kernel] < 8
        clock.now += (0.013 if kernel == "loop" else 0.010) * (1.5 if busy else 1.0)
        return plain(hidden, routing, gate_up, down, act, kernel, gate_scale)

    monkeypatch.setattr(moe, "mix_experts", slow)
    monkeypatch.setattr(moe, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    name, best = moe.faster_kernel(tiny().moe_blocks[0], 16)
    assert (name, turns["grouped"] > 8) == ("grouped", True)
    assert (round(best["loop"], 3), round(best["grouped"], 3)) == (13.0, 10.0)
    monkeypatch.setattr(moe, "_GROUPED_MM", None)  # another torch
    turns["grouped"] = 8
    assert moe.faster_kernel(tiny().moe_blocks[0], 16)[0] == "loop"
    monkeypatch.setattr(moe, "mix_experts", plain)
    with pytest.raises(UsageError, match="no grouped matrix product.*set_expert_kernel"):
        tiny_grouped = tiny()
        tiny_grouped.set_expert_kernel("grouped")
        try:
            tiny_grouped.encode([product.item("mm") for product in shop(2)])
        except UsageError as error:
            raise UsageError(str(error)) from error


@pytest.mark.parametrize("which", few(["those that name it", "all"], "those that name it"))
def test_every_module_is_imported_without_fcntl(root, which):
    "As on Windows."
    names = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in sorted((root / "moon2_lab").rglob("*.py"))
        if path.stem != "__init__" and (which == "all" or "fcntl" in path.read_text(encoding="utf-8"))
    ]
    assert "moon2_lab.files" in names
    code = "import importlib, sys; sys.modules['fcntl'] = None\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]


def test_encode_uses_the_chosen_dtype_on_a_device_and_float32_on_the_cpu(fake):
    items = [product.item("mm") for product in shop(6)]
    here = tiny(perturbed=True)
    expected = here.encode(items)
    there = tiny(perturbed=True).place("auto")
    assert np.abs(there.encode(items) - expected).max() < 1e-6  # attention is put together from other parts there
    there.place("auto", "bfloat16")
    assert 1e-5 < np.abs(there.encode(items) - expected).max() < 0.03
    here.compute_dtype = torch.bfloat16
    assert np.array_equal(here.encode(items), expected)


# ---------------------------------------------------------------------------------------------- training


def trained(**changes):
    trainer = Trainer(
        tiny(), shop(40, mixed=True), settings(device="auto", max_steps=3, filter_warmup_ratio=0.0, **changes)
    )
    trainer.train()
    return trainer


def test_training_runs_on_the_device_and_agrees_with_the_cpu(fake, monkeypatch):
    with counted():
        there = trained()
        assert sum(fake_device.calls.values()) > 5000
    places = {parameter.device.type for parameter in there.encoder.parameters()}
    state = {
        value.device.type for entry in there.optimizer.state.values() for name, value in entry.items() if name != "step"
    }
    assert places == state == {"fake"} and there.choices.device == "fake"
    without_device(monkeypatch)
    here = trained()
    assert here.encoder.backbone.device.type == "cpu"
    assert abs(there.table().loss[0] - here.table().loss[0]) < 1e-5
    assert np.allclose(there.table().loss, here.table().loss, rtol=1e-4)  # AdamW is fused on the CPU


STEPS = {
    "plain": {}, "negatives": {"negatives_per_query": 3, "intra_symmetric": True, "intra_negatives": "batch"},
    "paper": {"preset": "paper"}, "filter on intra": {"filter_on_intra": True, "omega_routing": "shared"},
    "lora": {"lora_r": 4, "lora_alpha": 8}, "checkpointing": {"gradient_checkpointing": True},
    "prefixes": {"matryoshka_dims": (8, 16), "negatives_per_query": 2},
}


def whole_step(trainer):
    "The waits of the trainer's second step, all it does between two steps included; and its row of the history."
    trainer.prepare_features()
    for _ in PHASES:
        next(trainer)
    with counted() as waits:
        *_, last = (next(trainer) for _ in PHASES)
    assert last.phase == "step"
    return waits, last.data["row"]


@pytest.mark.parametrize("kernel", few(["loop", "grouped"], "grouped"))
@pytest.mark.parametrize("case", few(STEPS, "paper", "checkpointing", "prefixes"))
def test_a_step_waits_for_the_device_once(fake, case, kernel):
    """All numbers come in one copy. The kernel `loop` has to know the size of each expert's block, in every layer; so
    has `grouped` in float32, which is no single product there."""
    dtype = "float32" if kernel == "loop" else "bfloat16"
    config = settings(device="auto", dtype=dtype, filter_warmup_ratio=0.0, **STEPS[case])
    trainer = Trainer(tiny(), shop(40, mixed=True), config)
    trainer.encoder.set_expert_kernel(kernel)
    waits, row = whole_step(trainer)
    layers = len(trainer.encoder.moe_blocks)
    most = 2 * layers if config.gradient_checkpointing else layers  # layers may be run again
    assert trainer.ledger.down_weighted and (trainer.ledger.masked or case == "paper")  # there was much to note
    assert row["loss_aux"] > 0  # load balance
    assert list(waits) == ["copy to cpu"]
    assert waits["copy to cpu"] == 1 if kernel == "grouped" else layers < waits["copy to cpu"] <= 1 + most
    assert layers <= fake_device.calls["sort"] <= most, "only tokens are sorted there, by expert: no gates, no keys"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        slow("qwen3_vl", {}), slow("gemma3", {}), slow("qwen3_5", {}), ("qwen3_vl", {"experts": "lowrank"}),
        slow("qwen3_vl_moe", {"experts": "native"}),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("experts", "full"),
)
@pytest.mark.filterwarnings("ignore:the encoder was made otherwise")
def test_a_step_of_a_model_of_transformers_waits_once(fake, tmp_path, family, fields):
    "Positions with three axes, pictures as blocks, windows, states, levels, each kind of experts."
    encoder = Moon2Encoder.from_backbone(str(tiny_model(family, tmp_path / family)), **{"experts": "full"} | fields)
    config = settings(device="auto", dtype="bfloat16", filter_warmup_ratio=0.0, per_device_train_batch_size=4)
    trainer = Trainer(encoder, shop(20, mixed=True), config)
    trainer.encoder.set_expert_kernel("masked" if fields.get("experts") == "lowrank" else "grouped")
    waits, row = whole_step(trainer)
    assert len(encoder.moe_blocks) == 4 and dict(waits) == {"copy to cpu": 1} and np.isfinite(row["loss"])


OTHER_RECIPES = {"unaligned": recipes.UnalignedObjective} | {
    name: rival.objective for name, rival in recipes.RIVALS.items()
}


@pytest.mark.parametrize("name", few(OTHER_RECIPES, "unaligned", "agcl"))
def test_a_step_of_another_recipe_waits_once(fake, name):
    config = settings(device="auto", dtype="bfloat16", filter_warmup_ratio=0.0)
    trainer = Trainer(tiny(), shop(40, mixed=True), config, objective=OTHER_RECIPES[name](config))
    trainer.encoder.set_expert_kernel("grouped")
    waits, row = whole_step(trainer)
    assert dict(waits) == {"copy to cpu": 1} and np.isfinite(row["loss"])


def test_an_objective_that_reads_numbers_is_noticed(fake):
    "The proof that the count sees what happens inside of a step."

    class Curious(Moon2Objective):
        def __call__(self, views, routing, keys):
            self.seen = {name: x.tolist() for name, x in super().__call__(views, routing, keys).items()}
            return super().__call__(views, routing, keys)

    config = settings(device="auto", dtype="bfloat16")
    trainer = Trainer(tiny(), shop(40), config, objective=Curious(config))
    trainer.encoder.set_expert_kernel("grouped")
    waits, _ = whole_step(trainer)
    assert waits["copy to cpu"] > 10


def test_numbers_come_to_the_cpu_together_and_unchanged(fake):
    here = [
        torch.tensor(0.1), torch.arange(3) + 2**40, torch.tensor([[True, False]]),
        torch.tensor([0.1], dtype=torch.float64), torch.randn(5).bfloat16(), torch.empty(0),
        torch.randn(4, 3).T, torch.ones(()).expand(2, 2),
    ]
    mixed = [x if n == 1 else x.to(fake) for n, x in enumerate(here)]
    with counted() as waits:
        fetched = step_module._to_host(mixed)
    assert dict(waits) == {"copy to cpu": 1}
    assert [(x.dtype, x.shape) for x in fetched] == [(x.dtype, x.shape) for x in here]
    assert all(torch.equal(x, y) for x, y in zip(fetched, here))


def test_the_masks_of_a_batch_are_computed_once(fake, monkeypatch):
    made = []
    for module in (contrastive, sys.modules["moon2_lab.objective.objective"], recipes):
        monkeypatch.setattr(
            module, "candidate_masks", lambda *a, _make=module.candidate_masks, **k: made.append(1) or _make(*a, **k)
        )
    trainer = Trainer(tiny(), shop(40, mixed=True), settings(device="auto", filter_warmup_ratio=0.0))
    for _ in PHASES:
        next(trainer)
    assert trainer.ledger.masked
    assert len(made) == 5  # query against item; picture and title of positives and of negatives, both ways


def test_masks_are_the_same_wherever_the_keys_are(fake):
    "Made on the CPU and moved, without asking the device; or fetched first, where nobody knows them on the CPU."
    trainer = Trainer(tiny(), shop(40, mixed=True), settings(device="auto"))
    events = {event.phase: event.data for _, event in zip(PHASES, trainer)}
    views, keys = events["views"]["views"], events["batch"]["keys"]
    with counted() as waits:
        known = batch_masks(keys.on_cpu(), views.on_cpu())
        moved = known.to(fake)
    assert not waits and moved.allowed.device.type == "fake"
    alone = TripletViews(views.embedding, views.present)
    for masks in (moved, batch_masks(keys, views), batch_masks(replace(keys, known=None).on_cpu(), alone.on_cpu())):
        for name in ("allowed", "same_key", "repeated"):
            assert torch.equal(getattr(masks, name).cpu(), getattr(known, name))
    for role in "qpn":
        for view in ("t", "i", "mm"):
            assert torch.equal(views.known[role][view], views.present[role][view].cpu())


def test_waits_on_cuda_are_noted_by_line(monkeypatch):
    "As torch's debug mode warns of them, here without cuda; other warnings are not counted."
    modes = []

    def set_mode(mode):
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with noted_waits(torch.device("cuda")) as lines:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"] and list(lines.values()) == [3]
    assert next(iter(lines)).startswith("test_device.py:")
    with noted_waits(torch.device("cpu")) as lines:
        pass
    assert modes == ["warn", "default"] and not lines


LEFT_BEHIND = {
    "indices": (encoder, "to_device", lambda values, device, dtype=None: torch.as_tensor(values, dtype=dtype)),
    "packing": (
        backbone, "pack_rows",
        lambda rows, placing, of_picture, causal, device: _pack(rows, placing, of_picture),
    ),
    "keys": (step_module, "collate", lambda *a, **k: _stuck(*_collate(*a, **k))),
    "features": (
        backbone.Backbone, "vision_tokens",
        lambda self, features: self.connector(features.cpu().to(self.connector[1].weight.dtype)),
    ),
    "masks": (contrastive.CandidateMasks, "to", lambda self, device: self),
}
_pack, _collate = backbone.pack_rows, step_module.collate


class Stuck(torch.Tensor):
    "A tensor that `to` forgets to move."

    def to(self, *args, **kwargs):
        return self.as_subclass(torch.Tensor)


def _stuck(items, keys):
    keys.negative = keys.negative.as_subclass(Stuck)
    return items, keys


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_a_tensor_that_is_left_behind_is_found(fake, monkeypatch, what):
    "The proof that the tests of this file can fail."
    monkeypatch.setattr(*LEFT_BEHIND[what])
    trainer = Trainer(tiny(), shop(40, mixed=True), settings(device="auto"))
    with pytest.raises(RuntimeError, match="same device"):
        trainer.train()


# ---------------------------------------------------------------------------------------------- everything else


def test_vision_works_where_the_weights_are(fake, monkeypatch):
    seen = []
    plain = vision.PatchColours.forward
    monkeypatch.setattr(
        vision.PatchColours, "forward", lambda self, images: seen.append(plain(self, images)[0]) or plain(self, images)
    )
    there = tiny().place("auto").backbone.vision_features([picture(n) for n in range(3)])
    assert seen[0].device.type == "fake"
    without_device(monkeypatch)
    assert np.array_equal(tiny().place("auto").backbone.vision_features([picture(n) for n in range(3)]), there)
    assert seen[1].device.type == "cpu"


def test_the_weights_of_the_vision_encoder_move(fake, monkeypatch):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fold = torch.nn.Conv2d(3, 1280, 8, 8)

        def extract_features(self, pixels):
            return self.fold(pixels)

    monkeypatch.setattr(vision.EfficientNetLite0, "_build", lambda self: Small().eval().requires_grad_(False))
    frozen = vision.EfficientNetLite0(image_size=32, visual_tokens=4)
    images = [picture(n).load() for n in range(2)]
    expected, _ = frozen(images)
    assert expected.device.type == "cpu"
    there, _ = frozen.to(fake)(images)
    assert there.device.type == "fake" and frozen.network.fold.weight.device.type == "fake"
    assert torch.equal(there.cpu(), expected)


def test_scores_with_their_baselines(fake, monkeypatch):
    model, catalog = tiny(perturbed=True).place("auto"), shop(40)
    fresh = []
    made = Moon2Encoder.untrained
    monkeypatch.setattr(Moon2Encoder, "untrained", lambda self: fresh.append(made(self)) or fresh[-1])
    there = evaluate(model, catalog, "valid", resamples=0)
    assert fresh[0].backbone.device.type == "fake"
    without_device(monkeypatch)
    here = evaluate(tiny(perturbed=True), catalog, "valid", resamples=0)
    for name in ("directions", "trivial", "classification", "attributes"):
        assert_alike(there[name], here[name])


def assert_alike(there, here, gap=1e-5):
    "Equal, numbers to `gap`."
    if isinstance(there, dict):
        assert there.keys() == here.keys()
        for name in there:
            assert_alike(there[name], here[name], gap)
    elif isinstance(there, (list, tuple)):
        assert len(there) == len(here)
        for one, other in zip(there, here):
            assert_alike(one, other, gap)
    else:
        assert there == here or isinstance(there, float) and abs(there - here) < gap, (there, here)


def run(words, capsys):
    "The facts of a command, and how many operations ran on the device."
    capsys.readouterr()
    with counted():
        assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out), sum(fake_device.calls.values())


def without_times(value):
    "Facts that do not depend on the clock or on the folder."
    if isinstance(value, dict):
        return {
            name: without_times(item)
            for name, item in value.items()
            if "second" not in name and name not in ("page", "timing", "vectors", "collections")
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def model_folders(tmp_path):
    for seed in (1, 2):
        tiny(perturbed=True, num_layers=seed).save_pretrained(tmp_path / f"model-{seed}")
    return tmp_path / "model-1", tmp_path / "model-2"


def test_every_command_runs_its_model_there_and_says_what_it_says_on_the_cpu(
    fake, monkeypatch, tmp_path, drawn_catalogue, model_folders, capsys
):
    one, two = model_folders
    commands = {
        "eval": ["eval", one, "--catalog", drawn_catalogue],
        "embed": ["embed", one, "--catalog", drawn_catalogue, "--out", "{out}/vectors.parquet"],
        "index": ["index", "{out}/vectors.parquet", "--uri", "{out}/vectors.db"],
        "search": ["search", one, "--uri", "{out}/vectors.db", "--text", "red bag"],
        "heatmap": [
            "heatmap", one, "--catalog", drawn_catalogue, "--query", "red cotton bag", "--item-text", "a red bag",
            "--method", "ig,attention", "--quick", "--out", "{out}/map.html",
        ],
        "compare": ["compare", one, two, "--catalog", drawn_catalogue, "--out", "{out}/diff.html", "--explain", "0"],
    }
    answers = {}
    for place in ("fake", "cpu"):
        (tmp_path / place).mkdir()
        for name, words in commands.items():
            answers[place, name], operations = run([str(word).format(out=tmp_path / place) for word in words], capsys)
            assert (operations > 0) == (place == "fake" and name != "index"), name
        without_device(monkeypatch)
    for name in commands:
        assert_alike(without_times(answers["fake", name]), without_times(answers["cpu", name]))


@pytest.mark.parametrize("methods", [pytest.param(METHODS[:2], marks=pytest.mark.slow), METHODS[2:]], ids="-".join)
@pytest.mark.parametrize("double", few([True, False], False), ids=["float64", "no float64"])
def test_every_kind_of_heatmap(fake, monkeypatch, double, methods):
    "Also where the device has no float64, as mps has none."
    from moon2_lab.explain import attention
    from moon2_lab.explain.explainer import Explainer

    query, item = Item("red box", picture(0), "q"), Item("a box", picture(1), "p")
    small = {"perturbed": True, "num_layers": 1, "visual_tokens": 1}
    expected = Explainer(tiny(**small), query, item, "model", redrawn=False, trials=0).maps(methods)
    if not double:
        monkeypatch.setattr(fake_device, "no_double", [True])
        for module in (attention_recorder, attention):
            monkeypatch.setattr(module, "widest", lambda device: torch.float32)
    with counted():
        found = Explainer(tiny(**small).place("auto"), query, item, "model", redrawn=False, trials=0).maps(methods)
        assert sum(fake_device.calls.values()) > 300
    for side in ("query", "item"):
        for method in methods:
            one, other = (getattr(pair, side).maps[method].patches for pair in (found, expected))
            assert np.allclose(one, other, atol=1e-5), (side, method)


def test_a_device_without_float64_refuses_it(fake, monkeypatch):
    "The other test would fail if something were left in float64."
    monkeypatch.setattr(fake_device, "no_double", [True])
    with pytest.raises(TypeError, match="float64"):
        attention_recorder.row_mean(torch.tensor([0, 1], device=fake), 3)


@pytest.mark.slow
def test_the_demo_searches_and_explains_there(fake, monkeypatch, drawn_catalogue, model_folders):
    from moon2_lab.app.interface import prepare

    def answers():
        shop_of = prepare(*model_folders, drawn_catalogue, "test").service
        assert {model.encoder.backbone.device.type for model in shop_of.models.values()} == {runtime.pick_device().type}
        hits = shop_of.search("red bag", None)
        return hits, shop_of.heatmap("red bag", None, next(iter(hits.values()))[0]["product_id"])

    there = answers()
    without_device(monkeypatch)
    for one, other in zip(there, answers(), strict=True):
        assert_alike(without_times(one), without_times(other))


# ---------------------------------------------------------------------------------------------- a real one


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu(tmp_path, monkeypatch, drawn_catalogue, capsys):
    """Train a few steps, score, embed, search, heatmap on cuda. In float32 losses agree with the CPU to 1 %, embeddings
    to 0.001 (dot product), and
    at least 9 of 10 hits are the same."""
    words = [
        "--set", "num_layers=2", "image_size=64", "visual_tokens=4", "max_steps=6", "per_device_train_batch_size=8",
        "dtype=float32",
    ]
    found = {}
    for device in ("cuda", "cpu"):
        monkeypatch.setenv("MOON2_CACHE", str(tmp_path / f"cache-{device}"))
        out = tmp_path / device
        out.mkdir()
        assert (
            main(
                [
                    "train", "--catalog", str(drawn_catalogue), "--out", str(out / "run"), "--backbone", "tiny",
                    "--device", device, *words,
                ]
            )
            == 0
        )
        capsys.readouterr()
        model = str(tmp_path / "cuda" / "run")  # one model for both
        on = ["--device", device, "--json"]
        for name, command in {
            "eval": ["eval", model, "--catalog", str(drawn_catalogue)],
            "embed": ["embed", model, "--catalog", str(drawn_catalogue), "--out", str(out / "vectors.parquet")],
            "index": ["index", str(out / "vectors.parquet"), "--uri", str(out / "vectors.db")],
            "search": ["search", model, "--uri", str(out / "vectors.db"), "--text", "red bag"],
            "heatmap": [
                "heatmap", model, "--catalog", str(drawn_catalogue), "--query", "red bag", "--item-text", "a red bag",
                "--method", ",".join(METHODS), "--quick", "--out", str(out / "map.html"),
            ],
        }.items():
            assert main([*command, *([*on] if name != "index" else ["--json"])]) == 0
            found[device, name] = json.loads(capsys.readouterr().out)
        import pandas as pd

        found[device, "history"] = pd.read_parquet(out / "run" / "history.parquet")
        found[device, "vectors"] = np.stack(pd.read_parquet(out / "vectors.parquet").vector)
    there, here = (
        {name: found[device, name] for name in ("history", "vectors", "search", "eval", "heatmap")}
        for device in ("cuda", "cpu")
    )
    assert np.allclose(there["history"].loss, here["history"].loss, rtol=0.01)
    assert ((there["vectors"] * here["vectors"]).sum(1) > 0.999).all()
    hits = [{hit["product_id"] for hit in side["search"]["hits"]} for side in (there, here)]
    assert len(hits[0] & hits[1]) >= 9
    assert abs(there["heatmap"]["score"] - here["heatmap"]["score"]) < 1e-3
