"""Embed, index, search: the three commands on a drawn catalogue, a run that is killed, a store behind a server,
and what goes wrong."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from choosing import few
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.demo_load import free_port
from moon2_lab.cli.main import main
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.products import Product
from moon2_lab.errors import DataError, LabError
from moon2_lab.evaluation.evaluate import evaluate, run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.reporting.comparison import direction_queries
from moon2_lab.retrieval.embed import embed_catalog, pieces_folder
from moon2_lab.retrieval.filters import field_values, parse_filter
from moon2_lab.retrieval.milvus import index_vectors
from moon2_lab.retrieval.milvus_client import close_store, open_store
from moon2_lab.retrieval.search import MilvusSearcher
from moon2_lab.retrieval.vectors import StoredForm, VectorBlock, VectorFile
from small import shop, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A folder with a tiny encoder."
    folder = tmp_path_factory.mktemp("models") / "model"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stored(model, drawn_catalogue, tmp_path_factory):
    "The catalogue embedded and indexed: (vectors, store)."
    folder = tmp_path_factory.mktemp("stores")
    assert main(["embed", str(model), "--catalog", str(drawn_catalogue), "--out", str(folder / "v.parquet")]) == 0
    assert main(["index", str(folder / "v.parquet"), "--uri", str(folder / "v.db")]) == 0
    return folder / "v.parquet", folder / "v.db"


# ---------------------------------------------------------------------------------------------- the three commands


def test_search_finds_what_a_matrix_product_finds(moon2, model, stored, drawn_catalogue):
    "Ids, scores and titles of `moon2 search --json` are those of exact search over the encoder's own vectors."
    catalog = Catalog.load(drawn_catalogue)
    encoder = tiny()
    vectors, query = encoder.encode(catalog.products), "red summer dress"
    code, out, err = moon2("search", model, "--uri", stored[1], "--text", query, "--k", 5, "--json")
    assert code == 0, err
    hits = json.loads(out)["hits"]
    assert list(hits[0]) == ["product_id", "score", "title"] and len(hits) == 5
    from moon2_lab.retrieval.query_input import query_item

    scores = vectors @ encoder.encode([query_item(query, None)])[0]
    order = np.argsort(-scores, kind="stable")[:5]
    assert [hit["product_id"] for hit in hits] == [catalog[int(place)].product_id for place in order]
    assert np.allclose([hit["score"] for hit in hits], scores[order], atol=1e-5)
    assert [hit["title"] for hit in hits] == [catalog[int(place)].title for place in order]


def test_picture_and_filter(moon2, model, stored, drawn_catalogue):
    "A product's own picture and title find it; a filter keeps what fits, and one that nothing fits is no error."
    catalog = Catalog.load(drawn_catalogue)
    wanted = next(product for product in catalog if product.has_image and product.has_text)
    picture = drawn_catalogue / wanted.image_paths[0]
    code, out, _ = moon2(
        "search", model, "--uri", stored[1], "--text", wanted.title, "--image", picture, "--k", 1, "--json"
    )
    assert code == 0 and json.loads(out)["hits"][0]["product_id"] == wanted.product_id
    other = next(product.category_l1 for product in catalog if product.category_l1 != wanted.category_l1)
    code, out, _ = moon2(
        "search",
        model,
        "--uri",
        stored[1],
        "--image",
        picture,
        "--filter",
        f"category_l1 == '{other.upper()}'",
        "--json",
    )
    assert code == 0 and {catalog.get(hit["product_id"]).category_l1 for hit in json.loads(out)["hits"]} == {other}
    code, out, _ = moon2(
        "search", model, "--uri", stored[1], "--image", picture, "--filter", "product_id == 'nobody'", "--json"
    )
    assert code == 0 and json.loads(out) == {"hits": []}


def test_the_file_says_what_it_is(stored, drawn_catalogue, model):
    "Columns, type and metadata of interface.md, section 3."
    import pyarrow as pa

    file = VectorFile(stored[0])
    schema = file.file.schema_arrow
    assert schema.names == [
        "product_id",
        "view",
        "vector",
        "title",
        "category_l1",
        "category_l2",
        "category_l3",
        "attributes",
        "image",
    ]
    assert schema.field("vector").type == pa.list_(pa.float32(), tiny().embedding_dim)
    assert file.about["model_fingerprint"] == tiny().fingerprint and file.about["catalog"] == str(drawn_catalogue)
    assert np.allclose(np.linalg.norm(file.read().vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["search", "MODEL", "--uri", "STORE"], 2, "nothing to search for"),
        (
            ["search", "MODEL", "--uri", "STORE", "--text", "x", "--filter", "colr == 'red'"],
            2,
            "no product has a field 'colr'",
        ),
        (["search", "MODEL", "--uri", "STORE", "--text", "x", "--filter", "colour ="], 2, "the filter cannot be read"),
        (["search", "MODEL", "--uri", "STORE", "--text", "x", "--k", "0"], 2, "k=0"),
        (["search", "MODEL", "--uri", "STORE", "--text", "x", "--view", "t"], 2, "no vectors of the view t"),
        (["search", "MODEL", "--uri", "nowhere.db", "--text", "x"], 2, "no such store"),
        (["search", "MODEL", "--uri", "http://127.0.0.1:9", "--text", "x"], 2, "the store cannot be opened"),
        (["search", "MODEL", "--uri", "STORE", "--image", "settings.ini"], 2, "the picture cannot be used"),
        (["search", "OTHER", "--uri", "STORE", "--text", "x"], 2, "the store was filled by another model"),
        (["embed", "MODEL", "--catalog", "CATALOG", "--out", "x.parquet", "--dim", "5000"], 2, "dim=5000"),
        (["embed", "MODEL", "--catalog", "CATALOG", "--out", "x.parquet", "--split", "none"], 2, "none"),
        (["embed", "MODEL", "--catalog", "nowhere", "--out", "x.parquet"], 2, "nowhere"),
        (["index", "settings.ini", "--uri", "x.db"], 2, "not a parquet file"),
        (["index", "PRODUCTS", "--uri", "x.db"], 2, "no column"),
    ],
)
def test_what_goes_wrong_is_one_line(moon2, model, stored, drawn_catalogue, tmp_path, words, code, said):
    "Each with exit code 2 and what to do."
    other = tmp_path / "other"
    if "OTHER" in words:
        tiny(seed=1).save_pretrained(other)
    there = {
        "MODEL": model,
        "STORE": stored[1],
        "CATALOG": drawn_catalogue,
        "OTHER": other,
        "PRODUCTS": drawn_catalogue / "products.parquet",
        "settings.ini": ROOT / "settings.ini",
        "x.db": tmp_path / "x.db",
        "x.parquet": tmp_path / "x.parquet",
        "nowhere": tmp_path / "nowhere",
        "nowhere.db": tmp_path / "nowhere.db",
    }
    got, out, err = moon2(*(there.get(word, word) for word in words))
    lines = [line for line in err.splitlines() if line.startswith("moon2: ")]
    assert (
        got == code
        and out == ""
        and len(lines) == 1
        and said in lines[0]
        and " -> " in lines[0]
        and "Traceback" not in err
    ), err


# ---------------------------------------------------------------------------------------------- killed and gone on with


@pytest.mark.slow
def test_a_killed_run_goes_on(model, drawn_catalogue, tmp_path):
    """kill -9 between two pieces, at a random one; then --resume gives the file of a run that was never stopped,
    byte for byte."""
    words = (
        [sys.executable, "-m", "moon2_lab.cli.main"]
        if (ROOT / "moon2_lab" / "__main__.py").exists()
        else [sys.executable, "-c", "import sys; from moon2_lab.cli.main import main; sys.exit(main())"]
    )
    options = ["embed", str(model), "--catalog", str(drawn_catalogue), "--piece", "8"]
    whole, out = tmp_path / "whole.parquet", tmp_path / "killed.parquet"
    assert main([*options, "--out", str(whole)]) == 0
    pieces = -(-len(Catalog.load(drawn_catalogue)) // 8)
    process = subprocess.Popen(
        [*words, *options, "--out", str(out)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    enough, until = random.Random(os.getpid()).randrange(1, pieces), time.monotonic() + 60
    while (
        len(list(pieces_folder(out).glob("*.parquet"))) < enough and process.poll() is None and time.monotonic() < until
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if out.exists():
        pytest.skip("the run was over before it could be killed")
    left = len(list(pieces_folder(out).glob("*.parquet")))
    assert left >= enough
    assert main([*options, "--out", str(out)]) == 2  # not without --resume
    assert main([*options, "--out", str(out), "--resume"]) == 0
    assert out.read_bytes() == whole.read_bytes() and not pieces_folder(out).exists()
    ids = VectorFile(out).read().ids
    assert len(ids) == len(set(ids)) == len(Catalog.load(drawn_catalogue))


def test_quarantined_products_are_not_embedded(tmp_path):
    "A catalogue with a broken picture and an empty record: what is set aside is not in the file, everything else is."
    from moon2_lab.data.synthetic.generator import make_catalog

    folder = make_catalog(tmp_path / "shop", 20, seed=3, image_size=64)
    table = pd.read_parquet(folder / "products.parquet")
    broken = json.loads(table.image_paths[2])
    for path in broken:
        (folder / path).write_bytes(b"not a picture")
    table.loc[2, "title"] = None
    table.to_parquet(folder / "products.parquet", index=False)
    catalog = Catalog.load(folder)
    assert table.product_id[2] not in catalog
    done = embed_catalog(tiny(), catalog, tmp_path / "v.parquet")
    assert set(VectorFile(done.path).read().ids) == set(table.product_id) - {table.product_id[2]}


# ---------------------------------------------------------------------------------------------- smaller vectors


def test_smaller_forms_are_scored_by_the_protocol():
    """float32 in full length changes nothing, one sign a number loses something;
    baselines and labels are of whole vectors, and left out."""
    encoder, catalog = tiny(), shop(60)
    whole = evaluate(encoder, catalog, split="all", resamples=0)
    same = evaluate(encoder, catalog, split="all", resamples=0, stored=StoredForm())
    assert (
        whole["directions"] == same["directions"]
        and same["protocol"]["stored"] == "float32"
        and "stored" not in whole["protocol"]
    )
    small = evaluate(encoder, catalog, split="all", resamples=0, stored=StoredForm("binary", 8))
    assert small["directions"]["mm->mm"]["R@1"]["value"] < whole["directions"]["mm->mm"]["R@1"]["value"]
    assert "classification" in whole and not {"classification", "trivial"} & set(small)


@pytest.mark.parametrize("dtype,dim", [("binary", None), ("int8", 16)])
@pytest.mark.parametrize("direction", few(["mm->mm", "t->i"], "t->i"))
def test_scores_of_a_smaller_form_are_those_of_a_search(tmp_path, dtype, dim, direction):
    """The protocol finds what a store of such vectors finds for whole queries,
    in directions between the views of the same products, too."""
    encoder, catalog, view = tiny(), shop(60), direction.split("->")[1]
    question = make_benchmark(catalog, "all")
    found, items = (
        run_benchmark(encoder, question, resamples=0, stored=StoredForm(dtype, dim)).per_query,
        direction_queries(question),
    )
    index_vectors(
        embed_catalog(encoder, catalog, tmp_path / "v.parquet", view=view, dtype=dtype, dim=dim).path, tmp_path / "v.db"
    )
    rows = found[found.direction == direction].to_dict("records")
    asked = [items[direction, row["query_id"]] for row in rows]
    with MilvusSearcher(tmp_path / "v.db", view) as store:
        stored = store.search(encoder.encode(asked, direction.split("->")[0]), 5)
    for row, hits in zip(rows, stored, strict=True):
        assert len(hits) == 5 and np.allclose([hit.score for hit in hits], row["top_scores"][:5], atol=1e-5)


def test_cutting_without_training_for_it_warns(moon2, model, drawn_catalogue, tmp_path):
    "On stderr; the share of neighbours that are kept is told too, and a full-length file says nothing of the kind."
    code, out, err = moon2(
        "embed",
        model,
        "--catalog",
        drawn_catalogue,
        "--out",
        tmp_path / "v.parquet",
        "--dim",
        16,
        "--dtype",
        "int8",
        "--json",
    )
    facts = json.loads(out)
    assert code == 0 and "trained without matryoshka_dims" in err and 0 < facts["neighbours_kept"] < 1
    code, out, err = moon2("embed", model, "--catalog", drawn_catalogue, "--out", tmp_path / "w.parquet", "--json")
    assert code == 0 and "matryoshka" not in err and json.loads(out)["neighbours_kept"] is None


# ---------------------------------------------------------------------------------------------- stores


def test_the_same_through_a_server(stored, tmp_path):
    "The address of a server in place of a file: Milvus Lite's own server, a process of its own, gives the same hits."
    port, log = free_port(), tmp_path / "server.log"
    code = "from milvus_lite.adapter.grpc.server import start_server_in_thread\nimport time\n"
    where = f"data_dir={str(tmp_path / 'served')!r}, host='127.0.0.1', port={port}"
    code += f"kept = start_server_in_thread({where})\ntime.sleep(600)"
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=subprocess.STDOUT)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        address = f"http://127.0.0.1:{port}"
        (done,) = index_vectors(stored[0], address)
        rows = VectorFile(stored[0]).read().vectors
        with MilvusSearcher(address) as there, MilvusSearcher(stored[1]) as here:
            assert len(there) == done.total == len(here)
            one, other = there.search(rows[:10], 5), here.search(rows[:10], 5)
        assert [[hit.product_id for hit in hits] for hits in one] == [
            [hit.product_id for hit in hits] for hits in other
        ]
    finally:
        server.kill()
        server.wait()


def test_a_locked_store_says_so(stored, moon2, model):
    "While another process has it open."
    code = "from moon2_lab.retrieval.milvus_client import open_store\n"
    code += f"client = open_store({str(stored[1])!r})\nprint('open', flush=True)\ninput()"
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert holder.stdout.readline() == b"open\n"
        code, out, err = moon2("search", model, "--uri", stored[1], "--text", "x")
        assert code == 2 and out == "" and "another process holds this store" in err and "Traceback" not in err
    finally:
        holder.communicate(b"\n")
    assert moon2("search", model, "--uri", stored[1], "--text", "x")[0] == 0


@pytest.mark.slow
def test_exact_search_up_to_the_limit(tmp_path):
    "Just below 20,000 vectors: the ids of matrix product and sort, for 200 queries."
    from moon2_lab.evaluation.ranking import normalised

    rng, count = np.random.default_rng(0), 19_999
    rows = normalised(rng.normal(size=(count, 32)))
    ids = [f"p{place}" for place in range(count)]
    VectorBlock.of([Product(name) for name in ids], "mm", rows).write(tmp_path / "v.parquet")
    (done,) = index_vectors(tmp_path / "v.parquet", tmp_path / "v.db")
    assert done.index == "FLAT" and done.total == count
    queries = normalised(rng.normal(size=(200, 32)))
    with MilvusSearcher(tmp_path / "v.db") as store:
        found = store.search(queries, 10)
    assert [[hit.product_id for hit in hits] for hits in found] == [
        [ids[place] for place in row] for row in np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :10]
    ]


VALUES = ("red", "Navy Blue", "O'Neill", 'a "b"', "back\\slash", "日本", "50% [x]", "a=b", "red  x")


@pytest.fixture(scope="module")
def odd_store(tmp_path_factory):
    "Products with odd field names and values, indexed."
    import dataclasses

    folder = tmp_path_factory.mktemp("odd")

    def odd(place, product):
        attributes = {"colour": VALUES[place % 9], "Neck Type": "|".join(VALUES[place % 3 : place % 3 + 2])}
        return dataclasses.replace(product, category_l1=VALUES[place % 4], attributes=attributes if place % 5 else {})

    products = [odd(place, product) for place, product in enumerate(shop(45).products)]
    catalog = Catalog.from_products(products)
    embed_catalog(tiny(), catalog, folder / "v.parquet")
    index_vectors(folder / "v.parquet", folder / "v.db")
    with MilvusSearcher(folder / "v.db") as store:
        yield catalog, store


COMPARISONS = st.one_of(
    st.tuples(
        st.sampled_from(("category_l1", "colour", "'neck TYPE'")),
        st.sampled_from(("==", "!=")),
        st.sampled_from(VALUES).map(repr),
    ).map(" ".join),
    st.tuples(
        st.sampled_from(("category_l1", "colour", "'neck TYPE'")),
        st.sampled_from(("in", "not in")),
        st.lists(st.sampled_from(VALUES), min_size=1, max_size=3).map(repr),
    ).map(" ".join),
)
FILTERS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from((" and ", " or ")), inner).map(lambda parts: f"({''.join(parts)})"),
        inner.map("not ({})".format),
    ),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expression=FILTERS)
def test_a_filter_means_the_same_everywhere(odd_store, expression):
    "The store keeps exactly the products that the test in Python keeps."
    catalog, store = odd_store
    values = [field_values(product) for product in catalog]
    fits = parse_filter(expression, {"category_l1", "colour", "neck type"})
    wanted = {product.product_id for product, one in zip(catalog, values, strict=True) if fits(one)}
    found = store.search(np.eye(1, store.about["dim"], dtype=np.float32), 1000, expression)[0]
    assert {hit.product_id for hit in found} == wanted, expression


def test_indexing_leaves_nothing_behind(stored):
    "No trial collections; the folder holds what belongs there."
    client = open_store(stored[1])
    assert sorted(client.list_collections()) == ["moon2_about", "moon2_mm"]
    close_store(client, stored[1])


def test_the_index_goes_by_the_rows_of_its_view(tmp_path, monkeypatch):
    """A file of three views with 40 products each, and exact search below 50: each view is searched exactly,
    though the file has 120 rows."""
    monkeypatch.setattr("moon2_lab.retrieval.milvus.EXACT_BELOW", 50)
    rows = np.random.default_rng(0).normal(size=(120, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    views = np.array(["t", "i", "mm"] * 40)
    pd.DataFrame(
        {"product_id": [f"p{place // 3}" for place in range(120)], "view": views, "vector": list(rows)}
    ).to_parquet(tmp_path / "v.parquet")
    assert {
        (one.collection, one.index, one.rows, one.total)
        for one in index_vectors(tmp_path / "v.parquet", tmp_path / "v.db")
    } == {(f"moon2_{view}", "FLAT", 40, 40) for view in ("t", "i", "mm")}


def test_exact_search_that_was_outgrown_says_so(stored, tmp_path, monkeypatch):
    """An index that is there stays; when it looks at too many vectors for each query,
    the next run tells what would choose another."""
    first = index_vectors(stored[0], tmp_path / "v.db")
    assert {one.index for one in first} == {"FLAT"} and not any("--replace" in one.reason for one in first)
    monkeypatch.setattr("moon2_lab.retrieval.milvus.EXACT_BELOW", 10)
    assert all(one.index == "FLAT" and "--replace" in one.reason for one in index_vectors(stored[0], tmp_path / "v.db"))
    assert {one.index for one in index_vectors(stored[0], tmp_path / "v.db", replace=True)} == {"HNSW"}


def test_a_wrong_row_is_told_before_the_store_is_touched(tmp_path):
    "The last row of 1,500 is not of length one: nothing is stored, not even the good rows before it."
    rows = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (1500, 1))
    rows[-1] = [3, 4]
    pd.DataFrame({"product_id": [f"p{place}" for place in range(1500)], "view": "mm", "vector": list(rows)}).to_parquet(
        tmp_path / "v.parquet"
    )
    with pytest.raises(DataError, match="p1499"):
        index_vectors(tmp_path / "v.parquet", tmp_path / "v.db")
    assert not (tmp_path / "v.db").exists()


# ------------------------------------------------------------ many vectors, damaged stores


def vectors_file(path, products, rows):
    "A file of vectors of one view."
    return VectorBlock.of(products, "mm", rows).write(path, about={"model_fingerprint": "aaaabbbbcccc"})


def clustered(count, dim, seed=0):
    "(count, dim) l2-normalised vectors around a centre for every 50 of them."
    chance = np.random.default_rng(seed)
    centres = chance.normal(size=(max(8, count // 50), dim))
    rows = (centres[chance.integers(len(centres), size=count)] + 1.5 * chance.normal(size=(count, dim))).astype(
        np.float32
    )
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.slow
def test_filtered_search_is_exact_enough_at_every_selectivity(tmp_path):
    """In a store with a graph: recall@10 of at least .99 against a matrix product, and min(k, matches) hits,
    whatever share of the products the filter keeps."""
    rows = clustered(21_050, 32)
    rows, queries, drawn = rows[:21_000], rows[21_000:], np.random.default_rng(1).random(21_000)
    shares = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.24, 0.25, 0.5, 0.9, 1)
    goods = [
        Product(f"p{number}", attributes={"shares": "|".join(str(share) for share in shares if chance < share)})
        for number, chance in enumerate(drawn)
    ]
    (done,) = index_vectors(vectors_file(tmp_path / "v.parquet", goods, rows), tmp_path / "v.db")
    assert done.index == "HNSW"
    scores = queries @ rows.T
    with MilvusSearcher(tmp_path / "v.db") as store:
        for share in (*shares, None):
            fitting = np.flatnonzero(drawn < (share or 1))
            hits = store.search(queries, 10, "" if share is None else f"shares == {share}")
            assert {len(found) for found in hits} == {min(10, len(fitting))}, share
            exact = fitting[np.argsort(-scores[:, fitting], axis=1)[:, :10]]
            recall = np.mean(
                [
                    len({int(hit.product_id[1:]) for hit in found} & set(one.tolist())) / len(one)
                    for found, one in zip(hits, exact)
                ]
            )
            assert recall >= 0.99, (share, recall)
        few = store.search(queries[:3], 500, "shares == 0.001")
        assert {len(found) for found in few} == {int((drawn < 0.001).sum())}


@pytest.mark.parametrize("exact_below", few([100, 20_000], 100), ids=["graph", "exact"])
def test_a_damaged_store_is_one_line(tmp_path, monkeypatch, exact_below):
    "Bits turned, files cut, emptied or gone: the store is searched, or refused with where and what to do; nothing raw."
    monkeypatch.setattr("moon2_lab.retrieval.milvus.EXACT_BELOW", exact_below)
    rows, chance = clustered(300, 8), random.Random(3)
    goods = [
        Product(f"p{number}", f"title {number}", attributes={"colour": ("red", "blue")[number % 2]})
        for number in range(300)
    ]
    index_vectors(vectors_file(tmp_path / "v.parquet", goods, rows), tmp_path / "whole.db")
    files = sorted(
        path.relative_to(tmp_path / "whole.db")
        for path in (tmp_path / "whole.db").rglob("*")
        if path.is_file() and path.name != "LOCK"
    )
    said = []
    for turn in range(2 * len(files)):
        shutil.copytree(tmp_path / "whole.db", store := tmp_path / f"{turn}.db")
        path = store / files[turn % len(files)]
        data = bytearray(path.read_bytes())
        if turn < len(files):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data if turn < len(files) else data[: chance.randrange(len(data))])
        try:
            with MilvusSearcher(store) as opened:
                assert len(opened.search(rows[:2], 5)) == 2 and len(opened.search(rows[:2], 5, "colour == 'red'")) == 2
        except LabError as error:
            assert error.where and error.advice and "\n" not in str(error)
            said.append(str(error))
        shutil.rmtree(store)
    assert len(said) >= len(files) // 2


def test_a_terminal_gets_nothing_that_it_obeys(moon2, tmp_path):
    "An id with control sequences is shown in an error, and not sent; in JSON it stays the same value."
    hostile = "p\x1b[2J\x9b31m\u202e"
    table = pd.DataFrame({"product_id": [hostile], "view": ["t"], "vector": [[1.0, 0.0]], "attributes": ["no JSON"]})
    table.to_parquet(tmp_path / "v.parquet")
    code, out, err = moon2("index", tmp_path / "v.parquet", "--uri", tmp_path / "v.db")
    assert code == 2 and "p\\u001b[2J\\u009b31m\\u202e" in err and not set("\x1b\x9b\u202e") & set(out + err)
    (folder := tmp_path / "shop").mkdir()
    pd.DataFrame({"product_id": ["ok", hostile], "title": ["red bag", None]}).to_parquet(folder / "products.parquet")
    code, out, err = moon2("data", "check", folder, "--json")
    assert not set("\x1b\x9b\u202e") & set(out + err) and json.loads(out)["set_aside"][0]["product_id"] in (
        hostile,
        None,
    )
    assert not set("\x1b\x9b\u202e") & set("".join(moon2("data", "check", folder)[1:]))
