"""The Cluster: what a plan runs on, as numbers. Devices, the links inside a node and between nodes, prices.

`Cluster.parse` reads `384x8xA100-80GB,inter=25` or a TOML file, `Cluster.here` measures this machine (`probe.py`). What an op or a
collective costs on it is left to `plan/`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from meshwright.cluster.catalog import find
from meshwright.errors import ConfigError


@dataclass(frozen=True)
class Link:
    """A link: `bytes_per_s` per device and direction that a large all-gather gets, `latency_s` of one step over it.

    An all-reduce's bus bandwidth is `reduce` times that: more where the switches add (NVLink SHARP).
    """

    bytes_per_s: float
    latency_s: float
    name: str = ""
    reduce: float = 1.0


@dataclass(frozen=True)
class Device:
    """One device: dense peak FLOP/s by dtype, memory, and the family of its kernels' efficiency constants.

    `power` is the part of the sustained rate that a power limit leaves; `host_memory_bytes` is its share of its host's memory, what
    offload may use (a host of eight usually has 1 to 2 TB). `rates` are what a probe measured, by name (see
    `probe.py`); empty for a device from the catalog.
    """

    name: str
    peak: tuple[tuple[str, float], ...]
    memory_bytes: int
    memory_bytes_per_s: float
    kernels: str
    power: float = 1.0
    price: float = 0.0
    host_bytes_per_s: float = 0.0
    host_memory_bytes: float = 128e9
    rates: tuple[tuple[str, float], ...] = ()

    def peak_flops(self, dtype: str) -> float:
        """Dense peak in FLOP/s for a dtype such as `bfloat16`; float16 stands in for bfloat16 where only that is known."""
        known = dict(self.peak)
        for name in (dtype, {"bfloat16": "float16", "float8": "bfloat16"}.get(dtype, "float32"), "float32"):
            if name in known:
                return known[name]
        raise ConfigError(f"device {self.name} has no peak rate for {dtype}")


Timed: TypeAlias = tuple[str, int, tuple[tuple[float, float], ...]]
"""A collective's name, the ranks of its group, and (bytes, seconds) from small to large."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` hosts of `per_node` equal devices. Prints as its text and round-trips through JSON.

    `domain` devices are joined by the `intra` link (a host's, or more with NVLink switches between hosts); beyond, every device
    has its share `inter` of its host's network cards. `peer_s` is host time that every collective takes for each rank of its group:
    0, but for jobs in which collectives are checked (`TORCH_DISTRIBUTED_DEBUG=DETAIL`) or that a probe found so.
    """

    device: Device
    nodes: int
    per_node: int
    intra: Link
    inter: Link
    domain: int = 0
    text: str = ""
    peer_s: float = 0.0
    timed: tuple[Timed, ...] = ()
    """Collectives as a probe found them between computations; where there are any, they replace what the links would give."""

    def __post_init__(self) -> None:
        """Raise `ConfigError` for a cluster without devices or with a link that carries nothing."""
        if self.nodes < 1 or self.per_node < 1:
            raise ConfigError(f"cluster {self.text!r} has {self.nodes} nodes of {self.per_node} devices: both must be at least 1")
        for name, link in (("intra", self.intra), ("inter", self.inter)):
            if link.bytes_per_s <= 0:
                raise ConfigError(f"cluster {self.text!r}: {name}={link.bytes_per_s / 1e9:g} GB/s must be more than 0")
        if not self.domain:
            object.__setattr__(self, "domain", self.per_node)

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.nodes * self.per_node

    @staticmethod
    def parse(text: str) -> Cluster:
        """Read `[NODESx]GPUSxNAME[,intra=GB/s][,inter=GB/s][,memory=GB][,price=DOLLARS]`, `here`, or a TOML file's path.

        `intra` and `inter` are what a large collective gets per device and direction; without them it is the catalog's line rate
        times its usual efficiency. `intra_us` and `inter_us` are microseconds of one step over a link, `peer_us` those of
        `peer_s`. Raises `ConfigError` in one sentence.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a cluster is a text such as 'here' or '4x8xH100-80GB', not {text!r}")
        if text == "here":
            return Cluster.here()
        if text.endswith(".toml"):
            return _from_toml(text)
        layout, *overrides = text.split(",")
        match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(.+)|(.+)", layout.strip())
        if match is None:
            raise ConfigError(f"cluster {text!r} is not [NODESx]GPUSxNAME, such as 4x8xH100-80GB")
        nodes, count, name = int(match[1] or 1), int(match[2] or 1), match[3] or match[4]
        entry: dict[str, Any] = find(name)[1] | {"name": find(name)[0]}
        return _build(entry, nodes, count, _overrides(overrides, text), text)

    @staticmethod
    def here(ranks: int | None = None) -> Cluster:
        """This machine, as measured once by `meshwright doctor --probe` (else the catalog's values): one node of `ranks`."""
        from meshwright.cluster.here import this_machine  # torch is imported only for this

        return this_machine(ranks)

    def resized(self, nodes: int, per_node: int | None = None) -> Cluster:
        """The same hardware with another number of nodes (and devices in each)."""
        each = per_node or self.per_node
        domain = self.domain if self.domain > self.per_node else each
        name = self.device.name
        text = f"{nodes}x{each}x{name}" if nodes > 1 else f"{each}x{name}"
        return dataclasses.replace(self, nodes=nodes, per_node=each, domain=domain, text=text)

    def to_json(self) -> dict[str, Any]:
        """Every field as plain JSON values; `Cluster.from_json` gives an equal one back."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any] | str) -> Cluster:
        """Read what `to_json` gave. Raises `ConfigError` for anything else."""
        try:
            loaded = json.loads(data) if isinstance(data, str) else dict(data)
            device = dict(loaded.pop("device"))
            for name in ("peak", "rates"):
                device[name] = tuple((str(key), float(value)) for key, value in device.get(name, ()))
            links = {name: Link(**loaded.pop(name)) for name in ("intra", "inter")}
            loaded["timed"] = tuple(
                (str(op), int(n), tuple((float(b), float(s)) for b, s in at)) for op, n, at in loaded.get("timed", ())
            )
            return Cluster(device=Device(**device), intra=links["intra"], inter=links["inter"], **loaded)
        except (TypeError, KeyError, ValueError) as error:
            raise ConfigError(f"this is not a saved cluster: {error}") from error

    def __str__(self) -> str:
        links = f"intra {self.intra.bytes_per_s / 1e9:,.4g} GB/s, inter {self.inter.bytes_per_s / 1e9:,.4g} GB/s"
        device = f"{self.device.name} ({self.device.memory_bytes / 1e9:,.0f} GB)"
        return f"{self.text or self.device.name}: {self.devices:,} x {device}, {links}"


_OVERRIDES = {
    "intra": "GB/s",
    "inter": "GB/s",
    "memory": "GB",
    "price": "DOLLARS",
    "intra_us": "LATENCY",
    "inter_us": "LATENCY",
    "peer_us": "LATENCY",
}
LINK_EFFICIENCY = 0.85
"""Part of a link's line rate that a large collective gets (shared/field: nccl-tests on NDR, DGX H100 all-gather over NVLink)."""


def _build(entry: dict[str, Any], nodes: int, count: int, given: dict[str, float], text: str) -> Cluster:
    links = {}
    for name in ("intra", "inter"):
        link = entry[name]
        rate = given[name] if name in given else float(link["gb_s"]) * float(link.get("efficiency", LINK_EFFICIENCY))
        latency = given.get(f"{name}_us", float(link["latency_us"]))
        links[name] = Link(rate * 1e9, latency * 1e-6, str(link.get("name", "")), float(link.get("reduce", 1.0)))
    device = Device(
        name=str(entry["name"]),
        peak=tuple((dtype, float(value) * 1e12) for dtype, value in entry["peak_tflops"].items()),
        memory_bytes=int(given.get("memory", entry["memory_gb"]) * 1e9),
        memory_bytes_per_s=float(entry["memory_gb_s"]) * 1e9,
        kernels=str(entry.get("kernels", "ampere")),
        power=float(entry.get("power", 1.0)),
        price=given.get("price", float(entry.get("price", 0.0))),
        host_bytes_per_s=float(entry.get("host_gb_s", 25)) * 1e9,
        host_memory_bytes=float(entry.get("host_memory_gb", 128)) * 1e9,
    )
    domain = int(entry.get("domain", 0))
    wide = domain if domain > count and nodes > 1 else count
    return Cluster(device, nodes, count, links["intra"], links["inter"], wide, text, given.get("peer_us", 0.0) * 1e-6)


def _overrides(items: list[str], text: str) -> dict[str, float]:
    given: dict[str, float] = {}
    for item in items:
        key, _, value = item.strip().partition("=")
        if key not in _OVERRIDES:
            known = ", ".join(f"{name}={unit}" for name, unit in _OVERRIDES.items())
            raise ConfigError(f"cluster {text!r}: {key!r} is none of {known}")
        if key in given:
            raise ConfigError(f"cluster {text!r}: {key} is given twice")
        try:
            given[key] = float(value)
        except ValueError:
            raise ConfigError(f"cluster {text!r}: {key}={value!r} is not a number") from None
        if not math.isfinite(given[key]):
            raise ConfigError(f"cluster {text!r}: {key}={value} is not a finite number")
        if given[key] <= 0:
            raise ConfigError(f"cluster {text!r}: {key}={value} must be more than 0")
    return given


_LINK_KEYS = ("gb_s", "efficiency", "reduce", "latency_us", "name")
_DEVICE_KEYS = (
    *("like", "name", "driver_names", "aliases", "peak_tflops", "memory_gb", "memory_gb_s", "kernels", "power", "price"),
    *("host_gb_s", "host_memory_gb", "domain", "intra", "inter", "source"),
)


def _check_keys(where: str, table: Any, known: tuple[str, ...]) -> None:
    """Raise `ConfigError` for what is no table, or has a key that says nothing."""
    if not isinstance(table, dict):
        raise ConfigError(f"cluster {where!r} must be a table, not {table!r}")
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"cluster {where!r} has no key {key!r}: the nearest is {near!r}")


