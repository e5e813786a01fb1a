"Catalogues that are not clean: every bad input has a reason, and nothing good is lost."

import base64
import io
import json
import multiprocessing
import os
import pickle
import resource
import struct
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from choosing import few
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

import moon2_lab.data.images as images_module
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.catalog_tables import Quarantine, read_product_table
from moon2_lab.data.image_folder import FileSpan, ImageFolder
from moon2_lab.data.images import ImageRef, decode_image, examine_image
from moon2_lab.data.products import Item, Product, describe_large_key, large_keys, product_keys
from moon2_lab.errors import DataError, LabError
from moon2_lab.reporting.html import picture_uri
from moon2_lab.retrieval.query_input import query_item

DATA = os.environ.get("MOON2_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="MOON2_DATA is not set")
REAL_SETS = {  # products, images, exactly equal titles, train / valid / test
    "fashion-product-images": (9526, 9526, 2961, (7603, 949, 974)),
    "flipkart-general": (869, 869, 0, (700, 92, 77)),
    "ikea-home": (1743, 1743, 2, (1400, 187, 156)),
    "grocery-store": (67, 871, 0, (52, 6, 9)),
    "magento-luma": (147, 582, 2, (118, 12, 17)),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOON2_CACHE", str(tmp_path_factory.mktemp("cache")))


def draw(seed, size=(40, 50)):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse(
        [5, 5, size[0] - 5, size[1] - 5], fill=((seed * 37) % 256, (seed * 91) % 256, (seed * 53) % 256)
    )
    return picture


def encoded(picture, kind="PNG", **options):
    held = io.BytesIO()
    picture.save(held, kind, **options)
    return held.getvalue()


def make(folder: Path, rows, files=None, packed=None, table_options=None):
    "A catalogue folder of row dicts, plain files and tar members."
    folder.mkdir(exist_ok=True)
    for name, data in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if packed:
        with tarfile.open(folder / "images-00.tar", "w") as tar:
            for name, data in packed.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pd.DataFrame(rows).to_parquet(folder / "products.parquet")
    return folder


def row(product_id, *paths, title="A mug", **more):
    return {"product_id": product_id, "title": title, "image_paths": json.dumps(list(paths)), "split": "train", **more}


def reasons(catalog):
    return {(entry.product_id, entry.file): entry.reason for entry in catalog.quarantine.itertuples()}


def bomb(side=30_000):
    "A valid one-bit PNG of side x side pixels (2.7 GB as RGB, 110 kB on disk)."

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pack, line = zlib.compressobj(1), b"\0" * (1 + (side + 7) // 8)
    body = b"".join(pack.compress(line) for _ in range(side)) + pack.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        + chunk(b"IDAT", body)
        + chunk(b"IEND", b"")
    )


# ---- bad pictures


def test_every_bad_picture_has_its_reason_and_the_product_stays(tmp_path):
    good = encoded(draw(1), "JPEG")
    bad = {
        "images/text.jpg": b"This is a text file that somebody called .jpg",
        "images/truncated.jpg": encoded(draw(2, (400, 400)), "JPEG")[:2000],
        "images/empty.png": b"",
        "images/bomb.png": bomb(),
        "images/float.tif": encoded(Image.new("F", (9, 9)), "TIFF"),
        "images/header_only.png": encoded(draw(3))[:33],
    }
    rows = [row(f"p{i}", "images/good.jpg", path, title=f"Mug {i}") for i, path in enumerate(bad)]
    rows += [
        row("gone", "images/good.jpg", "images/none.jpg"),
        row("out", "images/good.jpg", "../../etc/passwd"),
        row("absolute", "images/good.jpg", "/etc/passwd"),
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    catalog = Catalog.load(make(tmp_path / "c", rows, {"images/good.jpg": good, **bad}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000, "the bomb was decoded"  # kB
    assert [product.product_id for product in catalog] == [entry["product_id"] for entry in rows]
    assert all(product.n_images == 1 and product.image().size == (40, 50) for product in catalog)
    classes = {file: reason.split(":")[0] for (_, file), reason in reasons(catalog).items()}
    assert classes == {
        "images/text.jpg": "not an image",
        "images/truncated.jpg": "broken image",
        "images/empty.png": "empty file",
        "images/bomb.png": "too many pixels",
        "images/float.tif": "unknown pixel range",
        "images/header_only.png": "not an image",
        "images/none.jpg": "no such file",
        "../../etc/passwd": "path leaves the folder",
        "/etc/passwd": "path leaves the folder",
    }
    assert list(catalog.quarantine.columns) == ["product_id", "file", "field", "reason"]


def test_bad_pictures_have_their_reason_on_the_second_load_too(tmp_path):
    folder = make(
        tmp_path / "c",
        [row("a", "t.jpg"), row("b", "h.png")],
        {"t.jpg": b"text", "h.png": encoded(draw(1), "JPEG")[:300]},
    )
    first = Catalog.load(folder, quarantine_limit=1)
    assert Catalog.load(folder, quarantine_limit=1).quarantine.equals(first.quarantine)
    assert len(first.quarantine) == 2


@pytest.mark.parametrize(
    "kind, picture",
    [
        ("PNG", draw(1).convert("P")),
        ("PNG", draw(1).convert("L")),
        ("PNG", draw(1).convert("1")),
        ("PNG", draw(1).convert("RGBA")),
        ("PNG", draw(1).convert("LA")),
        ("JPEG", draw(1).convert("CMYK")),
        ("JPEG", draw(1).convert("L")),
        ("TIFF", draw(1).convert("CMYK")),
        ("WEBP", draw(1)),
        ("GIF", draw(1)),
        ("BMP", draw(1)),
        ("PNG", Image.fromarray(np.full((50, 40), 40_000, np.uint16))),
        ("TIFF", Image.fromarray(np.full((50, 40), 40_000, np.int32))),
        ("PPM", draw(1)),
    ],
)
def test_every_mode_becomes_rgb(kind, picture):
    decoded = decode_image(encoded(picture, kind))
    assert (decoded.mode, decoded.size) == ("RGB", (40, 50))


def test_palette_with_transparency_is_laid_on_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((0, 0), 1)
    decoded = decode_image(encoded(palette, "PNG", transparency=0))
    assert decoded.getpixel((1, 1)) == (255, 255, 255) and decoded.getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("note", range(1, 9))
def test_exif_orientation(note):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste("red", (0, 0, 16, 16))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores the picture as the sensor saw it
    stored = upright.transpose(Image.Transpose(undo[note])) if note > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = note
    decoded = decode_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert decoded.size == (64, 32)
    assert abs(np.asarray(decoded).astype(int) - np.asarray(upright)).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_only_pixels_are_kept(kind, tmp_path):
    "Where a picture was taken, and what somebody noted, is in no page that shows it."
    exif, text = Image.Exif(), PngInfo()
    exif[0x010E] = "taken at home"
    text.add_text("note", "taken at home")
    content = encoded(
        draw(2, (90, 60)),
        kind,
        exif=exif,
        **({"pnginfo": text} if kind == "PNG" else {"comment": b"taken at home"} if kind == "JPEG" else {}),
    )
    assert b"taken at home" in content
    held = Image.open(io.BytesIO(content))
    held.load()
    (tmp_path / "photo").write_bytes(content)
    uploaded = query_item("a lamp", tmp_path / "photo").image.load()
    for picture in (decode_image(content), ImageRef.from_pil(held).load(), uploaded):
        assert not picture.info and not picture.getexif() and picture.size == (90, 60)
        assert not any(b"taken at home" in encoded(picture, other) for other in ("JPEG", "PNG", "WEBP", "TIFF"))
        assert b"taken at home" not in base64.b64decode(picture_uri(picture, 64).split(",")[1])


def test_draft_gives_the_picture_that_full_decoding_gives():
    photo = draw(3, (1600, 1200))
    small = decode_image(encoded(photo, "JPEG", quality=90), max_side=224)
    assert small.size == (224, 168)
    assert (
        abs(np.asarray(small).astype(int) - np.asarray(photo.resize((224, 168), Image.Resampling.BICUBIC))).mean() < 2
    )


def test_pixel_hash_is_of_the_full_picture():
    photo = draw(3, (1600, 1200))
    facts = examine_image(encoded(photo))
    assert (facts.width, facts.height) == (1600, 1200)
    assert facts.pixel_sha == examine_image(encoded(photo, "BMP")).pixel_sha
    other = photo.copy()
    other.putpixel((7, 7), (1, 2, 3))
    assert examine_image(encoded(other)).pixel_sha != facts.pixel_sha
    assert (
        examine_image(encoded(Image.new("RGB", (6, 4)))).pixel_sha
        != examine_image(encoded(Image.new("RGB", (4, 6)))).pixel_sha
    )


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(DataError, match="no such file"):
        ImageFolder(tmp_path).find("pipe.jpg")


def test_unreadable_and_odd_paths(tmp_path):
    folder = make(
        tmp_path / "c",
        [row("a", "x" * 5000), row("b", "images"), row("c", "./images/../images/ok.png")],
        {"images/ok.png": encoded(draw(1))},
    )
    catalog = Catalog.load(folder, quarantine_limit=1)
    assert [product.n_images for product in catalog] == [0, 0, 1]


# ---- tars


def test_plain_file_wins_and_tar_members_are_found_next(tmp_path):
    rows = [row("a", "images/1.png"), row("b", "images/2.png", title="Cup")]
    folder = make(
        tmp_path / "c",
        rows,
        {"images/1.png": encoded(draw(1))},
        {"images/1.png": encoded(draw(9)), "images/2.png": encoded(draw(2))},
    )
    catalog = Catalog.load(folder)
    assert catalog[0].image().tobytes() == draw(1).tobytes() and catalog[1].image().tobytes() == draw(2).tobytes()
    assert sorted(path.name for path in folder.rglob("*")) == [
        "1.png",
        "images",
        "images-00.tar",
        "products.parquet",
    ], "nothing is unpacked"


def test_cut_tar_keeps_its_whole_members(tmp_path):
    rows = [row(f"p{i}", f"images/{i}.png", title=f"Mug {i}") for i in range(5)]
    folder = make(tmp_path / "c", rows, packed={f"images/{i}.png": encoded(draw(i)) for i in range(5)})
    tar = folder / "images-00.tar"
    tar.write_bytes(tar.read_bytes()[: 2 * 1024 + 700])
    catalog = Catalog.load(folder, quarantine_limit=1)
    assert [product.has_image for product in catalog] == [True, True, False, False, False]
    assert len(catalog) == 5 and catalog[1].image().tobytes() == draw(1).tobytes()
    assert (None, "images-00.tar") in reasons(catalog)
    assert reasons(catalog)["p2", "images/2.png"].startswith("cut file")


def test_a_tar_that_is_none_and_links_in_tars(tmp_path):
    folder = make(tmp_path / "c", [row("a", "images/link.png"), row("b")])
    (folder / "junk.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(folder / "images-00.tar", "w") as tar:
        link = tarfile.TarInfo("images/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    catalog = Catalog.load(folder, quarantine_limit=1)
    assert reasons(catalog)["a", "images/link.png"].startswith("no such file")
    assert reasons(catalog)[None, "junk.tar"].startswith("broken tar")


def _size_of(ref):
    return ref.load().size


def test_refs_read_from_threads_and_processes(tmp_path):
    rows = [row(f"p{i}", f"images/{i}.png", title=f"Mug {i}") for i in range(20)]
    catalog = Catalog.load(
        make(tmp_path / "c", rows, packed={f"images/{i}.png": encoded(draw(i, (20 + i, 30))) for i in range(20)})
    )
    refs = [product.image_ref() for product in catalog] * 20
    expected = [(20 + i, 30) for i in range(20)] * 20
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(_size_of, refs)) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_size_of, refs) == expected
    copy = pickle.loads(pickle.dumps(catalog))
    assert [product.image().size for product in copy.split("train")] == expected[:20]


def test_an_exchanged_file_is_noticed(tmp_path):
    folder = make(tmp_path / "c", [row("a", "1.bmp")], {"1.bmp": encoded(draw(1), "BMP")})
    product = Catalog.load(folder)[0]
    (folder / "1.bmp").write_bytes(encoded(draw(2), "BMP"))
    with pytest.raises(DataError, match="changed since"):
        product.image()


# ---- the memory of facts


def test_a_picture_is_decoded_once_in_its_life(tmp_path, monkeypatch):
    files = {f"{i}.png": encoded(draw(i)) for i in range(6)}
    rows = [row(f"p{i}", f"{i}.png", title=f"Mug {i}") for i in range(6)]
    first = Catalog.load(make(tmp_path / "one", rows, files))
    calls = []
    monkeypatch.setattr(
        images_module, "examine_image", lambda data, *rest: calls.append(1) or examine_image(data, *rest)
    )
    again = Catalog.load(tmp_path / "one")
    copied = Catalog.load(make(tmp_path / "two", rows, packed=files))
    assert not calls
    assert first.data_hash == again.data_hash == copied.data_hash
    Catalog.load(make(tmp_path / "three", rows + [row("new", "new.png")], files | {"new.png": encoded(draw(77))}))
    assert len(calls) == 1


def test_memory_damaged_or_not_writable(tmp_path, monkeypatch):
    folder = make(tmp_path / "c", [row("a", "1.png")], {"1.png": encoded(draw(1))})
    Catalog.load(folder)
    for shard in Path(os.environ["MOON2_CACHE"]).rglob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-20])
    assert Catalog.load(folder)[0].has_image

    def full(path, table):
        raise LabError("the disk is full", where=str(path), advice="free some space")

    monkeypatch.setattr(images_module, "write_parquet", full)
    (folder / "1.png").write_bytes(encoded(draw(2)))
    with pytest.warns(UserWarning, match="the disk is full"):
        assert Catalog.load(folder)[0].has_image


# ---- bad tables


def test_missing_folder_table_and_column(tmp_path):
    for bad, text in ((tmp_path / "none", "no such folder"), (tmp_path, "no products.parquet")):
        with pytest.raises(DataError, match=text):
            Catalog.load(bad)
    make(tmp_path / "c", [{"sku": "1", "name": "mug"}])
    with pytest.raises(DataError, match="no column product_id.*columns found: sku, name"):
        Catalog.load(tmp_path / "c")
    (tmp_path / "c" / "products.parquet").write_bytes(b"PAR1 but no parquet")
    with pytest.raises(DataError, match="not a readable parquet"):
        Catalog.load(tmp_path / "c")
    assert "\n" not in str(pytest.raises(DataError, Catalog.load, tmp_path / "c").value)


def test_only_product_id_and_title_are_needed(tmp_path):
    catalog = Catalog.load(make(tmp_path / "c", [{"product_id": 7, "title": "Mug"}, {"product_id": 8, "title": "Cup"}]))
    assert [product.product_id for product in catalog] == ["7", "8"]
    with pytest.raises(DataError, match="no usable product in split 'test'.*none"):
        catalog.split("test")


def test_no_rows(tmp_path):
    make(tmp_path / "c", {"product_id": [], "title": []})
    with pytest.raises(DataError, match="nothing usable"):
        Catalog.load(tmp_path / "c")
    assert len(Catalog.load(tmp_path / "c", quarantine_limit=1)) == 0
    assert Catalog.load(tmp_path / "c", quarantine_limit=1).summary()["products"] == 0


def test_titles_long_odd_and_missing(tmp_path):
    titles = ["x" * 10_000, "👟👟👟", " \t ", None, "\u200bMug\n\nred", "Becher für Ärzte"]
    rows = [row(f"p{i}", "1.png", title=title) for i, title in enumerate(titles)]
    catalog = Catalog.load(make(tmp_path / "c", rows, {"1.png": encoded(draw(1))}))
    assert len(catalog) == 6 and catalog.quarantine["product_id"].tolist() == ["p4"]  # cut, and listed
    assert "invisible ones at an end" in catalog.quarantine["reason"][0] and catalog[4].title.split() == ["Mug", "red"]
    assert [product.has_text for product in catalog] == [True, True, False, False, True, True]
    assert catalog[0].title == titles[0]


def test_wrong_types_lose_only_the_field(tmp_path):
    "A number has one obvious text, an object of sizes has none."
    table = pa.table(
        {
            "product_id": ["a", "b"],
            "title": pa.array([{"w": 1, "h": 2}, {"w": 3, "h": 4}]),
            "description": ["d", "d"],
            "category_l1": pa.array([1.5, 2.5]),
            "image_paths": pa.array([["1.png"], ["1.png", "none.png"]]),
            "attributes": pa.array([[("colour", "red")], [("colour", "blue")]], pa.map_(pa.string(), pa.string())),
            "split": ["train", "test"],
        }
    )
    make(tmp_path / "c", [row("x")], {"1.png": encoded(draw(1))})
    pq.write_table(table, tmp_path / "c" / "products.parquet")
    catalog = Catalog.load(tmp_path / "c", quarantine_limit=1)
    assert [(product.title, product.category_l1, product.attributes, product.n_images) for product in catalog] == [
        (None, "1.5", {"colour": "red"}, 1),
        (None, "2.5", {"colour": "blue"}, 1),
    ]
    assert set(catalog.quarantine["reason"].str.split(":").str[0]) == {"not text", "no such file"}
    with pytest.raises(DataError, match="2 of 2 records lost"):
        Catalog.load(tmp_path / "c")


def test_attributes_as_struct(tmp_path):
    make(
        tmp_path / "c",
        [{"product_id": "a", "title": "Mug", "attributes": {"colour": "red", "year": 2010}, "image_paths": []}],
    )
    assert Catalog.load(tmp_path / "c")[0].attributes == {"colour": "red", "year": "2010"}


def test_malformed_json(tmp_path):
    rows = [
        row("a", title="Mug") | {"attributes": '{"colour": ', "image_paths": '["1.png"'},
        row("b", title="Cup") | {"attributes": "[1, 2]", "image_paths": '{"a": 1}'},
        row("c", title="Jug") | {"attributes": "[" * 100_000, "image_paths": '[1, null, "1.png", {"x": 2}]'},
        row("d", title="Pot") | {"attributes": None, "image_paths": ""},
    ]
    catalog = Catalog.load(make(tmp_path / "c", rows, {"1.png": encoded(draw(1))}), quarantine_limit=0.5)
    assert len(catalog) == 4 and catalog.get("c").n_images == 1
    counts = catalog.quarantine.groupby("product_id")["field"].apply(sorted).to_dict()
    assert counts == {
        "a": ["attributes", "image_paths"],
        "b": ["attributes", "image_paths"],
        "c": ["attributes"] + ["image_paths"] * 2,
    }


def test_duplicates_and_empty_records(tmp_path):
    rows = [
        row("a"),
        row("a", title="other"),
        row("", title="no id"),
        row(None, title="no id"),
        row("e", title=None),
        row("f", "gone.png", title=None),
    ]
    catalog = Catalog.load(make(tmp_path / "c", rows), quarantine_limit=0.9)
    assert [product.product_id for product in catalog] == ["a"] and catalog[0].title == "A mug"
    assert catalog.summary()["quarantine"]["reasons"] == {
        "no product id": 2,
        "empty record": 2,
        "duplicate id": 1,
        "no such file": 1,
    }


def test_limit_counts_lost_views_not_single_pictures(tmp_path):
    rows = [row(f"p{i}", "1.png", "gone.png", title=f"Mug {i}") for i in range(10)]
    folder = make(tmp_path / "c", rows, {"1.png": encoded(draw(1))})
    assert len(Catalog.load(folder, quarantine_limit=0)) == 10  # every product still has a picture
    (folder / "1.png").unlink()
    with pytest.raises(DataError, match="10 of 10 records lost, limit 50%: 20 x no such file") as caught:
        Catalog.load(folder)
    assert len(caught.value.quarantine) == 20
    assert len(Catalog.load(folder, quarantine_limit=1)) == 10  # the titles are still good


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@example([{"product_id": None}, {"product_id": "0\x00"}, {"product_id": "0"}])  # lost, kept and changed, a duplicate
@given(
    st.lists(
        st.fixed_dictionaries(dict.fromkeys(("product_id", "title", "attributes", "image_paths", "split"), VALUES)),
        max_size=6,
    )
)
def test_no_row_can_crash_the_reader(rows):
    aside = Quarantine()
    records = read_product_table(rows, aside)
    left_out = ("no product id", "duplicate id")  # other reasons about an id tell how one that is kept was changed
    without_id = sum(field == "product_id" and reason.startswith(left_out) for _, _, field, reason in aside.entries)
    assert len(records) + without_id == len(rows)  # each row is kept or has a reason
    assert set(range(len(rows))) - set(records) <= aside.lost  # and is counted as lost
    for product in records.values():
        assert all(isinstance(text, str) for text in [*product.attributes.values(), *product.image_paths])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]), st.integers(0, 10_000))
