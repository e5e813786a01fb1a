"""The filter inspector: the change list and what it does to triplets and to a training; order, size and pictures;
the widget in a browser, by hand and by keyboard.
"""

import base64
import dataclasses
import json
import re

import numpy as np
import pandas as pd
import pytest
from browsing import contrast, jupyter_lab, keep_screenshot, luminance, open_notebook, outside, run_cell, settle, until
from choosing import LOOKS
from small import picture, product, settings, shop, tiny

from moon2_lab.config import VIEWS
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.data.triplets import Triplet
from moon2_lab.errors import DataError, LabError, UsageError
from moon2_lab.objective.sample_filter import FilterLedger
from moon2_lab.training.triplet_review import (
    PHIS, PhiWatch, Verdict, Verdicts, _stray_verdicts, apply_verdicts, inspection_table, phi_over_time, triplet_phi,
)
from moon2_lab.widgets.triplets import FilterInspector, PAGE

MEBIBYTE = 2**20
HOSTILE = (
    "<script>window.pwned=1</script> <img/src=x onerror=window.pwned=2> "
    "\u202egnol 红色杯子 😀 $x_2$ &amp; </title>"
)


def lost_picture():
    raise FileNotFoundError("it was moved")


def triplet(number, text="red mug", image=True, negatives=1, **changes):
    "A triplet of its own query and products."
    others = [dataclasses.replace(product(number + 1 + place), key=number + 1 + place) for place in range(negatives)]
    return Triplet(
        f"q{number:04}",
        Item(text, picture(number) if image is True else image or None, f"q{number:04}"),
        dataclasses.replace(product(number), key=number, **changes.pop("positive", {})),
        others,
        **changes,
    )


def many(count, **changes):
    return [triplet(number, f"query number {number}", **changes) for number in range(count)]


def phis(triplets, seed=0):
    "A phi for each triplet and view."
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {"query_id": [one.query_id for one in triplets]}
        | {name: random.uniform(0, 1, len(triplets)).round(4) for name in PHIS}
    )


def ledger_of(rows):
    "A ledger's table from (step, query_id, phi of all views)."
    return pd.DataFrame(
        [(step, query_id, phi, phi, phi, phi, phi, phi) for step, query_id, phi in rows],
        columns=FilterLedger().to_frame().columns,
    )


def unusual():
    "Triplets that lack something, by what they lack."
    gone = ImageRef("gone", lost_picture)
    return {
        "no picture": triplet(0, image=False),
        "no text": triplet(10, text=None),
        "no negatives": triplet(20, negatives=0),
        "lost picture": triplet(30, positive={"refs": (gone,)}),
        "lost query picture": triplet(40, image=gone),
        "no title": triplet(50, positive={"title": None}),
        "hostile": triplet(60, HOSTILE, positive={"title": HOSTILE}, noise="pseudo_positive"),
        "long": triplet(70, "x" * 3000),
        "six negatives": triplet(80, negatives=6),
    }


def state_size(widget):
    "Bytes that travel to the browser, script and style included."
    return sum(
        len(value) if isinstance(value, bytes) else len(json.dumps(value)) for value in widget.get_state().values()
    )


def heard_by(widget):
    "What the widget sends from now on: [content, buffers]."
    sent = []
    widget.send = lambda content, buffers=None: sent.append([content, list(buffers or [])])
    return sent


# ---------------------------------------------------------------------------------------------- the change list


def test_change_list_round_trip(tmp_path):
    triplets = many(4)
    verdicts = Verdicts()
    verdicts.put_back(triplets[0], HOSTILE)
    verdicts.drop(triplets[2])
    verdicts.drop("q0001", "by its id")
    path = verdicts.save(tmp_path / "new" / "verdicts.json")
    again = Verdicts.load(path)
    assert (
        again == verdicts
        and list(again.entries) == ["q0000", "q0002", "q0001"]
        and again.entries["q0002"].items == ("p002", "p003")
        and again.entries["q0001"].items == ()
    )
    assert again.entries["q0000"].note == HOSTILE and not again.can_undo
    assert [file.name for file in path.parent.iterdir()] == ["verdicts.json"], "no temporary files are left"


@pytest.mark.parametrize(
    "text, told",
    [
        (
            '{"format": "moon2_lab verdicts 1", "verdicts": [{"query_id": "q1", "verdict": "keep"}]}',
            "unknown verdict 'keep' [FILE, entry 1, query q1] -> write put_back or drop",
        ),
        (
            '{"format": "moon2_lab verdicts 1", "verdicts": '
            '[{"query_id": "q1", "verdict": "drop"}, {"query_id": "q1", "verdict": "put_back"}]}',
            "a second verdict about the same query [FILE, query q1] -> keep one",
        ),
        (
            '{"format": "moon2_lab verdicts 1", "verdicts": [{"verdict": "drop"}]}',
            "an entry without a query_id [FILE, entry 1]",
        ),
        ('{"format": "moon2_lab verdicts 1", "verdicts": [{"query_id": "q1", "ver', "not valid JSON"),
        ('{"format": "moon2_lab verdicts 9", "verdicts": []}', "not a change list [FILE]"),
        ("[1]", "not a change list [FILE]"),
        ("", "not valid JSON"),
    ],
)
def test_a_broken_change_list_says_what_and_where(tmp_path, text, told):
    path = tmp_path / "verdicts.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        Verdicts.load(path)
    assert told in str(caught.value).replace(str(path), "FILE") and str(path) in str(caught.value)


