"""Text as memory-mapped bytes, and which samples make up which global batch.

A token is a byte. Sample i is the `sequence_length + 1` bytes that begin at i * sequence_length. Samples are visited in an order
that is a function of the seed and the global sample number alone: global batch k holds positions k * B to (k + 1) * B - 1 on
any mesh, and where a run stands in its data is one integer.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from meshwright.errors import DataError
from meshwright.parallel.materialise import derive_seed
from meshwright.train.config import DataTable

VOCABULARY = 256


def find_files(source: str) -> list[Path]:
    """Return the text files of a source, in an order that mixes folders but is the same everywhere.

    Raises `DataError` if there are none.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [path for path in root.rglob("*.py") if "site-packages" not in path.parts]
    elif Path(source).is_dir():
        root = Path(source)
        found = [path for path in root.rglob("*") if path.is_file()]
    else:
        root = Path()
        found = [Path(name) for name in glob.glob(os.path.expanduser(source), recursive=True) if Path(name).is_file()]
    if not found:
        raise DataError(f"data.source={source!r} is no file, folder or glob with files in it: the default is 'stdlib'")

    def key(path: Path) -> bytes:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
        return hashlib.blake2b(name.encode()).digest()

    return sorted(found, key=key)


def write_tokens(source: str, target: Path) -> None:
    """Join the files of a source into one file of bytes; it appears whole or not at all."""
    files = find_files(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    try:
        with partial.open("wb") as out:
            for path in files:
                out.write(path.read_bytes())
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{error.filename or target} can't be read or written: {error.strerror}") from error


@dataclass(frozen=True)
class Samples:
    """Windows over a stretch of tokens: `count` samples of `length` inputs and as many targets (the next tokens)."""

    tokens: NDArray[numpy.uint8]
    length: int

    @property
    def count(self) -> int:
        """Return the number of whole samples; neighbours share no target."""
        return max(0, (len(self.tokens) - 1) // self.length)

    def batch(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return (inputs, targets), int64 `[len(indices), length]` each."""
        windows = numpy.empty((len(indices), self.length + 1), dtype=numpy.int64)
        for row, index in enumerate(indices):
            start = index * self.length
            windows[row] = self.tokens[start : start + self.length + 1]
        both = torch.from_numpy(windows)
        return both[:, :-1], both[:, 1:]


def open_samples(path: Path, table: DataTable) -> tuple[Samples, Samples]:
    """Memory-map the tokens; return the training and the validation samples.

    Raises `DataError` if either has fewer samples than one batch needs.
    """
    tokens = numpy.memmap(path, dtype=numpy.uint8, mode="r") if path.stat().st_size else numpy.zeros(0, numpy.uint8)
    border = int(len(tokens) * (1 - table.validation_fraction))
    train = Samples(tokens[:border], table.sequence_length)
    validation = Samples(tokens[border:], table.sequence_length)
    if train.count < table.global_batch or validation.count < 1:
        raise DataError(
            f"data.source={table.source!r} holds {train.count} training and {validation.count} validation samples of "
            f"{table.sequence_length} bytes, fewer than data.global_batch={table.global_batch} and 1: "
            "give more text, or lower data.sequence_length or data.global_batch"
        )
    return train, validation


def shuffled(position: int, count: int, seed: int) -> int:
    """Return the sample at a global position: each run of `count` positions (an epoch) is a permutation of its own.

    A Feistel network on the smallest even number of bits that holds `count`, walked until it lands inside: no table is kept
    and any position costs the same.
    """
    epoch, index = divmod(position, count)
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [derive_seed("order", seed, epoch, turn) for turn in range(4)]
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            mixed = (right * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 32) & mask)
        index = (left << half) | right
        if index < count:
            return index


def share_of(total: int, rank: int, ranks: int) -> range:
    """Return the rows of a batch of `total` that belong to data rank `rank` of `ranks`: neighbours, as even as can be."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


def training_batches(
    samples: Samples, table: DataTable, seed: int, step: int, rank: int, ranks: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this data rank's rows of global batches `step`, `step + 1`, ... without end."""
    while True:
        first = step * table.global_batch
        rows = share_of(table.global_batch, rank, ranks)
        yield samples.batch([shuffled(first + row, samples.count, seed) for row in rows])
        step += 1


def validation_batches(samples: Samples, table: DataTable, rank: int, ranks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this data rank's rows of the validation set, each sample once; the same number of batches on every rank."""
    total = min(samples.count, table.validation_samples)
    # Spread over the whole validation text, so that few samples still stand for all of it.
    chosen = [index * samples.count // total for index in range(total)]
    for first in range(0, total, table.global_batch):
        rows = chosen[first : first + table.global_batch]
        yield samples.batch([rows[i] for i in share_of(len(rows), rank, ranks)])
