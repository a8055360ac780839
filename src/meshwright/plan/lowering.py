"""Puts sends and receives into the ranks' compute orders, and checks complete lists.

A message's two ends are put into both lists at the same moment, so any two ranks see the messages between them in one order.
That is enough on every backend, also where all traffic of a pair of ranks goes through one queue in the order in which it was
posted (NCCL): `check_list` replays the lists under that strictest rule, and what finishes there finishes anywhere.
"""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from meshwright.errors import PlanError

Edge: TypeAlias = tuple[int, int]
"""(earlier stage, later stage) between which a tensor goes."""

_Item: TypeAlias = tuple[int, str, int]
_Full: TypeAlias = tuple[int, str, int, int]
_Done: TypeAlias = tuple[int, str, int]
_UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


class Neighbours:
    """Which stages each stage gets activations from and gives them to, and the same for gradients."""

    def __init__(self, edges: Iterable[Edge], gradients: Iterable[Edge]) -> None:
        self.sources: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        self.targets: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
        for first, last in edges:
            self.targets["F", first].append(last)
            self.sources["F", last].append(first)
        for first, last in gradients:
            self.targets["B", last].append(first)
            self.sources["B", first].append(last)


def direction(kind: str) -> str:
    """Return F for a forward, B for what makes input gradients (B, I), and nothing for W, which neither waits nor sends."""
    return {"F": "F", "B": "B", "I": "B"}.get(kind, "")


def add_messages(
    orders: Sequence[Sequence[_Item]], owners: Sequence[int], edges: Sequence[Edge], gradients: Sequence[Edge]
) -> list[list[_Full]]:
    """Return the lists with a SEND right after what makes a tensor, and its RECV at that moment in the other rank's list.

    The moments are those of a run in which F, I and W take one unit of time each and messages none. A RECV then moves ahead of
    one computation where the order between the two ranks allows, so that a slow message travels while the rank computes. Raises
    `PlanError` if the orders can't finish.
    """
    _check_edges(edges, gradients, len(owners))
    near = Neighbours(edges, gradients)
    rows: list[list[_Full]] = [[] for _ in orders]
    position = [0] * len(orders)
    done: set[_Done] = set()
    waiting: defaultdict[_Done, list[int]] = defaultdict(list)
    events: list[tuple[int, int, int, _Item]] = []  # (time, 0 a computation ends / 1 the rank may go on, rank, computation)

    def proceed(rank: int, time: int) -> None:
        """Start the rank's next computation now, or as soon as the first thing that it lacks is there."""
        if position[rank] == len(orders[rank]):
            return
        stage, kind, microbatch = orders[rank][position[rank]]
        way = direction(kind)
        for source in near.sources[way, stage]:
            if (source, way, microbatch) not in done:
                waiting[source, way, microbatch].append(rank)
                return
        heapq.heappush(events, (time, 1, rank, orders[rank][position[rank]]))

    for rank in range(len(orders)):
        proceed(rank, 0)
    while events:
        time, starts, rank, item = heapq.heappop(events)
        stage, kind, microbatch = item
        if starts:
            rows[rank].append((stage, kind, microbatch, -1))
            heapq.heappush(events, (time + _UNITS[kind], 0, rank, item))
            continue
        way = direction(kind)
        for target in near.targets[way, stage]:
            if owners[target] != rank:
                rows[rank].append((stage, f"SEND_{way}", microbatch, target))
                rows[owners[target]].append((target, f"RECV_{way}", microbatch, stage))
        done.add((stage, way, microbatch))
        position[rank] += 1
        proceed(rank, time)
        for other in waiting.pop((stage, way, microbatch), ()):
            proceed(other, time)
    for rank, order in enumerate(orders):
        if position[rank] < len(order):
            raise PlanError(f"rank {rank} waits for ever before {_word(order[position[rank]])}: the orders of the ranks contradict")
    return [_receive_early(row, owners) for row in rows]


def _receive_early(row: list[_Full], owners: Sequence[int]) -> list[_Full]:
    """Move each RECV before the computation that precedes it, unless another message of the same two ranks lies between."""
    early: list[_Full] = []
    for item in row:
        at = len(early)
        if item[1].startswith("RECV"):
            before = len(early) - 1
            while before >= 0 and early[before][3] >= 0 and owners[early[before][3]] != owners[item[3]]:
                before -= 1
            if before >= 0 and early[before][3] < 0:
                at = before
        early.insert(at, item)
    return early


def _check_edges(edges: Sequence[Edge], gradients: Sequence[Edge], stages: int) -> None:
    bad = next((edge for edge in (*edges, *gradients) if not 0 <= edge[0] < edge[1] < stages), None)
    if bad or not set(gradients) <= set(edges):
        raise PlanError(f"the edge {bad or sorted(set(gradients) - set(edges))[0]} does not go from a stage to a later one")


