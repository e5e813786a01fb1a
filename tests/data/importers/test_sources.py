"""Foreign data sets become catalogues: each layout as it is written, bad input set aside, bounded memory, and a killed
import that ends as if nothing had happened.
"""
import gzip
import hashlib
import io
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from choosing import few, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from moon2_lab.cli.main import main
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import decode_image
from moon2_lab.data.importers import download, importer, parquet_reader, readers, records
from moon2_lab.data.importers.download import Fetcher
from moon2_lab.data.importers.importer import import_catalog
from moon2_lab.data.importers.layouts import LAYOUTS
from moon2_lab.errors import DataError, UsageError
from moon2_lab.evaluation.evaluate import evaluate
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path_factory.mktemp("cache")))


def draw(number, kind="PNG", size=32):
    "A picture as a file; no two numbers give the same one."
    picture, held = Image.new("RGB", (size, size), "white"), io.BytesIO()
    ImageDraw.Draw(picture).rectangle(
        (4, 4, size - 6, size - 6), fill=(number * 37 % 256, number * 91 % 256, number // 7 % 256)
    )
    picture.save(held, kind)
    return held.getvalue()


def write_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw(number, "JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"))


def mbe_row(number, **changes):
    row = {
        "id": hashlib.md5(str(number).encode()).hexdigest(), "doc_title": f"红色连衣裙 {number} 👗",
        "doc_image": f"{number}.png", "doc_industry_name": "服饰", "doc_cate1_name": "女装", "doc_cate2_name": "连衣裙",
        "doc_cate3_name": "长裙", "doc_cate4_name": "修身长裙", "doc_attributes": "颜色:红色!!!白色,,尺码:XL",
    }
    return row | changes


def write_lines(path, given):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return path


def table(folder, name="products"):
    frame = pd.read_parquet(folder / f"{name}.parquet")
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def reasons(folder):
    return Counter(row["reason"].split(":")[0] for row in table(folder, "quarantine"))


# ---------------------------------------------------------------------------------------------- layouts


def test_mbe_as_documented(tmp_path):
    "Every documented column arrives, Chinese text and pictures unchanged."
    write_pictures(tmp_path, [f"{n}.png" for n in range(6)])
    summary = import_catalog(
        "mbe", write_lines(tmp_path / "mbe.jsonl", [mbe_row(n) for n in range(6)]), tmp_path / "out"
    )
    row = table(tmp_path / "out")[2]
    assert (row["product_id"], row["title"], row["category_l1"], row["category_l3"]) == (
        mbe_row(2)["id"], "红色连衣裙 2 👗", "女装", "长裙",
    )
    assert json.loads(row["attributes"]) == {
        "颜色": "红色|白色", "尺码": "XL", "category_l4": "修身长裙", "industry": "服饰",
    }
    assert (tmp_path / "out" / json.loads(row["image_paths"])[0]).read_bytes() == draw(2), (
        "a readable file is kept byte for byte"
    )
    assert row["source"] == "mbe:mbe.jsonl" and row["split"] in ("train", "valid", "test")
    assert summary.counts["products"] == summary.counts["pictures"] == 6 and summary.counts["set_aside"] == 0
    catalog = Catalog.load(tmp_path / "out")
    assert len(catalog) == 6 and catalog[2].attributes["颜色"] == "红色|白色" and catalog[2].has_image
    assert pq.read_schema(tmp_path / "out" / "products.parquet").names == [
        "product_id", "title", "description", "category_l1", "category_l2", "category_l3", "attributes", "image_paths",
        "source", "split",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images", "import.json", "products.parquet", "quarantine.parquet",
    ]


def test_the_hash_split_is_that_of_our_data():
    "r = first 8 hex digits of SHA-1 of 'moon2-split-v1:' + id, modulo 100."
    from moon2_lab.data.importers.splits import hash_split

    assert [hash_split(name) for name in ("fpi-1563", "fpi-1943", "fpi-1636", "gs-Galia-Melon")] == [
        "train", "valid", "test", "valid",
    ]


@pytest.mark.slow
@pytest.mark.data
def test_our_own_sets_come_back_as_they_were(data_root, tmp_path):
    "A set in our layout, read as any other table, gives the same catalogue: ids, texts, attributes, pixels, splits."
    summary = import_catalog("csv", data_root / "grocery-store" / "products.parquet", tmp_path / "out")
    ours, theirs = Catalog.load(tmp_path / "out"), Catalog.load(data_root / "grocery-store")
    assert summary.counts["set_aside"] == 0 and len(ours) == len(theirs) == 67
    for one in theirs:
        other = ours.get(one.product_id)
        assert (one.title, one.description, one.category_l2, one.attributes, one.split) == (
            other.title, other.description, other.category_l2, other.attributes, other.split,
        )
        assert [ref.pixels for ref in one.refs] == [ref.pixels for ref in other.refs]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "list.json", "csv", "csv.gz", "tsv", "parquet"])