def _count(value: Any, name: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{name}={value!r} is not a whole number")
    return value


def _from_toml(path: str) -> Cluster:
    """A TOML file: `nodes`, `per_node`, and either `device = "NAME"` of the catalog or a table `[device]` with its keys."""
    try:
        data = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cluster {path!r} can't be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"cluster {path!r} is not TOML: {error}") from error
    _check_keys(path, data, ("nodes", "per_node", "device", "intra", "inter"))
    named = data.pop("device", None)
    entry: dict[str, Any] = dict(named) if isinstance(named, dict) else {}
    if isinstance(named, str) or "like" in entry:
        known, base = find(named if isinstance(named, str) else str(entry.pop("like")))
        entry = base | {"name": known} | entry
    _check_keys(f"{path} [device]", named if isinstance(named, dict) else {}, _DEVICE_KEYS)
    for name in ("intra", "inter"):
        for table in (entry.get(name, {}), data.get(name, {})):
            _check_keys(f"{path} [{name}]", table, _LINK_KEYS)
        entry[name] = {"latency_us": 10.0} | dict(entry.get(name, {})) | dict(data.pop(name, {}))
    needed = [key for key in ("name", "peak_tflops", "memory_gb", "memory_gb_s") if key not in entry]
    needed += [f"{name}.gb_s" for name in ("intra", "inter") if "gb_s" not in entry[name]]
    if needed:
        raise ConfigError(f"cluster {path!r} lacks {', '.join(needed)}: name a device of the catalog or give all of them")
    try:
        nodes, count = (_count(data.get(name, 1), name) for name in ("nodes", "per_node"))
        return _build(entry, nodes, count, {}, path)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"cluster {path!r} has a value of the wrong type: {error}") from error
