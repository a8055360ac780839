"""Which weights can be split together for tensor parallelism, found by following a split through a captured graph.

The output features of each weight product are cut in thought; the cut is followed forwards and backwards through every
op that the values meet (`moves.py`) until each path ends in a product that sums over it with a weight cut the same way
(partial sums: one all-reduce), or in a refusal. Values without a gradient may be cut wherever they enter (a mask is
sliced locally). The same rules, followed forwards only and without refusing, tell which ops work on each position of
the sequence alone. Which region to use, and at what degree, is the planner's choice.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from meshwright.blueprint import costs
from meshwright.blueprint.moves import Label, Place, spread, whole_dim
from meshwright.blueprint.record import Count, Experts, Region, Split
from meshwright.blueprint.tape import RawOp, Ref, Value

_PRODUCTS = {"mm": 1, "addmm": 1, "convolution": 1, "_grouped_mm": 1, "bmm": 2, "baddbmm": 2}
_LOSSES = {"_log_softmax", "logsumexp", "_softmax", "_safe_softmax", "argmax", "max", "amax"}


@dataclass
class Findings:
    """What was found on one tape."""

    regions: list[Region] = field(default_factory=list)
    region_of_op: dict[int, int] = field(default_factory=dict)
    region_of_value: dict[int, int] = field(default_factory=dict)
    mixing_ops: set[int] = field(default_factory=set)
    experts: Experts | None = None
    refusals: dict[str, str] = field(default_factory=dict)
    """Why a weight's output features can't be cut."""


def find(
    ops: Sequence[RawOp],
    values: Sequence[Value],
    outputs: list[int],
    sequence: int = 0,
    open_ended: bool = False,
    size: Callable[[Iterable[int]], Count] = lambda _: Count(),
) -> Findings:
    """Regions, sequence-wise ops and routing among the ops of a forward.

    `outputs` are the unit's results, which must come out whole unless `open_ended` (the model's own output, such as
    logits, may stay cut). `sequence` is the length to look for in the inputs, 0 if the batch has none. `size` gives the
    bytes of some values.
    """
    graph = _Graph(ops, values, set(outputs), open_ended)
    found = Findings(mixing_ops=_mixing(graph, sequence))
    found.experts = _experts(graph)
    taken: set[str] = set()
    for place, op in enumerate(graph.ops):
        trial = _try_op(graph, place, op, taken, found.refusals)
        if trial is None:
            continue
        region = trial.region(graph, found.experts, size)
        number = len(found.regions)
        found.regions.append(region)
        taken |= {split.tensor for split in (*region.columns, *region.rows)}
        found.region_of_op.update(dict.fromkeys(region.ops, number))
        found.region_of_value.update({value: number for value, _ in trial.labels})
    found.refusals = {name: why for name, why in found.refusals.items() if name not in taken}
    # A storage that was saved through a view counts as cut if any view of it is.
    by_storage = {values[value].storage: number for value, number in found.region_of_value.items()}
    for number, value in enumerate(values):
        if value.storage in by_storage and value.role == "made":
            found.region_of_value.setdefault(number, by_storage[value.storage])
    return found


class _Graph:
    """Producers, readers and gradients of the values that some ops work on."""

    def __init__(self, ops: Sequence[RawOp], values: Sequence[Value], outputs: set[int], open_ended: bool) -> None:
        self.ops, self.values, self.outputs, self.open_ended = ops, values, outputs, open_ended
        self.producer: dict[int, int] = {}
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.graded = {n for n, v in enumerate(values) if v.needs_gradient or v.producer < -1}
        self.weights: dict[int, int] = {n: n for n, v in enumerate(values) if v.role == "parameter" and v.producer == -1}
        for place, op in enumerate(self.ops):
            for number in op.inputs:
                self.readers[number].append(place)
            for number in op.outputs:
                self.producer[number] = place
            if any(number in self.graded for number in op.inputs):
                self.graded.update(n for n in op.outputs if values[n].dtype.is_floating_point)
            # A view, a cast or a choice of an expert of a weight is a weight still.
            passes_on = costs.kind_of(op.func) in ("view", "copy", "routing")
            if passes_on and op.inputs[:1] and op.inputs[0] in self.weights and not self.graded & set(op.inputs[1:]):
                self.weights.update(dict.fromkeys(op.outputs, self.weights[op.inputs[0]]))

    def name(self, number: int) -> str:
        """The name of a parameter."""
        return self.values[number].name


@dataclass
class _Trial:
    """One attempt to cut: the labels so far, and where it ended."""

    seed: int
    labels: dict[Place, Label] = field(default_factory=dict)
    ops: set[int] = field(default_factory=set)
    closing: set[int] = field(default_factory=set)
    entered: set[int] = field(default_factory=set)
    reduced_values: set[int] = field(default_factory=set)
    leaves_open: bool = False
    refused: str = ""
    hint: Label | None = None

    def region(self, graph: _Graph, experts: Experts | None, size: Callable[[Iterable[int]], Count]) -> Region:
        """The record of a trial that succeeded."""
        splits: dict[str, list[Split]] = {"columns": [], "rows": [], "vectors": []}
        for (number, dim), label in sorted(self.labels.items()):
            value = graph.values[number]
            if not value.declared or value.role != "parameter":
                continue
            split = Split(value.name, dim, label.segments, label.repeat)
            kind = "vectors" if len(value.shape) == 1 else "rows" if self._is_summed(graph, number, dim) else "columns"
            splits[kind].append(split)
        name = costs.base_name(graph.ops[self.seed].func)
        kind = "embedding" if name == "embedding" else "head" if self.leaves_open else "column-row"
        weights = {split.tensor for split in (*splits["columns"], *splits["rows"])}
        routed = experts is not None and any(
            weight in experts.stacked or weight.startswith(tuple(f"{m}." for m in experts.modules)) for weight in weights
        )
        return Region(
            kind=kind,
            units=min(label.units for label in self.labels.values()),
            columns=tuple(splits["columns"]),
            rows=tuple(splits["rows"]),
            vectors=tuple(splits["vectors"]),
            ops=tuple(sorted(self.ops)),
            reduced=tuple(sorted(self.closing)),
            reduced_bytes=size(self.reduced_values),
            entered_bytes=size(self.entered),
            attention=any(_is_attention(graph, place) for place in self.ops),
            experts=routed,
            open_ended=self.leaves_open,
        )

    def _is_summed(self, graph: _Graph, number: int, dim: int) -> bool:
        """Whether a weight's dim is the one that a closing product sums over: followed through the weight's views."""
        reached = {(number, dim)}
        for place in sorted(self.ops):
            op = graph.ops[place]
            if not any((n, d) in reached for n in op.inputs for d in range(4)):
                continue
            if place in self.closing:
                return True
            reached |= {(n, d) for n in op.outputs if n in graph.weights for d in range(4) if (n, d) in self.labels}
        return False


def _is_attention(graph: _Graph, place: int) -> bool:
    """A fused attention, or a softmax over scores: attention written out."""
    op = graph.ops[place]
    if costs.kind_of(op.func) == "attention":
        return True
    return costs.base_name(op.func) in ("_softmax", "_safe_softmax") and len(graph.values[op.outputs[0]].shape) >= 3


def _try_op(graph: _Graph, place: int, op: RawOp, taken: set[str], refusals: dict[str, str]) -> _Trial | None:
    """Try to open a region at a weight product or an embedding; a refusal may propose another way to cut, which is
    tried too.
    """
    name = costs.base_name(op.func)
    if name == "embedding":
        table = graph.weights.get(op.inputs[0])
        if table is None or graph.name(table) in taken:
            return None
        trial = _Trial(place)
        rows = graph.values[table].shape[0]
        return trial if _grow(graph, trial, [((table, 0), whole_dim(rows))]) else None
    weight = next((graph.weights[n] for n in reversed(op.inputs) if n in graph.weights), None)
    if name not in _PRODUCTS or weight is None or graph.name(weight) in taken:
        return None
    if len(graph.values[weight].shape) < 2 or all(n in graph.weights for n in op.inputs):
        return None
    dim = _PRODUCTS[name]
    size = graph.values[op.outputs[0]].shape[dim]
    labels, tried = [whole_dim(size)], set[Label]()
    while labels:
        label = labels.pop(0)
        if label in tried or label.size != size:
            continue
        tried.add(label)
        trial = _Trial(place)
        if _grow(graph, trial, [((op.outputs[0], dim), label)]):
            return trial
        refusals.setdefault(graph.name(weight), trial.refused or "no weight sums over the cut")
        if trial.hint is not None and len(tried) < 6:
            parts = trial.hint
            if parts.size == size:
                labels.append(parts)
            elif parts.repeat > 1 and size % parts.repeat == 0:
                labels.append(Label(parts.repeat, (size // parts.repeat,)))
            if parts.repeat > 1 and parts.repeat == parts.size and size % parts.repeat == 0:
                labels.append(Label(parts.repeat, (size // parts.repeat,)))
    return None


def _grow(graph: _Graph, trial: _Trial, start: list[tuple[Place, Label]]) -> bool:
    """Follow the cut from `start` until nothing new follows; True if every path ended well."""
    queue: deque[int] = deque()

    def put(place: Place, label: Label) -> None:
        """Add a label, or refuse."""
        other = next((d for d in range(len(graph.values[place[0]].shape)) if (place[0], d) in trial.labels), None)
        if other is not None and other != place[1]:
            trial.refused = trial.refused or "two dims of one tensor would be cut"
        elif label.units < 2:
            trial.refused = trial.refused or "nothing is left to divide"
        elif place not in trial.labels:
            trial.labels[place] = label
            queue.append(place[0])

    for place, label in start:
        put(place, label)
    while queue and not trial.refused:
        number = queue.popleft()
        if not _enters(graph, trial, number):
            continue
        touching = list(graph.readers.get(number, []))
        made_by = graph.producer.get(number)
        if made_by is not None:
            touching.append(made_by)
        for step in touching:
            for where, label in _step(graph, trial, step, step == made_by and number not in graph.graded):
                put(where, label)
            if trial.refused:
                return False
    if trial.refused or not (trial.closing or trial.leaves_open):
        return False
    return _is_worth(graph, trial)


def _is_worth(graph: _Graph, trial: _Trial) -> bool:
    """At least one weight matrix is cut, and what enters is not itself cut."""
    cut = {n for n, _ in trial.labels}
    trial.entered -= cut
    return any(n in graph.weights and len(graph.values[n].shape) >= 2 for n in cut)


def _enters(graph: _Graph, trial: _Trial, number: int) -> bool:
    """Whether a cut value's own neighbours are to be followed; refuses a cut of what must come in or go out whole."""
    value = graph.values[number]
    if number in graph.outputs and number in graph.graded:
        if not graph.open_ended:
            trial.refused = "the cut reaches the unit's output"
            return False
        trial.leaves_open = True
    if value.producer == -1 and value.role != "parameter" and number in graph.graded:
        dim = next(d for n, d in trial.labels if n == number)
        # A bias per head that another block computed can be sliced; a hidden state's features can't, for a norm needs
        # them all.
        if len(value.shape) < 4 or dim == len(value.shape) - 1:
            trial.refused = "the cut reaches the unit's input"
            return False
    if value.producer < -1:
        trial.refused = "the cut reaches a block's result"
        return False
    return True