def test_damaged_bytes_give_a_picture_or_a_reason(noise, kind, place):
    data = encoded(draw(1), kind)
    place %= len(data)
    for damaged in (noise, data[:place], data[:place] + noise + data[place + len(noise) :]):
        try:
            picture = decode_image(damaged, max_pixels=10**6)
            assert picture.mode == "RGB" and max(picture.size) <= 1024
        except DataError as error:
            assert ":" in error.what


# ---- keys


def brute_force_components(products):
    "Flood fill over all pairs."

    def same(a, b):
        title = lambda p: " ".join((p.title or "").casefold().split())
        return (title(a) and title(a) == title(b)) or (
            a.refs and b.refs and not a.main_set_aside and not b.main_set_aside and a.refs[0] == b.refs[0]
        )

    left, groups = set(range(len(products))), []
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for j in left - group if any(same(products[i], products[j]) for i in edge)}
        groups.append(group)
        left -= group
    return groups


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["", "red mug", "Red  Mug", "cup", "jug", "pot"]), st.integers(0, 6), st.booleans()),
        min_size=1,
        max_size=14,
    )
)
def test_keys_are_connected_components(drawn):
    refs = [ImageRef.from_pil(draw(i, (12, 20))) for i in range(6)]
    products = [
        Product(f"p{i:02}", title, refs=(refs[n],) if n < 6 else (), main_set_aside=aside)
        for i, (title, n, aside) in enumerate(drawn)
    ]
    keys = product_keys(products)
    groups = brute_force_components(products)
    assert len(set(keys)) == len(groups)
    assert all(len({keys[i] for i in group}) == 1 for group in groups)
    reordered = product_keys(products[::-1])[::-1]
    assert reordered == keys


