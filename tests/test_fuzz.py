"""Damaged and hostile input with fixed seeds: whatever a file holds, the answer is a result or a `LabError` that says
what is wrong.
"""
import io
import json
import random
import tarfile
import warnings
from collections import Counter

import pandas as pd
import pytest
from PIL import Image
from small import TINY

from moon2_lab.config import TrainConfig, lab_settings, parse_value
from moon2_lab.data.catalog import Catalog
from moon2_lab.errors import LabError
from moon2_lab.folders import SUMS

pytestmark = pytest.mark.slow
PIECES = (
    b"", b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"\n", b"\r", b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b":", b"-1", b"1e999", b"NaN", b"null", b"true", "é".encode(), "名".encode(), b"'" * 40,
    b"[" * 400,
    b"9" * 400,
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOON2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def damaged(data: bytes, rng: random.Random) -> bytes:
    "The bytes with one to four changes: a bit, a byte, a cut, a piece put in, a stretch taken out, doubled or moved."
    held = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, length = rng.randrange(len(held) + 1), rng.choice((1, 2, 8, 60))
        kind = rng.randrange(7)
        if kind == 0 and place < len(held):
            held[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and place < len(held):
            held[place] = rng.randrange(256)
        elif kind == 2:
            del held[place:]
        elif kind == 3:
            held[place:place] = rng.choice(PIECES)
        elif kind == 4:
            del held[place : place + length]
        elif kind == 5:
            held[place:place] = held[place : place + length]
        else:
            stretch = held[place : place + length]
            del held[place : place + length]
            there = rng.randrange(len(held) + 1)
            held[there:there] = stretch
    return bytes(held)


def attack(name: str, rounds: int, work, seed: int = 0) -> Counter:
    """Do the work (number, rng) again and again: how often it gave a result, how often which error. Everything but a
    `LabError` fails.
    """
    counts, raw = Counter(), []
    for number in range(rounds):
        rng = random.Random(f"{name}:{seed}:{number}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                work(number, rng)
            counts["result"] += 1
        except LabError as error:
            assert error.what and str(error)
            counts[type(error).__name__] += 1
        except Exception as error:
            raw.append(f"round {number}: {type(error).__name__}: {str(error)[:160]}")
    print(f"fuzz {name}: {rounds} rounds, {dict(counts)}")
    assert not raw, f"{len(raw)} of {rounds} raw errors in {name}:\n" + "\n".join(raw[:8])
    return counts


TABLES = {
    "csv": "id,title,category,colour,image\n"
    + "".join(f'{i},"Red ""big"" mug, no {i}",Home > Mugs,red,p{i % 4}.png\n' for i in range(12)),
    "tsv": "sku\tname\tprice\n" + "".join(f"{i}\tBlue lamp {i}\t9.5\n" for i in range(12)),
    "jsonl": "".join(
        json.dumps(
            {"id": i, "title": f"Mug {i}", "attributes": {"colour": ["red", "blue"]}, "images": [{"large": "p1.png"}]}
        )
        + "\n"
        for i in range(12)
    ),
    "json": json.dumps(
        {
            "products": [
                {"id": i, "title": {"language_tag": "en", "value": f"Mug {i}"}, "image": "p2.png", "price": 1.5}
                for i in range(12)
            ]
        }
    ),
}


def png(number=1, size=(9, 7), kind="PNG", mode="RGB"):
    held = io.BytesIO()
    Image.new(mode, size, number).save(held, kind)
    return held.getvalue()


@pytest.mark.parametrize("kind", [*TABLES, "parquet"])
def test_tables(kind, tmp_path):
    "moon2 data import csv of a damaged table."
    from moon2_lab.data.importers.importer import import_catalog

    if kind == "parquet":
        held = io.BytesIO()
        pd.DataFrame(
            [(str(i), f"Mug {i}", ["p1.png"]) for i in range(12)], columns=["id", "title", "image"]
        ).to_parquet(held)
        whole = held.getvalue()
    else:
        whole = TABLES[kind].encode()

    def work(number, rng):
        folder = tmp_path / str(number)
        folder.mkdir()
        for place in range(4):
            (folder / f"p{place}.png").write_bytes(png(place))
        (folder / f"shop.{kind}").write_bytes(damaged(whole, rng))
        import_catalog("csv", folder / f"shop.{kind}", tmp_path / f"out{number}")

    counts = attack(f"import of {kind}", 120, work)
    assert counts["result"] > 10


@pytest.mark.parametrize("name", ["products.parquet", "triplets.parquet", "images-00.tar"])
def test_catalogues(name, tmp_path):
    "A damaged table or archive of a catalogue: `moon2 data check`, then every picture."
    data = {}
    rows = [
        (f"p{i}", f"Mug {i}", json.dumps({"colour": "red"}), json.dumps([f"images/{i}.png"]), "train") for i in range(8)
    ]
    for file, frame in (
        ("products.parquet", pd.DataFrame(rows, columns=["product_id", "title", "attributes", "image_paths", "split"])),
        (
            "triplets.parquet",
            pd.DataFrame(
                [("q", "mug", None, "p1", json.dumps(["p2"]), None)],
                columns=["query_id", "query_text", "query_image", "positive_id", "negative_ids", "noise"],
            ),
        ),
    ):
        held = io.BytesIO()
        frame.to_parquet(held)
        data[file] = held.getvalue()
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for i in range(8):
            entry = tarfile.TarInfo(f"images/{i}.png")
            entry.size = len(png(i))
            tar.addfile(entry, io.BytesIO(png(i)))
    data["images-00.tar"] = held.getvalue()

    def work(number, rng):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, content in data.items():
            (folder / file).write_bytes(damaged(content, rng) if file == name else content)
        for product in Catalog.load(folder, quarantine_limit=1.0):
            for ref in product.refs:
                ref.load()

    attack(f"catalogue with a damaged {name}", 150, work)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_pictures(kind):
    from moon2_lab.data.images import decode_image, examine_image

    whole = [png(1, (40, 30), kind), png(7, (33, 41), kind, "L")]

    def work(number, rng):
        data = damaged(whole[number % 2], rng)
        examine_image(data)
        assert decode_image(data).mode == "RGB"

    counts = attack(f"{kind} pictures", 400, work)
    assert counts["result"] > 20


def test_config_files(tmp_path, monkeypatch):
    "--config (YAML) and the [lab] section of settings.ini, up to a complete config."
    from moon2_lab.cli.options import read_config_file

    whole = b"temperature: 0.07\nomega_mode: balanced\nmatryoshka_dims: [64, 128]\nlearning_rate: 0.0001\n"
    whole += b"filter: true\nmax_steps: 10\n"

    def yaml(number, rng):
        (tmp_path / "c.yaml").write_bytes(damaged(whole, rng))
        TrainConfig(**read_config_file(tmp_path / "c.yaml"))

    def ini(number, rng):
        (tmp_path / "s.ini").write_bytes(
            damaged(
                b"[DEFAULT]\nlib_name = x\n[lab]\ntemperature = 0.07\nfilter = true\nmatryoshka_dims = "
                b"64,128\nmax_steps = 10\n",
                rng,
            )
        )
        lab_settings()
        TrainConfig()

    attack("YAML configs", 400, yaml)
    monkeypatch.setenv("MOON2_SETTINGS", str(tmp_path / "s.ini"))
    attack("settings.ini", 400, ini)
    kinds = [field.type for field in TrainConfig.__dataclass_fields__.values()]
    attack(
        "--set", 600,
        lambda number, rng: parse_value(
            "temperature", damaged(b"0.07,true", rng).decode("utf-8", "replace"), rng.choice(kinds)
        ),
    )


def test_saved_models(tmp_path):
    "config.json of a model: bytes changed, and values of another kind."
    from moon2_lab.model.encoder import Moon2Encoder

    Moon2Encoder.from_backbone("tiny", **TINY).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / SUMS).unlink(
        missing_ok=True
    )  # with the checksums every change is found before anything is read
    path = tmp_path / "model" / "config.json"
    whole, saved = path.read_bytes(), json.loads(path.read_text())
    others = (None, -1, 0, 10**9, 0.5, "", "x", [], {}, [1, 2], True, {"a": []})

    def bytes_changed(number, rng):
        path.write_bytes(damaged(whole, rng))
        Moon2Encoder.from_pretrained(tmp_path / "model")

    def values_changed(number, rng):
        changed, places = (
            json.loads(json.dumps(saved)), [saved, *(value for value in saved.values() if isinstance(value, dict))],
        )
        at = rng.randrange(len(places))
        inside = changed if at == 0 else next(value for name, value in changed.items() if saved[name] is places[at])
        inside[rng.choice(list(inside))] = rng.choice(others)
        path.write_text(json.dumps(changed))
        Moon2Encoder.from_pretrained(tmp_path / "model")

    attack("config.json of a model", 150, bytes_changed)
    attack("values of config.json", 200, values_changed)


def test_change_lists(tmp_path):
    from moon2_lab.training.triplet_review import Verdicts

    verdicts = Verdicts()
    verdicts.drop("q1", "not a mug")
    verdicts.put_back("q2")
    whole = verdicts.save(tmp_path / "verdicts.json").read_bytes()

    def work(number, rng):
        (tmp_path / "verdicts.json").write_bytes(damaged(whole, rng))
        list(Verdicts.load(tmp_path / "verdicts.json").to_frame().itertuples())

    attack("change lists", 600, work)


def test_filters():
    "Expressions from the words of the language in any order, and damaged good ones."
    from moon2_lab.retrieval.filters import parse_filter

    words = [
        "colour", "product_id", "==", "!=", "in", "not", "and", "or",
        "(",
        ")",
        "[",
        "]",
        ",", "'red'", '""', "-1", "1e999", "0x", "not in", "lambda", "__import__", "'" * 3, "\\", "\0", "名", "`",
        "#",
        "\n", "1j",
    ]
    words += ["None", ":=", "*", "f'{a}'"]
    good = "colour == 'red' and not (material in ['wood', 'steel'] or price != -1.5)"

    def work(number, rng):
        text = (
            " ".join(rng.choices(words, k=rng.randrange(1, 14)))
            if number % 2
            else damaged(good.encode(), rng).decode("utf-8", "replace")
        )
        parse_filter(text, {"colour", "material", "price", "product_id"})({"colour": {"red"}, "price": {"-1.5"}})

    attack("filters", 2000, work)


def test_vector_files(tmp_path):
    from moon2_lab.data.synthetic.generator import make_catalog
    from moon2_lab.model.encoder import Moon2Encoder
    from moon2_lab.retrieval.embed import embed_catalog
    from moon2_lab.retrieval.vectors import VectorFile

    catalog = Catalog.load(make_catalog(tmp_path / "shop", products=12, image_size=64))
    embed_catalog(Moon2Encoder.from_backbone("tiny", **TINY), catalog, tmp_path / "v.parquet")
    whole = (tmp_path / "v.parquet").read_bytes()

    def work(number, rng):
        (tmp_path / "w.parquet").write_bytes(damaged(whole, rng))
        VectorFile(tmp_path / "w.parquet").read()

    attack("vector files", 400, work)
