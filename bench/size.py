"""What grows with the size of a catalogue, and how: `data check`, loading (first and second), triplets with hard
negatives, an epoch of batches, the feature cache, embedding, evaluation.

Made-up products with a picture of their own each (8 x 8 pixels, in tars), five categories, some without attributes, one
category of a third of all products; the backbone tiny with one layer. Each size runs in a process of
its own, with a cache of its own. Seconds are the processor's, over all threads, and memory is the highest resident size
of each phase. The exponent is the slope of log seconds over log products: 1 is linear, 2 is the square.
Goal: at most 1.1 for each phase. The scores of all queries against all products (Q x G numbers, a tenth of the products
each) are the square by nature and stand apart.

    python bench/size.py                            # 10,000, 50,000 and 200,000 products: most of an hour
    python bench/size.py --sizes 2000 8000          # some minutes
"""
import argparse
import io
import json
import math
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

GOAL = 1.1
SQUARE = ("scores",)  # phases that the goal does not hold for
PHASES = ("data check", "load again", "triplets", "batches", "feature cache", "embed", "evaluate", "scores")


def picture(number: int) -> bytes:
    "A PNG of 8 x 8 pixels that no other product has."
    from PIL import Image

    image = Image.new("RGB", (8, 8), (number % 251, number // 251 % 251, 90))
    image.putpixel((0, 0), (number & 255, number >> 8 & 255, number >> 16 & 255))
    held = io.BytesIO()
    image.save(held, "PNG")
    return held.getvalue()


def write_catalogue(folder: Path, products: int) -> None:
    "products.parquet and tars of 10,000 pictures."
    import pandas as pd

    colours, things = ("red", "blue", "green", "black"), ("Mug", "Bowl", "Chair", "Lamp", "Shoe", "Shoe", "Shoe")
    rows = []
    for i in range(products):
        thing, colour = things[i * 31 % 7], colours[i * 17 % 4]
        split = ("train", "valid", "test")[max(0, i % 10 - 7)]
        attributes = {} if i % 5 == 0 else {"colour": colour, "code": str(i % 9)}
        rows.append(
            (
                f"p{i:07}", f"Nordhollow {colour} {thing} number {i}", "Goods", thing, json.dumps(attributes),
                json.dumps([f"images/{i:07}.png"]), split,
            )
        )
    pd.DataFrame(
        rows, columns=["product_id", "title", "category_l1", "category_l2", "attributes", "image_paths", "split"]
    ).to_parquet(folder / "products.parquet")
    for start in range(0, products, 10_000):
        with tarfile.open(folder / f"images-{start // 10_000:02}.tar", "w") as tar:
            for i in range(start, min(products, start + 10_000)):
                data, entry = picture(i), tarfile.TarInfo(f"images/{i:07}.png")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))


