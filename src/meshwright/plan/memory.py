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
parameters), and 3 times the shards of the largest unit. Transients on top: under `update=backward` the gradients of two buckets or
units; with `offload=params` the shards of the units at work; while a slice is updated, its values in full precision where they are
stored in less.
Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), section 5; the paper's mixed-precision column keeps 16-bit gradients (2 Psi),
here they are accumulated and reduced in fp32, as Megatron-Core does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from meshwright.plan.plan import Plan, offloads


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model states on one rank, by what they are for; `host` and `disk` are what the plan keeps elsewhere."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float = 0.0
    host: float = 0.0
    disk: float = 0.0

    @property
    def between_steps(self) -> float:
        """Bytes that stay between two steps: gradients are freed by the update."""
        return self.parameters + self.optimizer + self.buffers

    @property
    def peak(self) -> float:
        """Bytes after the backward and before the update."""
        return self.between_steps + self.gradients

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
) -> StateBytes:
    """Return the model-state bytes on each rank for a resolved plan (the tables in this module's docstring).

    `trainable` and `frozen` count parameters of `bytes_each` bytes in the model as given; `optimizer_states` is the number of
    values that the optimizer keeps per parameter (2 for Adam), `largest_unit` the parameters of the largest FSDP2 unit. Frozen
    parameters keep their dtype and have neither gradient, master nor optimizer state. A master copy counts as optimizer state.
    `on_host`: the device is a CPU, so that what goes to `cpu` stays.
    """
    low = plan.precision != "fp32"
    narrow = low and plan.master != "fp32"
    shard = plan.shards
    moved: dict[tuple[str, bool], float] = {}
    for item in offloads(plan.offload):
        if item.directory is not None or not on_host:
            key = (item.what, item.directory is not None)
            moved[key] = moved.get(key, 0.0) + item.fraction
    units = plan.zero == 3 and (shard > 1 or any(what == "params" for what, _ in moved))
    divided = [1, 1, 1] if shard == 1 else [shard if plan.zero >= stage else 1 for stage in (3, 2, 1)]
    live = 2 if narrow or (low and not units) else bytes_each  # else zero=3 keeps only the full-precision shard
    master = {"fp32": bytes_each if live < bytes_each else 0, "kahan": 2, "stochastic": 0}[plan.master]
    state = {"fp32": bytes_each, "bf16": 2, "int8": 1 + 4 / 256}[plan.optimizer_state]
    weights = (live * trainable + bytes_each * frozen) / divided[0]
    states = (master + state * optimizer_states) * trainable / divided[2]
    here = {what: 1.0 - sum(fraction for (item, _), fraction in moved.items() if item == what) for what in ("params", "optimizer")}
    mine = trainable // divided[2]
    buffers = 0.0
    if moved.get(("optimizer", True)):
        buffers += BUFFERS * min(mine, slice_elements(mine)) * (master + state * optimizer_states)
    if moved.get(("params", True)):
        buffers += BUFFERS * live * largest_unit / divided[0]
    gone = plan.update == "backward" and plan.microbatches == 1
    return StateBytes(
        parameters=weights * (here["params"] if units else 1.0),
        gradients=0.0 if gone else (2 if narrow and units else bytes_each) * trainable / divided[1],
        optimizer=states * here["optimizer"],
        buffers=buffers,
        host=_away(moved, weights, states, disk=False),
        disk=_away(moved, weights, states, disk=True),
    )


def _away(moved: dict[tuple[str, bool], float], weights: float, states: float, disk: bool) -> float:
    return moved.get(("params", disk), 0.0) * weights + moved.get(("optimizer", disk), 0.0) * states


BUFFERS = 3
"""Buffers of a shelf's largest item on disk: one being read, one at work, one being written."""


def slice_elements(trainable: int) -> int:
    """Elements of a rank's parameters that an optimizer with stored states updates at a time: at most 32 MiB of fp32."""
    return min(2**23, max(2**14, trainable // 64))
