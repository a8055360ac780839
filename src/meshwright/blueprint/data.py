"""Frozen dataclasses to plain data and back, driven by their annotations: the JSON form of a Blueprint.

A record becomes the list of its fields' values in order, since a blueprint holds thousands of small ones; the outermost
carries the field names, so that a file written by another version is refused and not misread.
"""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar

Record = TypeVar("Record")


def to_data(record: Any) -> dict[str, Any]:
    """Plain lists, numbers and strings for a frozen dataclass, with the layout of every class in it."""
    layouts: dict[str, list[str]] = {}
    return {"class": type(record).__name__, "record": _plain(record, layouts), "layouts": layouts}


def from_data(kind: type[Record], data: dict[str, Any]) -> Record:
    """The record that `to_data` took apart. Raises `ValueError` if it was written with other classes or fields."""
    if data["class"] != kind.__name__:
        raise ValueError(f"holds a {data['class']}")
    return typing.cast(Record, _rebuild(kind, data["record"], data["layouts"]))


def _plain(value: Any, layouts: dict[str, list[str]]) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        layouts.setdefault(type(value).__name__, names)
        return [_plain(getattr(value, name), layouts) for name in names]
    if isinstance(value, tuple):
        return [_plain(item, layouts) for item in value]
    return value


@cache
def _fields(kind: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in dataclasses.fields(kind)]


def _rebuild(kind: Any, value: Any, layouts: dict[str, list[str]]) -> Any:
    origin = typing.get_origin(kind)
    if origin in (UnionType, typing.Union):
        rest = [option for option in typing.get_args(kind) if option is not NoneType]
        return None if value is None else _rebuild(rest[0], value, layouts)
    if origin is tuple:
        kinds = typing.get_args(kind)
        if kinds[-1] is Ellipsis:
            return tuple(_rebuild(kinds[0], item, layouts) for item in value)
        return tuple(_rebuild(each, item, layouts) for each, item in zip(kinds, value, strict=True))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = _fields(kind)
        if layouts.get(kind.__name__, []) != [name for name, _ in fields]:
            raise ValueError(f"its {kind.__name__} has other fields than this version's")
        values = [_rebuild(hint, item, layouts) for (_, hint), item in zip(fields, value, strict=True)]
        return typing.cast(Any, kind)(*values)
    return value