def test_apply_trusts_and_leaves_out():
    triplets = many(5)
    verdicts = Verdicts()
    verdicts.put_back(triplets[1])
    verdicts.drop(triplets[3])
    changed = apply_verdicts(triplets, verdicts)
    assert [one.query_id for one in changed] == ["q0000", "q0001", "q0002", "q0004"] and [
        one.trusted for one in changed
    ] == [False, True, False, False]
    assert dict(changed.counts) == {"put_back": 1, "drop": 1} and not any(one.trusted for one in triplets)


def test_stray_verdicts_are_told():
    triplets = many(4)
    verdicts = Verdicts(
        {"q0001": Verdict("drop", "", ("another", "product")), "nobody": Verdict("drop"), "q0002": Verdict("drop")}
    )
    assert _stray_verdicts(triplets, verdicts) == {
        "q0001": "its positive or its negatives are others now",
        "nobody": "no triplet has this query_id",
    }
    with pytest.raises(
        DataError, match="2 of 3 verdicts are not about these triplets .*nobody: no triplet has this query_id"
    ):
        apply_verdicts(triplets, verdicts)
    with pytest.warns(UserWarning, match="2 of 3 verdicts"):
        changed = apply_verdicts(triplets, verdicts, stray="warn")
    assert [one.query_id for one in changed] == ["q0000", "q0001", "q0003"] and changed.counts["stray"] == 2


def test_undo_takes_back_one_change_at_a_time():
    verdicts = Verdicts()
    verdicts.drop("a")
    verdicts.put_back("a", "no, it is fine")
    verdicts.judge("a", None)
    assert len(verdicts) == 0
    assert [(verdicts.undo(), verdicts.get("a")) for _ in range(4)] == [
        ("a", "put_back"),
        ("a", "drop"),
        ("a", None),
        (None, None),
    ]


# ---------------------------------------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def trained():
    "A short training with spoilt triplets, watched: (catalog, trainer, watch)."
    from moon2_lab.training.trainer import Trainer

    catalog = shop()
    trainer = Trainer(tiny(), catalog, settings(max_steps=12, noise=0.3, filter_warmup_ratio=0.0))
    watch = PhiWatch(trainer, every=5, most=20)
    trainer.callbacks.append(watch)
    trainer.train()
    return catalog, trainer, watch


def test_phi_is_what_the_filter_sees(trained):
    "The reliability of the loss, from the encoder as it is, for triplets with and without negatives and views."
    _, trainer, _ = trained
    chosen = trainer.triplets[:4]
    alone = dataclasses.replace(chosen[0], negatives=[], query_id="alone")
    silent = dataclasses.replace(chosen[1], query=dataclasses.replace(chosen[1].query, text=None), query_id="silent")
    found = triplet_phi(trainer.encoder, [*chosen, alone, silent], margin=0.1, kappa=5.0)
    queries, items = (
        trainer.encoder.encode_views([one.query for one in chosen]),
        [[one.positive, *one.negatives] for one in chosen],
    )
    for view in VIEWS:
        for place, products in enumerate(items):
            if (
                np.isnan(queries[view][place]).any()
                or view == "mm"
                and not (chosen[place].query.has_text and chosen[place].query.has_image)
            ):
                assert np.isnan(found[f"phi_{view}"][place])
                continue
            scores = trainer.encoder.encode([each.item() for each in products]) @ queries[view][place]
            assert found[f"phi_{view}"][place] == pytest.approx(
                1 / (1 + np.exp(-5 * (scores[0] - scores[1:].max() - 0.1))), abs=1e-4
            )
    assert (
        found.iloc[4][PHIS].dropna().tolist() == [1.0] * found.iloc[4][PHIS].notna().sum()
        and found.iloc[4][PHIS].notna().any()
    )
    assert np.isnan(found.phi_t[5]) and np.isnan(found.phi_mm[5])


