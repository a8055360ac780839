"""The Plan: how many ranks lie on each axis and what is done along it.

This file parses, prints, validates and resolves plans. It decides nothing about cost, and touches no process group: a plan
for 16,384 ranks is checked on a laptop.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from meshwright.errors import PlanError
from meshwright.plan.orders import SCHEDULES, check_counts

AUTO = 0
"""A degree that takes whatever ranks the other axes leave, or micro-batches that suit them (written `auto` in the plan text)."""

_DEGREES = ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep")
_CHOICES: dict[str, tuple[str, ...]] = {
    "cp_attention": ("auto", "allgather", "ring", "ulysses"),
    "clip": ("exact", "delayed", "two_pass"),
    "master": ("fp32", "kahan", "stochastic"),
    "optimizer_state": ("fp32", "bf16", "int8"),
    "precision": ("fp32", "bf16", "fp16", "fp8"),
    "schedule": SCHEDULES,
    "update": ("step", "backward"),
}
_AUTO_ALLOWED = (*_DEGREES, "microbatches")
_MICROBATCHES_PER_STAGE = 4  # keeps the bubble of 1f1b under a fifth: (P - 1) / (5P - 1)
_OFFLOAD = re.compile(r"(optimizer|params|activations):(cpu|nvme=[^\s,@]+)(?:@(0?\.[0-9]+|1(?:\.0*)?))?")


@dataclass(frozen=True)
class Plan:
    """One layout of a run. `str(plan)` is the plan text and `Plan.parse(str(plan)) == plan`.

    Degrees (`dp_replicate`, `dp_shard`, `tp`, `cp`, `pp`, `ep`) count ranks along each axis; `AUTO` is resolved by
    `resolve(world_size)`. `zero` says what `dp_shard` ranks divide among themselves: 1 optimizer states, 2 also gradients,
    3 also parameters. `microbatches` is the number of parts that each rank cuts its batch into before one update; `AUTO` becomes
    4 per pipeline stage, and 1 without a pipeline. `split` is `balanced`, or where the pipeline is cut: the number of blocks of
    each stage (`5,4,3`) or the block that each stage but the first begins with (`layers.5,layers.9`).
    `recompute` says which activations the backward computes again (`budget=BYTES` picks the cheapest that fit in so many bytes
    of saved activations on a rank). `offload` lists what lies elsewhere, each for all of it or for the fraction after `@`:
    `optimizer:cpu@0.5,optimizer:nvme=/scratch@0.3,activations:cpu`. `optimizer_state` is the storage of the optimizer's states,
    `master` what keeps small updates from being lost under `bf16`: an fp32 copy, Kahan's compensation, or stochastic rounding.
    `update=backward` updates each weight as soon as its gradient is whole and frees the gradient; `clip` says what norm it clips
    by then: the last step's (`delayed`) or this step's, found by a first pass (`two_pass`). `loss_chunks` computes the head and
    the loss in so many parts, one part's logits at a time.
    `cp_attention` is how attention meets the sequence cut by `cp` (`auto` takes what moves the fewest bytes).
    `data_parallel` is torch's single-process `nn.DataParallel` over the local devices (the plan named `dp`).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    zero: int = 3
    tp: int = 1
    sp: bool = False
    cp: int = 1
    pp: int = 1
    ep: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    microbatches: int = 1
    split: str = "balanced"
    recompute: str = "none"
    offload: str = "none"
    optimizer_state: str = "fp32"
    master: str = "fp32"
    update: str = "step"
    clip: str = "exact"
    loss_chunks: int = 1
    cp_attention: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    data_parallel: bool = False

    def __post_init__(self) -> None:
        """Raise `PlanError` for a value that no number of ranks could make legal."""
        for field in dataclasses.fields(self):
            if type(getattr(self, field.name)).__name__ != field.type:
                raise PlanError(f"{field.name}={getattr(self, field.name)!r} must be of type {field.type}")
        for name in (*_DEGREES, "virtual", "microbatches", "loss_chunks"):
            value = getattr(self, name)
            least = AUTO if name in _AUTO_ALLOWED else 1
            if value < least:
                raise PlanError(f"{name}={value} is not a count of at least 1")
        if self.zero not in (1, 2, 3):
            raise PlanError(f"zero={self.zero} is not a ZeRO stage: 1, 2 or 3 (for no sharding use dp_replicate, not dp_shard)")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
                raise PlanError(f"{name}={value} is unknown: the nearest is {name}={near} (one of {', '.join(choices)})")
        if not re.fullmatch(r"none|selective|full|budget=[0-9]+[KMGT]?B?", self.recompute):
            raise PlanError(
                f"recompute={self.recompute} is unknown: use none, selective, full or budget=BYTES, a whole number such as 1500M "
                "(K, M, G, T are powers of ten)"
            )
        offloads(self.offload)
        _check_pipeline(self)
        if self.data_parallel and any(getattr(self, name) != 1 for name in _DEGREES):
            raise PlanError("the plan dp is one process over the local devices: it takes no other axis")

    @classmethod
    def parse(cls, text: str, world_size: int | None = None) -> Plan:
        """Read a plan text: a named plan and/or `field=value` items in any order; unnamed fields keep their defaults.

        With `world_size` the plan is also resolved for that many ranks. Raises `PlanError` in one sentence.
        """
        if not isinstance(text, str):
            raise PlanError(f"a plan is a text such as 'fsdp' or 'dp_shard=4 tp=2', not {text!r}")
        values: dict[str, Any] = {}
        suggested: dict[str, Any] = {}
        for item in re.sub(r"\s*=\s*", "=", text).split():
            key, equals, value = item.partition("=")
            given = {key: _value(key, value)} if equals else _named(item, _NAMELESS if "nvme=" in text else "")
            for name in values.keys() & given.keys():
                if values[name] == AUTO and name in _DEGREES:
                    continue  # a named plan's open degree, now given
                raise PlanError(f"{name} is given twice in {text!r}: {item!r} contradicts what stands before it")
            values |= given
            suggested |= {} if equals else _SUGGESTED.get(item, {})
        plan = cls(**suggested | values)
        return plan if world_size is None else plan.resolve(world_size)

    def __str__(self) -> str:
        """Return the plan text: every field that differs from its default, and `zero` wherever it means something."""
        items = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default and not (field.name == "zero" and self.dp_shard != 1):
                continue
            items.append(f"{field.name}={_text(field.name, value)}")
        return " ".join(items) or "single"

    def to_json(self) -> dict[str, Any]:
        """Return every field as plain JSON values; `Plan.from_json` gives an equal plan back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any] | str) -> Plan:
        """Read what `to_json` gave, or its JSON text. Raises `PlanError` for anything else."""
        try:
            return cls(**(json.loads(data) if isinstance(data, str) else data))
        except (TypeError, ValueError) as error:
            raise PlanError(f"this is not a saved plan: {error}") from error

    @property
    def shards(self) -> int:
        """Ranks that divide the model states of a resolved plan: those of `dp_shard`, with `cp`, which would hold the same.

        Without `dp_shard`, ranks of `cp` do where `zero` is 1 or 2 and there are no replicas; else they are replicas themselves.
        """
        asked = self.dp_shard > 1 or (self.zero < 3 and self.dp_replicate == 1)
        return self.dp_shard * self.cp if asked else 1

    def degree_product(self) -> int:
        """Return the number of ranks on all axes together, 0 while a degree is `AUTO` (`ep` reuses data-parallel ranks)."""
        return math.prod(getattr(self, name) for name in _DEGREES if name != "ep")

    def resolve(self, world_size: int) -> Plan:
        """Return this plan with every `AUTO` filled for `world_size` ranks.

        Two open degrees (HSDP) split the free ranks into the two nearest factors, the larger one sharding; three (3D) into the
        three nearest, the largest sharding. An open `ep` takes all data-parallel ranks.
        Raises `PlanError` if the axes don't multiply to `world_size`.
        """
        if world_size < 1:
            raise PlanError(f"plan {str(self)!r} can't be laid out over {world_size} ranks: there must be at least 1")
        free = [name for name in _DEGREES if name != "ep" and getattr(self, name) == AUTO]
        fixed = math.prod(getattr(self, name) for name in _DEGREES if name != "ep" and name not in free)
        if world_size % fixed or (not free and fixed != world_size):
            raise PlanError(self._size_advice(world_size, fixed, bool(free)))
        left = world_size // fixed
        filled: dict[str, Any] = dict(zip(free, _factors(left, len(free)), strict=True))
        if self.ep == AUTO:
            filled["ep"] = filled.get("dp_replicate", self.dp_replicate) * filled.get("dp_shard", self.dp_shard)
        if self.microbatches == AUTO:
            stages = filled.get("pp", self.pp)
            filled["microbatches"] = 1 if stages == 1 or self.schedule == "layerwise" else _MICROBATCHES_PER_STAGE * stages
        return dataclasses.replace(self, **filled)

    def _size_advice(self, world_size: int, fixed: int, open_axis: bool) -> str:
        ranks = f"{world_size} rank{'s' if world_size != 1 else ''}"
        if open_axis:
            return f"plan {str(self)!r} needs a multiple of {fixed} ranks, but {ranks} are here: start {fixed} or change a degree"
        if fixed == 1:
            return f"plan {str(self)!r} runs on 1 rank, but {ranks} are here: use ddp or fsdp, or start 1 rank"
        near = world_size // max(1, fixed // self.dp_shard)
        hint = f"dp_shard={near}" if near and near * (fixed // self.dp_shard) == world_size else f"start {fixed} ranks"
        return f"plan {str(self)!r} needs {fixed} ranks, but {ranks} are here: the nearest that works is {hint}"


_NAMED: dict[str, dict[str, Any]] = {
    "single": {},
    "dp": {"data_parallel": True},
    "ddp": {"dp_replicate": AUTO},
    "zero1": {"dp_shard": AUTO, "zero": 1},
    "zero2": {"dp_shard": AUTO, "zero": 2},
    "zero3": {"dp_shard": AUTO, "zero": 3},
    "fsdp": {"dp_shard": AUTO, "zero": 3},
    "hsdp": {"dp_replicate": AUTO, "dp_shard": AUTO, "zero": 3},
    "tp": {"tp": AUTO},
    "2d": {"dp_shard": AUTO, "tp": AUTO, "zero": 3},
    "cp": {"cp": AUTO},
    "ep": {"dp_shard": AUTO, "zero": 3, "ep": AUTO},
    "auto": {"dp_shard": AUTO, "zero": 3},  # until the planner exists: shard everything over the ranks at hand
}
_PIPELINE: dict[str, dict[str, Any]] = {
    **{name: {"schedule": name} for name in SCHEDULES},
    "3d": {"zero": 3},
}
_SUGGESTED: dict[str, dict[str, Any]] = {
    name: {"pp": AUTO, "microbatches": AUTO}
    | ({"dp_shard": AUTO, "tp": AUTO} if name == "3d" else {})
    | ({"virtual": 2} if name in ("interleaved", "looped_bfs", "zbv", "dualpipev") else {})
    for name in _PIPELINE
}
"""What a named plan sets unless the plan text says otherwise."""

_NAMED |= _PIPELINE
NAMED_PLANS = tuple(_NAMED)
"""The named plans; which of them this version executes is `parallel/apply.py`'s to say."""


