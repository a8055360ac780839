"""How a split of one dim continues through an op: the algebra under `regions.py`.

A `Label` says how a dim is cut over the ranks of an axis: `repeat` times the `segments`, each segment in equal
contiguous chunks. A column weight's output features start as one segment; a view into heads moves the label to the
heads, a `split` of a fused projection needs one segment per part, merging the batch with the heads repeats the heads'
label once per item. `spread` is given the labels on an op's tensors and answers with those that follow, or refuses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshwright.blueprint import costs
from meshwright.blueprint.dims import NONE, describe
from meshwright.blueprint.tape import RawOp, Ref, Value

Place = tuple[int, int]
"""A value's number and one of its dims."""


@dataclass(frozen=True)
class Label:
    """`repeat` times the `segments`; `units` is what a degree must divide."""

    repeat: int
    segments: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size of the dim that is cut."""
        return self.repeat * sum(self.segments)

    @property
    def units(self) -> int:
        """The largest number of equal chunks that every segment has."""
        return math.gcd(*self.segments)


def whole_dim(size: int) -> Label:
    """The dim cut into contiguous chunks."""
    return Label(1, (size,))


@dataclass
class Effect:
    """What follows from the labels on an op: more labels, partial sums (`closes`), or a refusal (`blocked`).

    `hint` proposes how the dim at which it was refused might be cut in its place. `mixed` lists labelled dims that were
    needed whole: a caller that only follows a dim (the sequence) goes on, one that wants to shard must stop.
    """

    labels: list[tuple[Place, Label]] = field(default_factory=list)
    closes: bool = False
    blocked: str = ""
    hint: Label | None = None
    mixed: list[Place] = field(default_factory=list)


_SPLITS = {"split", "split_with_sizes", "chunk"}


def spread(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect:
    """The effect of the labels that an op's tensors have; only those of this op's tensors are looked at."""
    name = costs.base_name(op.func)
    if name in costs.RESHAPES:
        return _view(op, values, labels)
    if name in _SPLITS:
        return _split(op, values, labels)
    if name == "cat":
        return _cat(op, values, labels)
    if name == "slice":
        sliced = _slice(op, values, labels)
        if sliced is not None:
            return sliced
    return _lettered(op, values, labels)


def _lettered(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect:
    described = describe(op, values)
    sides = [*described.inputs, *described.outputs]
    places: dict[int, list[Place]] = {}
    for number, letters in sides:
        for dim, letter in enumerate(letters):
            if letter != NONE:
                places.setdefault(letter, []).append((number, dim))
    effect = Effect()
    for letter, members in places.items():
        label = next((labels[place] for place in members if place in labels), None)
        if label is None:
            continue
        if letter in described.whole:
            effect.mixed += [place for place in members if place in labels]
            effect.blocked = effect.blocked or f"{op.func} needs the dim whole"
            size = values[members[0][0]].shape[members[0][1]]
            if costs.base_name(op.func) in ("select", "unbind") and 1 < size <= 16:
                effect.hint = Label(size, (1,))
            continue
        if letter in described.summed:
            effect.closes = True
        for number, dim in members:
            fitted = _fit(label, values[number].shape[dim])
            if fitted is None:
                effect.blocked = f"{op.func} joins dims that are cut differently"
            elif (number, dim) not in labels:
                effect.labels.append(((number, dim), fitted))
    return effect


def _fit(label: Label, size: int) -> Label | None:
    """The label on a dim that runs together with a labelled one; grouped heads have fewer keys than queries."""
    if label.size == size:
        return label
    if label.repeat == 1 and len(label.segments) == 1 and (label.size % size == 0 or size % label.size == 0):
        return whole_dim(size)
    return None


def _groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Dims of two shapes of equal size, grouped so that each pair of groups holds the same elements."""
    found, i, j = [], 0, 0
    while i < len(a) or j < len(b):
        left, right = [i] if i < len(a) else [], [j] if j < len(b) else []
        x, y = (a[i] if left else 1), (b[j] if right else 1)
        i, j = i + len(left), j + len(right)
        while x != y:
            if x < y and i < len(a):
                x, i = x * a[i], i + 1
                left.append(i - 1)
            elif j < len(b):
                y, j = y * b[j], j + 1
                right.append(j - 1)
            else:
                return []
        found.append((left, right))
    return found


