"""How long an evaluation takes once the vision features are cached.

The whole of catalog-v1 (five directions, classification, attributes, 1,000 bootstrap resamples, the baselines BM25,
frozen vision, untrained encoder) over the test split of --catalog, or over 974
invented products. Seconds are the point here: target under 60 s for 974 products on two cores. The parts are printed as
shares.

    python bench/evaluate.py --catalog path/to/catalogue
"""
import time

from common import catalogue, finish, give_features, make_encoder, options, own_cache, spread, start, verdict

PRODUCTS, TARGET = 974, 60.0


def images_of(question) -> list:
    "All pictures the question will ask for."
    return [
        item.image
        for side in (question.gallery, question.queries, question.cross)
        for item in side.items
        if item.image is not None
    ]


def main() -> None:
    from moon2_lab.evaluation.evaluate import run_benchmark
    from moon2_lab.evaluation.protocol import make_benchmark

    parser = options(__doc__, repeats=3)
    parser.add_argument("--split", default="test")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    about = start(args)
    wanted = 60 if args.quick else PRODUCTS
    with own_cache(args.backbone):
        if args.catalog:
            catalog, split, limit = catalogue(args, 0), args.split, wanted if args.quick else None
        else:
            catalog, split, limit = catalogue(args, wanted), "all", None
        encoder = make_encoder(args, num_layers=2 if args.quick else args.layers).eval()
        seconds, whole = {"ask": [], "embeddings": [], "baselines and labels": []}, []
        for turn in range(args.repeats + 1):  # the first one warms up
            begun = time.perf_counter()
            question = make_benchmark(catalog, split, limit=limit)
            asked = time.perf_counter()
            if turn == 0:
                give_features(encoder, images_of(question))
                asked = begun = time.perf_counter()
            metrics = run_benchmark(encoder, question).metrics
            ended = time.perf_counter()
            if turn:
                encoding = metrics["timing"]["encode_seconds"] + metrics["timing"]["query_seconds"]
                whole.append(ended - begun)
                for name, value in zip(seconds, (asked - begun, encoding, ended - asked - encoding)):
                    seconds[name].append(value)
    products, total = metrics["protocol"]["n_products"], spread(whole)
    shares = {name: spread(values)["median"] / total["median"] for name, values in seconds.items()}
    scaled = total["median"] * PRODUCTS / products
    print(
        f"{products} products of split {split}: {total['median']:.1f} s (from {total['min']:.1f} to "
        f"{total['max']:.1f}); "
        + ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    )
    print(
        f"for {PRODUCTS} products {scaled:.1f} s (target {TARGET:.0f} s: {verdict(scaled, TARGET, False, args.quick)})"
    )
    finish(
        args,
        {
            "benchmark": "evaluate", **about, "target": TARGET, "products": products, "split": split, "seconds": total,
            "seconds_for_974": scaled, "shares": shares,
            "directions": {name: block["n_queries"] for name, block in metrics["directions"].items()},
        },
    )


if __name__ == "__main__":
    main()
