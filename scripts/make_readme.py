#!/usr/bin/env python
"""Build README.md from nbs/index.ipynb: hidden cells and `#|` lines dropped, the map of the notebooks filled in, links made relative to the repository root."""
import json
import os
import re
import sys
from pathlib import Path

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
    "A table of the numbered notebooks in reading order, then the lessons."
    rows = ["| notebook | what it is |", "|---|---|"]
    lessons = sorted((SOURCE.parent / "lessons").glob("*.ipynb"))
    numbered = {path for path in SOURCE.parent.rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    for path in [*sorted(numbered - set(lessons), key=lambda path: path.name), *lessons]:
        rows.append(f"| [{path.relative_to(SOURCE.parent).with_suffix('').as_posix()}]({path.relative_to(SOURCE.parent).as_posix()}) | {heading(path)[1] or heading(path)[0]} |")
    return "\n".join(rows)


def relative_to_root(markdown):
    "Links and pictures of index.ipynb are relative to nbs/; in README.md they are relative to the root."
    def move(match):
        target = match[2]
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        return f"{match[1]}({os.path.relpath(SOURCE.parent / target, ROOT)})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", move, markdown)


def readme():
    "The text of README.md."
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(SOURCE, as_version=4)
    kept = []
    for cell in notebook.cells:
        directives = {line[2:].split()[0].rstrip(":") for line in cell.source.splitlines() if line.startswith("#|") and line[2:].split()}
        if directives & {"hide", "export", "exporti", "default_exp"}:
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
    body = re.sub(r"```python\s*```\n?", "", body).replace(MAP_MARK, map_of_notebooks())
    return NOTICE + re.sub(r"\n{3,}", "\n\n", relative_to_root(body)).strip() + "\n"


if __name__ == "__main__":
    text = readme()
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text else "README.md is not what nbs/index.ipynb gives: run scripts/make_readme.py")
    if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
        TARGET.write_text(text, encoding="utf-8")
