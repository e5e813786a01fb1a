"""The search for the default recipe: settings tried on the validation split, each for the same minutes of steps.

    python bench/studies/recipe.py --catalog path/to/catalogue --out bench/results/recipe.jsonl --minutes 5

Each of `TRIED` trains on the whole train split with one thread (two calls with different --only may run side by side on
two cores) and is scored on the validation split, never on the test split. One line of JSON a run; a second call makes
the runs that are missing. `--only NAME ...` chooses, `--set key=value ...` tries one more under the name of --only.
"""
import argparse
import json
import logging
from pathlib import Path

SMALL = {"experts": "lowrank", "num_layers": 2, "learning_rate": 1e-3}
TRIED = {  # name: (recipe, settings)
    "before": ("full", {"experts": "full", "num_layers": 4, "learning_rate": 1e-4, "pooling": "tokens"}),
    "pooling": ("full", {"experts": "full", "num_layers": 4, "learning_rate": 1e-4}),
    "rate-3e-4": ("full", {"experts": "full", "num_layers": 4, "learning_rate": 3e-4}),
    "layers-2": ("full", {"experts": "full", "num_layers": 2, "learning_rate": 1e-4}),
    "lowrank": ("full", {"experts": "lowrank", "num_layers": 4, "learning_rate": 3e-4}),
    "lowrank-1e-3": ("full", {"experts": "lowrank", "num_layers": 4, "learning_rate": 1e-3}),
    "small": ("full", SMALL),
    "small-1-layer": ("full", SMALL | {"num_layers": 1}),
    "small-2e-3": ("full", SMALL | {"learning_rate": 2e-3}),
    "small-batch-128": ("full", SMALL | {"per_device_train_batch_size": 128}),
    "small-temperature": ("full", SMALL | {"temperature": 0.03, "intra_temperature": 0.03}),
    "small-4-tokens": ("full", SMALL | {"visual_tokens": 4}),
    "dense-before": ("dense", {"num_layers": 4, "learning_rate": 1e-4, "pooling": "tokens"}),
    "dense-small": ("dense", {"num_layers": 2, "learning_rate": 1e-3}),
}


def run_recipe(catalog, name: str, recipe: str, settings: dict, minutes: float) -> dict:
    "Train one and score it on the validation split."
    from moon2_lab.config import TrainConfig
    from moon2_lab.evaluation.evaluate import evaluate
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.studies.variants import find_variant, variant_parts
    from moon2_lab.training.trainer import Trainer

    config = TrainConfig(max_minutes=minutes, num_threads=1, **settings)
    config, objective, triplets = variant_parts(find_variant(recipe), catalog.split("train"), config)
    fields = config.encoder_fields()
    encoder = Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields)
    trainer = Trainer(encoder, catalog, config, objective=objective, triplets=triplets)
    trainer.prepare_features()
    trainer.train()
    scores = evaluate(encoder, catalog, split="valid", baselines=False, labels=False, resamples=0)
    valid = {
        direction: {metric: block[metric]["value"] for metric in ("R@1", "R@10", "nDCG@10") if metric in block}
        for direction, block in scores["directions"].items()
    }
    done = {"steps": trainer.step, "minutes": trainer.seconds["steps"] / 60}
    return {"name": name, "recipe": recipe, "settings": settings, **done, "valid": valid}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--out", required=True, help="a file of lines of JSON")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", nargs="+", default=list(TRIED))
    parser.add_argument("--set", nargs="+", default=[], help="key=value, over the settings of --only")
    args = parser.parse_args()
    if not args.set and (unknown := [name for name in args.only if name not in TRIED]):
        parser.error(f"no such settings: {', '.join(unknown)}; one of {', '.join(TRIED)}, or a new name with --set")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.data.catalog import Catalog

    out, own = Path(args.out), dict(pair.split("=", 1) for pair in args.set)
    done = [json.loads(line)["name"] for line in out.read_text().splitlines()] if out.is_file() else []
    catalog = Catalog.load(args.catalog)
    for name in args.only:
        if name not in done:
            recipe, settings = TRIED.get(name, ("full", SMALL))
            row = run_recipe(catalog, name, recipe, settings | own, args.minutes)
            with open(out, "a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            logging.info(json.dumps(row))


if __name__ == "__main__":
    main()
