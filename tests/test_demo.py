"""The retrieval demo: filters, the search behind it, the endpoint, the page in a real browser, the launcher."""
import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
from browsing import free_port, keep_screenshot

pytest.importorskip("gradio")

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moon2_lab.catalog import Catalog, ImageRef, Product
from moon2_lab.core import LabError, UsageError
from moon2_lab.demo import build_demo, main, prepare, serve, thumbnail, train_tiny
from moon2_lab.encoder import Moon2Encoder, perturb_experts
from moon2_lab.filters import field_values, parse_filter
from moon2_lab.shop import SearchModel, Shop, query_item

pytestmark = pytest.mark.usefixtures("own_cache")
NASTY = Product("nasty-1", "Zebra <img src=x onerror=\"document.title='hacked'\"> & Söhne 'bag'", category_l1="O'Neill & <b>Sons</b>", attributes={"colour": "zebra|black", "neck type": "<script>"})


@pytest.fixture(scope="module")
def catalog(drawn_catalogue) -> Catalog:
    "Drawn products, and one whose title means harm."
    nasty = dataclasses.replace(NASTY, refs=(ImageRef.from_pil(Image.new("RGB", (60, 90), "#884422")),), split="test")
    return Catalog.from_products([*Catalog.load(drawn_catalogue), nasty])


@pytest.fixture(scope="module")
def encoders() -> list[Moon2Encoder]:
    "Two small ones that differ."
    return [perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=seed), 0.05, seed=seed).eval() for seed in (1, 2)]


@pytest.fixture(scope="module")
def demo(catalog, encoders):
    "The interface with two models."
    return build_demo(*encoders, catalog=catalog, names=("first", "second"), note="for a test")


@pytest.fixture(scope="module")
def address(demo) -> str:
    "The running page."
    yield serve(demo, port=free_port(), wait=False)
    demo.close(verbose=False)


@pytest.fixture
def picture(catalog, tmp_path):
    "A photo file of a product."
    path = tmp_path / "photo.png"
    catalog[3].image(1).save(path)
    return path


# ---------------------------------------------------------------------------------------------- filters

VALUES = field_values(NASTY)
FIELDS = set(VALUES) | {"size"}


@pytest.mark.parametrize(("expression", "fits"), [
    ("", True), ("   ", True), ("category_l1 == 'o\\'neill & <B>sons</B>'", True), ("colour == 'BLACK' and colour == 'zebra'", True), ("colour in ['red', 'blue']", False),
    ("colour not in ('red',)", True), ("'neck type' == '<script>'", True), ("not size == 38", True), ("size != '38'", True), ("size == 38", False),
    ("(colour == 'red' or product_id == 'nasty-1') and not (size == 'test')", True),
])
def test_filter(expression, fits):
    assert parse_filter(expression, FIELDS)(VALUES) is fits


@pytest.mark.parametrize("expression", [
    "colour", "colour ==", "colour = 'red'", "colour == red", "colour == ('red', 'blue')", "colour in 'red'", "colour in ()", "1 == 1", "'red' in colour", "colour < 'red'", "'a' == 'b' == 'c'",
    "lambda: 1", "open('x')", "colour.casefold() == 'red'", "(colour == 'red') + 1", "[x for x in 'ab']", "colour == f'{1}'", "colour == None", "colour == b'red'", "colour == 'red'; 1", "(" * 500,
    "not " * 240 + "colour", "colour == 'red'\0", "x" * 2000, "-" * 900 + "1", "wrong_field == 'red'", "colour == 'red' #" + "\n1",
])
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
    shop = Shop(catalog, dict(zip("AB", encoders)))
    query = query_item("black bag", picture)
    vector, views = encoders[1].encode([query])[0], encoders[1].encode_views(catalog.products)
    for view in ("t", "i", "mm"):
        scores = np.nan_to_num(views[view] @ vector, nan=-np.inf)
        found = shop.find(query, view, 7, model="B")
        assert [hit.product.product_id for hit in found] == [catalog[place].product_id for place in np.argsort(-scores, kind="stable")[:7]]
        assert [hit.score for hit in found] == pytest.approx(np.sort(scores)[::-1][:7], abs=1e-6)
    fashion = shop.find(query, "mm", len(catalog), "category_l1 == 'Fashion'", "B")
    everything = shop.find(query, "mm", len(catalog), "", "B")
    assert [hit for hit in everything if hit.product.category_l1 == "Fashion"] == fashion


