"Which variants of a test `make test` runs; `make test-all` runs all."
import pytest


def few(variants, *fast):
    "The variants for `parametrize`, in their order; all but those named are marked slow."
    assert all(value in variants for value in fast), fast
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in variants]


def fast_and_slow(fast, slow):
    "The variants for `parametrize`: two lists, of which the second is marked slow."
    return [*fast, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]
