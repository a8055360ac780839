"""Attention under context parallelism: every rank holds some positions of queries, keys and values [B, heads, S, D].

| method    | what travels, forward (per rank)                     | then                                              |
|-----------|------------------------------------------------------|---------------------------------------------------|
| allgather | every rank's keys and values                         | own queries against all keys, gradients summed back |
| ring      | keys and values, one rank's share at a time          | partial results merged by their log-sum-exp       |
| ulysses   | all-to-all of queries, keys, values, and the results | whole sequences of some heads                     |

A mask works with allgather (its rows are cut) and with ulysses. Ring needs no mask (causal is known) and no dropout; ulysses needs
heads that the ranks divide. Where the method asked for can't be, allgather is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from meshwright import _torch
from meshwright.blueprint.moves import Label, whole_dim
from meshwright.blueprint.tape import Ref
from meshwright.partition.arguments import Attention
from meshwright.partition.collectives import Collective, Exchange, Take
from meshwright.partition.local import Randomly
from meshwright.partition.state import COPIED, Axis, State, cut

_RING_ABOVE = 1 << 28
"""Bytes of gathered keys and values above which ring is preferred: it never holds more than two ranks' share."""


def context_attention(run: Any, op: Any, attention: Attention, operands: list[Any]) -> bool:
    """Write attention whose queries are cut on the sequence; a rule of `rules.py`."""
    query, key, value, mask = operands
    method = _choose(run, attention, operands)
    if method == "ulysses":
        _ulysses(run, op, attention, operands)
        return True
    state = run.states[query.number]
    assert state.label is not None
    here = Ref(run.get(query.number, state))
    output = [(op.outputs[0], state)]
    if method == "ring":
        label = run.states[key.number].label
        ring = Ring(run.axis, state.label, label, attention)
        run.emit(ring, (here, Ref(run.own[key.number]), Ref(run.own[value.number])), {}, output)
        return True
    func: Any = Causal(run.axis, state.label, attention) if attention.causal else attention
    rest: tuple[Any, ...] = ()
    if mask is not None:
        shape = run.values[mask.number].shape
        rows = len(shape) - 2
        own = cut(rows, state.label) if rows >= 0 and shape[rows] == state.label.size else COPIED
        rest = (Ref(run.get(mask.number, own)),)
    if attention.dropout > 0.0:
        func = Randomly(run.axis, func)
    whole = (Ref(run.get(key.number, COPIED)), Ref(run.get(value.number, COPIED)))
    run.emit(func, (here, *whole, *rest), {}, output)
    return True


