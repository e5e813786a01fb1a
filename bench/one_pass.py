"""One pass for three views against a forward pass for each view.

Forward and backward of all views of queries, positives and negatives of one batch of triplets, cached features, no
optimizer. Both arms are packed without padding and encode an item that
stands twice in the batch once. Printed: the speed-up as a share of the token bound (tokens of three passes / tokens of
one pass). Target: at least 0.90.

    python bench/one_pass.py --catalog path/to/catalogue
"""
import torch
from common import (
    choose_kernel, finish, make_encoder, one_batch, options, own_cache, ratio, spread, start, step, take_turns, told,
    verdict,
)

TARGET = 0.90


def compare(args, visual_tokens: int, dtype: str) -> dict:
    fields = {"visual_tokens": visual_tokens} if not args.quick else {"visual_tokens": 4 if visual_tokens == 16 else 9}
    fields |= (
        {"num_layers": 2}
        if args.quick
        else {"num_layers": args.layers, "image_size": 160 if visual_tokens == 16 else 224}
    )
    encoder = make_encoder(args, **fields)
    items = one_batch(args, encoder, 8 if args.quick else args.triplets)
    encoder.compute_dtype = getattr(torch, dtype)
    with torch.no_grad():
        tokens = {share: encoder.forward_items(items, share=share).tokens for share in (True, False)}
    kernel = choose_kernel(encoder, tokens[True], encoder.compute_dtype)

    grads = {}
    for share in (True, False):
        found = step(encoder, items, share=share)
        assert (
            found.tokens
            == len(found.layers[0].gates)
            == sum(
                len(row)
                for row in encoder.rows_of(
                    list({(i.text, i.image and i.image.key): i for i in items}.values()), share=share
                )
            )
        ), "work was spent on padding"
        grads[share] = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    apart = float((grads[True] - grads[False]).norm() / grads[False].norm())
    assert apart < (1e-3 if dtype == "float32" else 0.2), f"the two arms do not compute the same gradients: {apart}"

    seconds = take_turns(
        {"one": lambda: step(encoder, items, share=True), "three": lambda: step(encoder, items, share=False)},
        args.repeats,
    )
    speedup, bound = ratio(seconds["three"], seconds["one"]), tokens[False] / tokens[True]
    unique = {(item.text, item.image and item.image.key): item for item in items}.values()
    words = [len(encoder.backbone.tokenize(item.text)[0]) for item in unique if item.text]
    result = {
        "visual_tokens": fields["visual_tokens"], "dtype": dtype, "kernel": kernel, "layers": encoder.config.num_layers,
        "items": len(items), "unique_items": len(unique), "mean_text_tokens": sum(words) / max(len(words), 1),
        "tokens_one": tokens[True], "tokens_three": tokens[False], "token_bound": bound, "speedup": speedup,
        "share_of_bound": speedup["ratio"] / bound, "gradient_difference": apart,
        "seconds": {name: spread(values) for name, values in seconds.items()},
    }
    print(
        f"{result['visual_tokens']:>2} visual tokens, {dtype}, {kernel}: mean text {result['mean_text_tokens']:.1f} "
        f"tokens, {len(unique)} different items; {told('speed-up', speedup)}, token bound {bound:.3f}, "
        f"share {result['share_of_bound']:.3f} (target {TARGET}: "
        f"{verdict(result['share_of_bound'], TARGET, True, args.quick)})"
    )
    return result


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--triplets", type=int, default=32, help="of the batch")
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    about = start(args)
    with own_cache(args.backbone):
        found = [compare(args, visual, dtype) for dtype in args.dtype for visual in (16, 49)]
    finish(
        args,
        {
            "benchmark": "one_pass", **about, "target": TARGET,
            "worst": min(entry["share_of_bound"] for entry in found), "results": found,
        },
    )


if __name__ == "__main__":
    main()
