"""Where attention goes before and after training, with and without dual-level alignment: the paper's heatmap figure as
a number.

    python bench/studies/focus.py --catalog path/to/catalogue --out study --minutes 8 --products 4000

Trains the full objective and "w/o dual-level alignment" from the same start, on the same triplets, for the same number
of steps (found once, or given by --steps), and keeps the models in OUT.
Then the attention of each model, and of the untrained one, over the products of the test split: words in the views t
and mm, cells of the subject and the split between title and picture in view mm, without the first position.
What has nothing to compare (no content word, no filler word, no subject on a plain backdrop) is left out by rule, and
counted. In OUT: focus.parquet (each product), compared.parquet (means and paired differences) and focus.html.
"""
import argparse
import json
import logging
from pathlib import Path

import pandas as pd
from common import make_trainer

def train_arm(catalog, part, arm: str, config, steps_file: Path, folder: Path) -> None:
    "Train one arm, unless its model is there."
    from moon2_lab.objective.objective import Moon2Objective
    from moon2_lab.objective.recipes import UnalignedObjective

    if (folder / "config.json").is_file():
        return
    objective = {"full": Moon2Objective, "unaligned": UnalignedObjective}[arm]
    if not steps_file.is_file():
        steps_file.write_text(
            json.dumps(config.max_steps or make_trainer(catalog, part, config, objective(config)).calibrate())
        )
    config = config.replace(
        max_steps=json.loads(steps_file.read_text()), max_minutes=0
    )  # the same steps for both, without a clock
    trainer = make_trainer(catalog, part, config, objective(config))
    trainer.train()
    trainer.encoder.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--products", type=int, default=4000, help="of the train split")
    parser.add_argument("--arms", nargs="*", choices=["full", "unaligned"], default=["full", "unaligned"])
    parser.add_argument("--train-only", action="store_true")
    parser.add_argument("--set", nargs="*", default=[])
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from moon2_lab.config import TrainConfig
    from moon2_lab.data.catalog import Catalog
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.studies.ablation import chosen_products

    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    catalog = Catalog.load(args.catalog)
    config = TrainConfig(
        **dict(pair.split("=", 1) for pair in args.set)
        | {"query_variants": 1, "max_minutes": args.minutes, "max_steps": args.steps}
    )
    part = chosen_products(catalog, args.products)
    for arm in args.arms:
        train_arm(catalog, part, arm, config, out / "steps.json", out / arm)
    if args.train_only:
        return
    from moon2_lab.explain.content_focus import compare_focus, focus_table, left_out_counts
    from moon2_lab.reporting.attention_figures import focus_figure

    fields = config.encoder_fields()
    models = {
        "untrained": Moon2Encoder.from_backbone(fields.pop("backbone"), seed=config.seed, **fields).eval(),
        **{arm: Moon2Encoder.from_pretrained(out / arm) for arm in args.arms},
    }
    tables = []
    for name, encoder in models.items():
        table = focus_table(encoder, catalog, split="test")
        tables.append(table.assign(model=name))
        print(f"{name}: {table.product_id.nunique()} products", flush=True)
    whole = pd.concat(tables)
    whole.to_parquet(out / "focus.parquet", index=False)
    compared = compare_focus(whole)
    compared.to_parquet(out / "compared.parquet", index=False)
    focus_figure(compared).write_html(out / "focus.html", include_plotlyjs=True)
    print(left_out_counts(whole).to_string(index=False))
    print(compared.drop(columns="layer").to_string(index=False, float_format="%.3f", na_rep=""))


if __name__ == "__main__":
    main()
