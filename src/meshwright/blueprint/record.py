"""What a Blueprint is made of: frozen records that print themselves, compare by value and round-trip through JSON.

Every amount that may depend on the micro-batch is a `Count`, so that one capture serves every micro-batch size. Bytes
are bytes, FLOPs count a multiply and an add as two, shapes are tuples of sizes or of `Count`s. How a record is filled
is left to `capture.py`, what may be split to `regions.py`, how it is shown to `show.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from meshwright.blueprint.data import from_data, to_data
from meshwright.errors import ConfigError


@dataclass(frozen=True, order=True)
class Count:
    """An amount that is affine in the micro-batch: `fixed + per_item * items`."""

    fixed: int = 0
    per_item: int = 0

    def at(self, items: int) -> int:
        """The amount for a micro-batch of `items`."""
        return self.fixed + self.per_item * items

    def __add__(self, other: Count) -> Count:
        return Count(self.fixed + other.fixed, self.per_item + other.per_item)

    def __mul__(self, times: int) -> Count:
        return Count(self.fixed * times, self.per_item * times)

    def __str__(self) -> str:
        if not self.per_item:
            return f"{self.fixed}"
        return f"{self.fixed} + {self.per_item}b" if self.fixed else f"{self.per_item}b"

    @staticmethod
    def through(first: tuple[int, int], second: tuple[int, int]) -> Count:
        """The line through two measurements `(items, amount)`; a slope that is not whole is rounded down."""
        slope = (second[1] - first[1]) // (second[0] - first[0])
        return Count(first[1] - slope * first[0], slope)

    @staticmethod
    def total(counts: Iterable[Count]) -> Count:
        """The sum; `Count(0, 0)` for none."""
        fixed = per_item = 0
        for count in counts:
            fixed, per_item = fixed + count.fixed, per_item + count.per_item
        return Count(fixed, per_item)


@dataclass(frozen=True)
class Peak:
    """The largest of several amounts: the worst moment is another one at another micro-batch size."""

    moments: tuple[Count, ...] = ()

    def at(self, items: int) -> int:
        """The most for a micro-batch of `items`; 0 if nothing was made."""
        return max((moment.at(items) for moment in self.moments), default=0)

    @staticmethod
    def over(moments: Iterable[Count]) -> Peak:
        """Only the moments that are the worst at some size (upper envelope over powers of two and their neighbours)."""
        every = sorted(set(moments))
        sizes = sorted({max(1, 2**power + step) for power in range(14) for step in (-1, 0, 1)})
        return Peak(tuple(dict.fromkeys(max(every, key=lambda moment: moment.at(size)) for size in sizes if every)))


@dataclass(frozen=True)
class TensorRecord:
    """A tensor that crosses a boundary: `name` is the argument or output it came as, `dtype` without `torch.`."""

    name: str
    shape: tuple[Count, ...]
    dtype: str
    bytes: Count
    needs_gradient: bool = False
    recomputable: bool = False
    """Derived from the batch and buffers alone: cheaper to recompute on another stage than to send."""


@dataclass(frozen=True)
class ParameterRecord:
    """A parameter or buffer by its name in its unit; `shared_with` is the tensor it is tied to, if any."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    trainable: bool = True
    buffer: bool = False
    shared_with: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Op:
    """One ATen op of a forward or a backward, as dispatched below autograd.

    `matmul` is `(batch, m, n, k)`: `batch` products of `[m, k]` by `[k, n]`. `forward_op` is, in a backward, the index
    of the forward op that it differentiates (-1 if none). `position` counts the blocks that have run before it (outside
    blocks only).
    """

    name: str
    kind: str
    module: str
    flops: Count
    read_bytes: Count
    written_bytes: Count
    matmul: tuple[Count, Count, Count, Count] | None = None
    causal: bool = False
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    forward_op: int = -1
    position: int = 0
    region: int = -1
    """The region whose degree divides this op's work, or -1."""
    mixes_sequence: bool = False
    """The result at one position of the sequence depends on other positions (attention, a convolution over time)."""