def test_every_kind_of_file_gives_the_same_products(tmp_path, ending):
    given = [mbe_row(n, doc_title=f'连衣裙 "{n}", 长袖\nsecond line\t{n}') for n in range(50)]
    path, frame = tmp_path / f"rows.{ending}", pd.DataFrame(given)
    write = gzip.open if ending.endswith("gz") else open
    if ending == "parquet":
        frame.to_parquet(path, row_group_size=7)
    elif "json" in ending and ending != "list.json":
        with write(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in given)
    elif ending == "list.json":
        path.write_text(json.dumps(given, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        with write(path, "wt", encoding="utf-8", newline="") as file:
            frame.to_csv(file, index=False, sep="\t" if "tsv" in ending else ",")
    import_catalog("mbe", path, tmp_path / "out")
    import_catalog("mbe", write_lines(tmp_path / "plain.jsonl", given), tmp_path / "plain")
    without = [{k: v for k, v in row.items() if k != "source"} for row in table(tmp_path / "out")]
    assert (
        without == [{k: v for k, v in row.items() if k != "source"} for row in table(tmp_path / "plain")]
        and len(without) == 50
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.list.json"])
def test_every_row_says_where_the_next_one_starts(tmp_path, name):
    "Going on after any row gives the rows that are left, with the same places."
    given, path = [{"id": str(n), "title": f'连衣裙 "{n}"\nline'} for n in range(40)], tmp_path / name
    if name.endswith("parquet"):
        pd.DataFrame(given).to_parquet(path, row_group_size=7)
    elif name.endswith(("csv", "tsv")):
        pd.DataFrame(given).to_csv(path, index=False, sep="\t" if name.endswith("tsv") else ",")
    elif "list" in name:
        path.write_text(json.dumps(given))
    else:
        data = "\n".join(json.dumps(row) if n % 5 else "{broken" for n, row in enumerate(given)).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = list(readers.iter_records(path))
    assert len(found) == 40
    for n in (0, 1, 6, 7, 20, 38, 39):
        assert list(readers.iter_records(path, found[n].next)) == found[n + 1 :]


def test_a_column_that_appears_late_is_read(tmp_path):
    "Columns are looked for in the first 1,000 rows; an optional one may come later."
    given = [{"id": n, "doc_title": f"t{n}"} for n in range(1200)] + [mbe_row(9, doc_image=None)]
    import_catalog("mbe", write_lines(tmp_path / "late.jsonl", given), tmp_path / "out")
    assert table(tmp_path / "out")[-1]["category_l1"] == "女装"


def fashion_source(folder, parts=("dress", "jacket", "pants", "skirt", "top")):
    "Ten label files as the data set has them; two pictures a product, the second with the better score."
    paths = []
    for number, part in enumerate(parts):
        for split in ("train", "test"):
            item = f"{number}{len(split)}"
            names = [f"women/{part}s/casual_{part}s/{item}/{item}_{n}.jpeg" for n in range(2)]
            paths += names
            (folder / "labels").mkdir(exist_ok=True)
            lines = [f"{names[0]}\t0.31\t{part} blue", f"{names[1]}\t0.94\tblue cotton {part} — été"]
            (folder / "labels" / f"{part}_{split}_detect_all.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_pictures(folder, paths)


def test_fashion200k_label_files(tmp_path):
    "Two rows of one product are one product; the title is that of the best detection."
    source = tmp_path / "f200k"
    source.mkdir()
    fashion_source(source)
    with open(source / "labels" / "top_test_detect_all.txt", "a") as file:
        file.write("women/tops\t0.5\tpath too short\nno tabs\nwomen/tops/casual_tops/44/44_9.jpeg\tx\tno score\n")
        file.write("women/dresses/casual_dresses/05/05_7.jpeg\t0.1\tcomes late, in another file\n")
    summary = import_catalog("fashion200k", source, tmp_path / "out")
    products = {row["product_id"]: row for row in table(tmp_path / "out")}
    assert summary.counts["products"] == len(products) == 10 and Counter(row["split"] for row in products.values()) == {
        "train": 4, "test": 6,
    }
    one = products["14"]
    assert (one["title"], one["description"], one["category_l1"], one["category_l2"], one["category_l3"]) == (
        "blue cotton jacket — été", "jacket blue", "women", "jackets", "casual jackets",
    )
    assert len(json.loads(one["image_paths"])) == 2 and one["attributes"] == "{}"
    assert products["05"]["description"] == "dress blue\ncomes late, in another file"
    assert reasons(tmp_path / "out") == {
        "unknown path": 1, "wrong number of fields": 1, "no score": 1, "no such picture": 1,
    }
    assert Catalog.load(tmp_path / "out").get("14").n_images == 2


def test_fashion200k_parquet_copy(tmp_path):
    "Pictures as bytes in the Hugging Face form; the item id names the picture, the product is before the underscore."
    frame = pd.DataFrame(
        {
            "image": [{"bytes": draw(n, "JPEG"), "path": None} for n in range(5)]
            + [{"bytes": b"GIF89a not really", "path": None}], "category1": "women", "category2": "dresses",
            "category3": "casual dresses", "text": [f"blue dress {n}" for n in range(6)],
            "item_ID": ["91_0", "91_1", "92_0", "93_0", "93_4", "94_0"],
        }
    )
    frame.to_parquet(tmp_path / "data-00000.parquet", row_group_size=2)
    import_catalog("fashion200k", tmp_path, tmp_path / "out")
    assert [(row["product_id"], len(json.loads(row["image_paths"]))) for row in table(tmp_path / "out")] == [
        ("91", 2), ("92", 1), ("93", 2), ("94", 0),
    ]
    assert table(tmp_path / "out", "quarantine")[0]["file"] == "data-00000.parquet:6"


def m5_source(folder):
    "Two label files, pictures, a label list, query and gallery lists."
    (folder / "images").mkdir(parents=True)
    labels = ["鼠标", "键盘", "耳机"]
    item = lambda n: {"title": f"{labels[n % 3]} 无线 {n}", "pv": f"颜色#:#黑色#;#型号#:#M{n}", "label": labels[n % 3]}
    for subset, numbers in (("train", range(30)), ("test", range(30, 60))):
        (folder / f"subset_{subset}_id_label.json").write_text(
            json.dumps({str(5000 + n): item(n) for n in numbers}, ensure_ascii=False), encoding="utf-8"
        )
    (folder / "subset_label_list.json").write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
    (folder / "query_ids.txt").write_text("".join(f"{5000 + n}\n" for n in (30, 31, 32, 99)))
    (folder / "gallery_ids.json").write_text(json.dumps([str(5000 + n) for n in range(33, 54)]))
    for n in range(60):
        (folder / "images" / f"{5000 + n}.jpg").write_bytes(draw(n, "JPEG"))
    return folder


class ByNumber:
    "An encoder that knows the number in a title: items with near numbers are similar. It stands for any model."
    fingerprint = "by-number"

    def encode_views(self, items):
        angle = (
            np.array([int("0" + "".join(c for c in (item.text or "") if c.isdigit())) for item in items])
            / 60
            * np.pi
            / 2
        )
        vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
        return {"t": vectors, "i": vectors, "mm": vectors}

    def encode(self, items, view="mm"):
        return self.encode_views(items)[view]


def test_m5product_and_its_retrieval_protocol(tmp_path):
    """Query and gallery lists give test items, triplets and a gallery file; mAP@k and Prec@k equal those counted by
    hand.
    """
    summary = import_catalog("m5product", m5_source(tmp_path / "m5"), tmp_path / "out")
    assert (
        summary.counts["products"] == 60
        and summary.counts["pictures"] == 60
        and summary.splits == {"test": 30, "train": 30}
    )
    row = {row["product_id"]: row for row in table(tmp_path / "out")}["5031"]
    assert (row["title"], row["category_l1"], json.loads(row["attributes"]), row["split"]) == (
        "键盘 无线 31", "键盘", {"颜色": "黑色", "型号": "M31"}, "test",
    )
    triplets = table(tmp_path / "out", "triplets")
    assert Counter(row["query_id"] for row in triplets) == {"5030": 7, "5031": 7, "5032": 7}, (
        "all gallery items with the label"
    )
    assert {row["positive_id"] for row in triplets if row["query_id"] == "5030"} == {
        str(5000 + n) for n in range(33, 54, 3)
    }
    assert (
        reasons(tmp_path / "out") == {"unknown product": 1}
        and "5099" == table(tmp_path / "out", "quarantine")[0]["product_id"]
    )
    gallery = tmp_path / "out" / "gallery.txt"
    assert gallery.read_text().split() == [str(5000 + n) for n in range(33, 54)] and summary.gallery == str(gallery)

    metrics = evaluate(
        ByNumber(), Catalog.load(tmp_path / "out"), protocol="triplets-v1", gallery=gallery, resamples=0,
        baselines=False,
    )
    block = metrics["directions"]["mm->mm"]
    assert (block["n_queries"], block["n_gallery"], block["n_without_hit"]) == (3, 21, 0)
    # query n ranks 33, 34, 35 ...; its hits are every third number from its own label's first on: places 1 4 7 10, 2 5
    # 8, 3 6 9
    places = [(1, 4, 7, 10), (2, 5, 8), (3, 6, 9)]
    expected = {f"R@{k}": np.mean([min(p) <= k for p in places]) for k in (1, 5, 10)} | {
        f"Prec@{k}": np.mean([sum(x <= k for x in p) / k for p in places]) for k in (1, 5, 10)
    }
    expected |= {
        f"mAP@{k}": np.mean([sum((i + 1) / x for i, x in enumerate(p) if x <= k) / min(k, 7) for p in places])
        for k in (1, 5, 10)
    }
    assert {name: block[name]["value"] for name in expected} == pytest.approx(expected)
    assert expected["mAP@5"] == pytest.approx(((1 + 2 / 4) / 5 + (1 / 2 + 2 / 5) / 5 + (1 / 3) / 5) / 3)


def test_m5product_items_in_several_label_files_are_one_product(tmp_path):
    "The whole table with titles, and subset files that only say the label; an id twice in one file is set aside."
    source = tmp_path / "m5"
    source.mkdir()
    (source / "all_id_label.json").write_text(
        '{"1": {"title": "鼠标", "pv": "", "label": 1}, "2": {"title": "键盘", "label": 0}, '
        '"2": {"title": "again"}, "3": '
        '{"title": "耳机"}}',
        encoding="utf-8",
    )
    (source / "all_test_id_label.json").write_text('{"1": "1", "2": "0"}')
    (source / "all_label_list.json").write_text('["Keyboard", "Mouse"]')
    import_catalog("m5product", source, tmp_path / "out")
    found = [(row["product_id"], row["title"], row["category_l1"]) for row in table(tmp_path / "out")]
    assert found == [("1", "鼠标", "Mouse"), ("2", "键盘", "Keyboard"), ("3", "耳机", None)]
    assert [row["split"] for row in table(tmp_path / "out")][:2] == ["test", "test"] and reasons(tmp_path / "out") == {
        "duplicate id": 1
    }


def mbe2_rows(count=30):
    "Every third query has two positives; products come back as negatives; some products carry no id."
    item = lambda side, n: (
        {f"{side}_{name}": value for name, value in mbe_row(n, doc_image=f"{n}.jpg").items()}
        | ({f"{side}_id": None} if n % 5 == 0 else {})
    )
    return [
        {
            "query": f"红色裙子 {n // 2 if n % 3 else n}", "query_image": f"q{n}.jpg" if n % 4 == 0 else None,
            **item("pos", n), **item("neg", (n + 7) % count),
        }
        for n in range(count)
    ]


def test_mbe2_triplets_end_to_end(tmp_path):
    "Products once each, derived ids, several positives of a query, and triplets-v1 on a real (tiny) encoder."
    from moon2_lab.model.encoder import Moon2Encoder

    write_pictures(tmp_path / "photos", [f"{n}.jpg" for n in range(30)] + [f"q{n}.jpg" for n in range(0, 30, 4)])
    given = [row | {"query_image": None, "query": f"红色裙子 {n // 2}"} for n, row in enumerate(mbe2_rows())] + [
        {"query": "长袖", "query_image": "q4.jpg", "pos_id": mbe_row(3)["id"]}
    ]
    given += [
        {"query": "", "query_image": None, **{k: v for k, v in mbe2_rows()[1].items() if k.startswith("pos")}},
        {"query": "蓝色"},
    ]
    summary = import_catalog(
        "mbe2", write_lines(tmp_path / "test.jsonl", given), tmp_path / "out", images=tmp_path / "photos",
        split_by="file name",
    )
    assert summary.counts["products"] == 30 and summary.splits == {"test": 30}
    assert sum(row["product_id"].startswith("item-") for row in table(tmp_path / "out")) == 6
    assert reasons(tmp_path / "out") == {"empty query": 1, "no positive": 2}
    catalog = Catalog.load(tmp_path / "out")
    assert (
        len(catalog.triplets) == 30
        and catalog.triplets["query_id"].nunique() == 15
        and all(len(names) == 1 for names in catalog.triplets["negative_ids"])
    )
    (tmp_path / "ids.txt").write_text("\n".join(product.product_id for product in catalog))
    encoder = Moon2Encoder.from_backbone("tiny", num_layers=1, image_size=32, visual_tokens=4, num_experts=2)
    metrics = evaluate(
        encoder, catalog, protocol="triplets-v1", gallery=tmp_path / "ids.txt", resamples=0, baselines=False
    )
    assert (
        metrics["directions"]["t->mm"]["n_queries"] == 15
        and metrics["directions"]["t->mm"]["n_gallery"] == 30
        and {"mAP@10", "Prec@5"} <= set(metrics["directions"]["t->i"])
    )
    by_hand = evaluate(ByNumber(), catalog, protocol="triplets-v1", resamples=0, baselines=False)["directions"]["t->mm"]
    # query m has the positives 2m and 2m + 1 and finds the numbers nearest to m first: rank 1 for m = 0, then 2m (or
    # one more: 0 is as far away as 2m)
    assert (by_hand["R@1"]["value"], by_hand["R@5"]["value"]) == pytest.approx((1 / 15, 3 / 15))


def test_mbe2_columns_are_a_matter_of_configuration(tmp_path):
    "Nested objects under other names, reached by dots."
    given = [
        {
            "q": {"txt": f"裙子 {n}"}, "p": {"sku": n, "name": f"连衣裙 {n}", "colour": "red"},
            "n": {"sku": n + 100, "name": "鞋"}, "part": "validation",
        }
        for n in range(4)
    ]
    path = write_lines(tmp_path / "x.jsonl", given)
    mapping = {
        "query_text": "q.txt", "positive.product_id": "p.sku", "positive.title": "p.name",
        "positive.attributes.colour": "p.colour", "negative.product_id": "n.sku", "negative.title": "n.name",
        "split": "part",
    }
    import_catalog("mbe2", path, tmp_path / "out", mapping=mapping)
    assert [(row["product_id"], row["split"]) for row in table(tmp_path / "out")][:2] == [
        ("0", "valid"), ("100", "valid"),
    ]
    assert json.loads(table(tmp_path / "out")[0]["attributes"]) == {"colour": "red"} and [
        json.loads(row["negative_ids"]) for row in table(tmp_path / "out", "triplets")
    ] == [["100"], ["101"], ["102"], ["103"]]
    with pytest.raises(
        DataError,
        match=r"no column for query_text or query_image .*columns found: q, p, n, part; name it with --map "
              r"query_text=COLUMN",
    ):
        import_catalog("mbe2", path, tmp_path / "no")


def test_sentence_transformers_rows_with_pictures(tmp_path):
    "Texts, pictures as bytes, and both together; several negatives."
    picture = lambda n: {"bytes": draw(n), "path": None}
    frame = pa.table(
        {
            "anchor": pa.array([picture(1), picture(2)]), "positive": ["red mug", "blue cup"],
            "negative_1": ["plate", "red mug"], "negative_2": [None, "plate"],
        }
    )
    pq.write_table(frame, tmp_path / "train-00000.parquet")
    import_catalog("st", tmp_path / "train-00000.parquet", tmp_path / "out")
    catalog = Catalog.load(tmp_path / "out")
    assert sorted(product.title for product in catalog) == ["blue cup", "plate", "red mug"]
    triplets = table(tmp_path / "out", "triplets")
    assert (tmp_path / "out" / triplets[0]["query_image"]).read_bytes() == draw(1) and triplets[0]["query_text"] is None
    assert [len(json.loads(row["negative_ids"])) for row in triplets] == [1, 2]
    write_lines(tmp_path / "both.jsonl", [{"anchor": "cup", "positive": {"text": "blue cup", "image": "cup.png"}}])
    write_pictures(tmp_path, ["cup.png"])
    import_catalog("st", tmp_path / "both.jsonl", tmp_path / "both")
    assert (Catalog.load(tmp_path / "both")[0].title, Catalog.load(tmp_path / "both")[0].n_images) == ("blue cup", 1)


def test_mmeb_rows(tmp_path):
    "Prompts keep their words and lose their picture placeholders."
    write_pictures(tmp_path, ["a/q.jpg", "a/p.jpg", "a/n.jpg"])
    row = {
        "qry": "<|image_1|>\nFind a dress like this one", "qry_image_path": "a/q.jpg", "pos_text": "<|image_1|>\n",
        "pos_image_path": "a/p.jpg", "neg_text": "", "neg_image_path": "a/n.jpg",
    }
    pd.DataFrame([row, row | {"qry": "", "qry_image_path": ""}]).to_parquet(tmp_path / "train.parquet")
    import_catalog("mmeb", tmp_path / "train.parquet", tmp_path / "out")
    catalog = Catalog.load(tmp_path / "out")
    assert [(product.title, product.n_images) for product in catalog] == [(None, 1), (None, 1)] and catalog.triplets[
        "query_text"
    ].tolist() == ["Find a dress like this one"]
    assert reasons(tmp_path / "out") == {"empty query": 1}


def test_a_folder_with_an_empty_table(tmp_path):
    "It has no columns, and the other tables are read."
    tables = {"a.csv": "product_id,title\n1,red bag\n", "b.csv": "", "c.csv": "product_id,title\n"}
    for name, text in tables.items():
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    import_catalog("csv", tmp_path / "in", tmp_path / "out")
    assert [row["product_id"] for row in table(tmp_path / "out")] == ["1"]


def test_parquet_with_damaged_names(tmp_path):
    "Arrow raises what it likes for a damaged file: a DataError names the file."
    path = tmp_path / "a.parquet"
    pd.DataFrame({"product_id": ["1"], "longtitle": ["red bag"]}).to_parquet(path)
    path.write_bytes(path.read_bytes().replace(b"longtitle", b"\xff\xfengtitl\xff"))
    with pytest.raises(DataError, match="not a readable parquet file") as error:
        import_catalog("csv", path, tmp_path / "out", mapping={"title": "longtitle"})
    assert "a.parquet" in str(error.value)


def test_a_folder_with_a_csv(tmp_path):
    "Semicolons, pictures named like the product, several pictures in a cell, a split column, attribute columns."
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "table.csv").write_text(
        "id;name;baseColour;images;split\n1;红色杯子;red;;Training\n2;蓝色杯子;blue;x.png|y.png;dev\n3;cup;;;holdout\n",
        encoding="utf-8-sig",
    )
    write_pictures(tmp_path / "photos", ["1.jpg", "x.png", "y.png"])
    import_catalog(
        "csv", tmp_path / "shop", tmp_path / "out", images=tmp_path / "photos",
        mapping={"attributes.base_colour": "baseColour"},
    )
    products = table(tmp_path / "out")
    assert [
        (row["product_id"], row["title"], len(json.loads(row["image_paths"])), json.loads(row["attributes"]))
        for row in products
    ] == [
        ("1", "红色杯子", 1, {"base_colour": "red"}), ("2", "蓝色杯子", 2, {"base_colour": "blue"}),
        ("3", "cup", 0, {}),
    ]
    assert [row["split"] for row in products][:2] == ["train", "valid"] and reasons(tmp_path / "out") == {
        "unknown split": 1
    }


# ---------------------------------------------------------------------------------------------- bad input


def test_bad_records_cost_themselves_only(tmp_path):
    """A cut line, lines in another encoding than the file's, no id, an id twice, too long a line, nothing in it: listed
    with file and line; every good record arrives.
    """
    good = [json.dumps(mbe_row(n, doc_image=None), ensure_ascii=False) for n in range(6)]
    lines = [
        good[0].encode(),
        b'{"id": "cut", "doc_title": "',
        good[1].encode("gb18030"),
        json.dumps(mbe_row(2, doc_image=None, doc_title="Crème brûlée"), ensure_ascii=False).encode(
            "cp1252", "replace"
        ),
        b'{"doc_title": "no id"}', good[0].encode(), b'{"id": "empty"}', b"\xff\xfe\x81\x8d\x81 \x8f", b"[1, 2]",
        good[3].encode(), b"", good[4].encode(),
        b'{"id": "long", "doc_title": "' + b"x" * (records.MAX_LINE + 10) + b'"}', good[5].encode(),
    ]
    (tmp_path / "mbe.jsonl").write_bytes(b"\n".join(lines))
    import_catalog("mbe", tmp_path / "mbe.jsonl", tmp_path / "out")
    assert [row["product_id"] for row in table(tmp_path / "out")] == [mbe_row(n)["id"] for n in (0, 3, 4, 5)]
    aside = {row["file"]: row["reason"] for row in table(tmp_path / "out", "quarantine")}
    foreign = "other encoding: not UTF-8, as the rest of the file is"
    expected = {
        2: "broken JSON", 3: foreign, 4: foreign, 5: "no product id", 6: "duplicate id: first at mbe.jsonl:1",
        7: "empty record", 8: "other encoding", 9: "not an object", 13: "too long a line",
    }
    assert set(aside) == {f"mbe.jsonl:{line}" for line in expected}
    for line, reason in expected.items():
        assert aside[f"mbe.jsonl:{line}"].startswith(reason)


def test_odd_texts_arrive(tmp_path):
    "Emoji, NUL, 100,000 characters, halves of surrogate pairs, bars in attribute values."
    titles = ["👗👠 фильм", "a\0b", "长" * 100_000, "half \ud83d pair", "\u202eright to left"]
    path = tmp_path / "odd.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": n, "doc_title": title, "doc_attributes": {"ports\0": ["USB", 2]}}) + "\n"
            for n, title in enumerate(titles)
        )
    )
    import_catalog("mbe", path, tmp_path / "out")
    found = [row["title"] for row in table(tmp_path / "out")]
    assert found == ["👗👠 фильм", "ab", "长" * 100_000, "half  pair", "\u202eright to left"] and json.loads(
        table(tmp_path / "out")[0]["attributes"]
    ) == {"ports": "USB|2"}
    assert len(Catalog.load(tmp_path / "out")) == 5


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(max_size=40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_any_text_in_any_line(tmp_path_factory, titles, randoms):
    "Whatever the titles are and whatever junk stands between: as many records as good lines, in order."
    folder = tmp_path_factory.mktemp("any")
    lines = []
    for n, title in enumerate(titles):
        lines.append(
            json.dumps(
                {"id": f"p{n}", "doc_title": f"t {title}", "doc_image": None}, ensure_ascii=randoms.random() < 0.5
            ).encode("utf-8", "surrogatepass")
        )
        lines += [bytes(randoms.randrange(256) for _ in range(9)).replace(b"\n", b"")] if randoms.random() < 0.5 else []
    (folder / "any.jsonl").write_bytes(b"\n".join(lines))
    import_catalog("mbe", folder / "any.jsonl", folder / "out")
    assert [row["product_id"] for row in table(folder / "out")] == [f"p{n}" for n in range(len(titles))]


def test_a_cut_file_keeps_what_was_read(tmp_path):
    "A .gz that ends early, followed by a good file."
    random.seed(0)
    lines = "".join(json.dumps(mbe_row(n, doc_image=None, doc_title=str(random.random()))) + "\n" for n in range(3000))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-20_000])
    write_lines(tmp_path / "in" / "b.jsonl", [mbe_row(5000, doc_image=None)])
    summary = import_catalog("mbe", tmp_path / "in", tmp_path / "out")
    found = [row["product_id"] for row in table(tmp_path / "out")]
    assert 1000 < len(found) < 3000 and found == [mbe_row(n)["id"] for n in range(len(found) - 1)] + [
        mbe_row(5000)["id"]
    ]
    assert summary.reasons["the file is cut or damaged"] == 1