def test_phi_over_time_joins_ledger_and_samples(trained):
    _, trainer, watch = trained
    table, ledger = watch.table(), trainer.ledger.to_frame()
    assert sorted(set(table.step)) == [0, 5, 10, 11] and table.groupby("step").size().tolist() == [20] * 4
    assert table.margin.iloc[0] > table.margin.iloc[-1], "the margin of the step"
    assert (table[table.step == 0].noise.notna().sum()) == 10, "the spoilt ones first, half of them"
    curve = phi_over_time(trainer.ledger, table)
    assert len(curve) == len(table) + len(ledger) and (curve.source == "doubted").sum() == len(ledger) > 0
    one = curve[curve.query_id == watch.triplets[0].query_id]
    assert one.step.is_monotonic_increasing and (one.source == "sampled").sum() == 4


def test_table_of_a_training(trained):
    _, trainer, _ = trained
    phi, ledger = triplet_phi(trainer.encoder, trainer.triplets), trainer.ledger.to_frame()
    table = inspection_table(trainer.triplets, phi, trainer.ledger).set_index("query_id")
    assert table.times.sum() == len(ledger) and table.times.to_dict() == {
        query_id: int((ledger.query_id == query_id).sum()) for query_id in table.index
    }
    assert (table.noise == "pseudo_positive").sum() > 0 and np.allclose(
        table.phi_mm, phi.set_index("query_id").phi_mm, equal_nan=True
    )
    assert ((table.weight_t < 1) == (table.phi_t < 0.6)).all()
    alone = inspection_table(trainer.triplets, None, trainer.ledger).set_index("query_id")
    query_id, last = ledger.query_id.iloc[0], ledger[ledger.query_id == ledger.query_id.iloc[0]].iloc[-1]
    assert alone.loc[query_id, "phi_step"] == last.step and np.isclose(
        alone.loc[query_id, "phi_t"], last.phi_t, equal_nan=True
    )
    assert alone[alone.times == 0].phi_mm.isna().all()


def test_a_training_with_verdicts(trained):
    "Put back: never doubted again, though the filter would. Dropped: never in a batch."
    from moon2_lab.training.trainer import Trainer

    catalog, trainer, _ = trained
    doubted = trainer.ledger.summary().query_id.tolist()
    by_id = {one.query_id: one for one in trainer.triplets}
    verdicts = Verdicts()
    for query_id in doubted[:6]:
        verdicts.judge(by_id[query_id], "drop" if by_id[query_id].noise else "put_back")
    for query_id in doubted[6:8]:
        verdicts.put_back(by_id[query_id])
    for query_id in doubted[8:10]:
        verdicts.drop(by_id[query_id])
    again = Trainer(
        tiny(),
        catalog,
        settings(max_steps=12, filter_warmup_ratio=0.0),
        triplets=apply_verdicts(trainer.triplets, verdicts),
    )
    seen, low = set(), set()
    for event in again:
        if event.phase == "loss":
            ids = [one.query_id for one in again.current_batch()]
            seen |= set(ids)
            low |= {
                query_id
                for query_id, column in zip(ids, event.data["terms"]["phi"].T.tolist())
                if any(value < 0.6 for value in column)
            }
    kinds = {
        kind: {query_id for query_id, entry in verdicts.entries.items() if entry.kind == kind}
        for kind in ("put_back", "drop")
    }
    assert kinds["put_back"] & low, "some of those put back have a low phi, or this test shows nothing"
    noted = set(again.ledger.to_frame().query_id)
    assert noted and not noted & kinds["put_back"] and not seen & kinds["drop"] and kinds["drop"]


# --------------------------------------------------------------------------------------- the widget without a browser


def test_order_is_that_of_phi():
    triplets = many(40)
    phi = phis(triplets)
    phi.loc[7, "phi_mm"] = np.nan
    widget = FilterInspector(triplets, phi, ledger_of([(3, "q0005", 0.2), (4, "q0005", 0.3), (9, "q0017", 0.1)]))

    def listed():
        found = []
        for number in range(widget.summary["pages"]):
            widget.page = number
            found += [row["id"] for row in widget.rows]
        return found

    for view in VIEWS:
        for order, rising in (("low", True), ("high", False)):
            widget.view, widget.order = view, order
            expected = phi.sort_values(
                f"phi_{view}", ascending=rising, kind="stable", na_position="last"
            ).query_id.tolist()
            assert listed() == expected, (view, order)
    widget.order = "often"
    assert listed()[:2] == ["q0005", "q0017"]
    widget.view, widget.order = "mm", "low"
    assert (
        (widget.page, widget.chosen) == (0, widget.rows[0]["id"])
        and widget.summary["unknown"] == 1
        and widget.summary["doubted"] == int((phi.phi_mm < 0.6).sum())
    )


