"Which variants of a test `make test` runs; `make test-all` runs all."
import pytest


def few(variants, *fast):
    "The variants for `parametrize`, in their order; all but those named are marked slow."
    assert all(value in variants for value in fast), fast
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in variants]


def slow(*values):
    "A variant of several arguments for `parametrize`, marked slow."
    return pytest.param(*values, marks=pytest.mark.slow)


# widths and colour schemes of a page
LOOKS = [(400, "dark"), slow(400, "light"), slow(1200, "dark"), slow(1200, "light")]
PHONES = [
    {"viewport": {"width": 420, "height": 900}, "color_scheme": "dark"},
    slow({"viewport": {"width": 420, "height": 900}, "color_scheme": "light"}),
]