def test_sources_with_nothing_in_them(tmp_path, capsys):
    "An empty file is a catalogue without products and exit code 1; no file at all is wrong input, exit code 2."
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    write_lines(tmp_path / "useless.jsonl", [{"id": 1, "doc_title": None}])
    assert main(["data", "import", "mbe", str(tmp_path / "empty.jsonl"), str(tmp_path / "a")]) == 1
    assert main(["data", "import", "mbe", str(tmp_path / "useless.jsonl"), str(tmp_path / "b"), "--json"]) == 1
    assert main(["data", "import", "mbe", str(tmp_path / "none"), str(tmp_path / "c")]) == 2
    out, err = capsys.readouterr()
    assert "0 of 0 records usable" in out and err.count("\n") == 1 and "no data file" in err
    assert json.loads(out.splitlines()[-1])["import"]["reasons"] == {"empty record": 1}


def test_missing_columns_are_named(tmp_path, capsys):
    path = write_lines(tmp_path / "x.jsonl", [{"id": 1, "doc_titel": "cup"}])
    with pytest.raises(
        DataError,
        match="no column for title or image .*nearest: doc_titel; columns found: id, doc_titel; name it with --map "
              "title=COLUMN",
    ):
        import_catalog("mbe", path, tmp_path / "out")
    with pytest.raises(UsageError, match="no column 'doc_name' for title .*columns found: id, doc_titel"):
        import_catalog("mbe", path, tmp_path / "out", mapping={"title": "doc_name"})
    with pytest.raises(UsageError, match="unknown name 'titel' .*nearest: title"):
        import_catalog("mbe", path, tmp_path / "out", mapping={"titel": "doc_titel"})
    for words in (["--map", "title"], ["--map", "title=none"], ["--limit", "0"], ["--images", str(tmp_path / "gone")]):
        assert (
            main(["data", "import", "mbe", str(path), str(tmp_path / "out"), "--map", "title=doc_titel", *words]) == 2
        )
    assert capsys.readouterr().err.count("\n") == 4
    assert import_catalog("mbe", path, tmp_path / "good", mapping={"title": "doc_titel"}).counts["products"] == 1