@dataclass(frozen=True)
class Saved:
    """A storage that autograd keeps from forward to backward, counted once however many ops save views of it.

    `role`: `parameter`, `buffer` or `input` (counted elsewhere already), `activation` (made in this unit). `producer`
    and `savers` are indices of forward ops (-1: not made here). `output` marks what the unit also returns: the next
    unit's input.
    """

    bytes: Count
    role: str
    shape: tuple[Count, ...]
    dtype: str
    name: str = ""
    producer: int = -1
    savers: tuple[int, ...] = ()
    output: bool = False
    region: int = -1
    position: int = 0


@dataclass(frozen=True)
class Split:
    """How a region cuts one dim of a tensor: `repeat` times the `segments`, each in equal contiguous chunks.

    A plain column weight is `repeat=1, segments=(out,)`; a fused gate and up is `segments=(ffn, ffn)`; query, key and
    value fused per group is `repeat=1, segments=(heads * dim, kv * dim, kv * dim)`.
    """

    tensor: str
    dim: int
    segments: tuple[int, ...]
    repeat: int = 1


@dataclass(frozen=True)
class Region:
    """Ops between column-split and row-split weights in which activations stay sharded over the tensor-parallel axis.

    `kind`: `column-row` (ends in an all-reduce), `embedding` (rows of a table, ends in an all-reduce), `head` (column
    only: the output stays sharded, such as logits over the vocabulary). `units` limits the degree: it must divide
    `units` (heads, groups or features). `reduced` are the forward ops whose results are partial sums, `reduced_bytes`
    the size of one all-reduce of them all.
    """

    kind: str
    units: int
    columns: tuple[Split, ...]
    rows: tuple[Split, ...]
    vectors: tuple[Split, ...] = ()
    ops: tuple[int, ...] = ()
    reduced: tuple[int, ...] = ()
    reduced_bytes: Count = field(default_factory=Count)
    entered_bytes: Count = field(default_factory=Count)
    """Bytes of the replicated activations that enter: their gradients are all-reduced in backward."""
    attention: bool = False
    experts: bool = False
    open_ended: bool = False
    """Results leave the region still cut (logits over the vocabulary): for a cut loss, or to be gathered."""


@dataclass(frozen=True)
class Experts:
    """Routing inside a unit: `choices` of `experts` experts per token, and where the experts' weights are.

    `stacked` weights have the experts on dim 0; `modules` are one module per expert. One of the two is empty.
    """

    experts: int
    choices: int
    stacked: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One captured piece of a model: a block kind, or (with no instances) everything outside the blocks."""

    class_name: str
    instances: tuple[str, ...]
    parameters: tuple[ParameterRecord, ...]
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    saved: tuple[Saved, ...]
    regions: tuple[Region, ...] = ()
    experts: Experts | None = None
    whole: tuple[tuple[str, str], ...] = ()
    """Weights that no region cuts, each with the reason."""
    forward_peak: Peak = field(default_factory=lambda: Peak())
    """Bytes of tensors made in this unit that are alive at the worst moment of its forward (saved ones included)."""
    backward_peak: Peak = field(default_factory=lambda: Peak())
    """The same for its backward: what is still saved and the gradients so far; the one that comes in is left out."""

    @property
    def forward_flops(self) -> Count:
        """FLOPs of one forward."""
        return Count.total(op.flops for op in self.forward)

    @property
    def backward_flops(self) -> Count:
        """FLOPs of one backward, as run (matmul by matmul, not twice the forward)."""
        return Count.total(op.flops for op in self.backward)

    @property
    def n_parameters(self) -> int:
        """Elements of the unit's own distinct parameters."""
        return sum(p.numel for p in self.parameters if not p.buffer and not p.shared_with)

    @property
    def saved_bytes(self) -> Count:
        """Bytes of everything saved, parameters and inputs included: what `saved_tensors_hooks` sees, by storage."""
        return Count.total(saved.bytes for saved in self.saved)

    @property
    def activation_bytes(self) -> Count:
        """Saved bytes that one more micro-batch in flight adds: the unit's inputs and what it makes, less what it
        returns.
        """
        return Count.total(s.bytes for s in self.saved if s.role in ("activation", "input") and not s.output)


@dataclass(frozen=True)
class Call:
    """One call of a block in execution order: its module's name and its kind, an index into `Blueprint.kinds`."""

    name: str
    kind: int


