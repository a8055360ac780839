"""What one rank computes where an op's dim is cut and the op needs more than its own part: tables, softmax, losses, norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from meshwright.blueprint.moves import Label
from meshwright.partition.collectives import Collective, all_gather, all_reduce
from meshwright.partition.state import Axis


class EmbeddingRows(Collective):
    """`embedding` of a table whose rows are cut: rows of other ranks come out zero (partial sums)."""

    def __init__(self, axis: Axis, label: Label, padding: int) -> None:
        super().__init__(axis, 0, label)
        pieces = axis.pieces(label, axis.rank)
        self.start, self.count = pieces[0][0], sum(length for _, length in pieces)
        self.padding = padding - self.start if self.start <= padding < self.start + self.count else None

    def __call__(self, table: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """Return [*index, width]."""
        local = index - self.start
        outside = (local < 0) | (local >= self.count)
        found = F.embedding(local.masked_fill(outside, 0), table, padding_idx=self.padding)
        return found.masked_fill(outside.unsqueeze(-1), 0.0)


class LogSoftmax(Collective):
    """`log_softmax` over a cut dim: the largest and the sum of exponentials are reduced, one number per row each."""

    forward = "all_reduce"
    backward = "all_reduce"

    def traffic(self, given: list[int], made: list[int], shape: tuple[int, ...]) -> list[tuple[str, str, int]]:
        """One number per row: the largest, the sum, and the gradient's sum."""
        assert self.dim is not None
        row = given[0] // shape[self.dim]
        return [("forward", "all_reduce", row), ("forward", "all_reduce", row), ("backward", "all_reduce", row)]

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of the log-probabilities."""
        result: Tensor = _LogSoftmax.apply(tensor, self.dim, self.axis)  # type: ignore[no-untyped-call]
        return result


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, axis: Axis) -> Tensor:
        largest = all_reduce(tensor.amax(dim, keepdim=True), axis, dist.ReduceOp.MAX)
        shifted = tensor - largest
        total = all_reduce(shifted.exp().sum(dim, keepdim=True), axis)
        result = shifted.sub_(total.log_())
        ctx.dim, ctx.axis = dim, axis
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (result,) = ctx.saved_tensors
        (gradient,) = gradients
        total = all_reduce(gradient.sum(ctx.dim, keepdim=True), ctx.axis)
        return result.exp().mul_(total).neg_().add_(gradient), None, None  # in place: logits are the largest there is


class ClassLoss(Collective):
    """`nll_loss` where the classes are cut: each rank picks the targets that it holds (partial sums).

    `reduction` is torch's number: 0 none, 1 mean, 2 sum.
    """

    def __init__(self, axis: Axis, label: Label, reduction: int, ignore: int) -> None:
        super().__init__(axis, 1, label)
        pieces = axis.pieces(label, axis.rank)
        self.start, self.count = pieces[0][0], sum(length for _, length in pieces)
        self.reduction, self.ignore = reduction, ignore

    def __call__(self, scores: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Return the loss of `scores` [rows, classes here] (or [classes here]): a scalar, or [rows]."""
        local = target - self.start
        outside = (local < 0) | (local >= self.count) | (target == self.ignore)
        picked = scores.gather(-1, local.masked_fill(outside, 0).unsqueeze(-1)).squeeze(-1)
        losses = -picked.masked_fill(outside, 0.0)
        if self.reduction == 0:
            return losses
        total = losses.sum()
        return total / (target != self.ignore).sum() if self.reduction == 1 else total


class RowLoss(Collective):
    """The mean of row losses whose sum is given: divided by the number of rows that count."""

    def __init__(self, axis: Axis, ignore: int) -> None:
        super().__init__(axis)
        self.ignore = ignore

    def __call__(self, total: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]
        """Return `total` divided by how many of the whole `target` are not ignored."""
        return total / (target != self.ignore).sum()


class Own(Collective):
    """A copy with the strides that the trace saw, so that views of it are views and can be written into."""

    def __init__(self, axis: Axis, strides: tuple[int, ...]) -> None:
        super().__init__(axis)
        self.strides = strides

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the copy."""
        return torch.empty_strided(tensor.shape, self.strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class KeepSlice(Collective):
    """Statistics that an op has updated in this rank's part of a buffer: gathered into the whole one."""

    forward = "all_gather"

    def __call__(self, buffer: Tensor, part: Tensor) -> None:  # type: ignore[override]
        """Write every rank's part to `buffer`."""
        with torch.no_grad():
            buffer.copy_(all_gather(part.detach(), self.axis, *self.where()))


class Randomly(Collective):
    """An op that draws random numbers for a cut value: from this rank's own stream, so that parts differ."""

    tags = (torch.Tag.nondeterministic_seeded,)

    def __init__(self, axis: Axis, op: Any) -> None:
        super().__init__(axis)
        self.op = op

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op with the default generator moved to where this rank's stream is, and put back after."""
        tensor = next(a for a in args if isinstance(a, Tensor))
        generator = torch.default_generator if tensor.device.type == "cpu" else torch.cuda.default_generators[tensor.device.index]
        before = generator.get_state()
        drawn = torch.randint(1 << 62, (), generator=generator, device=tensor.device)
        after = generator.get_state()
        generator.set_state(before)
        generator.manual_seed((int(drawn) + 0x9E3779B97F4A7C15 * (self.axis.rank + 1)) % (1 << 63))
        try:
            return self.op(*args, **kwargs)
        finally:
            generator.set_state(after)
