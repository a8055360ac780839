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
Source: Rajbhandari et al., ZeRO (arXiv:1910.02054), section 5; the paper's mixed-precision column keeps 16-bit gradients (2 Psi),
here they are accumulated and reduced in fp32, as Megatron-Core does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from meshwright.plan.plan import Plan


@dataclass(frozen=True)
class StateBytes:
    """Bytes of model states on one rank, by what they are for."""

    parameters: float
    gradients: float
    optimizer: float

    @property
    def between_steps(self) -> float:
        """Bytes that stay between two steps: gradients are freed by the update."""
        return self.parameters + self.optimizer

    @property
    def peak(self) -> float:
        """Bytes after the backward and before the update."""
        return self.parameters + self.gradients + self.optimizer

    def to_json(self) -> dict[str, float]:
        """Return the three terms and their peak, in bytes."""
        return asdict(self) | {"peak": self.peak}


def state_bytes(plan: Plan, trainable: int, frozen: int = 0, bytes_each: int = 4, optimizer_states: int = 2) -> StateBytes:
    """Return the model-state bytes on each rank for a resolved plan (the table in this module's docstring).

    `trainable` and `frozen` count parameters of `bytes_each` bytes in the model as given; `optimizer_states` is the number of
    values that the optimizer keeps per parameter (2 for Adam). Frozen parameters keep their dtype and have neither gradient,
    master nor optimizer state. A master copy counts as optimizer state.
    """
    low = plan.precision in ("bf16", "fp16")
    shard = plan.dp_shard
    sharded = [1, 1, 1] if shard == 1 else [shard if plan.zero >= stage else 1 for stage in (3, 2, 1)]
    live = 2 if low and sharded[0] == 1 else bytes_each  # zero=3 keeps only the full-precision shard
    master = bytes_each if live < bytes_each else 0
    return StateBytes(
        parameters=(live * trainable + bytes_each * frozen) / sharded[0],
        gradients=bytes_each * trainable / sharded[1],
        optimizer=(master + bytes_each * optimizer_states) * trainable / sharded[2],
    )


def slice_elements(trainable: int) -> int:
    """Elements of a rank's parameters that an optimizer with stored states updates at a time: at most 8 MiB of fp32."""
    return min(2**21, max(2**14, trainable // 64))
