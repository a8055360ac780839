"""The configuration of a training run: TOML tables as frozen dataclasses, every key with a default.

Reading and checking happens before any process is started; what a run resolved to is written into its folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tomli_w

from meshwright.errors import ConfigError


@dataclass(frozen=True)
class ModelTable:
    """`spec`: a preset, an inline size, or `package.module:callable`."""

    spec: str = "gpt-tiny"


@dataclass(frozen=True)
class DataTable:
    """`source`: `stdlib` (this Python's own source), a file, a folder or a glob; `sequence_length` tokens (bytes) a sample.

    The last `validation_fraction` of the text is kept for validation, of which `validation_samples` at most are used.
    """

    source: str = "stdlib"
    sequence_length: int = 256
    global_batch: int = 16
    validation_fraction: float = 0.05
    validation_samples: int = 128


@dataclass(frozen=True)
class PlanTable:
    """`text`: a plan by name or by its fields."""

    text: str = "auto"


@dataclass(frozen=True)
class OptimizerTable:
    """`name`: a class of `torch.optim`; `extra`: further keyword arguments of that class."""

    name: str = "AdamW"
    lr: float = 4e-3
    weight_decay: float = 0.1
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ScheduleTable:
    """Learning rate over optimizer steps: linear `warmup` steps, then `decay` (cosine, linear, none) down to `final` of it."""

    warmup: int = 40
    decay: str = "cosine"
    final: float = 0.05


@dataclass(frozen=True)
class TrainTable:
    """`on_nonfinite`: stop or skip; `eval_every` steps (0: only at the end); `sample` characters of text at the end."""

    steps: int = 220
    seed: int = 0
    clip_grad_norm: float = 1.0
    eval_every: int = 100
    on_nonfinite: str = "stop"
    sample: int = 240


@dataclass(frozen=True)
class CheckpointTable:
    """A checkpoint `every` so many steps (0: only at the end), the newest `keep` of them kept."""

    every: int = 100
    keep: int = 2
    asynchronous: bool = field(default=False, metadata={"key": "async"})


@dataclass(frozen=True)
class LogTable:
    """A line on the terminal `every` so many steps; `tensorboard` and `wandb` also send metrics there."""

    every: int = 20
    tensorboard: bool = False
    wandb: bool = False


@dataclass(frozen=True)
class Config:
    """All tables of a run."""

    model: ModelTable = field(default_factory=ModelTable)
    data: DataTable = field(default_factory=DataTable)
    plan: PlanTable = field(default_factory=PlanTable)
    optimizer: OptimizerTable = field(default_factory=OptimizerTable)
    schedule: ScheduleTable = field(default_factory=ScheduleTable)
    train: TrainTable = field(default_factory=TrainTable)
    checkpoint: CheckpointTable = field(default_factory=CheckpointTable)
    log: LogTable = field(default_factory=LogTable)

    def to_toml(self) -> str:
        """Return the configuration as TOML text that `load` reads back to an equal one."""
        tables = {}
        for table in dataclasses.fields(self):
            value = getattr(self, table.name)
            tables[table.name] = {_key(entry): getattr(value, entry.name) for entry in dataclasses.fields(value)}
        return tomli_w.dumps(tables)


def _key(entry: dataclasses.Field[Any]) -> str:
    return str(entry.metadata.get("key", entry.name))


def load(path: Path | None, settings: list[str]) -> Config:
    """Read a TOML file (None: defaults only) and apply `table.key=value` settings; `data=X` means `data.source=X`.

    Raises `ConfigError` in one sentence for a missing file, a wrong table, key, type or value.
    """
    tables: dict[str, Any] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text())
        except OSError as error:
            raise ConfigError(f"the configuration {str(path)!r} can't be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    for setting in settings:
        _apply_setting(tables, setting)
    kinds = get_type_hints(Config)
    for name, table in tables.items():
        if name not in kinds:
            raise ConfigError(f"the configuration has no table [{name}]: the nearest is [{_nearest(name, kinds)}]")
        if not isinstance(table, dict):
            raise ConfigError(f"[{name}] must be a table, not {table!r}")
    config = Config(**{name: _table(kind, name, tables.get(name, {})) for name, kind in kinds.items()})
    _check(config)
    return config


def _apply_setting(tables: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if path == "data":
        path = "data.source"
    table, dot, key = path.partition(".")
    if not equals or not dot:
        raise ConfigError(f"--set {setting!r} is not of the form table.key=value, such as train.steps=100")
    kinds = get_type_hints(Config)
    if table not in kinds:
        raise ConfigError(f"the configuration has no table [{table}]: the nearest is [{_nearest(table, kinds)}]")
    if not isinstance(tables.setdefault(table, {}), dict):
        raise ConfigError(f"[{table}] must be a table, not {tables[table]!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = {"on": True, "off": False}.get(text, text)
    if get_type_hints(kinds[table]).get(key) is str:
        value = text
    tables[table][key] = value


def _table(kind: Any, name: str, values: dict[str, Any]) -> Any:
    fields = {_key(entry): entry for entry in dataclasses.fields(kind)}
    types = get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"[{name}] has no key {key!r}: the nearest is {_nearest(key, fields)!r}")
        arguments[fields[key].name] = _typed(value, types[fields[key].name], f"{name}.{key}")
    return kind(**arguments)


def _typed(value: Any, kind: Any, where: str) -> Any:
    base = get_origin(kind) or kind
    if base is float and type(value) is int:
        return float(value)
    if type(value) is not base:
        raise ConfigError(f"{where}={value!r} is a {type(value).__name__}, but it must be a {base.__name__}")
    if base is list:
        return [_typed(item, get_args(kind)[0], where) for item in value]
    return value


def _nearest(name: str, names: Any) -> str:
    return str(difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0])


def _check(config: Config) -> None:
    """Raise `ConfigError` for a value that no run could use."""
    positive = {
        "data.sequence_length": config.data.sequence_length,
        "data.global_batch": config.data.global_batch,
        "data.validation_samples": config.data.validation_samples,
        "train.steps": config.train.steps,
        "log.every": config.log.every,
        "checkpoint.keep": config.checkpoint.keep,
        "optimizer.lr": config.optimizer.lr,
        "train.clip_grad_norm": config.train.clip_grad_norm,
    }
    for where, value in positive.items():
        if value <= 0:
            raise ConfigError(f"{where}={value} must be greater than 0")
    for where, value in {"checkpoint.every": config.checkpoint.every, "train.eval_every": config.train.eval_every}.items():
        if value < 0:
            raise ConfigError(f"{where}={value} must be at least 0, where 0 means only at the end")
    if config.schedule.warmup < 0:
        raise ConfigError(f"schedule.warmup={config.schedule.warmup} must be at least 0")
    if not 0 <= config.train.seed < 2**63:
        raise ConfigError(f"train.seed={config.train.seed} must lie between 0 and 2^63 - 1")
    if not 0 < config.data.validation_fraction < 1:
        raise ConfigError(f"data.validation_fraction={config.data.validation_fraction} must lie between 0 and 1")
    for where, text, choices in (
        ("train.on_nonfinite", config.train.on_nonfinite, ("stop", "skip")),
        ("schedule.decay", config.schedule.decay, ("cosine", "linear", "none")),
    ):
        if text not in choices:
            raise ConfigError(
                f"{where}={text!r} is unknown: the nearest is {_nearest(text, choices)!r} (one of {', '.join(choices)})"
            )
    if config.checkpoint.asynchronous:
        raise ConfigError("checkpoint.async=true is not available in this version: leave it at false")