def test_products_without_a_view(encoders):
    "A product without a picture is not found by its picture, and is shown with a note."
    catalog = Catalog.from_products([Product("a", "red bag"), Product("b", None, refs=(ImageRef.from_pil(Image.new("RGB", (30, 30), "red")),))])
    shop = Shop(catalog, {"A": encoders[0]})
    assert [hit["product_id"] for hit in shop.search("bag", None, "i")["hits"]] == ["b"]
    assert shop.search("bag", None, "t") == {"hits": [{"product_id": "a", "score": pytest.approx(shop.search("bag", None)["hits"][0]["score"], abs=2), "title": "red bag"}]}
    assert len(shop.search("bag", None)["hits"]) == 2 and shop.categories() == [] and shop.phrases() in ([], ["red bag"])
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
            model.explain(queries[place], catalog[place])
        together[place] = model.search(queries[place])

    threads = [threading.Thread(target=ask, args=[place]) for place in range(len(queries))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[(hit.product.product_id, hit.score) for hit in hits] for hits in together] == [[(hit.product.product_id, hit.score) for hit in hits] for hits in alone]


# ---------------------------------------------------------------------------------------------- the endpoint


def test_endpoint(address, demo, picture):
    "/search as the interface promises it, over HTTP."
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/search", "/heatmap"]
    photo = client_of.handle_file(str(picture))
    answer = client.predict(text="black bag", image=photo, direction="i", k=3, filter="", model="B", api_name="/search")
    assert answer == demo.shop.search("black bag", str(picture), "i", 3, "", "B")
    assert [set(hit) for hit in answer["hits"]] == [{"product_id", "score", "title"}] * 3
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    only = client.predict("zebra bag", None, "mm", 10, "colour == 'zebra'", "A", api_name="/search")
    assert [hit["product_id"] for hit in only["hits"]] == ["nasty-1"] and only["hits"][0]["title"] == NASTY.title
    assert len(client.predict(text="bag", image=None, api_name="/search")["hits"]) == 10  # the defaults


def raw_answer(address, name, data):
    "What an endpoint answers to a request made by hand, past every check that a client does."
    headers = {"Content-Type": "application/json"}
    ask = urllib.request.Request(f"{address.rstrip('/')}/gradio_api/call/{name}", json.dumps({"data": data}).encode(), headers)
    with urllib.request.urlopen(ask, timeout=20) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/call/{name}/{event}", timeout=20) as reply:
        return reply.read().decode()


@pytest.mark.parametrize("what", ["picture", "text", "absent", "link", "address"])
def test_only_uploaded_pictures_are_opened(address, tmp_path, picture, what):
    "A path of the server, a link to one, and an address of the network are refused alike: the answer does not tell whether a file is there."
    (tmp_path / "words.txt").write_text("not for others")
    (tmp_path / "link.png").symlink_to(picture)
    paths = {"picture": picture, "text": tmp_path / "words.txt", "absent": tmp_path / "absent.png", "link": tmp_path / "link.png", "address": f"{address.rstrip('/')}/theme.css"}
    for name, rest in (("search", ["mm", 2, "", "A"]), ("heatmap", ["nasty-1", "gradient", -1, -1, "A"])):
        told = raw_answer(address, name, ["red bag", {"path": str(paths[what])}, *rest])
        assert told.startswith("event: error") and "was not uploaded to this page" in told, told
        assert str(tmp_path) not in told and str(picture) not in told and "not for others" not in told
    assert "product_id" in raw_answer(address, "search", ["red bag", None, "mm", 2, "", "A"])  # such a request without a picture is answered


