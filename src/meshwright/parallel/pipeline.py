"""`pp`: executes a rank's action list over the pieces of a trace, with point-to-point messages of `torch.distributed`.

One runner serves every schedule, because a schedule is data (`plan/schedule.py`): F runs a stage's program on a micro-batch, B
differentiates it, I and W do so in two goes (`partition/deferred.py`), SEND and RECV post messages, which travel while the rank
computes. What a message holds was read from the trace: every tensor alive across the cut, directly to each stage that reads it.
Bytes per micro-batch and edge: those tensors forward, the gradients of the float ones among them back, over `pp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from meshwright import _torch
from meshwright.blueprint.tape import Value
from meshwright.parallel.recompute import Recompute
from meshwright.partition.arguments import is_random, writes
from meshwright.partition.deferred import Due, Queue, defer, settle
from meshwright.partition.program import Program
from meshwright.partition.stages import Piece
from meshwright.partition.trace import is_opaque
from meshwright.plan.lowering import direction
from meshwright.plan.schedule import Action, Schedule


class Stage:
    """A piece of a trace with its code: `run` computes it, plainly or with its weight gradients deferred."""

    def __init__(
        self, piece: Piece, model: nn.Module, device: torch.device, bound: dict[str, Tensor], runs: Recompute | None = None
    ) -> None:
        self.piece, self.model, self.device, self.bound, self.runs = piece, model, device, bound, runs
        self.queue = Queue()
        self.names = piece.parameters()
        self.random = any(is_random(op) or is_opaque(op) for op in piece.trace.ops)
        # What a leaf of autograd holds can't be written to.
        self.writes = any(writes(op.func) for op in piece.trace.ops)
        self._plain: Program | None = None
        self._apart: Program | None = None

    def program(self, apart: bool) -> Program:
        """Return the program, made when it is first asked for; `apart` defers weight gradients."""
        if apart and self._apart is None:
            deferred = defer(self.piece.trace, self.queue, self.device)
            self._apart = Program(deferred, self.model, frozenset(), self.device, self.bound, self.runs)
        if not apart and self._plain is None:
            self._plain = Program(self.piece.trace, self.model, frozenset(), self.device, self.bound, self.runs)
        found = self._apart if apart else self._plain
        assert found is not None
        return found


@dataclass
class Job:
    """One micro-batch: this rank's stages for a batch of its shape, the batch's tensors, and what its loss is multiplied by."""

    stages: dict[int, Stage]
    leaves: list[Tensor]
    weight: float = 1.0


@dataclass
class _Flight:
    """What a micro-batch keeps on a stage between its forward and its backward.

    `given` are the results until they are sent to all of `unsent`, `roots` the places in the graph where their backwards begin.
    """

    received: dict[int, Tensor] = field(default_factory=dict)
    given: dict[int, Tensor] = field(default_factory=dict)
    unsent: set[int] = field(default_factory=set)
    roots: dict[int, GradientEdge] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    outgoing: dict[int, Tensor] = field(default_factory=dict)
    due: Due = field(default_factory=Due)
    output: object = None


class _Arrival(NamedTuple):
    """A message on its way: its RECV, and (number, tensor, what to wait for) of each tensor in it."""

    action: Action
    parts: list[tuple[int, Tensor, dist.Work | None]]


@dataclass
class Runner:
    """Runs one step's lists on one rank. `context(stage, micro-batch)` is entered around forwards that draw random numbers.

    `watch(action)` is entered around the computing of every F, B, I and W, without the waiting (to measure or to profile);
    `differentiated(action)` is called when a B or a W is done, and what it gave later stages has been sent.
    """

    schedule: Schedule
    rank: int
    group: dist.ProcessGroup
    device: torch.device
    context: Callable[[int, int], AbstractContextManager[None]]
    watch: Callable[[Action], AbstractContextManager[Any]] = lambda _: nullcontext()
    differentiated: Callable[[Action], None] = lambda _: None

    def __post_init__(self) -> None:
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._arriving: dict[tuple[int, str, int], list[_Arrival]] = {}
        self._leaving: dict[Action, list[tuple[dist.Work, Tensor]]] = {}
        self._receipts = receipts(self.schedule, self.rank)
        row = self.schedule.actions[self.rank]
        # Where nothing comes between I and W there is nothing to gain: I does both, at once.
        self._apart = frozenset((a.stage, a.microbatch) for a in row if a.kind == "W") - self.schedule.at_once(self.rank)

    def run(self, jobs: Sequence[Job], backward: bool = True) -> dict[int, object]:
        """Run the list for `jobs`, one for each micro-batch; return what the whole function returned for each, on the last stage.

        Gradients are added to the parameters'. Without `backward` only the forwards run. Every rank of the pipeline must call
        it, with the same number of jobs.
        """
        outputs: dict[int, object] = {}
        done: list[Action] = []
        for action in self.schedule.actions[self.rank]:
            if not backward and action.kind not in ("F", "SEND_F", "RECV_F"):
                continue
            while done and action.computes:
                self.differentiated(done.pop())
            self._do(action, jobs[action.microbatch], backward)
            if action.kind == "F" and action.stage == self.schedule.stages - 1:
                flight = self._flights[action.stage, action.microbatch]
                outputs[action.microbatch] = _torch.tree_map_tensors(Tensor.detach, flight.output)
            if not backward and action.kind == "F":
                self._flights[action.stage, action.microbatch].received.clear()
            if action.kind in ("B", "W"):
                done.append(action)
        while done:
            self.differentiated(done.pop())
        for send in list(self._leaving):
            self._sent(send)
        self._flights.clear()
        return outputs

    def _do(self, action: Action, job: Job, backward: bool) -> None:
        stage, kind, microbatch, peer = action
        piece = job.stages[stage].piece
        if kind == "F":
            self._forward(action, job, backward)
        elif kind == "SEND_F":
            flight, numbers = self._flights[stage, microbatch], piece.targets.get(peer, [])
            self._send(action, [flight.given[n].detach() for n in numbers], numbers, piece)
            flight.unsent.discard(peer)
            if not flight.unsent:
                flight.given = {}
        elif kind == "SEND_B":
            outgoing = self._flights[stage, microbatch].outgoing
            numbers = _graded(piece, piece.sources.get(peer, []))
            self._send(action, [outgoing.pop(n) for n in numbers], numbers, piece)
        elif kind in ("RECV_F", "RECV_B"):
            numbers = piece.sources.get(peer, []) if kind == "RECV_F" else _graded(piece, piece.targets.get(peer, []))
            self._arriving.setdefault((stage, kind[-1], microbatch), []).append(
                _Arrival(action, self._receive(numbers, piece, peer))
            )
        elif kind == "W":
            with self.watch(action):
                settle(self._flights[stage, microbatch].due)
        else:
            self._backward(action, job)

    def waiting(self, stage: int, microbatch: int) -> list[Tensor]:
        """What weight gradients of a micro-batch are still to be computed from."""
        return [tensor for _, _, operands in self._flights[stage, microbatch].due.entries for tensor in operands]

    # Computing

    def _forward(self, action: Action, job: Job, backward: bool) -> None:
        stage, _, microbatch, _ = action
        here = job.stages[stage]
        piece = here.piece
        flight = self._flights.setdefault((stage, microbatch), _Flight())
        for number, tensor in self._arrived(stage, "F", microbatch):
            flight.received[number] = tensor
        for number in piece.taken:
            tensor = flight.received[number]
            flight.received[number] = tensor.requires_grad_(backward and number in piece.graded)
        taken = [flight.received[number] for number in piece.taken]
        if here.writes:
            taken = [tensor.clone() for tensor in taken]
        here.queue.current = flight.due
        place = self.context(stage, microbatch) if here.random else nullcontext()
        with place, torch.set_grad_enabled(backward), self.watch(action):
            given, flight.output = here.program((stage, microbatch) in self._apart and backward)([*job.leaves, *taken])
        made = {n: tensor.clone() if n in piece.copied else tensor for n, tensor in zip(piece.given, given, strict=True)}
        flight.roots = {number: get_gradient_edge(tensor) for number, tensor in made.items() if tensor.requires_grad}
        for target, numbers in piece.targets.items():
            if self.schedule.stage_ranks[target] != self.rank:
                flight.unsent.add(target)
                continue
            later = self._flights.setdefault((target, microbatch), _Flight())
            later.received.update({number: made[number].detach() for number in numbers})
        flight.given = made if flight.unsent else {}

    def _backward(self, action: Action, job: Job) -> None:
        stage, kind, microbatch, _ = action
        piece = job.stages[stage].piece
        flight = self._flights[stage, microbatch]
        for number, gradient in self._arrived(stage, "B", microbatch):
            _add(flight.gradients, number, gradient)
        roots = [flight.roots[number] for number in flight.gradients if number in flight.roots]
        seeds = [gradient for number, gradient in flight.gradients.items() if number in flight.roots]
        if isinstance(flight.output, Tensor):
            roots.append(get_gradient_edge(flight.output))
            seeds.append(torch.full_like(flight.output, job.weight))
        with self.watch(action):
            if roots:
                torch.autograd.backward(roots, seeds, retain_graph=job.stages[stage].queue.shared)
            if kind == "B":
                settle(flight.due)
        for source, numbers in piece.sources.items():
            found = {number: _gradient(flight.received[number]) for number in _graded(piece, numbers)}
            if self.schedule.stage_ranks[source] != self.rank:
                flight.outgoing.update(found)
                continue
            for number, gradient in found.items():
                _add(self._flights[source, microbatch].gradients, number, gradient)
        flight.roots, flight.gradients, flight.received, flight.output = {}, {}, {}, None

    # Messages

    def _send(self, action: Action, tensors: Sequence[Tensor], numbers: Sequence[int], piece: Piece) -> None:
        to = self.schedule.stage_ranks[action.peer]
        for tensor, number in zip(tensors, numbers, strict=True):
            packed = tensor.permute(_order(piece.trace.values[number])).contiguous()
            if packed.numel():
                work = dist.isend(packed, group=self.group, group_dst=to)  # one tensor alive across a cut, over pp
                assert work is not None
                self._leaving.setdefault(action, []).append((work, packed))

    def _sent(self, send: Action) -> None:
        """Let go of what a message held, once it is known to have been taken in: this does not wait."""
        for work, _ in self._leaving.pop(send, ()):
            work.wait()

    def _receive(self, numbers: Sequence[int], piece: Piece, peer: int) -> list[tuple[int, Tensor, dist.Work | None]]:
        found: list[tuple[int, Tensor, dist.Work | None]] = []
        for number in numbers:
            value = piece.trace.values[number]
            order = _order(value)
            packed = torch.empty([value.shape[dim] for dim in order], dtype=value.dtype, device=self.device)
            work = None
            if packed.numel():
                work = dist.irecv(packed, group=self.group, group_src=self.schedule.stage_ranks[peer])
            back = sorted(range(len(order)), key=order.__getitem__)
            found.append((number, packed.permute(back), work))
        return found

    def _arrived(self, stage: int, way: str, microbatch: int) -> list[tuple[int, Tensor]]:
        found: list[tuple[int, Tensor]] = []
        for arrival in self._arriving.pop((stage, way, microbatch), ()):
            for number, tensor, work in arrival.parts:
                if work is not None:
                    work.wait()
                found.append((number, tensor))
            if any(work is not None for _, _, work in arrival.parts):
                for send in self._receipts.get(arrival.action, ()):
                    self._sent(send)
        return found


@lru_cache(maxsize=256)
def receipts(schedule: Schedule, rank: int) -> dict[Action, list[Action]]:
    """For each of a rank's RECVs, those of its SENDs that the other end has used before it sent that: their memory is free.

    No backend has to be asked (gloo knows only when it is waited for). Each SEND is named at most once.
    """
    found: dict[Action, list[Action]] = {}
    for row in (row for other, row in enumerate(schedule.actions) if other != rank):
        awaited: dict[tuple[int, str, int], list[Action]] = {}
        used: list[Action] = []
        for stage, kind, microbatch, peer in row:
            if peer < 0:
                used += awaited.pop((stage, direction(kind), microbatch), [])
            elif schedule.stage_ranks[peer] == rank and kind.startswith("RECV"):
                send = Action(peer, f"SEND_{kind[-1]}", microbatch, stage)
                awaited.setdefault((stage, kind[-1], microbatch), []).append(send)
            elif schedule.stage_ranks[peer] == rank:
                found[Action(peer, f"RECV_{kind[-1]}", microbatch, stage)], used = used, []
    return found


def _order(value: Value) -> list[int]:
    """Dims from the outermost in memory to the innermost, so that a tensor arrives with the strides that it was traced with."""
    return sorted(range(len(value.shape)), key=lambda dim: -value.strides[dim] if value.shape[dim] > 1 else 0)


def _graded(piece: Piece, numbers: Sequence[int]) -> list[int]:
    return [number for number in numbers if number in piece.graded]


def _gradient(received: Tensor) -> Tensor:
    return torch.zeros_like(received) if received.grad is None else received.grad


def _add(gradients: dict[int, Tensor], number: int, gradient: Tensor) -> None:
    gradients[number] = gradients[number] + gradient if number in gradients else gradient
