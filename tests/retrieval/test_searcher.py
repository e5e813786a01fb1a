"""The two searchers, in memory and in Milvus: the same queries and filters, the hits of exact arithmetic,
the same refusals, the same command."""

import json
import random

import numpy as np
import pytest

from choosing import few, slow
from moon2_lab.cli.main import main
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.products import Product
from moon2_lab.errors import UsageError
from moon2_lab.evaluation.ranking import normalised
from moon2_lab.retrieval.embed import embed_catalog
from moon2_lab.retrieval.filters import field_values, parse_filter
from moon2_lab.retrieval.milvus import index_vectors
from moon2_lab.retrieval.query_input import query_item
from moon2_lab.retrieval.search import MemorySearcher, MilvusSearcher, Searcher, open_searcher
from moon2_lab.retrieval.vectors import StoredForm, VectorBlock
from small import shop, tiny

COLOURS, KINDS = ("red", "Navy Blue", "O'Neill", 'a "b"', "日本"), ("Bowl", "Lamp", "Tray")


def goods(count, seed=0):
    "Products with categories and attributes, some of them lacking."
    chance = random.Random(seed)
    products = []
    for number in range(count):
        attributes = {"colour": "|".join(chance.sample(COLOURS, chance.randrange(1, 3)))} if number % 5 else {}
        attributes |= {"Neck Type": chance.choice(KINDS)} if number % 3 else {}
        level = {"category_l1": "Home" if number % 4 else None, "category_l2": chance.choice(KINDS)}
        products.append(
            Product(f"p{number}", f"title {number}", attributes=attributes, image_paths=[f"{number}.jpg"], **level)
        )
    return products


def some_filter(chance):
    "A filter of one to three comparisons; sometimes none."

    def comparison():
        field, values = chance.choice(
            (("colour", COLOURS), ("'neck TYPE'", KINDS), ("category_l1", ("home",)), ("category_l2", KINDS))
        )
        if chance.random() < 0.5:
            return f"{field} {chance.choice(('==', '!='))} {chance.choice(values)!r}"
        return (
            f"{field} {chance.choice(('in', 'not in'))} {tuple(chance.sample(values, min(2, len(values))))!r}".replace(
                ",)", ", )"
            )
        )

    joined = chance.choice((" and ", " or ")).join(comparison() for _ in range(chance.randrange(0, 4)))
    return f"not ({joined})" if joined and chance.random() < 0.2 else joined


@pytest.fixture(scope="module", params=few(["float32", "int8"], "float32"))
def both(request, tmp_path_factory):
    "400 products as stored: (products, vectors as a reader gets them, searcher in memory, searcher in Milvus)."
    folder, form = tmp_path_factory.mktemp("both"), StoredForm(request.param, 32)
    products, vectors = goods(400), normalised(np.random.default_rng(0).normal(size=(400, 32)))
    path = VectorBlock.of(products, "mm", vectors).write(
        folder / "v.parquet", request.param, {"model_fingerprint": "aaaabbbbcccc"}
    )
    index_vectors(path, folder / "v.db")
    with open_searcher(vectors=path) as memory, open_searcher(uri=folder / "v.db") as milvus:
        assert isinstance(memory, MemorySearcher) and isinstance(milvus, MilvusSearcher)
        assert all(
            isinstance(searcher, Searcher) and len(searcher) == 400 and searcher.view == "mm"
            for searcher in (memory, milvus)
        )
        yield products, form(vectors), memory, milvus


def test_two_hundred_queries_with_filters(both):
    """Ids, order and payload of both searchers are those of float64 products, a Python test of each product,
    and a sort; scores to 1e-6."""
    products, vectors, *searchers = both
    chance, queries = random.Random(1), normalised(np.random.default_rng(1).normal(size=(200, 32)))
    fields = {"product_id", "category_l1", "category_l2", "colour", "neck type"}
    values = [{name: some for name, some in field_values(product).items()} for product in products]
    assert all(searcher.fields == fields for searcher in searchers)
    lengths, scores = set(), queries.astype(np.float64) @ vectors.astype(np.float64).T
    for query, row in zip(queries, scores, strict=True):
        expression, k = some_filter(chance), chance.choice((1, 5, 50, 400))
        fitting = np.flatnonzero([parse_filter(expression, fields)(some) for some in values])
        best = fitting[np.argsort(-row[fitting], kind="stable")][:k]
        lengths.add(len(best))
        for searcher in searchers:
            (hits,) = searcher.search(query, k, expression)
            assert [hit.product_id for hit in hits] == [f"p{place}" for place in best], (type(searcher), expression)
            assert np.allclose([hit.score for hit in hits], row[best], atol=1e-6)
            for hit, place in zip(hits[:3], best):
                product = products[place]
                wanted = (
                    product.title,
                    product.category_l1,
                    product.category_l2,
                    product.category_l3,
                    product.attributes,
                    product.image_paths[0],
                )
                assert (
                    hit.title,
                    hit.category_l1,
                    hit.category_l2,
                    hit.category_l3,
                    hit.attributes,
                    hit.image,
                ) == wanted
    assert len(lengths) > 10 and {0, 400} & lengths


