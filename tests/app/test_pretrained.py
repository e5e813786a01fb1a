"The trained model of the repository: what lies there, that its scores are its own, and that it finds what is asked."
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from small import pretrained

from moon2_lab import Item, Moon2Encoder
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.synthetic.drawn_catalogue import drawn_catalogue
from moon2_lab.files import read_json

FOLDER = Path(__file__).resolve().parents[2] / "data" / "pretrained"
KINDS = {
    "Dresses": "dress", "Mugs": "mug", "Sneakers": "sneakers", "Handbags": "handbag", "Table Lamps": "table lamp",
    "Cameras": "camera", "Trousers": "trousers", "Hats": "hat",
}


@pytest.fixture(scope="module")
def untrained():
    "The same shape before training; skips where the backbone cannot be had."
    shape = read_json(FOLDER / "config.json")["encoder"]
    with pytest.MonkeyPatch.context() as patch:
        yield pretrained(patch, **{name: shape[name] for name in ("num_layers", "image_size", "visual_tokens")}).eval()


@pytest.fixture(scope="module")
def encoder(untrained):
    return Moon2Encoder.from_pretrained(FOLDER)


def test_the_files_are_whole_and_small():
    "At most 8 MB of weights, every file of the list as it was written, and the command that made them in the card."
    sums = dict(line.split()[::-1] for line in (FOLDER / "SHA256SUMS").read_text().splitlines())
    assert "trained.safetensors" in sums
    for name, told in sums.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == told, name
    assert (FOLDER / "trained.safetensors").stat().st_size <= 8_000_000
    assert "python scripts/make_pretrained.py" in (FOLDER / "README.md").read_text()


def test_its_scores_are_of_these_weights(encoder):
    metrics = read_json(FOLDER / "metrics.json")
    assert metrics["protocol"]["model"] == encoder.fingerprint
    assert metrics["protocol"]["split"] == "test" and metrics["directions"]["t->mm"]["n_queries"] >= 300


def right_hits(encoder, catalog, phrases) -> tuple[float, float]:
    "Of the first three hits of each phrase: the share of the right kind, and of the right kind and colour."
    vectors = encoder.encode(catalog.products, view="mm")
    scores = np.nan_to_num(encoder.encode([Item(text, None) for text in phrases]) @ vectors.T, nan=-1)
    found = [(phrase, catalog[int(place)]) for phrase, row in zip(phrases.values(), scores)
             for place in np.argsort(-row)[:3]]
    kind = np.mean([product.category_l3 == wanted for (_, wanted), product in found])
    both = np.mean([(product.attributes.get("colour"), product.category_l3) == wanted for wanted, product in found])
    return kind, both


@pytest.mark.slow
def test_a_red_dress_is_found(encoder, untrained):
    """Every colour and kind of which there are three among 400 products of another catalogue than it was trained on: 25
    phrases of two words. Measured: 97 % of the hits of the right kind, 76 % of kind and colour; untrained 79 and 27 %.
    """
    catalog = Catalog.load(drawn_catalogue(400, 7, noise=0))
    count = Counter((product.attributes.get("colour"), product.category_l3) for product in catalog)
    asked = sorted(pair for pair, number in count.items() if number >= 3 and pair[0] and pair[1] in KINDS)
    phrases = {f"{colour} {KINDS[kind]}": (colour, kind) for colour, kind in asked}
    assert len(phrases) >= 20
    kind, both = right_hits(encoder, catalog, phrases)
    assert kind > 0.9 and both > 0.65
    assert right_hits(untrained, catalog, phrases)[1] < both - 0.3


def test_the_demo_opens_it(untrained, monkeypatch, tmp_path):
    "Without a run of one's own, `make app` shows this model on drawn products of a seed it was not trained on."
    interface = pytest.importorskip("moon2_lab.app.interface")
    pages = []
    monkeypatch.setattr(interface, "serve", lambda page, *how: pages.append(page))
    monkeypatch.setitem(interface._DRAWN, "products", 40)
    assert interface.run_demo([], tmp_path / "no-run", FOLDER, tmp_path / "no-sample") == 0
    service = pages[0].service
    assert service.models["A"].encoder.fingerprint == read_json(FOLDER / "metrics.json")["protocol"]["model"]
    assert "Mug" in service.search("red mug", None, "mm", 3)["hits"][0]["title"]
    assert interface._DRAWN["seed"] != read_json(FOLDER / "run_settings.json")["config"]["seed"]
