"""The house rules: project files agree, notebooks are clean, imports go downwards, nothing heavy is loaded unasked,
nothing of a machine is in the repository.
"""
import ast
import configparser
import dataclasses
import importlib.util
import json
import re
from collections import Counter
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moon2_lab"
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
MODULE_NOTEBOOKS = [path for path in NOTEBOOKS if path.name[0].isdigit() and path.parent.name != "lessons"]
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem not in {"__init__", "_modidx"}
}
sys.path.insert(0, str(ROOT / "scripts"))
from measure_house import imported_modules, room_of  # noqa: E402
from rooms import ROOMS  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def settings():
    "settings.ini as nbdev 2 reads it: the section DEFAULT is a section like any other here."
    parser = configparser.ConfigParser(default_section="_", interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser


def cells(path, kind):
    "The source of each cell of one kind."
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


def named(path):
    "A test id that a reader recognises."
    return path.relative_to(ROOT).as_posix()


def module_of(path):
    "The dotted name of the module that a notebook must export, from where it lies."
    return ".".join([*path.relative_to(ROOT / "nbs").parent.parts, path.stem.split("_", 1)[1]])


# ---------------------------------------------------------------------------------------------- project files


def test_settings_and_pyproject_agree():
    "Two files say what the project is: nbdev 2 reads one, nbdev 3 and pip the other."
    ini, project, nbdev = settings()["DEFAULT"], PROJECT["project"], PROJECT["tool"]["nbdev"]
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text())[1]
    assert ini["lib_name"] == project["name"]
    assert {ini["lib_path"], ini["nbs_path"]} == {nbdev["lib_path"], nbdev["nbs_path"]} and ini["doc_path"] == nbdev[
        "doc_path"
    ]
    assert ini["version"] == version and "version" in project["dynamic"]
    assert ">=" + ini["min_python"] == project["requires-python"]
    assert ini["requirements"].split() == project["dependencies"]
    assert ini["dev_requirements"].split() == project["optional-dependencies"]["dev"]
    assert ini["tst_flags"] == nbdev["tst_flags"] and ini["description"] == project["description"]
    assert ini["console_scripts"] == "moon2=" + project["scripts"]["moon2"]


def test_nbdev_reads_the_project_as_meant():
    "The options that keep nbdev from rewriting files behind our back."
    from nbdev.config import get_config

    config = get_config(ROOT)
    assert config.update_pyproject is False and config.exec_profile is False
    assert config.lib_path == PACKAGE and config.nbs_path == ROOT / "nbs"
    assert "Documentation" not in PROJECT["project"].get("urls", {}), (
        "a documentation address would change what nbdev 2 exports"
    )


def test_lab_section_is_the_dataclass_defaults(monkeypatch):
    "[lab] lists every field of TrainConfig, in its order, with its default: the file is documentation that works."
    from moon2_lab.config import FROM_MODEL, TrainConfig, parse_value

    monkeypatch.delenv("MOON2_SETTINGS", raising=False)
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    section = dict(settings()["lab"])
    assert list(section) == list(fields), (
        f"missing {[n for n in fields if n not in section]}, unknown {[n for n in section if n not in fields]}"
    )
    different = [f"{n} = {f.default}" for n, f in fields.items() if parse_value(n, section[n], f.type) != f.default]
    assert not different, "settings.ini [lab] should say:\n" + "\n".join(different)
    defaults = {name: field.default for name, field in fields.items()}
    assert dataclasses.asdict(TrainConfig()) == defaults | FROM_MODEL["mini"]  # 0 and auto there: the backbone's own


def test_constraints_name_a_tested_version_of_every_requirement():
    "What make installs is what was tested."
    from packaging.requirements import Requirement

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert pinned["torch"] == "2.13.0"
    for line in PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]:
        requirement = Requirement(line)
        assert requirement.specifier, f"{line}: give bounds"
        assert requirement.specifier.contains(pinned[requirement.name.lower()]), (
            f"{line}, but constraints.txt has {pinned[requirement.name.lower()]}"
        )


def test_every_import_is_a_declared_dependency():
    "What the modules import is what pyproject.toml asks for, so that nothing arrives by luck."
    from importlib.metadata import packages_distributions

    declared = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in PROJECT["project"]["dependencies"]}
    optional = {"tensorboard", "trackio", "wandb", "cv2", "diffusers", "sentence_transformers", "umap"}
    names = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            names |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()
    where = packages_distributions()
    foreign = names - set(sys.stdlib_module_names) - {"moon2_lab"} - optional
    missing = {
        name for name in foreign if not declared & {dist.lower().replace("_", "-") for dist in where.get(name, [name])}
    }
    assert not missing, f"imported but not declared in pyproject.toml: {missing}"


