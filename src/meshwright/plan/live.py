"""Which of a unit's values are alive when: a walk over its captured ops, forward and then backward, as autograd would run them.

A value lives from the op that makes it to the last that reads it; what is saved, until its saver's backward has read it. The walk
gives the worst moments of each pass as what they add to the bytes that backward keeps of the unit: values in flight, less what is
kept but freed again (or, in the forward, not there yet). Which bytes are kept is `profile.py`'s to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf, prod

from meshwright.blueprint.record import Op, Unit
from meshwright.plan.graph import Graph, Size

Moment = tuple[tuple[Size, int], ...]
"""What is alive at once, as (size, degree limit of the region in which it is cut) pairs."""
Here = Callable[[Op], bool]
_ITEMS = (1, 64)
"""Micro-batches, small and large, whose worst moments are kept."""


@dataclass(frozen=True)
class Beside:
    """What stays alive outside a unit while its backward runs.

    `passing` bytes per item, of which the gradient that comes in may be a part: a residual connection around the unit passes one
    tensor both ways. `waiting`: gradients of weights that are used again, and not whole yet.
    """

    passing: int = 0
    waiting: tuple[tuple[int, Size, int], ...] = ()


@dataclass
class _Worst:
    """The worst moments so far, for micro-batches small and large, with and without tensor parallelism."""

    graph: Graph
    found: dict[tuple[int, bool], tuple[int, dict[int, Size]]] = field(default_factory=dict)

    def see(self, alive: dict[int, Size], more: Size) -> None:
        """Keep this moment if it is worse than those before; `more` lies outside all regions."""
        sums = [[*more], [0, 0]]  # outside regions, inside: fixed bytes and bytes per item
        for root, (fixed, each) in alive.items():
            at = sums[root in self.graph.cut]
            at[0], at[1] = at[0] + fixed, at[1] + each
        for items in _ITEMS:
            for inside in (True, False):
                total = sum(fixed + each * items for fixed, each in sums[: 1 + inside])
                if total > self.found.get((items, inside), (-1, {}))[0]:
                    self.found[items, inside] = (total, alive | {-1: more})


def moments(
    unit: Unit, graph: Graph, here: Here, kept: dict[int, Size], blocked: bool, beside: Beside | None = None
) -> tuple[tuple[Moment, ...], tuple[Moment, ...]]:
    """The worst moments of forward and of backward.

    `kept` are the roots made here that backward keeps, with their bytes. `blocked`: convolutions copy what they read into a blocked
    layout first, as oneDNN's do on CPUs.
    """
    beside = beside or Beside()
    windows = _windows(unit) if blocked else set()
    forward, backward = _Worst(graph), _Worst(graph)
    for index, alive in _walk(graph, here, {}, forward=True):
        forward.see(alive, (0, graph.ops[index].read_bytes.per_item if index in windows else 0))
    for index, alive in _walk(graph, here, kept, forward=False):
        entered = sum(size[1] for root, size in alive.items() if root in graph.outer)
        copied = graph.ops[index].read_bytes.per_item if index in windows else 0
        backward.see(alive, (0, copied + max(0, beside.passing - entered)))
    waiting = tuple((size, units) for _, size, units in beside.waiting)
    ahead = tuple(dict.fromkeys(_beyond(graph, seen, kept) for _, seen in forward.found.values()))
    return ahead, tuple(dict.fromkeys((*_beyond(graph, seen, kept), *waiting) for _, seen in backward.found.values()))


def _walk(graph: Graph, here: Here, kept: dict[int, Size], forward: bool) -> Iterator[tuple[int, dict[int, Size]]]:
    """The roots that are alive at each kernel of a pass, with their sizes, and the kernel's first op.

    A weight's gradient is gone to where gradients are kept as soon as it is whole.
    """
    last = _last_read(graph)
    alive = dict(kept)
    for place, kernel in enumerate(graph.kernels):
        if (kernel.ops[0] < graph.n_forward) != forward or not here(graph.ops[kernel.ops[0]]):
            continue
        made: list[int] = []
        for index in kernel.ops:
            made += roots(graph, graph.ops[index].outputs)
            if not forward:
                made += [root for root in roots(graph, graph.ops[index].inputs) if root in graph.outer]
        for root in made:
            if root not in graph.inside:
                alive.setdefault(root, graph.size.get(root, (0, 0)))
        yield kernel.ops[0], alive
        done = [root for root in alive if last.get(root, inf) <= place]
        done += [root for root in made if not forward and root in alive and root not in last and not alive[root][1]]
        for root in done:
            alive.pop(root, None)


def roots(graph: Graph, values: Iterable[int]) -> list[int]:
    """The storages of some values."""
    return [graph.root.get(value, value) for value in values]


def _last_read(graph: Graph) -> dict[int, int]:
    """The last kernel that reads each root; the backward of an op lets go of what it reads when all of it is over."""
    over: dict[int, int] = {}
    for place, kernel in enumerate(graph.kernels):
        over.update((graph.ops[i].forward_op, place) for i in kernel.ops if i >= graph.n_forward)
    last: dict[int, int] = {}
    for place, kernel in enumerate(graph.kernels):
        for i in kernel.ops:
            end = over[graph.ops[i].forward_op] if i >= graph.n_forward and graph.ops[i].forward_op >= 0 else place
            last.update((root, max(end, last.get(root, 0))) for root in roots(graph, graph.ops[i].inputs))
    return last


def _windows(unit: Unit) -> set[int]:
    """Convolutions with a window of more than one element, forward and backward: the others read their operands as they lie."""
    wide = {
        saver
        for saved in unit.saved
        if saved.role == "parameter" and prod(count.fixed for count in saved.shape[2:]) > 1
        for saver in saved.savers
        if unit.forward[saver].kind == "conv"
    }
    n = len(unit.forward)
    return wide | {n + index for index, op in enumerate(unit.backward) if op.kind == "conv" and op.forward_op in wide}


def _beyond(graph: Graph, alive: dict[int, Size], kept: dict[int, Size]) -> Moment:
    """The moment's bytes by region, less all that is kept."""
    sized: dict[int, tuple[int, int]] = {}
    for values, sign in ((alive, 1), (kept, -1)):
        for root, (fixed, each) in values.items():
            units = graph.cut[root][0] if root in graph.cut else 0
            before = sized.get(units, (0, 0))
            sized[units] = (before[0] + sign * fixed, before[1] + sign * each)
    return tuple((size, units) for units, size in sized.items() if size != (0, 0))


def across_calls(graph: Graph, n_calls: int) -> list[Beside]:
    """What the ops outside the blocks keep alive while each block call's backward runs, by `Op.position`."""
    born: dict[int, int] = {}
    last: dict[int, int] = {}
    for kernel in graph.kernels:
        for index in (index for index in kernel.ops if index >= graph.n_forward):
            position = graph.ops[index].position
            last.update(dict.fromkeys(roots(graph, graph.ops[index].inputs), position))
            for root in roots(graph, graph.ops[index].outputs):
                born.setdefault(root, position)
    found = [Beside() for _ in range(n_calls)]
    for root, position in born.items():
        size, units = graph.size.get(root, (0, 0)), graph.cut[root][0] if root in graph.cut else 0
        for call in range(max(0, last.get(root, position)), min(position, n_calls)):
            at = found[call]
            waits = ((root, size, units),) if size[0] and not size[1] else ()
            found[call] = Beside(at.passing + size[1], at.waiting + waits)
    return found
