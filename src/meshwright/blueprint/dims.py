"""What an ATen op does to the dims of its tensors: which run together, which are summed over, which must stay whole.

Each op is described like an einsum: a letter per dim, equal letters run together. A letter in `summed` is contracted
(sharding it leaves partial sums), one in `whole` needs all of its elements at once (softmax, norms, sorting). Ops that
re-divide dims (views, splits, concatenations) are described by `moves.py`. An op that is not known has every dim whole:
nothing is claimed about it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.blueprint import costs
from meshwright.blueprint.tape import RawOp, Ref, Value

Letters = list[int]
NONE = -1
"""A dim of size one that is broadcast, or one that no other dim runs together with."""


@dataclass
class OpDims:
    """Letters per dim of every tensor that an op reads (`inputs`) and makes (`outputs`), by value number."""

    inputs: list[tuple[int, Letters]]
    outputs: list[tuple[int, Letters]]
    summed: set[int] = field(default_factory=set)
    whole: set[int] = field(default_factory=set)
    known: bool = True


class Letterer:
    """Hands out letters for one op and looks up the op's operands."""

    def __init__(self, op: RawOp, values: Sequence[Value]) -> None:
        self.op, self.values = op, values
        self._next = itertools.count()

    def new(self, count: int) -> Letters:
        """`count` fresh letters."""
        return [next(self._next) for _ in range(count)]

    def shape(self, number: int) -> tuple[int, ...]:
        """Shape of a value."""
        return self.values[number].shape

    def arg(self, place: int, name: str = "", default: Any = None) -> Any:
        """An argument by place or name."""
        if place < len(self.op.args):
            return self.op.args[place]
        return self.op.kwargs.get(name, default)

    def dim(self, place: int, name: str, size: int, default: int = -1) -> int:
        """A dim argument as a number from 0."""
        value = self.arg(place, name, default)
        return int(value) % max(size, 1)


def describe(op: RawOp, values: Sequence[Value]) -> OpDims:
    """The dims of one forward op among numbered values."""
    letterer = Letterer(op, values)
    name = costs.base_name(op.func)
    rule = _RULES.get(name)
    if rule is None and (torch.Tag.pointwise in op.func.tags or name in _LIKE_POINTWISE):
        rule = _pointwise
    described = rule(letterer) if rule is not None else None
    return described if described is not None else _unknown(letterer)


def _unknown(at: Letterer) -> OpDims:
    inputs = [(n, at.new(len(at.shape(n)))) for n in at.op.inputs]
    outputs = [(n, at.new(len(at.shape(n)))) for n in at.op.outputs]
    letters = {letter for _, group in inputs for letter in group}
    return OpDims(inputs, outputs, whole=letters, known=False)


_LIKE_POINTWISE = {"clone", "_to_copy", "copy", "zeros_like", "ones_like", "full_like", "empty_like", "masked_fill", "where"}
_LIKE_POINTWISE |= {"native_dropout", "bernoulli", "rand_like", "detach", "fill", "zero", "contiguous", "lift_fresh", "alias"}
_LIKE_POINTWISE |= {"_fused_dropout", "tril", "triu"}


def _pointwise(at: Letterer) -> OpDims | None:
    """Dims align from the right; size one against a larger size is broadcast."""
    if not at.op.outputs:
        return None
    shape = at.shape(at.op.outputs[0])
    letters = at.new(len(shape))

    def aligned(number: int) -> Letters | None:
        own = at.shape(number)
        tail = letters[len(letters) - len(own) :]
        sizes = shape[len(shape) - len(own) :]
        if len(own) > len(shape) or any(a not in (1, b) for a, b in zip(own, sizes, strict=True)):
            return None
        return [letter if a == b else NONE for letter, a, b in zip(tail, own, sizes, strict=True)]

    inputs = [(n, aligned(n)) for n in at.op.inputs]
    outputs = [(n, aligned(n)) for n in at.op.outputs]
    if any(group is None for _, group in [*inputs, *outputs]):
        return None
    whole = set(letters[-2:]) if costs.base_name(at.op.func) in ("tril", "triu") else set()
    return OpDims([(n, g or []) for n, g in inputs], [(n, g or []) for n, g in outputs], whole=whole)