# ---------------------------------------------------------------------------------------------- what a table may look
# like


def imported(folder, text, layout="csv", name="t.csv", encoding="utf-8", **options):
    "(products as id -> title, reasons of what was set aside, summary) of one small file."
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode(encoding))
    summary = import_catalog(layout, folder / name, folder / "out", **options)
    return (
        {row["product_id"]: row["title"] for row in table(folder / "out")},
        [row["reason"] for row in table(folder / "out", "quarantine")], summary,
    )


@pytest.mark.parametrize(
    "encoding,titles",
    [
        ("cp1252", ["Coleção de verão", "Calção azul"]), ("cp1252", ["Häähattu tyttöä"]),
        ("cp1250", ["Sukienka żółta", "Łyżka"]), ("cp1251", ["Платье красное"]), ("cp1253", ["Φόρεμα κόκκινο"]),
        ("cp932", ["赤いワンピース"]), ("cp949", ["빨간 원피스"]), ("big5", ["紅色洋裝"]),
        ("gb18030", ["红色连衣裙", "女装"]),
        ("utf-16", ["Größe"]), ("utf-16-le", ["Größe", "赤い"]), ("utf-16-be", ["Größe"]), ("utf-8", ["Größe", "女装"]),
    ],
)
@pytest.mark.parametrize("kind", few(["csv", "jsonl"], "csv"))
def test_one_encoding_for_a_file(tmp_path, encoding, titles, kind):
    "A few titles are enough, and no title comes out in another script."
    rows = [
        f'{{"id": {n}, "title": "{title}"}}' if kind == "jsonl" else f"{n},{title}" for n, title in enumerate(titles)
    ]
    products, aside, summary = imported(
        tmp_path / "in", "\n".join(rows if kind == "jsonl" else ["id,title", *rows]) + "\n", name=f"t.{kind}",
        encoding=encoding,
    )
    assert (
        list(products.values()) == titles
        and not aside
        and encoding.removesuffix("-le").removesuffix("-be") in summary.files[0]["written"]
    )