def test_heatmap_endpoint(address, demo):
    "/heatmap over HTTP: the map over the product, of a layer and head where asked, with how far to trust it."
    client_of = pytest.importorskip("gradio_client")
    client, product = client_of.Client(address, verbose=False), demo.shop.catalog.get("nasty-1")
    ask = {"query_text": "zebra bag", "query_image": None, "item_id": "nasty-1", "method": "ig", "layer": -1, "head": -1, "model": "B"}
    answer = client.predict(**ask, api_name="/heatmap")
    assert [product.title[start:end] for _, start, end, _ in answer["words"]] == [word for word, *_ in answer["words"]] == product.title.split()
    assert len(answer["cells"]) == 4 and 0 <= answer["faithfulness"]["better_than"] <= 1 and answer["faithfulness"]["random_maps"] == 10
    encoder = demo.shop.model("B").encoder
    query, item = encoder.encode([query_item("zebra bag", None), product.item()])
    assert answer["score"] == pytest.approx(float(query @ item), abs=1e-5)
    whole, one = (client.predict(**ask | {"method": "attention", "layer": layer, "head": layer}, api_name="/heatmap") for layer in (-1, 0))
    assert whole["cells"] != one["cells"] and one["faithfulness"] is None
    for change, message in (({"item_id": "nobody"}, "No such product"), ({"layer": 0}, "has no layers"), ({"method": "attention", "layer": 9}, "There is no layer 9"), ({"query_text": ""}, "Type some words")):
        with pytest.raises(Exception, match=message):
            client.predict(**ask | change, api_name="/heatmap")


@pytest.mark.parametrize(("change", "message"), [
    ({"text": " "}, "Type some words"), ({"filter": "color == 'red'"}, "colour"), ({"filter": "colour == 'nothing'"}, "Loosen it"), ({"direction": "sideways"}, "sideways"),
    ({"k": 0}, "1 or more"), ({"model": "C"}, "C"),
])
def test_endpoint_errors_say_what_to_do(address, change, message):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    with pytest.raises(Exception, match=message):
        client.predict(**({"text": "bag", "image": None, "direction": "mm", "k": 3, "filter": "", "model": "A"} | change), api_name="/search")


def test_endpoint_with_files_that_are_no_pictures(address, tmp_path):
    client_of = pytest.importorskip("gradio_client")
    client = client_of.Client(address, verbose=False)
    (tmp_path / "letter.jpg").write_text("hello")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for name, message in (("letter.jpg", "not an image"), ("cut.png", "broken image")):
        with pytest.raises(Exception, match=message):
            client.predict(text="bag", image=client_of.handle_file(str(tmp_path / name)), api_name="/search")


# ---------------------------------------------------------------------------------------------- the page


