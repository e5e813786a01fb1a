#!/usr/bin/env python
"""Print the figures of the house: modules, rooms, names, functions, lines, imports between rooms.

    python scripts/measure_house.py                    of this checkout
    python scripts/measure_house.py --ref v0.1.0       of another commit, beside this checkout
    python scripts/measure_house.py --json figures.json
"""
import argparse
import ast
import collections
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "moon2_lab"
GENERATED = {"_modidx"}
sys.path.insert(0, str(ROOT / "scripts"))


def module_files(root: Path) -> dict[str, Path]:
    "Dotted name below the package -> file, of every module that is exported from a notebook."
    folder = root / PACKAGE
    files = sorted(path for path in folder.rglob("*.py") if path.stem not in GENERATED and path.stem != "__init__")
    return {".".join(path.relative_to(folder).with_suffix("").parts): path for path in files}


def imported_modules(tree: ast.Module, name: str, known: set[str]) -> set[str]:
    "The modules of the package that a module imports, lazily too; relative imports are resolved."
    here, found = f"{PACKAGE}.{name}".split("."), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (
                [*here[: -node.level], *filter(None, [node.module])] if node.level else (node.module or "").split(".")
            )
            targets = [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
        else:
            continue
        found |= {target.removeprefix(f"{PACKAGE}.") for target in targets if target.startswith(f"{PACKAGE}.")}
    return found & known


def exported_names(tree: ast.Module) -> list[str]:
    "The names of `__all__`."
    lists = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
    ]
    return [name for value in lists for name in ast.literal_eval(value)]


def defined_names(tree: ast.Module) -> list[str]:
    "Functions and classes at the top of a module that are not methods put into a class by `@patch`."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not is_patch(node)]


def is_patch(node: ast.AST) -> bool:
    "Whether a function is a method that fastcore's `@patch` puts into its class."
    return any(
        "patch" in {getattr(part, "id", ""), getattr(getattr(part, "func", None), "id", "")}
        for part in getattr(node, "decorator_list", ())
    )


def functions(tree: ast.Module) -> list[tuple[str, int]]:
    "(name, lines without the decorator) of every function and method."
    found = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in found]


def notebook_cells(root: Path) -> tuple[int, int]:
    "(cells that export, cells that test) of the notebooks of modules."
    exported = tested = 0
    for path in sorted((root / "nbs").rglob("*.ipynb")):
        sources = [
            "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
        ]
        if any("#| default_exp" in source for source in sources):
            exported += sum(bool(re.search(r"^#\| *export", source, re.M)) for source in sources)
            tested += sum(
                "#| export" not in source and bool(re.search(r"\btest_\w+\(|^assert |^    assert ", source, re.M))
                for source in sources
            )
    return exported, tested


def room_of(module: str) -> str:
    "The sub-package of a module; the root for a flat one."
    return module.rpartition(".")[0] or "(root)"


def room_edges(trees: dict[str, ast.Module]) -> dict[tuple[str, str], list[str]]:
    "(room, room it imports from) -> the module imports that make the edge."
    edges = collections.defaultdict(list)
    for name, tree in trees.items():
        for other in sorted(imported_modules(tree, name, set(trees))):
            if room_of(name) != room_of(other):
                edges[room_of(name), room_of(other)].append(f"{name} -> {other}")
    return dict(edges)


def measure(root: Path) -> dict:
    "All figures of a checkout."
    files = module_files(root)
    texts = {name: path.read_text() for name, path in files.items()}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    lines = [line for text in texts.values() for line in text.splitlines() if line.strip()]
    public = collections.Counter(name for tree in trees.values() for name in exported_names(tree))
    defined = collections.Counter(name for tree in trees.values() for name in defined_names(tree))
    lengths = sorted((length, f"{module}.{name}") for module, tree in trees.items() for name, length in functions(tree))
    exported, tested = notebook_cells(root)
    sizes = {name: len(text.splitlines()) for name, text in texts.items()}
    return {
        "modules": len(files),
        "rooms": len({room_of(name) for name in files}),
        "module lines": sum(sizes.values()),
        "longest module": max((size, name) for name, size in sizes.items()),
        "public names": sum(public.values()),
        "names defined in more than one module": sum(count > 1 for count in defined.values()),
        "which": sorted(name for name, count in defined.items() if count > 1),
        "functions": len(lengths),
        "median function, lines": statistics.median(length for length, _ in lengths),
        "functions over 40 lines": sum(length > 40 for length, _ in lengths),
        "longest function": lengths[-1],
        "share of lines over 100": round(sum(len(line) > 100 for line in lines) / len(lines), 4),
        "share of lines over 120": round(sum(len(line) > 120 for line in lines) / len(lines), 4),
        "@patch methods": sum(is_patch(node) for tree in trees.values() for node in ast.walk(tree)),
        "exporting cells": exported,
        "test cells per exporting cell": round(tested / max(exported, 1), 2),
        "edges between rooms": len(room_edges(trees)),
        "upward imports": upward_imports(trees),
    }


def upward_imports(trees: dict[str, ast.Module]) -> list[str]:
    """Imports from a room that stands below in `rooms.ROOMS`, but for those of `testing`; empty where a checkout has no
    rooms.
    """
    try:
        from rooms import ROOMS
    except ImportError:
        return []
    place = {room: number for number, room in enumerate(ROOMS)}
    wrong = [
        imports for (room, other), imports in room_edges(trees).items() if place.get(room, -1) < place.get(other, -1)
    ]
    return sorted(text for imports in wrong for text in imports if not text.startswith("testing ->"))


def measure_ref(ref: str) -> dict:
    "All figures of another commit."
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", ref, PACKAGE, "nbs"], check=True, capture_output=True
        ).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        return measure(Path(folder))


def told(value) -> str:
    "A figure as a cell of the table."
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
        return f"{value[0]} ({value[1]})"
    return str(len(value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", help="a commit to put beside this checkout")
    parser.add_argument("--json", metavar="FILE", help="also write everything to this file")
    args = parser.parse_args()
    columns = {args.ref: measure_ref(args.ref)} if args.ref else {}
    columns["now"] = measure(ROOT)
    width = max(map(len, columns["now"]))
    print(" " * width, *(f"{name:>40}" for name in columns))
    for name in columns["now"]:
        print(f"{name:<{width}}", *(f"{told(figures[name]):>40}" for figures in columns.values()))
    for name, figures in columns.items():
        for text in figures["upward imports"]:
            print(f"upward ({name}): {text}")
    if args.json:
        Path(args.json).write_text(json.dumps(columns, indent=1))


if __name__ == "__main__":
    main()
