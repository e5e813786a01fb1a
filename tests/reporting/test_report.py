"""The report page: one file, no requests, no scripts, readable in light, dark, narrow and print, whatever the titles
say.
"""

import errno
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from moon2_lab.config import DIRECTIONS
from moon2_lab.errors import LabError
from moon2_lab.explain.heatmap_data import PairHeatmap
from moon2_lab.reporting.run_report import write_report
from moon2_lab.testing import drawn_shape, made_up_history, made_up_metrics, made_up_query

HOSTILE = [
    "<script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 1">',
    "</style></title><svg onload='window.pwned = 1'>",
    "javascript:window.pwned=1",
    "\u202eright to left\x00\x07",
    "😀" * 50,
    "word " * 2_000,
    "a" * 10_000,
    "\ud800 half a pair",
    "&lt;b&gt; &amp; 'x'",
]


def made_up_run(**changes) -> dict:
    "All parts of a page, from formulas; every text field is hostile somewhere."
    storable = [title for title in HOSTILE if title.isascii()]  # pandas itself refuses half a surrogate pair
    queries = [made_up_query(place, direction) for place, direction in enumerate([*DIRECTIONS, *DIRECTIONS])]
    for place, title in enumerate(HOSTILE):
        queries[place].query_text = title
        queries[place].hits[0].title = queries[place].hits[1].product_id = title
    heatmap = PairHeatmap(
        [(title, 0.1 * place - 0.4) for place, title in enumerate(HOSTILE)],
        drawn_shape(0),
        np.linspace(-1, 1, 49).reshape(7, 7),
        0.5,
        HOSTILE[0],
        HOSTILE[1],
    )
    metrics = made_up_metrics()
    metrics["attributes"][HOSTILE[1]] = metrics["attributes"]["season"]
    metrics["trivial"]["t->i"][HOSTILE[0]] = metrics["trivial"]["t->i"]["untrained"]
    metrics["protocol"]["catalog"] = HOSTILE[0]
    run = {
        "metrics": metrics,
        "history": made_up_history(1500),
        "queries": queries,
        "heatmap": heatmap,
        "notes": HOSTILE,
        "comparison": {HOSTILE[1]: made_up_metrics(-0.05)},
        "settings": {
            "label": HOSTILE[0],
            "facts": {HOSTILE[1]: HOSTILE[2]},
            "config": {"backbone": HOSTILE[0], "num_layers": 2, "seed": 0},
            "command": HOSTILE[7],
            "differs_from_paper": {HOSTILE[1]: {"paper": HOSTILE[0], "here": HOSTILE[2]}},
        },
        "quarantine": pd.DataFrame(
            {"product_id": storable, "file": [None, *storable[1:]], "field": "image", "reason": storable}
        ),
    }
    return run | changes


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "A full page about a made-up run."
    return write_report(tmp_path_factory.mktemp("report") / "report.html", **made_up_run())


class Reader(HTMLParser):
    "Collects elements and checks that tags are balanced."

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.unbalanced = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def read(path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader


def test_one_small_file_that_asks_for_nothing(report):
    whole = report.read_text(encoding="utf-8")
    assert len(whole.encode()) < 2_000_000
    for tag, attributes in read(report).elements:
        for name in ("src", "href", "action", "data", "poster", "srcset", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, name)
    style = re.search(r"<style>(.*?)</style>", whole, re.S)[1]
    assert "url(" not in style and "@import" not in style and "</" not in style
    assert "default-src 'none'" in whole


def test_hostile_text_stays_text(report):
    reader = read(report)
    assert not reader.unbalanced and not reader.open
    assert not [tag for tag, _ in reader.elements if tag in ("script", "iframe", "object", "form")]
    assert not [name for _, attributes in reader.elements for name in attributes if name.startswith("on")]
    assert "\x00" not in report.read_text(encoding="utf-8")


def test_accessible_structure(report):
    elements = read(report).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in elements if tag == "a"} <= set(ids)
    assert {attributes["aria-labelledby"] for _, attributes in elements if "aria-labelledby" in attributes} <= set(ids)
    assert all(attributes.get("alt") for tag, attributes in elements if tag == "img")
    assert all(attributes.get("aria-label") for _, attributes in elements if attributes.get("role") == "img")
    assert [tag for tag, _ in elements].count("h1") == 1 and dict(elements)["html"]["lang"] == "en"


