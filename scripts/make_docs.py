#!/usr/bin/env python
"""Write docs/: one page for each room, with signature, parameters and first example of what its notebooks export.

    python scripts/make_docs.py            write docs/*.md
    python scripts/make_docs.py --check    exit 1 when they are not what the notebooks give
    python scripts/make_docs.py --html     also docs/_site/*.html, to be read in a browser without a network
"""
import argparse
import ast
import html
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from moon2_lab.cli.lookup_commands import line_comments
from rooms import ROOMS

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS, DOCS = ROOT / "nbs", ROOT / "docs"
NOTICE = "<!-- Made from the notebooks by scripts/make_docs.py: edit the notebook. -->\n\n"
MOST_LINES = 14  # of an example
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; text-align: left; vertical-align: top }
pre { background: #f6f6f6; padding: .6rem; overflow: auto }
"""


@dataclass
class Entry:
    "One public function or class: what a reader of the API wants to see of it."
    name: str
    signature: str
    docstring: str
    parameters: list[tuple[str, str, str, str]]  # name, type, default, comment
    returns: str = ""
    methods: list[tuple[str, str]] = field(default_factory=list)  # signature, first line
    example: str = ""


@dataclass
class Page:
    "One module: its notebook, heading, subtitle and entries."
    module: str
    notebook: Path
    subtitle: str
    entries: list[Entry]


def parameters_of(node: ast.FunctionDef, comments: dict[int, str]) -> list[tuple[str, str, str, str]]:
    "(name, type, default, comment) of each parameter but self."
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = dict(zip([arg.arg for arg in plain][len(plain) - len(arguments.defaults) :], arguments.defaults))
    defaults |= {arg.arg: value for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults) if value is not None}
    starred = [("*", arguments.vararg), ("**", arguments.kwarg)]
    found = [("", arg) for arg in [*plain, *arguments.kwonlyargs]] + [(star, arg) for star, arg in starred if arg]
    rows = []
    for star, arg in found:
        if arg.arg not in ("self", "cls"):
            default = ast.unparse(defaults[arg.arg]) if arg.arg in defaults else ""
            kind = ast.unparse(arg.annotation) if arg.annotation else ""
            rows.append(
                (
                    star + arg.arg, kind, default,
                    comments.get(arg.end_lineno, "") if arg.end_lineno != node.lineno else "",
                )
            )
    return rows


def signature_of(node: ast.FunctionDef, name: str | None = None) -> str:
    "`name(parameters)` without types."
    rows = parameters_of(node, {})
    return f"{name or node.name}({', '.join(n + (f'={d}' if d else '') for n, _, d, _ in rows)})"


def entry_of(node: ast.AST, comments: dict[int, str]) -> Entry:
    "The entry of a function or class."
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        made = next((part for part in node.body if getattr(part, "name", "") == "__init__"), None)
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        rows = (
            parameters_of(made, comments)
            if made
            else [
                (
                    part.target.id, ast.unparse(part.annotation), ast.unparse(part.value) if part.value else "",
                    comments.get(part.end_lineno, ""),
                )
                for part in fields
            ]
        )
        public = [part for part in node.body if isinstance(part, ast.FunctionDef) and not part.name.startswith("_")]
        methods = [(signature_of(part), (ast.get_docstring(part) or "").split("\n\n")[0]) for part in public]
        return Entry(node.name, signature_of(made, node.name) if made else node.name, docstring, rows, methods=methods)
    returns = " ".join(
        filter(
            None,
            [
                ast.unparse(node.returns) if node.returns else "",
                comments.get(node.returns.end_lineno, "") if node.returns else "",
            ],
        )
    )
    return Entry(node.name, signature_of(node), docstring, parameters_of(node, comments), returns)


def example_of(name: str, cells: list[dict], start: int) -> str:
    "The first demonstration of `name` after its cell: the source and, if it is short, what was printed."
    for cell in cells[start + 1 :]:
        source = "".join(cell["source"]).strip().removeprefix("#| slow\n")
        if cell["cell_type"] != "code" or source.startswith("#|") or not re.search(rf"\b{name}\b", source):
            continue
        if "test_eq(" in source.split("\n")[0] or len(source.splitlines()) > MOST_LINES:
            continue
        printed = "".join(
            "".join(output.get("text", "")) or "".join(output.get("data", {}).get("text/plain", ""))
            for output in cell["outputs"]
        )
        short = printed.strip() and len(printed.splitlines()) <= MOST_LINES and "<" not in printed
        return f"```python\n{source}\n```" + (f"\n\n```text\n{printed.strip()}\n```" if short else "")
    return ""


def page_of(path: Path) -> Page | None:
    "The page of a notebook; None where it exports nothing."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells]
    module = next(
        (re.search(r"#\| *default_exp +(\S+)", source)[1] for source in sources if "default_exp" in source), None
    )
    if module is None:
        return None
    entries = []
    for number, (cell, source) in enumerate(zip(cells, sources)):
        if cell["cell_type"] == "code" and re.match(r"#\| *export\b", source):
            comments = line_comments(source)
            for node in ast.parse(source).body:
                if (
                    isinstance(node, (ast.FunctionDef, ast.ClassDef))
                    and not node.name.startswith("_")
                    and not is_patch(node)
                ):
                    entry = entry_of(node, comments)
                    entry.example = example_of(node.name, cells, number)
                    entries.append(entry)
    subtitle = " ".join(line[2:].strip() for line in sources[0].splitlines() if line.startswith("> "))
    return Page(module, path, subtitle, entries)


def is_patch(node: ast.AST) -> bool:
    "Whether a function is a method that `@patch` puts into its class."
    return any("patch" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def cell_text(text: str) -> str:
    "Text in a cell of a Markdown table."
    return text.replace("|", "\\|").replace("\n", " ")


def code_text(text: str) -> str:
    "Code in a cell of a Markdown table, nothing where there is none."
    return f"`{cell_text(text)}`" if text else ""


def entry_lines(entry: Entry) -> list[str]:
    "An entry as Markdown."
    lines = [f"### {entry.name}", "", f"```python\n{entry.signature}\n```", "", entry.docstring, ""]
    if entry.parameters:
        lines += ["| parameter | type | default | what |", "|---|---|---|---|"]
        lines += [
            f"| `{n}` | {code_text(t)} | {code_text(d)} | {cell_text(c)} |" for n, t, d, c in entry.parameters
        ] + [""]
    if entry.returns and entry.returns != "None":
        lines += [f"Returns {code_text(entry.returns)}.", ""]
    if entry.methods:
        lines += [
            "| method | what |", "|---|---|",
            *(f"| {code_text(s)} | {cell_text(first)} |" for s, first in entry.methods), "",
        ]
    return lines + ([entry.example, ""] if entry.example else [])


def room_name(module: str) -> str:
    "The room that a module is in."
    return module.rpartition(".")[0] or "(root)"


def file_name(room: str) -> str:
    "The file of a room's page, without its ending."
    return "root" if room == "(root)" else room.replace(".", "-")


def room_page(room: str, pages: list[Page]) -> str:
    "The Markdown of one room."
    lines = [NOTICE + f"# {room}", "", "[all rooms](index.md)", ""]
    for page in pages:
        link = Path("..") / page.notebook.relative_to(ROOT)
        lines += [
            f"## {page.module}",
            "", page.subtitle, "", f"Notebook: [{page.notebook.name}]({link.as_posix()})", "",
        ]
        for entry in page.entries:
            lines += entry_lines(entry)
    return "\n".join(lines).rstrip() + "\n"


def index_page(rooms: dict[str, list[Page]]) -> str:
    "The Markdown of docs/index.md: the rooms in reading order with their modules."
    lines = [NOTICE + "# The interface, room by room", "", "A room imports only from the rooms above it.", ""]
    for room, pages in rooms.items():
        lines += [f"## [{room}]({file_name(room)}.md)", "", "| module | what it is |", "|---|---|"]
        lines += [
            f"| [{page.module}]({file_name(room)}.md#{page.module.replace('.', '')}) | {cell_text(page.subtitle)} |"
            for page in pages
        ] + [""]
    return "\n".join(lines).rstrip() + "\n"


def all_pages() -> dict[str, str]:
    "File name -> Markdown of everything in docs/ that is made here."
    found = filter(None, map(page_of, sorted(NOTEBOOKS.rglob("[0-9]*.ipynb"), key=lambda path: path.name)))
    rooms = {room: [] for room in ROOMS}
    for page in found:
        rooms[room_name(page.module)].append(page)
    return {"index.md": index_page(rooms)} | {
        f"{file_name(room)}.md": room_page(room, pages) for room, pages in rooms.items()
    }


def as_html(markdown: str, title: str) -> str:
    "A Markdown page as a page of its own, links to the other pages included."
    from nbconvert.filters import markdown2html

    body = re.sub(r'href="([\w-]+)\.md', r'href="\1.html', markdown2html(markdown))
    body = re.sub(r'<h2 id="[^"]*"', "<h2", body)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 when docs/ is stale")
    parser.add_argument("--html", action="store_true", help="also write docs/_site")
    args = parser.parse_args()
    pages = all_pages()
    if args.check:
        stale = [
            name
            for name, text in pages.items()
            if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text
        ]
        sys.exit(f"docs/ is not what the notebooks give ({', '.join(stale)}): run scripts/make_docs.py" if stale else 0)
    DOCS.mkdir(exist_ok=True)
    for name, text in pages.items():
        (DOCS / name).write_text(text, encoding="utf-8")
    if args.html:
        (DOCS / "_site").mkdir(exist_ok=True)
        for name, text in pages.items():
            (DOCS / "_site" / name).with_suffix(".html").write_text(as_html(text, name), encoding="utf-8")
    print(f"{len(pages)} pages in {DOCS.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