def _step(graph: _Graph, trial: _Trial, place: int, may_slice: bool) -> list[tuple[Place, Label]]:
    """Labels that follow at one op. `may_slice`: the op only makes a value without gradient, which can be cut
    afterwards.
    """
    op = graph.ops[place]
    effect = spread(op, graph.values, trial.labels)
    if effect.blocked:
        if may_slice:
            return []
        name = costs.base_name(op.func)
        if graph.open_ended and name in _LOSSES and any((n, d) in trial.labels for n in op.inputs for d in range(4)):
            trial.leaves_open = True
            return []
        trial.refused, trial.hint = effect.blocked, effect.hint
        return []
    if effect.closes:
        if not any(n in graph.weights for n in op.inputs):
            trial.refused = f"{op.func} would sum over the cut without a weight"
            return []
        trial.closing.add(place)
        trial.reduced_values.update(op.outputs[:1])
    trial.ops.add(place)
    if not effect.closes and costs.base_name(op.func) in _PRODUCTS:
        labelled = {n for n, _ in trial.labels} | {where[0] for where, _ in effect.labels}
        trial.entered.update(n for n in op.inputs if n not in graph.weights and n not in labelled and n in graph.graded)
    return effect.labels


def _mixing(graph: _Graph, sequence: int) -> set[int]:
    """The ops whose result at one position of the sequence needs other positions."""
    found: set[int] = set()
    labels: dict[Place, Label] = {}
    inputs = [(n, v) for n, v in enumerate(graph.values) if v.producer < 0 and v.role in ("input", "made", "constant")]
    lengths = [v.shape[1] for _, v in inputs if len(v.shape) == 3 and v.dtype.is_floating_point]
    if sequence not in lengths and lengths:
        sequence = lengths[0]
    if sequence < 2:
        return found
    for number, value in inputs:
        first = 1 if len(value.shape) >= 2 and value.shape[0] != sequence else 0
        dim = next((d for d in range(first, len(value.shape)) if value.shape[d] == sequence), None)
        if dim is not None and len(value.shape) <= 4:
            labels[number, dim] = whole_dim(sequence)
    for place, op in enumerate(graph.ops):
        if not any((n, d) in labels for n in op.inputs for d in range(5)):
            continue
        effect = spread(op, graph.values, labels)
        if effect.mixed or effect.closes:
            found.add(place)
        results = set(op.outputs)
        labels.update({where: label for where, label in effect.labels if where[0] in results})
    return found