def test_both_refuse_the_same(both):
    """A misspelt field, a filter that cannot be read, a wrong k, a short vector, an item without a model,
    another model: one message."""
    *_, memory, milvus = both
    query = normalised(np.ones((1, 32)))[0]
    for act in (
        lambda searcher: searcher.search(query, filter="colur == 'red'"),
        lambda searcher: searcher.search(query, filter="colour ="),
        lambda searcher: searcher.search(query, filter="colour == open('x')"),
        lambda searcher: searcher.search(query, 0),
        lambda searcher: searcher.search(query, 20_000),
        lambda searcher: searcher.search(query[:8]),
        lambda searcher: searcher.search(query_item("lamp", None)),
    ):
        said = []
        for searcher in (memory, milvus):
            with pytest.raises(UsageError) as error:
                act(searcher)
            said.append(str(error.value))
        assert said[0] == said[1] and " -> " in said[0]
    for searcher in (memory, milvus):
        with pytest.raises(UsageError, match="by another model"):
            searcher.bind(tiny())


def test_items_are_encoded_by_the_model_of_the_vectors(tmp_path):
    """Words, a picture and both ask as their vectors do, in a file of shorter vectors, a store, and among products that
    are embedded on the spot."""
    encoder, catalog = tiny(), shop(40)
    path = embed_catalog(encoder, catalog, tmp_path / "v.parquet", view="all", dim=16).path
    index_vectors(path, tmp_path / "v.db")
    items = [query_item("green ring", None), catalog[3].item("i"), catalog[7].item()]
    vectors = encoder.encode(items)
    for view in ("t", "i", "mm"):
        whole = encoder.encode(catalog.products, view)
        short = normalised(whole[:, :16]) @ normalised(vectors[:, :16]).T
        with open_searcher(path, view=view) as memory, open_searcher(uri=tmp_path / "v.db", view=view) as milvus:
            for searcher in (memory.bind(encoder), milvus.bind(encoder)):
                for queries in (items, vectors, normalised(vectors[:, :16])):
                    for hits, scores in zip(searcher.search(queries, 5), short.T, strict=True):
                        found = [int(hit.product_id[1:]) for hit in hits]
                        assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=1e-5), queries
                        assert np.allclose(scores[found], [hit.score for hit in hits], atol=1e-5)
                one, same = searcher.search(items[0], 5)[0], searcher.search(items[:1], 5)[0]
                assert [hit.product_id for hit in one] == [hit.product_id for hit in same]
        fresh = MemorySearcher.from_products(encoder, catalog.products, view)
        best = np.sort(whole @ vectors.T, axis=0)[::-1][0]
        assert np.allclose([hits[0].score for hits in fresh.search(items, 1)], best, atol=1e-5)


@pytest.mark.parametrize(
    "expression",
    [slow(""), slow("category_l1 == 'Fashion'"), "category_l1 != 'Fashion' and not colour in ('black', 'white')"],
)
def test_the_command_gives_the_same_from_a_file_and_from_a_store(moon2, drawn_catalogue, tmp_path, expression):
    """`moon2 search --vectors` and `--uri`: the same ids and titles, the scores to 1e-5;
    one of the two has to be named, and not both."""
    tiny().save_pretrained(tmp_path / "model")
    assert (
        main(
            [
                "embed",
                str(tmp_path / "model"),
                "--catalog",
                str(drawn_catalogue),
                "--out",
                str(tmp_path / "v.parquet"),
                "--view",
                "all",
            ]
        )
        == 0
    )
    assert main(["index", str(tmp_path / "v.parquet"), "--uri", str(tmp_path / "v.db")]) == 0
    hits = []
    for place in (["--vectors", tmp_path / "v.parquet"], ["--uri", tmp_path / "v.db"]):
        code, out, err = moon2(
            "search",
            tmp_path / "model",
            *place,
            "--text",
            "red summer dress",
            "--filter",
            expression,
            "--k",
            7,
            "--json",
        )
        assert code == 0, err
        hits.append(json.loads(out)["hits"])
    assert [(hit["product_id"], hit["title"]) for hit in hits[0]] == [
        (hit["product_id"], hit["title"]) for hit in hits[1]
    ] and hits[0]
    assert np.allclose(*([hit["score"] for hit in some] for some in hits), atol=1e-5)
    assert moon2("search", tmp_path / "model", "--text", "x")[0] == 2
    assert (
        moon2(
            "search", tmp_path / "model", "--text", "x", "--vectors", tmp_path / "v.parquet", "--uri", tmp_path / "v.db"
        )[0]
        == 2
    )
    code, out, err = moon2("search", tmp_path / "model", "--text", "x", "--vectors", tmp_path / "none.parquet")
    assert code == 2 and "moon2 embed" in err and out == ""


