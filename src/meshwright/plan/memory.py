"""Bytes of model states on each rank: what the ZeRO stages promise, as formulas.

With Psi parameters (all trainable), N ranks on `dp_shard`, and an Adam optimizer (two states per parameter), the bytes of live
parameters + gradients + optimizer states on each rank at the peak of a step (after the backward, before the update) are

| plan            | fp32 (own dtype, no master)     | bf16 or fp16 (fp32 master, fp32 gradients)      |
|-----------------|---------------------------------|--------------------------------------------------|
| single, ddp     | 4 Psi + 4 Psi + 8 Psi           | 2 Psi + 4 Psi + (4 + 8) Psi                      |
| zero=1          | 4 Psi + 4 Psi + 8 Psi / N       | 2 Psi + 4 Psi + (4 + 8) Psi / N                  |
| zero=2          | 4 Psi + 4 Psi / N + 8 Psi / N   | 2 Psi + 4 Psi / N + (4 + 8) Psi / N              |
| zero=3 (fsdp)   | (4 + 4 + 8) Psi / N             | (4 + 4 + 8) Psi / N                              |

Between steps the gradient term is zero. `dp_replicate` divides nothing. Two transients come on top while a step runs: under
zero=2 one gradient bucket on its way out, and under zero=3 the gathered parameters and gradients of the units at work.

What the plan keeps in another form or place replaces these terms (bytes per parameter, divided as the table above says):

| field                         | term                                                                                        |
|-------------------------------|---------------------------------------------------------------------------------------------|
| optimizer_state=bf16          | each optimizer state takes 2 bytes                                                          |
| optimizer_state=int8          | each takes 1 + 4 / 256 (a float32 scale for every 256)                                      |
| master=kahan                  | weights 2, their compensation 2 in place of the master's 4; under zero=3 gradients 2        |
| master=stochastic             | weights 2, no master; under zero=3 gradients 2                                              |
| offload=optimizer:X@f         | states (and a master that is no live weight) take 1 - f of their bytes here, f at X         |
| offload=params:X@f (zero=3)   | shards take 1 - f here and f at X                                                           |
| update=backward               | no gradient term (with micro-batches: until the last one's backward)                        |

An offload to disk adds buffers that stay: 3 slices of the optimizer's bytes (a slice is `slice_elements` of this rank's
parameters), and 3 times the shards of the largest unit.

What comes on top for a moment, with U the bytes of the largest unit of zero=3 in the dtype that computes, N its ranks,
G the bytes of its fp32 gradients, and B those of a gradient bucket (`bucket_bytes`):

| while                               | there are also                                                                        |
|-------------------------------------|---------------------------------------------------------------------------------------|
| a slice is updated (`updating`)     | its states and weights in full precision where less is stored, its gradient where it  |
|                                     | has 16 bits; with offload=params the unit's shards                                     |
| gradients travel (`travelling`)     | zero=2: 2 B + B / N. update=backward: 2 B; with zero=1 the B that are gathered, with    |
|                                     | zero=2 those and B / N (not on a CPU, where gloo sums in place)                         |
|                                     | zero=3: 2 U gathered (at work, and the next), G and G / N; with offload=params the     |
|                                     | shards of 4 units (the next one's, of that at work, reduced and updated)               |
Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), section 5; the paper's mixed-precision column keeps 16-bit gradients (2 Psi),
here they are accumulated and reduced in fp32, as Megatron-Core does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from meshwright.plan.plan import Plan, offloads


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model states on one rank, by what they are for; `host` and `disk` are what the plan keeps elsewhere, `updating` and
    `travelling` what comes on top for a moment.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0
    disk: float = 0.0
    updating: float = 0.0
    travelling: float = 0.0

    @property
    def between_steps(self) -> float:
        """Bytes that stay between two steps: gradients are freed by the update."""
        return self.parameters + self.optimizer + self.buffers

    @property
    def peak(self) -> float:
        """Bytes after the backward and before the update."""
        return self.between_steps + self.gradients

    @property
    def highest(self) -> float:
        """The most bytes in any moment of a step: while gradients travel (most of them are there), or while slices are updated."""
        return self.peak + max(self.updating, self.travelling)

    def to_json(self) -> dict[str, float]:
        """Return the terms and their peak, in bytes."""
        return asdict(self) | {"peak": self.peak}


def state_bytes(
    plan: Plan,
    trainable: int,
    frozen: int = 0,
    bytes_each: int = 4,
    optimizer_states: int = 2,
    largest_unit: int = 0,
    on_host: bool = False,
    largest_parameter: int = 0,
) -> StateBytes:
    """Return the model-state bytes on each rank for a resolved plan (the tables in this module's docstring).

    `trainable` and `frozen` count parameters of `bytes_each` bytes in the model as given; `optimizer_states` is the number of
    values that the optimizer keeps per parameter (2 for Adam), `largest_unit` the parameters of the largest FSDP2 unit and
    `largest_parameter` the elements of the largest tensor. Frozen parameters keep their dtype and have neither gradient, master nor
    optimizer state. A master copy counts as optimizer state.
    `on_host`: the device is a CPU, so that what goes to `cpu` stays.
    """
    low = plan.precision != "fp32"
    shard = plan.shards
    moved: dict[tuple[str, bool], float] = {}
    for item in offloads(plan.offload):
        if item.directory is not None or not on_host:
            key = (item.what, item.directory is not None)
            moved[key] = moved.get(key, 0.0) + item.fraction
    units = plan.zero == 3 and (shard > 1 or any(what == "params" for what, _ in moved))
    divided = [1, 1, 1] if shard == 1 else [shard if plan.zero >= stage else 1 for stage in (3, 2, 1)]
    live, gradient, master, state = widths(plan, bytes_each, units)
    weights = (live * trainable + bytes_each * frozen) / divided[0]
    states = (master + state * optimizer_states) * trainable / divided[2]
    here = {what: 1.0 - sum(fraction for (item, _), fraction in moved.items() if item == what) for what in ("params", "optimizer")}
    mine = trainable / divided[2]
    parked = live * largest_unit / divided[0] if any(what == "params" for what, _ in moved) else 0.0
    gone = plan.update == "backward" and plan.microbatches == 1
    return StateBytes(
        parameters=weights * (here["params"] if units else 1.0),
        gradients=0.0 if gone else gradient * trainable / divided[1],
        optimizer=states * here["optimizer"],
        buffers=buffer_bytes(plan, mine, parked, bytes_each, units, optimizer_states),
        host=_away(moved, weights, states, disk=False),
        disk=_away(moved, weights, states, disk=True),
        updating=updating_bytes(plan, mine, parked, bytes_each, units, optimizer_states),
        travelling=_travelling(plan, trainable, largest_unit if units else 0, largest_parameter, live, low, parked, on_host),
    )


def buffer_bytes(plan: Plan, mine: float, parked: float, bytes_each: int, units: bool, optimizer_states: int = 2) -> float:
    """Bytes of the buffers to and from a disk; `mine` parameters are this rank's to update, a unit's shards have `parked` bytes."""
    disks = {item.what for item in offloads(plan.offload) if item.directory is not None}
    _, _, master, state = widths(plan, bytes_each, units)
    found = 0.0
    if "optimizer" in disks:
        found += BUFFERS * min(mine, slice_elements(mine)) * (master + state * optimizer_states)
    if "params" in disks:
        found += BUFFERS * parked
    return found


def updating_bytes(plan: Plan, mine: float, parked: float, bytes_each: int, units: bool, optimizer_states: int = 2) -> float:
    """Bytes in full precision while a slice of `mine` parameters is updated, and the shards of its unit."""
    narrow = plan.precision != "fp32" and plan.master != "fp32"
    each = 4 * (narrow + (narrow and units)) + (bytes_each * optimizer_states if plan.optimizer_state != "fp32" else 0)
    return each * min(mine, slice_elements(mine)) + parked


def widths(plan: Plan, bytes_each: int, units: bool) -> tuple[int, int, int, float]:
    """Bytes per parameter of live weights, gradients, what guards small updates, and one optimizer state.

    `units`: parameters are FSDP2's, which keeps only the full-precision shard (zero=3).
    """
    low = plan.precision != "fp32"
    narrow = low and plan.master != "fp32"
    live = 2 if narrow or (low and not units) else bytes_each
    master = {"fp32": bytes_each if live < bytes_each else 0, "kahan": 2, "stochastic": 0}[plan.master]
    state = {"fp32": bytes_each, "bf16": 2, "int8": 1 + 4 / 256}[plan.optimizer_state]
    return live, 2 if narrow and units else bytes_each, master, state


def _travelling(plan: Plan, trainable: int, unit: int, parameter: int, live: int, low: bool, parked: float, on_host: bool) -> float:
    """The last rows of the docstring's last table, at the worst moment of a backward."""
    if unit:
        return 2 * (2 if low else live) * unit + 4 * unit * (1 + 1 / plan.shards) + 4 * parked
    if plan.zero != 2 and plan.update != "backward":
        return 0.0
    bucket = max(4 * parameter, bucket_bytes(4 * trainable))
    sharded = plan.shards > 1
    gathered = live / 4 if sharded and plan.zero and plan.update == "backward" else 0.0
    apart = 1 / plan.shards if sharded and plan.zero == 2 and not on_host else 0.0  # gloo sums in place
    return bucket * (2 + gathered + apart)


def _away(moved: dict[tuple[str, bool], float], weights: float, states: float, disk: bool) -> float:
    return moved.get(("params", disk), 0.0) * weights + moved.get(("optimizer", disk), 0.0) * states


BUFFERS = 3
"""Buffers of a shelf's largest item on disk: one being read, one at work, one being written."""


def bucket_bytes(total: int) -> int:
    """The most bytes of a gradient bucket that is to stay small, of `total`: it is what a rank holds beyond its promise."""
    return min(LARGEST_BUCKET, max(2**20, total // 16))


LARGEST_BUCKET = 25 * 2**20
"""torch DDP's default: large enough for bandwidth, small enough to overlap."""


def slice_elements(trainable: float) -> int:
    """Elements of a rank's parameters that an optimizer with stored states updates at a time: at most 32 MiB of fp32."""
    return min(2**23, max(2**14, int(trainable) // 64))
