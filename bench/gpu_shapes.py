"""One training step of published model shapes on a GPU: tokens a second, share of the measured matrix-product peak,
memory beside the prediction, how often a step waits.

The models are built from their published configs with random weights (speed and memory do not depend on the values):
decoder frozen in bfloat16, low-rank experts in every layer, LoRA on attention, gradient checkpointing. Picture features
are random, so the vision encoder does not run. `--device cpu --quick` only shows that it runs.

    python bench/gpu_shapes.py --json shapes.json
    python bench/gpu_shapes.py --shapes Qwen2.5-VL-3B --triplets 64
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import catalogue, finish, give_features, noted_waits, options, own_cache, spread, start
from moon2_lab.config import TrainConfig
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.runtime import device_name, pick_device
from moon2_lab.tiny_models import published_config, tiny_model
from moon2_lab.training.trainer import Trainer

KINDS = {"Qwen2.5-VL-3B": ("qwen2_5_vl", 336), "Qwen3-VL-2B": ("qwen3_vl", 384), "Qwen3-VL-8B": ("qwen3_vl", 384)}


def shape_folder(name: str, folder: Path, quick: bool) -> tuple[Path, int]:
    "A model folder of a published shape without weights, and the pixels of a picture (144 tokens)."
    kind, pixels = KINDS[name]
    tiny_model(kind, folder)
    if quick:
        return folder, 112 if kind == "qwen2_5_vl" else 128
    (folder / "model.safetensors").unlink()
    published_config(name).save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    settings["size"] = {"shortest_edge": 56 * 56, "longest_edge": 1024 * 1024}
    path.write_text(json.dumps(settings))
    return folder, pixels


def matmul_peak(device: torch.device, side: int = 8192, repeats: int = 10) -> float:
    "Floating-point operations a second of a bfloat16 matrix product: the median of `repeats`."
    side = side if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        synchronize(device)
        begun = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return 2 * side**3 / spread(seconds[3:])["median"]


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def products_per_token(encoder: Moon2Encoder) -> float:
    "Multiply-adds of one token's forward pass through the decoder's linear layers, low-rank experts included."
    decoder, active = encoder.backbone.decoder, encoder.config.top_k / max(encoder.config.num_experts, 1)
    total = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, torch.nn.Linear))
    total += sum(
        p.numel() * active for block in encoder.moe_blocks for name, p in block.named_parameters(recurse=False)
        if p.dim() == 3
    )
    return float(total)


def measure(name: str, args, device: torch.device) -> dict:
    "The figures of one shape."
    with tempfile.TemporaryDirectory() as folder:
        path, pixels = shape_folder(name, Path(folder), args.quick)
        fields = {
            "image_size": pixels, "num_experts": 4, "top_k": 2, "experts": "lowrank", "expert_rank": 16,
            "weights_dtype": "bfloat16", "max_text_tokens": 64, "num_layers": 0,
        }
        begun = time.perf_counter()
        encoder = Moon2Encoder.from_backbone(str(path), pretrained=False, device=device, **fields)
        built = time.perf_counter() - begun
        config = TrainConfig(
            backbone=str(path), device=str(device), dtype="bfloat16", max_steps=1000, num_threads=args.threads,
            per_device_train_batch_size=args.triplets, lora_r=16, gradient_checkpointing=True, filter_warmup_ratio=0.0,
            **fields,
        )
        trainer = Trainer(encoder, catalogue(args, products=max(100, 3 * args.triplets)), config)
        give_features(encoder, {ref.key: ref for ref in trainer.needed_images()}.values())
        return {"shape": name, "build_seconds": round(built, 1)} | timed_steps(trainer, args, device)


def timed_steps(trainer: Trainer, args, device: torch.device) -> dict:
    "Seconds, tokens, memory and waits of a few steps after two that warm up."
    plan = trainer.plan()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, begun = [], time.perf_counter()
    for event in trainer:
        if event.phase == "step":
            synchronize(device)
            seconds.append(time.perf_counter() - begun)
            if len(seconds) == args.repeats + 2:
                break
            begun = time.perf_counter()
    if args.profile:
        profile(trainer, device)
    with noted_waits(device) as waits:
        for event in trainer:
            if event.phase == "step":
                break
    tokens, encoder = trainer.history[-1]["tokens"], trainer.encoder
    median = spread(seconds[2:])["median"]
    work = 6 * products_per_token(encoder) * tokens  # forward, again forward, gradients of activations: 2 each
    peak = matmul_peak(device)
    result = {
        "kernel": encoder.moe_blocks[0].kernel, "tokens_per_step": tokens,
        "step_seconds": spread(seconds[2:]), "tokens_per_second": tokens / median,
        "teraflops": work / median / 1e12, "matmul_peak_teraflops": peak / 1e12, "share_of_peak": work / median / peak,
        "parameters": plan["parameters"], "parameters_trained": plan["parameters_trained"],
        "predicted_memory_mb": plan["predicted_memory_mb"], "waits_per_step": sum(waits.values()),
        "waits": dict(waits.most_common(12)), "losses": [round(row["loss"], 4) for row in trainer.history],
    }
    if device.type == "cuda":
        result["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    print(json.dumps(result, indent=1), flush=True)
    return result


def profile(trainer: Trainer, device: torch.device) -> None:
    "Print where one step spends its time: on the device by kernel, on the CPU by function."
    import cProfile
    import io
    import pstats

    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=kinds) as kernels:
        one_step(trainer, device)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(kernels.key_averages().table(sort_by=key, row_limit=24, max_name_column_width=60))
    calls = cProfile.Profile()
    calls.enable()
    one_step(trainer, device)
    calls.disable()
    text = io.StringIO()
    pstats.Stats(calls, stream=text).sort_stats("tottime").print_stats(18)
    print("\n".join(line[:130] for line in text.getvalue().splitlines()))


def one_step(trainer: Trainer, device: torch.device) -> None:
    for event in trainer:
        if event.phase == "step":
            synchronize(device)
            return


def main() -> int:
    parser = options(__doc__, repeats=6)
    parser.add_argument("--device", default="auto", help="cuda; cpu with --quick")
    parser.add_argument("--shapes", nargs="+", default=list(KINDS)[:2], choices=list(KINDS))
    parser.add_argument("--triplets", type=int, default=64, help="of a step")
    parser.add_argument("--profile", action="store_true", help="also print where a step spends its time")
    args = parser.parse_args()
    device = pick_device(args.device)
    result = start(args) | {"benchmark": "gpu_shapes", "device": device_name(device), "shapes": []}
    args.triplets = 4 if args.quick else args.triplets
    with own_cache("tiny"):
        for name in args.shapes:
            result["shapes"].append(measure(name, args, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    finish(args, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
