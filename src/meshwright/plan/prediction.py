"""The Prediction: one plan's memory and time, itemised; a frozen record that prints itself and round-trips through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from meshwright.errors import ConfigError

MEMORY = ("parameters", "gradients", "optimizer", "activations", "temporary", "peak")
TIME = ("compute", "tp_comm", "cp_comm", "ep_comm", "pp_comm", "dp_comm_exposed", "optimizer", "offload", "bubble")


@dataclass(frozen=True)
class Prediction:
    """What a plan costs on a cluster, for its heaviest rank.

    `memory_bytes` are bytes of live tensors by purpose, and `peak` those of the worst moment: their sum, or less where they are not
    all there at once (the first gradients may come when most activations have gone). `reserved_bytes` adds the allocator's slack,
    `device_bytes` also what no tensor owns (context, communicators): `fits` compares that with the device, and
    `host_bytes` (offloaded states and activations) with the device's share of its host's memory. `disk_bytes` are those that lie
    on a disk.
    `time_seconds` sums to `step_seconds`. Model FLOPs are those of one forward and backward as captured (attention over the whole
    square), hardware FLOPs what is run with recompute and causal attention halved. `bound` names what limits the plan.
    """

    plan: str
    devices: int
    step_seconds: float
    tokens_per_second_per_device: float
    model_tflops_per_device: float
    hardware_tflops_per_device: float
    mfu: float
    bubble_fraction: float
    memory_bytes: dict[str, float]
    fits: bool
    time_seconds: dict[str, float]
    reserved_bytes: float = 0.0
    device_bytes: float = 0.0
    capacity_bytes: float = 0.0
    host_bytes: float = 0.0
    disk_bytes: float = 0.0
    host_capacity_bytes: float = 0.0
    bound: str = ""
    price_per_hour: float = 0.0
    micro_batch: int = 1
    heaviest_rank: int = 0
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON values."""
        return asdict(self) | {"notes": list(self.notes)}

    @staticmethod
    def from_json(data: dict[str, Any] | str) -> Prediction:
        """Read what `to_json` gave. Raises `ConfigError` for anything else."""
        try:
            loaded = json.loads(data) if isinstance(data, str) else dict(data)
            return Prediction(**(loaded | {"notes": tuple(loaded.get("notes", ()))}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"this is not a saved prediction: {error}") from error

    def candidate(self) -> dict[str, Any]:
        """The entry of `plan --json` and `predict --json` (DESIGN section 4)."""
        first = ("plan", "step_seconds", "tokens_per_second_per_device", "model_tflops_per_device", "hardware_tflops_per_device")
        names = (*first, "mfu", "bubble_fraction", "memory_bytes", "fits", "time_seconds")
        return {name: getattr(self, name) for name in names} | {
            "bound": self.bound,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "disk_bytes": self.disk_bytes,
        }

    def shortage(self) -> str:
        """How many bytes are too many, and where; empty for a plan that fits."""
        found = []
        if self.device_bytes > self.capacity_bytes:
            more = self.device_bytes - self.capacity_bytes
            found.append(f"{_size(more)} too many for the {self.capacity_bytes / 1e9:,.4g} GB of each device")
        if self.host_bytes > self.host_capacity_bytes:
            more, room = self.host_bytes - self.host_capacity_bytes, f"{self.host_capacity_bytes / 1e9:,.4g} GB of its host"
            what = f"{self.host_bytes / 1e9:.0f} GB of offloaded states and activations"
            found.append(f"{_size(more)} too many for the {room}, where {what} are to lie: move a part to nvme=DIR")
        return ", and ".join(found)

    def __str__(self) -> str:
        gb = self.memory_bytes["peak"] / 1e9
        fits = "fits" if self.fits else f"does not fit: {self.shortage()}"
        speed = f"{self.step_seconds:.4g} s a step, {self.tokens_per_second_per_device:,.0f} tokens/s a device, MFU {self.mfu:.1%}"
        memory = f"{gb:.2f} GB live, {self.device_bytes / 1e9:.2f} GB on the device ({fits})"
        return f"{self.plan}: {speed}; {memory}; bound by {self.bound}"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def bound(seconds: dict[str, float], step: float) -> str:
    """What a faster plan would have to shorten."""
    wires = sum(seconds[name] for name in ("tp_comm", "cp_comm", "ep_comm", "pp_comm", "dp_comm_exposed"))
    kinds = {"compute": seconds["compute"], "bandwidth": wires, "bubble": seconds["bubble"], "offload": seconds["offload"]}
    if kinds["compute"] < 0.7 * step:
        kinds["compute"] = 0.0
    return max(kinds, key=kinds.__getitem__) if any(kinds.values()) else "compute"