def _mm(at: Letterer) -> OpDims:
    m, k, n = at.new(3)
    a, b = at.op.inputs[-2:]
    inputs = [(a, [m, k]), (b, [k, n])]
    if len(at.op.inputs) == 3:
        bias = at.op.inputs[0]
        inputs.insert(0, (bias, [n] if len(at.shape(bias)) == 1 else [m, n]))
    return OpDims(inputs, [(at.op.outputs[0], [m, n])], summed={k})


def _bmm(at: Letterer) -> OpDims:
    b, m, k, n = at.new(4)
    left, right = at.op.inputs[-2:]
    inputs = [(left, [b, m, k]), (right, [b, k, n])]
    if len(at.op.inputs) == 3:
        inputs.insert(0, (at.op.inputs[0], [b, m, n][3 - len(at.shape(at.op.inputs[0])) :]))
    return OpDims(inputs, [(at.op.outputs[0], [b, m, n])], summed={k})


def _grouped_mm(at: Letterer) -> OpDims | None:
    a, b = at.op.inputs[:2]
    if len(at.shape(a)) != 2 or len(at.shape(b)) != 3:
        return None
    rows, k, groups, n, offsets = at.new(5)
    inputs = [(a, [rows, k]), (b, [groups, k, n]), *((extra, [offsets]) for extra in at.op.inputs[2:])]
    return OpDims(inputs, [(at.op.outputs[0], [rows, n])], summed={k}, whole={groups, offsets})


def _attention(at: Letterer) -> OpDims | None:
    q, k, v = at.op.inputs[:3]
    if any(len(at.shape(n)) != 4 for n in (q, k, v)):
        return None
    b, h, s, d, t, e = at.new(6)
    inputs = [(q, [b, h, s, d]), (k, [b, h, t, d]), (v, [b, h, t, e])]
    for mask in at.op.inputs[3:]:
        shape = at.shape(mask)
        letters = [b, h, s, t][4 - len(shape) :]
        inputs.append((mask, [NONE if size == 1 else x for size, x in zip(shape, letters, strict=True)]))
    outputs = [(at.op.outputs[0], [b, h, s, e])]
    for extra in at.op.outputs[1:]:  # the sums per row; random state has one dim or none
        rank = len(at.shape(extra))
        outputs.append((extra, [b, h, s, NONE][:rank] if rank >= 3 else at.new(rank)))
    return OpDims(inputs, outputs, whole={d, t})


def _convolution(at: Letterer) -> OpDims | None:
    x, w = at.op.inputs[:2]
    transposed, groups = bool(at.arg(6)), int(at.arg(8))
    n, c, o = at.new(3)
    spatial = at.new(len(at.shape(x)) - 2)
    out_spatial, kernel = at.new(len(spatial)), at.new(len(spatial))
    if groups == 1:
        weight = [c, o, *kernel] if transposed else [o, c, *kernel]
        summed = {c}
    elif groups == at.shape(x)[1] == at.shape(w)[0]:
        weight, o, summed = [c, NONE, *kernel], c, set()  # depthwise: channels run together
    else:
        return None
    inputs = [(x, [n, c, *spatial]), (w, weight), *((bias, [o]) for bias in at.op.inputs[2:])]
    # A kernel of one step leaves positions independent.
    if not transposed and all(size == 1 for size in at.shape(w)[2:]) and at.shape(x)[2:] == at.shape(at.op.outputs[0])[2:]:
        out_spatial = spatial
    whole = {letter for letter in (*spatial, *kernel) if letter not in out_spatial}
    return OpDims(inputs, [(at.op.outputs[0], [n, o, *out_spatial])], summed=summed, whole=whole)


