"""A Blueprint boiled down to what a prediction adds up: products, attentions, streams of bytes, saved bytes, parameters.

One profile serves every plan, cluster and micro-batch. Amounts are `(fixed, per item)` pairs; what the axes divide is kept beside
each: `units` is the degree limit of the tensor-parallel region that an amount lies in (0: outside), `experts` marks work on routed
tokens. Seconds are left to `time.py`, bytes on a rank to `footprint.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.blueprint.record import Blueprint, Op, ParameterRecord, Saved, Unit
from meshwright.plan.graph import Graph, Kernel, Size, build, is_view, saved_root
from meshwright.plan.live import Beside, Moment, across_calls, moments
from meshwright.plan.recompute import Front, hull, repeated, selective, unit_costs
from meshwright.plan.stages import CPU, GPU, cell_seconds

PLAIN = {"add", "sub", "mul", "neg", "relu", "threshold_backward", "copy", "fill", "zero", "zeros_like", "ones_like", "clone"}
"""ATen ops of at most one instruction an element."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product `[m, k] x [k, n]`, `batch` of them; `cut` is the dim (0 batch .. 3 k) that tensor parallelism divides."""

    dims: tuple[Size, Size, Size, Size]
    cut: int
    units: int
    experts: bool
    weight: bool
    conv: bool = False
    backward: bool = False


@dataclass(frozen=True, slots=True)
class Attend:
    """A fused attention: FLOPs over the whole square, the keys' length, `width` bytes of one of its inputs."""

    flops: Size
    moved: Size
    keys: int
    causal: bool
    units: int
    backward: bool
    head: int = 128


@dataclass(slots=True)
class Phase:
    """Work of one pass: products and attentions one by one, other kernels as bytes by (units, experts, plain), and launches.

    A plain kernel does next to nothing with an element, so that even a CPU waits for its memory.
    """

    products: list[tuple[Product, int]] = field(default_factory=list)
    attentions: list[Attend] = field(default_factory=list)
    streams: dict[tuple[int, bool, bool], list[int]] = field(default_factory=dict)  # [fixed bytes, bytes per item, kernels]
    launches: int = 0
    made: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """How many results there are by (fixed bytes, bytes per item, units)."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes saved for backward: in a region of `units` (0: outside), by attention's core, as the unit's input, on routed tokens."""

    size: Size
    units: int
    core: bool
    entry: bool
    experts: bool
    enters: bool = False
    """Read by a region's first products: under sequence parallelism gathered before, and kept gathered by eager stacks."""
    ends: bool = False
    """Made after the last block: gone when the blocks' backward begins."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Tensor-parallel communication of a region: bytes all-reduced in forward and in backward."""

    units: int
    forward: Size
    backward: Size
    loss: bool = False
    """The region ends in a loss over cut classes, whose largest, sum, pick and gradient's sum are all-reduced row by row."""


@dataclass(frozen=True)
class Weights:
    """Parameters: whole ones, those of regions by degree limit, those of experts (limit = number of experts)."""

    whole: int = 0
    cut: tuple[tuple[int, int], ...] = ()
    experts: int = 0
    n_experts: int = 0
    tensors: int = 0
    frozen: int = 0

    @property
    def total(self) -> int:
        """All elements."""
        return self.whole + sum(n for _, n in self.cut) + self.experts

    def local(self, tp: int, ep: int) -> tuple[float, float]:
        """Elements on a rank: (those shared by all data ranks, those of its experts)."""
        dense = self.whole + sum(n / degree(tp, units) for units, n in self.cut)
        return dense, self.experts / max(1, min(ep, self.n_experts or 1))