def test_make_targets_and_ci():
    "The documented targets exist, and the automatic run calls the README's test command."
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "test-all", "lab", "app", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M), f"no target {target}"
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "make test" in (ROOT / "README.md").read_text() and "make demo" in (ROOT / "README.md").read_text()


def test_readme_is_made_from_the_index_notebook():
    "README.md is generated: edit nbs/index.ipynb, then run scripts/make_readme.py."
    spec = importlib.util.spec_from_file_location("make_readme", ROOT / "scripts" / "make_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == module.readme(), "stale: run scripts/make_readme.py"
    assert (ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8") == module.fill_map(), "stale: run make_readme.py"
    assert len(text.splitlines()) < 200


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_lines_of_modules_have_at_most_120_characters(module):
    "The lists of names that nbdev writes are left out; the linter sees to all other files."
    text = re.sub(r"^__all__ = \[.*?\]$", "", MODULES[module].read_text(encoding="utf-8"), flags=re.S | re.M)
    assert not [line for line in text.splitlines() if len(line) > 120]


def test_docs_are_made_from_the_notebooks():
    "docs/*.md: pages of the interface are generated; edit the notebook, then run scripts/make_docs.py."
    command = [sys.executable, "scripts/make_docs.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/measured.md", "docs/demo.md", "data/README.md"]
)
def test_links_lead_somewhere(page):
    "Every relative link and picture of a page is there."
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", target)]
    missing = [target for target in targets if not ((ROOT / page).parent / target.split("#")[0]).exists()]
    assert not missing, f"links to nothing: {missing}"


def test_recipes_of_contributing_run():
    """The code that CONTRIBUTING.md shows, one block after the other, in a process of its own; each registers what it
    shows.
    """
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.S)
    asked = """
from moon2_lab.explain.attribution import METHODS
from moon2_lab.objective.objective import ALIGNMENT
from moon2_lab.objective.recipes import RIVALS
print(sorted({"query_pair", "words", "vector_length"} & {*ALIGNMENT, *RIVALS, *METHODS}), SHOP.name)
"""
    done = subprocess.run([sys.executable, "-c", "\n".join([*blocks, asked])], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip().endswith("['query_pair', 'vector_length', 'words'] shop"), done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebook_outputs_are_small_and_deterministic(path):
    "What a notebook carries in git."
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata, "saved widget state"
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        assert cell.execution_count is None, f"cell {number}: execution count (run nbdev-clean)"
        for output in cell.outputs:
            assert output.output_type != "error", f"cell {number}: stored error {output.get('ename')}"
            for mime, data in output.get("data", {}).items():
                size = len(data if isinstance(data, str) else json.dumps(data))
                assert "widget-view" not in mime, f"cell {number}: stored widget view"
                assert not (mime == "text/html" and size > 20_000), f"cell {number}: {size} characters of HTML"
                assert not (mime.startswith("image/") and size * 3 / 4 > 100_000), (
                    f"cell {number}: picture of {size * 3 // 4} bytes"
                )
                assert size <= 300_000, f"cell {number}: {mime} of {size} characters"
            text = "".join(output.get("text", "")) + json.dumps(output.get("data", {}))
            assert not re.search(r" at 0x[0-9a-f]{6,}", text), f"cell {number}: object address in the output"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_saved_figures_are_seen_where_no_script_runs(path):
    """A plotly figure is saved with a picture beside it, for GitHub and nbconvert (`begin_notebook` sees to it), and no
    lesson opens with renderers and filters of warnings.
    """
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())]
    for kinds in (set(output.get("data", {})) for output in outputs):
        alone = "application/vnd.plotly.v1+json" in kinds and not kinds & {"image/png", "image/svg+xml"}
        assert not alone, "a figure without a picture: call begin_notebook() and run the notebook again"
    assert path.parent.name != "lessons" or not re.search(r"renderers|filterwarnings", "".join(cells(path, "code")))