def test_an_encoding_that_cannot_be_told_is_asked_for(tmp_path):
    "A letter that two languages write, and nothing else: no product, until the encoding is named."
    products, aside, _ = imported(tmp_path / "a", "id,title\n1,Świeca\n", encoding="cp1250")
    assert products == {} and "name it with --encoding" in aside[0]
    (tmp_path / "t.csv").write_bytes("id,title\n1,Świeca\n".encode("cp1250"))
    import_catalog("csv", tmp_path / "t.csv", tmp_path / "out", encoding="cp1250")
    assert table(tmp_path / "out")[0]["title"] == "Świeca"
    with pytest.raises(UsageError, match="unknown encoding 'cp999'"):
        import_catalog("csv", tmp_path / "t.csv", tmp_path / "no", encoding="cp999")
    (tmp_path / "h.csv").write_bytes(b"id,title,d\xe9f\n" + "1,Größe,x\n2,Käse,y\n3,Öl,z\n".encode())
    with pytest.raises(DataError, match="the header cannot be decoded"):
        import_catalog("csv", tmp_path / "h.csv", tmp_path / "no")


@pytest.mark.parametrize(
    "text,products,aside",
    [
        (
            'id,title,text\n1,Shirt,"12\\" and\n99,Fake,row\nend"\n2,Hat,y\n', {"1": "Shirt", "2": "Hat"},
            ["other value"] * 2,
        ),
        (
            'id,title,text\n1,Shirt,"12" and\n99,Fake,row\nend"\n2,Hat,y\n', {"2": "Hat"},
            ["stray or open quote", "other value"],
        ),
        ('id,title\n1,Shirt\n2,"Hat\n3,Cup\n', {"1": "Shirt"}, ["stray or open quote"]),
        ('id,"title\n(English)"\n1,Shirt\n2,Hat\n', {"1": "Shirt", "2": "Hat"}, []),
        ("\r\nid,title\r\n1,Shirt\r\n", {"1": "Shirt"}, []),
        ("# from the shop\nExport\nid;title\n1;Shirt, red\n", {"1": "Shirt, red"}, []),
        ("sep=|\nid|title\n1|Shirt\n", {"1": "Shirt"}, []),
        ("id,title\r1,Shirt\r2,Hat\r", {"1": "Shirt", "2": "Hat"}, []),
        ("id,title,title\n1,Shirt,Tee\n", {"1": "Shirt"}, ["other value"]),
        ("id,title,name\n1,,Shirt\n2,Hat,Hat\n", {"1": "Shirt", "2": "Hat"}, []),
        ('id\ttitle\n1\t"Best" shirt\n2\t12" plate\n', {"1": '"Best" shirt', "2": '12" plate'}, []),
        ("id,title\n1,Shirt\n2\n3,Cup,,\n", {"1": "Shirt", "3": "Cup"}, ["wrong number of fields"]),
    ],
)
def test_tables_are_read_record_by_record(tmp_path, text, products, aside):
    "No product is made of a header or of the lines of a description, and what cannot be told apart is listed."
    found, reasons, _ = imported(tmp_path / "in", text)
    assert found == products and [reason.split(":")[0].split(" in another")[0] for reason in reasons] == aside


@pytest.mark.parametrize(
    "text,products,aside",
    [
        ("id;title;weight\n1;Hemd, rot;1,5\n2;Hose, blau;2,5\n", {"1": "Hemd, rot", "2": "Hose, blau"}, []),
        ("id,title\n1,Shirt\nid,title\n2,Hat\n", {"1": "Shirt", "2": "Hat"}, ["header again"]),
        ("id,title,price\n1,Shirt,x\n\n ,,\n2,Hat,y\n", {"1": "Shirt", "2": "Hat"}, []),
        ("Sep=;\nid;title\n007;Shirt\n7;Hat\n", {"007": "Shirt", "7": "Hat"}, []),
        ("id,title\n1.2E+10,Shirt\n2,Hat\n", {"1.2E+10": "Shirt", "2": "Hat"}, ["number in scientific notation"]),
        (
            "id,title\nx\u200b,Shirt\n2,\u200b\u200b\n3,\ufeffCup\n", {"x": "Shirt", "3": "Cup"},
            ["characters of the id changed", "characters left out", "characters left out", "empty record"],
        ),
        (
            "id,title\n1,A\0B\n2,\0\n3,C\x1aD\n", {"1": "AB", "3": "C\x1aD"},
            ["characters left out", "characters left out", "empty record"],
        ),
        slow(
            "id,title\n" + "".join(f'{n},"C:\\{n}\\"\n' for n in range(9000)),
            {str(n): f"C:\\{n}\\" for n in range(9000)}, [],
        ),
    ],
)
def test_tables_as_spreadsheets_and_scripts_write_them(tmp_path, text, products, aside):
    """Decimal commas, tables put one behind the other, blank lines, ids that a spreadsheet has shortened, signs that
    nobody sees.
    """
    found, reasons, _ = imported(tmp_path / "in", text)
    assert found == products and sorted(reason.split(":")[0] for reason in reasons) == sorted(aside)


@pytest.mark.parametrize(
    "data,products",
    [
        (
            {"train": [{"id": 1, "title": "a"}], "test": [{"id": 2, "title": "b"}]},
            {"1": ("a", "train"), "2": ("b", "test")},
        ),
        (
            {"validation": [{"id": 1, "title": "a", "split": "test"}], "dev": [{"id": 2, "title": "b"}]},
            {"1": ("a", "test"), "2": ("b", "valid")},
        ),
        ({"brand": [{"id": 5, "name": "Acme"}], "id": 1, "title": "Mug", "split": "train"}, {"1": ("Mug", "train")}),
        ({"page": 1, "products": [{"id": 1, "title": "Mug", "split": "train"}], "id": "feed"}, {"1": ("Mug", "train")}),
    ],
)
def test_objects_that_hold_lists(tmp_path, data, products):
    "Lists named by splits are all read; a list inside a product makes no products."
    imported(tmp_path / "in", json.dumps(data), name="t.json")
    assert {row["product_id"]: (row["title"], row["split"]) for row in table(tmp_path / "in" / "out")} == products


@pytest.mark.parametrize(
    "columns,cells,kept",
    [
        ("image_1,image_2,image_3", "a.png,b.png,", 2), ("Image 1,Image 2", "a.png,b.png", 2),
        ("image,additional_image_link", 'a.png,"b.png,c d.png"', 3), ("image,images", 'a.png,"a.png,b.png"', 2),
        ("image,images", "a.png,b.png", 1), ("base_image,additional_images", "a.png,b.png", 2),
        ("additional_images,title2", "b.png,x", 0), ("image", "c%20d.png", 1),
    ],
)
def test_pictures_in_further_columns(tmp_path, columns, cells, kept):
    "Numbered and additional columns add to the main picture; a synonym that says another one is listed."
    write_pictures(tmp_path / "in", ["a.png", "b.png", "c d.png"])
    _, aside, _ = imported(tmp_path / "in", f"id,title,{columns}\n1,Shirt,{cells}\n")
    assert len(json.loads(table(tmp_path / "in" / "out")[0]["image_paths"])) == kept
    assert any("other value in another column" in reason for reason in aside) == (
        cells == "a.png,b.png" and columns == "image,images"
    )


def test_a_folder_with_pictures_named_by_id_and_a_workbook(tmp_path):
    """The pictures beside a table that names none are found by the id; a file of another kind is told; the nearest
    table's error is shown.
    """
    write_pictures(tmp_path / "in", ["images/1.jpg", "images/2.JPG"])
    (tmp_path / "in" / "styles.csv").write_text("id,productDisplayName\n1,Shirt\n2,Hat\n3,Cup\n")
    (tmp_path / "in" / "images.csv").write_text("filename,link\n1.jpg,x\n")
    (tmp_path / "in" / "more.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="no column for title or image") as error:
        import_catalog("csv", tmp_path / "in", tmp_path / "no")
    assert error.value.where == "styles.csv"
    summary = import_catalog("csv", tmp_path / "in", tmp_path / "out", mapping={"title": "productDisplayName"})
    assert summary.pictures["by_id"] == 2 and summary.pictures["products_without"] == 1
    assert sorted(row["file"] for row in table(tmp_path / "out", "quarantine") if row["field"] == "file") == [
        "images.csv", "more.xlsx",
    ]


@pytest.mark.parametrize(
    "name,data,kind",
    [("p.zip", b"PK\x03\x04", "a zip"), ("p.tar.gz", b"\x1f\x8b\x08", "gzip"), ("p.csv", b"id,title\n", "a text")],
)
def test_pictures_in_what_is_no_tar(tmp_path, name, data, kind):
    "An error before the folder is made."
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=kind):
        imported(tmp_path / "in", "id,title,image\n1,Shirt,a.png\n", images=tmp_path / name)
    assert not (tmp_path / "in" / "out").exists()


