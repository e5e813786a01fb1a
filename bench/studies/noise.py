"""What the filter finds of noise that was put in on purpose, for shares of noise and margin schedules.

    python bench/studies/noise.py --catalog path/to/catalogue --out study --minutes 8 --products 4000 --arms 0.2:0.2:0
    0.2:off

An arm is SHARE:START:END (noise, margin at the start and at the end of training) or SHARE:off (filter off). All arms
train the same encoder on the same triplets for the same number of steps, which
is found once; each arm's result stands in OUT as soon as it is there, and a second call makes the arms that are
missing.
"""
import argparse
import json
import logging
from pathlib import Path

import pandas as pd
from common import make_trainer


def arm_settings(arm: str) -> dict:
    "Config fields of an arm."
    share, *margins = arm.split(":")
    if margins == ["off"]:
        return {"noise": float(share), "filter": False}
    start, end = map(float, margins)
    return {"noise": float(share), "filter_margin_start": start, "filter_margin_end": end}


def run_arm(catalog, part, arm: str, config, out: Path, most: int) -> dict:
    "Train one arm; writes its tables; its row."
    from moon2_lab.evaluation.evaluate import evaluate
    from moon2_lab.training.noise_watch import FilterWatch, filter_auc, triplet_gaps

    trainer = make_trainer(catalog, part, config.replace(**arm_settings(arm)))
    encoder, triplets = trainer.encoder, trainer.triplets
    watch = FilterWatch(trainer, most=most)
    trainer.callbacks.append(watch)
    history = trainer.train()
    name = arm.replace(":", "_")
    gaps = triplet_gaps(encoder, triplets)
    gaps.to_parquet(out / f"{name}-gaps.parquet")
    filter_auc(gaps).to_parquet(out / f"{name}-auc.parquet")
    watch.table().to_parquet(out / f"{name}-watch.parquet")
    history.to_parquet(out / f"{name}-history.parquet")
    metrics = evaluate(encoder, catalog, split="valid", baselines=False, labels=False)
    recalls = {f"R@10 {direction}": block["R@10"]["value"] for direction, block in metrics["directions"].items()}
    return {
        "arm": arm, "steps": trainer.step, "minutes": trainer.seconds["steps"] / 60, "noise": triplets.counts,
        **recalls, "mean R@10": sum(recalls.values()) / len(recalls),
    }


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
    from moon2_lab.config import TrainConfig
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.studies.ablation import chosen_products

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    catalog = Catalog.load(args.catalog)
    part = chosen_products(catalog, args.products)
    config = TrainConfig(
        **dict(pair.split("=", 1) for pair in args.set) | {"query_variants": 1, "max_minutes": args.minutes}
    )
    steps_file = out / "steps.json"
    if not steps_file.is_file():
        steps_file.write_text(json.dumps(args.steps or make_trainer(catalog, part, config).calibrate()))
    config = config.replace(max_steps=json.loads(steps_file.read_text()), max_minutes=0)
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
