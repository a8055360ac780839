"""A pipeline schedule as data: what every rank computes, sends and receives, in order.

`build` makes the list for (schedule, P, V, m), the simulator prices it, the drawing shows it and the runtime executes it: one
list for all. A `Schedule` checks itself when it is made, so that one that would deadlock, or in which a send has no receive,
does not exist. No process group is touched here, and torch is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from meshwright.errors import PlanError
from meshwright.plan.lowering import Edge, add_messages, check_list
from meshwright.plan.orders import compute_orders, stage_ranks

_NEIGHBOUR = {"SEND_F": 1, "RECV_F": -1, "SEND_B": -1, "RECV_B": 1}
_TEXT = re.compile(r"(\d+)(SEND_F|RECV_F|SEND_B|RECV_B|F|B|I|W)(\d+)(?:@(\d+))?")


class Action(NamedTuple):
    """One entry of a rank's list.

    `kind`: F forward, B whole backward, I input gradient, W weight gradient, SEND_F and RECV_F (activations), SEND_B and RECV_B
    (their gradients). `peer` is the stage at the other end of a message, -1 for computations. The text form is torch's
    (`2F0`: stage 2, forward, micro-batch 0), with the peer (`0SEND_F1@3`) where it is not the next stage.
    """

    stage: int
    kind: str
    microbatch: int
    peer: int = -1

    def __str__(self) -> str:
        text = f"{self.stage}{self.kind}{self.microbatch}"
        default = self.stage + _NEIGHBOUR[self.kind] if self.kind in _NEIGHBOUR else -1
        return text if self.peer == default else f"{text}@{self.peer}"

    @staticmethod
    def parse(text: str) -> Action:
        """Read what `str` wrote, or torch's own form. Raises `PlanError` for anything else."""
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise PlanError(f"{text!r} is no action: the form is STAGE KIND MICROBATCH in one word, such as 2F0 or 1SEND_F3")
        stage, kind, microbatch, peer = match.groups()
        default = int(stage) + _NEIGHBOUR[kind] if kind in _NEIGHBOUR else -1
        return Action(int(stage), kind, int(microbatch), default if peer is None else int(peer))

    @property
    def computes(self) -> bool:
        """Whether this is a computation and not a message."""
        return self.kind not in _NEIGHBOUR


@dataclass(frozen=True)
class Schedule:
    """The action lists of `ranks` ranks with `virtual` stages each, for `microbatches` micro-batches; valid by construction.

    `edges` are the (earlier, later) stages between which activations go, `gradients` those of them whose gradients come back.
    An edge that skips stages is a message of its own. `stage_ranks[s]` is the rank of stage s. Raises `PlanError` if the lists
    leave out, repeat or misplace a computation or a message, or could deadlock.
    """

    name: str
    ranks: int
    virtual: int
    microbatches: int
    stage_ranks: tuple[int, ...]
    edges: tuple[Edge, ...]
    gradients: tuple[Edge, ...]
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        check_list(self.actions, self.stage_ranks, self.microbatches, self.edges, self.gradients, self.ranks)

    @property
    def stages(self) -> int:
        """Stages of the whole pipeline: ranks x virtual."""
        return len(self.stage_ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in order."""
        return tuple(stage for stage, owner in enumerate(self.stage_ranks) if owner == rank)

    def computations(self, rank: int) -> list[Action]:
        """A rank's list without the messages."""
        return [action for action in self.actions[rank] if action.computes]

    def at_once(self, rank: int) -> frozenset[tuple[int, int]]:
        """The (stage, micro-batch) pairs whose W follows their I with nothing between: one whole backward does both."""
        row = self.actions[rank]
        return frozenset((a.stage, a.microbatch) for a, b in pairwise(row) if (a.kind, b) == ("I", a._replace(kind="W")))

    def __str__(self) -> str:
        return "\n".join(f"rank {rank}: " + " ".join(map(str, row)) for rank, row in enumerate(self.actions))

    def to_json(self) -> dict[str, Any]:
        """Plain data, one list of words per rank; `Schedule.from_json` gives an equal one back."""
        return asdict(self) | {"actions": [[str(action) for action in row] for row in self.actions]}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Schedule:
        """Read what `to_json` wrote, as JSON gives it back; the lists are checked again. Raises `PlanError`."""
        try:
            ranks, virtual, microbatches = (int(data[name]) for name in ("ranks", "virtual", "microbatches"))
            owners, edges, gradients = tuple(map(int, data["stage_ranks"])), _pairs(data["edges"]), _pairs(data["gradients"])
            actions = tuple(tuple(map(Action.parse, row)) for row in data["actions"])
            return Schedule(str(data["name"]), ranks, virtual, microbatches, owners, edges, gradients, actions)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is not a saved schedule ({error!r}): write one with Schedule.to_json()") from error


def _pairs(items: Iterable[Iterable[int]]) -> tuple[Edge, ...]:
    return tuple((int(first), int(last)) for first, last in items)


def chain(stages: int) -> tuple[Edge, ...]:
    """The edges of a model whose stages each feed only the next."""
    return tuple((stage, stage + 1) for stage in range(stages - 1))


@lru_cache(maxsize=64)
def build(
    name: str,
    ranks: int,
    virtual: int = 1,
    microbatches: int = 1,
    edges: tuple[Edge, ...] | None = None,
    gradients: tuple[Edge, ...] | None = None,
) -> Schedule:
    """Return the schedule `name` (one of `orders.SCHEDULES`) for P `ranks`, V `virtual` stages on each and m `microbatches`.

    `edges` default to a chain, `gradients` to the edges. Raises `PlanError` for counts that the schedule can't take, naming the
    nearest that it can.
    """
    orders = compute_orders(name, ranks, virtual, microbatches)
    owners = stage_ranks(name, ranks, virtual)
    edges = chain(len(owners)) if edges is None else edges
    gradients = edges if gradients is None else gradients
    rows = add_messages(orders, owners, edges, gradients)
    actions = tuple(tuple(Action(*item) for item in row) for row in rows)
    return Schedule(name, ranks, virtual, microbatches, owners, edges, gradients, actions)