@pytest.mark.parametrize(
    "text,attributes",
    [
        ("activity=Gym|Hiking,material=Nylon", {"activity": "Gym|Hiking", "material": "Nylon"}),
        ("sku=a,size=S|sku=b,size=M", {"sku": "a|b", "size": "S|M"}), ("a=1|b=2", {"a": "1", "b": "2"}),
        ("Color=Red;Size=L", {"Color": "Red", "Size": "L"}),
    ],
)
def test_attributes_as_magento_writes_them(tmp_path, text, attributes):
    imported(tmp_path / "in", json.dumps({"id": 1, "title": "Bag", "attributes": text}), name="t.jsonl")
    assert json.loads(table(tmp_path / "in" / "out")[0]["attributes"]) == attributes


def test_long_values_repeated_in_nested_lists(tmp_path, monkeypatch):
    "A small file of long rows ends at a limit that the error says; short values may repeat."
    monkeypatch.setattr(parquet_reader, "MAX_GROWTH", (2**24, 5))
    for name, value, count in (("long", "x" * 5 * 2**20, 30), ("short", "x" * 2**10, 60_000)):
        pq.write_table(
            pa.table({"id": [str(n) for n in range(count)], "title": ["a"] * count, "tags": [[value]] * count}),
            tmp_path / f"{name}.parquet",
        )
    summary = import_catalog("csv", tmp_path / "long.parquet", tmp_path / "out")
    assert (
        0 < summary.counts["products"] < 30
        and "too large a row group: its first" in table(tmp_path / "out", "quarantine")[-1]["reason"]
    )
    assert sum(row.reason is None for row in readers.iter_records(tmp_path / "short.parquet")) == 60_000


def test_a_text_file_is_no_table_by_its_name(tmp_path):
    (tmp_path / "t.txt").write_text("id\ttitle\n1\ta\n")
    with pytest.raises(DataError, match="a .txt file does not say what it is") as error:
        import_catalog("csv", tmp_path / "t.txt", tmp_path / "out")
    assert ".tsv" in error.value.advice


def test_every_column_and_picture_is_accounted_for(tmp_path):
    write_pictures(tmp_path / "in", ["a.png"])
    products, _, summary = imported(tmp_path / "in", "id,title,price,image\n1,Shirt,3,a.png\n2,Hat,,gone.png\n3,,4,\n")
    columns = {
        column["column"]: (column["read_as"], column["filled"], column["empty"], column["not_understood"])
        for column in summary.columns
    }
    assert columns == {
        "id": (["product_id"], 3, 0, 0), "title": (["title"], 2, 1, 0), "price": ([], 2, 1, 0),
        "image": (["image"], 2, 1, 0),
    }
    assert summary.pictures == {"named": 2, "found": 1, "by_id": 0, "missing": 1, "guessed": 0, "products_without": 1}
    assert (summary.counts["seen"], summary.counts["products"], summary.reasons) == (
        3, 2, {"no such picture": 1, "empty record": 1},
    )
    assert any("price" in line and "not used" in line for line in summary.lines())


def test_rows_of_one_product_are_joined(tmp_path):
    "A row for each picture, as shops export them; a row with another title is a second product with the id."
    write_pictures(tmp_path / "in", ["a.png", "b.png", "c.png"])
    text = "Handle,Title,Image Src\ntee,Plain Tee,a.png\ntee,,b.png\nmug,Mug,\ntee,Plain Tee,c.png\nmug,Cup,\n"
    products, aside, summary = imported(tmp_path / "in", text)
    assert (
        products == {"tee": "Plain Tee", "mug": "Mug"}
        and len(json.loads(table(tmp_path / "in" / "out")[0]["image_paths"])) == 3
    )
    assert aside == ["duplicate id: first at t.csv:4, with another title"] and summary.counts["rows_joined"] == 2


def test_listings_of_one_product_stay_on_one_side(tmp_path):
    "Equal titles, or equal main pictures, whatever their ids."
    write_pictures(tmp_path / "in", [f"{n}.png" for n in range(60)])
    lines = [f"{n},Thing {n // 2},{n}.png" for n in range(120) if n < 60] + [
        f"x{n},Other {n},{n}.png" for n in range(60)
    ]
    _, _, summary = imported(tmp_path / "in", "id,title,image\n" + "\n".join(lines) + "\n")
    assert {name: split.get("key_in_train", 0) for name, split in summary.check["splits"].items()} == {
        "train": 0, "valid": 0, "test": 0,
    }
    assert (
        summary.check["keys"] == 30
        and Catalog.load(tmp_path / "in" / "out").summary()["splits"] == summary.check["splits"]
    )


def test_splits_from_folders_and_partitions(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / "in" / split).mkdir(parents=True)
        pd.DataFrame(
            {"id": [f"{split}{n}" for n in range(4)], "title": [f"thing {split} {n}" for n in range(4)]}
        ).to_parquet(tmp_path / "in" / split / "0.parquet")
    import_catalog("csv", tmp_path / "in", tmp_path / "out", split_by="file name")
    assert {(row["product_id"][:-1], row["split"]) for row in table(tmp_path / "out")} == {
        ("train", "train"), ("validation", "valid"), ("test", "test"),
    }
    pd.DataFrame({"id": ["1", "2"], "title": ["a", "b"], "split": ["train", "test"]}).to_parquet(
        tmp_path / "spark", partition_cols=["split"]
    )
    import_catalog("csv", tmp_path / "spark", tmp_path / "parts")
    assert {row["product_id"]: row["split"] for row in table(tmp_path / "parts")} == {"1": "train", "2": "test"}
    with pytest.raises(UsageError, match="no file or folder names a split"):
        import_catalog(
            "csv", write_lines(tmp_path / "rows.jsonl", [{"id": 1, "title": "a"}]), tmp_path / "no",
            split_by="file name",
        )


def test_graded_answers_and_lists(tmp_path):
    "Exact is positive, irrelevant a negative, what lies between neither; a list is several."
    graded = [
        {"query_id": "q", "query": "shirt", "product_id": name, "product_title": f"title {name}", "esci_label": label}
        for name, label in zip("abcd", ("Exact", "Substitute", "Complement", "Irrelevant"), strict=True)
    ]
    import_catalog("st", write_lines(tmp_path / "esci.jsonl", graded), tmp_path / "esci")
    assert [(row["positive_id"], row["negative_ids"]) for row in table(tmp_path / "esci", "triplets")] == [
        ("a", '["d"]')
    ] and reasons(tmp_path / "esci") == {"grade between": 2}
    import_catalog(
        "st", write_lines(tmp_path / "flag.jsonl", [{"query": "shirt", "pos": ["A", "B"], "neg": ["C", "D"]}]),
        tmp_path / "flag",
    )
    titles = {row["product_id"]: row["title"] for row in table(tmp_path / "flag")}
    assert [
        (titles[row["positive_id"]], [titles[name] for name in json.loads(row["negative_ids"])])
        for row in table(tmp_path / "flag", "triplets")
    ] == [("A", ["C", "D"]), ("B", ["C", "D"])]