@dataclass(frozen=True)
class UnitProfile:
    """One kind of block, or what runs before or after the blocks.

    `recomputed` is what `recompute=selective` repeats and `spared` the part of the saved bytes that it leaves, chosen as the
    executor chooses (`plan/recompute.py`). Stacks of hand-fused kernels repeat attention's core instead, and keep the rest
    (`spared` None).
    """

    forward: Phase
    backward: Phase
    weight: Phase
    recomputed: Phase
    kept: tuple[Kept, ...]
    exchanges: tuple[Exchange, ...]
    weights: Weights
    entry: Size
    forward_moments: tuple[Moment, ...]
    backward_moments: tuple[Moment, ...]
    routed: Size
    kv: Size
    query: Size
    """Bytes of attention's queries; 0 for hand-fused stacks, which pass keys and values around a ring."""
    attention: bool
    spared: float | None = None
    front: Front = ((0.0, 1.0), (1.0, 0.0))
    """What `recompute=budget=` chooses from (`plan/recompute.hull`); a hand-fused stack recomputes whole blocks."""


@dataclass(frozen=True)
class Profile:
    """The model: block kinds with the order of calls, and what runs before and after."""

    kinds: tuple[UnitProfile, ...]
    calls: tuple[int, ...]
    before: UnitProfile
    after: UnitProfile
    boundaries: tuple[Size, ...]
    sequence: int
    mode: str
    dtype: str
    tied: int
    flops: Size
    n_experts: int
    cells: tuple[float, ...] = ()
    """Seconds by which a pipeline is cut, one for each block call (see `stages.py`)."""

    @property
    def parameters(self) -> int:
        """Distinct parameters (each shared weight once)."""
        blocks = sum(self.kinds[kind].weights.total for kind in self.calls)
        return blocks + self.before.weights.total + self.after.weights.total - self.tied


def degree(tp: int, units: int) -> int:
    """How far a region with `units` can be cut by `tp` ranks: tables and heads are padded, attention goes by whole heads."""
    if not units or tp == 1:
        return 1
    if units > 4096 or units % tp == 0:
        return tp
    best = 1
    for d in range(1, min(tp, units) + 1):
        if tp % d == 0 and units % d == 0:
            best = d
    return best


def profile(blueprint: Blueprint, mode: str = "eager") -> Profile:
    """Boil a captured blueprint down; `mode` is `eager`, `fused` or `compiled` (see `graph.py`)."""
    calls = tuple(call.kind for call in blueprint.calls)
    beside = [Beside()] * len(blueprint.kinds)
    for kind, at in zip(calls, across_calls(build(blueprint.rest, mode), len(calls)), strict=True):
        beside[kind] = max(beside[kind], at, key=lambda one: (one.passing, len(one.waiting)))
    kinds = tuple(_unit(unit, mode, blueprint, None, at) for unit, at in zip(blueprint.kinds, beside, strict=True))
    before, after = (_unit(blueprint.rest, mode, blueprint, side) for side in (False, True))
    items = (1, 2)
    forward = [blueprint.forward_flops(n) + blueprint.backward_flops(n) for n in items]
    shared = {p.shared_with for p in blueprint.rest.parameters if p.shared_with}
    tied = 0
    if before.weights.total and after.weights.total:
        both = before.weights.total + after.weights.total
        tied = both - blueprint.rest.n_parameters if shared else max(0, both - blueprint.rest.n_parameters)
    boundaries = tuple(
        (sum(f.bytes.fixed for f in b.flows if f.bytes.per_item), sum(f.bytes.per_item for f in b.flows))
        for b in blueprint.boundaries
    )
    return Profile(
        kinds=kinds,
        calls=calls,
        before=before,
        after=after,
        boundaries=boundaries,
        sequence=blueprint.sequence,
        mode=mode,
        dtype=blueprint.dtype,
        tied=tied,
        flops=(2 * forward[0] - forward[1], forward[1] - forward[0]),
        n_experts=max((unit.weights.n_experts for unit in kinds), default=0),
        cells=cell_seconds(blueprint),
    )


