"""What smaller vectors cost: number types and prefixes, of a model trained with `matryoshka_dims` and of one trained
without.

    python bench/studies/reduced.py --catalog path/to/catalogue --out study --dims 64 128 256 --steps 145 --products
    4000 --seeds 0 1 2

Both arms have the same products, seeds and number of steps; the order alternates from seed to seed. Each model encodes
the test split once, and the same queries (catalog-v1) are asked of every form of its products,
whole but for their length, as in a search. A run's model and results stand in OUT as soon as they are there, and a
second call makes what is missing (calls with different --seeds may run side by side). At the end,
for each form: the mean R@10 over the seeds, and the difference from the same model's full float32 vectors, paired by
query, with its interval; and the one arm against the other, form by form.
"""
import argparse
import json
import logging
from pathlib import Path

import pandas as pd
from common import make_trainer, paired

DTYPES = ("float32", "float16", "int8", "binary")


class Kept:
    "An encoder that encodes the same items once."

    def __init__(self, encoder):
        self.encoder, self.fingerprint, self.embedding_dim, self.known = (
            encoder, encoder.fingerprint, encoder.embedding_dim, {},
        )

    def encode_views(self, items, batch_size: int = 64):
        key = tuple(item.content for item in items)
        if key not in self.known:
            self.known[key] = self.encoder.encode_views(items, batch_size)
        return dict(self.known[key])


def trained(catalog, part, config, folder: Path):
    "The model of a run that was stopped later, or a new one."
    from moon2_lab.model.encoder import Moon2Encoder

    if not (folder / "config.json").is_file():
        trainer = make_trainer(catalog, part, config)
        trainer.train()
        trainer.encoder.save_pretrained(folder)
    return Moon2Encoder.from_pretrained(folder)


def run_arm(catalog, part, config, out: Path, arm: str, seed: int, dims: list[int]) -> None:
    "Train, and score each form of the products' vectors."
    from moon2_lab.evaluation.evaluate import run_benchmark
    from moon2_lab.evaluation.protocol import make_benchmark
    from moon2_lab.retrieval.vectors import StoredForm

    question = make_benchmark(catalog, "test")
    kept = Kept(trained(catalog, part, config, out / f"{arm}-{seed}" / "model"))
    for dim in (*dims, kept.embedding_dim):
        for dtype in reversed(DTYPES):
            run_benchmark(kept, question, stored=StoredForm(dtype, dim)).write(out / f"{arm}.{dtype}.{dim}-{seed}")
    (out / f"{arm}-{seed}.json").write_text(json.dumps({"dim": kept.embedding_dim}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--steps", type=int, default=145)
    parser.add_argument("--products", type=int, default=4000)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
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
    settings = {"query_variants": 1, "max_steps": args.steps, "max_minutes": 0} | dict(
        pair.split("=", 1) for pair in args.set
    )
    arms = {"plain": (), "matryoshka": tuple(args.dims)}
    for turn, seed in enumerate(args.seeds):
        for arm in list(arms)[:: 1 if turn % 2 == 0 else -1]:
            if not (out / f"{arm}-{seed}.json").is_file():
                run_arm(
                    catalog, part, TrainConfig(**settings | {"matryoshka_dims": arms[arm], "seed": seed}), out, arm,
                    seed, args.dims,
                )
    seeds = [seed for seed in range(100) if all((out / f"{arm}-{seed}.json").is_file() for arm in arms)]
    if not seeds:
        return
    full = json.loads((out / f"plain-{seeds[0]}.json").read_text())["dim"]
    forms = [(dtype, dim) for dim in (full, *sorted(args.dims, reverse=True)) for dtype in DTYPES]
    tables = []
    for dtype, dim in forms:
        pairs = [(f"{arm}.{dtype}.{dim}", f"{arm}.float32.{full}", arm) for arm in arms] + [
            (f"matryoshka.{dtype}.{dim}", f"plain.{dtype}.{dim}", "matryoshka - plain")
        ]
        for one, other, what in pairs:
            found = paired(out, seeds, one, other).rename(columns={one: "value", other: "other"})
            tables.append(found.loc[:, ~found.columns.duplicated()].assign(arm=what, dtype=dtype, dim=dim))
    table = pd.concat(tables, ignore_index=True)
    table.to_parquet(out / "reduced.parquet")
    print(f"seeds {seeds}, {len(part):,} products")
    print(table[table.metric == "R@10"].to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
