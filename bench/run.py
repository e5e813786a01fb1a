"""Run all benchmarks, one after the other, each in a process of its own; a table of ratios, then one JSON object.

    make bench ARGS="--catalog path/to/catalogue"
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_BENCHMARKS = {"run", "common", "gpu"}  # gpu is for another kind of machine


def run(name: str, words: list[str]) -> dict:
    "The JSON object that benchmark `name` ends with; its other lines are passed on as they come."
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, str(HERE / f"{name}.py"), *words], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    last = ""
    for line in process.stdout:
        if last:
            print("  " + last, flush=True)
        last = line.rstrip()
    if process.wait():
        return {"benchmark": name, "failed": process.returncode}
    try:
        return json.loads(last)
    except ValueError:
        return {"benchmark": name, "failed": "no JSON object at the end"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    parser.add_argument("--only", nargs="+", choices=there, default=there)
    parser.add_argument("--json", help="also write the JSON object to this file")
    args, words = parser.parse_known_args()
    results = {}
    for name in args.only:
        print(f"== {name}", flush=True)
        begun = time.perf_counter()
        results[name] = run(name, words) | {"minutes": round((time.perf_counter() - begun) / 60, 2)}
    text = json.dumps({"benchmarks": results})
    if args.json:
        Path(args.json).write_text(text + "\n")
    print(text)
    failed = [name for name, result in results.items() if "failed" in result]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
