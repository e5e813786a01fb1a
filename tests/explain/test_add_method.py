"""A method of explanation from outside the package: one `add_method`, and explainer, widget, page and command know
it.
"""

import json

import numpy as np
import pytest

from moon2_lab.cli.main import main
from moon2_lab.data.images import ImageRef
from moon2_lab.data.products import Item
from moon2_lab.data.synthetic.generator import draw_product
from moon2_lab.errors import UsageError
from moon2_lab.explain.attribution import METHODS, Method, add_method, fitting_methods
from moon2_lab.explain.explainer import Explainer
from moon2_lab.model.encoder import Moon2Encoder
from moon2_lab.reporting.heatmap_page import heat_page
from moon2_lab.widgets.heatmap import heatmap

pytestmark = [pytest.mark.usefixtures("own_cache"), pytest.mark.filterwarnings("ignore:attention=bidirectional")]


def vector_length(side):
    "How long the vectors of each feature are, to a power."
    lengths = [part[0].norm(dim=-1).numpy() ** side.settings["power"] for part in side.inputs]
    return side.sum_tokens(lengths)


@pytest.fixture
def own_method():
    "The method of this test, in the registry while it runs."
    about = "how long the vectors of each feature are; it knows nothing of the score"
    yield add_method(Method("vector_length", "vector length", about, vector_length, settings={"power": 1}))
    del METHODS["vector_length"]


def tiny():
    return Moon2Encoder.from_backbone("tiny", num_layers=2, image_size=64).eval()


def pair():
    "A shopper's words, and a product with a picture."
    drawn = draw_product(3, 1, image_size=96)
    return Item("red mug", None, "query"), Item(drawn.title, ImageRef.from_pil(drawn.pictures[0]), "item")


def test_the_explainer_has_it(own_method):
    "Its numbers, its title, its settings, and how faithful it is."
    explainer = Explainer(tiny(), *pair(), trials=5)
    assert explainer.methods[-1] == "vector_length" and fitting_methods()[-1] == "vector_length"
    maps = explainer.maps(["vector_length"])
    found = maps.item.maps["vector_length"]
    assert found.title == "vector length" and found.settings == {"power": 1} and found.patches.shape == (4, 4)
    assert maps.titles == {"vector_length": "vector length"} and len(maps.item.faith["vector_length"].random) == 5
    squared = explainer.map("item", "vector_length", power=2)
    assert squared.settings == {"power": 2} and np.allclose(squared.patches, found.patches**2)


def test_the_widget_and_the_page_have_it(own_method):
    "In the widget's list by its title, computed when it is chosen; drawn by the page without a word more."
    widget = heatmap(tiny(), *pair(), trials=0)
    assert widget.offered[-1] == "vector_length" and widget.payload["names"]["vector_length"] == "vector length"
    widget.request("vector_length", wait=120)
    assert widget.job["state"] == "done" and "vector_length" in widget.found["item"]
    assert "vector length" in heat_page(widget.maps, "vector_length")


def test_the_command_has_it(own_method, drawn_catalogue, tmp_path, capsys):
    "`moon2 heatmap --method`, and the list that a wrong name is answered with."
    tiny().save_pretrained(tmp_path / "model")
    words = ["heatmap", str(tmp_path / "model"), "--catalog", str(drawn_catalogue), "--query", "red mug"]
    words += ["--item-text", "a nice red mug", "--quick", "--out", str(tmp_path / "map.html"), "--json", "--method"]
    assert main([*words, "vector_length"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {(fact["side"], fact["method"]) for fact in facts["maps"]} == {
        (side, "vector_length") for side in ("query", "item")
    }
    assert "vector length" in (tmp_path / "map.html").read_text()
    assert main([*words, "guess"]) == 2 and "vector_length" in capsys.readouterr().err


def test_names_are_taken_once_and_settings_belong_to_methods(own_method):
    "What the registry refuses; after a method is taken out, so are its settings."
    with pytest.raises(UsageError, match="'ig' is taken"):
        add_method(Method("ig", "mine", "", vector_length))
    with pytest.raises(UsageError, match="'Vector length' is no name"):
        add_method(Method("Vector length", "mine", "", vector_length))
    explainer = Explainer(tiny(), *pair(), trials=0)
    assert explainer.map("query", "gradient", power=2).words.shape == (2,)
    own = METHODS.pop("vector_length")
    with pytest.raises(UsageError, match="unknown settings .'power'."):
        explainer.map("query", "gradient", power=3)
    METHODS[own.name] = own
