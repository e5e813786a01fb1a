"""The retrieval demo: filters, the search behind it, the endpoint, the page in a real browser, the launcher."""
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import psutil
import pytest
from browsing import assert_cut_connections, keep_screenshot, outside, settle, until

pytest.importorskip("gradio")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bench.demo_load import free_port
from moon2_lab.app.components import thumbnail
from moon2_lab.app.interface import build_demo, prepare, run_demo, serve
from moon2_lab.app.service import SearchModel, SearchService, train_tiny
from moon2_lab.app.tabs import HitGallery
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Product
from moon2_lab.errors import LabError, UsageError
from moon2_lab.model.backbone import mini_assets
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts
from moon2_lab.retrieval.filters import field_values, parse_filter
from moon2_lab.retrieval.query_input import query_item
from moon2_lab.testing import made_up_metrics

pytestmark = pytest.mark.usefixtures("own_cache")
NASTY = Product(
    "nasty-1", "Zebra <img src=x onerror=\"document.title='hacked'\"> & Söhne 'bag'",
    category_l1="O'Neill & <b>Sons</b>", attributes={"colour": "zebra|black", "neck type": "<script>"},
)


@pytest.fixture(scope="module")
def catalog(drawn_catalogue) -> Catalog:
    "Drawn products, and one whose title means harm."
    nasty = dataclasses.replace(NASTY, refs=(ImageRef.from_pil(Image.new("RGB", (60, 90), "#884422")),), split="test")
    return Catalog.from_products([*Catalog.load(drawn_catalogue), nasty])


@pytest.fixture(scope="module")
def encoders() -> list[Moon2Encoder]:
    "Two small ones that differ."
    return [
        perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=seed), 0.05, seed=seed).eval()
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def demo(catalog, encoders):
    "The interface with two models."
    return build_demo(
        *encoders, catalog=catalog, names=("first", "second"), note="for a test", metrics=(made_up_metrics(), {})
    )


@pytest.fixture
def picture(catalog, tmp_path):
    "A photo file of a product."
    path = tmp_path / "photo.png"
    catalog[3].image(1).save(path)
    return path


# ---------------------------------------------------------------------------------------------- filters

VALUES = field_values(NASTY)
FIELDS = set(VALUES) | {"size"}


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("", True), ("   ", True), ("category_l1 == 'o\\'neill & <B>sons</B>'", True),
        ("colour == 'BLACK' and colour == 'zebra'", True), ("colour in ['red', 'blue']", False),
        ("colour not in ('red',)", True), ("'neck type' == '<script>'", True), ("not size == 38", True),
        ("size != '38'", True), ("size == 38", False),
        ("(colour == 'red' or product_id == 'nasty-1') and not (size == 'test')", True),
    ],
)
def test_filter(expression, fits):
    assert parse_filter(expression, FIELDS)(VALUES) is fits


@pytest.mark.parametrize(
    "expression",
    [
        "colour", "colour ==", "colour = 'red'", "colour == red", "colour == ('red', 'blue')", "colour in 'red'",
        "colour in ()", "1 == 1", "'red' in colour", "colour < 'red'", "'a' == 'b' == 'c'", "lambda: 1", "open('x')",
        "colour.casefold() == 'red'", "(colour == 'red') + 1", "[x for x in 'ab']", "colour == f'{1}'",
        "colour == None", "colour == b'red'", "colour == 'red'; 1",
        "(" * 500,
        "not " * 240 + "colour", "colour == 'red'\0", "x" * 2000, "-" * 900 + "1", "wrong_field == 'red'",
        "colour == 'red' #" + "\n1",
    ],
)
def test_bad_filters_are_refused_with_advice(expression):
    with pytest.raises(UsageError) as caught:
        parse_filter(expression, FIELDS)
    assert caught.value.advice and len(str(caught.value)) < 400


