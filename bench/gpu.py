"""What a GPU makes of it: training steps a second in float32 and bfloat16, items embedded a second, memory, and how far
its numbers are from the CPU's.

Runs in a few minutes on a machine with one card. On the CPU alone it says that there is no device and stops; `--device
cpu --quick` only shows that it runs.
NOT RUN YET on a GPU: no figure in this project comes from it.

    python bench/gpu.py --json gpu.json
    python bench/gpu.py --backbone tiny --quick        # without the pretrained parts

Agreement is measured on one model and one batch: the loss of the first step (float32: within 1 % of the CPU's), and the
dot product of the embeddings of the two
devices (float32: at least 0.999; bfloat16: at least 0.98, the usual loss of eight bits of mantissa).
"""

import sys
import time

import numpy as np
import torch
from common import TINY, catalogue, finish, give_features, noted_waits, options, own_cache, spread, start
from moon2_lab.config import TrainConfig
from moon2_lab.errors import UsageError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.runtime import device_name, pick_device
from moon2_lab.training.trainer import Trainer


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def trainer_on(args, catalog, device: torch.device, dtype: str) -> Trainer:
    "A trainer whose vision features are there already."
    fields = TINY if args.backbone == "tiny" else {}
    encoder = Moon2Encoder.from_backbone(args.backbone, pretrained=not args.random_weights, **fields)
    config = TrainConfig(
        backbone=args.backbone, device=str(device), dtype=dtype, max_steps=1_000,
        per_device_train_batch_size=args.triplets, num_threads=args.threads, filter_warmup_ratio=0.0,
    )
    trainer = Trainer(encoder, catalog, config)
    give_features(encoder, {ref.key: ref for ref in trainer.needed_images()}.values())
    return trainer


def take_steps(trainer: Trainer, count: int) -> list[float]:
    "Seconds of each of `count` steps, after two that warm up."
    seconds, begun = [], time.perf_counter()
    for event in trainer:
        if event.phase == "step":
            synchronize(trainer.encoder.backbone.device)
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            if len(seconds) == count + 2:
                return seconds[2:]
    return seconds[2:]


def waits_of_step(trainer: Trainer) -> dict[str, int]:
    "The lines at which one more step of the trainer waits for the device, with how often each does."
    with noted_waits(trainer.encoder.backbone.device) as lines:
        for event in trainer:
            if event.phase == "step":
                break
    return dict(lines.most_common())


def training(args, catalog, device: torch.device, dtype: str) -> dict:
    "Steps a second, tokens a second, memory, waits of a step, and what was chosen."
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer = trainer_on(args, catalog, device, dtype)
    seconds = take_steps(trainer, args.repeats)
    row = trainer.history[-1]
    result = {
        "dtype": dtype, "kernel": trainer.choices.expert_kernel, "step_seconds": spread(seconds),
        "steps_per_second": 1 / spread(seconds)["median"],
    }
    result |= {"tokens_per_step": row["tokens"], "first_loss": trainer.history[0]["loss"]}
    waits = waits_of_step(trainer)
    if device.type == "cuda":
        result["waits_of_step"] = waits
        result["peak_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    print(
        f"training, {dtype}, {result['kernel']}: {result['steps_per_second']:.2f} steps/s, "
        f"{row['tokens'] * result['steps_per_second']:,.0f} tokens/s, {result.get('peak_memory_mb', '-')} MB"
    )
    where = ", ".join(f"{line} {count}x" for line, count in waits.items())
    if device.type == "cuda":
        print(f"  a step waits {sum(waits.values())} times for the device: {where}")
    return result


def embedding(args, catalog, device: torch.device) -> dict:
    "Items a second by dtype, and the agreement of each with float32 on the CPU."
    fields = TINY if args.backbone == "tiny" else {}
    model = Moon2Encoder.from_backbone(args.backbone, pretrained=not args.random_weights, **fields)
    model = perturb_experts(model, 0.02).eval().place("cpu")
    items = [product.item("mm") for product in list(catalog)[: args.items]]
    give_features(model, {item.image.key: item.image for item in items if item.image is not None}.values())
    few = items[: min(len(items), 256)]
    expected = model.encode(few)
    found = {}
    for dtype in args.dtype:
        model.place(device, dtype)
        agreement = (model.encode(few) * expected).sum(1)
        begun = time.perf_counter()
        model.encode(items, batch_size=256)
        rate = len(items) / (time.perf_counter() - begun)
        found[dtype] = {
            "items_per_second": rate, "kernel": model.moe_blocks[0].kernel, "worst_dot_product": float(agreement.min()),
            "mean_dot_product": float(agreement.mean()),
        }
        print(
            f"embedding, {dtype}: {rate:,.0f} items/s; dot product with the CPU's vectors at least "
            f"{agreement.min():.5f}"
        )
    return found


def agreement(args, catalog, losses: dict[str, float]) -> dict:
    "The first loss on the CPU in float32, and how far each dtype of the device is from it."
    here = trainer_on(args, catalog, torch.device("cpu"), "float32")
    take_steps(here, -1)  # one step
    loss = here.history[0]["loss"]
    gaps = {dtype: abs(value - loss) / loss for dtype, value in losses.items()}
    print("first loss against the CPU's: " + ", ".join(f"{dtype} {gap:.2%} apart" for dtype, gap in gaps.items()))
    return {"cpu_first_loss": loss, "relative_gap": gaps, "float32_agrees": gaps.get("float32", 0.0) < 0.01}


def main() -> int:
    parser = options(__doc__, repeats=30, dtype=["float32", "bfloat16"])
    parser.add_argument("--device", default="auto", help="cuda, mps; auto: the fastest there is")
    parser.add_argument("--random-weights", action="store_true", help="the backbone's shape; only its config is read")
    parser.add_argument("--triplets", type=int, default=64, help="of a step")
    parser.add_argument("--items", type=int, default=4_000, help="to embed")
    args = parser.parse_args()
    try:
        device = pick_device(args.device)
        if args.device == "auto" and device.type == "cpu":
            raise UsageError(
                "no GPU on this machine", where="device", advice="--device cpu --quick shows only that the script runs"
            )
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    result = start(args) | {"benchmark": "gpu", "device": device_name(device)}
    args.triplets, args.items = (8, 50) if args.quick else (args.triplets, args.items)
    with own_cache(args.backbone):
        catalog = catalogue(args, products=max(200, args.items))
        result["training"] = [training(args, catalog, device, dtype) for dtype in args.dtype]
        result["agreement"] = agreement(
            args, catalog, {entry["dtype"]: entry["first_loss"] for entry in result["training"]}
        )
        result["embedding"] = embedding(args, catalog, device)
    if not np.isfinite([entry["first_loss"] for entry in result["training"]]).all():
        return 1
    finish(args, result)
    return 0 if result["agreement"]["float32_agrees"] else 1


if __name__ == "__main__":
    sys.exit(main())
