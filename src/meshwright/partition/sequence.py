"""Which dim of which value runs along the sequence: followed from the batch through every op that keeps positions apart."""

from __future__ import annotations

from meshwright.blueprint import costs
from meshwright.blueprint.moves import Label, Place, spread, whole_dim
from meshwright.partition.arguments import writes
from meshwright.partition.trace import Guard, Trace, is_opaque


def follow_sequence(trace: Trace) -> dict[int, tuple[int, Label]]:
    """Return value -> (dim, label) for what has one entry per position, over all sequences in the batch.

    A sequence is dim 1 of a two-dimensional integer or a three-dimensional float entry of the batch.
    """
    labels: dict[Place, Label] = {}
    for number in trace.inputs:
        value = trace.values[number]
        tokens = len(value.shape) == 2 and not value.dtype.is_floating_point
        if (tokens or (len(value.shape) == 3 and value.dtype.is_floating_point)) and value.shape[1] > 1:
            labels[number, 1] = whole_dim(value.shape[1])
    known = {number for number, _ in labels}
    for op in trace.ops:
        if isinstance(op.func, Guard):
            continue
        if is_opaque(op):
            _alike(trace, op.inputs, op.outputs, labels, known)
            continue
        if not any(n in known for n in op.inputs):
            continue
        own = {(n, d): labels[n, d] for n in op.inputs for d in range(len(trace.values[n].shape)) if (n, d) in labels}
        if costs.base_name(op.func) in ("nll_loss_forward", "arange"):
            continue
        found_here = spread(op, trace.values, own).labels
        if writes(op.func) and op.inputs[0] in known:  # whatever is written, the positions stay in their place
            found_here += [((op.outputs[0], d), label) for (n, d), label in own.items() if n == op.inputs[0] and op.outputs]
        for where, label in found_here:
            if where[0] in op.outputs:
                labels[where] = label
                known.add(where[0])
    found: dict[int, tuple[int, Label]] = {}
    for (number, dim), label in labels.items():
        if number not in found or found[number][0] > dim:  # a square mask: its rows are the queries
            found[number] = (dim, label)
    return found


def _alike(trace: Trace, inputs: tuple[int, ...], outputs: tuple[int, ...], labels: dict[Place, Label], known: set[int]) -> None:
    """What an opaque module returns in the shape of what it was given has its positions in the same place."""
    for made in outputs:
        for given in inputs:
            shape = trace.values[made].shape
            if trace.values[given].shape[: len(shape) - 1] == shape[:-1] and given in known:
                labels.update({(made, d): labels[given, d] for d in range(len(shape) - 1) if (given, d) in labels})
                known.add(made)
                break