def test_no_raw_error_and_no_bomb(tmp_path, capsys):
    "Names that cannot be stored, nests, pipes, a .gz that holds too much, a file that is no table: one sentence each."
    (tmp_path / "odd.json").write_text(
        '[{"id": "1", "title": "a", "\\ud800": "b"}, {"id": "2", "title": "b", "attributes": '
        + '{"a":' * 900
        + "1"
        + "}" * 900
        + "}]"
    )
    assert import_catalog("csv", tmp_path / "odd.json", tmp_path / "odd").counts["products"] == 2
    (tmp_path / "m5_id_label.json").write_text(
        '{"1": {"title": "a"}, "\\ud800": {"title": "b"}, "\\q": {"title": "c"}, "3": {"title": "d"}}'
    )
    assert import_catalog("m5product", tmp_path / "m5_id_label.json", tmp_path / "m5").counts["products"] == 2
    os.mkfifo(tmp_path / "x.csv")
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"id": 1, "title": "' + b"a" * 80_000_000))
    (tmp_path / "book.csv").write_bytes(b"PK\x03\x04 and so on")
    for name, said in (("x.csv", "not a plain file"), ("bomb.jsonl.gz", "times its own size"), ("book.csv", "Excel")):
        assert main(["data", "import", "csv", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err


def test_a_second_table_in_the_folder_is_left_and_said(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "styles.csv").write_text("id,title\n1,a\n")
    (tmp_path / "in" / "images.csv").write_text("filename,link\n1.jpg,x\n")
    summary = import_catalog("csv", tmp_path / "in", tmp_path / "out")
    assert summary.counts["products"] == 1 and [file["file"] for file in summary.files if file.get("set_aside")] == [
        "images.csv"
    ]


# ---------------------------------------------------------------------------------------------- pictures


def test_a_tar_of_pictures(tmp_path):
    "Members are read where they are; names that lead out, links and what is no picture are set aside."
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for name, data in (
            ("photos/0.png", draw(0)), ("../1.png", draw(1)), ("/2.png", draw(2)), ("photos/3.png", b"<html>"),
            ("photos/4.png", draw(4, "GIF")),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("photos/5.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    write_lines(
        tmp_path / "mbe.jsonl",
        [mbe_row(n, doc_image=f"photos/{n}.png" if n not in (1, 2) else f"{n}.png") for n in range(6)],
    )
    import_catalog("mbe", tmp_path / "mbe.jsonl", tmp_path / "out", images=tmp_path / "photos.tar")
    found = {row["title"].split()[1]: json.loads(row["image_paths"]) for row in table(tmp_path / "out")}
    assert {name: len(paths) for name, paths in found.items()} == {"0": 1, "1": 0, "2": 0, "3": 0, "4": 1, "5": 0}
    kept = (tmp_path / "out" / found["4"][0]).read_bytes()
    assert found["4"][0].endswith(".png") and decode_image(kept).tobytes() == decode_image(draw(4, "GIF")).tobytes()
    assert reasons(tmp_path / "out") == {
        "member leads out of the archive": 2, "member is no plain file": 1, "no such picture": 3, "not an image": 1,
    }
    assert not list(tmp_path.parent.glob("1.png")) and not (tmp_path / "1.png").exists()


def test_bad_pictures_are_set_aside_per_product(tmp_path):
    """Text as a picture, a path that leads out, a missing file, a bomb: the product keeps its title, one without a
    title goes.
    """
    (tmp_path / "p").mkdir()
    (tmp_path / "secret.png").write_bytes(draw(9))
    (tmp_path / "p" / "text.png").write_text("<html>not found</html>")
    (tmp_path / "p" / "empty.png").write_bytes(b"")
    held = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(held, "PNG")
    (tmp_path / "p" / "bomb.png").write_bytes(held.getvalue())
    names = ["text.png", "../secret.png", "/etc/hostname", "gone.png", "bomb.png", "empty.png"]
    given = [mbe_row(n, doc_image=name) for n, name in enumerate(names)] + [
        mbe_row(9, doc_image="gone.png", doc_title=None)
    ]
    import_catalog("mbe", write_lines(tmp_path / "mbe.jsonl", given), tmp_path / "out", images=tmp_path / "p")
    assert len(table(tmp_path / "out")) == 6 and all(row["image_paths"] == "[]" for row in table(tmp_path / "out"))
    assert reasons(tmp_path / "out") == {
        "not an image": 1, "path leads out of the folder": 2, "no such picture": 2, "too many pixels": 1,
        "empty file": 1, "empty record": 1,
    }


def test_the_same_picture_is_kept_once_and_shards_read_alike(tmp_path):
    write_pictures(tmp_path / "p", [f"{n}.png" for n in range(10)])
    (tmp_path / "p" / "copy.png").write_bytes(draw(0))
    path = write_lines(tmp_path / "mbe.jsonl", [mbe_row(n) for n in range(10)] + [mbe_row(10, doc_image="copy.png")])
    assert import_catalog("mbe", path, tmp_path / "plain", images=tmp_path / "p").counts["pictures"] == 10
    import_catalog("mbe", path, tmp_path / "packed", images=tmp_path / "p", shard_images=True)
    assert not (tmp_path / "packed" / "images").exists() and (tmp_path / "packed" / "images-00.tar").is_file()
    plain, packed = Catalog.load(tmp_path / "plain"), Catalog.load(tmp_path / "packed")
    assert plain.data_hash == packed.data_hash and len(packed) == 11 and all(product.has_image for product in packed)


# ---------------------------------------------------------------------------------------------- web addresses


class Shop(BaseHTTPRequestHandler):
    "Pictures, and everything that can go wrong with them."
    asked = Counter()

    def do_GET(self):
        Shop.asked[self.path] += 1
        name = self.path.strip("/")
        if name == "slow":
            time.sleep(1.5)
        if name == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.1)
            return
        if name == "part":
            self.send_response(200)
            self.end_headers()
            for piece in (
                draw(7)[:50], draw(7)[50:100],
            ):  # each byte gives the socket's timeout anew; the deadline hangs up
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.5)
            time.sleep(1)
            return
        status = {"gone": 404, "broken": 500, "moved": 302, "private": 302, "loop": 302, "file": 302}.get(
            name, 503 if name == "busy" and Shop.asked[self.path] < 3 else 200
        )
        self.send_response(status)
        if status == 302:
            port = self.server.server_port
            self.send_header(
                "Location",
                {
                    "moved": "/7.png", "private": f"http://127.0.0.2:{port}/7.png", "loop": "/loop",
                    "file": "file:///etc/passwd",
                }[name],
            )
        data = (
            {"text": b"<html>", "huge": b"x" * 300_000}.get(
                name, draw(int(name.split(".")[0]) if name[:1].isdigit() else 7)
            )
            if status == 200
            else b""
        )
        self.send_header("Content-Length", str(len(data) + (10 if name == "cut" else 0)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words):
        pass


@pytest.fixture
def shop():
    Shop.asked.clear()
    server = ThreadingHTTPServer(("0.0.0.0", 0), Shop)
    server.handle_error = lambda request, address: None  # clients that hang up are part of the tests
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


FETCHER = Fetcher(
    timeout=0.5, deadline=3, retries=2, pause=0.02, max_bytes=200_000, allow_hosts=frozenset({"127.0.0.1"})
)


def test_pictures_behind_addresses(tmp_path, shop):
    """Good ones arrive, every failure is listed with its product, a repeated address is asked once, 503 is tried again,
    404 is not.
    """
    names = [
        "1.png", "2.png?w=200", "moved", "busy", "gone", "broken", "private", "loop", "file", "text", "huge", "cut",
        "slow", "1.png",
    ]
    path = write_lines(tmp_path / "mbe.jsonl", [mbe_row(n, doc_image=f"{shop}/{name}") for n, name in enumerate(names)])
    summary = import_catalog("mbe", path, tmp_path / "out", allow_urls=True, fetcher=FETCHER)
    found = {
        names[int(row["title"].split()[1])]: len(json.loads(row["image_paths"])) for row in table(tmp_path / "out")
    }
    assert {name for name, count in found.items() if count} == {"1.png", "2.png?w=200", "moved", "busy"} and len(
        table(tmp_path / "out")
    ) == 14
    why = {row["reason"].split(": http")[0] for row in table(tmp_path / "out", "quarantine")}
    assert (
        {
            "the server says 404", "the server says 500",
            "address refused: 127.0.0.2 is not on the public network (127.0.0.2)", "more than 5 redirects",
            "not an image: a web page", "too long a file: over 200,000 bytes", "cut answer: 10 bytes are missing",
        }
        <= why
        and any(reason.startswith("no answer from 127.0.0.1") for reason in why)
        and any("file:///etc" in reason for reason in why)
    )
    assert (Shop.asked["/1.png"], Shop.asked["/busy"], Shop.asked["/gone"], Shop.asked["/broken"]) == (1, 3, 1, 3)
    assert summary.counts["pictures"] == 3  # 7.png came twice: moved and busy


def test_addresses_are_asked_only_when_allowed(tmp_path, shop):
    path = write_lines(tmp_path / "mbe.jsonl", [mbe_row(1, doc_image=f"{shop}/1.png")])
    import_catalog("mbe", path, tmp_path / "off")
    assert not Shop.asked and reasons(tmp_path / "off") == {
        "address not asked (allow_urls is off, and no such file)": 1
    }
    import_catalog("mbe", path, tmp_path / "on", allow_urls=True)  # the default fetcher never asks a private address
    assert not Shop.asked and reasons(tmp_path / "on") == {"address refused": 1}
    write_pictures(tmp_path / "p", ["1.png"])
    import_catalog(
        "mbe", path, tmp_path / "local", images=tmp_path / "p", allow_urls=True, fetcher=FETCHER
    )  # a file of that name comes first
    assert not Shop.asked and Catalog.load(tmp_path / "local")[0].has_image


def test_a_dripping_server_is_left(shop):
    "A byte every 0.1 s passes every timeout; the deadline ends it."
    started = time.monotonic()
    with pytest.raises(DataError):
        Fetcher(timeout=0.5, deadline=0.8, retries=0, allow_hosts=frozenset({"127.0.0.1"}))(f"{shop}/drip")
    assert time.monotonic() - started < 2.5


def test_what_was_read_until_the_deadline_is_no_whole_body(shop):
    "Without a length the end of a body is the end of the connection, and we end it ourselves at the deadline."
    with pytest.raises(DataError, match="too slow"):
        Fetcher(timeout=5, deadline=0.8, retries=0, allow_hosts=frozenset({"127.0.0.1"}))(f"{shop}/part")


def test_a_name_that_changes_its_address_gains_nothing(monkeypatch):
    "The connection goes to the address that was checked, whatever the name server says next."
    answers, connected = iter(["93.184.216.34", "127.0.0.1", "127.0.0.1"]), []
    monkeypatch.setattr(
        download.check_url, "__defaults__",
        (frozenset(), lambda host, port, type: [(0, 0, 0, "", (next(answers), port))]),
    )
    monkeypatch.setattr(
        socket, "create_connection",
        lambda address, timeout, **options: (
            connected.append(address) or (_ for _ in ()).throw(ConnectionRefusedError("closed"))
        ),
    )
    with pytest.raises(DataError, match="no connection"):
        Fetcher(retries=0)("http://rebind.example/1.png")
    assert connected == [("93.184.216.34", 80)]
    with pytest.raises(DataError, match="not on the public network"):
        Fetcher(retries=0)("http://rebind.example/1.png")
    assert len(connected) == 1


# ---------------------------------------------------------------------------------------------- resume and memory

SCRIPT = """
import sys, json
from moon2_lab.data.importers import importer
importer.PART_ROWS = int(sys.argv[1])
options = json.loads(sys.argv[2])
importer.import_catalog(**options)
# ru_maxrss would count the parent too
print(next((int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")), 0))
"""


def started(part_rows, **options):
    "An import in a process of its own."
    words = [
        sys.executable, "-c", textwrap.dedent(SCRIPT), str(part_rows),
        json.dumps({name: str(value) if isinstance(value, Path) else value for name, value in options.items()}),
    ]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def contents(folder):
    "Every file of a catalogue but the summary, which names the folder."
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "import.json"
    }


def kill_source(kind, folder):
    if kind == "m5product":
        m5_source(folder)
        many = {str(n): {"title": f"商品 {n}", "pv": "a#:#b", "label": str(n % 50)} for n in range(4_000)}
        (folder / "more_id_label.json").write_text(json.dumps(many, ensure_ascii=False), encoding="utf-8")
    elif kind == "st":
        folder.mkdir()
        write_lines(
            folder / "st.jsonl",
            [
                {"anchor": f"q {n % 900}", "positive": f"p {n}", "negative_1": f"p {(n * 7) % 4_000}"}
                for n in range(4_000)
            ],
        )
    else:
        write_pictures(folder / "p", [f"{n}.png" for n in range(300)])
        lines = [json.dumps(mbe_row(n, doc_image=f"p/{n % 320}.png")) if n % 97 else '{"id": ' for n in range(4_000)]
        (folder / "a.jsonl").write_text("\n".join(lines[:3000]))
        with gzip.open(folder / "b.jsonl.gz", "wt") as file:
            file.write("\n".join(lines[2900:]))
    return folder


def rows_committed(out):
    "Rows that a running import has committed."
    try:
        ledger = sqlite3.connect(f"file:{out / importer.STATE / 'ledger.sqlite'}?mode=ro", uri=True)
        found = ledger.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        ledger.close()
        return json.loads(found[0])["counts"].get("seen", 0) if found else 0
    except sqlite3.Error:
        return 0


@pytest.mark.parametrize(
    "kind,options",
    [
        pytest.param("mbe", {"shard_images": True}, marks=pytest.mark.slow, id="shards"),
        pytest.param("mbe", {}, marks=pytest.mark.slow, id="mbe"),
        pytest.param("st", {}, marks=pytest.mark.slow, id="triplets"),
        pytest.param("m5product", {}, marks=pytest.mark.slow, id="m5product"),
    ],
)
def test_a_killed_import_goes_on_and_ends_the_same(tmp_path, kind, options):
    "kill -9 twice, some time after a commit; the result is byte for byte that of an import that was let alone."
    source = kill_source(kind, tmp_path / "in")
    assert started(500, layout=kind, source=source, out=tmp_path / "whole", **options).wait(120) == 0
    for committed in (800, 2400):
        process = started(500, layout=kind, source=source, out=tmp_path / "out", resume=True, **options)
        while process.poll() is None and rows_committed(tmp_path / "out") < committed:
            time.sleep(0.01)
        assert process.poll() is None, "the import was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out" / "products.parquet").exists()
    assert started(500, layout=kind, source=source, out=tmp_path / "out", resume=True, **options).wait(120) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(table(tmp_path / "out")) >= 3500


