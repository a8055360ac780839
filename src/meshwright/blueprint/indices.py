"""Blocks that know their own number: is it used? Many libraries give a layer its index; few layers compute with it.

If an attribute holds the block's position in every block of a list, it is hidden while the first of them is captured,
behind an object that refuses every use. A capture that succeeds proves that the blocks which differ in that number only
compute the same.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn

Place = tuple[str, str]
"""A module's path inside its block, and an attribute of it."""


class IndexUsed(Exception):
    """A block computes with its own number."""


class _Hidden:
    """Stands for a number that must not be looked at."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise IndexUsed

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __hash__ = __bool__ = __int__ = __index__ = __float__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = _refuse
    __truediv__ = __rtruediv__ = __rfloordiv__ = __pow__ = __neg__ = __and__ = __or__ = __str__ = __repr__ = _refuse


def index_attributes(model: nn.Module, blocks: list[str], structures: dict[int, int]) -> dict[str, frozenset[Place]]:
    """For each block the attributes that hold its position, if they do in every block of the same list and structure."""
    families: dict[tuple[str, int], list[str]] = defaultdict(list)
    for block in blocks:
        parent, _, last = block.rpartition(".")
        if last.isdigit():
            families[parent, structures[id(model.get_submodule(block))]].append(block)
    found: dict[str, frozenset[Place]] = {}
    for members in families.values():
        if len(members) > 1:
            shared = frozenset.intersection(*(_equal_to_index(model, block) for block in members))
            found.update(dict.fromkeys(members, shared))
    return found


def _equal_to_index(model: nn.Module, block: str) -> frozenset[Place]:
    index = int(block.rpartition(".")[2])
    places = set()
    for path, module in model.get_submodule(block).named_modules():
        places |= {(path, name) for name, value in vars(module).items() if type(value) is int and value == index}
    return frozenset(places)


@contextlib.contextmanager
def hidden(block: nn.Module, places: frozenset[Place]) -> Iterator[None]:
    """Hide the attributes within the block, and put them back whatever happens."""
    kept = [(block.get_submodule(path), name) for path, name in places]
    values = [vars(module)[name] for module, name in kept]
    try:
        for module, name in kept:
            vars(module)[name] = _Hidden()
        yield
    finally:
        for (module, name), value in zip(kept, values, strict=True):
            vars(module)[name] = value