def test_split_keeps_keys_and_hash(tmp_path):
    rows = [
        row("a", title="Mug") | {"split": "train"},
        row("b", title="MUG") | {"split": "test"},
        row("c", title="Cup") | {"split": "test"},
    ]
    catalog = Catalog.load(make(tmp_path / "c", rows))
    test = catalog.split("test")
    assert [product.key for product in test] == [0, 1] and test.product_key("b") == catalog.product_key("a")
    assert test.whole is catalog and test.split("test").whole is catalog
    assert test.data_hash == catalog.data_hash
    assert catalog.summary()["splits"]["test"]["key_in_train"] == 1


def test_main_picture_set_aside_has_no_pixel_rule(tmp_path):
    rows = [row("a", "bad.png", "1.png", title="Mug"), row("b", "1.png", title="Cup"), row("c", "1.png", title="Jug")]
    catalog = Catalog.load(make(tmp_path / "c", rows, {"bad.png": b"x", "1.png": encoded(draw(1))}))
    assert [product.key for product in catalog] == [0, 1, 1]
    assert catalog[0].main_set_aside and catalog[0].n_images == 1


def test_items():
    ref = ImageRef.from_pil(draw(1))
    assert Product("a", "Mug", refs=(ref,)).item() == Item("Mug", ref, "a")
    assert Product("a", "Mug", refs=(ref,)).item("i") == Item(None, ref, "a")
    assert Product("a", "Mug").item("mm") == Item("Mug", None, "a")


