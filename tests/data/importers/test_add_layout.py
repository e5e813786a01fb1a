"A layout from outside the package: one place, used through the Python interface and through the command."
import io
import json
import re

import pandas as pd
import pytest
from moon2_lab.cli.main import main
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.importers.importer import import_catalog
from moon2_lab.data.importers.layouts import LAYOUTS, join_rows, register_layout
from moon2_lab.data.importers.records import Record
from moon2_lab.data.importers.schemas import HeaderlessFiles, Layout, ParsedProduct
from moon2_lab.errors import UsageError
from PIL import Image

# what a user writes to import the tables of a shop
MODULE = '''
from moon2_lab.data.importers.layouts import join_rows
from moon2_lab.data.importers.schemas import Layout

SHOP = Layout(
    "shop", "the export of our shop: Artikel, Bezeichnung, Foto, Warengruppe",
    {"product_id": ("Artikel",), "title": ("Bezeichnung",), "image": ("Foto",), "category_l1": ("Warengruppe",),
     "attributes.colour": ("Farbe",)},
    required=(("product_id",), ("title", "image")),
    files=r"export.*\\.csv", clean_id=lambda name: name.removeprefix("A-"), merge=join_rows,
)
NOTHING = 7
'''
ROWS = """Artikel;Bezeichnung;Foto;Warengruppe;Farbe
A-1;Tasse;1.png;Küche;rot
A-2;Lampe;;Wohnen;
A-1;Tasse;2.png;Küche;blau
"""


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder with the shop's export, two pictures, a second table, and the module with the layout; it is the working
    folder.
    """
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "export_2024.csv").write_text(ROWS, encoding="utf-8")
    (source / "prices.csv").write_text("Artikel;Preis\nA-1;3,50\n")
    for number in (1, 2):
        Image.new("RGB", (32, 32), (90 * number, 40, 40)).save(source / f"{number}.png")
    (tmp_path / "shop_layout.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return source


def check(folder):
    "What the import of the shop has to give."
    catalog = Catalog.load(folder)
    assert [(p.product_id, p.title, p.category_l1, len(p.image_paths)) for p in catalog] == [
        ("1", "Tasse", "Küche", 2), ("2", "Lampe", "Wohnen", 0),
    ]
    assert catalog.get("1").attributes == {"colour": "rot|blau"}
    assert set(pd.read_parquet(folder / "products.parquet")["source"]) == {"shop:export_2024.csv"}


def layout():
    "The layout of the module, from its text."
    names = {}
    exec(MODULE, names)
    return names["SHOP"]


def test_by_the_python_interface(shop, tmp_path):
    "A Layout object is all that is needed; registered, its name does."
    summary = import_catalog(layout(), shop, tmp_path / "by_object")
    assert summary.layout == "shop" and summary.counts["products"] == 2 and summary.counts["rows_joined"] == 1
    check(tmp_path / "by_object")
    register_layout(layout())
    try:
        import_catalog("shop", shop, tmp_path / "by_name")
        check(tmp_path / "by_name")
        with pytest.raises(UsageError, match="already"):
            register_layout(Layout("shop", "another", {}, ()))
    finally:
        del LAYOUTS["shop"]
    with pytest.raises(UsageError, match="unknown layout 'shop'"):
        import_catalog("shop", shop, tmp_path / "no")


def test_by_the_command(shop, tmp_path, capsys):
    "moon2 data import MODULE:NAME, with the module in the working folder; --map changes an entry as for any layout."
    assert main(["data", "import", "shop_layout:SHOP", str(shop), str(tmp_path / "out")]) == 0
    assert re.search(r"Warengruppe +-> category_l1: 3 / 0 / 0", capsys.readouterr().out)
    check(tmp_path / "out")
    assert (
        main(
            [
                "data", "import", "shop_layout:SHOP", str(shop), str(tmp_path / "mapped"), "--map",
                "category_l2=Warengruppe", "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["import"]["layout"] == "shop"
    assert Catalog.load(tmp_path / "mapped").get("1").category_l2 == "Küche"


@pytest.mark.parametrize(
    "name,message",
    [
        ("shap", "unknown layout 'shap'"), ("no_such_module:SHOP", "no layout 'no_such_module:SHOP'"),
        ("shop_layout:NOTHING", "is no Layout"), ("shop_layout:SHAP", "no layout"),
    ],
)
def test_a_layout_that_is_not_there(shop, tmp_path, capsys, name, message):
    assert main(["data", "import", name, str(shop), str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_hooks_of_files_without_a_header(shop, tmp_path):
    "A layout brings a reader and a parser for files whose columns have no names."

    def read(file, start):
        for number, line in enumerate(io.StringIO(file.path.read_text(encoding="utf-8")), 1):
            if number > start[1]:
                yield Record(file.name, str(number), (0, number), {"line": line.strip()})

    def parse(record):
        name, mark, title = record.values["line"].partition(" ")
        return ParsedProduct(name, title, where=record.where) if mark else "no title"

    (shop / "list.txt").write_text("1 Red mug\nbroken\n2 Lamp\n")
    columns = {"line": ["product_id", "title"]}
    lines = Layout(
        "lines", "id and title in a line", {}, (), endings=(".txt",),
        headerless=HeaderlessFiles(".txt", read, parse, columns), files=r"list\.txt", merge=join_rows,
    )
    summary = import_catalog(lines, shop, tmp_path / "out")
    assert [product.title for product in Catalog.load(tmp_path / "out")] == ["Red mug", "Lamp"]
    assert summary.reasons == {"no title": 1} and summary.columns[0]["read_as"] == ["product_id", "title"]


def test_the_help_names_every_layout(capsys):
    "The options of the command are data, the layouts are registered: the list in the help is the registry's."
    assert main(["data", "import", "--help"]) == 0
    line = " ".join(capsys.readouterr().out.partition("LAYOUT  ")[2].partition("MODULE:NAME")[0].split())
    assert sorted(line.removesuffix(", or").split(", ")) == sorted(LAYOUTS)
