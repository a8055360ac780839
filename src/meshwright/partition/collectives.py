"""The ops that a partition adds to a trace: collectives with their gradients, and the local work around cut dims.

Each is a small object called with tensors, so that a program prints them, counts them and knows their bytes:

| op            | from -> to       | forward        | backward                      |
|---------------|------------------|----------------|-------------------------------|
| Copy          | whole -> copied  | nothing        | all-reduce                    |
| Share         | copied -> whole  | nothing        | divided by the ranks          |
| Reduce        | partial -> whole | all-reduce     | nothing                       |
| ReduceScatter | partial -> cut   | reduce-scatter | all-gather                    |
| Gather        | cut -> copied    | all-gather     | reduce-scatter                |
| Gather        | cut -> whole     | all-gather     | this rank's part, no traffic  |
| Take          | copied -> cut    | a slice        | padded with zeros, no traffic |
| Take          | whole -> cut     | a slice        | all-gather                    |
| Exchange      | cut -> other cut | all-to-all     | all-to-all                    |

Bytes are those of the tensor a rank puts in (a reduce) or gets out (a gather), as they are usually counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright import _torch
from meshwright.blueprint.moves import Label
from meshwright.partition.state import Axis


class Collective:
    """An op over one axis. `forward` and `backward` name the collectives that run, or are empty.

    `place` is for later passes: the dim that must not be cut again on the way through, or None.
    """

    tags: tuple[Any, ...] = ()
    forward = ""
    backward = ""

    def __init__(self, axis: Axis, dim: int | None = None, label: Label | None = None) -> None:
        self.axis, self.dim, self.label = axis, dim, label
        self.__name__ = type(self).__name__.lower()
        self.__module__ = "meshwright"

    def __call__(self, tensor: Tensor) -> Tensor:
        """Run it; autograd runs `back` on the gradient."""
        if not torch.is_grad_enabled() or not tensor.requires_grad:
            return self.ahead(tensor)
        result: Tensor = _Differentiable.apply(tensor, self.ahead, self.back)  # type: ignore[no-untyped-call]
        return result

    def ahead(self, tensor: Tensor) -> Tensor:
        """Run the forward."""
        raise NotImplementedError

    def back(self, gradient: Tensor) -> Tensor:
        """Return the gradient of what came in from that of what went out."""
        raise NotImplementedError

    def traffic(self, given: list[int], made: list[int], shape: tuple[int, ...]) -> list[tuple[str, str, int]]:
        """Return (phase, collective, bytes) of what it sends, for operands and results of these bytes; `shape` is the first's."""
        size = max(given[0], *made) if made else given[0] * self.axis.size
        both = (("forward", self.forward), ("backward", self.backward))
        return [(phase, name, given[0] if name == "all_to_all" else size) for phase, name in both if name]

    def where(self) -> tuple[int, Label]:
        """Return the dim that is cut and how."""
        assert self.dim is not None
        assert self.label is not None
        return self.dim, self.label


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ahead: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        result = ahead(tensor)
        return result.view_as(result) if result is tensor else result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.back(gradients[0]), None, None


class Copy(Collective):
    """whole -> copied."""

    backward = "all_reduce"

    def ahead(self, tensor: Tensor) -> Tensor:
        """Nothing to do."""
        return tensor

    def back(self, gradient: Tensor) -> Tensor:
        """Sum the ranks' parts."""
        return all_reduce(gradient, self.axis)


class Share(Collective):
    """copied -> whole."""

    def ahead(self, tensor: Tensor) -> Tensor:
        """Nothing to do."""
        return tensor

    def back(self, gradient: Tensor) -> Tensor:
        """Every rank has the whole gradient: each gives an equal part of it."""
        return gradient / self.axis.size


class Reduce(Collective):
    """partial -> whole."""

    forward = "all_reduce"

    def ahead(self, tensor: Tensor) -> Tensor:
        """Sum the ranks' parts."""
        return all_reduce(tensor, self.axis)

    def back(self, gradient: Tensor) -> Tensor:
        """Every part has the gradient of the sum."""
        return gradient


class ReduceScatter(Collective):
    """partial -> cut."""

    forward, backward = "reduce_scatter", "all_gather"

    def ahead(self, tensor: Tensor) -> Tensor:
        """Sum the ranks' parts, each rank its elements only."""
        return reduce_scatter(tensor, self.axis, *self.where())

    def back(self, gradient: Tensor) -> Tensor:
        """Gather the gradients of all elements."""
        return all_gather(gradient, self.axis, *self.where())


