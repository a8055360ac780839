"""Initial values from safetensors files, read by name and rows: no rank holds more of them than its share of one tensor.

The format is a JSON header (name -> dtype, shape, byte range) and the bytes, so a rank reads its own rows and nothing else.
Source: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from meshwright.errors import ConfigError, ModelError
from meshwright.parallel.parameters import Parameter

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LARGEST_HEADER = 100 << 20  # the format's own limit


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    dtype: torch.dtype
    shape: torch.Size


class Weights:
    """The tensors of one safetensors file, or of all in a directory."""

    def __init__(self, path: Path) -> None:
        """Read the headers. Raises `ConfigError` for a path that has no such file, or a damaged one."""
        self.path = path
        self._places: dict[str, _Place] = {}
        for file in _files(path):
            self._places |= _header(file)

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._places

    def check(self, table: list[Parameter], buffers: dict[str, Tensor]) -> None:
        """Raise `ModelError` unless the files have every parameter (by one of its names), in its shape, and nothing unknown."""
        for entry in table:
            name = self._name(entry.names)
            if name is None:
                raise ModelError(f"{self.path} has no tensor {entry.name!r}, which the model needs")
            if self._places[name].shape != entry.whole:
                found, wanted = list(self._places[name].shape), list(entry.whole)
                raise ModelError(f"{self.path}: {name!r} has shape {found} there and {wanted} in the model")
        known = {name for entry in table for name in entry.names} | buffers.keys()
        unknown = next((name for name in self._places if name not in known), None)
        if unknown is not None:
            raise ModelError(f"{self.path} has a tensor {unknown!r}, which the model does not know: it is of another model")
        wrong = next((name for name, buffer in buffers.items() if name in self and self._places[name].shape != buffer.shape), None)
        if wrong is not None:
            raise ModelError(f"{self.path}: the buffer {wrong!r} has another shape there than in the model")

    def read(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Return the tensor that has one of `names`, or its `rows` (first, count), as it is stored, on the CPU."""
        place = self._places[self._name(names) or names[0]]
        shape, skipped = place.shape, 0
        if rows is not None:
            width = place.shape[1:].numel()
            shape, skipped = torch.Size((rows[1], *place.shape[1:])), rows[0] * width * place.dtype.itemsize
        memory = torch.empty(shape.numel() * place.dtype.itemsize, dtype=torch.uint8)
        with place.file.open("rb") as file:
            file.seek(place.offset + skipped)
            if file.readinto(cast(Any, memory.numpy())) != len(memory):
                raise ConfigError(f"{place.file} is damaged: it ends within {names[0]!r}")
        return memory.view(place.dtype).view(shape)

    def _name(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._places), None)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    if index is not None:
        found = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        missing = next((file for file in found if not file.is_file()), None)
        if missing is not None:
            raise ConfigError(f"weights={path}: {index.name} names {missing.name}, which is not there")
    if not found:
        raise ConfigError(f"weights={path}: there is no safetensors file there")
    return found


def _header(path: Path) -> dict[str, _Place]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError(length)
            header = json.loads(file.read(length))
        size = path.stat().st_size
        places = {}
        for name, entry in header.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                places[name] = _Place(path, 8 + length + first, _DTYPES[entry["dtype"]], torch.Size(entry["shape"]))
                if places[name].shape.numel() * places[name].dtype.itemsize != last - first or 8 + length + last > size:
                    raise ValueError(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no complete safetensors file") from error
    return places
