"""How faithful each method's maps are, over many real pairs: deletion and insertion against random maps and against a
model with re-drawn weights.

    python bench/studies/faithful.py --model path/to/run --catalog path/to/catalogue --out study --pairs 200

A pair is what the evaluation asks: search phrase and query picture of a product, and the product itself. Of the split's
products that have both a title and a picture the first by the hash of their ids are taken. The item side is
explained. All maps of a pair are tested on the same rows against the same random maps. Each pair's rows stand in
OUT/rows.parquet as soon as they are there; a second call makes what is missing, so --pairs and --methods may grow.
"""
import argparse
import copy
import json
import logging
import time
from pathlib import Path

import pandas as pd

COMPARED = ("over_random", "over_redrawn", "to_best")
SHOWN = [
    "method", "pairs", "gain", *(f"{name}{end}" for name in COMPARED for end in ("", "_lower", "_upper")), "of_rise",
    "share_trusted", "seconds", "verdict",
]


def chosen_pairs(catalog, split: str, count: int) -> tuple[list[tuple], int]:
    "(product, query, item) of the first products in hash order that have all views, and how many before them have not."
    from moon2_lab.data.queries import Lexicon
    from moon2_lab.evaluation.item_sets import hash_order
    from moon2_lab.evaluation.protocol import catalog_queries

    products = sorted(catalog.split(split), key=lambda product: hash_order(product.product_id))
    queries = catalog_queries(products, Lexicon(catalog))
    able = {int(row) for row in queries.places_with("mm") if products[row].has_text and products[row].has_image}
    places = sorted(able)[:count]
    last = places[-1] if places else len(products) - 1
    return [(products[place], queries.items[place], products[place].item("mm")) for place in places], last + 1 - len(
        places
    )


def open_rows(out: Path, about: dict) -> list[dict]:
    "Rows of an earlier call; stops where that was about something else."
    kept = out / "about.json"
    if kept.is_file() and json.loads(kept.read_text()) != about:
        raise SystemExit(
            f"{kept}: rows of another model, catalogue or setting; give another --out\n  there: {kept.read_text()}\n  "
            f"asked: {json.dumps(about)}"
        )
    kept.write_text(json.dumps(about))
    return pd.read_parquet(out / "rows.parquet").to_dict("records") if (out / "rows.parquet").is_file() else []


def pair_rows(encoder, twin, product, query, item, methods: list[str], about: dict) -> list[dict]:
    "Rows of one pair: its rows of vectors, the frozen copies and the random maps are made once."
    from moon2_lab.explain.attribution import METHODS, attribution_inputs, run_method
    from moon2_lab.explain.faithfulness import faithfulness_row, measure_faithfulness, random_gains

    settings = {name: about[name] for name in ("steps", "most_steps", "samples", "seed")}
    free = attribution_inputs(encoder, item, query, routing="free", **settings)
    fixed, redrawn = (attribution_inputs(model, item, query, **settings) for model in (encoder, twin))
    rows, random = [], random_gains(free, about["trials"], about["seed"])  # the same for all methods
    for name in methods:
        side, other = copy.copy(fixed), copy.copy(redrawn)  # a method notes its steps and its delta in its inputs
        begun = time.perf_counter()
        values = run_method(side, METHODS[name])
        seconds = time.perf_counter() - begun
        faith = measure_faithfulness(free, values, random, about["seed"], run_method(other, METHODS[name]))
        points = [inputs.settings["steps"] if name == "ig" else 0 for inputs in (side, other)]
        row = faithfulness_row(name, product.product_id, product.key, faith, seconds)
        rows.append(row | {"pieces": side.count, "points": points[0], "gap": side.delta,
                           "redrawn_points": points[1], "redrawn_gap": other.delta})
    return rows


def main() -> None:
    from moon2_lab.explain.attribution import METHODS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run, or a model folder")
    parser.add_argument("--catalog", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--trials", type=int, default=140, help="random maps; at least 20 for each method, else none of them can pass"
    )
    parser.add_argument("--steps", type=int, default=32, help="points of the integral to begin with")
    parser.add_argument("--most-steps", type=int, default=512, help="and at most")
    parser.add_argument("--samples", type=int, default=25, help="orders of Shapley sampling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch likes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import torch

    from moon2_lab.data.catalog import Catalog
    from moon2_lab.errors import LabError
    from moon2_lab.explain.faithfulness import faithfulness_table, redrawn_copy
    from moon2_lab.files import write_json, write_parquet
    from moon2_lab.model.encoder import Moon2Encoder

    if args.threads:
        torch.set_num_threads(args.threads)
    folder, out = Path(args.model), Path(args.out)
    encoder = Moon2Encoder.from_pretrained(folder / "model" if (folder / "model").is_dir() else folder)
    twin = redrawn_copy(encoder, args.seed)
    pairs, lacking = chosen_pairs(Catalog.load(args.catalog), args.split, args.pairs)
    print(f"{len(pairs)} pairs of split {args.split}; {lacking} products passed over for want of a view", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    about = {"model": encoder.fingerprint, "catalog": Path(args.catalog).name, "split": args.split} | {
        name: getattr(args, name) for name in ("trials", "steps", "most_steps", "samples", "seed")
    }
    rows, failed, begun, made = open_rows(out, about), {}, time.perf_counter(), 0
    for number, (product, query, item) in enumerate(pairs, 1):
        todo = [
            name
            for name in args.methods
            if not any(row["method"] == name and row["pair"] == product.product_id for row in rows)
        ]
        if not todo:
            continue
        try:
            rows += pair_rows(encoder, twin, product, query, item, todo, about)
        except LabError as error:
            failed[product.product_id] = str(error)
            print(f"{product.product_id}: {error}", flush=True)
            continue
        made += 1
        write_parquet(out / "rows.parquet", pd.DataFrame(rows))
        if made % 10 == 1:
            spent = time.perf_counter() - begun
            print(
                f"{number} of {len(pairs)} pairs, {spent / made:.1f} s a pair, about "
                f"{spent / made * (len(pairs) - number) / 60:.0f} min to go",
                flush=True,
            )
    wanted = {product.product_id for product, *_ in pairs}
    found = pd.DataFrame([row for row in rows if row["pair"] in wanted and row["method"] in args.methods])
    if not len(found):
        raise SystemExit("no pair could be measured")
    table = faithfulness_table(found, args.seed)
    write_json(
        out / "faithful.json",
        {
            "about": about, "pairs": len(pairs), "passed_over": lacking, "failed": failed,
            "table": table.astype(object).where(table.notna(), None).to_dict("records"),
        },
    )
    print(table[SHOWN].to_string(index=False, float_format="%.4f", na_rep="-"))


if __name__ == "__main__":
    main()