@given(st.text(max_size=60) | st.text(alphabet="colour ='\"()[]!,<>andotir0.", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_a_filter_or_an_error_with_advice(expression):
    try:
        assert parse_filter(expression, FIELDS)(VALUES) in (True, False)
    except UsageError as error:
        assert error.advice


# ---------------------------------------------------------------------------------------------- search


def test_search_is_the_dot_product(catalog, encoders, picture):
    "Hits are the highest dot products, best first, in every view; filters only take away."
    shop = SearchService(catalog, dict(zip("AB", encoders)))
    query = query_item("black bag", picture)
    vector, views = encoders[1].encode([query])[0], encoders[1].encode_views(catalog.products)
    for view in ("t", "i", "mm"):
        scores = np.nan_to_num(views[view] @ vector, nan=-np.inf)
        found = shop.find(query, view, 7, model="B")
        assert [hit.product.product_id for hit in found] == [
            catalog[place].product_id for place in np.argsort(-scores, kind="stable")[:7]
        ]
        assert [hit.score for hit in found] == pytest.approx(np.sort(scores)[::-1][:7], abs=1e-6)
    fashion = shop.find(query, "mm", len(catalog), "category_l1 == 'Fashion'", "B")
    everything = shop.find(query, "mm", len(catalog), "", "B")
    assert [hit for hit in everything if hit.product.category_l1 == "Fashion"] == fashion


def test_products_without_a_view(encoders):
    "A product without a picture is not found by its picture, and is shown with a note."
    catalog = Catalog.from_products(
        [Product("a", "red bag"), Product("b", None, refs=(ImageRef.from_pil(Image.new("RGB", (30, 30), "red")),))]
    )
    shop = SearchService(catalog, {"A": encoders[0]})
    assert [hit["product_id"] for hit in shop.search("bag", None, "i")["hits"]] == ["b"]
    assert shop.search("bag", None, "t") == {
        "hits": [
            {
                "product_id": "a", "score": pytest.approx(shop.search("bag", None)["hits"][0]["score"], abs=2),
                "title": "red bag",
            }
        ]
    }
    assert (
        len(shop.search("bag", None)["hits"]) == 2 and shop.categories() == [] and shop.phrases() in ([], ["red bag"])
    )
    assert thumbnail(None).getpixel((1, 1)) == (241, 242, 244)
    build_demo(encoders[0], catalog=catalog)


def test_a_picture_that_is_gone_is_no_end():
    "A gallery picture that can no longer be read is shown as missing."
    def gone():
        raise LabError("the file has changed", where="shop")

    assert thumbnail(ImageRef("gone", gone)).size == (256, 256)


def test_searches_at_the_same_time(catalog, encoders):
    "Many threads, and explanations in between, give what one thread gives."
    model = SearchModel(encoders[0], catalog)
    queries = [catalog[place].item("t") for place in range(12)]
    alone, together = [model.search(query) for query in queries], [None] * len(queries)

    def ask(place):
        if place % 4 == 0:
            model.explain(queries[place], catalog[place].item())
        together[place] = model.search(queries[place])

    threads = [threading.Thread(target=ask, args=[place]) for place in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[(hit.product.product_id, hit.score) for hit in hits] for hits in together] == [
        [(hit.product.product_id, hit.score) for hit in hits] for hits in alone
    ]


# ---------------------------------------------------------------------------------------------- the endpoint


def test_endpoint(address, demo, picture):
    "/search as the interface promises it, over HTTP."
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/search", "/heatmap", "/compare"]
    photo = client_of.handle_file(str(picture))
    answer = client.predict(text="black bag", image=photo, direction="i", k=3, filter="", model="B", api_name="/search")
    assert answer == demo.service.search("black bag", str(picture), "i", 3, "", "B")
    assert [set(hit) for hit in answer["hits"]] == [{"product_id", "score", "title"}] * 3
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    only = client.predict("zebra bag", None, "mm", 10, "colour == 'zebra'", "A", api_name="/search")
    assert [hit["product_id"] for hit in only["hits"]] == ["nasty-1"] and only["hits"][0]["title"] == NASTY.title
    assert len(client.predict(text="bag", image=None, api_name="/search")["hits"]) == 10  # the defaults


def raw_answer(address, name, data):
    "What an endpoint answers to a request made by hand, past every check that a client does."
    headers = {"Content-Type": "application/json"}
    ask = urllib.request.Request(
        f"{address.rstrip('/')}/gradio_api/call/{name}", json.dumps({"data": data}).encode(), headers
    )
    with urllib.request.urlopen(ask, timeout=20) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/call/{name}/{event}", timeout=20) as reply:
        return reply.read().decode()


def test_headers_and_hosts(address):
    "No guessing of types, no frames on pages of others; a name that is not ours is not answered."
    import httpx

    for path in ("", "config", "gradio_api/info"):
        headers = httpx.get(address + path).headers
        assert (
            headers["x-content-type-options"] == "nosniff"
            and headers["x-frame-options"] == "SAMEORIGIN"
            and "frame-ancestors 'self'" in headers["content-security-policy"]
        )
    strange = httpx.get(address, headers={"Host": "shop.evil.example"})
    assert strange.status_code == 421 and "MOON2_DEMO_HOSTS" in strange.json()["detail"]
    assert httpx.get(address, headers={"Host": "localhost:7860"}).status_code == 200


def test_a_page_that_is_closed_leaves_the_pictures_of_others(catalog, encoders, picture):
    "Two pages of one machine show the same picture and are given the same upload; one of them is closed."
    import httpx

    pages = [build_demo(encoders[0], catalog=catalog) for _ in range(2)]
    addresses, files = [serve(page, port=free_port(), wait=False) for page in pages], []
    try:
        for page, address in zip(pages, addresses):
            given = {"files": ("photo.png", picture.read_bytes(), "image/png")}
            uploaded = httpx.post(f"{address}gradio_api/upload", files=given).json()
            gallery = next(block for block in page.blocks.values() if isinstance(block, HitGallery))
            shown = gallery.postprocess([(thumbnail(catalog[3].image_ref()), "a hit")]).root[0].image.path
            gallery.temp_files.add(shown)  # as Gradio does when it sends it
            files.append([f"{address}gradio_api/file={path}" for path in (*uploaded, shown)])
        assert [httpx.get(url).status_code for both in files for url in both] == [200] * 4
        pages[0].close(verbose=False)
        assert [httpx.get(url).status_code for url in files[1]] == [200, 200]
    finally:
        for page in pages:
            page.close(verbose=False)


def test_words_that_are_an_id_are_words(address, demo):
    "A product is asked with by id: and its id; the answer says what was taken."
    client_of = pytest.importorskip("gradio_client")
    client, name = client_of.Client(address, verbose=False), "nasty-1"
    words, named = (client.predict(text=text, image=None, api_name="/search") for text in (name, f"id:{name}"))
    assert words["hits"] == [
        {"product_id": hit.product.product_id, "score": pytest.approx(hit.score), "title": hit.product.title}
        for hit in demo.service.find(query_item(name, None))
    ]
    assert (
        "id:nasty-1" in words["note"]
        and named["note"].startswith("the query is the product nasty-1")
        and named["hits"] != words["hits"]
    )
    with pytest.raises(Exception, match="No such product"):
        client.predict(text="id:nobody", image=None, api_name="/search")


def test_searches_do_not_wait_behind_heatmaps(catalog, encoders):
    """One client asks for 40 heatmaps at once: a few are taken, the rest is refused in words, and searches are answered
    meanwhile."""
    import httpx

    demo = build_demo(encoders[0], catalog=catalog)
    ask, slow = demo.service.model("A").explain_place, threading.Event()
    demo.service.model("A").explain_place = lambda *given: (slow.wait(30), ask(*given))[1]
    address = serve(demo, port=free_port(), wait=False)
    try:
        heat = {"data": ["zebra bag", None, "nasty-1", "gradient", -1, -1, "A"]}
        with httpx.Client(timeout=20) as client:
            answers = [client.post(f"{address}gradio_api/call/heatmap", json=heat) for _ in range(40)]
            refused = [answer.json()["detail"] for answer in answers if answer.status_code == 503]
            assert 34 <= len(refused) <= 36 and set(refused) == {
                "4 of your explanations are waiting already. Wait for one of them, then ask again."
            }  # 2 run, 4 wait; one may be on its way
            begun = time.monotonic()
            assert (
                "product_id" in raw_answer(address, "search", ["red bag", None, "mm", 2, "", "A"])
                and time.monotonic() - begun < 10
            )
    finally:
        slow.set()
        demo.close(verbose=False)


def test_a_session_holds_no_pixels(demo, picture):
    """What a search leaves in a session is the words and the path of the picture; a click reads it again, and says so
    when it is gone."""
    from moon2_lab.app.tabs import look_up, query_again

    kept = look_up(demo.service, "black bag", str(picture), "mm", 5, "", "A")[0]
    assert kept["image"] == str(picture) and set(kept) == {"words", "image", "direction", "hits"}
    assert query_again(demo.service, kept) == demo.service.query_of("black bag", str(picture))
    picture.unlink()
    with pytest.raises(LabError, match="cannot be opened"):
        query_again(demo.service, kept)


@pytest.mark.parametrize("what", ["picture", "text", "absent", "link", "address"])
def test_only_uploaded_pictures_are_opened(address, tmp_path, picture, what):
    """A path of the server, a link to one, and an address of the network are refused alike: the answer does not tell
    whether a file is there."""
    (tmp_path / "words.txt").write_text("not for others")
    (tmp_path / "link.png").symlink_to(picture)
    paths = {
        "picture": picture, "text": tmp_path / "words.txt", "absent": tmp_path / "absent.png",
        "link": tmp_path / "link.png", "address": f"{address.rstrip('/')}/theme.css",
    }
    for name, rest in (("search", ["mm", 2, "", "A"]), ("heatmap", ["nasty-1", "gradient", -1, -1, "A"])):
        told = raw_answer(address, name, ["red bag", {"path": str(paths[what])}, *rest])
        assert told.startswith("event: error") and "was not uploaded to this page" in told, told
        assert str(tmp_path) not in told and str(picture) not in told and "not for others" not in told
    assert "product_id" in raw_answer(
        address, "search", ["red bag", None, "mm", 2, "", "A"]
    )  # such a request without a picture is answered


def test_heatmap_endpoint(address, demo):
    "/heatmap over HTTP: the map over the product, of a layer and head where asked, with how far to trust it."
    client_of = pytest.importorskip("gradio_client")
    client, product = client_of.Client(address, verbose=False), demo.service.catalog.get("nasty-1")
    ask = {
        "query_text": "zebra bag", "query_image": None, "item_id": "nasty-1", "method": "ig", "layer": -1, "head": -1,
        "model": "B",
    }
    answer = client.predict(**ask, api_name="/heatmap")
    assert (
        [product.title[start:end] for _, start, end, _ in answer["words"]]
        == [word for word, *_ in answer["words"]]
        == product.title.split()
    )
    assert (
        len(answer["cells"]) == 4
        and 0 <= answer["faithfulness"]["better_than"] <= 1
        and answer["faithfulness"]["random_maps"] == 100
    )
    encoder = demo.service.model("B").encoder
    query, item = encoder.encode([query_item("zebra bag", None), product.item()])
    assert answer["score"] == pytest.approx(float(query @ item), abs=1e-5)
    whole, one = (
        client.predict(**ask | {"method": "attention", "layer": layer, "head": layer}, api_name="/heatmap")
        for layer in (-1, 0)
    )
    assert whole["cells"] != one["cells"] and one["faithfulness"] is None
    for change, message in (
        ({"item_id": "nobody"}, "No such product"), ({"layer": 0}, "has no layers"),
        ({"method": "attention", "layer": 9}, "There is no layer 9"), ({"query_text": ""}, "Type some words"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(**ask | change, api_name="/heatmap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "Type some words"), ({"filter": "color == 'red'"}, "colour"),
        ({"filter": "colour == 'nothing'"}, "Loosen it"), ({"direction": "sideways"}, "sideways"),
        ({"k": 0}, "1 or more"), ({"k": 101}, "at most 100"), ({"model": "C"}, "C"),
        ({"text": "x" * 2001}, "At most 2,000"), ({"filter": "x" * 10_001}, "At most 10,000"),
    ],
)
def test_endpoint_errors_say_what_to_do(address, change, message):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    with pytest.raises(Exception, match=message):
        client.predict(
            **({"text": "bag", "image": None, "direction": "mm", "k": 3, "filter": "", "model": "A"} | change),
            api_name="/search",
        )


def test_endpoint_with_files_that_are_no_pictures(address, tmp_path):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    (tmp_path / "letter.jpg").write_text("hello")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name, message in (("letter.jpg", "not an image"), ("cut.png", "broken image")):
        with pytest.raises(Exception, match=message):
            client.predict(text="bag", image=client_of.handle_file(str(tmp_path / name)), api_name="/search")


def test_compare_endpoint(address, demo):
    """/compare over HTTP: counts and rows of the shop's own comparison; a category or direction that there is not is
    named."""
    client_of = pytest.importorskip("gradio_client")
    client, shop = client_of.Client(address, verbose=False), demo.service
    answer = client.predict(direction="i->mm", category="", k=5, api_name="/compare")
    assert (
        answer["n"]
        == sum(answer[kind] for kind in ("won", "lost", "moved", "same"))
        == sum(product.has_image for product in shop.catalog)
    )
    assert (
        answer["k"] == 5
        and {row["direction"] for row in answer["rows"]} == {"i->mm"}
        and answer["rows"] == shop.compare("i->mm", "", 5)["rows"]
    )
    changes = [abs(row["change"]) for row in answer["rows"]]
    assert changes == sorted(changes, reverse=True) and changes[0] > 0
    row = answer["rows"][0]  # the ranks are those of a search
    query = shop.query_of("id:" + row["product_id"], None)
    found = [hit.product.product_id for hit in shop.find(dataclasses.replace(query, text=None), "mm", 10, "", "B")]
    assert [hit["product_id"] for hit in row["hits_b"]] == found
    part = client.predict(direction="", category="Fashion", k=10, api_name="/compare")
    assert (
        0 < part["n"]
        and {row["category"].split(" > ")[0] for row in part["rows"]} == {"Fashion"}
        and len({row["direction"] for row in part["rows"]}) > 1
    )
    for change, message in (
        ({"category": "Fashoin"}, "Fashion"), ({"k": 0}, "1 or more"), ({"direction": "mm->t"}, "mm->t"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(**({"direction": "t->mm", "category": "", "k": 10} | change), api_name="/compare")


def test_two_models_are_compared_once_and_only_when_asked(catalog, encoders):
    "Nothing is computed at the start; two callers at once share one comparison; with one model there is none."
    shop, found = SearchService(catalog, dict(zip("AB", encoders))), []
    assert shop.compared is None
    threads = [threading.Thread(target=lambda: found.append(shop.comparison())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is shop.compared and len(found[0]) > len(catalog)
    with pytest.raises(UsageError, match="two: moon2 demo"):
        SearchService(catalog, {"A": encoders[0]}).compare()


def test_search_does_not_wait_for_an_explanation(address, demo):
    "While a heatmap is being made (its modules are taken), searches by the same model are answered."
    client_of = pytest.importorskip("gradio_client")
    client, model = client_of.Client(address, verbose=False), demo.service.model("A")
    with model.slow_lock.held():
        heat = client.submit("zebra bag", None, "nasty-1", "shapley", -1, -1, "A", api_name="/heatmap")
        for _ in range(3):
            assert client.predict("bag", None, "mm", 3, "", "A", api_name="/search") == demo.service.search(
                "bag", None, "mm", 3
            )
        assert not heat.done()
    assert heat.result(timeout=20)["words"]


def test_explaining_leaves_no_trace_on_the_searching_model(catalog, encoders):
    "Both use one set of weights; hooks, modes and gradients of an explanation stay with its own modules."
    model = SearchModel(encoders[0], catalog)
    before = model.search(catalog[0].item())
    model.explain(catalog[1].item("t"), catalog[0].item(), ["ig", "attention"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.encoder.modules())
    assert (
        all(parameter.grad is None for parameter in model.encoder.parameters())
        and model.search(catalog[0].item()) == before
    )
    assert {id(parameter) for parameter in model.slow.parameters()} == {
        id(parameter) for parameter in model.encoder.parameters()
    }


def test_unforeseen_errors_tell_nothing_of_the_server(address, demo, monkeypatch, capfd):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    monkeypatch.setattr(demo.service.model("A"), "search", lambda *given: {}["secret/path"])
    with pytest.raises(Exception, match="failed on the server") as caught:
        client.predict(text="bag", image=None, api_name="/search")
    assert "secret" not in str(caught.value) and "secret/path" in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------- the page


def captions(page, gallery=0):
    "What stands under the pictures of a gallery."
    return page.locator(".moon2-hits").nth(gallery).locator(".caption-label").all_inner_texts()


def framed(page, place):
    """The heatmap in its frame, brought into view: a frame out of sight is not laid out, and the page may still be
    scrolling."""
    frame, heat = page.locator(f"{place} iframe"), page.frame_locator(f"{place} iframe")
    frame.wait_for(timeout=20_000)

    def seen():
        frame.evaluate("one => one.scrollIntoView({block: 'start', behavior: 'instant'})")
        return heat.locator(".m2h-word").first.is_visible()

    until(page, seen, "a heatmap in view", 20)
    return heat


def opened(browser, address, width=1200, **how):
    "A page with its first hits, and what its console complains about."
    page = browser.new_page(viewport={"width": width, "height": 900}, **how)
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("response", lambda reply: print(reply.status, reply.url) if reply.status >= 400 else None)
    page.goto(address)
    page.locator(".moon2-hits button img").first.wait_for(
        timeout=20_000, state="attached"
    )  # the address may open another tab
    return page


def _opened(page) -> str:
    "What the details of the first hit say; clicked again where a second search (upload, button) has closed them."
    details = page.locator("#moon2-details")
    for _ in range(10):
        page.locator(".moon2-hits").nth(0).locator("button:has(img)").first.click()
        for _ in range(60):
            page.wait_for_timeout(100)
            if "Hit 1 of" in details.inner_text():
                page.wait_for_timeout(1000)  # a search that is still under way closes them
                if said := details.inner_text():
                    return said
    raise AssertionError("no details open")


def test_page_in_a_browser(address, browser, picture):
    "Load, search, click on a hit, make a mistake; nothing is asked of other hosts, no title becomes HTML."
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    hits = page.locator(".moon2-hits")
    hits.nth(1).locator("button img").first.wait_for(timeout=20_000)  # the first search is done at the start
    assert (
        page.get_by_text("A: first").count()
        and page.get_by_text("on a backbone of random weights").count()
        and page.get_by_text("for a test").count()
    )

    page.get_by_label("Words", exact=True).fill("zebra sons bag")
    page.get_by_label("Filter").fill("colour == 'zebra'")
    page.get_by_label("Filter").press("Enter")
    page.set_input_files("input[type=file]", str(picture))
    page.get_by_role("button", name="Search").click()
    page.wait_for_function(
        "document.querySelectorAll('.moon2-hits button img').length == 2", timeout=20_000
    )  # one hit of each model
    assert NASTY.title in hits.nth(0).inner_text()
    details = _opened(page)
    assert (
        NASTY.title in details
        and "zebra, black" in details
        and "Hit 1 of A: first" in details
        and "hit 1 of B: second" in details
    )
    assert "In common with the query: zebra" in details
    assert page.get_by_text("1 of 1 hits found by both (100 %), the same first hit").count()
    heat = framed(page, "#moon2-heat")
    item = heat.locator("[data-side=item]")
    item.locator(".m2h-cell").first.wait_for(timeout=20_000)
    experts = page.locator("#moon2-experts")
    assert "Read most: the query by expert" in experts.inner_text() and experts.locator("tbody tr").count() == 4
    assert (
        item.locator("img").evaluate("one => one.naturalWidth > 0")
        and "Zebra" in item.locator(".m2h-title").inner_text()
    )
    before = item.locator(".m2h-told").inner_text()
    item.locator(".m2h-word").first.hover()
    assert item.locator(".m2h-told").inner_text() != before, "pointing at a word tells its number"
    query = heat.locator("[data-side=query]")
    assert "What “Zebra” of the item met here" in query.locator(".m2h-told").inner_text(), "and what it met"
    assert "pairs of parts add up to" in heat.locator(".m2h-score").inner_text()
    assert "measured below" in item.locator(".m2h-trust").inner_text()
    trust = page.locator("#moon2-trust")
    trust.get_by_text("How far to trust it").wait_for(timeout=20_000)  # after the map, which is there at once
    assert trust.inner_text().count("Faithfulness: gain") + trust.inner_text().count("Do not trust") >= 2
    page.get_by_label("Explained by").click()
    page.get_by_role("option", name="occlusion").click()
    heat.locator(".m2h-what", has_text="occlusion").first.wait_for(timeout=20_000, state="attached")
    assert "random maps" in heat.locator("[data-side=item] .m2h-trust").inner_text()
    page.wait_for_function("!document.querySelector('#moon2-trust').innerText.trim()", timeout=20_000)  # not twice
    framed(page, "#moon2-heat")
    page.wait_for_function(
        "(() => { const frame = document.querySelector('iframe.heat'); return frame.clientHeight > 600 && "
        "frame.clientHeight === parseInt(frame.style.height) - 2; })()",
        timeout=20_000,
    )  # as high as what is in it
    keep_screenshot(page, "demo.png")

    page.get_by_label("Filter").fill("color == 'red'")
    page.get_by_label("Filter").press("Enter")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Nearest: colour").wait_for(timeout=20_000)
    assert page.title() == "Product search" and page.locator("img[src='x']").count() == 0
    assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {address.split("/")[2]}
    assert not complaints
    page.close()


@pytest.mark.slow
def test_picture_for_the_readme(root, browser):
    """Two models of 10 and 80 steps side by side on the committed sample; the later one finds more table lamps.
    MOON2_SCREENSHOTS=nbs/images makes the README's picture."""
    sample = Catalog.load(root / "data" / "sample")
    models = [train_tiny(sample, steps, seconds=300) for steps in (10, 80)]
    demo = build_demo(*models, catalog=sample, names=("10 steps", "80 steps"))
    address = serve(demo, port=free_port(), wait=False)
    page = opened(browser, f"{address}?q=black+table+lamp&k=8")
    until(page, lambda: len(captions(page, 1)) == 8, "8 hits", 20)
    lamps = [sum("Table Lamp" in caption for caption in captions(page, gallery)[:6]) for gallery in range(2)]
    assert lamps[1] >= 3 and lamps[1] > lamps[0], [captions(page, gallery) for gallery in range(2)]
    settle(page)
    keep_screenshot(page, "search.png")
    page.close()
    demo.close()


@pytest.mark.slow
def test_what_both_models_found_is_marked(address, browser, demo):
    "In words, with the places in both lists, and counted; either model can be shown alone."
    page = opened(browser, f"{address}?q=black+bag&k=30")
    until(page, lambda: len(captions(page, 1)) == 30, "30 hits", 20)
    lists = {
        letter: [hit["product_id"] for hit in demo.service.search("black bag", None, "mm", 30, "", letter)["hits"]]
        for letter in "AB"
    }
    common = set(lists["A"]) & set(lists["B"])
    assert 0 < len(common) < 30
    page.get_by_text(f"{len(common)} of 30 hits found by both").wait_for(timeout=20_000)
    for gallery, letter in enumerate("AB"):
        wanted = [
            f"✓ both: A {lists['A'].index(name) + 1} / B {lists['B'].index(name) + 1}" if name in common else None
            for name in lists[letter]
        ]
        assert [
            next((line for line in caption.split("\n") if line.startswith("✓")), None)
            for caption in captions(page, gallery)
        ] == wanted
    page.get_by_label("B: second").check()
    galleries = page.locator(".moon2-hits:visible")
    until(page, lambda: galleries.count() == 1 and "model=B" in page.url, "one gallery, and the address", 20)
    until(page, lambda: page.get_by_text("found by both").count() == 0, "no count of what both found", 20)
    first = page.locator(".moon2-hits:visible button:has(img)").first
    first.focus()
    page.keyboard.press("Enter")  # a hit is opened by keyboard, too
    page.get_by_text("Hit 1 of B: second").wait_for(timeout=20_000)
    assert not page.complaints
    page.close()


def test_a_copied_address_gives_the_same_hits(address, browser):
    "Words, view, number, filter and model are carried; what there is not is left out, and said."
    page = opened(browser, address)
    page.get_by_label("Words", exact=True).fill("white & striped 100% top")
    page.get_by_label("title", exact=True).check()
    page.get_by_label("Filter").fill("category_l1 == 'Fashion' and not colour == 'red'")
    page.get_by_label("Filter").press("Enter")
    page.get_by_role("button", name="Search").click()
    until(page, lambda: "direction=t" in page.url and "Fashion" in page.url, "the address", 20)
    fresh = opened(browser, page.url)
    until(
        fresh, lambda: captions(fresh) == captions(page) and captions(fresh, 1) == captions(page, 1), "the same hits",
        20, lambda: f"{captions(page)} {captions(fresh)}",
    )
    assert (
        len(captions(page)) == 12
        and fresh.get_by_label("Words", exact=True).input_value() == "white & striped 100% top"
        and fresh.get_by_label("title", exact=True).is_checked()
    )
    wrong = opened(browser, f"{address}?q=bag&model=C&k=999&tab=nowhere")
    wrong.get_by_text("left out: model, k, tab").wait_for(timeout=20_000)
    assert len(captions(wrong)) == 12 and not page.complaints + fresh.complaints + wrong.complaints
    for one in (page, fresh, wrong):
        one.close()


def test_hits_follow_the_options(address, browser, demo, picture):
    "Each option searches when it is changed; where that fails no hits stand beside it, and it is said why."
    page = opened(browser, address)
    page.get_by_label("Words", exact=True).fill("black bag")
    page.get_by_role("button", name="Search").click()
    until(page, lambda: "q=black+bag" in page.url, "the address", 20)

    def wanted(view="mm", k=12, expression="", image=None):
        hits = demo.service.search("black bag", image, view, k, expression)["hits"]
        return [hit["title"] for hit in hits]

    def shown():
        return [caption.split("\n")[-1] for caption in captions(page)]

    def follows(what, **asked):
        until(page, lambda: shown() == wanted(**asked), what, 20, lambda: f"{shown()} {wanted(**asked)}")

    follows("the first hits")
    page.get_by_label("title", exact=True).check()
    follows("the part that is compared", view="t")
    page.get_by_label("Filter").fill("colour == 'zebra'")
    page.get_by_label("Filter").press("Enter")
    follows("the filter", view="t", expression="colour == 'zebra'")
    page.get_by_label("Filter").fill("colour == 'no such colour'")
    page.get_by_label("Filter").press("Enter")
    page.locator("#moon2-notice [role=alert]").get_by_text("No product fits the filter").wait_for(timeout=20_000)
    assert not captions(page) and not captions(page, 1)
    page.get_by_label("Filter").fill("category_l1 == 'Fashion'")
    page.get_by_label("Filter").press("Enter")
    follows("the filter that is mended", view="t", expression="category_l1 == 'Fashion'")
    until(page, lambda: not page.locator("#moon2-notice [role=alert]").count(), "the message gone", 20)
    for _ in range(3):
        page.get_by_label("number input for Hits").press("ArrowUp")
    follows("the number of hits", view="t", k=15, expression="category_l1 == 'Fashion'")
    page.set_input_files("input[type=file]", str(picture))
    follows("the picture", view="t", k=15, expression="category_l1 == 'Fashion'", image=str(picture))
    assert "k=15" in page.url and "direction=t" in page.url and not page.complaints
    page.close()


@pytest.mark.slow
def test_back_leads_to_what_was_there_before(address, browser, picture):
    "Searches, pictures, opened hits and tabs are steps of the history, and a hit that is open is in the address."
    page = opened(browser, address)
    words = page.get_by_label("Words", exact=True)

    def search(text):
        words.fill(text)
        page.get_by_role("button", name="Search").click()
        until(page, lambda: f"q={text.replace(' ', '+')}" in page.url, "the address", 20)
        return captions(page)

    def back_to(holds, what):
        page.go_back()
        until(page, holds, what, 20, lambda: f"{page.url} {words.input_value()} {captions(page)}")

    black, red = search("black bag"), search("red cotton dress")
    assert black != red
    back_to(lambda: words.input_value() == "black bag" and captions(page) == black, "the first search")
    page.go_forward()
    until(page, lambda: words.input_value() == "red cotton dress" and captions(page) == red, "the second", 20)
    page.locator(".moon2-hits").nth(1).locator("button:has(img)").nth(2).click()
    page.get_by_text("Hit 3 of B: second").wait_for(timeout=20_000)
    until(page, lambda: "of=B&hit=" in page.url, "the hit in the address", 20)
    fresh = opened(browser, page.url)
    fresh.get_by_text("Hit 3 of B: second").wait_for(timeout=20_000)
    framed(fresh, "#moon2-heat").locator(".m2h-word").first.wait_for(timeout=20_000)
    fresh.close()
    page.get_by_role("tab", name="About").click()
    until(page, lambda: "tab=about" in page.url, "the tab in the address", 20)
    back_to(lambda: page.get_by_text("Hit 3 of B: second").is_visible(), "the hit")
    back_to(lambda: not page.locator("#moon2-details").inner_text().strip() and captions(page) == red, "the search")
    page.set_input_files("input[type=file]", str(picture))
    until(page, lambda: captions(page) not in ([], red), "hits of words and picture", 20)
    both = captions(page)
    page.wait_for_timeout(500)  # the step of the history
    search("black bag")
    back_to(lambda: captions(page) == both and page.locator(".image-frame img").count() == 1, "with its picture")
    back_to(lambda: captions(page) == red and not page.locator(".image-frame img").count(), "without a picture")
    assert page.title() == "Product search" and not page.complaints
    page.close()


@pytest.mark.slow
def test_words_that_no_title_has_are_marked(address, browser):
    "The words are marked and it is said what it means, for a script of no title, too; each card says what it lacks."
    page = opened(browser, f"{address}?q=black+sofa+zebra&filter=colour+%3D%3D+%27zebra%27")
    notice = page.locator("#moon2-notice [role=status]")
    notice.wait_for(timeout=20_000)
    assert notice.locator("mark").all_inner_texts() == ["sofa"] and "other words" in notice.inner_text()
    assert captions(page)[0].split("\n")[-2] == "has: black, zebra"
    page.get_by_label("Words", exact=True).fill("红色连衣裙 <u>\u202eqq")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("written in Chinese characters").wait_for(timeout=20_000)
    assert "do not trust them" in notice.inner_text() and notice.locator("u").count() == 0
    page.get_by_label("Words", exact=True).fill("red zebra bag")
    page.get_by_role("button", name="Search").click()
    until(page, lambda: not notice.count() and captions(page), "no notice", 20)
    assert captions(page)[0].split("\n")[-3:-1] == ["has: zebra", "lacks: red"] and not page.complaints
    page.locator(".moon2-hits button:has(img)").first.click()
    page.get_by_text("Asked for, in neither its attributes nor its title: red").wait_for(timeout=20_000)
    keep_screenshot(page, "demo-words.png")
    page.close()


@pytest.mark.slow
def test_from_a_hit_to_the_next_search(address, browser, demo):
    "More like this, like this but with words, and attributes put into the filter; on a telephone options are folded."
    page = opened(browser, f"{address}?q=black+bag&model=A")
    words, image = page.get_by_label("Words", exact=True), page.locator(".image-frame img")
    value = demo.service.chips[0][1]
    page.get_by_role("button", name=value, exact=True).click()
    until(page, lambda: "filter=" in page.url and value in page.url, "the filter", 20)
    page.get_by_role("button", name=value, exact=True).click()
    until(page, lambda: "filter=" not in page.url, "no filter", 20)
    first = demo.service.search("black bag", None, "mm", 12)["hits"][0]["product_id"]
    assert not page.get_by_role("button", name="More like this").is_visible()
    page.locator(".moon2-hits:visible button:has(img)").first.click()
    page.get_by_role("button", name="More like this").click(timeout=20_000)
    until(page, lambda: words.input_value() == f"id:{first}" and first in page.url, "the product as the query", 20)
    wanted = [hit["title"] for hit in demo.service.search(f"id:{first}", None, "mm", 12)["hits"]]
    until(page, lambda: [one.split("\n")[-1] for one in captions(page)] == wanted, "products like it", 20)
    page.locator(".moon2-hits:visible button:has(img)").first.click()
    page.get_by_label("Like this, but ...").fill("red")
    page.get_by_label("Like this, but ...").press("Enter")
    until(page, lambda: words.input_value() == "red" and image.count() == 1, "its picture and the words", 20)
    until(page, lambda: not page.get_by_role("button", name="More like this").is_visible(), "hits of both", 20)
    keep_screenshot(page, "demo-like.png")
    assert not page.complaints
    narrow = opened(browser, f"{address}?q=black+bag", 420)
    until(narrow, lambda: not narrow.get_by_label("Filter").is_visible(), "options folded", 20)
    galleries = narrow.locator(".moon2-hits")
    left, right = (galleries.nth(place).bounding_box() for place in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"] and left["y"] < 1100  # with a note above
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 420 and not narrow.complaints
    keep_screenshot(narrow, "demo-narrow-options.png")
    for one in (page, narrow):
        one.close()


def test_compare_tab(address, browser, demo):
    "Opened by a click: the most changed queries with their hits and the paired test; a hit leads to its heatmap."
    page = opened(browser, address)
    page.get_by_role("tab", name="Compare").click()
    page.locator(".change").first.wait_for(timeout=20_000)
    whole = demo.service.compare("t->mm", "", 10)
    counts = page.locator(".counts").inner_text()
    assert (
        all(f"{whole[kind]} " in counts for kind in ("won", "lost", "moved"))
        and page.locator(".change").count() == 10
        and page.locator(".tests li").count() == 2
    )
    first = page.locator(".change").first
    assert (
        whole["rows"][0]["text"] in first.inner_text()
        and first.locator(".few li").count() == 8
        and f"rank {whole['rows'][0]['rank_a']}" in first.inner_text()
    )
    kind = max(("won", "lost"), key=lambda kind: whole[kind])
    page.get_by_label(f"{kind} by B").check()
    until(
        page,
        lambda: (
            f"kind={kind}" in page.url
            and page.locator(f".change b.{kind}").count() == page.locator(".change").count() == min(10, whole[kind])
        ),
        "one kind", 20,
    )
    assert page.locator(".counts").inner_text() == counts, "counts and tests stay over all"
    fresh = opened(browser, page.url)
    fresh.locator(f".change b.{kind}").first.wait_for(timeout=20_000)
    keep_screenshot(fresh, "demo-compare.png")
    assert not page.complaints + fresh.complaints
    with fresh.expect_navigation():
        fresh.locator(".change .few a").first.click()
    left = list(fresh.complaints)  # of the page that was left: nothing but its cut connections
    assert_cut_connections(left)
    framed(fresh, "#moon2-pair-heat").locator("[data-side=item] .m2h-word").first.wait_for(timeout=20_000)
    assert (
        "tab=heatmap" in fresh.url
        and "by A: first" in fresh.locator("#moon2-pair").inner_text()
        and not page.complaints + fresh.complaints[len(left) :]
    )
    page.close()
    fresh.close()


def test_heatmap_tab(address, browser, picture):
    "One's own picture is explained against a product; an unknown product is an error with the nearest ids."
    page = opened(browser, address)
    page.get_by_role("tab", name="Heatmap").click()
    panel = page.get_by_role("tabpanel").filter(has=page.get_by_label("Product", exact=True))
    panel.get_by_label("Query: words, or id: and a product's id").fill("")
    panel.locator("input[type=file]").first.set_input_files(str(picture))
    page.get_by_label("Product", exact=True).fill("nasty-2")
    page.get_by_label("Product", exact=True).press("Enter")
    panel.locator("img").first.wait_for(timeout=20_000)
    page.get_by_role("button", name="Explain", exact=True).click()
    page.get_by_text("for example nasty-1").wait_for(timeout=20_000)
    page.get_by_label("Product", exact=True).fill("nasty-1")
    page.get_by_label("Product", exact=True).press("Enter")
    panel.get_by_label("Explained by").click()
    page.get_by_role("option", name="attention", exact=True).click()
    page.get_by_role("button", name="Explain", exact=True).click()
    heat = framed(page, "#moon2-pair-heat")
    heat.locator("[data-side=query] .m2h-cell").first.wait_for(timeout=20_000)
    assert (
        heat.locator("[data-side=query] img").evaluate("one => one.naturalWidth > 0")
        and NASTY.title in page.locator("#moon2-pair").inner_text()
    )
    until(page, lambda: "item=nasty-1" in page.url, "the address", 20)
    assert page.title() == "Product search" and not page.complaints
    keep_screenshot(page, "demo-heatmap.png")
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_narrow_page(address, browser, theme):
    """On a telephone no tab is wider than the screen, every tab can be reached, a search leads to its hits; the theme
    reaches into the heatmap."""
    page = opened(browser, f"{address}?__theme={theme}", 400)
    for name, inside in (
        ("Compare", ".change"),
        ("Heatmap", "#moon2-pair"),
        ("About", ".about table"), ("Search", ".moon2-hits"),
    ):
        page.get_by_role("tab", name=name).click()
        page.locator(inside).first.wait_for(timeout=20_000)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
    page.get_by_role("button", name="Search").click()
    page.wait_for_function(
        "Math.abs(document.querySelector('.moon2-hits').getBoundingClientRect().top) < 400", timeout=10_000
    )
    page.locator(".moon2-hits button:has(img)").first.click()
    heat = framed(page, "#moon2-heat")
    heat.locator(".m2h-word").first.wait_for(timeout=20_000)
    until(
        page, lambda: heat.locator("html").evaluate("one => getComputedStyle(one).colorScheme") == theme,
        "the theme in the frame", 10,
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 400 and page.evaluate(
        "document.body.classList.contains('dark')"
    ) == (theme == "dark")
    assert not page.complaints
    keep_screenshot(page, f"demo-narrow-{theme}.png")
    page.close()


def test_about_tab(address, browser):
    "Scores with intervals where they are, limits, filters, endpoints; nothing is fetched from elsewhere."
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}?tab=about")
    page.locator(".about").wait_for(timeout=20_000)
    told = page.locator(".about").inner_text()
    assert (
        "57.9 to 64.1" in told
        and "No scores lie beside this model" in told
        and "no probability" in told
        and "neck type" in told
        and 'api_name="/compare"' in told
    )
    assert not outside(asked, address.rstrip("/"))
    page.close()


# ---------------------------------------------------------------------------------------------- the launcher


def test_main_without_a_model(drawn_catalogue, monkeypatch, capsys):
    "No model: tiny is trained for seconds, and the page says so. Wrong folders are one line and exit code 2."
    served = {}
    monkeypatch.setattr("moon2_lab.app.interface.serve", lambda demo, *given: served.update(demo=demo, given=given))
    monkeypatch.setattr("moon2_lab.app.interface.train_tiny", lambda catalog: train_tiny(catalog, steps=2))
    assert run_demo(["--catalog", str(drawn_catalogue), "--port", "7999"], model=drawn_catalogue / "no-model") == 0
    assert served["given"] == ("127.0.0.1", 7999, False) and len(served["demo"].service.catalog) == 80
    assert "No trained model was found" in str(served["demo"].config["components"])
    assert run_demo([], sample=drawn_catalogue) == 0 and len(served["demo"].service.catalog) == 80  # nothing is drawn
    assert run_demo([str(drawn_catalogue)]) == 2 and "no model in this folder" in capsys.readouterr().err
    assert (
        run_demo(["--catalog", str(drawn_catalogue), "--split", "nowhere"]) == 2
        and "splits found" in capsys.readouterr().err
    )


def test_a_port_that_is_taken(catalog, encoders):
    demo = build_demo(encoders[0], catalog=catalog)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UsageError, match="--port"):
            serve(demo, port=taken.getsockname()[1], wait=False)


def test_models_from_folders(drawn_catalogue, encoders, tmp_path):
    "Run folders and model folders; two models; the test split when it is asked for."
    for name, encoder in zip(("run-a", "run-b"), encoders):
        encoder.save_pretrained(tmp_path / name / "model")
    shop = prepare(tmp_path / "run-a", tmp_path / "run-b" / "model", drawn_catalogue, "test").service
    assert [model.name for model in shop.models.values()] == ["run-a", "run-b"] and {
        product.split for product in shop.catalog
    } == {"test"}


@pytest.mark.slow
@pytest.mark.parametrize("program, seconds", [("tiny", 15), ("launcher", 30)])
def test_page_starts_in_seconds(root, tmp_path, program, seconds):
    """The page on the sample in seconds of one core's work (other programs only make it wait): 15 where a tiny model is
    trained first (2 of them), 30 by the launcher with the trained model of the repository, which reads `mini` and sees
    60 pictures. `mini` itself is converted before, as the first start of all does once.
    """
    start = ["-c", "import sys; from moon2_lab.app.interface import run_demo; run_demo(sys.argv[1:])"]
    if program == "launcher":
        shutil.copytree(mini_assets(), tmp_path / "cache" / "backbones" / mini_assets().name)
        start = [str(root / "apps" / "retrieval_demo.py"), str(root / "data" / "pretrained")]
    port, started = free_port(), time.monotonic()
    options = ["--port", str(port), "--catalog", str(root / "data" / "sample")]
    running = subprocess.Popen(
        [sys.executable, *start, *options], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MOON2_CACHE": str(tmp_path / "cache")},
    )
    try:
        told = ""
        for line in running.stderr:
            told += line
            if f"127.0.0.1:{port}" in line:
                break
        assert f"127.0.0.1:{port}" in told and time.monotonic() - started < 90, told
        spent = psutil.Process(running.pid).cpu_times()
        assert spent.user + spent.system < seconds, spent
    finally:
        running.terminate()
        running.wait(20)


def test_user_and_password(catalog, encoders, monkeypatch):
    "With both in the environment nobody is let in without them; with one of them the page does not start."
    import httpx

    demo = build_demo(encoders[0], catalog=catalog)
    monkeypatch.setenv("MOON2_DEMO_USER", "ann")
    with pytest.raises(UsageError, match="set both"):
        serve(demo, port=free_port(), wait=False)
    monkeypatch.setenv("MOON2_DEMO_PASSWORD", "right")
    address = serve(demo, port=free_port(), wait=False)
    try:
        assert (
            httpx.get(f"{address}config").status_code == 401
            and httpx.get(f"{address}gradio_api/info").status_code == 401
        )
        begun = time.monotonic()
        for _ in range(3):  # the answers to wrong ones come late, and later
            assert (
                httpx.post(f"{address}login", data={"username": "ann", "password": "wrong"}, timeout=20).status_code
                == 400
            )
        assert time.monotonic() - begun >= 0.5 + 1 + 2
        with httpx.Client() as client:
            assert (
                client.post(f"{address}login", data={"username": "ann", "password": "right"}).status_code == 200
                and client.get(f"{address}config").status_code == 200
            )
    finally:
        demo.close(verbose=False)


def test_sharing_says_what_becomes_public(capsys):
    "Before the tunnel is opened; and the options that keep the page small and quiet are set."
    class Page:
        def launch(self, **options):
            self.options, self.said = options, capsys.readouterr().err
            return None, "http://127.0.0.1:1/", "https://public"

    page = Page()
    assert serve(page, share=True, wait=False) == "http://127.0.0.1:1/"
    assert "everybody" in page.said and "MOON2_DEMO_USER" in page.said and "https://public" in capsys.readouterr().err
    assert (
        page.options["max_file_size"] == "20mb"
        and page.options["run_history"] is False
        and "allowed_paths" not in page.options
    )
    serve(page, wait=False)
    assert page.said == ""
    serve(page, host="0.0.0.0", wait=False)
    assert "without a password" in page.said and "port 7860" in page.said and "MOON2_DEMO_PASSWORD" in page.said
