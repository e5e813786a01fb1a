"""One pass for three views against a forward pass for each view.

Forward and backward of all views of queries, positives and negatives of one batch of triplets, cached features, no
optimizer. Both arms are packed without padding and encode an item that
stands twice in the batch once. Printed: the speed-up as a share of the token bound (tokens of three passes / tokens of
one pass). Target: at least 0.90.

    python bench/one_pass.py --catalog path/to/catalogue
    python bench/one_pass.py --backbone folder/or/hub-id --pixels 448   # a multimodal model of transformers
    python bench/one_pass.py --kind qwen3_vl                            # a small one with random weights, made up

The small models of --kind are four layers of width 64: much of their time is what each operation costs whatever its
size, so their speed-up says less than their tokens.
"""
import contextlib
import json
import tempfile

import torch
from common import (
    choose_kernel, finish, make_encoder, one_batch, options, own_cache, ratio, spread, start, step, take_turns, told,
    verdict,
)

TARGET = 0.90


def sizes_of(args) -> list[dict]:
    "Fields of EncoderConfig for each size of pictures that is measured."
    if args.backbone not in ("tiny", "mini"):
        layers = {"num_layers": args.layers} if args.layers else {}
        return [{"image_size": pixels, "experts": args.experts} | layers for pixels in args.pixels or [0]]
    if args.quick:
        return [{"visual_tokens": tokens, "num_layers": 2} for tokens in (4, 9)]
    shapes = ((16, 160), (49, 224))
    return [
        {"visual_tokens": tokens, "num_layers": args.layers or 4, "image_size": pixels} for tokens, pixels in shapes
    ]


def compare(args, fields: dict, dtype: str) -> dict:
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
        "visual_tokens": encoder.config.visual_tokens, "dtype": dtype, "kernel": kernel,
        "layers": encoder.config.num_layers, "items": len(items), "unique_items": len(unique),
        "mean_text_tokens": sum(words) / max(len(words), 1),
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


@contextlib.contextmanager
def made_up(args):
    "With --kind: the folder of a small model of it as backbone."
    from moon2_lab.tiny_models import tiny_model

    with tempfile.TemporaryDirectory() as folder:
        if args.kind:
            path = tiny_model(args.kind, f"{folder}/{args.kind}") / "preprocessor_config.json"
            settings = json.loads(path.read_text())
            if "longest_edge" in settings.get("size", {}) and args.kind.startswith("qwen"):
                settings["size"]["longest_edge"] *= 16  # an area: the small ones make each picture 16 tokens
            path.write_text(json.dumps(settings))
            args.backbone, args.pixels = str(path.parent), args.pixels or ([128, 224] if "qwen" in args.kind else [64])
        yield


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--triplets", type=int, default=32, help="of the batch")
    parser.add_argument("--layers", type=int, default=0, help="0: 4 of tiny and mini, all of another model")
    parser.add_argument("--kind", help="instead of --backbone: a kind of moon2_lab.tiny_models, such as qwen3_vl")
    parser.add_argument("--pixels", type=int, nargs="+", help="side of a picture, for a model of transformers")
    parser.add_argument("--experts", default="full", help="of a model of transformers: full, lowrank or native")
    args = parser.parse_args()
    about = start(args)
    with own_cache(args.backbone), made_up(args):
        found = [compare(args, fields, dtype) for dtype in args.dtype for fields in sizes_of(args)]
    if args.kind:
        about["backbone"] = f"{args.kind}, 4 layers of width 64, random"
    finish(
        args,
        {
            "benchmark": "one_pass", **about, "target": TARGET,
            "worst": min(entry["share_of_bound"] for entry in found), "results": found,
        },
    )


if __name__ == "__main__":
    main()
