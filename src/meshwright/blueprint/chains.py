"""The order in which blocks run: chains, and what is alive at each place where a pipeline may be cut.

Works on the outside tape of a walk, on which a block's results are marked with the call that made them. Nothing is told
from names; a chain's name is only the parent that its modules share.
"""

from __future__ import annotations

from meshwright.blueprint.capture import Pair
from meshwright.blueprint.record import Boundary, Chain
from meshwright.blueprint.walk import Walk


class Flow:
    """Which call or op made each value on the outside tape, and who reads it last."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.tape = walk, walk.outside
        self.producers: dict[int, int] = {n: place for place, op in enumerate(self.tape.forward) for n in op.outputs}
        self._sources: dict[int, frozenset[int]] = {}
        self._weighted: dict[int, bool] = {}
        self.last_read: dict[int, int] = {}  # value -> the cut behind which it is still read: i means by something after call i
        for op in self.tape.forward:
            for number in op.inputs:
                self.last_read[number] = max(self.last_read.get(number, -1), op.position - 1)
        for place, call in enumerate(walk.calls):
            for number in call.inputs:
                self.last_read[number] = max(self.last_read.get(number, -1), place - 1)
        for number in self.tape.outputs:
            self.last_read[number] = len(walk.calls) - 1

    def made_after(self, number: int) -> int:
        """The first cut that the value may cross: i if it exists once call i has run."""
        value = self.tape.values[number]
        return -2 - value.producer if value.producer < -1 else value.position

    def calls_behind(self, number: int) -> frozenset[int]:
        """Calls whose results the value was made from, through ops outside the blocks; a call's own result stops there."""
        value = self.tape.values[number]
        if value.producer < -1:
            return frozenset([-2 - value.producer])
        if number not in self._sources:
            self._sources[number] = frozenset()  # an in-place op may read its own result's storage
            place = self.producers.get(number)
            if place is not None:
                behind = [self.calls_behind(source) for source in self.tape.ops[place].inputs]
                self._sources[number] = frozenset().union(*behind)
        return self._sources[number]

    def is_cheap(self, number: int) -> bool:
        """Made from the batch and buffers alone, without a parameter or a block: another stage can make it itself."""
        value = self.tape.values[number]
        if value.producer < -1 or value.role == "parameter":
            return False
        if number not in self._weighted:
            self._weighted[number] = True
            place = self.producers.get(number)
            if place is not None:
                self._weighted[number] = all(self.is_cheap(source) for source in self.tape.ops[place].inputs)
        return self._weighted[number]


def boundaries(walks: tuple[Walk, Walk]) -> tuple[Boundary, ...]:
    """What is alive after each call of a block."""
    pair = Pair(walks)
    flow = Flow(pair.walk)
    found = []
    for place in range(len(pair.walk.calls)):
        flows, alive = [], []
        for number, last in flow.last_read.items():
            value = flow.tape.values[number]
            if value.role in ("parameter", "buffer", "input") or last < place or flow.made_after(number) > place:
                continue
            if value.producer == -2 - place:
                flows.append(pair.tensor(number))
            else:
                alive.append(pair.tensor(number, recomputable=flow.is_cheap(number)))
        found.append(Boundary(tuple(flows), tuple(alive)))
    return tuple(found)


def chains(walk: Walk) -> tuple[Chain, ...]:
    """Runs of calls in which each block's leading input was made from what the block before returned."""
    flow = Flow(walk)
    starts = [0] if walk.calls else []
    for place in range(1, len(walk.calls)):
        inputs = walk.calls[place].inputs
        if not inputs or place - 1 not in flow.calls_behind(inputs[0]):
            starts.append(place)
    stops = [*starts[1:], len(walk.calls)][: len(starts)]
    return tuple(Chain(_parent(walk, a, b), a, b) for a, b in zip(starts, stops, strict=True))


def _parent(walk: Walk, start: int, stop: int) -> str:
    """The longest common prefix of the calls' module paths."""
    paths = [call.name.split(".")[:-1] for call in walk.calls[start:stop]]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
