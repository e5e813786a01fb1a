"""What the mixture of experts costs.

1. Forward and backward of a whole step with Z = 4 experts, k = 2, against the dense model, same batch, one pass for all
views; AdamW's update is timed apart. Target: at most 2.0 x; the arithmetic
   alone is printed as the floor.
2. Our experts against those of transformers (the better of its eager and grouped_mm implementations), same weights,
same tokens, same routing, outputs and gradients compared first.
   Target: never slower, at any number of tokens.

    python bench/moe.py --catalog path/to/catalogue
"""
import torch
from common import (
    choose_kernel, finish, make_encoder, median, one_batch, options, own_cache, ratio, spread, start, step, take_turns,
    told, verdict,
)
from moon2_lab.model.moe import KERNELS, MoEFeedForward, faster_kernel, mix_experts, route

TARGET_DENSE, TARGET_THEIRS = 2.0, 1.0


def floor(encoder, dense) -> float:
    "Multiply-adds of a token in the linear layers of the mixture over those of the dense model."
    from moon2_lab.training.cost import flops_per_token

    return flops_per_token(encoder) / flops_per_token(dense)


def against_dense(args, layers: int, dtype: str) -> dict:
    fields = {"num_layers": layers, **({"visual_tokens": 16, "image_size": 160} if not args.quick else {})}
    models = {
        "moe": make_encoder(args, num_experts=4, top_k=2, **fields),
        "dense": make_encoder(args, num_experts=0, **fields),
    }
    items = one_batch(args, models["moe"], 8 if args.quick else args.triplets)
    for model in models.values():
        model.compute_dtype = getattr(torch, dtype)
    tokens = step(models["moe"], items).tokens
    kernel = choose_kernel(models["moe"], tokens, models["moe"].compute_dtype)
    with torch.no_grad():  # copies of one expert: the mixture must give what the dense model gives
        apart = max(
            float(
                (
                    models["moe"].forward_items(items).embedding[view]
                    - models["dense"].forward_items(items).embedding[view]
                )
                .abs()
                .max()
            )
            for view in ("t", "i", "mm")
        )
    assert apart < (1e-3 if dtype == "float32" else 0.1), f"the two arms do not compute the same embeddings: {apart}"

    seconds = take_turns({name: lambda model=model: step(model, items) for name, model in models.items()}, args.repeats)
    updates = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        for name, model in models.items()
    }
    for model in models.values():
        step(model, items)
    update_seconds = take_turns({name: update.step for name, update in updates.items()}, args.repeats)
    cost, least = ratio(seconds["moe"], seconds["dense"]), floor(models["moe"], models["dense"])
    result = {
        "layers": layers, "dtype": dtype, "kernel": kernel, "tokens": tokens, "cost": cost, "floor": least,
        "optimizer": ratio(update_seconds["moe"], update_seconds["dense"]),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "optimizer_seconds": {name: spread(values) for name, values in update_seconds.items()},
    }
    print(
        f"{layers} layers, {dtype}, {kernel}, {tokens} tokens: {told('mixture / dense', cost)}, arithmetic floor "
        f"{least:.3f} (target {TARGET_DENSE}: {verdict(cost['ratio'], TARGET_DENSE, False, args.quick)}); "
        f"optimizer apart {result['optimizer']['ratio']:.2f} x"
    )
    return result


def theirs(block: MoEFeedForward):
    """The experts of transformers on the weights of `block`: function (hidden, routing, implementation) -> output, and
    its parameters.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, inner, width = len(block.gate_up_proj), block.down_proj.shape[2], block.down_proj.shape[1]
    config = MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=block.top_k,
        hidden_act="silu",
    )
    module = MixtralExperts(config).to(block.gate_up_proj.dtype)
    with torch.no_grad():
        module.gate_up_proj.copy_(block.gate_up_proj)
        module.down_proj.copy_(block.down_proj)

    def run(hidden, routing, implementation):
        config._experts_implementation = implementation  # what set_experts_implementation of a whole model sets
        return module(hidden, routing.selected, routing.weights.to(hidden.dtype))

    return run, [module.gate_up_proj, module.down_proj]


def against_transformers(args, tokens: int, dtype: str) -> dict:
    torch.manual_seed(0)
    width, inner, kind = (64, 128, getattr(torch, dtype)) if args.quick else (576, 1536, getattr(torch, dtype))
    block = MoEFeedForward(width, inner, 4, 2)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.04)
    block.to(kind)
    run, their_weights = theirs(block)
    our_weights = [block.gate_up_proj, block.down_proj]
    hidden, out_gradient = (
        torch.randn(tokens, width, dtype=kind).requires_grad_(), torch.randn(tokens, width, dtype=kind),
    )
    with torch.no_grad():
        routing = route(hidden, block.router, 2)
    chosen = faster_kernel(block, tokens, dtype=kind)[0]

    arms = {
        f"ours_{name}": (lambda name=name: mix_experts(hidden, routing, *our_weights, block.act, name), our_weights)
        for name in KERNELS
    }
    arms |= {
        f"transformers_{name}": (lambda name=name: run(hidden, routing, name), their_weights)
        for name in ("eager", "grouped_mm")
    }

    def go(name):
        make, weights = arms[name]
        for tensor in (hidden, *weights):
            tensor.grad = None
        out = make()
        out.backward(out_gradient)
        return [out.detach(), hidden.grad, *(weight.grad for weight in weights)]

    reference = [x.float().clone() for x in go("transformers_eager")]
    furthest = {
        name: max(float((x.float() - y).abs().max() / y.abs().max()) for x, y in zip(go(name), reference))
        for name in arms
    }
    assert max(furthest.values()) < (1e-4 if dtype == "float32" else 3e-2), f"outputs or gradients differ: {furthest}"

    seconds = take_turns({name: lambda name=name: go(name) for name in arms}, args.repeats)
    best = min(("eager", "grouped_mm"), key=lambda name: median(seconds[f"transformers_{name}"]))
    cost = ratio(seconds[f"ours_{chosen}"], seconds[f"transformers_{best}"])
    line = told(f"ours ({chosen}) / transformers ({best})", cost)
    print(
        f"{tokens} tokens, {dtype}: {line} (target {TARGET_THEIRS}: "
        f"{verdict(cost['ratio'], TARGET_THEIRS, False, args.quick)})"
    )
    return {
        "tokens": tokens, "dtype": dtype, "kernel": chosen, "best_of_transformers": best, "cost": cost,
        "largest_relative_difference": furthest, "seconds": {name: spread(values) for name, values in seconds.items()},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--triplets", type=int, default=32, help="of the batch")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256, 1024, 2048, 4096], help="for the comparison with transformers"
    )
    args = parser.parse_args()
    about = start(args)
    layers, tokens = ([2, 3], [64, 300]) if args.quick else (args.layers, args.tokens)
    with own_cache(args.backbone):
        dense = [against_dense(args, number, dtype) for dtype in args.dtype for number in layers]
        other = [against_transformers(args, number, dtype) for dtype in args.dtype for number in tokens]
    finish(
        args,
        {
            "benchmark": "moe", **about, "target_dense": TARGET_DENSE,
            "worst_dense": max(entry["cost"]["ratio"] for entry in dense), "target_transformers": TARGET_THEIRS,
            "worst_transformers": max(entry["cost"]["ratio"] for entry in other), "against_dense": dense,
            "against_transformers": other,
        },
    )


if __name__ == "__main__":
    main()
