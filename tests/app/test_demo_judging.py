"""Thumbs of the demo: judged in the browser, by mouse and keyboard, downloaded, and scored by `moon2 benchmark`."""
import json

import pytest
from browsing import assert_cut_connections, keep_screenshot, until

pytest.importorskip("gradio")

from moon2_lab.app.interface import build_demo
from moon2_lab.data.catalog import Catalog
from moon2_lab.model.encoder import Moon2Encoder, perturb_experts

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def encoder() -> Moon2Encoder:
    return perturb_experts(Moon2Encoder.from_backbone("tiny", num_layers=2, seed=1), 0.05, seed=1).eval()


@pytest.fixture(scope="module")
def demo(drawn_catalogue, encoder):
    return build_demo(encoder, catalog=Catalog.load(drawn_catalogue), names=("first",))


@pytest.fixture
def page(browser, address):
    "The hits of a query in words; afterwards the page must have told no error."
    page, wrong = browser.new_page(viewport={"width": 1200, "height": 1000}, accept_downloads=True), []
    page.complaints = wrong
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}?q=black+bag")
    page.get_by_label("Hit 1 fits the query").wait_for(timeout=60_000)
    yield page
    assert not wrong
    page.close()


def thumb(page, place, words="fits the query"):
    return page.get_by_label(f"Hit {place} {words}", exact=True)


def pressed(page, place, words="fits the query") -> bool:
    return thumb(page, place, words).get_attribute("aria-pressed") == "true"


def counted(page) -> str:
    return page.locator("#moon2-judging .judged").inner_text()


def ids_of(demo, words) -> list[str]:
    return [hit["product_id"] for hit in demo.service.search(words, None, "mm", 12)["hits"]]


def test_judged_in_the_browser_and_scored_by_the_command(page, demo, moon2, encoder, drawn_catalogue, tmp_path):
    "Up at rank 2 and 3, down at rank 1: the command reads the file, and its figures are those of these ranks."
    sent = []
    page.on("request", lambda request: sent.append(f"{request.url} {request.post_data or ''}"))
    assert counted(page) == "Nothing is judged yet." and not page.get_by_text("Download judgements").is_visible()
    thumb(page, 2).click()
    thumb(page, 3).focus()
    page.keyboard.press("Space")
    thumb(page, 1).click()
    page.keyboard.press("Tab")  # to the thumb down beside it
    page.keyboard.press("Enter")
    assert [pressed(page, place) for place in (1, 2, 3, 4)] == [False, True, True, False]
    assert pressed(page, 1, "does not fit the query") and counted(page) == "3 judgements of 1 query, kept in this tab"
    assert not page.locator("#moon2-details").inner_text().strip(), "a thumb opens no hit"
    keep_screenshot(page, "demo-thumbs.png")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download judgements").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    ids = ids_of(demo, "black bag")
    assert json.loads(file.read_text()) == {"black bag": {ids[1]: 1, ids[2]: 1, ids[0]: 0}}
    assert not any(ids[1] in one or "gradio_api/upload" in one for one in sent), "the server is told nothing"
    encoder.save_pretrained(tmp_path / "model")
    call = ("benchmark", "qrels", file, "--catalog", drawn_catalogue, "--model", tmp_path / "model", "--device", "cpu")
    code, out, err = moon2(*call, "--json")
    assert code == 0, err
    scores, protocol = json.loads(out)["directions"]["t->mm"], json.loads(out)["protocol"]
    assert (protocol["n_queries_all"], protocol["n_relevant"], protocol["ground_truth"]) == (1, 2, "judgements.json")
    assert scores["n_queries"] == 1 and scores["recall_share@10"]["value"] == 1
    assert scores["MRR@10"]["value"] == pytest.approx(1 / 2)
    assert scores["MAP@10"]["value"] == pytest.approx((1 / 2 + 2 / 3) / 2)


@pytest.mark.slow
def test_a_judgement_is_taken_back_kept_and_forgotten(page, demo):
    "A thumb that is pressed again; other searches and back; a reload; a picture cannot be judged; forget."
    thumb(page, 1).click()
    thumb(page, 1).click()
    assert not pressed(page, 1) and counted(page) == "Nothing is judged yet."
    thumb(page, 1).click()
    thumb(page, 1, "does not fit the query").click()
    assert not pressed(page, 1) and pressed(page, 1, "does not fit the query")
    page.get_by_label("Words", exact=True).fill("red dress")
    page.get_by_role("button", name="Search").click()
    down = "does not fit the query"
    until(page, lambda: "q=red+dress" in page.url and not pressed(page, 1, down), "other thumbs", 20)
    thumb(page, 1).click()
    assert counted(page) == "2 judgements of 2 queries, kept in this tab"
    page.go_back()
    until(page, lambda: pressed(page, 1, "does not fit the query"), "the thumbs of before", 20)
    page.reload()
    thumb(page, 1).wait_for(timeout=60_000)
    left = [page.complaints.pop() for _ in page.complaints[:]]  # Gradio's, of a page that is left while it asks
    assert_cut_connections(left)
    until(page, lambda: pressed(page, 1, "does not fit the query"), "the thumbs after a reload", 20)
    page.locator(".moon2-hits button:has(img)").first.click()
    page.get_by_role("button", name="More like this").click(timeout=20_000)
    page.get_by_text("this one has a picture").wait_for(timeout=20_000)
    until(page, lambda: not page.locator(".moon2-thumbs").count(), "no thumbs", 20)
    page.go_back()
    page.go_back()
    page.get_by_role("button", name="Forget them").click(timeout=20_000)
    until(page, lambda: counted(page) == "Nothing is judged yet." and not pressed(page, 1), "nothing", 20)