@dataclass(frozen=True)
class Offload:
    """One item of `offload=`: a `fraction` of the bytes of `what` lies on the host (`directory` None) or under `directory`."""

    what: str
    directory: str | None
    fraction: float

    def __str__(self) -> str:
        fraction = f"@{self.fraction:.6g}" if self.fraction < 1 else ""
        return f"{self.what}:{'cpu' if self.directory is None else 'nvme=' + self.directory}{fraction}"


@functools.cache
def moved(text: str, what: str, on_host: bool = False) -> float:
    """The fraction of `what` that an `offload` text puts somewhere else; where ranks compute `on_host`, `cpu` is where they are."""
    return sum((item.fraction for item in offloads(text) if item.what == what and (item.directory or not on_host)), 0.0)


@functools.cache
def offloads(text: str) -> tuple[Offload, ...]:
    """Read the plan's `offload` text. Raises `PlanError` for a part that says nothing known, or for more than all of something."""
    found = []
    for part in () if text == "none" else text.split(","):
        match = _OFFLOAD.fullmatch(part)
        if match is None or not float(match[3] or 1):
            raise PlanError(_offload_advice(text, part))
        what, where, fraction = match.groups()
        found.append(Offload(what, where.partition("=")[2] or None, float(fraction or 1)))
    for what in sorted({item.what for item in found}):
        total = sum(item.fraction for item in found if item.what == what)
        if total > 1 + 1e-9:
            raise PlanError(f"offload={text} moves {total:g} of {what}: the fractions of one thing add up to at most 1")
    return tuple(found)


