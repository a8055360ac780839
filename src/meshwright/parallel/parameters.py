"""The table of a model's parameters as logical tensors, made before anything is changed.

Two names whose parameters share storage, shape and strides are one logical tensor (a tie). Everything later (sharding, the
norm, the optimizer, checkpoints) counts logical tensors, and names them by the model's own names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn

from meshwright import _torch
from meshwright.blueprint.moves import Label
from meshwright.partition.collectives import all_gather
from meshwright.partition.state import Axis


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism divides a parameter: this rank of `axis` holds its part of `dim`, in the segments of `label`."""

    axis: Axis
    dim: int
    label: Label

    def part(self, full: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, in memory of its own."""
        return self.axis.take(full, self.dim, self.label).clone(memory_format=torch.contiguous_format)

    def join(self, part: Tensor) -> Tensor:
        """Return the whole tensor from every rank's part; all ranks of the axis must call it."""
        return all_gather(part, self.axis, self.dim, self.label)


@dataclass(frozen=True)
class Stored:
    """A tensor that is kept in another form or place: `get` makes it, as [shape] of `dtype`, `put` takes its new value."""

    shape: torch.Size
    dtype: torch.dtype
    get: Callable[[], Tensor]
    put: Callable[[Tensor], None]


@dataclass(eq=False)
class Parameter:
    """One logical parameter.

    `names` are all its names in the module, the first one being the name in checkpoints. `original` refers weakly to the tensor
    that the user's code may know, for re-binding parameter groups: it must not keep a whole tensor alive. `live` is what the
    module computes with; `master` is what the optimizer updates on this rank: the live tensor itself, a full-precision copy,
    or this rank's rows of either.
    `whole` is the logical shape; where tensor parallelism cuts the parameter (`cut`), `shape` is that of this rank's part, which
    everything along the data axes takes for the parameter. `in_parts` says that each tensor-parallel rank's gradient is a part.
    `homes` are the pipeline ranks that hold it, `here` whether this is one of them (elsewhere `live` is on the meta device).
    `rows` is (first, count) of this rank's rows where the master is sharded on dim 0 over `dp_shard`, else None.
    `gradient` is the reduced gradient of the master's shape, between the backward and the update; `used` says whether a
    backward of the step reached the parameter, on this rank while it runs, on any rank once it is reduced; backwards under `idle`
    don't count, and leave no gradient. `gathered` is FSDP2's
    whole tensor, whose memory comes and goes; `summed` is the gradient once the parts of the step have been summed.
    `stored` stands for the master's values where the plan keeps them in another form or place; the master then has its shape only.
    """

    names: tuple[str, ...]
    original: weakref.ref[nn.Parameter]
    live: nn.Parameter
    master: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype
    trainable: bool
    rows: tuple[int, int] | None = None
    whole: torch.Size = field(default_factory=torch.Size)
    cut: Cut | None = None
    in_parts: bool = False
    homes: tuple[int, ...] = (0,)
    here: bool = True
    gradient: Tensor | None = field(default=None, repr=False)
    used: bool = field(default=False, repr=False)
    idle: bool = field(default=False, repr=False)
    gathered: Tensor | None = field(default=None, repr=False)
    summed: Tensor | None = field(default=None, repr=False)
    stored: Stored | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Return the first of its names."""
        return self.names[0]

    @property
    def sharded(self) -> bool:
        """Return whether each rank of `dp_shard` updates only its own rows."""
        return self.rows is not None

    def value(self) -> Tensor:
        """Return this rank's rows of the parameter in full precision."""
        return self.master.detach() if self.stored is None else self.stored.get()

    def local(self, full: Tensor) -> Tensor:
        """Return this rank's part of a tensor of the parameter's whole shape."""
        part = full if self.cut is None else self.cut.part(full)
        return self.own_rows(part)

    def own_rows(self, part: Tensor) -> Tensor:
        """Return this rank's rows of a tensor of the parameter's `shape`."""
        return part if self.rows is None else part.narrow(0, *self.rows)

    def mark_used(self, gathered: Tensor) -> None:
        """Note that a backward has reached the parameter."""
        if self.idle:
            gathered.grad = None
        else:
            self.used = True


def collect(module: nn.Module) -> list[Parameter]:
    """Return the logical parameters of `module` in registration order, and make each tie a single `nn.Parameter` object."""
    by_storage: dict[object, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        # An empty tensor has no storage to share: it is told apart by identity.
        storage = (_torch.storage_key(parameter), parameter.storage_offset(), parameter.shape, parameter.stride())
        key: object = storage if parameter.numel() else id(parameter)
        by_storage.setdefault(key, []).append((name, parameter))
    table = []
    for entries in by_storage.values():
        _, first = entries[0]
        for name, parameter in entries:
            if parameter is not first:
                assign(module, name, first)
        trainable = any(parameter.requires_grad for _, parameter in entries)
        first.requires_grad_(trainable)
        names = tuple(name for name, _ in entries)
        table.append(Parameter(names, weakref.ref(first), first, first, first.shape, first.dtype, trainable, whole=first.shape))
    return table


@contextmanager
def idle(table: list[Parameter]) -> Iterator[None]:
    """Backwards inside send what collectives they send, and add to no gradient, not even what is not finite."""
    for entry in table:
        entry.idle = True
    try:
        yield
    finally:
        for entry in table:
            entry.idle = False


def replace_live(module: nn.Module, entry: Parameter, parameter: nn.Parameter) -> None:
    """Put another tensor in the place of a parameter, under all its names."""
    entry.live = entry.master = parameter
    for name in entry.names:
        assign(module, name, parameter)


def rebind(module: nn.Module, table: list[Parameter]) -> None:
    """Point `live` and `master` at the tensors that the module holds now, after torch has replaced some; ties stay tied."""
    current = dict(module.named_parameters(remove_duplicate=False))
    for entry in table:
        entry.live = entry.master = current[entry.name]
        for name in entry.names[1:]:
            if current[name] is not entry.live:
                assign(module, name, entry.live)


def assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `parameter` the one that `module` holds under `name`."""
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, parameter)


def on_accumulated(parameter: Tensor, call: Callable[[Tensor], None]) -> None:
    """Call `call(parameter)` whenever autograd has accumulated its gradient, for as long as somebody else holds `call`.

    Python's collector does not see these hooks: a hook that led back to its parameter would keep both, and an engine, for ever.
    """
    held = weakref.WeakMethod(call) if isinstance(call, MethodType) else weakref.ref(call)

    def hook(accumulated: Tensor) -> None:
        alive = held()
        if alive is not None:
            alive(accumulated)

    parameter.register_post_accumulate_grad_hook(hook)


def shard_rows(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return (first, count) of the rows that `rank` of `ranks` holds: chunks of `ceil(rows / ranks)`, the last ones short.

    The rule of DTensor's `Shard(0)`; ranks beyond the last row hold none.
    """
    size = -(-rows // ranks)
    first = min(rank * size, rows)
    return first, min(size, rows - first)