# ---- triplets


def write_triplets(folder, rows):
    pd.DataFrame(rows).to_parquet(folder / "triplets.parquet")


def test_triplets_are_validated(tmp_path):
    folder = make(
        tmp_path / "c",
        [row("a", "1.png"), row("b", title="Cup") | {"split": "test"}],
        {"1.png": encoded(draw(1)), "q.png": encoded(draw(5)), "bad.png": b"x"},
    )
    base = {
        "query_id": "q",
        "query_text": "mug",
        "query_image": None,
        "positive_id": "a",
        "negative_ids": '["b"]',
        "noise": None,
    }
    write_triplets(
        folder,
        [
            base,
            base | {"query_image": "q.png"},
            base | {"query_image": "bad.png"},
            base | {"query_text": None, "query_image": "bad.png"},
            base | {"positive_id": "zz"},
            base | {"negative_ids": '["b", "zz", "b"]'},
            base | {"negative_ids": "[broken"},
            base | {"noise": "loud"},
            base | {"query_image": "../q.png"},
            base | {"positive_id": "b", "negative_ids": '["a"]'},
        ],
    )
    catalog = Catalog.load(folder)
    assert len(catalog.triplets) == 8
    assert catalog.triplets["query_image"].tolist() == [None, "q.png", None, None, None, None, None, None]
    assert catalog.triplets["negative_ids"].tolist() == [["b"]] * 4 + [[], ["b"], ["b"], ["a"]]
    assert catalog.image_ref("q.png").load().tobytes() == draw(5).tobytes()
    assert set(catalog.quarantine["file"]) == {"triplets.parquet"} and len(catalog.quarantine) == 8
    train, test = catalog.split("train"), catalog.split("test")
    assert (len(train.triplets), len(test.triplets)) == (7, 1)
    assert train.triplets["negative_ids"].tolist() == [[]] * 7, "a test product is no training negative"
    with pytest.raises(DataError, match="2 of 10 records lost"):
        Catalog.load(folder, quarantine_limit=0.1)