def test_compare_takes_the_same_file(moon2, drawn_catalogue, tmp_path):
    """`moon2 compare --vectors` with the files of both models: the numbers of a comparison that encodes all;
    a file of one view is refused."""
    for seed in (0, 1):
        tiny(seed=seed).save_pretrained(tmp_path / f"m{seed}")
        embed_catalog(tiny(seed=seed), Catalog.load(drawn_catalogue), tmp_path / f"v{seed}.parquet", view="all")
    words = [
        "compare",
        tmp_path / "m0",
        tmp_path / "m1",
        "--catalog",
        drawn_catalogue,
        "--split",
        "all",
        "--limit",
        20,
        "--explain",
        0,
        "--json",
    ]
    code, plain, err = moon2(*words, "--out", tmp_path / "a.html")
    assert code == 0, err
    code, stored, err = moon2(
        *words, "--out", tmp_path / "b.html", "--vectors", tmp_path / "v1.parquet", "--vectors", tmp_path / "v0.parquet"
    )
    assert code == 0, err
    same = ("n", "won", "lost", "moved", "same")
    assert [json.loads(plain)[name] for name in same] == [json.loads(stored)[name] for name in same]
    embed_catalog(tiny(), Catalog.load(drawn_catalogue), tmp_path / "mm.parquet")
    code, out, err = moon2(*words, "--out", tmp_path / "c.html", "--vectors", tmp_path / "mm.parquet")
    assert code == 2 and "--view all" in err


def test_the_demo_takes_the_same_file_and_the_same_store(drawn_catalogue, tmp_path):
    """`moon2 demo --vectors` and `--uri` search what `moon2 search` searches, and show the split that was embedded.

    A file of another model is refused."""
    from moon2_lab.app.interface import prepare

    catalog = Catalog.load(drawn_catalogue)
    for seed in (0, 1):
        tiny(seed=seed).save_pretrained(tmp_path / f"m{seed}")
    path = embed_catalog(tiny(), catalog, tmp_path / "v.parquet", split="train", view="all").path
    index_vectors(path, tmp_path / "v.db")
    with open_searcher(path) as searcher:
        wanted = [hit.product_id for hit in searcher.bind(tiny()).search(query_item("red dress", None), 10)[0]]
    for source in ({"vectors": [path]}, {"uris": [tmp_path / "v.db"]}):
        shop_page = prepare(tmp_path / "m0", None, drawn_catalogue, **source).service
        assert {product.split for product in shop_page.catalog} == {"train"} and shop_page.views == ["t", "i", "mm"]
        hits = shop_page.search("red dress", None, "mm", 10)["hits"]
        assert [hit["product_id"] for hit in hits] == wanted
        with pytest.raises(UsageError, match="by another model"):
            prepare(tmp_path / "m1", None, drawn_catalogue, **source)


@pytest.mark.slow
def test_the_demo_keeps_to_the_split_that_is_shown(drawn_catalogue, tmp_path):
    "A file or store of all products, and a page of one split: the k best hits of that split, also with a filter."
    from moon2_lab.app.interface import prepare

    catalog = Catalog.load(drawn_catalogue)
    tiny().save_pretrained(tmp_path / "m")
    path = embed_catalog(tiny(), catalog, tmp_path / "v.parquet").path
    index_vectors(path, tmp_path / "v.db")
    valid = {product.product_id for product in catalog.split("valid")}
    with open_searcher(path) as searcher:
        every = searcher.bind(tiny()).search(query_item("red dress", None), len(catalog))[0]
    wanted = [hit.product_id for hit in every if hit.product_id in valid]
    assert len(wanted) > 4 and len(set(wanted[:4]) - {hit.product_id for hit in every[:4]}) > 1
    first = catalog.get(wanted[0]).category_l1
    of_category = [name for name in wanted if catalog.get(name).category_l1 == first]
    for source in ({"vectors": [path]}, {"uris": [tmp_path / "v.db"]}):
        service = prepare(tmp_path / "m", None, drawn_catalogue, "valid", **source).service
        for k in (1, 4, 100):
            assert [hit["product_id"] for hit in service.search("red dress", None, "mm", k)["hits"]] == wanted[:k]
        filtered = service.search("red dress", None, "mm", 100, f"category_l1 == {first!r}")["hits"]
        assert [hit["product_id"] for hit in filtered] == of_category
