"The study of transfer, bench/studies/transfer.py, on two drawn shops."
import sys
from dataclasses import replace

import pandas as pd
import pytest
from moon2_lab.data.catalog import Catalog
from small import settings, shop

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def transfer(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "bench" / "studies"))
    yield __import__("transfer")
    for name in ("transfer", "common"):
        sys.modules.pop(name, None)


def test_each_arm_trains_on_its_catalogues_and_is_scored_on_what_it_has_not_seen(transfer, tmp_path):
    catalogs = {"home": split_shop("home", 0, 40), "away": split_shop("away", 40, 75)}
    config = settings(query_variants=1, max_steps=2)
    for arm in ("first", "union"):
        transfer.score(catalogs, arm, config, tmp_path, 0)
    table = transfer.table(tmp_path)
    asked = set(table[["arm", "catalogue", "split"]].itertuples(index=False, name=None))
    first = {("first", "home", "test"), ("first", "away", "test"), ("first", "away", "all")}
    assert asked == first | {("union", "home", "test"), ("union", "away", "test")}
    tests = transfer.tests(catalogs, tmp_path, [0])
    assert set(tests.catalogue) == {"home", "away"} and tests.p_holm.between(0, 1).all()
    kept = (tmp_path / "union-0" / "model" / "model.safetensors").stat().st_mtime_ns
    transfer.score(catalogs, "union", config, tmp_path, 0)  # nothing is missing
    assert (tmp_path / "union-0" / "model" / "model.safetensors").stat().st_mtime_ns == kept
    pd.testing.assert_frame_equal(transfer.table(tmp_path), table)


def split_shop(name, start, stop):
    "Some products of a shop under ids of their own, its valid split to test."
    some = list(shop(stop))[start:]
    changed = {"train": "train", "valid": "test"}
    return Catalog.from_products(
        [replace(product, product_id=f"{name}-{product.product_id}", split=changed[product.split]) for product in some]
    )
