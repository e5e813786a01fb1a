"What the browser tests of the demo share."
import pytest


@pytest.fixture(scope="module")
def address(demo) -> str:
    "The running page of the module's `demo`."
    from bench.demo_load import free_port
    from moon2_lab.app.interface import serve

    yield serve(demo, port=free_port(), wait=False)
    demo.close(verbose=False)
