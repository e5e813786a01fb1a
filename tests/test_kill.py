"""Every command that leaves something, killed at its system calls in turn: nothing is lost, nothing is mixed, nothing
is there by half, and the next start cleans up.
"""
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
from choosing import few
from faults import KILL, SMALL, Faults, leftovers, points

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has neither fork nor SIGKILL")
POINTS = 30


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    "A process whose forks run commands, and what they work on: shop, run, vectors.parquet, rows.csv."
    found = Faults(tmp_path_factory.mktemp("faults"))
    assert found(found.folder, "data", "check", found.folder / "shop").code == 0
    pictures = sorted((found.folder / "shop" / "images").iterdir())[:12]
    lines = [f"p{number},Acme mug number {number},{path.name}\n" for number, path in enumerate(pictures)]
    (found.folder / "rows.csv").write_text("id,title,image\n" + "".join(lines))
    yield found
    print(
        "\nsystem calls counted:",
        "every one that changes a file" if found.exact else "opens, renames and removals only (no C compiler)",
        file=sys.stderr,
    )
    found.close()


class Command(NamedTuple):
    "A command, how it goes on after a kill, and what it leaves."
    begin: list  # words
    again: callable  # work folder -> words
    leaves: callable  # work folder -> what is to be the same, None where there is nothing


def files(folder, but=()) -> dict | None:
    "path -> bytes of all files below a folder that are not hidden."
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }
    return {
        name: data
        for name, data in found.items()
        if not any(part.startswith(".") for part in name.split("/")) and name not in but
    } or None


def trained(run) -> dict | None:
    "The weights and the steps of a finished run."
    if not (run / "run_settings.json").is_file():
        return None
    about = json.loads((run / "run_settings.json").read_text())
    names = sorted(
        path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file() and path.name != ".lock"
    )
    return {
        "model": files(run / "model"), "steps": about["steps"], "rows": len(pd.read_parquet(run / "history.parquet")),
        "names": names,
    }


def augmented(out) -> dict | None:
    "An augmented catalogue that is done; how long it took aside."
    state = json.loads((out / "augmentation.json").read_text()) if (out / "augmentation.json").is_file() else {}
    return files(out, but=["augmentation.json"]) | {"settings": state["settings"]} if "summary" in state else None


def imported(out) -> dict | None:
    "An imported catalogue that is done."
    if not (out / "import.json").is_file():
        return None
    about = json.loads((out / "import.json").read_text())
    return files(out, but=["import.json"]) | {"counts": about["summary"]["counts"]}


def scored(work) -> dict | None:
    "Scores with their table of queries, where both are of one evaluation; how long they took aside."
    from moon2_lab.evaluation.evaluate import is_one_evaluation

    path = work / "scores" / "metrics.json"
    if not path.is_file() or not is_one_evaluation(path):
        return None
    return {
        "directions": json.loads(path.read_text())["directions"],
        "queries": len(pd.read_parquet(work / "scores" / "per_query.parquet")),
    }


def command(name, faults, work) -> Command:
    "The command of this name in a work folder."
    shop, run = faults.folder / "shop", faults.folder / "run"

    def resumed(*words):
        return lambda: [*words, "--resume"]

    if name == "synth":
        words = ["data", "synth", work / "out", "--products", "6", "--seed", "2"]
        return Command(words, lambda: words, lambda: files(work / "out"))
    if name == "import":
        words = ["data", "import", "csv", faults.folder / "rows.csv", work / "out", "--images", shop / "images"]
        return Command(words, resumed(*words), lambda: imported(work / "out"))
    if name == "augment":
        words = ["data", "augment", shop, work / "out", "--scorer", "none", "--kinds", "background", "--limit", "3"]
        return Command(words, lambda: words, lambda: augmented(work / "out"))
    if name == "embed":
        words = ["embed", run, "--catalog", shop, "--out", work / "v.parquet", "--piece", "10", "--dtype", "int8"]
        return Command(
            words, resumed(*words),
            lambda: (work / "v.parquet").read_bytes() if (work / "v.parquet").is_file() else None,
        )
    if name == "eval":
        words = ["eval", run, "--catalog", shop, "--split", "train", "--out", work / "scores"]
        return Command(words, lambda: words, lambda: scored(work))
    if name == "index":
        words = ["index", faults.folder / "vectors.parquet", "--uri", work / "v.db"]
        return Command(words, lambda: words, lambda: stored(work / "v.db", faults.folder / "vectors.parquet"))
    words = ["train", "--catalog", shop, "--out", work / "run", *SMALL]

    def again():
        begun = any((work / "run" / "checkpoints").glob("step-*"))
        return ["train", "--catalog", shop, "--out", work / "run", "--resume"] if begun else words

    return Command(words, again, lambda: trained(work / "run"))


def stored(uri, vectors) -> list | None:
    "What a search in the store finds; None where it says that there is nothing, or not all."
    from moon2_lab.errors import LabError
    from moon2_lab.retrieval.search import MilvusSearcher
    from moon2_lab.retrieval.vectors import VectorFile

    queries = VectorFile(vectors).read().vectors[:3]
    try:
        with MilvusSearcher(uri) as store:
            return [[(hit.product_id, round(hit.score, 5)) for hit in hits] for hits in store.search(queries, 10)] + [
                len(store)
            ]
    except LabError:
        return None


def finished(name, faults, folder):
    "(The number of calls of an undisturbed run, what it leaves.)"
    work = folder / "whole"
    work.mkdir()
    one = command(name, faults, work)
    done = faults(work, *one.begin)
    assert done.code == 0, done.said
    assert leftovers(work) == [] or name == "index", leftovers(work)
    return done.calls, one.leaves()


SPARE = 5  # threads: one run makes a few calls more than another


def killed_at(name, faults, folder, n, whole, calls) -> str:
    "What is wrong after a kill at call n and the next start; empty where all is well."
    work = folder / f"killed-{n}"
    work.mkdir()
    one = command(name, faults, work)
    done = faults(work, *one.begin, n=n, mode=KILL)
    if done.code == 0 and n > calls - SPARE and one.leaves() == whole:  # it ended a call or two before the last point
        return ""
    if done.code != -9:
        return f"was not killed: {done.code} {done.said[-300:]}"
    if one.leaves() not in (None, whole):
        return "partial: what is there under the final name is not whole"
    done = faults(work, *one.again())
    if done.code:
        return f"lost: {done.said[-400:]}"
    if one.leaves() != whole:
        return "mixed: the result is another one"
    left = [] if name == "index" else leftovers(work)
    return f"leftovers: {left}" if left else ""


def check_kills(name, faults, folder, most):
    "Kill at `most` of the calls; nothing may be wrong."
    calls, whole = finished(name, faults, folder)
    wrong = {n: told for n in points(calls, most) if (told := killed_at(name, faults, folder, n, whole, calls))}
    counts = Counter(told.split(":")[0] for told in wrong.values())
    print(f"\n{name}: {calls} calls, killed at {len(points(calls, most))}, wrong: {dict(counts)}", file=sys.stderr)
    assert not wrong, "\n".join(f"call {n}: {told}" for n, told in wrong.items())


@pytest.mark.parametrize("name", few(["synth", "import", "augment", "embed", "train"], "import", "embed", "train"))
def test_killed_at_a_few_calls(name, faults, tmp_path):
    check_kills(name, faults, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synth", "import", "augment", "embed", "eval", "index", "train"])
def test_killed_at_thirty_calls(name, faults, tmp_path):
    check_kills(name, faults, tmp_path, POINTS)