@pytest.mark.parametrize("path", MODULE_NOTEBOOKS, ids=named)
def test_module_notebook_has_the_form_of_the_house(path):
    """A heading with a subtitle, one default_exp named like the file, imports in cells of their own, no star imports, a
    readable length.
    """
    notebook = json.loads(path.read_text(encoding="utf-8"))
    first = "".join(notebook["cells"][0]["source"])
    assert notebook["cells"][0]["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", first), (
        "starts with '# name' and '> subtitle'"
    )
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = cells(path, "code")
    assert re.fullmatch(r"#\|\s*default_exp ([\w.]+)\s*", code[0]) and code[0].split()[-1] == module_of(path)
    assert len(notebook["cells"]) <= 70, f"{len(notebook['cells'])} cells: split it"
    for source in (source for source in code if source.startswith("#| export")):
        body = [
            node for node in ast.parse(source).body if "_all_" not in ast.unparse(node)
        ]  # _all_: names handed on to readers of this module
        kinds = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in body}
        assert kinds != {True, False}, f"imports stand in cells of their own:\n{source[:200]}"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                assert node.names[0].name != "*" and node.level == 0, (
                    f"absolute imports by name only: {ast.unparse(node)}"
                )


@pytest.mark.parametrize("path", MODULE_NOTEBOOKS, ids=named)
def test_module_notebook_shows_its_idea_and_asks(path):
    "A picture, a rendered page or a diagram; at the end an exercise, with one answer that is run as a test."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    shown = {kind for output in outputs for kind in output.get("data", {})} & {"image/png", "image/jpeg", "text/html"}
    assert shown or "```mermaid" in "".join(cells(path, "markdown")), "nothing to look at"
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    last = max(place for place, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "markdown")
    assert sources[last].startswith("## Exercise\n"), "the last words are the exercise"
    answer = sources[last + 1]
    assert answer.startswith("#| hide\n# One answer\n")
    assert re.search(r"\bassert |\btest_\w+\(", answer), "an answer that nothing checks"


def test_no_two_notebooks_export_one_module():
    """They would overwrite each other in silence. And every module has its notebook, and every notebook a number of its
    own.
    """
    names = [cells(path, "code")[0].split()[-1] for path in MODULE_NOTEBOOKS]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"exported twice: {twice}"
    assert set(MODULES) == set(names), (
        f"without notebook: {set(MODULES) - set(names)}; not exported: {set(names) - set(MODULES)}"
    )
    numbers = [path.name.split("_")[0] for path in MODULE_NOTEBOOKS]
    assert len(numbers) == len(set(numbers)) and all(len(number) == 3 for number in numbers), sorted(
        n for n in numbers if numbers.count(n) > 1
    )


# ---------------------------------------------------------------------------------------------- imports

NUMBER = {module_of(path): int(path.stem.split("_", 1)[0]) for path in MODULE_NOTEBOOKS}
SEES_ONLY = {  # tighter than the order of the numbers: what sees arrays must not learn about models
    "objective.contrastive": {"errors", "config", "runtime"}, "objective.omega_alarm": {"config"},
    "objective.objective_weights": {"errors", "config", "objective.contrastive"},
    "objective.sample_filter": {"config", "objective.contrastive"},
    "objective.objective": {
        "errors", "config", "runtime", "objective.contrastive", "objective.objective_weights",
        "objective.sample_filter",
    },
    "evaluation.statistics": {"errors", "config"}, "evaluation.ranking": {"errors", "config", "evaluation.statistics"},
    "reporting.tables": {"errors", "config", "evaluation.statistics", "objective.omega_alarm"},
    "reporting.run_figures": {"errors", "config", "objective.omega_alarm", "reporting.tables"},
    "widgets.training": {
        "errors", "config", "objective.omega_alarm", "reporting.tables", "reporting.run_figures",
        "reporting.still_figures", "widgets.run_curves", "widgets.step_what_if",
    },
}


def imports_of(source, name="-"):
    "Modules of this package that a piece of Python imports, wherever in it."
    return imported_modules(ast.parse(source), name, set(MODULES))


def without_magics(source):
    "Notebook code as plain Python: magics and shell lines dropped."
    return "\n".join("pass" if re.match(r"\s*(%|!(?!=))", line) else line for line in source.splitlines())


def test_rooms_are_the_folders():
    "scripts/rooms.py lists every sub-package in reading order, and the numbers of the notebooks follow it."
    assert {room_of(name) for name in MODULES} == set(ROOMS)
    spans = {room: sorted(NUMBER[name] for name in MODULES if room_of(name) == room) for room in ROOMS}
    ends = [number for room in ROOMS for number in (spans[room][0], spans[room][-1])]
    assert ends == sorted(ends), spans


