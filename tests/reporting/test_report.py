"""The report page: one file, no requests, no scripts, readable in light, dark, narrow and print, whatever the titles
say.
"""

import base64
import errno
import html
import io
import re
import shlex
from choosing import few, slow
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from moon2_lab.cli import commands as commands_module, lookup_commands, study_commands
from moon2_lab.cli.options import build_parser
from moon2_lab.config import DIRECTIONS, OBJECTIVES
from moon2_lab.errors import LabError
from moon2_lab.evaluation.evaluate import run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.evaluation.statistics import share_interval
from moon2_lab.reporting.query_details import query_details
from moon2_lab.reporting.run_report import write_report
from moon2_lab.testing import (
    MadeUpEncoder, drawn_shape, made_up_catalog, made_up_history, made_up_match, made_up_metrics,
    made_up_query,
)

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


def scored_run() -> tuple:
    "A catalogue of drawn shapes, its benchmark, and what an encoder that knows the ids with noise scores on it."
    catalog = made_up_catalog(60)
    question = make_benchmark(catalog, "test")
    scored = run_benchmark(MadeUpEncoder(1.5), question, baselines=False, labels=False, resamples=0)
    return catalog, question, scored


def hostile_details():
    "What stands behind a recall; every name is hostile somewhere."
    catalog, question, scored = scored_run()
    details = query_details(catalog, scored.per_query, question)
    names = dict(zip(details.categories.group.unique(), HOSTILE))
    details.categories["group"] = details.categories.group.map(names)
    details.confusions = {name: table.rename(index=names, columns=names) for name, table in details.confusions.items()}
    for place, one in enumerate(details.worst):
        one.query_text = one.hits[0].title = one.hits[-1].product_id = HOSTILE[place]
    return details


def hostile_match(place: int, kind: str):
    "A match whose words and ids mean harm."
    match = made_up_match(kind, [1.0, 3.0, 40.0][place])
    for number, (role, _, maps) in enumerate(match.pairs):
        match.pairs[number] = (role, HOSTILE[place], maps)
        for side in (maps.query, maps.item):
            side.words = [(HOSTILE[(place + n) % len(HOSTILE)], *rest) for n, (_, *rest) in enumerate(side.words)]
    return match


def made_up_run(**changes) -> dict:
    "All parts of a page, from formulas; every text field is hostile somewhere."
    storable = [title for title in HOSTILE if title.isascii()]  # pandas itself refuses half a surrogate pair
    queries = [made_up_query(place, direction) for place, direction in enumerate([*DIRECTIONS, *DIRECTIONS])]
    for place, title in enumerate(HOSTILE):
        queries[place].query_text = title
        queries[place].hits[0].title = queries[place].hits[1].product_id = title
    matches = [hostile_match(place, kind) for place, kind in enumerate(("hit", "near miss", "failure"))]
    metrics = made_up_metrics()
    metrics["attributes"][HOSTILE[1]] = metrics["attributes"]["season"]
    metrics["trivial"]["t->i"][HOSTILE[0]] = metrics["trivial"]["t->i"]["untrained"]
    metrics["protocol"]["catalog"] = HOSTILE[0]
    run = {
        "metrics": metrics,
        "history": made_up_history(1500),
        "queries": queries,
        "matches": matches,
        "details": hostile_details(),
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


PARTS = ["history", "queries", "matches", "details", "quarantine", "comparison", "settings", "notes"]


@pytest.mark.parametrize("missing", few(PARTS, "quarantine", "queries"))
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


def cells_of(page: str, caption: str) -> list[list[str]]:
    "The texts of the rows of the table with a caption, tags away."
    table = re.search(rf"<caption[^>]*>(?:<span>)?{re.escape(caption)}.*?</table>", page, re.S)[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.S)
    return [[re.sub(r"<[^>]+>", " ", cell).split() for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.S)]
            for row in rows]


