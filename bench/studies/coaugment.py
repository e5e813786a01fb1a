"""Training with co-augmentation against training without: the same products, seeds and minutes, paired by query.

    moon2 data augment path/to/catalogue path/to/augmented
    python bench/studies/coaugment.py --catalog path/to/catalogue --augmented path/to/augmented --out study --minutes 8
    --products 4000 --seeds 0 1 2

The minutes become a number of steps for each arm, once and for all seeds: by the trainer's own calibration of the arms
in turn, or, with --steps, so many for the first arm and for the others as many as fit into the same time. So
a run that shares the machine takes longer, but does the same. The order of the arms alternates from seed to seed. Each
run's result stands in OUT as soon as it is there, and a second call makes the runs that are missing (calls
with different --seeds may run side by side). At the end: the mean over the seeds, and the paired difference over
queries with its interval.
"""
import argparse
import json
import logging
from pathlib import Path

from common import make_trainer, paired

ARMS = {
    "without": {"enriched_titles": False, "expanded_images": "none"}, "titles": {"expanded_images": "none"},
    "pictures": {"enriched_titles": False}, "with": {},
}


def steps_of_arms(catalog, part, configs: dict, out: Path, first_steps: int, turns: int = 3) -> dict[str, int]:
    "arm -> steps, kept in OUT/steps.json."
    kept = out / "steps.json"
    steps = json.loads(kept.read_text()) if kept.is_file() else {}
    if configs.keys() - steps.keys():
        trainers = {arm: make_trainer(catalog, part, config) for arm, config in configs.items()}
        fits = {arm: [] for arm in configs}
        for turn in range(turns):
            for arm in list(configs)[:: 1 if turn % 2 == 0 else -1]:
                fits[arm].append(trainers[arm].calibrate())
        middle = {arm: sorted(found)[turns // 2] for arm, found in fits.items()}
        scale = first_steps / middle[next(iter(configs))] if first_steps else 1.0
        steps = {arm: round(scale * found) for arm, found in middle.items()}
        kept.write_text(json.dumps(steps))
    return steps


def run_arm(catalog, part, config, out: Path, name: str) -> dict:
    "Train and score one arm; writes per_query and metrics."
    from moon2_lab.evaluation.evaluate import evaluate

    trainer = make_trainer(catalog, part, config)
    trainer.train()
    trainer.encoder.save_pretrained(out / name / "model")
    metrics = evaluate(trainer.encoder, catalog, split="test", out=out / name, baselines=False)
    recalls = {
        f"{k} {direction}": block[k]["value"]
        for direction, block in metrics["directions"].items()
        for k in ("R@1", "R@10")
    }
    return {"steps": trainer.step, "minutes": trainer.seconds["steps"] / 60, **recalls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--augmented", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=0, help="of the first arm, instead of minutes")
    parser.add_argument("--products", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["without", "with"])
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.augment.pipeline import evaluation_hash
    from moon2_lab.config import TrainConfig
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.studies.ablation import chosen_products

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    catalog = Catalog.load(args.augmented)
    assert evaluation_hash(catalog) == evaluation_hash(Catalog.load(args.catalog)), (
        "the two catalogues differ outside the train split"
    )
    part = chosen_products(catalog, args.products)
    settings = {"query_variants": 1, "max_minutes": args.minutes} | dict(pair.split("=", 1) for pair in args.set)
    configs = {arm: TrainConfig(**settings | ARMS[arm]) for arm in args.arms}
    steps = steps_of_arms(catalog, part, configs, out, args.steps)
    rows = out / "runs.jsonl"
    done = (
        {(row["arm"], row["seed"]) for row in map(json.loads, rows.read_text().splitlines())}
        if rows.is_file()
        else set()
    )
    for turn, seed in enumerate(args.seeds):
        for arm in args.arms[:: 1 if turn % 2 == 0 else -1]:
            if (arm, seed) not in done:
                config = configs[arm].replace(seed=seed, max_steps=steps[arm], max_minutes=0)
                row = {"arm": arm, "seed": seed, **run_arm(catalog, part, config, out, f"{arm}-{seed}")}
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    seeds = [
        seed for seed in range(100) if all((out / f"{arm}-{seed}" / "per_query.parquet").is_file() for arm in args.arms)
    ]
    for arm in args.arms[1:] if seeds else ():
        table = paired(out, seeds, arm, args.arms[0])
        table.to_parquet(out / f"{arm}-against-{args.arms[0]}.parquet")
        print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