@pytest.mark.parametrize("name", MODULES)
def test_a_room_imports_from_rooms_above_it(name):
    "Lazily, too; so there is no cycle between rooms. Only `testing`, which builds objects of any room, is exempt."
    here = ROOMS.index(room_of(name))
    lower = {
        other
        for other in imports_of(MODULES[name].read_text(encoding="utf-8"), name)
        if ROOMS.index(room_of(other)) > here
    }
    assert name == "testing" or not lower, f"{name} imports from rooms below it: {lower}"


@pytest.mark.parametrize("path", MODULE_NOTEBOOKS, ids=named)
def test_imports_point_downwards(path):
    """A module imports lower-numbered modules only; so there can be no cycle. Its notebook may also draw: with what
    `reporting` has.
    """
    name = module_of(path)
    if name == "testing":
        return
    exported = imports_of(MODULES[name].read_text(encoding="utf-8"), name) - {name}
    upwards = {other: NUMBER[other] for other in exported if NUMBER[other] >= NUMBER[name]}
    assert not upwards, f"{name} ({NUMBER[name]}) imports upwards: {upwards}"
    shown = {other for source in cells(path, "code") for other in imports_of(without_magics(source))} - {name}
    upwards = {
        other: NUMBER[other] for other in shown if NUMBER[other] >= NUMBER[name] and room_of(other) != "reporting"
    }
    assert not upwards, f"the notebook of {name} ({NUMBER[name]}) imports upwards: {upwards}"
    assert name not in SEES_ONLY or exported <= SEES_ONLY[name], (
        f"{name} may see {SEES_ONLY[name]}, but imports {exported - SEES_ONLY[name]}"
    )