def _experts(graph: _Graph) -> Experts | None:
    """Routing: a choice of k among E, and E weights or E modules that tokens are sent to by it."""
    for op in graph.ops:
        if costs.base_name(op.func) != "topk" or not isinstance(op.args[0], Ref):
            continue
        shape, chosen = graph.values[op.args[0].number].shape, graph.values[op.outputs[1]].shape
        if not shape or shape[-1] < 2:
            continue
        names = [v.name for v in graph.values if v.role == "parameter" and v.declared]
        stacked = tuple(name for n, name in _stacked(graph, shape[-1]))
        modules = _expert_modules(names, shape[-1])
        if stacked or modules:
            return Experts(shape[-1], chosen[-1], stacked, () if stacked else modules)
    return None


def _stacked(graph: _Graph, experts: int) -> list[tuple[int, str]]:
    """Parameters with one entry per expert on dim 0: at least a matrix each, looked up or multiplied in groups."""
    found = []
    for number, origin in graph.weights.items():
        value = graph.values[number]
        if number == origin and value.shape[:1] == (experts,) and len(value.shape) >= 3:
            found.append((number, value.name))
    return found


def _expert_modules(names: list[str], experts: int) -> tuple[str, ...]:
    """Sibling modules, one per expert: paths that differ in one number only and of which there are `experts`."""
    families: dict[str, dict[str, None]] = defaultdict(dict)
    for name in names:
        for match in re.finditer(r"\.(\d+)(?=\.)|^(\d+)(?=\.)", name):
            families[name[: match.start()]].setdefault(name[: match.end()])
    for members in families.values():
        if len(members) == experts:
            return tuple(members)
    return ()