def check_list(
    rows: Sequence[Sequence[_Full]],
    owners: Sequence[int],
    microbatches: int,
    edges: Sequence[Edge],
    gradients: Sequence[Edge],
    ranks: int,
) -> None:
    """Raise `PlanError` unless the lists are complete, in order, matched, and certain to finish."""
    if len(rows) != ranks or sorted(set(owners)) != list(range(ranks)):
        raise PlanError(f"{len(rows)} lists and stages on {len(set(owners))} ranks do not make a pipeline of {ranks} ranks")
    _check_edges(edges, gradients, len(owners))
    near = Neighbours(edges, gradients)
    _check_counts(rows, owners, microbatches, near)
    _replay(rows, owners, near)


def _check_counts(rows: Sequence[Sequence[_Full]], owners: Sequence[int], microbatches: int, near: Neighbours) -> None:
    """Each (stage, micro-batch): one F, then B or I and W, each message once, sent after and received before what it serves."""
    for rank, row in enumerate(rows):
        place: dict[_Full, int] = {}
        for index, item in enumerate(row):
            if item in place:
                raise PlanError(f"rank {rank} has {_word(item)} twice")
            if not (0 <= item[0] < len(owners) and owners[item[0]] == rank and 0 <= item[2] < microbatches):
                raise PlanError(f"rank {rank} has {_word(item)}, which is not its own or no micro-batch of {microbatches}")
            place[item] = index
        expected: set[_Full] = set()
        for stage in (stage for stage, owner in enumerate(owners) if owner == rank):
            for microbatch in range(microbatches):
                chain = _expected(stage, microbatch, place, owners, near)
                for items in chain:
                    places = [place.get(item, -1) for item in items]
                    if -1 in places or places != sorted(places):
                        raise PlanError(f"rank {rank} must have, in this order: {', '.join(map(_word, items))}")
                    expected.update(items)
        if len(expected) != len(row):
            stray = next(item for item in row if item not in expected)
            raise PlanError(f"rank {rank} has {_word(stray)}, which nothing needs")


def _expected(
    stage: int, microbatch: int, place: dict[_Full, int], owners: Sequence[int], near: Neighbours
) -> list[tuple[_Full, ...]]:
    """Chains of actions, each of which must stand in the list in this order."""
    forward, whole = (stage, "F", microbatch, -1), (stage, "B", microbatch, -1)
    inputs, weights = (stage, "I", microbatch, -1), (stage, "W", microbatch, -1)
    backward = whole if whole in place else inputs
    chains: list[tuple[_Full, ...]] = [(forward, whole) if whole in place else (forward, inputs, weights)]
    for way, action in (("F", forward), ("B", backward)):
        for source in near.sources[way, stage]:
            if owners[source] != owners[stage]:
                chains.append(((stage, f"RECV_{way}", microbatch, source), action))
        for target in near.targets[way, stage]:
            if owners[target] != owners[stage]:
                chains.append((action, (stage, f"SEND_{way}", microbatch, target)))
    return chains


def _replay(rows: Sequence[Sequence[_Full]], owners: Sequence[int], near: Neighbours) -> None:
    """Run the lists with blocking matches: a pair's messages pass one at a time, in the order in which each end posted them."""
    position = [0] * len(rows)
    posted: defaultdict[tuple[int, int], deque[_Full]] = defaultdict(deque)
    done: set[tuple[int, str, int, int]] = set()  # (stage, F or B, micro-batch, -1 computed / the stage that received it)
    runnable = deque(range(len(rows)))
    while runnable:
        rank = runnable.popleft()
        while position[rank] < len(rows[rank]):
            item = rows[rank][position[rank]]
            stage, kind, microbatch, peer = item
            way = direction(kind)
            if kind[:4] in ("SEND", "RECV"):
                other = owners[peer]
                posted[rank, other].append(item)
                if _match(posted[rank, other], posted[other, rank], rank, other, done):
                    runnable.append(other)
            elif any(
                (source, way, microbatch, -1 if owners[source] == rank else stage) not in done
                for source in near.sources[way, stage]
            ):
                break
            else:
                done.add((stage, way, microbatch, -1))
            position[rank] += 1
    for rank, row in enumerate(rows):
        if position[rank] < len(row):
            raise PlanError(f"rank {rank} waits for ever before {_word(row[position[rank]])}: this schedule deadlocks")
    for (rank, other), left in posted.items():
        if left:
            raise PlanError(f"rank {rank}'s {_word(left[0])} is never met by rank {other}")


def _match(mine: deque[_Full], theirs: deque[_Full], rank: int, other: int, done: set[_Full]) -> bool:
    """Let the pair's messages pass while both ends have posted one; returns whether any did."""
    passed = False
    while mine and theirs:
        one, two = mine.popleft(), theirs.popleft()
        send, receive = (one, two) if one[1].startswith("SEND") else (two, one)
        way = send[1][-1]
        if (send[1], receive[1]) != (f"SEND_{way}", f"RECV_{way}") or (send[0], send[3], send[2]) != (
            receive[3],
            receive[0],
            receive[2],
        ):
            raise PlanError(f"ranks {rank} and {other} disagree: {_word(one)} meets {_word(two)}")
        done.add((send[0], way, send[2], receive[0]))
        passed = True
    return passed


def _word(item: Sequence[object]) -> str:
    return f"{item[0]}{item[1]}{item[2]}"