@dataclass(frozen=True)
class Boundary:
    """The place right after a block where a pipeline may be cut."""

    flows: tuple[TensorRecord, ...]
    """What the block made and something later reads."""
    alive: tuple[TensorRecord, ...]
    """Whatever else is read later: skip connections, an encoder's output, masks and rotary tables (`recomputable`)."""


@dataclass(frozen=True)
class Chain:
    """Calls `start` to `stop` (excluded) of `Blueprint.calls`, each fed by the one before; `name` is their common
    parent.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Blueprint:
    """What a model is, read from its code. Made by `meshwright.inspect`.

    `calls` are the blocks in execution order (a module called twice is there twice), `boundaries[i]` is what is alive
    after `calls[i]`. `rest` is everything outside the blocks (embedding, norm, head, loss); its ops and saved tensors
    carry the `position` at which they run. `batch` holds the tensors of one batch with the micro-batch free. `dtype` is
    the parameters' as captured. `captured` is False when only the structure could be read: blocks and parameters are
    there, `notes` say why nothing else is.
    """

    model: str
    class_name: str
    dtype: str
    batch: tuple[TensorRecord, ...]
    sequence: int
    kinds: tuple[Unit, ...]
    calls: tuple[Call, ...]
    boundaries: tuple[Boundary, ...]
    chains: tuple[Chain, ...]
    rest: Unit
    blocks: tuple[str, ...]
    saved: Count = field(default_factory=Count)
    """Bytes that autograd keeps over the whole model, parameters, buffers and the batch aside, each storage once."""
    device: str = "cpu"
    """Whose kernels were captured: `cpu` or `cuda`."""
    captured: bool = True
    notes: tuple[str, ...] = ()

    def units(self) -> list[tuple[Unit, int]]:
        """Every unit with how often it runs in one forward: `rest` once, a kind as often as it is called."""
        times = [0] * len(self.kinds)
        for call in self.calls:
            times[call.kind] += 1
        return [(self.rest, 1), *zip(self.kinds, times, strict=True)]

    @property
    def n_parameters(self) -> int:
        """Elements of all distinct parameters."""
        return self.rest.n_parameters + sum(len(kind.instances) * kind.n_parameters for kind in self.kinds)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all distinct parameters in the dtype captured."""
        units = [(self.rest, 1), *((kind, len(kind.instances)) for kind in self.kinds)]
        return sum(n * p.bytes for unit, n in units for p in unit.parameters if not p.buffer and not p.shared_with)

    def forward_flops(self, items: int) -> int:
        """FLOPs of one forward of a micro-batch of `items`."""
        return sum(times * unit.forward_flops.at(items) for unit, times in self.units())

    def backward_flops(self, items: int) -> int:
        """FLOPs of one backward of a micro-batch of `items`, as run."""
        return sum(times * unit.backward_flops.at(items) for unit, times in self.units())

    def saved_bytes(self, items: int) -> int:
        """Bytes that autograd keeps from forward to backward for a micro-batch of `items`, parameters and the batch
        aside.
        """
        return self.saved.at(items)

    def to_json(self) -> str:
        """The whole blueprint as JSON text; `Blueprint.from_json` gives an equal one back."""
        return json.dumps(to_data(self))

    @staticmethod
    def from_json(text: str) -> Blueprint:
        """Read what `to_json` wrote. Raises `ConfigError` for anything else."""
        try:
            return from_data(Blueprint, json.loads(text))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(f"this is not a saved blueprint ({error}): write one with Blueprint.save(path)") from error

    def save(self, path: str | Path) -> None:
        """Write the blueprint to a file, whole or not at all."""
        target = Path(path)
        beside = target.with_name(target.name + ".part")
        beside.write_text(self.to_json())
        beside.replace(target)

    @staticmethod
    def load(path: str | Path) -> Blueprint:
        """Read a blueprint that `save` wrote. Raises `ConfigError` if the file is missing or is something else."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"the blueprint {str(path)!r} can't be read: {error.strerror}") from error
        return Blueprint.from_json(text)

    def __str__(self) -> str:
        from meshwright.blueprint.show import show  # the printer knows the records, not the other way round

        return show(self)
