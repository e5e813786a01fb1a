"""What the benchmarks share: arms that take turns in one process, ratios of medians, a catalogue, random vision
features.

Two arms are compared in the same run, on the same work, in alternating order. Ratios say something about the code;
seconds say something about the machine, and a busy machine makes both worthless:
the load is printed with every result."""
import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

TINY = {"image_size": 32, "visual_tokens": 4}


def options(about: str, **defaults) -> argparse.ArgumentParser:
    "A parser with the options that all benchmarks have."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--catalog",
        help="catalogue folder; without it products are invented (titles of moon2 data synth, no pictures drawn)",
    )
    parser.add_argument("--backbone", default="mini", help="mini or tiny (default mini)")
    parser.add_argument(
        "--repeats", type=int, default=defaults.get("repeats", 7), help="timed rounds, at least 5 for a result"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", nargs="+", default=defaults.get("dtype", ["float32"]), choices=["float32", "bfloat16"]
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, two rounds: does it run? The figures mean nothing"
    )
    parser.add_argument("--json", help="also write the JSON object to this file")
    return parser


@contextlib.contextmanager
def noted_waits(device: torch.device) -> Iterator[Counter]:
    """Yield a Counter of the lines at which the program waits for a CUDA device in the block, as torch notes them:
    filled when the block ends. Of another device nothing is noted."""
    lines: Counter = Counter()
    if device.type != "cuda":
        yield lines
        return
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield lines
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = (note for note in notes if "synchronizing CUDA operation" in str(note.message))
    lines.update(f"{Path(note.filename).name}:{note.lineno}" for note in waits)


def start(args) -> dict:
    "Set the threads; returns what every result says about the run."
    torch.set_num_threads(args.threads)
    if args.quick:
        args.backbone, args.repeats = "tiny", 2
    load = os.getloadavg()[0]
    if load > 0.5:
        print(
            f"warning: other programs are running (load {load:.1f}); timings with {args.threads} threads cannot be "
            f"trusted",
            file=sys.stderr,
        )
    run = {"backbone": args.backbone, "threads": torch.get_num_threads(), "repeats": args.repeats, "quick": args.quick}
    return run | {
        "load_at_start": round(load, 2), "torch": torch.__version__,
        "catalog": Path(args.catalog).name if args.catalog else "invented",
    }


def finish(args, result: dict) -> None:
    "The JSON object, last on stdout."
    text = json.dumps(result)
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)


# ---------------------------------------------------------------------------------------------- timing


