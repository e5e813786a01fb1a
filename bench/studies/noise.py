"""What the filter finds of noise that was put in on purpose, for shares of noise and margin schedules.

    python bench/studies/noise.py --catalog path/to/catalogue --out study --minutes 8 --products 4000 --arms 0.2:0.2:0 0.2:off

An arm is SHARE:START:END (noise, margin at the start and at the end of training) or SHARE:off (filter off). All arms train the same encoder on the same triplets for the same number of steps, which
is found once; each arm's result stands in OUT as soon as it is there, and a second call makes the arms that are missing.
"""
import argparse
import hashlib
import json
import logging
from pathlib import Path

import pandas as pd


def arm_settings(arm: str) -> dict:
    "Config fields of an arm."
    share, *margins = arm.split(":")
    if margins == ["off"]:
        return {"noise": float(share), "filter": False}
    start, end = map(float, margins)
    return {"noise": float(share), "filter_margin_start": start, "filter_margin_end": end}


def chosen_products(catalog, count: int):
    "The train products of the study, the first by a hash of the id."
    from moon2_lab.catalog import Catalog

    train = catalog.split("train")
    if count >= len(train):
        return train
    order = sorted(train, key=lambda product: hashlib.sha256(f"study:{product.product_id}".encode()).digest())
    return Catalog(order[:count], folder=catalog.folder, whole=catalog)


def run_arm(catalog, part, arm: str, config, out: Path, most: int) -> dict:
    "Train one arm; writes its tables; its row."
    from moon2_lab.encoder import Moon2Encoder
    from moon2_lab.evaluate import evaluate
    from moon2_lab.noise import FilterWatch, filter_auc, inject_noise, triplet_gaps
    from moon2_lab.text import Lexicon
    from moon2_lab.train import Trainer
    from moon2_lab.triplets import build_triplets

    config = config.replace(**arm_settings(arm))
    lexicon = Lexicon(catalog)
    clean = build_triplets(part, lexicon, config.query_variants, config.negatives_per_query, config.seed, config.paired_negatives)
    triplets = inject_noise(clean, config.noise, lexicon, config.seed)
    fields = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    trainer = Trainer(encoder, catalog, config.replace(noise=0.0), triplets=triplets)
    watch = FilterWatch(trainer, most=most)
    trainer.callbacks.append(watch)
    trainer.prepare_features()
    history = trainer.train()
    name = arm.replace(":", "_")
    gaps = triplet_gaps(encoder, triplets)
    gaps.to_parquet(out / f"{name}-gaps.parquet")
    filter_auc(gaps).to_parquet(out / f"{name}-auc.parquet")
    watch.table().to_parquet(out / f"{name}-watch.parquet")
    history.to_parquet(out / f"{name}-history.parquet")
    metrics = evaluate(encoder, catalog, split="valid", baselines=False, labels=False)
    recalls = {f"R@10 {direction}": block["R@10"]["value"] for direction, block in metrics["directions"].items()}
    return {"arm": arm, "steps": trainer.step, "minutes": trainer.seconds["steps"] / 60, "noise": triplets.counts, **recalls, "mean R@10": sum(recalls.values()) / len(recalls)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--products", type=int, default=4000)
    parser.add_argument("--watch", type=int, default=600, help="triplets looked at on the way")
    parser.add_argument("--arms", nargs="+", default=["0.2:0.2:0", "0.2:off"])
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.catalog import Catalog
    from moon2_lab.core import TrainConfig
    from moon2_lab.encoder import Moon2Encoder
    from moon2_lab.text import Lexicon
    from moon2_lab.train import Trainer
    from moon2_lab.triplets import build_triplets

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    catalog = Catalog.load(args.catalog)
    part = chosen_products(catalog, args.products)
    config = TrainConfig(**dict(pair.split("=", 1) for pair in args.set) | {"query_variants": 1, "max_minutes": args.minutes})
    steps_file = out / "steps.json"
    if not steps_file.is_file():
        fields = config.encoder_fields()
        trainer = Trainer(Moon2Encoder.from_backbone(fields.pop("backbone"), **fields), catalog, config, triplets=build_triplets(part, Lexicon(catalog), 1, 1, config.seed, config.paired_negatives))
        trainer.prepare_features()
        steps_file.write_text(json.dumps(args.steps or trainer.calibrate()))
        del trainer
    config = config.replace(max_steps=json.loads(steps_file.read_text()))
    rows = out / "arms.jsonl"
    done = {json.loads(line)["arm"] for line in rows.read_text().splitlines()} if rows.is_file() else set()
    for arm in (arm for arm in args.arms if arm not in done):
        row = run_arm(catalog, part, arm, config, out, args.watch)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        table = pd.read_parquet(out / f"{arm.replace(':', '_')}-auc.parquet")
        print(json.dumps(row), table.to_string(index=False, float_format="%.3f"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