class Gather(Collective):
    """cut -> copied (`summed`: gradients of the copies are parts), or cut -> whole."""

    forward = "all_gather"

    def __init__(self, axis: Axis, dim: int, label: Label, summed: bool) -> None:
        super().__init__(axis, dim, label)
        self.summed = summed
        self.backward = "reduce_scatter" if summed else ""

    def ahead(self, tensor: Tensor) -> Tensor:
        """Gather every rank's elements."""
        return all_gather(tensor, self.axis, *self.where())

    def back(self, gradient: Tensor) -> Tensor:
        """Return the gradient of this rank's elements."""
        dim, label = self.where()
        return reduce_scatter(gradient, self.axis, dim, label) if self.summed else self.axis.take(gradient, dim, label)


class Take(Collective):
    """copied -> cut (`padded`), or whole -> cut."""

    def __init__(self, axis: Axis, dim: int, label: Label, padded: bool) -> None:
        super().__init__(axis, dim, label)
        self.padded = padded
        self.backward = "" if padded else "all_gather"

    def __call__(self, tensor: Tensor) -> Tensor:
        """Slice; for a copied value autograd's own slices know how to pad."""
        return self.ahead(tensor) if self.padded else super().__call__(tensor)

    def ahead(self, tensor: Tensor) -> Tensor:
        """Return this rank's elements."""
        return self.axis.take(tensor, *self.where())

    def back(self, gradient: Tensor) -> Tensor:
        """Gather every rank's."""
        return all_gather(gradient, self.axis, *self.where())


class Exchange(Collective):
    """cut on one dim -> cut on another: each rank gives every other its part of the dim to be cut."""

    forward = backward = "all_to_all"

    def __init__(self, axis: Axis, source: tuple[int, Label], target: tuple[int, Label], other: Axis) -> None:
        super().__init__(axis, *source)
        self.target, self.other = target, other  # `other` is the same ranks, with the target's way of giving out chunks

    def ahead(self, tensor: Tensor) -> Tensor:
        """From cut on `source` to cut on `target`."""
        return all_to_all(tensor, (self.axis, *self.where()), (self.other, *self.target))

    def back(self, gradient: Tensor) -> Tensor:
        """And the other way."""
        return all_to_all(gradient, (self.other, *self.target), (self.axis, *self.where()))


# The traffic itself


def all_reduce(tensor: Tensor, axis: Axis, op: Any = None) -> Tensor:
    """Sum (or `op`) over the axis, into a new tensor."""
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=op or dist.ReduceOp.SUM, group=axis.group)
    return result


def all_gather(tensor: Tensor, axis: Axis, dim: int, label: Label) -> Tensor:
    """Join every rank's elements of a cut dim."""
    lengths = [axis.length(label, rank) for rank in range(axis.size)]
    longest = max(lengths)
    mine = tensor.contiguous()
    if mine.shape[dim] < longest:
        shape = [*mine.shape]
        shape[dim] = longest - mine.shape[dim]
        mine = torch.cat([mine, mine.new_zeros(shape)], dim)
    whole = mine.new_empty((axis.size, *mine.shape))
    assert axis.group is not None
    _torch.all_gather(whole.view(-1), mine.view(-1), axis.group).wait()
    parts = [part.narrow(dim, 0, length) for part, length in zip(whole.unbind(0), lengths, strict=True)]
    if dim == 0 and len(set(lengths)) == 1 and label.repeat == 1 and all(len(axis.pieces(label, r)) == 1 for r in (0,)):
        return whole.flatten(0, 1)
    return axis.join(parts, dim, label)


def reduce_scatter(tensor: Tensor, axis: Axis, dim: int, label: Label) -> Tensor:
    """Sum over the axis; each rank gets its elements of the dim."""
    assert axis.group is not None
    if not axis.divides(label):
        return axis.take(all_reduce(tensor, axis), dim, label)
    parts = [axis.take(tensor, dim, label, rank) for rank in range(axis.size)]
    source = torch.stack([part.contiguous() for part in parts])
    result = torch.empty_like(source[0])
    _torch.reduce_scatter(result.view(-1), source.view(-1), axis.group).wait()
    return result


def all_to_all(tensor: Tensor, source: tuple[Axis, int, Label], target: tuple[Axis, int, Label]) -> Tensor:
    """From cut on `source` (axis, dim, label) to cut on `target`; both cut evenly, over the same ranks."""
    axis = target[0]
    sent = torch.stack([axis.take(tensor, *target[1:], rank=rank).contiguous() for rank in range(axis.size)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    return source[0].join(list(received.unbind(0)), *source[1:])