_NAMELESS = " (in a plan DIR has no space, comma or @: make a link to one that has)"


def _offload_advice(text: str, part: str) -> str:
    """Why a part of an `offload` text says nothing known, and what would."""
    start, at, fraction = part.rpartition("@")
    if at and _OFFLOAD.fullmatch(start):
        return f"offload={part}: @{fraction} is no decimal fraction above 0 and up to 1, such as @0.5: leave it out for all of it"
    hint = _NAMELESS if "nvme=" in text else ""
    return f"offload={part} is unknown: use optimizer, params or activations with :cpu or :nvme=DIR, and @FRACTION for a part{hint}"


def _check_pipeline(plan: Plan) -> None:
    """Raise `PlanError` for counts that the schedule can't take, as soon as they are known."""
    if plan.pp > 1:
        stages = plan.pp * plan.virtual
        known = plan.microbatches or (1 if plan.schedule == "layerwise" else _MICROBATCHES_PER_STAGE * plan.pp)
        check_counts(plan.schedule, plan.pp, plan.virtual, known)
        if re.fullmatch(r"[0-9]+(,[0-9]+)*", plan.split) and plan.split.count(",") + 1 != stages:
            raise PlanError(
                f"split={plan.split} has {plan.split.count(',') + 1} stages, but pp={plan.pp} virtual={plan.virtual} has {stages}"
            )
    if not re.fullmatch(r"[^\s,=]+(,[^\s,=]+)*", plan.split):
        raise PlanError(f"split={plan.split} is neither balanced nor a comma list of block counts or block names")