def _choose(run: Any, attention: Attention, operands: list[Any]) -> str:
    """The method asked for where it can be, else the one that moves the fewest bytes."""
    query, key, value, mask = operands
    size = run.axis.size
    states = [run.states[ref.number] for ref in (query, key, value)]
    label = states[0].label
    alike = all(state.is_cut and state.dim == 2 and run.axis.divides(state.label) for state in states)
    heads, groups = run.values[query.number].shape[1], run.values[key.number].shape[1]
    same = not attention.causal or all(state.label == label for state in states)
    can_ring = (
        alike and same and mask is None and attention.dropout == 0.0 and _torch.has_attention_kernel(run.values[query.number].dtype)
    )
    can_exchange = alike and heads % size == 0 and groups % size == 0
    wanted = run.policy.method
    if wanted != "auto":
        return wanted if {"ring": can_ring, "ulysses": can_exchange}.get(wanted, True) else "allgather"
    if not alike:
        return "allgather"
    shape = run.values[key.number].shape
    both = 2 * shape[0] * groups * shape[2] * shape[3] * run.values[key.number].dtype.itemsize
    gathered = both * (size - 1) // size
    exchanged = both * (1 + heads // groups) * (size - 1) // size**2
    if can_exchange and exchanged <= gathered:
        return "ulysses"
    return "ring" if can_ring and both > _RING_ABOVE else "allgather"


def _ulysses(run: Any, op: Any, attention: Attention, operands: list[Any]) -> None:
    heads = run.values[operands[0].number].shape[1]
    heads_axis = run.axis.in_order()
    refs: list[Any] = []
    for operand in operands[:3]:
        state = run.states[operand.number]
        target = State("cut", 1, whole_dim(run.values[operand.number].shape[1]))
        exchanged = run.fresh(operand.number)
        swap = Exchange(run.axis, (2, state.label), (1, target.label), heads_axis)  # type: ignore[arg-type]
        run.emit(swap, (Ref(run.own[operand.number]),), {}, [(exchanged, target)])
        refs.append(Ref(run.own[exchanged]))
    mask = operands[3]
    if mask is not None:
        shape = run.values[mask.number].shape
        by_head = len(shape) >= 3 and shape[-3] == heads and heads > 1
        whole = Ref(run.get(mask.number, COPIED))
        if by_head:
            picked = run.fresh(mask.number)
            state = cut(len(shape) - 3, whole_dim(heads))
            run.emit(Take(heads_axis, len(shape) - 3, whole_dim(heads), True), (whole,), {}, [(picked, state)])
            whole = Ref(run.own[picked])
        refs.append(whole)
    func: Any = Randomly(run.axis, attention) if attention.dropout > 0.0 else attention
    by_heads = run.fresh(op.outputs[0])
    run.emit(func, refs, {}, [(by_heads, cut(1, whole_dim(heads)))])
    state = run.states[operands[0].number]
    back = Exchange(heads_axis, (1, whole_dim(heads)), (2, state.label), run.axis)
    run.emit(back, (Ref(run.own[by_heads]),), {}, [(op.outputs[0], state)])


class Causal(Collective):
    """Causal attention of this rank's queries against all keys: each piece of queries sees the keys up to its own end."""

    def __init__(self, axis: Axis, label: Label, attention: Attention) -> None:
        super().__init__(axis, 2, label)
        self.attention = attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        """Return [B, H, S here, D of value] for keys and values [B, G, S, D]."""
        assert self.label is not None
        results, first = [], 0
        grouped = key.shape[1] != query.shape[1]
        for start, length in self.axis.pieces(self.label, self.axis.rank):
            end = min(start + length, key.shape[2])
            mask = torch.ones(length, end, dtype=torch.bool, device=query.device).tril_(start)
            results.append(
                F.scaled_dot_product_attention(
                    query.narrow(2, first, length),
                    key.narrow(2, 0, end),
                    value.narrow(2, 0, end),
                    mask,
                    self.attention.dropout,
                    scale=self.attention.scale,
                    enable_gqa=grouped,
                )
            )
            first += length
        return torch.cat(results, 2) if len(results) > 1 else results[0]


class Ring(Collective):
    """Attention while keys and values go around the ranks; partial results are merged by their log-sum-exp."""

    forward = backward = "send_receive"

    def __init__(self, axis: Axis, queries: Label, keys: Label, attention: Attention) -> None:
        super().__init__(axis, 2, queries)
        self.keys, self.causal, self.scale = keys, attention.causal, attention.scale

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        """Return [B, H, S here, D] for keys and values [B, G, S here, D] of every rank."""
        result: Tensor = _Ring.apply(query, key, value, self)  # type: ignore[no-untyped-call]
        return result

    def traffic(self, given: list[int], made: list[int], shape: tuple[int, ...]) -> list[tuple[str, str, int]]:
        """Keys and values go around once in each direction, their gradients a full round to come home."""
        pair = given[1] + given[2]
        once = [(phase, "send_receive", pair) for phase in ("forward", "backward")] * (self.axis.size - 1)
        return once + [("backward", "send_receive", pair)] * self.axis.size

    def pairs(self, source: int) -> list[tuple[slice, slice, bool]]:
        """Which of this rank's query positions see which of rank `source`'s key positions, and whether causally."""
        assert self.label is not None
        if not self.causal:
            return [(slice(None), slice(None), False)]
        found, first = [], 0
        for start, length in self.axis.pieces(self.label, self.axis.rank):
            at, seen = 0, 0
            for key_start, key_length in self.axis.pieces(self.keys, source):
                if key_start == start:
                    found.append((slice(first, first + length), slice(at, at + key_length), True))
                elif key_start < start:
                    seen = at + key_length  # pieces ascend: all before this one are seen too
                at += key_length
            if seen:
                found.append((slice(first, first + length), slice(0, seen), False))
            first += length
        return found


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ring: Ring) -> Tensor:
        """Add one rank's keys after another, rescaling what there is by the change of the log-sum-exp."""
        axis, times = ring.axis, query.shape[1] // key.shape[1]
        query = query.contiguous()
        result = torch.zeros(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
        logsum = torch.full(query.shape[:3], -torch.inf, dtype=_torch.logsum_dtype(query.dtype), device=query.device)
        pair = torch.cat([key, value], 3).contiguous()
        for step in range(axis.size):
            arriving, work = _pass_on(pair, axis) if step < axis.size - 1 else (pair, [])
            k, v = _split(pair, key.shape[3], times)
            for rows, columns, causal in ring.pairs((axis.rank - step) % axis.size):
                part, part_logsum = _torch.attention_forward(
                    query[:, :, rows], k[:, :, columns], v[:, :, columns], causal, ring.scale
                )
                before = logsum[:, :, rows]
                after = torch.logaddexp(before, part_logsum)
                old, new = (before - after).exp().unsqueeze(-1), (part_logsum - after).exp().unsqueeze(-1)
                result[:, :, rows] = (result[:, :, rows] * old + part * new).to(result.dtype)
                logsum[:, :, rows] = after
            for one in work:
                one.wait()
            pair = arriving
        ctx.ring = ring
        ctx.save_for_backward(query, key, value, result, logsum)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Send keys and values around again, their gradients with them, by the final log-sum-exp."""
        query, key, value, result, logsum = ctx.saved_tensors
        ring, gradient = ctx.ring, gradients[0].contiguous()
        axis, times, width = ring.axis, query.shape[1] // key.shape[1], key.shape[3]
        query_gradient = torch.zeros_like(query)
        pair = torch.cat([key, value], 3).contiguous()
        pair_gradient = torch.zeros_like(pair)  # travels with the pair that it belongs to, and so comes home
        for step in range(axis.size):
            arriving, work = _pass_on(pair, axis) if step < axis.size - 1 else (pair, [])
            k, v = _split(pair, width, times)
            for rows, columns, causal in ring.pairs((axis.rank - step) % axis.size):
                kept = (query[:, :, rows], k[:, :, columns], v[:, :, columns], result[:, :, rows], logsum[:, :, rows])
                dq, dk, dv = _torch.attention_backward(gradient[:, :, rows], *kept, causal, ring.scale)
                query_gradient[:, :, rows] += dq
                both = torch.cat([dk, dv], 3)
                if times > 1:
                    both = both.unflatten(1, (-1, times)).sum(2)
                pair_gradient[:, :, columns] += both
            for one in work:
                one.wait()
            pair = arriving
            pair_gradient, last = _pass_on(pair_gradient, axis)
            for one in last:
                one.wait()
        key_gradient, value_gradient = pair_gradient.split([width, value.shape[3]], 3)
        return query_gradient, key_gradient, value_gradient, None


def _split(pair: Tensor, width: int, times: int) -> tuple[Tensor, Tensor]:
    """Keys and values, each head repeated for the queries that share it."""
    if times > 1:
        pair = pair.repeat_interleave(times, 1)
    return pair[..., :width].contiguous(), pair[..., width:].contiguous()


def _pass_on(tensor: Tensor, axis: Axis) -> tuple[Tensor, list[Any]]:
    """Start sending to the next rank and receiving from the one before."""
    arriving = torch.empty_like(tensor)
    sends = dist.P2POp(dist.isend, tensor, group=axis.group, group_peer=(axis.rank + 1) % axis.size)
    receives = dist.P2POp(dist.irecv, arriving, group=axis.group, group_peer=(axis.rank - 1) % axis.size)
    return arriving, list(dist.batch_isend_irecv([sends, receives]))