def test_recall_by_category_is_the_hand_count(tmp_path):
    catalog, question, scored = scored_run()
    details, table = query_details(catalog, scored.per_query, question), scored.per_query
    page = write_report(tmp_path / "report.html", metrics=scored.metrics, details=details).read_text(encoding="utf-8")
    shown = {row[0][0]: row[1:] for row in cells_of(page, "By category, level 2: R@10")}
    kinds = {product.product_id: product.category_l2 for product in catalog.products}
    assert list(shown) == ["Bowl", "Vase", "Lamp", "Tray"]
    for kind, cells in shown.items():
        for direction, cell in zip(DIRECTIONS, cells):
            own = table[(table.direction == direction) & (table.query_id.map(kinds) == kind)]
            hits = np.array([rank <= 10 and len(right) > 0 for rank, right in zip(own["rank"], own.hit_ids)], float)
            low, high = share_interval(hits, own.key.to_numpy())
            numbers = [f"{100 * hits.mean():.1f}", f"{100 * low:.1f}", "to", f"{100 * high:.1f}"]
            assert cell == [*numbers, str(len(own)), "queries"], (kind, direction)


def test_title_lengths_cover_every_query_and_worst_queries_are_the_worst(tmp_path):
    catalog, question, scored = scored_run()
    details, table = query_details(catalog, scored.per_query, question), scored.per_query
    for direction in DIRECTIONS:
        part = details.lengths[details.lengths.direction == direction]
        own = table[table.direction == direction]
        assert part.queries.sum() == len(own)
        whole = scored.metrics["directions"][direction]["R@10"]["value"]
        assert (part.value * part.queries).sum() / len(own) == pytest.approx(whole)
    searched = table[table.direction.isin(["t->mm", "i->mm", "mm->mm"])]
    best_ten = searched.groupby("query_id")["rank"].max().sort_values(ascending=False).head(10)
    assert [one.rank for one in details.worst] == best_ten.tolist()
    page = write_report(tmp_path / "report.html", metrics=scored.metrics, details=details).read_text(encoding="utf-8")
    rows = cells_of(page, "The worst 10 queries")
    assert [row[1] for row in rows] == [[f"{rank:.0f}", "of", "60"] for rank in best_ten]
    for row, one in zip(rows, details.worst):
        asked = (table.direction == one.direction) & (table.query_id == one.hits[-1].product_id)
        first = table[asked].top_ids.iloc[0][0]
        assert first == one.hits[0].product_id and first in " ".join(row[2])


def test_confusion_and_score_histograms_count_every_query():
    catalog, question, scored = scored_run()
    details, table = query_details(catalog, scored.per_query, question), scored.per_query
    kinds = {product.product_id: product.category_l2 for product in catalog.products}
    for direction, counts in details.confusions.items():
        own = table[table.direction == direction]
        pairs = list(zip(own.query_id.map(kinds), [kinds[names[0]] for names in own.top_ids]))
        assert counts.loc["Vase", "Lamp"] == pairs.count(("Vase", "Lamp")) and counts.sum().sum() == len(own)
    for scores in details.scores:
        own = table[table.direction == scores.direction]
        assert scores.queries == len(own) and scores.right.sum() == len(own) - scores.unseen
        assert scores.unseen == (own["rank"] > own.top_ids.map(len)).sum()