def _factors(ranks: int, axes: int) -> list[int]:
    """Near equal factors: the smaller first for two axes, the largest first for more."""
    if axes < 2:
        return [ranks] * axes
    if axes == 2:
        small = max(d for d in range(1, math.isqrt(ranks) + 1) if ranks % d == 0)
        return [small, ranks // small]
    least = max(d for d in range(1, ranks + 1) if ranks % d == 0 and d**axes <= ranks)
    return [*sorted(_factors(ranks // least, axes - 1), reverse=True), least]


def _named(name: str, hint: str) -> dict[str, Any]:
    if name in _NAMED:
        return _NAMED[name]
    near = difflib.get_close_matches(name.lower(), NAMED_PLANS, n=1, cutoff=0.0)[0]
    raise PlanError(f"unknown plan {name!r}: the nearest is {near!r} (one of {', '.join(NAMED_PLANS)}, or field=value items){hint}")


def _value(key: str, text: str) -> int | bool | str:
    kinds = {field.name: field.type for field in dataclasses.fields(Plan)}
    if key not in kinds:
        near = difflib.get_close_matches(key, list(kinds), n=1, cutoff=0.0)[0]
        raise PlanError(f"a plan has no field {key!r}: the nearest is {near!r}")
    if kinds[key] == "bool":
        if text not in ("on", "off"):
            raise PlanError(f"{key}={text} is neither on nor off")
        return text == "on"
    if kinds[key] == "int":
        if text == "auto" and key in _AUTO_ALLOWED:
            return AUTO
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
            raise PlanError(f"{key}={text[:20]} is not a whole number of at least 1")
        return int(text)
    return text


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if name in _AUTO_ALLOWED and value == AUTO else str(value)