@pytest.mark.parametrize("missing", ["history", "queries", "heatmap", "quarantine", "comparison", "settings", "notes"])
def test_any_part_may_be_missing(tmp_path, missing):
    path = write_report(tmp_path / "report.html", **made_up_run(**{missing: None}))
    assert not read(path).unbalanced


def test_missing_views_and_broken_numbers(tmp_path):
    history = made_up_history(40)
    history = history.drop(columns=[name for name in history if name.startswith("load_i")]).assign(
        loss=np.nan, omega_inter_t=np.inf, grad_norm=0.0, phi_q05=None, masked_pairs="three"
    )
    metrics = made_up_metrics()
    metrics["directions"]["i->t"] = {
        "R@1": {"value": None, "ci95": []},
        "R@10": {"value": float("nan")},
        "n_queries": 0,
    }
    metrics["classification"] = {"category_l2": {"mm": {"accuracy": None}}}
    del metrics["trivial"], metrics["balance"], metrics["timing"]
    page = write_report(tmp_path / "report.html", **made_up_run(metrics=metrics, history=history)).read_text(
        encoding="utf-8"
    )
    assert "the loss was not a finite number in 40 of 40 steps" in page and "i-&gt;t: the score is not a number" in page
    assert not re.search(r'[ "\d](nan|inf)[ "%]', page)


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    path = write_report(tmp_path / "report.html", metrics={})
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LabError, match="disk is full"):
        write_report(path, **made_up_run())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["report.html"]


# In a real browser

CONTRAST = """() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, below) => { const a = top[3] ?? 1; return [0, 1, 2].map(i => top[i] * a + below[i] * (1 - a)); };
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = e => {
    const below = e.parentElement ? ground(e.parentElement) : [255, 255, 255], c = getComputedStyle(e).backgroundColor;
    return c === 'rgba(0, 0, 0, 0)' ? below : over(parse(c), below);
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || e.closest('title') || e.closest('.unseen')) continue;
    const s = getComputedStyle(e), below = ground(e), svg = e.closest('svg');
    const a = light(over(parse(svg ? s.fill : s.color), below)), b = light(below);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const text = walk.currentNode.data.slice(0, 30);
    if (ratio < 4.5) found.push([ratio.toFixed(2), e.tagName, e.className.baseVal ?? e.className, text]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme, width", [("light", 1400), ("dark", 1000), ("light", 400), ("dark", 320)])
def test_renders(report, browser, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests, messages = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(report.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [report.as_uri()] and not messages
    assert page.evaluate("window.pwned") is None
    assert (
        page.evaluate("document.documentElement.scrollWidth") <= width
    )  # nothing but tables and hits scrolls sideways
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate(CONTRAST) == []  # 4.5:1 for all text
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(253, 253, 252)" if scheme == "light" else "rgb(18, 22, 29)"
    )
    page.close()


def test_keyboard_and_print(report, browser):
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.goto(report.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the contents"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#watch"
    unfolded = "document.querySelector('#settings details table').checkVisibility({contentVisibilityAuto: true})"
    assert page.evaluate(unfolded) is False
    page.set_viewport_size({"width": 720, "height": 1000})  # A4 between its margins
    page.emulate_media(media="print", color_scheme="dark")
    assert (
        page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        and page.evaluate(CONTRAST) == []
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert page.evaluate(unfolded) is True  # on paper nothing can be unfolded, so everything is
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
