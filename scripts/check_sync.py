#!/usr/bin/env python
"""Are the generated files what the notebooks say?

Deletes every generated module, exports and cleans the notebooks, rebuilds README.md, and compares with what was there
before. Exit 0: nothing changed. Exit 1: a readable
difference is printed and the fresh files are left in place, ready to be looked at and committed. Deleting first finds
modules whose notebook is gone; comparing the whole
`git status` (untracked files too) finds modules that were never added. In a clean checkout "nothing changed" therefore
means that `git status` is empty.
"""
import difflib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moon2_lab"
HAND_WRITTEN = {"__init__.py"}  # everything else directly in the package comes from a notebook
MAX_LINES = 60  # of difference printed per file


def modules():
    "Paths of the generated modules."
    return [
        path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in HAND_WRITTEN and "static" not in path.parts
    ]


def notebooks():
    "Paths of all notebooks."
    return [path for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def contents():
    "{path: bytes} of everything that a command generates or rewrites."
    pages = [
        path for path in (ROOT / "README.md", PACKAGE / "__init__.py", *(ROOT / "docs").glob("*.md")) if path.exists()
    ]
    return {path: path.read_bytes() for path in [*modules(), *notebooks(), *pages]}


def git_status():
    "The lines of `git status`, or None outside a work tree."
    try:
        done = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=all"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.splitlines() if done.returncode == 0 else None


def regenerate(before):
    "Delete, export, clean, rebuild; on a crash everything is put back as it was."
    environment = {
        name: value for name, value in os.environ.items() if name != "IN_TEST"
    }  # nbdev-export does nothing under IN_TEST
    scripts = Path(sys.executable).parent
    makers = [[sys.executable, ROOT / "scripts" / name] for name in ("make_readme.py", "make_docs.py")]
    commands = [[scripts / "nbdev-export"], [scripts / "nbdev-clean"], *makers]
    for path in modules():
        path.unlink()
    for command in commands:
        done = subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            for path, data in before.items():
                path.write_bytes(data)
            sys.stderr.write(done.stdout + done.stderr)
            sys.exit(f"sync: {Path(command[-1]).name} failed (see above); the files were put back as they were")


def difference(path, old, new):
    "A unified diff, cut to a readable length; for a notebook only the fact: its JSON tells a reader little."
    name = path.relative_to(ROOT).as_posix()
    if old is None:
        return f"{name}: generated now, was not there\n"
    if new is None:
        return f"{name}: was there, but no notebook generates it\n"
    if path.suffix == ".ipynb":
        what = "metadata, execution counts, object addresses or line breaks of the JSON"
        return f"{name}: nbdev-clean changed it ({what})\n"
    lines = list(
        difflib.unified_diff(
            old.decode().splitlines(), new.decode().splitlines(), f"{name} (in the tree)",
            f"{name} (from the notebook)", lineterm="", n=2,
        )
    )
    more = f"\n... {len(lines) - MAX_LINES} more lines" if len(lines) > MAX_LINES else ""
    return "\n".join(lines[:MAX_LINES]) + more + "\n"


def main():
    "Run the check; returns the exit status."
    before, status_before = contents(), git_status()
    regenerate(before)
    after, status_after = contents(), git_status()
    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    for path in changed:
        print(difference(path, before.get(path), after.get(path)))
    moved = sorted(set(status_after or []) ^ set(status_before or []))
    if moved and not changed:
        print("git status changed while generating:\n  " + "\n  ".join(moved))
    if changed or moved:
        print(
            f"sync: FAILED, {len(changed)} generated file(s) were stale. They are regenerated now: look at them and "
            f"commit them with their notebooks."
        )
        return 1
    note = f" ({len(status_before)} uncommitted change(s) in the tree)" if status_before else ""
    print(f"sync: ok, {len(modules())} modules and README.md are what {len(notebooks())} notebooks generate{note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
