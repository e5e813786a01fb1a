"""Augmented catalogues: training sees what was added, evaluation never does."""

import dataclasses
import json

import pandas as pd
import pytest
from moon2_lab.data.catalog import Catalog
from moon2_lab.data.catalog_tables import AUGMENTED_COLUMNS, AUGMENTED_FILE
from moon2_lab.data.synthetic.generator import make_catalog
from moon2_lab.errors import DataError
from moon2_lab.evaluation.evaluate import evaluate
from moon2_lab.files import write_parquet
from moon2_lab.training.trainer import Trainer
from small import augmented_shop, settings, shop, tiny

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(*given):
    "A table of augmentations; each is (product id, field, value, changes)."
    return pd.DataFrame(
        [
            dict.fromkeys(AUGMENTED_COLUMNS)
            | {"product_id": name, "field": field, "kind": "text", "value": value, "kept": True}
            | more
            for name, field, value, more in given
        ],
        columns=AUGMENTED_COLUMNS,
    )


@pytest.fixture
def drawn(tmp_path):
    "A drawn catalogue, its train products and one of each other split."
    folder = make_catalog(tmp_path / "drawn", products=60, seed=5, image_size=64)
    catalog = Catalog.load(folder)
    train = [product for product in catalog if product.split == "train"]
    return (
        folder,
        train,
        {name: next(product for product in catalog if product.split == name) for name in ("valid", "test")},
    )


def expanded_file(folder, product, name):
    "A copy of a product's picture as an expanded one."
    path = folder / "expanded" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / product.image_paths[1]).read_bytes())
    return f"expanded/{name}"


def test_train_products_get_what_was_added(drawn):
    folder, train, _ = drawn
    path = expanded_file(folder, train[0], "a.jpg")
    write_parquet(
        folder / AUGMENTED_FILE,
        rows(
            (train[0].product_id, "enriched_title", "A better title", {}),
            (train[0].product_id, "expanded_image", path, {}),
            (train[1].product_id, "enriched_title", "Refused", {"kept": False}),
        ),
    )
    catalog = Catalog.load(folder)
    product = catalog.get(train[0].product_id)
    assert (product.enriched_title, len(product.expanded), len(catalog.quarantine)) == ("A better title", 1, 0)
    assert catalog.get(train[1].product_id) == train[1] and len(catalog.augmentation) == 3
    assert catalog.split("train").get(train[0].product_id) == product and catalog.summary()["augmented"] == {
        "titles": 1,
        "pictures": 1,
    }


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_products_never_do(drawn, split):
    "A row that names one is set aside with product, file and reason; the product stays as it was."
    folder, train, others = drawn
    path = expanded_file(folder, train[0], "a.jpg")
    write_parquet(
        folder / AUGMENTED_FILE,
        rows(
            (others[split].product_id, "enriched_title", "Sneaked in", {}),
            (others[split].product_id, "expanded_image", path, {}),
        ),
    )
    catalog = Catalog.load(folder)
    assert catalog.get(others[split].product_id) == others[split]
    assert catalog.quarantine[["product_id", "file"]].drop_duplicates().values.tolist() == [
        [others[split].product_id, AUGMENTED_FILE]
    ]
    assert set(catalog.quarantine.reason) == {f"augmented outside train: split {split}"}


def test_an_expanded_picture_is_no_original(drawn):
    "A table that lists an expanded picture as a product's own picture loses that picture, not the product."
    folder, train, others = drawn
    path = expanded_file(folder, train[0], "a.jpg")
    write_parquet(folder / AUGMENTED_FILE, rows((train[0].product_id, "expanded_image", path, {})))
    table = pd.read_parquet(folder / "products.parquet")
    listed = table.product_id == others["test"].product_id
    table.loc[listed, "image_paths"] = json.dumps([path, *others["test"].image_paths])
    table.to_parquet(folder / "products.parquet")
    catalog = Catalog.load(folder)
    product = catalog.get(others["test"].product_id)
    assert product.image_paths == others["test"].image_paths and product.main_set_aside
    assert catalog.quarantine.reason.tolist() == ["augmented picture: listed as an original"]


def test_bad_rows_are_set_aside(drawn):
    folder, train, _ = drawn
    (folder / "expanded").mkdir()
    (folder / "expanded" / "text.jpg").write_text("no picture")
    name = train[0].product_id
    write_parquet(
        folder / AUGMENTED_FILE,
        rows(
            ("nobody", "enriched_title", "x", {}),
            (name, "enriched_title", " ", {}),
            (name, "price", "x", {}),
            (name, "expanded_image", "expanded/none.jpg", {}),
            (name, "expanded_image", "expanded/text.jpg", {}),
            (name, "expanded_image", "../outside.jpg", {}),
            (name, "enriched_title", "First", {}),
            (name, "enriched_title", "Second", {}),
        ),
    )
    catalog = Catalog.load(folder)
    assert catalog.get(name).enriched_title == "First" and catalog.get(name).expanded == ()
    classes = catalog.quarantine.reason.str.split(":").str[0].tolist()
    assert (
        classes[:3] == ["unknown product", "empty value", "unknown field"]
        and classes[-1] == "second title"
        and len(classes) == 7
    ), catalog.quarantine


def test_a_table_without_its_columns(drawn):
    folder, *_ = drawn
    pd.DataFrame({"product_id": ["a"]}).to_parquet(folder / AUGMENTED_FILE)
    with pytest.raises(DataError, match="no column field, value, kept.*columns found: product_id"):
        Catalog.load(folder)


def test_the_evaluation_is_the_same_with_and_without():
    "Every number of metrics.json but hash and times, for an encoder with weights of its own."
    plain, augmented = shop(60), augmented_shop(60)
    assert plain.data_hash != augmented.data_hash and any(product.expanded for product in augmented)
    encoder = tiny(perturbed=True).eval()
    one, other = (evaluate(encoder, catalog, split="all", resamples=20) for catalog in (plain, augmented))
    for metrics in (one, other):
        metrics.pop("timing")
        metrics["protocol"].pop("catalog_hash")
    assert one == other


@pytest.mark.parametrize(
    "fields", [{}, {"expanded_images": "all"}, {"expanded_images": "none", "enriched_titles": False}], ids=str
)
def test_training_uses_it_and_caches_what_it_uses(fields):
    plain, augmented = (
        Trainer(tiny(), shop(), settings(max_steps=2)),
        Trainer(tiny(), augmented_shop(), settings(max_steps=2, **fields)),
    )
    here, there = ({ref.key for ref in trainer.needed_images()} for trainer in (plain, augmented))
    added = {ref.key for product in augmented_shop() for ref in product.expanded}
    uses = fields.get("expanded_images") != "none"
    assert there - here == (added if uses else set())
    augmented.prepare_features()
    assert not augmented.encoder.backbone.missing_features(augmented.needed_images())
    histories = plain.train(), augmented.train()
    assert (histories[0].tokens[0] == histories[1].tokens[0]) == (not uses)
    assert (plain.encoder.fingerprint == augmented.encoder.fingerprint) == (not uses)


def test_every_expanded_picture_has_its_turn():
    "One a step, the next step the next: after as many steps as there are pictures each was used."
    product = next(product for product in augmented_shop() if len(product.expanded) == 2)
    used = [product.training_item(turn=turn).expanded[0].key for turn in range(4)]
    assert used[:2] == used[2:] and set(used) == {ref.key for ref in product.expanded}
    assert dataclasses.replace(product, refs=()).training_item().pictures == ()