def test_filters_and_moves():
    triplets = [
        dataclasses.replace(one, noise="pseudo_positive" if place % 5 == 0 else None)
        for place, one in enumerate(many(40))
    ]
    widget = FilterInspector(triplets, phis(triplets))
    widget.label = "pseudo_positive"
    assert widget.summary["shown"] == 8 and {row["label"] for row in widget.rows} == {"pseudo_positive"}
    widget.label, widget.search = "all", "NUMBER 3"
    assert {row["id"] for row in widget.rows} == {"q0003", *(f"q00{number}" for number in range(30, 40))}
    widget.search = ""
    widget.chosen = "q0033"
    place = widget.summary["at"]
    assert widget.page == place // PAGE and widget.rows[place % PAGE]["id"] == "q0033" == widget.detail["id"]
    widget._on_message({"do": "move", "to": 10_000, "turn": "view 7"})
    assert widget.summary["at"] == 39 and widget.page == 3 and widget.summary["turn"] == "view 7"
    widget.judge("q0004", "drop")
    widget.verdict = "none"
    assert widget.summary["shown"] == 39
    first, second = (row["id"] for row in widget.rows[:2])
    widget._on_message({"do": "judge", "id": first, "kind": "put_back", "note": "fine"})
    assert widget.chosen == second and widget.verdicts.entries[first] == Verdict(
        "put_back", "fine", tuple(f"p{int(first[1:]) + place:03}" for place in (0, 1))
    )
    widget.verdicts.undo()
    assert widget.summary["shown"] == 39 and widget.summary["put_back"] == 0, "what happens in Python shows up"
    for name, value, told in (
        ("label", "pseudo", "all, no label, pseudo_positive|all, pseudo_positive, no label"),
        ("chosen", "q0004", "is filtered out"),
        ("chosen", "q9", "is not among"),
    ):
        with pytest.raises(UsageError, match=told):
            setattr(widget, name, value)


def test_nonsense_from_the_browser_changes_nothing():
    widget = FilterInspector(many(3))
    before = widget.get_state()
    sent = heard_by(widget)
    pictures = [
        {"do": "pictures", "ids": ["q9", 3], "size": "small"},
        {"do": "pictures", "ids": ["q0001"], "size": "huge"},
    ]
    for message in (
        "x",
        None,
        {},
        {"do": "judge"},
        {"do": "judge", "id": "q0001", "kind": "keep"},
        {"do": "judge", "id": "q9", "kind": "drop"},
        {"do": "move", "to": "1"},
        *pictures,
    ):
        widget._on_message(message)
    assert widget.get_state() == before and sent == [] and len(widget.verdicts) == 0


def test_state_stays_small_with_many_triplets():
    shared, refs = [product(number) for number in range(50)], [picture(number) for number in range(50)]
    long = "a very long title of a product " * 60
    positives, negatives = ([dataclasses.replace(one, title=long, key=key) for one in shared] for key in (1, 2))
    triplets = [
        Triplet(
            f"q{number:05}",
            Item(f"{number} {long}", refs[number % 50]),
            positives[number % 50],
            [negatives[(number + place) % 50] for place in (1, 2, 3, 4, 5)],
        )
        for number in range(5000)
    ]
    ledger = ledger_of(
        [(step, "q00000", 0.3) for step in range(1000)] + [(3, f"q{number:05}", 0.4) for number in range(5000)]
    )
    widget = FilterInspector(triplets, phis(triplets), ledger)
    widget.chosen = "q00000"
    assert len(widget.detail["curve"]) == 200 and widget.detail["points"] == 1001
    assert state_size(widget) < MEBIBYTE / 4
    sent = heard_by(widget)
    widget._on_message({"do": "pictures", "ids": [row["id"] for row in widget.rows] + ["q04999"], "size": "small"})
    assert len(sent) == PAGE, "the page in view, and no other"
    assert sum(len(data) for _, buffers in sent for data in buffers) < 150_000 and state_size(widget) < MEBIBYTE / 4


@pytest.mark.parametrize("name", unusual())
def test_unusual_triplets(name):
    one = unusual()[name]
    widget = FilterInspector([one, triplet(90)])
    widget.chosen = one.query_id
    sent = heard_by(widget)
    for size in ("small", "large"):
        widget._on_message({"do": "pictures", "ids": [one.query_id], "size": size})
    told = {part["role"]: part for part in sent[-1][0]["found"]}
    reasons = {
        "no picture": ("query", "no picture"),
        "lost picture": ("positive", "cannot be read: it was moved"),
        "lost query picture": ("query", "cannot be read: it was moved"),
    }
    if name in reasons:
        assert told[reasons[name][0]]["why"] == reasons[name][1]
    roles = [part["role"] for part in widget.detail["full"]]
    assert roles == ["query", "positive"] + ["negative"] * {"no negatives": 0, "six negatives": 4}.get(
        name, 1
    ) and widget.detail["more"] == {"six negatives": 2}.get(name, 0)
    assert [one for one in sent[-1][0]["found"] if "at" in one] and all(
        data.startswith(b"\xff\xd8") for data in sent[-1][1]
    )
    assert (
        widget.still().data.startswith(b"\xff\xd8")
        and len(widget.still().data) < 100_000
        and state_size(widget) < MEBIBYTE / 4
    )


