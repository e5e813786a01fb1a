#!/usr/bin/env python
"""Build README.md from nbs/index.ipynb: hidden cells and `#|` lines dropped, links made relative to the repository
root.

The map of the notebooks is a cell of nbs/index.ipynb, filled here, that README.md leaves out.
"""
import json
import os
import re
import sys
from pathlib import Path

from rooms import PURPOSES

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "nbs" / "index.ipynb"
TARGET = ROOT / "README.md"
MAP_MARK = "<!-- map of the notebooks -->"
NOTICE = "<!-- Made from nbs/index.ipynb by scripts/make_readme.py: edit the notebook. -->\n\n"


def heading(path):
    "(title, subtitle) of a notebook: its first `# ` line and the `> ` lines under it."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        lines = "".join(cell["source"]).splitlines()
        if cell["cell_type"] == "markdown" and lines and lines[0].startswith("# "):
            return lines[0][2:].strip(), " ".join(line[2:].strip() for line in lines if line.startswith("> "))
    return path.stem, ""


def map_of_notebooks():
    "The numbered notebooks in reading order, a table for each room, then the lessons."
    numbered = [path for path in SOURCE.parent.rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    lines = []
    for room, purpose in {**PURPOSES, "lessons": "walk-throughs that export nothing"}.items():
        folder = SOURCE.parent / room.replace(".", "/") if room != "(root)" else SOURCE.parent
        lines += [f"### {room}: {purpose}", "", "| notebook | what it is |", "|---|---|"]
        for path in sorted(path for path in numbered if path.parent == folder):
            link = path.relative_to(SOURCE.parent).as_posix()
            lines.append(f"| [{path.stem}]({link}) | {heading(path)[1] or heading(path)[0]} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def fill_map():
    "The text of nbs/index.ipynb with the map of the notebooks as it is now, under its mark."
    notebook = json.loads(SOURCE.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if MAP_MARK in text:
            text = text[: text.index(MAP_MARK)] + f"{MAP_MARK}\n\n{map_of_notebooks()}"
            cell["source"] = text.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def relative_to_root(markdown):
    "Links and pictures of index.ipynb are relative to nbs/; in README.md they are relative to the root."
    def move(match):
        target = match[1]
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        return f"]({os.path.relpath(SOURCE.parent / target, ROOT)})"

    return re.sub(r"\]\(([^)\s]+)\)", move, markdown)  # also of a picture that is a link


def readme():
    "The text of README.md."
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(SOURCE, as_version=4)
    kept = []
    for cell in notebook.cells:
        directives = {
            line[2:].split()[0].rstrip(":")
            for line in cell.source.splitlines()
            if line.startswith("#|") and line[2:].split()
        }
        if directives & {"hide", "export", "exporti", "default_exp"} or MAP_MARK in cell.source:
            continue
        if "echo: false" in cell.source:
            directives.add("no-input")
        cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|")).strip()
        if "no-input" in directives:
            cell.source = ""
        kept.append(cell)
    notebook.cells = kept
    notebook.metadata["language_info"] = {"name": "python"}
    body, _ = MarkdownExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    body = re.sub(r"```python\s*```\n?", "", body)
    return NOTICE + re.sub(r"\n{3,}", "\n\n", relative_to_root(body)).strip() + "\n"


def main():
    "Write both files, or with --check exit with what is stale."
    for path, made in {SOURCE: fill_map(), TARGET: readme()}.items():
        if not path.exists() or path.read_text(encoding="utf-8") != made:
            if "--check" in sys.argv:
                sys.exit(f"{path.relative_to(ROOT)} is stale: run scripts/make_readme.py")
            path.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