def take_turns(arms: dict[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    "Seconds of each arm in each round. The order turns by one arm and is reversed from round to round."
    seconds = {name: [] for name in arms}
    names = list(arms)
    for number in range(-warmup, repeats):
        shift = number % len(names)
        order = (names[shift:] + names[:shift])[:: 1 if number % 2 else -1]
        for name in order:
            begun = time.perf_counter()
            arms[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def spread(values: list[float]) -> dict:
    "Median, smallest and largest."
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(above: list[float], below: list[float]) -> dict:
    "Ratio of the medians, and the smallest and largest ratio within a round."
    rounds = [a / b for a, b in zip(above, below, strict=True)]
    return {"ratio": median(above) / median(below), "round_min": min(rounds), "round_max": max(rounds)}


def verdict(value: float, target: float, at_least: bool, quick: bool = False) -> str:
    if quick:
        return "quick run, no verdict"
    return "reached" if (value >= target if at_least else value <= target) else "NOT reached"


def told(name: str, found: dict) -> str:
    return f"{name} {found['ratio']:.3f} (rounds {found['round_min']:.3f} to {found['round_max']:.3f})"


# ---------------------------------------------------------------------------------------------- material


@contextlib.contextmanager
def own_cache(backbone: str) -> Iterator[Path]:
    """A cache folder for random features; fetched model parts and examined pictures are taken from the user's, measured
    choices are not.
    """
    from moon2_lab.files import cache_dir
    from moon2_lab.model.backbone import mini_assets

    if backbone == "mini":
        mini_assets()
    before, shared = os.environ.get("MOON2_CACHE"), {name: cache_dir(name) for name in ("backbones", "images")}
    with tempfile.TemporaryDirectory() as folder:
        for name, target in shared.items():
            (Path(folder) / name).symlink_to(target.resolve())
        os.environ["MOON2_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            os.environ.pop("MOON2_CACHE") if before is None else os.environ.update(MOON2_CACHE=before)


def catalogue(args, products: int):
    """The catalogue of --catalog, or invented products: drawn titles and attributes, three pictures each that exist by
    key only.
    """
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.data.images import ImageRef
    from moon2_lab.data.products import Product
    from moon2_lab.data.synthetic.generator import describe, make_title
    from moon2_lab.files import sha256_hex

    if args.catalog:
        return Catalog.load(args.catalog)

    def refs(number):
        keys = [sha256_hex(f"bench {number} {place}".encode()) for place in range(1 + number % 3)]
        return tuple(ImageRef(key, _no_picture, key) for key in keys)

    def invented(number):
        facts = describe(0, number)
        return Product(
            facts.product_id, make_title(facts, number % 7), None, *facts.category, facts.attributes, split=facts.split,
            refs=refs(number),
        )

    return Catalog.from_products([invented(number) for number in range(products)])


def _no_picture():
    raise RuntimeError("a benchmark must not look at pictures: give its features first")


def give_features(encoder, refs) -> int:
    """Random vision features for `refs`, so that the vision tower never runs: its speed is not what is measured.
    Returns how many were new.
    """
    store, keys = encoder.backbone.features, encoder.backbone._keys(list(refs))
    places = store.missing(keys)
    size, together = encoder.backbone.vision.picture_size, 128
    shape = min(len(places), together) * size.tokens, store.channels  # drawn once: gigabytes for a large model
    features = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(np.float16) * np.float16(0.5)
    for begin in range(0, len(places), together):
        chunk = places[begin : begin + together]
        store.add([keys[place] for place in chunk], features[: len(chunk) * size.tokens], [size] * len(chunk))
    return len(places)


def make_encoder(args, **fields):
    """An encoder as training uses it: word embeddings of a pretrained backbone frozen, the faster expert kernel of this
    run.
    """
    from moon2_lab.config import TrainConfig
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.training.optim import prepare_trainable

    fields = (TINY if args.backbone == "tiny" else {}) | fields
    encoder = Moon2Encoder.from_backbone(args.backbone, **fields)
    prepare_trainable(encoder, TrainConfig(backbone=args.backbone, lora_r=0))
    return encoder.train()


def choose_kernel(encoder, tokens: int, dtype: torch.dtype) -> str:
    "The rule of training, measured now and not remembered: a benchmark leaves no choices behind."
    from moon2_lab.model.moe import faster_kernel

    if not encoder.moe_blocks:
        return "dense"
    name, _ = faster_kernel(encoder.moe_blocks[0], tokens, dtype=dtype)
    encoder.set_expert_kernel(name)
    return name


def one_batch(args, encoder, triplets: int) -> list:
    "The items of one batch of training triplets (queries, positives, negatives), with their features stored."
    from moon2_lab.data.queries import Lexicon
    from moon2_lab.data.sampler import TripletSampler
    from moon2_lab.data.triplets import build_triplets
    from moon2_lab.training.collate import collate

    catalog = catalogue(args, products=max(200, 8 * triplets))
    train = catalog.split("train")
    found = build_triplets(train, Lexicon(catalog), variants=1, negatives_per_query=1, seed=0, paired=True)
    items, _ = collate(TripletSampler(found, triplets, seed=0, paired=True).batches(0)[0])
    give_features(encoder, {item.image.key: item.image for item in items if item.image is not None}.values())
    return items


def probe_loss(found) -> torch.Tensor:
    "A scalar that gives every embedding a gradient: the score of each view with a fixed random vector."
    generator = torch.Generator().manual_seed(0)
    width = found.embedding["mm"].shape[1]
    return sum((found.embedding[view] @ torch.randn(width, generator=generator)).sum() for view in ("t", "i", "mm"))


def step(encoder, items, **how):
    "Forward and backward of all views; no optimizer."
    encoder.zero_grad(set_to_none=True)
    found = encoder.forward_items(items, **how)
    probe_loss(found).backward()
    return found