def test_training_is_drawn_with_and_without_the_filter_and_as_difference_from_even(tmp_path):
    history = made_up_history(40)
    history["share_down_weighted"] = np.where(history.step < 11, 0.0, 0.4)
    recalls = {"valid_R@10_t->mm": 0.3, "valid_R@10_dual->mm": 0.5}
    history = history.assign(**{name: np.where(history.step % 5 == 0, r, np.nan) for name, r in recalls.items()})
    history["valid_queries"] = 70
    page = write_report(tmp_path / "report.html", metrics={}, history=history).read_text(encoding="utf-8")
    figures = {re.search(r"<b>(.*?)</b>", one)[1]: one for one in re.findall(r"<figure>.*?</figure>", page, re.S)}
    chart = figures["Loss with and without the filter"]
    assert "filter starts" in chart
    last = history.iloc[-1]
    by_hand = lambda kind: sum(last[f"omega_{name}"] * last[f"{kind}_{name}"] for name in OBJECTIVES)
    sums = [by_hand(kind) for kind in ("unfiltered", "loss")]
    assert f"unfiltered: {sums[0]:.3g}\nweighted: {sums[1]:.3g}</title>" in chart
    omega = figures["Objective weights omega, from even"]
    share = last["omega_inter_t"] / sum(last[f"omega_{name}"] for name in OBJECTIVES)
    assert f"step 40\ninter_t: {100 * (share - 0.2):.3g}\n" in omega and ">even<" in omega
    matrix = cells_of(page, "Preference p, from even")
    assert matrix[0][1] == [f"{100 * (last.p_0_inter_t - 0.2):+.1f}".replace("-", "−")]
    low, high = share_interval(np.arange(70) % 2, np.arange(70))
    recall = figures["Recall on the validation split"]
    over = "over up to 70 queries in each direction: a recall of 0.50 has the 95 % interval"
    assert f"{over} {low:.2f} to {high:.2f}" in recall
    assert recall.count("<circle") == 16 and "R@10, scored 8 times" in recall
    assert re.findall(r'class="end s\d">([^<]+)<', recall) == ["t-&gt;mm", "dual-&gt;mm"], "short, so that they fit"


def test_how_to_reproduce_and_what_next(tmp_path):
    run = tmp_path / "my run"
    (run / "model").mkdir(parents=True)
    settings = {
        "command": "moon2 train --catalog 'a shop' --set seed=7", "config": {"seed": 7}, "versions": {"torch": "2.13"},
        "git": {"commit": "6fbb5fd", "dirty": False}, "machine": {"system": "Linux", "cores": 2},
    }
    catalog, question, scored = scored_run()
    details = query_details(catalog, scored.per_query, question)
    page = write_report(run / "report.html", metrics=scored.metrics, details=details, settings=settings).read_text()
    commands = [html.unescape(text) for text in re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page, re.S)]
    assert commands[0].splitlines() == ["git checkout 6fbb5fd", settings["command"]]
    assert "changes that are not in this commit" not in page
    worst = details.worst[0].hits[-1].product_id
    heatmap = ["moon2", "heatmap", str(run), "--query", f"id:{worst}", "--item", worst]
    assert shlex.split(commands[1])[:7] == heatmap
    assert [shlex.split(command)[1] for command in commands[1:]] == ["heatmap", "map", "compare", "demo"]
    for command in commands[1:]:  # they are commands of moon2
        parser = build_parser(commands_module, lookup_commands, study_commands)
        assert parser.parse_args(shlex.split(command)[1:]) is not None
    outside = write_report(tmp_path / "report.html", metrics=scored.metrics, settings=settings).read_text()
    assert 'id="next"' not in outside and 'id="reproduce"' in outside


def test_the_map_is_a_picture_and_a_link_to_the_page_beside(tmp_path):
    buffer = io.BytesIO()
    drawn_shape(2).save(buffer, "PNG")
    space = buffer.getvalue(), "60 of the 60 products"
    write = lambda: write_report(tmp_path / "report.html", metrics={}, space=space)
    assert 'id="space"' in write().read_text() and "map.html" not in write().read_text()
    (tmp_path / "map.html").write_text("a map")
    elements = read(write()).elements
    assert {attributes["href"] for tag, attributes in elements if tag == "a"} >= {"map.html"}
    uri = next(attributes["src"] for tag, attributes in elements if tag == "img")
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == buffer.getvalue()


def test_the_table_of_the_paper_is_folded_and_drawn_products_have_no_row_in_it(tmp_path):
    metrics = made_up_metrics()
    page = write_report(tmp_path / "report.html", metrics=metrics).read_text()
    folded = re.search(r'<section id="paper".*?</section>', page, re.S)[0]
    assert re.search(r"</h2>\s*<details><summary>", folded) and "this run, our data" in folded
    metrics["protocol"]["catalog_version"] = 3
    assert "this run, our data" not in write_report(tmp_path / "report.html", metrics=metrics).read_text()


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


@pytest.mark.parametrize("scheme, width", [("light", 1400), slow("dark", 1000), slow("light", 400), ("dark", 320)])
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
