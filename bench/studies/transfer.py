"""Does what was learned on one shop hold in others: trained on the first catalogue, and trained on all of them.

    python bench/studies/transfer.py --catalogs path/to/fashion path/to/flipkart path/to/ikea --out study --steps 145
    --seeds 0 1 2

Arm "first" trains on the train split of the first catalogue, arm "union" on the train splits of all, both for the same
number of steps. Both are scored on the test split of each catalogue, and "first" also on the other catalogues as a
whole, which it has never seen. Each score stands in OUT/ARM-SEED/CATALOGUE.SPLIT as soon as it is there, a model
beside them; a second call makes what is missing (calls with different --seeds may run side by side). At the end:
transfer.parquet (arm, seed, catalogue, split, direction, metric, value, lo, hi, queries), the means over the seeds,
and "union" against "first", paired over product keys and seeds (Holm within each catalogue), in
tests.parquet.
"""
import argparse
import logging
from pathlib import Path

import pandas as pd
from common import make_trainer

METRICS = ("R@1", "R@10", "nDCG@10")


def trained(catalogs: dict, arm: str, config, folder: Path):
    "The model of an arm: that of an earlier call, or a new one."
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.model.encoder import Moon2Encoder

    if not (folder / "config.json").is_file():
        chosen = list(catalogs.values())[: 1 if arm == "first" else None]
        union = Catalog.from_products([product for catalog in chosen for product in catalog])
        trainer = make_trainer(union, union.split("train"), config)
        trainer.train()
        trainer.encoder.save_pretrained(folder)
    return Moon2Encoder.from_pretrained(folder)


def asked(catalogs: dict, arm: str) -> list[tuple[str, str]]:
    "(catalogue, split) that an arm is scored on."
    tests = [(name, "test") for name, catalog in catalogs.items() if "test" in catalog.splits]
    return tests + [(name, "all") for name in list(catalogs)[1:] if arm == "first"]


def score(catalogs: dict, arm: str, config, out: Path, seed: int) -> None:
    "Score what is not scored yet."
    from moon2_lab.evaluation.evaluate import evaluate

    folder = out / f"{arm}-{seed}"
    missing = [
        (name, split) for name, split in asked(catalogs, arm)
        if not (folder / f"{name}.{split}" / "metrics.json").is_file()
    ]
    encoder = trained(catalogs, arm, config, folder / "model") if missing else None
    for name, split in missing:
        evaluate(encoder, catalogs[name], split=split, out=folder / f"{name}.{split}", baselines=False, labels=False)


def table(out: Path) -> pd.DataFrame:
    "Every score that is there."
    from moon2_lab.files import read_json

    rows = []
    for path in sorted(out.glob("*-*/*/metrics.json")):
        (arm, _, seed), (name, _, split) = path.parts[-3].rpartition("-"), path.parts[-2].rpartition(".")
        for direction, block in read_json(path)["directions"].items():
            for metric in METRICS:
                if (entry := block.get(metric)) and "value" in entry:
                    ends = entry.get("ci95") or (None, None)
                    rows.append((arm, int(seed), name, split, direction, metric, entry["value"], *ends,
                                 block["n_queries"]))
    names = ["arm", "seed", "catalogue", "split", "direction", "metric", "value", "lo", "hi", "queries"]
    return pd.DataFrame(rows, columns=names)


def tests(catalogs: dict, out: Path, seeds: list[int]) -> pd.DataFrame:
    "union - first on the test split of each catalogue."
    from moon2_lab.studies.study_tests import study_tests

    found = []
    for name, split in asked(catalogs, "union"):
        runs = {arm: [out / f"{arm}-{seed}" / f"{name}.{split}" for seed in seeds] for arm in ("first", "union")}
        found.append(study_tests(runs, "first").assign(catalogue=name))
    return pd.concat(found, ignore_index=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalogs", required=True, nargs="+", help="the first is what arm first trains on")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=145)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.config import TrainConfig
    from moon2_lab.data.catalog import Catalog

    out = Path(args.out)
    catalogs = {Path(folder).name: Catalog.load(folder) for folder in args.catalogs}
    for seed in args.seeds:
        settings = {"max_steps": args.steps, "max_minutes": 0} | dict(pair.split("=", 1) for pair in args.set)
        config = TrainConfig(**settings | {"seed": seed})
        for arm in ("first", "union")[:: 1 if seed % 2 == 0 else -1]:
            score(catalogs, arm, config, out, seed)
    scores = table(out)
    scores.to_parquet(out / "transfer.parquet", index=False)
    index, columns = ["arm", "catalogue", "split"], ["metric", "direction"]
    print((100 * scores.pivot_table(index=index, columns=columns, values="value")).round(1).to_string())
    compared = tests(catalogs, out, args.seeds)
    compared.to_parquet(out / "tests.parquet", index=False)
    print(compared.to_string(index=False))


if __name__ == "__main__":
    main()
