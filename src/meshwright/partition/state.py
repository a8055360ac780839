"""How a value lies on the ranks of one axis, and which elements of a cut dim belong to which rank.

| state   | each rank's value                    | its gradient on each rank                      |
|---------|--------------------------------------|------------------------------------------------|
| whole   | the whole value                      | the whole gradient, the same everywhere        |
| copied  | the whole value                      | a part; the sum over the ranks is the gradient |
| cut     | this rank's elements of one dim      | of those elements                              |
| partial | a part; the sum is the value         | the whole gradient, the same everywhere        |

`whole` and `copied` hold the same bytes and differ in the backward only (shard_map's invariant and varying values).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from meshwright.blueprint.moves import Label


@dataclass(frozen=True)
class State:
    """One of the four states; `dim` and `label` say what is cut and in which segments."""

    kind: str
    dim: int = -1
    label: Label | None = None

    @property
    def is_cut(self) -> bool:
        """Whether each rank holds other elements."""
        return self.kind == "cut"

    @property
    def is_full(self) -> bool:
        """Whether each rank holds every element."""
        return self.kind in ("whole", "copied")


WHOLE, COPIED, PARTIAL = State("whole"), State("copied"), State("partial")


def cut(dim: int, label: Label) -> State:
    """The state of a value whose `dim` is cut as `label` says."""
    return State("cut", dim, label)


class Axis:
    """One mesh axis as seen by this rank. `group` is needed to run a program, not to make one.

    `mirrored` axes (the sequence under a causal mask) give rank r of N the chunks r and 2N-1-r of 2N, so that all have equal work;
    others give it chunk r of N, as even as can be.
    """

    def __init__(self, name: str, size: int, rank: int, group: ProcessGroup | None = None, mirrored: bool = False) -> None:
        self.name, self.size, self.rank, self.group, self.mirrored = name, size, rank, group, mirrored

    def in_order(self) -> Axis:
        """The same ranks, giving out chunks in order: for dims that are no sequence."""
        return Axis(self.name, self.size, self.rank, self.group)

    def chunks(self, size: int) -> list[list[tuple[int, int]]]:
        """For each rank its pieces (start, length) of a segment of `size` elements, in ascending order."""
        if self.mirrored and size % (2 * self.size) == 0:
            step = size // (2 * self.size)
            return [[(r * step, step), ((2 * self.size - 1 - r) * step, step)] for r in range(self.size)]
        step = -(-size // self.size)
        starts = [min(r * step, size) for r in range(self.size + 1)]
        return [[(starts[r], starts[r + 1] - starts[r])] for r in range(self.size)]

    def divides(self, label: Label) -> bool:
        """Whether every rank gets equally many elements of every segment."""
        return all(segment % self.size == 0 for segment in label.segments)

    def can_cut(self, label: Label) -> bool:
        """Whether every rank gets something, and only a plain dim is cut unevenly."""
        plain = label.repeat == 1 and len(label.segments) == 1
        return self.divides(label) or (plain and -(-label.size // self.size) * (self.size - 1) < label.size)

    def alike(self, labels: Iterable[Label]) -> bool:
        """Whether labels with as many segments each give every rank the same share of each: a dim seen as half as many pairs, say,
        keeps its elements on their ranks only if no chunk ends within a pair.
        """
        shares: dict[int, set[Any]] = {}
        for segments in {label.segments for label in labels}:
            share = tuple(
                tuple((Fraction(start, size), Fraction(length, size)) for rank in self.chunks(size) for start, length in rank)
                for size in segments
            )
            shares.setdefault(len(segments), set()).add(share)
        return all(len(found) == 1 for found in shares.values())

    def pieces(self, label: Label, rank: int) -> list[tuple[int, int]]:
        """A rank's pieces (start, length) within one repetition of `label`, in the order in which it holds them."""
        found, start = [], 0
        for segment in label.segments:
            found += [(start + first, length) for first, length in self.chunks(segment)[rank]]
            start += segment
        return found

    def length(self, label: Label, rank: int | None = None) -> int:
        """Elements of a cut dim on a rank (this one by default)."""
        return label.repeat * sum(length for _, length in self.pieces(label, self.rank if rank is None else rank))

    def local(self, label: Label) -> Label:
        """The label that a rank's own part has for a later axis."""
        return Label(label.repeat, tuple(max(1, segment // self.size) for segment in label.segments))

    def take(self, tensor: Tensor, dim: int, label: Label, rank: int | None = None) -> Tensor:
        """A rank's elements of a whole tensor; a view where they lie together."""
        pieces = self.pieces(label, self.rank if rank is None else rank)
        if label.repeat == 1:
            parts = [tensor.narrow(dim, *piece) for piece in _joined(pieces)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        split = tensor.unflatten(dim, (label.repeat, -1))
        parts = [split.narrow(dim + 1, *piece) for piece in _joined(pieces)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim + 1)).flatten(dim, dim + 1)

    def join(self, parts: list[Tensor], dim: int, label: Label) -> Tensor:
        """The whole tensor from every rank's elements."""
        if label.repeat == 1 and len(label.segments) == 1 and all(len(self.pieces(label, r)) == 1 for r in range(self.size)):
            return torch.cat(parts, dim)
        found: list[tuple[int, Tensor]] = []
        for rank, part in enumerate(parts):
            pieces = self.pieces(label, rank)
            split = part.unflatten(dim, (label.repeat, -1)).split([length for _, length in pieces], dim + 1)
            found += [(start, piece) for (start, _), piece in zip(pieces, split, strict=True)]
        ordered = [piece for _, piece in sorted(found, key=lambda item: item[0])]
        return torch.cat(ordered, dim + 1).flatten(dim, dim + 1)


def _joined(pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring pieces as one."""
    found: list[tuple[int, int]] = []
    for start, length in pieces:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found