def _view(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect:
    source, result = op.inputs[0], op.outputs[0]
    shapes = values[source].shape, values[result].shape
    if 0 in shapes[0] or math.prod(shapes[0]) != math.prod(shapes[1]):
        return _lettered(op, values, labels)
    effect = Effect()
    for left, right in _groups(*shapes):
        for here, there, dims, others in ((source, result, left, right), (result, source, right, left)):
            sizes = values[here].shape
            target = [values[there].shape[d] for d in others]
            for dim in dims:
                label = labels.get((here, dim))
                if label is None or any((there, other) in labels for other in others):
                    continue
                moved = _through(label, [sizes[d] for d in dims], dims.index(dim), target)
                if moved is None:
                    effect.blocked = f"{op.func} re-divides the dim in a way that no chunking follows"
                    effect.mixed.append((here, dim))
                else:
                    effect.labels.append(((there, others[moved[0]]), moved[1]))
    return effect


def _through(label: Label, sizes: list[int], place: int, target: list[int]) -> tuple[int, Label] | None:
    """The label of one dim among `sizes`, read off after the same elements are divided into `target` sizes."""
    inner = math.prod(sizes[place + 1 :])
    alike = len(set(label.segments)) == 1  # equal segments in a row are one segment repeated
    repeat = math.prod(sizes[:place]) * label.repeat * (len(label.segments) if alike else 1)
    segments = [size * inner for size in (label.segments[:1] if alike else label.segments)]
    best: tuple[int, Label] | None = None
    for j, size in enumerate(target):
        before, after = math.prod(target[:j]), math.prod(target[j + 1 :])
        if size == 1 or repeat % before or any(segment % after for segment in segments):
            continue
        moved = Label(repeat // before, tuple(segment // after for segment in segments))
        if moved.size == size and (best is None or moved.units > best[1].units):
            best = (j, moved)
    return best if best is None or best[1].units > 1 or label.units == 1 else None


def _split(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect:
    source = op.inputs[0]
    rank = len(values[source].shape)
    given = op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", 0)
    dim = int(given) % rank
    parts = tuple(values[n].shape[dim] for n in op.outputs)
    effect = Effect()
    for other in range(rank):
        if other == dim:
            continue
        known = next((labels[n, other] for n in (source, *op.outputs) if (n, other) in labels), None)
        if known is not None:
            effect.labels += [((n, other), known) for n in (source, *op.outputs) if (n, other) not in labels]
    label = labels.get((source, dim))
    if label is None:
        if any((n, dim) in labels for n in op.outputs):
            segments = [_segments(labels.get((n, dim)), part) for n, part in zip(op.outputs, parts, strict=True)]
            effect.labels.append(((source, dim), Label(1, tuple(itertools.chain(*segments)))))
        return effect
    pieces = _pieces(label, parts)
    if pieces is None:
        effect.blocked = f"{op.func} divides the dim into parts that are not cut alike"
        effect.mixed.append((source, dim))
        effect.hint = Label(1, parts)
        return effect
    effect.labels += [((n, dim), piece) for n, piece in zip(op.outputs, pieces, strict=True) if (n, dim) not in labels]
    return effect


def _segments(label: Label | None, size: int) -> tuple[int, ...]:
    """The segments of one part of a dim, as segments of the whole."""
    return (size,) if label is None or label.repeat > 16 else label.segments * label.repeat


def _pieces(label: Label, parts: tuple[int, ...]) -> list[Label] | None:
    """The labels of consecutive parts of a labelled dim, if each is made of whole segments."""
    if len(parts) == 1:
        return [label]
    if label.repeat > 1 and len(label.segments) == 1 and len(set(parts)) == 1 and label.repeat % len(parts) == 0:
        return [Label(label.repeat // len(parts), label.segments)] * len(parts)
    segments = list(label.segments) * label.repeat if label.repeat <= 16 else []
    pieces = []
    for part in parts:
        taken: list[int] = []
        while segments and sum(taken) < part:
            taken.append(segments.pop(0))
        if sum(taken) != part:
            return None
        pieces.append(Label(1, tuple(taken)))
    return pieces


def _cat(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect:
    result = op.outputs[0]
    rank = len(values[result].shape)
    given = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
    dim = int(given) % rank
    sources = [n for n in op.inputs if len(values[n].shape) == rank]
    effect = Effect()
    for other in range(rank):
        everyone = (*sources, result)
        known = next((labels[n, other] for n in everyone if (n, other) in labels), None)
        if known is None:
            continue
        if other != dim:
            effect.labels += [((n, other), known) for n in everyone if (n, other) not in labels]
            continue
        parts = tuple(values[n].shape[dim] for n in sources)
        effect.labels += [((n, dim), whole_dim(p)) for n, p in zip(sources, parts, strict=True) if (n, dim) not in labels]
        if (result, dim) not in labels:
            effect.labels.append(((result, dim), Label(1, parts)))
        elif labels[result, dim].segments != parts and len(parts) > 1:
            effect.blocked, effect.hint = f"{op.func} joins parts that are not cut alike", Label(1, parts)
            effect.mixed.append((result, dim))
    return effect


def _slice(op: RawOp, values: Sequence[Value], labels: dict[Place, Label]) -> Effect | None:
    """Every n-th element of a labelled dim (interleaved parts): chunks stay chunks. Other slices go by letters."""
    source, result = op.inputs[0], op.outputs[0]
    sizes = values[source].shape
    args = [*op.args[1:], *[None] * 4][:4]
    dim = int(args[0] or 0) % max(len(sizes), 1) if not isinstance(args[0], Ref) else 0
    step = args[3] if isinstance(args[3], int) else 1
    made = values[result].shape
    label = labels.get((source, dim)) or labels.get((result, dim))
    if label is None or made[dim] == sizes[dim]:
        return None
    effect = Effect()
    if step > 1 and made[dim] * step == sizes[dim] and label.repeat == 1 and len(label.segments) == 1:
        effect.labels = [(place, whole_dim(s)) for place, s in (((source, dim), sizes[dim]), ((result, dim), made[dim]))]
        effect.labels = [item for item in effect.labels if item[0] not in labels]
        return effect
    if (source, dim) in labels:
        start, end = int(args[1] or 0), min(int(args[2] if args[2] is not None else sizes[dim]), sizes[dim])
        cuts = tuple(part for part in (start, end - start, sizes[dim] - end) if part > 0)
        edges = _edges(label)
        if start in edges and end in edges:
            inside = tuple(s for s, edge in zip(list(label.segments) * label.repeat, edges, strict=False) if start <= edge < end)
            effect.labels.append(((result, dim), Label(1, inside)))
            return effect if (result, dim) not in labels else Effect()
        effect.blocked, effect.hint = f"{op.func} takes a part of the dim that is not cut alike", Label(1, cuts)
        effect.mixed.append((source, dim))
        return effect
    return None


def _edges(label: Label) -> list[int]:
    """Where segments begin, and where the last one ends."""
    if label.repeat * len(label.segments) > 64:
        return [0, label.size]
    edges = [0]
    for size in list(label.segments) * label.repeat:
        edges.append(edges[-1] + size)
    return edges