def test_path_is_read_and_saved_at_each_change(tmp_path):
    triplets, path = many(3), tmp_path / "verdicts.json"
    widget = FilterInspector(triplets, path=path)
    widget._on_message({"do": "judge", "id": "q0001", "kind": "drop"})
    assert Verdicts.load(path).counts() == {"put_back": 0, "drop": 1}
    again = FilterInspector(triplets, path=path)
    assert again.summary["drop"] == 1 and again.verdicts == widget.verdicts
    path.unlink()
    path.mkdir()
    again.judge("q0002", "put_back")
    assert again.summary["message"].startswith("Not saved") and again.verdicts.get("q0002") == "put_back", (
        "told, and kept in memory"
    )
    with pytest.raises(UsageError, match="no path to save to"):
        FilterInspector(triplets).save()
    assert Verdicts.load(again.save(tmp_path / "other.json")) == again.verdicts
    with pytest.raises(UsageError, match="verdicts and a path"):
        FilterInspector(triplets, verdicts=Verdicts(), path=path)


def test_two_triplets_of_one_query_id_are_refused():
    with pytest.raises(DataError, match="query_ids stand for several triplets"):
        FilterInspector([triplet(1), triplet(1)])
    with pytest.raises(LabError, match="no triplets"):
        FilterInspector([])


def test_still_picture_in_the_mimebundle():
    bundle, _ = FilterInspector(many(6))._repr_mimebundle_()
    assert (
        "application/vnd.jupyter.widget-view+json" in bundle and len(base64.b64decode(bundle["image/jpeg"])) < 100_000
    )


# --------------------------------------------------------------------- the widget in a browser, with Python behind it

MODEL = """
const state = STATE, listeners = {};
const fire = (name, ...rest) => { for (const listener of [...(listeners[name] ?? [])]) listener(...rest); };
const bytes = (text) => new DataView(Uint8Array.from(atob(text), (one) => one.charCodeAt(0)).buffer);
let waiting = {};
const tell = async (message) => {
  const { changed, sent } = await window.toPython(message), as = JSON.stringify;
  const names = Object.keys(changed).filter((name) => as(changed[name]) !== as(state[name]));
  Object.assign(state, changed);
  for (const name of names) fire(`change:${name}`);
  for (const [content, buffers] of sent) fire("msg:custom", content, buffers.map(bytes));
};
const model = {
  get: (name) => state[name],
  set: (name, value) => { waiting[name] = value; state[name] = value; fire(`change:${name}`); },
  save_changes: () => { const values = waiting; waiting = {}; tell({ set: values }); },
  send: tell, on: (name, listener) => (listeners[name] ??= []).push(listener),
  off: (name, listener) => { listeners[name] = (listeners[name] ?? []).filter((one) => one !== listener); },
};
window.closeWidget = render({ model, el: document.getElementById("here") });
"""
SHOWN = ("view", "order", "label", "verdict", "search", "page", "chosen", "rows", "detail", "summary")


@pytest.fixture
def opened(browser, tmp_path):
    """A function that shows a widget in a page, with Python behind it; at the end no error and no request to the
    outside may have been seen.
    """
    asked, wrong, pages = [], [], []

    def open_page(widget, width=1200, scheme="light", height=900):
        page, sent = (
            browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True),
            heard_by(widget),
        )

        def heard(message):
            sent.clear()
            if "set" in message:
                for name, value in message["set"].items():
                    setattr(widget, name, value)
            else:
                widget._on_message(message)
            return {
                "changed": {name: getattr(widget, name) for name in SHOWN},
                "sent": [[content, [base64.b64encode(data).decode() for data in buffers]] for content, buffers in sent],
            }

        page.expose_function("toPython", heard)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        state = json.dumps({name: getattr(widget, name) for name in SHOWN}).replace("<", "\\u003c")
        script = widget._esm.replace("export default { render };", "") + MODEL.replace("STATE", state, 1)
        file = tmp_path / f"{len(pages)}.html"
        head = (
            '<!doctype html><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>t</title>'
        )
        file.write_text(
            f'{head}<style>html {{ color-scheme: light dark }} body {{ margin: 0 }}{widget._css}</style>'
            f'<div id="here"></div><script type="module">{script}</script>',
            encoding="utf-8",
        )
        page.goto(file.as_uri())
        page.locator(".m2i-row, .m2i-detail").first.wait_for()
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith(("file://", "blob:"))] == []


def rows_of(page):
    settle(page)
    return page.eval_on_selector_all(".m2i-row", "all => all.map((one) => one.dataset.id)")


def chosen_of(page):
    settle(page)
    return page.locator(".m2i-detail h3 > bdi").inner_text()


def control(page, name):
    return page.locator(f"[data-control='{name}'] :is(input, select)")


