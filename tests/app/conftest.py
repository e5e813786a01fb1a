"What the browser tests of the demo share."
from pathlib import Path

import pytest
from moon2_lab import Moon2Encoder
from moon2_lab.data.catalog import Catalog

FOLDER = Path(__file__).resolve().parents[2] / "data" / "pretrained"


@pytest.fixture(scope="module")
def pretrained() -> Moon2Encoder:
    "The trained model of the repository."
    return Moon2Encoder.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def its_catalog() -> Catalog:
    "The drawn products that it searches."
    from moon2_lab.app.interface import pretrained_catalogue

    return Catalog.load(pretrained_catalogue())


@pytest.fixture(scope="module")
def its_demo(pretrained, its_catalog):
    "The page that `make app` shows of both."
    from moon2_lab.app.interface import build_demo

    return build_demo(pretrained, catalog=its_catalog, names=("data/pretrained",))


@pytest.fixture(scope="module")
def address(demo) -> str:
    "The running page of the module's `demo`."
    from bench.demo_load import free_port
    from moon2_lab.app.interface import serve

    yield serve(demo, port=free_port(), wait=False)
    demo.close(verbose=False)
