"""Filters and the best hits of the search page, over more and more products: does the time grow in proportion?

Made-up products with a category, four attributes and an id each. Timed are the table of facets (built once, at the
start of the page), a filter of three comparisons,
and candidates for the twelve best of random scores among what it keeps. The exponent between two sizes is log(time
ratio) / log(size ratio): 1 is in proportion, 2 is the square.

    python bench/page_filter.py
"""
import math
import time

import numpy as np
from common import finish, median, options, start

FILTER = "category_l1 == 'c3' and colour in ('v1', 'v2') and not size == 5"


def made_up(count: int) -> list[dict[str, set[str]]]:
    "Field -> values of each product."
    drawn = np.random.default_rng(0).integers(0, 20, size=(count, 4))
    names = ("colour", "material", "size", "style")
    return [
        {"product_id": {f"p{place}"}, "category_l1": {f"c{place % 7}"}}
        | {name: {f"v{value}"} for name, value in zip(names, row)}
        for place, row in enumerate(drawn.tolist())
    ]


def seconds(act, repeats: int) -> float:
    "Median over the repeats."
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        act()
        times.append(time.perf_counter() - begun)
    return median(times)


def main() -> None:
    from moon2_lab.retrieval.filters import FacetTable
    from moon2_lab.retrieval.search import top_candidates

    args = options(__doc__, repeats=5).parse_args()
    about, sizes, rows = start(args), (1_000, 2_000) if args.quick else (10_000, 50_000, 200_000), []
    for count in sizes:
        values, scores = made_up(count), np.random.default_rng(1).normal(size=count).astype(np.float32)
        table = FacetTable(values)
        keep = table.mask(FILTER)
        acts = {
            "table": (lambda values=values: FacetTable(values), 1),
            "filter": (lambda table=table: table.mask(FILTER), args.repeats),
            "best": (lambda scores=scores, keep=keep: top_candidates(scores, keep, 12), args.repeats),
        }
        rows.append(
            {"products": count, "kept": int(keep.sum())}
            | {f"{name}_ms": round(1000 * seconds(*act), 3) for name, act in acts.items()}
        )
        print(rows[-1], flush=True)
    exponents = {
        name: round(math.log(rows[-1][f"{name}_ms"] / rows[0][f"{name}_ms"]) / math.log(sizes[-1] / sizes[0]), 2)
        for name in ("table", "filter", "best")
    }
    print(f"exponents from {sizes[0]:,} to {sizes[-1]:,} products: {exponents}")
    finish(args, {"benchmark": "page_filter", **about, "rows": rows, "exponents": exponents})


if __name__ == "__main__":
    main()