def _reduced(at: Letterer) -> OpDims | None:
    """Sums, means and the like over some dims; with no dims given, over all."""
    source = at.op.inputs[0]
    shape = at.shape(source)
    dims = at.arg(2 if costs.base_name(at.op.func) == "linalg_vector_norm" else 1, "dim")
    if isinstance(dims, Ref) or len(at.op.inputs) > 1:
        return None
    listed = list(range(len(shape))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    gone = {int(d) % max(len(shape), 1) for d in listed}
    letters = at.new(len(shape))
    kept = [letter for place, letter in enumerate(letters) if place not in gone]
    outputs = []
    for number in at.op.outputs:
        keeps = len(at.shape(number)) == len(shape)
        outputs.append((number, [NONE if p in gone else x for p, x in enumerate(letters)] if keeps else kept))
    return OpDims([(source, letters)], outputs, whole={letters[d] for d in gone})


def _along(at: Letterer) -> OpDims:
    """One dim is looked at as a whole, the others run together: softmax, cumulative sums, sorting."""
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    place = {"topk": 2, "sort": 1}.get(costs.base_name(at.op.func), 1)
    value = at.arg(place, "dim", None if costs.base_name(at.op.func) in ("argmax", "argmin") else -1)
    if not isinstance(value, int):  # over all elements
        return OpDims([(source, letters)], [(n, at.new(len(at.shape(n)))) for n in at.op.outputs], whole=set(letters))
    dim = int(value) % max(len(letters), 1)
    outputs = []
    for number in at.op.outputs:
        own = list(letters) if len(at.shape(number)) == len(letters) else at.new(len(at.shape(number)))
        if own and len(own) == len(letters):
            own[dim] = at.new(1)[0]
        outputs.append((number, own))
    return OpDims([(source, letters)], outputs, whole={letters[dim]} if letters else set())


def _moved(at: Letterer) -> OpDims:
    """flip and roll: some dims are put in another order; a roll without dims reorders everything."""
    source, result = at.op.inputs[0], at.op.outputs[0]
    letters, places = at.new(len(at.shape(source))), at.new(len(at.shape(source)))
    given = at.arg(1 if costs.base_name(at.op.func) == "flip" else 2, "dims", [])
    dims = {int(dim) % max(len(letters), 1) for dim in given or range(len(letters))}
    moved = [places[dim] if dim in dims else letter for dim, letter in enumerate(letters)]
    return OpDims([(source, letters)], [(result, moved)], whole={x for dim in dims for x in (letters[dim], places[dim])})


def _layer_norm(at: Letterer) -> OpDims:
    source = at.op.inputs[0]
    rank, normal = len(at.shape(source)), len(at.arg(1))
    letters = at.new(rank)
    inner = letters[rank - normal :]
    inputs = [(source, letters), *((n, list(inner)) for n in at.op.inputs[1:])]
    outputs = [(at.op.outputs[0], list(letters))]
    outputs += [(n, [*letters[: rank - normal], *[NONE] * normal]) for n in at.op.outputs[1:]]
    return OpDims(inputs, outputs, whole=set(inner))


def _channel_norm(at: Letterer) -> OpDims:
    """Batch norm: channels are independent of each other, everything else is averaged over."""
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    inputs = [(source, letters), *((n, [letters[1]]) for n in at.op.inputs[1:] if len(at.shape(n)) == 1)]
    outputs = [(at.op.outputs[0], list(letters))]
    outputs += [
        (n, [letters[1]] if len(at.shape(n)) == 1 and at.shape(n)[0] else [NONE] * len(at.shape(n))) for n in at.op.outputs[1:]
    ]
    return OpDims(inputs, outputs, whole={x for place, x in enumerate(letters) if place != 1})


def _group_norm(at: Letterer) -> OpDims:
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    inputs = [(source, letters), *((n, [letters[1]]) for n in at.op.inputs[1:])]
    outputs = [(at.op.outputs[0], list(letters)), *((n, [letters[0], NONE]) for n in at.op.outputs[1:])]
    return OpDims(inputs, outputs, whole=set(letters[1:]))


def _image(at: Letterer) -> OpDims:
    """Pooling and resizing: items and channels are independent, the image (the last two dims) is not."""
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    outputs = [(n, [*letters[:-2], *at.new(2)]) for n in at.op.outputs]
    return OpDims([(source, letters)], outputs, whole=set(letters[-2:]))


def _embedding(at: Letterer) -> OpDims:
    table, index = at.op.inputs
    rows, width = at.new(2)
    letters = at.new(len(at.shape(index)))
    return OpDims([(table, [rows, width]), (index, letters)], [(at.op.outputs[0], [*letters, width])], summed={rows})


def _index(at: Letterer) -> OpDims | None:
    """Advanced indexing: dims without an index pass through, indexed ones are looked up as a whole."""
    source, indices = at.op.args[0], at.op.args[1]
    shape = at.shape(source.number)
    letters = at.new(len(shape))
    used = [place for place, index in enumerate(indices) if isinstance(index, Ref)]
    ranks = [len(at.shape(indices[place].number)) for place in used]
    if not used or any(at.values[indices[p].number].dtype == torch.bool for p in used):
        return None
    shapes = [at.shape(indices[p].number) for p in used]
    index_shape = tuple(max(shape[-d] for shape in shapes if len(shape) >= d) for d in range(max(ranks), 0, -1))
    index_letters = at.new(len(index_shape))
    together = used == list(range(used[0], used[-1] + 1))
    front = letters[: used[0]] if together else []
    back = [x for place, x in enumerate(letters) if place not in used and (not together or place > used[-1])]
    inputs = [(source.number, letters)]
    for place, rank in zip(used, ranks, strict=True):
        own = at.shape(indices[place].number)
        tail = index_letters[len(index_letters) - rank :]
        sizes = index_shape[len(index_shape) - rank :]
        inputs.append((indices[place].number, [x if a == b else NONE for x, a, b in zip(tail, own, sizes, strict=True)]))
    outputs = [(at.op.outputs[0], [*front, *index_letters, *back])]
    return OpDims(inputs, outputs, whole={letters[place] for place in used})


def _index_add(at: Letterer) -> OpDims:
    """`self.index_add(dim, index, source)` and its kin: every dim but `dim` runs together."""
    target, index, source = at.op.inputs[:3]
    letters = at.new(len(at.shape(target)))
    dim = int(at.arg(1)) % max(len(letters), 1)
    other = list(letters)
    other[dim] = at.new(1)[0]
    rank = len(at.shape(index))
    index_letters = list(other) if rank == len(other) else [other[dim]] * rank
    inputs = [(target, letters), (index, index_letters), (source, other)]
    return OpDims(inputs, [(at.op.outputs[0], list(letters))], whole={letters[dim], other[dim]})


def _gather(at: Letterer) -> OpDims:
    source, index = at.op.inputs[:2]
    dim = int(at.arg(1)) % max(len(at.shape(source)), 1)
    letters = at.new(len(at.shape(source)))
    own = [x if a == b else at.new(1)[0] for x, a, b in zip(letters, at.shape(source), at.shape(index), strict=True)]
    own[dim] = at.new(1)[0]  # along this dim, and where the index is shorter, elements are picked by their place
    return OpDims([(source, letters), (index, own)], [(at.op.outputs[0], list(own))], whole=set(letters) ^ set(own))


def _permuted(at: Letterer) -> OpDims:
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    name, rank = costs.base_name(at.op.func), len(letters)
    order = list(range(rank))
    if name == "permute":
        order = [int(d) % rank for d in at.arg(1)]
    elif rank > 1:
        a, b = (0, 1) if name == "t" else (int(at.arg(1)) % rank, int(at.arg(2)) % rank)
        order[a], order[b] = order[b], order[a]
    return OpDims([(source, letters)], [(at.op.outputs[0], [letters[place] for place in order])])


def _expanded(at: Letterer) -> OpDims:
    source, result = at.op.inputs[0], at.op.outputs[0]
    letters = at.new(len(at.shape(result)))
    tail = letters[len(letters) - len(at.shape(source)) :]
    sizes = at.shape(result)[len(letters) - len(tail) :]
    own = [x if a == b else NONE for x, a, b in zip(tail, at.shape(source), sizes, strict=True)]
    return OpDims([(source, own)], [(result, letters)])


def _inserted(at: Letterer) -> OpDims:
    """unsqueeze and stack: a new dim among the old ones."""
    letters = at.new(len(at.shape(at.op.inputs[0])))
    dim = int(at.arg(1, "dim", 0)) % (len(letters) + 1)
    result = [*letters[:dim], NONE, *letters[dim:]]
    return OpDims([(n, list(letters)) for n in at.op.inputs], [(at.op.outputs[0], result)])


def _removed(at: Letterer) -> OpDims:
    """squeeze, select and unbind: a dim goes; the elements picked from it must not be spread over ranks."""
    source = at.op.inputs[0]
    letters = at.new(len(at.shape(source)))
    name = costs.base_name(at.op.func)
    dims = at.arg(1, "dim", 0 if name == "unbind" else None)
    if name == "squeeze" and dims is None:
        gone = {place for place, size in enumerate(at.shape(source)) if size == 1}
    else:
        listed = [dims] if isinstance(dims, int) else list(dims)
        gone = {int(d) % len(letters) for d in listed}
    if name == "squeeze":
        gone = {place for place in gone if at.shape(source)[place] == 1}
    kept = [x for place, x in enumerate(letters) if place not in gone]
    return OpDims([(source, letters)], [(n, list(kept)) for n in at.op.outputs], whole={letters[d] for d in gone})


def _cut(at: Letterer) -> OpDims:
    """slice, narrow, padding, tiling: dims that keep their size run together, the others are looked at as a whole."""
    source, result = at.op.inputs[0], at.op.outputs[0]
    letters = at.new(len(at.shape(result)))
    tail = letters[len(letters) - len(at.shape(source)) :]
    sizes = at.shape(result)[len(letters) - len(tail) :]
    own = [x if a == b else at.new(1)[0] for x, a, b in zip(tail, at.shape(source), sizes, strict=True)]
    if costs.base_name(at.op.func) == "constant_pad_nd":
        pads = at.arg(1)  # pairs, from the last dim on: one element more here and one less there is a shift
        for place in range(len(pads) // 2):
            if any(pads[2 * place : 2 * place + 2]):
                own[-1 - place] = at.new(1)[0]
    return OpDims([(source, own)], [(result, letters)], whole=set(own) - set(tail))


def _complex(at: Letterer) -> OpDims:
    """Pairs of numbers seen as complex ones, and back: the last dim of the real side has size two."""
    source, result = at.op.inputs[0], at.op.outputs[0]
    letters = at.new(max(len(at.shape(source)), len(at.shape(result))))
    return OpDims([(source, letters[: len(at.shape(source))])], [(result, letters[: len(at.shape(result))])], whole={letters[-1]})


def _nothing(at: Letterer) -> OpDims:
    return OpDims([(n, at.new(len(at.shape(n)))) for n in at.op.inputs], [(n, at.new(len(at.shape(n)))) for n in at.op.outputs])


_IMAGES = ("avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d")
_SUMS = ("sum", "mean", "amax", "amin", "var", "var_mean", "std", "logsumexp", "any", "all", "linalg_vector_norm", "max", "min")
_ALONG = ("_softmax", "_safe_softmax", "_log_softmax", "cumsum", "topk", "sort", "argmax", "argmin", "logcumsumexp")
_RULES: dict[str, Callable[[Letterer], OpDims | None]] = {
    **dict.fromkeys(("mm", "addmm"), _mm),
    **dict.fromkeys(("bmm", "baddbmm"), _bmm),
    **dict.fromkeys(_SUMS, _reduced),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(("flip", "roll"), _moved),
    **dict.fromkeys(_IMAGES, _image),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"), _channel_norm),
    **dict.fromkeys(("index_add", "index_copy"), _index_add),
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "empty", "arange"), _nothing),
    **dict.fromkeys(("permute", "transpose", "t"), _permuted),
    **dict.fromkeys(("unsqueeze", "stack"), _inserted),
    **dict.fromkeys(("squeeze", "select", "unbind"), _removed),
    **dict.fromkeys(("slice", "narrow", "constant_pad_nd", "repeat"), _cut),
    **dict.fromkeys(("view_as_complex", "view_as_real"), _complex),
    "expand": _expanded,
    "_grouped_mm": _grouped_mm,
    **dict.fromkeys(costs.ATTENTION, _attention),
    "convolution": _convolution,
    "native_group_norm": _group_norm,
    "embedding": _embedding,
    "index": _index,
    "gather": _gather,
}