def some(count=40):
    "Triplets with labels, phi, a ledger and samples."
    triplets = [
        dataclasses.replace(one, noise=("pseudo_positive", "pseudo_negative")[place % 2] if place % 7 == 0 else None)
        for place, one in enumerate(many(count, negatives=2))
    ]
    phi = phis(triplets)
    worst = phi.sort_values("phi_mm").query_id.iloc[0]
    samples = pd.DataFrame(
        {
            "step": [0, 20, 40, 60],
            "query_id": worst,
            "phi_t": [0.1, 0.2, 0.4, 0.7],
            "phi_i": [0.1, 0.2, 0.4, 0.3],
            "phi_mm": [0.12, 0.3, 0.62, 0.71],
        }
    )
    return FilterInspector(
        triplets, phi, ledger_of([(8, worst, 0.15), (17, worst, 0.28), (33, worst, 0.55)]), samples
    ), phi.sort_values("phi_mm").query_id.tolist()


def test_list_details_and_pages(opened):
    widget, order = some()
    page = opened(widget)
    until(page, lambda: page.locator(".m2i-detail img").count() == 4, "the pictures")
    assert (
        page.locator(".m2i-detail img").evaluate_all("all => all.every((one) => one.complete && one.naturalWidth > 0)")
        and page.locator(".m2i-row img").count() == 3 * PAGE
    )
    assert rows_of(page) == order[:PAGE] and chosen_of(page) == order[0]
    assert (
        page.locator(".m2i-row").first.get_attribute("aria-selected") == "true"
        and page.locator(".m2i-row").nth(1).get_attribute("aria-selected") == "false"
    )
    low = widget.table.set_index("query_id").phi_mm
    assert page.locator(".m2i-row b").all_inner_texts() == [f"{low[query_id]:.2f}" for query_id in order[:PAGE]]
    marks = page.locator(".m2i-curve")
    assert (
        marks.locator("circle").count(),
        marks.locator("rect").count(),
        marks.locator(".m2i-threshold").count(),
    ) == (3, 4, 1)
    assert "7 points, from 0.12 at step 0 to 0.71 at step 60; threshold 0.6" in marks.get_attribute("aria-label")
    assert "Weighed down 3 times, steps 8 to 33." in page.locator(".m2i-facts").inner_text()
    threshold, circle = (
        float(marks.locator(one).first.get_attribute(name))
        for one, name in ((".m2i-threshold", "y1"), ("circle", "cy"))
    )
    assert threshold < circle, "a doubted point lies under the threshold"
    page.get_by_role("button", name="Next").click()
    until(page, lambda: rows_of(page) == order[PAGE : 2 * PAGE], "the second page")
    assert chosen_of(page) == order[PAGE] and "page 2 of 4" in page.locator(".m2i-pages").inner_text()
    page.locator(".m2i-row").nth(3).click()
    until(page, lambda: chosen_of(page) == order[PAGE + 3], "a click")
    control(page, "order").select_option("high")
    until(page, lambda: rows_of(page) == order[::-1][:PAGE], "the other order")
    control(page, "query view").select_option("t")
    by_text = widget.table.sort_values("phi_t", ascending=False).query_id.tolist()
    until(page, lambda: rows_of(page) == by_text[:PAGE], "the other view")
    control(page, "search").fill("number 17")
    until(page, lambda: rows_of(page) == ["q0017"], "the search")
    control(page, "search").fill("nothing like it")
    until(page, lambda: page.get_by_text("No triplet passes the filters.").is_visible(), "an empty list")
    control(page, "search").fill("")
    control(page, "label").select_option("pseudo_positive")
    until(
        page,
        lambda: len(rows_of(page)) == sum(one.noise == "pseudo_positive" for one in widget.triplets.values()),
        "one label",
    )


