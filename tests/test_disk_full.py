"""A full disk at the writes of every command in turn: one clear sentence, nothing of the user's is lost, and with space
again the same command goes on.
"""
import os
import sys

import pytest
from faults import FULL, leftovers, points
from test_kill import command, finished, faults  # noqa: F401  (the fixture)

pytestmark = [pytest.mark.skipif(os.name == "nt", reason="Windows has no fork"), pytest.mark.slow]
NAMES = ["synth", "import", "augment", "embed", "eval", "index", "train"]


def full_at(name, faults, folder, n, whole) -> str:  # noqa: F811
    "What is wrong when the disk is full from call n on, and when there is space again; empty where all is well."
    work = folder / f"full-{n}"
    work.mkdir()
    (work / "users.txt").write_text("of the user")
    one = command(name, faults, work)
    done = faults(work, *one.begin, n=n, mode=FULL)
    told = [line for line in done.said.splitlines() if line.startswith("moon2: ")]
    if done.code == 0:
        return "" if one.leaves() == whole else "silent: exit 0, but the result is not whole"
    if done.code != 2 or "Traceback" in done.said or len(told) != 1 or "free some space" not in told[0]:
        return f"unclear: exit {done.code}: {done.said[-400:]}"
    if one.leaves() not in (None, whole):
        return "partial: what is there under the final name is not whole"
    if (work / "users.txt").read_text() != "of the user":
        return "lost: a file of the user's"
    done = faults(work, *one.again())
    if done.code or one.leaves() != whole:
        return f"lost: with space again exit {done.code}: {done.said[-400:]}"
    left = [] if name == "index" else leftovers(work)
    return f"leftovers: {left}" if left else ""


def check_full(name, faults, folder, most):  # noqa: F811
    "A full disk from `most` of the calls on; nothing may be wrong."
    calls, whole = finished(name, faults, folder)
    tried = points(calls, most)
    wrong = {n: told for n in tried if (told := full_at(name, faults, folder, n, whole))}
    print(f"\n{name}: {calls} calls, full from {len(tried)} of them on, unclear {len(wrong)}", file=sys.stderr)
    assert not wrong, "\n".join(f"call {n}: {told}" for n, told in wrong.items())


@pytest.mark.parametrize("name", ["synth", "import", "embed", "train"])
def test_full_at_a_few_calls(name, faults, tmp_path):  # noqa: F811
    check_full(name, faults, tmp_path, 3)


@pytest.mark.parametrize("name", NAMES)
def test_full_at_many_calls(name, faults, tmp_path):  # noqa: F811
    check_full(name, faults, tmp_path, 40)


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "heatmap",
            [
                "heatmap", "run", "--catalog", "shop", "--query", "red mug", "--item-text", "a red mug", "--method",
                "gradient", "--quick", "--out", "map.html",
            ],
        ),
        (
            "compare",
            ["compare", "run", "run", "--catalog", "shop", "--out", "diff.html", "--explain", "0", "--split", "train"],
        ),
        ("eval", ["eval", "run", "--catalog", "shop", "--split", "train", "--out", "m.json"]),
    ],
)
def test_what_was_found_out_is_told_when_the_page_cannot_be_written(name, words, faults, tmp_path):  # noqa: F811
    "The disk is full when the result is written: it is printed all the same, and the exit code is 2."
    place = {
        "run": faults.folder / "run", "shop": faults.folder / "shop", "map.html": tmp_path / "map.html",
        "diff.html": tmp_path / "diff.html", "m.json": tmp_path / "m.json",
    }
    words = [place.get(word, word) for word in words]
    done = faults(tmp_path, *words)
    assert done.code == 0, done.said
    late, n = done, done.calls - 2
    while late.code == 0:  # the last calls are renames and removals, which need no space
        for path in tmp_path.iterdir():
            path.unlink()
        late, n = faults(tmp_path, *words, n=n, mode=FULL), n - 1
    said = {"heatmap": "score ", "compare": "t->mm", "eval": "t->mm"}[name]
    assert (
        late.code == 2 and "the disk is full" in late.said and "free some space" in late.said and said in late.said
    ), late.said
    assert list(tmp_path.iterdir()) == []  # no half page
    early = faults(tmp_path, *words, n=2, mode=FULL)
    assert early.code == 2 and "the disk is full" in early.said and said not in early.said, (
        early.said
    )  # before the work
