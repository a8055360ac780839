"""A pause of the collector ends as it began, whatever happens inside."""

import gc

import pytest

from meshwright.pause import uncollected


@uncollected()
def outer() -> None:
    inner()
    assert not gc.isenabled()
    raise ValueError("inside")


@uncollected()
def inner() -> None:
    assert not gc.isenabled()


def test_the_collector_is_put_back() -> None:
    with pytest.raises(ValueError, match="inside"):
        outer()
    assert gc.isenabled()
