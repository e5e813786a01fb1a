"""What every test file may use: markers that skip with a reason, and a small drawn catalogue."""
import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """A shell starts background jobs with SIGINT ignored; the tests of interrupts need it, here and in their child
    processes.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _no_gpu():
    import torch

    return not torch.cuda.is_available()


def pytest_collection_modifyitems(items):
    """`data` tests need MOON2_DATA, `gpu` tests a CUDA device; without them they are skipped and say so. The device of
    test_device.py is made first: torch takes no new device after the first backward pass of a process.
    """
    if any(item.path.name == "test_device.py" for item in items):
        import fake_device

        if fake_device.possible():
            fake_device.start()
    if not os.environ.get("MOON2_DATA"):
        for item in items:
            if item.get_closest_marker("data"):
                item.add_marker(pytest.mark.skip(reason="MOON2_DATA is not set: no real catalogue to test on"))
    wanting_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if wanting_gpu and _no_gpu():
        for item in wanting_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    "The repository's root folder."
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    "The folder of the real data sets (only in tests marked `data`)."
    return Path(os.environ["MOON2_DATA"])


@pytest.fixture(scope="session")
def drawn_catalogue(tmp_path_factory) -> Path:
    "A folder with 80 drawn products: enough for every split, small enough for seconds."
    from moon2_lab.data.synthetic.generator import make_catalog

    folder = tmp_path_factory.mktemp("catalogue")
    make_catalog(folder, products=80, seed=3)
    return folder


@pytest.fixture
def moon2(capsys):
    "Run a command in this process: (exit code, stdout, stderr)."
    from moon2_lab.cli.main import main

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    "A cache of the test file's own: vectors and features of drawn pictures do not belong into anybody's cache."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOON2_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium."
    from browsing import CHROMIUM, FLAGS

    if CHROMIUM is None:
        pytest.skip("no chromium: sh scripts/system_packages.sh installs it")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()
