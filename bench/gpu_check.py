"""All that is to be seen on a GPU, in one go: the tests marked `gpu`, the steps of small and of published shapes.
Writes bench/results/gpu-<card>.json and a page beside it.

    make gpu-check                    # with the Python that has a CUDA build of torch: make gpu-check PYTHON=python3
    python bench/gpu_check.py --shapes Qwen3-VL-2B
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from jinja2 import Template

HERE = Path(__file__).resolve().parent
PAGE = Template(
    """# {{ card }}

torch {{ versions.torch }}, transformers {{ versions.transformers }}, peft {{ versions.peft }}.
Tests marked `gpu`: {{ tests }}.

A training step of published shapes: random weights, decoder frozen in bfloat16, low-rank experts (Z 4, top 2, rank 16)
in every layer, LoRA of rank 16 on attention, gradient checkpointing, pictures of 144 tokens, vision encoder not run.
Share: of the measured peak of a bfloat16 matrix product. Memory: at the peak, and predicted, GB.

| shape | tokens a step | tokens a second | share | memory | predicted | waits a step |
|---|---|---|---|---|---|---|
{% for s in shapes -%}
| {{ s.shape }} | {{ "{:,}".format(s.tokens_per_step) }} | {{ "{:,.0f}".format(s.tokens_per_second) }} | \
{{ "%.2f"|format(s.share_of_peak) }} | {{ "%.1f"|format(s.peak_memory_mb / 1024) }} | \
{{ "%.1f"|format(s.predicted_memory_mb / 1024) if s.predicted_memory_mb else "-" }} | {{ s.waits_per_step }} |
{% endfor -%}
""",
    keep_trailing_newline=True,
)


def run(words: list[str], seconds: int) -> str:
    "The output of a Python program beside this one; ends the check when it fails."
    print("$ python", *words, flush=True)
    done = subprocess.run([sys.executable, *words], cwd=HERE.parent, capture_output=True, text=True, timeout=seconds)
    print(done.stdout[-3000:], done.stderr[-3000:] if done.returncode else "", flush=True)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with {done.returncode}")
    return done.stdout


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["Qwen3-VL-2B", "Qwen2.5-VL-3B", "Qwen3-VL-8B"])
    parser.add_argument("--backbone", default="mini", help="mini or tiny, of bench/gpu.py")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device on this machine: nothing was checked", file=sys.stderr)
        return 2
    card = torch.cuda.get_device_name()
    tests = run(["-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"], 1800).strip().splitlines()[-1]
    result = {"device": card, **versions(), "tests": tests}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        run(["bench/gpu.py", "--backbone", args.backbone, "--json", str(path)], 1800)
        result["small"] = json.loads(path.read_text())
        run(["bench/gpu_shapes.py", "--shapes", *args.shapes, "--json", str(path)], 3600)
        result["shapes"] = json.loads(path.read_text())["shapes"]
    args.out.mkdir(exist_ok=True)
    name = args.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}"
    name.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    name.with_suffix(".md").write_text(
        PAGE.render(card=card, versions=versions(), tests=tests, shapes=result["shapes"])
    )
    print(f"written: {name}.json and {name}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
