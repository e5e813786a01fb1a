"""Attention averaged over all rows: recomputed from queries and keys, against eager attention that returns its weights.

A random Llama-like decoder of the width of mini (576 wide, 9 heads, 3 key heads) with 12 layers, one sequence of 1,024
tokens, both arms give the mean over all rows for every layer and head. Measured, in a process of
its own for each pass, in alternating order: extra peak memory (the highest resident size during the pass, less what the
same pass needs with fused attention alone) and seconds of a second pass. The two arms must agree
within 1e-5. Targets: extra memory at most 1/4 of eager's, and not slower.

    python bench/attention.py
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import finish, median, options, ratio, spread, start, told, verdict

MEMORY, TIME = 0.25, 1.0
ARMS = ("plain", "rows", "eager")


def peak() -> int:
    "Highest resident size of this process since the last reset, in bytes."
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def decoder(layers: int, attention: str):
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    }
    return LlamaModel(
        LlamaConfig(vocab_size=64, num_hidden_layers=layers, attn_implementation=attention, **shape)
    ).eval()


@torch.no_grad()
def passes(args) -> dict:
    "One arm: the peak of its first pass, the seconds of its second."
    from moon2_lab.explain.attention_recorder import record_attention

    model = decoder(args.layers, "eager" if args.arm == "eager" else "sdpa")
    tokens = torch.randn(1, args.tokens, 576, generator=torch.Generator().manual_seed(1))
    run = lambda **how: model(inputs_embeds=tokens, use_cache=False, **how)
    ask = {
        "plain": run,
        "rows": lambda: record_attention(model, run, {0: None})[0][:, :, 0],
        "eager": lambda: torch.stack([layer[0].mean(1) for layer in run(output_attentions=True).attentions]),
    }[args.arm]
    model(inputs_embeds=tokens[:, :8], use_cache=False)  # loads the libraries
    reset_peak()
    before = peak()
    found = ask()
    grown = peak() - before
    begun = time.perf_counter()
    ask()
    seconds = time.perf_counter() - begun
    if args.arm != "plain":
        np.save(args.out, found.numpy())
    return {"grown": grown, "seconds": seconds}


def in_own_process(args, arm: str, folder: str) -> dict:
    words = [
        sys.executable, __file__, "--arm", arm, "--out", f"{folder}/{arm}.npy", "--threads", str(args.threads),
        "--layers", str(args.layers), "--tokens", str(args.tokens),
    ]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def compare(args) -> dict:
    found = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.repeats):
            for arm in ARMS[:: 1 if number % 2 else -1]:
                found[arm].append(in_own_process(args, arm, folder))
        apart = float(np.abs(np.load(f"{folder}/rows.npy") - np.load(f"{folder}/eager.npy")).max())
    assert apart < 1e-5, f"the two arms do not give the same attention: {apart}"
    grown = {arm: [one["grown"] / 2**20 for one in found[arm]] for arm in ARMS}
    seconds = {arm: [one["seconds"] for one in found[arm]] for arm in ARMS}
    extra = {arm: [value - median(grown["plain"]) for value in grown[arm]] for arm in ("rows", "eager")}
    memory, slower = ratio(extra["rows"], extra["eager"]), ratio(seconds["rows"], seconds["eager"])
    print(
        f"{args.tokens} tokens, {args.layers} layers: extra {median(extra['rows']):.0f} MiB against "
        f"{median(extra['eager']):.0f} MiB; {told('memory', memory)} (target {MEMORY}: "
        f"{verdict(memory['ratio'], MEMORY, False, args.quick)})"
    )
    print(
        f"{median(seconds['rows']):.2f} s against {median(seconds['eager']):.2f} s, fused alone "
        f"{median(seconds['plain']):.2f} s; {told('time', slower)} (target {TIME}: "
        f"{verdict(slower['ratio'], TIME, False, args.quick)})"
    )
    return {
        "tokens": args.tokens, "layers": args.layers, "apart": apart, "memory": memory, "time": slower,
        "extra_mib": {arm: spread(values) for arm, values in extra.items()},
        "grown_mib": {arm: spread(values) for arm, values in grown.items()},
        "seconds": {arm: spread(values) for arm, values in seconds.items()},
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        torch.set_num_threads(args.threads)
        print(json.dumps(passes(args)))
        return
    about = start(args)
    if args.quick:
        args.layers, args.tokens = 2, 128
    finish(
        args,
        {"benchmark": "attention", **about, "targets": {"memory": MEMORY, "time": TIME}, "results": [compare(args)]},
    )


if __name__ == "__main__":
    main()