def _unit(unit: Unit, mode: str, blueprint: Blueprint, after: bool | None, beside: Beside | None = None) -> UnitProfile:
    """One unit; `after` picks the side of the blocks for what runs outside them (None: a block)."""
    graph = build(unit, mode)
    here, sequence = _here(unit, after, len(blueprint.calls)), blueprint.sequence
    expert_ops = _expert_ops(unit, graph)
    forward, backward, weight, recomputed = Phase(), Phase(), Phase(), Phase()
    core = _core(unit)
    costs = unit_costs(unit, 1, CPU if blueprint.device == "cpu" else GPU)
    choice = selective(costs) if after is None and mode != "fused" else None
    again = core if choice is None else repeated(unit, choice)
    for kernel in graph.kernels:
        index = kernel.ops[0]
        op = graph.ops[index]
        if not here(op):
            continue
        if index < graph.n_forward:
            _add(forward, kernel, graph, unit, expert_ops, sequence)
            if index in again:
                _add(recomputed, kernel, graph, unit, expert_ops, sequence)
        else:
            target = weight if op.kind == "matmul" and op.written_bytes.per_item == 0 and op.written_bytes.fixed else backward
            _add(target, kernel, graph, unit, expert_ops, sequence)
    exchanges = tuple(
        Exchange(region.units, _pair(region.reduced_bytes), _backward_bytes(region), region.open_ended)
        for region in unit.regions
        if any(here(unit.forward[op]) for op in region.ops[:1]) and not region.experts
    )
    kept, held = _kept(unit, graph, mode, core, expert_ops, here, len(blueprint.calls) if after else 0)
    worst = moments(unit, graph, here, held, blueprint.device == "cpu", beside)
    return UnitProfile(
        forward=forward,
        backward=backward,
        weight=weight,
        recomputed=recomputed,
        kept=kept,
        exchanges=exchanges,
        weights=_weights(unit, here, after),
        entry=_entry(unit) if after is None else (0, 0),
        forward_moments=worst[0],
        backward_moments=worst[1],
        routed=_routed(unit),
        kv=_kv(unit, graph),
        query=(0, 0) if mode == "fused" else _query(unit, graph),
        attention=any(op.kind == "attention" for op in unit.forward) or bool(core),
        spared=choice.bytes / costs.saved if choice is not None and costs.saved else None,
        front=hull(costs) if choice is not None else UnitProfile.front,
    )


def _pair(count) -> Size:  # type: ignore[no-untyped-def]
    return count.fixed, count.per_item


def _here(unit: Unit, after: bool | None, n_calls: int):  # type: ignore[no-untyped-def]
    if after is None:
        return lambda op: True
    half = (n_calls + 1) // 2
    return lambda op: (op.position >= max(1, half)) == after if n_calls else not after


def _backward_bytes(region) -> Size:  # type: ignore[no-untyped-def]
    """Several products read one entering tensor: its gradients are summed before one all-reduce."""
    entered, reduced = _pair(region.entered_bytes), _pair(region.reduced_bytes)
    if reduced[1] and entered[1]:
        return min(entered, reduced, key=lambda size: size[1])
    return entered


def _add(phase: Phase, kernel: Kernel, graph: Graph, unit: Unit, experts: set[int], sequence: int) -> None:
    index = kernel.ops[0]
    op = graph.ops[index]
    phase.launches += 1
    routed = index in experts
    units = _units(op, graph, unit)
    result = (op.written_bytes.fixed, op.written_bytes.per_item, units)
    phase.made[result] = phase.made.get(result, 0) + 1
    if op.matmul is not None:
        product = Product(
            dims=tuple(_pair(c) for c in op.matmul),  # type: ignore[arg-type]
            cut=_cut_dim(op, unit, index >= graph.n_forward) if units else -1,
            units=units,
            experts=routed,
            weight=(any(_pair(c)[1] == 0 for c in op.matmul[:1]) and op.matmul[0].fixed == 1) or routed,
        )
        for place, (known, times) in enumerate(phase.products):
            if known == product:
                phase.products[place] = (known, times + 1)
                return
        phase.products.append((product, 1))
    elif op.kind == "attention":
        moved = (op.read_bytes.fixed + op.written_bytes.fixed, op.read_bytes.per_item + op.written_bytes.per_item)
        phase.attentions.append(
            Attend(_pair(op.flops), moved, sequence, op.causal, units, op.forward_op >= 0, _head(unit, op, index))
        )
    else:
        if op.kind == "conv":
            phase.products.append((_conv(op), 1))
            return
        plain = all(graph.ops[i].name.split(".")[1].removesuffix("_") in PLAIN for i in kernel.ops)
        entry = phase.streams.setdefault((units, routed, plain), [0, 0, 0])
        entry[0] += max(0, kernel.moved[0])
        entry[1] += max(0, kernel.moved[1])
        entry[2] += kernel.launches


