"""Initial values from safetensors files, read by name and rows: no rank holds more of them than its share of one tensor.

The format is the library's business; which tensors a model needs, and which rows of them a rank, is decided here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meshwright.errors import ConfigError, ModelError
from meshwright.parallel.parameters import Parameter


@dataclass(frozen=True)
class _Place:
    file: Path
    shape: torch.Size
    floats: bool


class Weights:
    """The tensors of one safetensors file, or of all in a directory."""

    def __init__(self, path: str | Path) -> None:
        """Read the headers. Raises `ConfigError` for a path that has no such file, or a damaged one."""
        if not isinstance(path, str | Path):
            raise ConfigError(f"weights={path!r} must be the path of a safetensors file, or of a directory that has some")
        self.path = path = Path(path)
        self._places: dict[str, _Place] = {}
        for file in _files(path):
            found = _header(file)
            twice = next((name for name in found if name in self._places), None)
            if twice is not None:
                where = f"{self._places[twice].file.name} and {file.name}"
                raise ConfigError(
                    f"weights={path}: {twice!r} is in {where}: keep one model's files in a directory, or name one file"
                )
            self._places |= found

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
            if entry.dtype.is_floating_point and not self._places[name].floats:
                raise ModelError(f"{self.path}: {name!r} holds whole numbers there (quantised?) and {entry.dtype} in the model")
        known = {name for entry in table for name in entry.names} | buffers.keys()
        unknown = next((name for name in self._places if name not in known), None)
        if unknown is not None:
            raise ModelError(f"{self.path} has a tensor {unknown!r}, which the model does not know: it is of another model")
        wrong = next((name for name, buffer in buffers.items() if name in self and self._places[name].shape != buffer.shape), None)
        if wrong is not None:
            raise ModelError(f"{self.path}: the buffer {wrong!r} has another shape there than in the model")

    def read(self, names: Sequence[str], rows: tuple[int, int] | None = None) -> Tensor:
        """Return the tensor that has one of `names`, or its `rows` (first, count), as it is stored, on the CPU."""
        name = self._name(names) or names[0]
        with safe_open(self._places[name].file, framework="pt") as file:
            part = file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[0] + rows[1]]
            copied: Tensor = part.clone()  # of its own: the library's is a view of the file
        return copied

    def _name(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._places), None)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.safetensors"))
    index = next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    if index is not None:
        found = [path / name for name in _named(path, index)]
        missing = next((file for file in found if not file.is_file()), None)
        if missing is not None:
            raise ConfigError(f"weights={path}: {index.name} names {missing.name}, which is not there")
    if not found:
        raise ConfigError(f"weights={path}: there is no safetensors file there")
    return found


def _named(path: Path, index: Path) -> list[str]:
    """The files that an index names, which lie beside it. Raises `ConfigError` for one that is none, or that leads elsewhere."""
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"weights={path}: {index.name} is no index of safetensors files: it has no 'weight_map'") from error
    elsewhere = next((name for name in sorted(names) if Path(name).name != name), None)
    if elsewhere is not None:
        raise ConfigError(f"weights={path}: {index.name} names {elsewhere!r}: an index names files beside it, and no others")
    return sorted(names)


def _header(path: Path) -> dict[str, _Place]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: _Place(path, torch.Size(s.get_shape()), s.get_dtype().startswith(("F", "BF"))) for n, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is no complete safetensors file") from error
