"""A tiny model under stress on the committed sample: what must not change does not, and the page in a browser."""
import json

import numpy as np
import pytest
from moon2_lab.data.catalog import Catalog
from moon2_lab.evaluation.evaluate import run_benchmark
from moon2_lab.evaluation.protocol import make_benchmark
from moon2_lab.reporting.stress_report import write_stress_page
from moon2_lab.studies.modality_stress import STRESSES, stress_study, stressed_set, swap_partners, touches
from small import shop, tiny

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def sample(root):
    return Catalog.load(root / "data" / "sample")


@pytest.fixture(scope="module")
def study(sample):
    return stress_study(tiny(perturbed=True), sample, "all")


class Counted:
    "An encoder that counts what it is asked for."

    def __init__(self, encoder):
        self.encoder, self.fingerprint, self.calls = encoder, encoder.fingerprint, 0

    def encode_views(self, items):
        self.calls += 1
        return self.encoder.encode_views(items)


def test_recalls_as_they_are_are_those_of_the_evaluation(study, sample):
    metrics = run_benchmark(tiny(perturbed=True), make_benchmark(sample, "all"), False, False, 0).metrics["directions"]
    for row in study.falls.to_dict("records"):
        assert row["value"] == pytest.approx(metrics[row["direction"]][row["metric"]]["value"])
        assert row["difference"] == pytest.approx(row["stressed"] - row["value"])


def test_an_untouched_view_is_not_asked_and_a_touched_one_is(study):
    for row in study.falls.to_dict("records"):
        query, gallery = row["direction"].split("->")
        view = gallery if row["side"] == "gallery" else query.replace("dual", "t")
        assert touches(row["stress"], view)
    assert {"t->i", "i->t"} <= set(study.falls[study.falls.stress == "swap_picture"].direction)


def test_a_swapped_right_answer_is_not_found_by_its_other_modality(study):
    "With all pictures swapped a title finds its picture in t->i no better than chance does."
    chance = study.falls.query("stress == 'swap_picture' and direction == 't->i' and metric == 'R@10'")
    assert (chance.stressed <= 0.5).all()


@pytest.mark.parametrize("mixed", [False, True])
def test_swaps_are_of_other_products_and_give_each_item_what_it_had(mixed):
    items = make_benchmark(shop(48, mixed=mixed), "all").gallery
    for part, stress in (("image", "swap_picture"), ("text", "swap_title")):
        partners = swap_partners(items, part)
        new, changed = stressed_set(items, stress)
        assert all(items.group[a] != items.group[b] for a, b in partners.items())
        assert [item.has_image for item in new.items] == [item.has_image for item in items.items]
        assert [item.has_text for item in new.items] == [item.has_text for item in items.items]
        assert changed.sum() == len(partners)


def test_products_with_one_modality_stay_whole():
    items = make_benchmark(shop(48, mixed=True), "all").gallery
    for stress in STRESSES:
        new, changed = stressed_set(items, stress)
        assert all(item.has_text or item.has_image for item in new.items)
        if stress.startswith("drop"):
            both = np.array([item.has_text and item.has_image for item in items.items])
            assert (changed == both).all()


def test_every_set_is_encoded_once_for_each_stress(sample):
    counted = Counted(tiny())
    stress_study(counted, sample, "all", limit=20)
    assert counted.calls <= 1 + 4 * (1 + len(STRESSES))  # the crossed products; four sets of items


def test_limit_and_split_are_those_of_the_evaluation(sample):
    found = stress_study(tiny(), sample, "all", limit=20)
    assert found.about["limit"] == 20 and set(found.falls[found.falls.direction == "t->mm"].n) == {20}


def test_page_in_a_browser(study, browser, tmp_path):
    from browsing import keep_screenshot

    path = write_stress_page(study, tmp_path, "tiny <model>")
    page, asked, said = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(path.as_uri())
    keep_screenshot(page, "stress.png")
    assert asked == [page.url] and not said
    assert page.locator("h1").inner_text().endswith("tiny <model>")
    directions = set(study.falls.direction)
    assert page.locator(".forest > div:not(.axis-row)").count() == len(directions)
    assert page.locator("#tests tbody tr").count() == len(study.falls[study.falls.metric == "R@10"])
    assert page.locator("#conflict tbody tr").count() == 3
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth + 1")
    page.close()


def test_command_prints_one_object_and_writes_the_page(moon2, root, tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    catalog, out = root / "data" / "sample", tmp_path / "stress.html"
    words = ("stress", tmp_path / "model", "--catalog", catalog, "--split", "all", "--limit", 16, "--device", "cpu")
    code, shown, _ = moon2(*words, "--out", out, "--json")
    facts = json.loads(shown)
    assert code == 0 and facts["page"] == str(out) and out.is_file()
    assert facts["leans"] in ("words", "picture", "neither") and facts["protocol"]["limit"] == 16
    code, shown, err = moon2("stress", tmp_path / "model")
    assert code == 2 and "--catalog" in err