def test_buttons_and_keyboard_judge(opened):
    widget, order = some()
    page = opened(widget)
    kinds = lambda: {query_id: entry.kind for query_id, entry in widget.verdicts.entries.items()}  # noqa: E731
    page.locator(".m2i-list").focus()
    for key in ("d", "ArrowDown", "p", "ArrowDown", "ArrowDown", "d"):  # as fast as they come
        page.keyboard.press(key)
    until(page, lambda: kinds() == {order[0]: "drop", order[1]: "put_back", order[3]: "drop"}, "the keys", 20, kinds)
    until(page, lambda: "1 put back, 2 dropped" in page.locator(".m2i-counts").inner_text(), "the counts")
    assert "dropped. 1 put back, 2 dropped." in page.locator("[aria-live=polite]").inner_text()
    assert page.locator("[data-verdict=drop]").get_attribute("aria-pressed") == "true"
    page.keyboard.press("d")
    until(page, lambda: order[3] not in kinds(), "the same key again takes it away")
    page.keyboard.press("u")
    until(page, lambda: kinds().get(order[3]) == "drop", "undone")
    for _ in range(3):
        page.keyboard.press("u")
    until(page, lambda: kinds() == {} and page.locator("[data-verdict=undo]").is_disabled(), "all undone")
    assert chosen_of(page) == order[0], "undo shows what it changed"
    page.keyboard.press("u")
    settle(page)
    assert "Nothing to undo" in page.locator("[aria-live=polite]").inner_text()
    page.locator("[data-verdict=put_back]").click()
    until(page, lambda: kinds() == {order[0]: "put_back"}, "the button")
    control(page, "note").fill("pud: a word with keys in it")
    control(page, "note").press("Enter")
    until(page, lambda: widget.verdicts.entries[order[0]].note == "pud: a word with keys in it", "the note")
    assert kinds() == {order[0]: "put_back"}, "letters of a note judge nothing"
    page.locator(".m2i-list").focus()
    page.keyboard.press("End")
    until(page, lambda: chosen_of(page) == order[-1], "the end")
    page.keyboard.press("PageUp")
    until(page, lambda: chosen_of(page) == order[-1 - PAGE], "a page back")
    assert (
        page.evaluate(
            "document.getElementById(document.activeElement.getAttribute('aria-activedescendant')).dataset.id"
        )
        == order[-1 - PAGE]
    )


def test_every_control_can_be_reached_by_keyboard(opened):
    widget, _ = some()
    widget.page = 1
    widget.judge(widget.chosen, "drop")
    page, order = opened(widget), []
    for _ in range(12):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate(
                "() => { const one = document.activeElement; return one.closest('label')?.dataset.control"
                " ?? one.dataset.verdict ?? one.getAttribute('role') ?? one.textContent; }"
            )
        )
    assert order == [
        "query view",
        "order",
        "label",
        "verdict",
        "search",
        "listbox",
        "‹ Back",
        "Next ›",
        "put_back",
        "drop",
        "undo",
        "note",
    ]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert page.locator("button, input, select, [role=listbox], .m2i").evaluate_all(
        "all => all.every((one) => one.hasAttribute('data-lm-suppress-shortcuts'))"
    ), "JupyterLab must not take d d"


def rgb(text):
    return [float(part) for part in re.findall(r"[\d.]+", text)[:3]]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_fits_and_can_be_read(opened, scheme, width):
    widget, order = some()
    widget.judge(order[0], "put_back", "the negative is another colour")
    widget.judge(order[1], "drop")
    widget._message = "Not saved: the disk is full"
    widget._show(0)
    page = opened(widget, width, scheme)
    until(page, lambda: page.locator(".m2i-detail img").count() == 4, "the pictures")
    keep_screenshot(page, f"inspector-{scheme}-{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paper, raised = (
        rgb(page.eval_on_selector(one, "one => getComputedStyle(one).backgroundColor"))
        for one in (".m2i", ".m2i-controls")
    )
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    for chosen in (
        ".m2i-counts",
        ".m2i-row bdi",
        ".m2i-row .m2i-low",
        ".m2i-chip",
        ".m2i-chip.m2i-put_back",
        ".m2i-chip.m2i-drop",
        ".m2i-is-drop bdi",
        ".m2i-note",
        ".m2i-pages",
        "h3",
        "h4",
        "thead th",
        "figure.m2i-query .m2i-role",
        "figure.m2i-positive .m2i-role",
        "figure.m2i-negative .m2i-role",
        "label",
    ):
        for back in (paper, raised):
            assert contrast(rgb(page.eval_on_selector(chosen, "one => getComputedStyle(one).color")), back) >= 4.5, (
                chosen
            )
    here = rgb(page.eval_on_selector("[aria-selected=true]", "one => getComputedStyle(one).backgroundColor"))
    assert (
        here != raised
        and min(
            contrast(
                rgb(page.eval_on_selector(f"[aria-selected=true] {one}", "one => getComputedStyle(one).color")), here
            )
            for one in ("bdi", "b", ".m2i-chip")
        )
        >= 4.5
    )
    for chosen in (".m2i-warning", "[data-verdict=put_back]"):
        assert (
            contrast(
                *(
                    rgb(page.eval_on_selector(chosen, f"one => getComputedStyle(one).{name}"))
                    for name in ("color", "backgroundColor")
                )
            )
            >= 4.5
        ), chosen
    assert contrast(rgb(page.eval_on_selector(".m2i-curve text", "one => getComputedStyle(one).fill")), paper) >= 4.5
    sides = [page.locator(one).bounding_box() for one in (".m2i-side", ".m2i-detail")]
    assert (sides[0]["y"] + sides[0]["height"] <= sides[1]["y"]) == (width == 400), (
        "side by side, or one under the other"
    )