def test_page_in_a_browser(address, browser, picture):
    "Load, search, click on a hit, make a mistake; nothing is asked of other hosts, no title becomes HTML."
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    hits = page.locator(".moon2-hits")
    hits.nth(1).locator("button img").first.wait_for(timeout=20_000)  # the first search is done at the start
    assert page.get_by_text("A: first").count() and page.get_by_text("on a backbone of random weights").count() and page.get_by_text("for a test").count()

    page.get_by_label("Words").fill("zebra sons bag")
    page.get_by_label("Only").fill("colour == 'zebra'")
    page.get_by_label("Only").press("Enter")
    page.set_input_files("input[type=file]", str(picture))
    page.get_by_role("button", name="Search").click()
    page.wait_for_function("document.querySelectorAll('.moon2-hits button img').length == 2", timeout=20_000)  # one hit of each model
    assert NASTY.title in hits.nth(0).inner_text()
    hits.nth(0).locator("button:has(img)").first.click()
    page.get_by_text("Why was it found?").wait_for(timeout=20_000)
    details = page.locator("#moon2-details").inner_text()
    assert NASTY.title in details and "zebra, black" in details and "Hit 1 of A: first" in details
    heat = page.frame_locator("#moon2-heat iframe")
    item = heat.locator("[data-side=item]")
    item.locator(".m2h-cell").first.wait_for(timeout=20_000)
    assert item.locator("img").evaluate("one => one.naturalWidth > 0") and "Zebra" in item.locator(".m2h-title").inner_text() and "random maps" in item.locator(".m2h-trust").inner_text()
    before = item.locator(".m2h-told").inner_text()
    item.locator(".m2h-word").first.hover()
    assert item.locator(".m2h-told").inner_text() != before, "pointing at a word tells its number"
    page.get_by_label("Explained by").click()
    page.get_by_role("option", name="occlusion").click()
    heat.locator(".m2h-what", has_text="occlusion").first.wait_for(timeout=20_000)
    page.wait_for_function("(() => { const frame = document.querySelector('iframe.heat'); return frame.clientHeight > 600 && frame.clientHeight === parseInt(frame.style.height) - 2; })()", timeout=20_000)  # as high as what is in it
    keep_screenshot(page, "demo.png")

    page.get_by_label("Only").fill("color == 'red'")
    page.get_by_label("Only").press("Enter")
    page.get_by_role("button", name="Search").click()
    page.get_by_text("Nearest: colour").wait_for(timeout=20_000)
    assert page.title() == "Product search" and page.locator("img[src='x']").count() == 0
    assert {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))} == {address.split("/")[2]}
    assert not complaints
    page.close()


def test_narrow_page(address, browser):
    "On a telephone nothing is wider than the screen, and a search leads to its hits."
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme="dark")
    page.goto(address)
    page.locator(".moon2-hits button img").first.wait_for(timeout=20_000)
    assert page.evaluate("document.documentElement.scrollWidth") <= 380
    page.get_by_role("button", name="Search").click()
    page.wait_for_function("Math.abs(document.querySelector('.moon2-hits').getBoundingClientRect().top) < 400", timeout=10_000)
    page.close()


# ---------------------------------------------------------------------------------------------- the launcher


def test_main_without_a_model(drawn_catalogue, monkeypatch, capsys):
    "No model: tiny is trained for seconds, and the page says so. Wrong folders are one line and exit code 2."
    served = {}
    monkeypatch.setattr("moon2_lab.demo.serve", lambda demo, *given: served.update(demo=demo, given=given))
    monkeypatch.setattr("moon2_lab.demo.train_tiny", lambda catalog: train_tiny(catalog, steps=2))
    assert main(["--catalog", str(drawn_catalogue), "--port", "7999"], model=drawn_catalogue / "no-model") == 0
    assert served["given"] == ("127.0.0.1", 7999, False) and len(served["demo"].shop.catalog) == 80
    assert "No trained model was found" in str(served["demo"].config["components"])
    assert main([str(drawn_catalogue)]) == 2 and "no model in this folder" in capsys.readouterr().err
    assert main(["--catalog", str(drawn_catalogue), "--split", "nowhere"]) == 2 and "splits found" in capsys.readouterr().err


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
    shop = prepare(tmp_path / "run-a", tmp_path / "run-b" / "model", drawn_catalogue, "test").shop
    assert [model.name for model in shop.models.values()] == ["run-a", "run-b"] and {product.split for product in shop.catalog} == {"test"}


@pytest.mark.slow
def test_launcher_starts_within_a_minute(root, tmp_path):
    "`make app` on a machine without a model: a page in under 60 s."
    port, started = free_port(), time.monotonic()
    command = [sys.executable, str(root / "apps" / "retrieval_demo.py"), "--port", str(port), "--catalog", str(root / "data" / "sample")]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        assert f"127.0.0.1:{port}" in running.stderr.readline() and time.monotonic() - started < 60
    finally:
        running.terminate()
        running.wait(20)