def test_triplets_without_the_needed_column(tmp_path):
    folder = make(tmp_path / "c", [row("a")])
    write_triplets(folder, [{"query": "mug", "item": "a"}])
    with pytest.raises(DataError, match="no column positive_id.*columns found: query, item"):
        Catalog.load(folder)


# ---- real products


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("name", few(REAL_SETS, "grocery-store", "magento-luma"))
def test_real_set(name, monkeypatch):
    products, pictures, same_title, splits = REAL_SETS[name]
    catalog = Catalog.load(Path(DATA) / name)
    summary = catalog.summary()
    assert (summary["products"], summary["with_both"], summary["images"], summary["quarantine"]["entries"]) == (
        products,
        products,
        pictures,
        0,
    )
    assert tuple(catalog.splits.values()) == splits
    titles = pd.Series([product.title for product in catalog])
    assert titles.duplicated(keep=False).sum() == same_title <= summary["shared_titles"]
    keys = pd.Series([product.key for product in catalog])
    assert keys.groupby(titles).nunique().max() == 1, "equal titles have equal keys"
    assert keys.nunique() <= titles.nunique()
    for product in catalog[:: max(1, products // 20)]:
        assert max(product.image().size) <= 224
    monkeypatch.setattr(images_module, "examine_image", None)  # decoding again would fail
    start = time.perf_counter()
    assert Catalog.load(Path(DATA) / name).data_hash == catalog.data_hash
    print(f"{name}: second load {time.perf_counter() - start:.2f} s")


# ---------------------------------------------------------------------------------------------- placeholders


def with_placeholder(folder, count=24, kinds=("Mug", "Hat", "Bag"), shared=12, titles=True):
    "Products of which the first `shared` show the same picture."
    rows = [
        {
            "product_id": f"p{n:02}",
            "title": f"{kinds[n % len(kinds)]} no {n}" if titles else f"Mug no {n % 2}",
            "category_l1": kinds[n % len(kinds)],
            "image_paths": json.dumps(["none.png" if n < shared else f"{n}.png"]),
        }
        for n in range(count)
    ]
    return make(
        folder, rows, {"none.png": encoded(draw(99))} | {f"{n}.png": encoded(draw(n)) for n in range(shared, count)}
    )


def test_a_placeholder_is_set_aside_with_its_reason_and_joins_nothing(tmp_path):
    catalog = Catalog.load(
        with_placeholder(tmp_path / "c", shared=20)
    )  # 20 of 24: no reason to refuse the catalogue, all titles are there
    assert (
        len({product.key for product in catalog}) == 24
        and [product.has_image for product in catalog] == [False] * 20 + [True] * 4
    )
    assert (
        catalog.quarantine["reason"].tolist()
        == ["placeholder: the main picture of 20 products of different titles"] * 20
    )
    assert catalog.summary()["large_keys"] == []


def test_a_placeholder_as_the_second_photo_asks_no_query(tmp_path):
    "Else every query by picture would be the same picture."
    rows = [
        {
            "product_id": f"p{n:02}",
            "title": f"Thing no {n}",
            "category_l1": ("Mug", "Hat", "Bag")[n % 3],
            "image_paths": json.dumps([f"{n}.png", "none.png"]),
        }
        for n in range(12)
    ]
    catalog = Catalog.load(
        make(tmp_path / "c", rows, {"none.png": encoded(draw(99))} | {f"{n}.png": encoded(draw(n)) for n in range(12)})
    )
    assert [len(product.refs) for product in catalog] == [1] * 12 and len({product.key for product in catalog}) == 12
    assert catalog.quarantine["reason"].tolist() == ["placeholder: a picture of 12 products of different titles"] * 12


def test_a_placeholder_may_be_kept_and_is_then_named(tmp_path):
    catalog = Catalog.load(with_placeholder(tmp_path / "c"), placeholder=0)
    (group,) = catalog.summary()["large_keys"]
    assert (group["products"], group["share"], group["by"], group["titles"]) == (12, 0.5, "picture", 12)
    assert not len(catalog.quarantine)
    assert "12 products (50%) share one picture (a placeholder?)" in describe_large_key(group)


@pytest.mark.parametrize("how", [{"shared": 9}, {"kinds": ("Ring",)}, {"kinds": ("Ring", "Band")}, {"titles": False}])
def test_a_picture_of_few_products_or_of_variants_is_no_placeholder(tmp_path, how):
    "Fewer than ten; ring sizes of one or two categories; listings of two titles; no categories to tell variants by."
    catalog = Catalog.load(with_placeholder(tmp_path / "c", **how))
    assert not len(catalog.quarantine) and all(product.has_image for product in catalog)


def test_a_chain_of_titles_and_pictures_is_named():
    refs = [ImageRef.from_pil(draw(n)) for n in range(6)]
    chain = [Product(f"p{n:02}", f"Mug no {n // 2}", refs=(refs[(n + 1) // 2],)) for n in range(11)]
    (group,) = large_keys(Catalog.from_products(chain))
    assert (group["products"], group["by"], group["titles"]) == (11, "title and picture in a chain", 6)


# ---- cells of every kind


def test_a_foreign_table_is_read_as_the_importers_read_it(tmp_path):
    "Ids as floats, attributes as pairs, several pictures in one text, HTML, Unicode forms: each change is listed."
    rows = [
        {
            "product_id": 1.0,
            "title": "cre\u0300me &amp; more",
            "attributes": json.dumps([{"name": "colour", "value": "red"}]),
            "image_paths": "a.png; b.png",
        },
        {"product_id": 2.0, "title": "N/A", "attributes": "colour: blue; size: S", "image_paths": "A.png"},
    ]
    folder = make(tmp_path / "c", rows, {"a.png": encoded(draw(1)), "b.png": encoded(draw(2))})
    catalog = Catalog.load(folder, quarantine_limit=1)
    assert [(p.product_id, p.title, p.attributes, p.image_paths) for p in catalog] == [
        ("1", "cr\u00e8me & more", {"colour": "red"}, ["a.png", "b.png"])
    ]
    classes = catalog.quarantine["reason"].str.split(":").str[0].tolist()
    assert sorted(classes) == sorted(
        ["HTML read as text", "letters and marks joined (NFC)", "empty word", "no such file", "empty record"]
    ), classes
    assert any("(near" in reason and "'a.png'" in reason for reason in catalog.quarantine["reason"])


def test_one_bad_cell_never_ends_a_load(tmp_path):
    "Text that is no UTF-8, half a surrogate pair, deep nesting, megabytes: each is one line of the quarantine."
    folder = make(tmp_path / "c", [row("x")])
    texts = [b"A mug", b"caf\xe9", b"x" * 2_000_000, b"Cup"]
    titles = pa.StringArray.from_buffers(4, *pa.array(texts).buffers()[1:])
    attributes = ['{"k\\ud800": "v\\ud800"}', "[" * 5000, "{", None]
    pq.write_table(
        pa.table(
            {
                "product_id": ["a", "b", "c", "d"],
                "title": titles,
                "attributes": attributes,
                "image_paths": ['["\\ud800.png"]', None, None, "https://shop.example/a.png"],
            }
        ),
        folder / "products.parquet",
    )
    catalog = Catalog.load(folder, quarantine_limit=1)
    assert [(product.product_id, product.title, product.attributes) for product in catalog] == [
        ("a", "A mug", {"k": "v"}),
        ("d", "Cup", {}),
    ]
    listed = catalog.quarantine.groupby("product_id")["field"].apply(sorted).to_dict()
    assert listed == {
        "a": ["attributes", "attributes", "image_paths"],
        "b": ["attributes", "record", "title"],
        "c": ["attributes", "record", "title"],
        "d": ["image_paths"],
    }
    catalog.quarantine.to_parquet(tmp_path / "quarantine.parquet")  # what is listed can be written


@pytest.mark.slow
def test_a_small_file_cannot_unpack_to_gigabytes(tmp_path):
    folder = make(tmp_path / "c", [row("x")])
    title = pa.DictionaryArray.from_arrays(pa.array([0] * 7000, pa.int32()), ["x" * 999_000])
    pq.write_table(pa.table({"product_id": [str(n) for n in range(7000)], "title": title}), folder / "products.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="too large when unpacked: over .* MB from a file of"):
        Catalog.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 800_000  # kB; it took 7.2 GB


def test_files_are_not_read_again_unless_they_changed(tmp_path, monkeypatch):
    "The second load stats; a file of the same size and time that was put in its place is read."
    folder = make(
        tmp_path / "c",
        [row("a", "1.bmp"), row("b", "2.bmp", title="Cup")],
        {f"{i}.bmp": encoded(draw(i), "BMP") for i in (1, 2)},
    )
    monkeypatch.setattr(images_module, "_SETTLED", -60)  # these files are moments old
    first, read = Catalog.load(folder), []
    whole = FileSpan.read
    monkeypatch.setattr(FileSpan, "read", lambda place: read.append(place.path) or whole(place))
    assert Catalog.load(folder).data_hash == first.data_hash and not read
    times = (folder / "1.bmp").stat()
    (folder / "1.bmp").write_bytes(encoded(draw(9), "BMP"))
    os.utime(folder / "1.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    again = Catalog.load(folder)
    assert [Path(path).name for path in read] == ["1.bmp", "1.bmp"] and again[0].image().tobytes() == draw(9).tobytes()


def test_a_picture_with_the_pixels_of_an_earlier_one_is_listed_once(tmp_path):
    photo = draw(3, (240, 180))
    files = {
        "1.png": encoded(photo),
        "2.bmp": encoded(photo, "BMP"),
        "3.jpg": encoded(photo.resize((120, 90)), "JPEG", quality=90),
        "4.png": encoded(draw(8, (240, 180))),
    }
    catalog = Catalog.load(
        make(tmp_path / "c", [row("a", "1.png", "2.bmp", "3.jpg", "4.png"), row("b", "1.png", title="Other")], files)
    )
    assert (
        catalog[0].image_paths == ["1.png", "3.jpg", "4.png"]
        and catalog[1].image_paths == ["1.png"]
        and len(catalog.quarantine) == 1
    )
    assert reasons(catalog)["a", "2.bmp"] == "same picture: its pixels are those of 1.png"
    assert catalog.summary()["scaled_copies"] == 1
