"""Training with co-augmentation against training without: the same products, seeds and minutes, paired by query.

    moon2 data augment path/to/catalogue path/to/augmented
    python bench/studies/coaugment.py --catalog path/to/catalogue --augmented path/to/augmented --out study --minutes 8 --products 4000 --seeds 0 1 2

The order of the arms alternates from seed to seed. The minutes of an arm become a number of steps by the trainer's own calibration; steps and minutes are both reported. Each run's result stands in OUT as
soon as it is there, and a second call makes the runs that are missing. At the end: the mean over the seeds, and the paired difference over queries with its interval.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd
from noise import chosen_products

ARMS = {"without": {"enriched_titles": False, "expanded_images": "none"}, "titles": {"expanded_images": "none"}, "pictures": {"enriched_titles": False}, "with": {}}


def run_arm(catalog, part, config, out: Path, name: str) -> dict:
    "Train and score one arm; writes per_query and metrics."
    from moon2_lab.encoder import Moon2Encoder
    from moon2_lab.evaluate import evaluate
    from moon2_lab.text import Lexicon
    from moon2_lab.train import Trainer
    from moon2_lab.triplets import build_triplets

    triplets = build_triplets(part, Lexicon(catalog), config.query_variants, config.negatives_per_query, config.seed, config.paired_negatives)
    fields = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    trainer = Trainer(encoder, catalog, config, triplets=triplets)
    trainer.prepare_features()
    trainer.train()
    metrics = evaluate(encoder, catalog, split="test", out=out / name, baselines=False)
    recalls = {f"{k} {direction}": block[k]["value"] for direction, block in metrics["directions"].items() for k in ("R@1", "R@10")}
    return {"steps": trainer.step, "minutes": trainer.seconds["steps"] / 60, **recalls}


def paired(out: Path, seeds: list[int], one: str, other: str) -> pd.DataFrame:
    "Difference of R@k (one - other), averaged over the seeds for each query, with an interval over queries."
    tables = {(arm, seed): pd.read_parquet(out / f"{arm}-{seed}" / "per_query.parquet").set_index(["direction", "query_id"])["rank"] for arm in (one, other) for seed in seeds}
    rows, rng = [], np.random.default_rng(0)
    for k in (1, 10):
        mean = {arm: pd.concat([tables[arm, seed] <= k for seed in seeds], axis=1).mean(axis=1) for arm in (one, other)}
        for direction, difference in (mean[one] - mean[other]).groupby(level="direction"):
            drawn = rng.choice(difference.to_numpy(), (1000, len(difference))).mean(1)
            rows.append((direction, f"R@{k}", mean[other][direction].mean(), mean[one][direction].mean(), difference.mean(), *np.quantile(drawn, (0.025, 0.975))))
    return pd.DataFrame(rows, columns=["direction", "metric", other, one, "difference", "lo", "hi"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--augmented", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--products", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["without", "with"])
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    from moon2_lab.catalog import Catalog
    from moon2_lab.coaugment import evaluation_hash
    from moon2_lab.core import TrainConfig

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    catalog = Catalog.load(args.augmented)
    assert evaluation_hash(catalog) == evaluation_hash(Catalog.load(args.catalog)), "the two catalogues differ outside the train split"
    part = chosen_products(catalog, args.products)
    rows = out / "runs.jsonl"
    done = {(row["arm"], row["seed"]) for row in map(json.loads, rows.read_text().splitlines())} if rows.is_file() else set()
    for turn, seed in enumerate(args.seeds):
        for arm in args.arms[:: 1 if turn % 2 == 0 else -1]:
            if (arm, seed) not in done:
                settings = dict(pair.split("=", 1) for pair in args.set)
                config = TrainConfig(**{"query_variants": 1, "max_minutes": args.minutes, "seed": seed} | settings | ARMS[arm])
                row = {"arm": arm, "seed": seed, **run_arm(catalog, part, config, out, f"{arm}-{seed}")}
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    for arm in args.arms[1:]:
        table = paired(out, args.seeds, arm, args.arms[0])
        table.to_parquet(out / f"{arm}-against-{args.arms[0]}.parquet")
        print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