def test_apps_see_the_demo_only():
    "The launchers are thin: all they know is moon2_lab.app.interface."
    for path in sorted((ROOT / "apps").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert imports_of(source) <= {"app.interface"}, f"{named(path)} imports {imports_of(source)}"
        assert len(source.splitlines()) < 40, f"{named(path)} is no launcher any more"


TORCH_FREE = (  # useful without a model
    "errors", "files", "folders", "config", "runtime", "tiny_models", "http", "augment.llm_client",
    "data.importers.encodings",
    "data.importers.records", "data.importers.json_reader", "data.importers.parquet_reader", "data.importers.readers",
    "data.importers.schemas", "data.importers.download", "data.importers.image_store", "data.importers.catalog_writer",
    "data.importers.splits", "data.importers.layouts", "data.importers.importer", "data.synthetic.materials",
    "data.synthetic.garments", "data.synthetic.shapes", "data.synthetic.vocabulary", "data.synthetic.generator",
    "augment.image_transforms", "augment.subject_mask", "augment.image_edits", "augment.entities",
    "augment.title_enrichment", "evaluation.statistics", "evaluation.ranking", "evaluation.protocol",
    "evaluation.baselines", "evaluation.evaluate", "evaluation.embedding_figures", "evaluation.embedding_health",
    "evaluation.projection", "reporting.health_report", "objective.omega_alarm", "retrieval.filters",
    "retrieval.vectors",
    "retrieval.milvus_client", "retrieval.milvus", "retrieval.search", "reporting.tables", "reporting.alarms",
    "reporting.run_figures", "reporting.html", "reporting.figure_svg", "reporting.run_report", "reporting.comparison",
    "reporting.comparison_report", "cli.options", "cli.commands", "cli.main", "data.text_fields",
    "data.category_fields", "data.attribute_fields", "data.image_fields", "data.image_folder", "data.images",
    "data.products", "data.catalog_tables", "data.catalog", "data.queries", "data.negatives", "data.triplets",
    "data.sampler", "data.label_noise", "evaluation.seed_statistics", "studies.study_tests",
    "studies.modality_balance", "studies.modality_stress", "reporting.stress_report", "reporting.study_figures",
)
HEAVY = (
    "torch", "transformers", "peft", "accelerate", "captum", "gradio", "plotly", "matplotlib", "sklearn", "ipywidgets",
    "anywidget", "nbdev", "IPython", "cv2", "diffusers", "pymilvus", "milvus_lite", "faiss", "sentence_transformers",
)
MAY_IMPORT = {  # heavy packages, and the modules that may import them when they are imported themselves
    "transformers": {"model.backbone"},
    "peft": set(),
    "accelerate": set(),
    "captum": set(),
    "gradio": {"app.interface", "app.map_tab", "app.tabs"},
    "plotly": set(),
    "matplotlib": set(),
    "sklearn": set(),
    "ipywidgets": {"widgets.training"},
    "anywidget": {"widgets.heatmap", "widgets.routing", "widgets.step_what_if", "widgets.triplets"},
    "nbdev": set(),
    "IPython": set(),
    "cv2": set(),
    "diffusers": set(),
    "pymilvus": set(),
    "milvus_lite": set(),
    "faiss": set(),
    "sentence_transformers": {"model.sentence_module"},
}


def loaded_after(code):
    "The heavy packages that are loaded after running `code` in a fresh interpreter."
    report = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_light_modules_load_nothing_heavy():
    "`import moon2_lab` loads nothing; the modules that are useful without a model load none either."
    assert (
        loaded_after(
            "import moon2_lab; assert not [n for n in __import__('sys').modules if n.startswith('moon2_lab.')]; "
            "assert 'numpy' not in __import__('sys').modules"
        )
        == set()
    )
    assert loaded_after("\n".join(f"import moon2_lab.{name}" for name in TORCH_FREE)) == set()


def test_heavy_packages_are_imported_where_they_are_needed():
    "At the top of a module only by the module that is about them; elsewhere inside the function that uses them."
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
            for package in {name.split(".")[0] for name in names} & set(MAY_IMPORT):
                assert module in MAY_IMPORT[package], (
                    f"{module} imports {package} at its top; import it in the function that uses it"
                )


# ---------------------------------------------------------------------------------------------- what must not be there


def repository_files():
    "Files that are, or would be, under version control."
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("not a git work tree")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_nothing_of_a_machine_is_in_the_repository():
    "No paths of somebody's machine, no addresses of package indexes, no forgotten notes, no large files."
    machine = re.compile(r"(?<![\w.~}\)])/(?:home|root|Users|work|tmp|mnt)/[\w.]")
    hosts = re.compile(
        "|".join(re.escape(host) for host in ("pypi" + ".org", "python" + "hosted", "registry." + "npmjs"))
    )
    notes = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    large, found = {".safetensors": 8_000_000, ".gif": 2_000_000}, []  # bytes: trained weights, a moving picture
    for path in repository_files():
        data = path.read_bytes()
        if len(data) > large.get(path.suffix, 1_000_000):
            found.append(f"{named(path)}: {len(data)} bytes")
        if path.suffix in {".png", ".jpg", ".gif", ".parquet", ".tar", ".safetensors"}:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            if '"image/png": "' in line:  # letters of a picture say what they like
                continue
            found += [
                f"{named(path)}:{number}: {match[0]}"
                for pattern in (machine, hosts, notes)
                if (match := pattern.search(line))
            ]
    assert not found, "\n".join(found)


def test_the_public_interface_is_lazy_and_whole():
    "Each name at the top of the package is what its module defines; nothing is loaded until it is asked for."
    import moon2_lab

    assert set(moon2_lab.__all__) <= set(dir(moon2_lab))
    for module, names in moon2_lab._HOMES.items():
        for name in names.split():
            value = getattr(moon2_lab, name)
            assert getattr(value, "__module__", f"moon2_lab.{module}") == f"moon2_lab.{module}", (
                f"{name} is defined elsewhere"
            )
            assert value is getattr(sys.modules[f"moon2_lab.{module}"], name)
    with pytest.raises(AttributeError, match="no attribute 'Catalogue'"):
        getattr(moon2_lab, "Catalogue")  # noqa: B009
    assert loaded_after("import moon2_lab; moon2_lab.TrainConfig, moon2_lab.LabError") == set()


def test_files_of_tests_have_names_of_their_own():
    "pytest refuses a second file of one name in another folder, and with it all that it tests."
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]


@pytest.mark.parametrize("shared", ["parts.js", "map.js"])
def test_scripts_of_one_page_declare_different_names(shared):
    "parts.js stands before every other script of a page, map.js after some: a name declared twice stops them all."
    declared = {
        path.name: set(re.findall(r"^(?:async )?(?:const|let|var|function\*?|class) (\w+)", path.read_text(), re.M))
        for path in (ROOT / "moon2_lab" / "static").glob("*.js")
    }
    assert declared[shared] and len(declared) > 5
    twice = {name: both for name in declared if name != shared and (both := declared[name] & declared[shared])}
    assert not twice, twice