def test_unusual_triplets_in_the_page(opened):
    there = unusual()
    widget = FilterInspector(list(there.values()))
    page = opened(widget, 400)
    said = {
        "no picture": "no picture",
        "no text": "(no text)",
        "no negatives": "This triplet has no negative",
        "lost picture": "cannot be read: it was moved",
        "lost query picture": "cannot be read: it was moved",
        "no title": "(no title)",
        "hostile": "<script>window.pwned=1</script>",
        "six negatives": "and 2 more negatives",
    }
    for name, one in there.items():
        widget.chosen = one.query_id
        page.locator(f"[data-id={one.query_id}]").click()
        until(
            page,
            lambda one=one: (
                chosen_of(page) == one.query_id and "…" not in page.locator(".m2i-frame").all_inner_texts()
            ),
            name,
        )
        assert said.get(name, "") in page.locator(".m2i-detail").inner_text(), name
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, name
    assert page.evaluate("window.pwned === undefined") and page.locator("#here script").count() == 0
    page.evaluate("window.closeWidget()")
    assert page.locator(".m2i").count() == 1


# ------------------------------------------------------------------------------------------- the widget in JupyterLab

CELL = """
import numpy as np, pandas as pd
from PIL import Image
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item, Product
from moon2_lab.data.triplets import Triplet
from moon2_lab.widgets.triplets import FilterInspector

def one(number):
    picture = ImageRef.from_pil(Image.new("RGB", (64, 64), (number * 8 % 255, 90, 160)))
    products = []
    for place in (0, 1):
        title, key = f"mug {number} <b>{place}</b>", 10 * number + place
        products.append(Product(f"p{number}-{place}", title, refs=(picture,), key=key))
    return Triplet(f"q{number:02}", Item(f"query {number}", picture), products[0], products[1:])

triplets = [one(number) for number in range(30)]
phis = {name: np.linspace(0.99, 0.01, 30) for name in ("phi_t", "phi_i", "phi_mm")}
phi = pd.DataFrame({"query_id": [each.query_id for each in triplets]} | phis)
inspector = FilterInspector(triplets, phi, path="verdicts.json")
inspector
"""


@pytest.fixture
def lab(tmp_path):
    "A JupyterLab with the inspector; its address."
    with jupyter_lab(
        tmp_path,
        [
            CELL,
            "print('seen', {name: entry.kind for name, entry in inspector.verdicts.entries.items()}, inspector.page)",
            "inspector.order = 'high'; inspector.judge('q00', 'put_back')",
        ],
    ) as address:
        yield address


@pytest.mark.slow
def test_inspector_in_jupyterlab(lab, browser, tmp_path):
    """It renders, pages, sorts; p, d and u change Python's verdicts and the file; Python changes the picture;
    JupyterLab's own keys stay away; nothing is asked of the outside.
    """
    page = browser.new_page(viewport={"width": 1300, "height": 1100})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    open_notebook(page, lab)
    run_cell(page, 0)
    page.locator(".jp-OutputArea .m2i-row").first.wait_for(timeout=60_000)
    until(page, lambda: page.locator(".m2i-detail img").count() == 3, "the pictures")
    assert page.locator(".m2i-detail img").first.evaluate("one => one.complete && one.naturalWidth > 0")
    order = [f"q{number:02}" for number in range(29, -1, -1)]
    assert rows_of(page) == order[:PAGE] and page.locator(".m2i b:text-is('1')").count() == 0
    page.get_by_role("button", name="Next").click()
    until(page, lambda: rows_of(page) == order[PAGE : 2 * PAGE], "the second page")
    page.locator(".m2i-row").nth(1).click()
    until(page, lambda: chosen_of(page) == order[PAGE + 1], "a click")
    for key in ("d", "ArrowDown", "p", "ArrowDown", "d"):
        page.keyboard.press(key)
    until(page, lambda: "1 put back, 2 dropped" in page.locator(".m2i-counts").inner_text(), "three verdicts")
    page.locator(".m2i-figures img").first.click()
    page.keyboard.press("u")
    until(
        page,
        lambda: "1 put back, 1 dropped" in page.locator(".m2i-counts").inner_text(),
        "undo, after a click beside the list",
    )
    assert page.locator(".jp-Notebook .jp-CodeCell").count() == 3, "d d would have deleted a cell"
    keep_screenshot(page, "inspector-lab.png")
    run_cell(page, 1)
    page.get_by_text(f"seen {{'{order[PAGE + 1]}': 'drop', '{order[PAGE + 2]}': 'put_back'}} 1").first.wait_for(
        timeout=30_000
    )
    assert Verdicts.load(tmp_path / "verdicts.json").counts() == {"put_back": 1, "drop": 1}
    run_cell(page, 2)
    until(
        page,
        lambda: (
            rows_of(page) == order[::-1][:PAGE] and "2 put back, 1 dropped" in page.locator(".m2i-counts").inner_text()
        ),
        "what Python sets",
    )
    assert outside(asked, lab) == []
    page.close()