def _head(unit: Unit, op: Op, index: int) -> int:
    """Features of one head, off the shape of what attention saves."""
    forward = op.forward_op if op.forward_op >= 0 else index
    shapes = [s.shape for s in unit.saved if forward in s.savers and len(s.shape) == 4]
    return shapes[0][-1].fixed if shapes else 128


def _conv(op: Op) -> Product:
    """A convolution as the product with its FLOPs and its outputs, 64 channels wide; a weight's gradient sums over items."""
    width = 64
    outputs = max(width, (op.written_bytes.per_item or op.written_bytes.fixed) // 4)
    inner = max(1, (op.flops.per_item or op.flops.fixed) // (2 * outputs))
    rows = outputs // width
    sums = bool(op.flops.per_item) and not op.written_bytes.per_item
    return Product(
        ((1, 0), (0, rows) if op.written_bytes.per_item else (rows, 0), (width, 0), (0, inner) if sums else (inner, 0)),
        cut=-1,
        units=0,
        experts=False,
        weight=True,
        conv=True,
        backward=op.forward_op >= 0,
    )


def _units(op: Op, graph: Graph, unit: Unit) -> int:
    if op.region >= 0:
        return unit.regions[op.region].units
    for value in op.outputs:
        if graph.root.get(value) in graph.cut:
            return graph.cut[graph.root[value]][0]
    return 0


def _cut_dim(op: Op, unit: Unit, backward: bool) -> int:
    """Which of (batch, m, n, k) a region divides: heads or experts by batch, else the features that are cut."""
    assert op.matmul is not None
    region = unit.regions[op.region] if op.region >= 0 else None
    if region is None:
        return -1
    if op.matmul[0].at(2) > 1 and not region.experts:
        return 0
    forward = unit.forward[op.forward_op] if backward and op.forward_op >= 0 else op
    if forward.matmul is None:
        return 2
    index = op.forward_op if backward else unit.forward.index(op)
    features = forward.matmul[3] if index in region.reduced else forward.matmul[2]
    if region.kind == "embedding" and index not in region.reduced:
        features = forward.matmul[2]
    for place in (2, 3, 1):
        if op.matmul[place] == features and not (place == 1 and not backward):
            if not backward:
                return 3 if index in region.reduced else 2
            return place
    return 3 if index in region.reduced else 2


def _core(unit: Unit) -> set[int]:
    """Forward ops of attention's core, what selective recompute repeats: from the product of two activations to the last one.

    Source: arXiv:2205.05198 section 5 (scores, softmax, dropout and the product with the values; not the projections).
    """
    core: set[int] = set()
    places = [i for i, op in enumerate(unit.forward) if op.kind == "attention"]
    batched = [
        i for i, op in enumerate(unit.forward) if op.matmul is not None and op.matmul[0].at(2) > 1 and op.read_bytes.fixed == 0
    ]
    core |= set(places)
    by_module: dict[str, list[int]] = {}
    for index in batched:
        by_module.setdefault(unit.forward[index].module, []).append(index)
    for found in by_module.values():
        if len(found) > 1:
            core |= set(range(found[0], found[-1] + 1))
    return core


def _kept(  # type: ignore[no-untyped-def]
    unit: Unit, graph: Graph, mode: str, core: set[int], experts: set[int], here, n_calls: int
) -> tuple[tuple[Kept, ...], dict[int, Size]]:
    """What backward keeps: as captured, less what a fused kernel computes again from what is kept anyway.

    Beside it the bytes of what is made here, by root. `n_calls`, for what runs after the blocks: their number.
    """
    kept: list[Kept] = []
    sizes: dict[int, Size] = {}
    for saved in unit.saved:
        if saved.role not in ("activation", "input") or saved.output or not _side(saved, here):
            continue
        if saved.bytes.per_item == 0 and (saved.role == "input" or mode == "fused"):
            continue  # a mask: what makes it is inside a fused kernel
        if saved.dtype == "int64" and saved.role == "input" and saved.producer >= 0:
            continue  # the batch itself
        root = saved_root(unit, graph, saved)
        size = _pair(saved.bytes)
        if mode != "eager" and saved.producer >= 0 and not is_view(unit.forward[saved.producer]):
            if root in graph.inside:
                continue
            if graph.size.get(root) and root not in unit.forward[saved.producer].outputs:
                size = min(size, graph.size[root], key=lambda s: s[1])
        if saved.producer >= 0:
            if root in sizes and mode == "fused":  # a copy that such a stack does not make
                continue
            sizes[root] = size
        cut = graph.cut.get(root)
        units = unit.regions[saved.region].units if saved.region >= 0 else cut[0] if cut else 0
        in_core = saved.producer in core and all(s in core for s in saved.savers) and not _stays(unit, graph, saved, core)
        enters = units == 0 and any(
            s >= 0 and unit.forward[s].region >= 0 and unit.forward[s].matmul is not None for s in saved.savers
        )
        ends = bool(n_calls) and saved.position >= n_calls
        kept.append(Kept(size, units, in_core, saved.role == "input", saved.producer in experts, enters and mode != "fused", ends))
    if mode != "eager":
        kept += _reread(unit, graph, sizes, here)
    return tuple(kept), sizes


def _reread(unit: Unit, graph: Graph, sizes: dict[int, Size], here) -> list[Kept]:  # type: ignore[no-untyped-def]
    """Inputs of a fused group that its backward computes from again, where they are not saved already: products' outputs."""
    needed: list[Kept] = []
    dropped = set()
    for saved in unit.saved:
        if saved.producer >= 0 and saved.role == "activation":
            root = saved_root(unit, graph, saved)
            if root in graph.inside:
                dropped.add(root)
    for kernel in graph.kernels:
        op = graph.ops[kernel.ops[0]]
        if kernel.ops[0] >= graph.n_forward or len(kernel.ops) < 2 or not here(op):
            continue
        made = {graph.root[v] for i in kernel.ops for v in graph.ops[i].outputs}
        if not made & dropped:
            continue
        for value in {graph.root[v] for i in kernel.ops for v in graph.ops[i].inputs} - made:
            size = graph.size.get(value, (0, 0))
            lost = sum(graph.size.get(r, (0, 0))[1] for r in made & dropped)
            if value not in sizes and size[1] and _made_by_product(graph, value) and size[1] <= lost:
                sizes[value] = size
                cut = graph.cut.get(value)
                needed.append(Kept(size, cut[0] if cut else 0, False, False, False))
    return needed


def _made_by_product(graph: Graph, value: int) -> bool:
    return any(value in map(graph.root.get, op.outputs) and op.kind == "matmul" for op in graph.ops[: graph.n_forward])


def _stays(unit: Unit, graph: Graph, saved: Saved, core: set[int]) -> bool:
    """Whether recomputing attention's core saves nothing here: a copy of what was made before the core."""
    op = unit.forward[saved.producer]
    if op.kind == "attention":
        return True  # its result is read by the projection, its statistics are small
    made = {graph.root[v] for i in core if not is_view(unit.forward[i]) for v in unit.forward[i].outputs}
    return op.name.startswith("aten.clone") and not any(graph.root.get(v) in made - set(op.outputs) for v in op.inputs)


def _side(saved: Saved, here) -> bool:  # type: ignore[no-untyped-def]
    return bool(here(saved))


def _entry(unit: Unit) -> Size:
    """The hidden state that enters a block (what full recompute keeps): its inputs that depend on the micro-batch."""
    tensors = [t for t in unit.inputs if t.bytes.per_item and t.needs_gradient] or [t for t in unit.inputs if t.bytes.per_item][:1]
    return sum(t.bytes.fixed for t in tensors), sum(t.bytes.per_item for t in tensors)


def _expert_ops(unit: Unit, graph: Graph) -> set[int]:
    """Ops on routed tokens: those in regions of experts, or in the experts' own modules, and their backward."""
    if unit.experts is None:
        return set()
    names = tuple(unit.experts.modules)
    prefix = unit.instances[0] + "." if unit.instances else ""
    regions = {i for i, region in enumerate(unit.regions) if region.experts}
    found = set()
    for index, op in enumerate(graph.ops):
        inside = names and op.module.startswith(tuple(f"{prefix}{name}" for name in names))
        differentiates = index >= graph.n_forward and op.forward_op in found
        if op.region in regions or inside or op.name.startswith("aten._grouped_mm") or differentiates:
            found.add(index)
    return found


def _routed(unit: Unit) -> Size:
    """Bytes of the tokens that a micro-batch sends to experts: `choices` copies of the hidden state."""
    if unit.experts is None:
        return 0, 0
    entry = _entry(unit)
    return entry[0] * unit.experts.choices, entry[1] * unit.experts.choices


def _query(unit: Unit, graph: Graph) -> Size:
    op = next((op for op in unit.forward if op.kind == "attention" and len(op.inputs) >= 3), None)
    return graph.size.get(graph.root.get(op.inputs[0], op.inputs[0]), (0, 0)) if op else (0, 0)


def _kv(unit: Unit, graph: Graph) -> Size:
    """Bytes of keys and values before they are repeated for groups of heads: what context parallelism passes around."""
    for op in unit.forward:
        if op.kind == "attention" and len(op.inputs) >= 3:
            sizes = []
            for value in op.inputs[1:3]:
                value = graph.root.get(value, value)
                for other in reversed(unit.forward):  # a copy that only repeats heads
                    if (
                        value in [graph.root.get(v, v) for v in other.outputs]
                        and other.kind in ("elementwise", "copy")
                        and other.inputs
                    ):
                        source = graph.root.get(other.inputs[0], other.inputs[0])
                        if len(other.inputs) == 1 and graph.size.get(source, (0, 0))[1] < graph.size.get(value, (0, 0))[1]:
                            value = source
                sizes.append(graph.size.get(value, (0, 0)))
            return sizes[0][0] + sizes[1][0], sizes[0][1] + sizes[1][1]
    return 0, 0


def _weights(unit: Unit, here, after: bool | None) -> Weights:  # type: ignore[no-untyped-def]
    mine = [p for p in unit.parameters if not p.buffer and _belongs(unit, p, here, after)]
    limits: dict[str, int] = {}
    for region in unit.regions:
        if not region.experts:
            limits |= {split.tensor: region.units for split in (*region.columns, *region.rows, *region.vectors)}
    for p in unit.parameters:
        if p.shared_with and p.name in limits:
            limits.setdefault(p.shared_with, limits[p.name])
    experts = unit.experts
    stacked = set(experts.stacked) if experts else set()
    modules = tuple(f"{name}." for name in experts.modules) if experts else ()
    whole = routed = frozen = 0
    cut: dict[int, int] = {}
    for p in mine:
        frozen += 0 if p.trainable else p.numel
        if p.name in stacked or (modules and p.name.startswith(modules)):
            routed += p.numel
        elif p.name in limits or p.shared_with in limits:
            units = limits.get(p.name) or limits[p.shared_with]
            cut[units] = cut.get(units, 0) + p.numel
        else:
            whole += p.numel
    return Weights(whole, tuple(sorted(cut.items())), routed, experts.experts if experts else 0, len(mine), frozen)


def _belongs(unit: Unit, p: ParameterRecord, here, after: bool | None) -> bool:  # type: ignore[no-untyped-def]
    """On which side of the blocks a parameter is read; by the module that reads it."""
    if after is None:
        return not p.shared_with
    module = p.name.rpartition(".")[0]
    readers = [op for op in unit.forward if op.module == module]
    if not readers:
        readers = [op for op in unit.forward if module and op.module.startswith(module)]
    return any(here(op) for op in readers) if readers else not after