def timed(name: str, work: Callable[[], object], found: dict) -> object:
    "Run a phase; its processor seconds (also of child processes), wall seconds and highest memory go into `found`."
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = os.times(), time.perf_counter()
    result = work()
    after = os.times()
    peak = next(
        (
            int(line.split()[1]) / 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ),
        0.0,
    )
    found[name] = {
        "seconds": sum(after[:4]) - sum(before[:4]), "wall": time.perf_counter() - begun,
        "memory_mb": max(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    return result


def measure(folder: Path, products: int, queries: int) -> dict:
    "All phases for one size, in this process."
    import numpy as np

    from moon2_lab.cli.main import main
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.data.sampler import TripletSampler
    from moon2_lab.data.triplets import build_triplets
    from moon2_lab.evaluation.evaluate import evaluate
    from moon2_lab.evaluation.ranking import ranks_chunked
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.retrieval.embed import embed_catalog

    found: dict = {}
    with open(os.devnull, "w") as nowhere:
        sys.stdout, kept = nowhere, sys.stdout
        try:
            timed(
                "data check", lambda: main(["data", "check", str(folder)]), found
            )  # the first look: pictures are decoded
        finally:
            sys.stdout = kept
    catalog = timed("load again", lambda: Catalog.load(folder), found)
    triplets = timed("triplets", lambda: build_triplets(catalog.split("train"), variants=2, paired=True), found)
    timed("batches", lambda: TripletSampler(triplets, 32, paired=True).batches(0), found)
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=1, image_size=32, visual_tokens=4).eval()
    timed(
        "feature cache",
        lambda: [
            encoder.vision_features([product.image_ref() for product in catalog[start : start + 256]])
            for start in range(0, len(catalog), 256)
        ],
        found,
    )
    timed("embed", lambda: embed_catalog(encoder, catalog, folder.parent / "vectors.parquet"), found)
    timed("evaluate", lambda: evaluate(encoder, catalog, "test", limit=queries or None, resamples=100), found)
    count, rng = products // 10, np.random.default_rng(0)
    rows = rng.standard_normal((count, 64)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    timed("scores", lambda: ranks_chunked(rows, rows, np.arange(count), np.arange(count)), found)
    return found


def one_size(products: int, queries: int) -> dict:
    "The figures of one size, from a process of its own."
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "shop"
        folder.mkdir()
        write_catalogue(folder, products)
        command = [sys.executable, __file__, "--inside", str(folder), str(products), str(queries)]
        done = subprocess.run(
            command, env={**os.environ, "MOON2_CACHE": str(Path(home) / "cache")}, stdout=subprocess.PIPE, text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])


def exponent(sizes: list[int], values: list[float]) -> float:
    "Slope of log values over log sizes, by least squares; NaN for a single size."
    xs, ys = [math.log(size) for size in sizes], [math.log(max(value, 1e-3)) for value in values]
    middle, level = sum(xs) / len(xs), sum(ys) / len(ys)
    width = sum((x - middle) ** 2 for x in xs)
    return sum((x - middle) * (y - level) for x, y in zip(xs, ys)) / width if width else math.nan


def table(sizes: list[int], figures: list[dict]) -> tuple[str, dict]:
    "(a table for a reader, phase -> exponents)."
    lines = [f"{'':<14}" + "".join(f"{size:>12,} s {'MB':>7}" for size in sizes) + f"{'exponent':>10}"]
    exponents = {}
    for phase in PHASES:
        seconds, memory = ([entry[phase][name] for entry in figures] for name in ("seconds", "memory_mb"))
        exponents[phase] = {"seconds": round(exponent(sizes, seconds), 3), "memory": round(exponent(sizes, memory), 3)}
        said = (
            "square by nature"
            if phase in SQUARE
            else "reached"
            if exponents[phase]["seconds"] <= GOAL
            else "NOT reached"
        )
        lines.append(
            f"{phase:<14}"
            + "".join(f"{s:>14.2f} {m:>7.0f}" for s, m in zip(seconds, memory))
            + f"{exponents[phase]['seconds']:>10.2f}  {said}"
        )
    return "\n".join(lines), exponents


def main() -> None:
    if sys.argv[1:2] == ["--inside"]:
        print(json.dumps(measure(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 50_000, 200_000], help="products")
    parser.add_argument(
        "--queries", type=int, default=1000,
        help="test products that are evaluated, the same number at each size; 0 = all (then the square of the test "
             "split is in it)",
    )
    parser.add_argument("--json", help="also write the JSON object to this file")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: other programs are running (load {load:.1f})", file=sys.stderr)
    figures = []
    for size in args.sizes:
        figures.append(one_size(size, args.queries))
        print(f"{size:,} products done", file=sys.stderr)
    text, exponents = table(args.sizes, figures)
    print(text)
    result = {
        "sizes": args.sizes, "figures": figures, "exponents": exponents, "goal": GOAL, "load_at_start": round(load, 2),
        "load_at_end": round(os.getloadavg()[0], 2),
    }
    if args.json:
        Path(args.json).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