def test_resuming_asks_for_the_same_import(tmp_path):
    path = write_lines(tmp_path / "mbe.jsonl", [mbe_row(n, doc_image=None) for n in range(9)])
    first = import_catalog("mbe", path, tmp_path / "out", resume=True)  # nothing there yet: an import like any other
    with pytest.raises(UsageError, match="not empty"):
        import_catalog("mbe", path, tmp_path / "out")
    with pytest.raises(UsageError, match="begun with another limit"):
        import_catalog("mbe", path, tmp_path / "out", resume=True, limit=3)
    assert import_catalog("mbe", path, tmp_path / "out", resume=True).counts == first.counts
    write_lines(path, [mbe_row(n) for n in range(10)])
    with pytest.raises(UsageError, match="begun with another files"):
        import_catalog("mbe", path, tmp_path / "out", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="no import to go on with"):
        import_catalog("mbe", path, tmp_path / "other", resume=True)
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_the_limit_counts_usable_rows(tmp_path):
    path = write_lines(tmp_path / "mbe.jsonl", [mbe_row(n, doc_image=None) for n in range(200)])
    path.write_text("{broken\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert import_catalog("mbe", path, tmp_path / "out", limit=70).counts["products"] == 70


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("layout", ["mbe", "m5product"])
def test_memory_does_not_grow_with_the_rows(tmp_path, layout):
    """Peak memory of 30,000 and of 150,000 rows, each in its own process: less than 50 MB apart, lines or one JSON
    object.
    """
    peaks = []
    for count in (30_000, 150_000):
        source = tmp_path / str(count)
        source.mkdir()
        with (
            open(source / "all_id_label.json", "w")
            if layout == "m5product"
            else open(source / "mbe.jsonl", "w") as file
        ):
            if layout == "mbe":
                file.writelines(
                    json.dumps(mbe_row(n, doc_image=None, doc_title=f"{n} " + "x" * 500)) + "\n" for n in range(count)
                )
            else:
                file.write(
                    "{"
                    + ",".join(
                        f'"{n}": {{"title": "{n} {"x" * 500}", "pv": "a#:#b", "label": "{n % 900}"}}'
                        for n in range(count)
                    )
                    + "}"
                )
        process = started(importer.PART_ROWS, layout=layout, source=source, out=tmp_path / f"out{count}")
        peaks.append(int(process.communicate(timeout=300)[0]))
    print(layout, peaks)
    assert 0 < peaks[0] and peaks[1] - peaks[0] < 50, peaks


# ---------------------------------------------------------------------------------------------- the command


def test_the_command_from_files_to_scores(tmp_path, capsys):
    "moon2 data import, then check: what both say is the same; layouts offered are the layouts there are."
    source = m5_source(tmp_path / "m5")
    assert main(["data", "import", "m5product", str(source), str(tmp_path / "out"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert main(["data", "check", str(tmp_path / "out"), "--json"]) == 0
    checked = json.loads(capsys.readouterr().out)
    shared = set(facts) & set(checked)
    assert {
        "usable", "folder", "records", "products", "with_both", "images", "keys", "shared_titles", "splits",
    } <= shared and facts["import"]["counts"]["gallery"] == 21
    assert {name: facts[name] for name in shared} == {name: checked[name] for name in shared}
    assert main(["data", "import", "mbe3", "x", "y"]) == 2
    offered = capsys.readouterr().err
    assert all(f"'{name}'" in offered for name in LAYOUTS)
    assert main(["data", "import", "--help"]) == 0 and "example:" in capsys.readouterr().out
