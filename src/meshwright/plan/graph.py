"""Which ops of a captured unit run as one kernel, how large every value is, and what backward needs to keep.

Three ways of running a unit are told apart. `eager`: one kernel per op, as captured. `fused`: the single kernels of Megatron-,
Transformer-Engine- or Liger-like stacks (activation, rotary, dropout-and-add, softmax with scale and mask, loss; norms stay alone).
`compiled`: what `torch.compile` fuses, norms with their neighbours. A group never crosses a matrix product, so it can always be
scheduled. Sizes are `(fixed, per item)` pairs; what a second costs is left to `profile.py` and `time.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.blueprint.record import Op, Saved, Unit

Size = tuple[int, int]

_ALIASES = {"_unsafe_view", "_reshape_alias"}
_FUSIBLE = {"elementwise", "reduction", "copy", "norm"}


@dataclass(eq=False)
class Kernel:
    """Ops that run as one; `moved` are the bytes read and written, `launches` 0 for views, `ops` indices into the unit's ops."""

    ops: list[int]
    moved: Size
    launches: int = 1


@dataclass(eq=False)
class Graph:
    """A unit's ops in run order (forward, then backward), its kernels, and the size of every value by its storage's root."""

    ops: tuple[Op, ...]
    n_forward: int
    kernels: list[Kernel]
    root: dict[int, int]
    size: dict[int, Size]
    outer: set[int] = field(default_factory=set)
    """Gradients that come from outside: read in the backward, made and read nowhere before."""
    inside: set[int] = field(default_factory=set)
    """Values that live only inside a kernel: never in memory."""
    cut: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Degree limits of the region in which a value is cut; absent for values that are whole."""


def is_view(op: Op) -> bool:
    """Whether the op moves nothing on a device."""
    return op.kind == "view" or op.name.split(".")[1] in _ALIASES


def build(unit: Unit, mode: str) -> Graph:
    """Group the ops of a unit into kernels for `mode` (`eager`, `fused` or `compiled`)."""
    ops = (*unit.forward, *unit.backward)
    root, size = _values(ops, mode)
    groups = _groups(ops, len(unit.forward), root, mode)
    graph = Graph(ops, len(unit.forward), [], root, size)
    made = {value for op in ops for value in op.outputs} | {value for op in unit.forward for value in op.inputs}
    graph.outer = {root[value] for op in unit.backward for value in op.inputs if value not in made}
    _cuts(graph, unit)
    users: dict[int, set[int]] = {}
    for index, op in enumerate(ops):
        for value in op.inputs:
            users.setdefault(root.get(value, value), set()).add(index)
    kept = _needed_later(unit, graph)
    for members in groups:
        graph.kernels.append(_kernel(graph, members, users, kept, mode))
    return graph


def _values(ops: tuple[Op, ...], mode: str) -> tuple[dict[int, int], dict[int, Size]]:
    """The storage root of every value (a view has its input's) and every root's bytes, as far as they can be told."""
    root: dict[int, int] = {}
    size: dict[int, Size] = {}
    producer: dict[int, Op] = {}
    for op in ops:
        inputs = [root.setdefault(value, value) for value in op.inputs]
        # Fused stacks take fewer key heads than query heads, and attention's result as it lies.
        expands = mode == "fused" and op.name.startswith("aten.clone") and _beside_attention(op, producer, root)
        in_place = mode == "eager" and op.name.split(".")[1].endswith("_")  # one storage under another number
        if (is_view(op) or expands or in_place) and inputs:
            for value in op.outputs:
                root[value] = inputs[0]
            continue
        producer |= dict.fromkeys(op.outputs, op)
        for place, value in enumerate(op.outputs):
            root[value] = value
            written = (op.written_bytes.fixed, op.written_bytes.per_item)
            equal = op.kind == "attention" and op.forward_op >= 0  # the gradients of query, key and value
            if equal:
                written = (written[0] // len(op.outputs), written[1] // len(op.outputs))
            size[value] = written if place == 0 or equal else (0, 0)
    for op in ops:
        unknown = [root[value] for value in dict.fromkeys(op.inputs) if root[value] not in size]
        if unknown and not is_view(op):
            known = [size[root[value]] for value in dict.fromkeys(op.inputs) if root[value] in size]
            left = (op.read_bytes.fixed - sum(k[0] for k in known), op.read_bytes.per_item - sum(k[1] for k in known))
            for value in unknown:
                size[value] = (max(0, left[0]) // len(unknown), max(0, left[1]) // len(unknown))
    return root, size


def _beside_attention(op: Op, producer: dict[int, Op], root: dict[int, int]) -> bool:
    before = producer.get(root.get(op.inputs[0], -1))
    return op.written_bytes.per_item > op.read_bytes.per_item or (before is not None and before.kind == "attention")


def _groups(ops: tuple[Op, ...], n_forward: int, root: dict[int, int], mode: str) -> list[list[int]]:
    """Indices of ops by kernel, in run order of their first op."""
    producer: dict[int, int] = {}
    level: list[int] = []
    parent = list(range(len(ops)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for index, op in enumerate(ops):
        before = [producer[root[value]] for value in op.inputs if root.get(value) in producer]
        fusible = _fusible(op, mode)
        height = max((level[p] + (0 if fusible and _fusible(ops[p], mode) else 1) for p in before), default=0)
        if mode != "eager" and index >= n_forward:
            height = max(height, 1 + max(level[:n_forward], default=0))  # nothing is shared between the two passes
        level.append(height)
        if fusible and mode != "eager":
            for p in before:
                if _joins(ops[p], op, mode) and level[p] == height and (p >= n_forward) == (index >= n_forward):
                    parent[find(index)] = find(p)
        if not is_view(op):
            producer |= {root[value]: index for value in op.outputs if root[value] == value}
    groups: dict[int, list[int]] = {}
    for index, op in enumerate(ops):
        if not is_view(op):
            groups.setdefault(find(index), []).append(index)
    return sorted(groups.values(), key=lambda members: members[0])


def _fusible(op: Op, mode: str) -> bool:
    return op.kind in _FUSIBLE and not is_view(op) and not (mode == "fused" and op.kind == "norm")


def _joins(before: Op, op: Op, mode: str) -> bool:
    """Whether a kernel goes on with `op`: hand-written stacks start a new one at a dropout, which keeps its mask."""
    return _fusible(before, mode) and not (mode == "fused" and op.name.startswith("aten.native_dropout"))


def _needed_later(unit: Unit, graph: Graph) -> set[int]:
    """Roots that must be in memory: what the unit returns and what products, norms or attention keep for their backward."""
    kept: set[int] = set()
    for saved in unit.saved:
        if saved.producer < 0:
            continue
        drawn = unit.forward[saved.producer].name.startswith(("aten.native_dropout", "aten.bernoulli"))
        if drawn or any(not _fusible(unit.forward[s], "compiled") for s in saved.savers if s >= 0):
            kept.add(saved_root(unit, graph, saved))
    return kept


def saved_root(unit: Unit, graph: Graph, saved: Saved) -> int:
    """The value that a saved storage is: of its producer's results the one of its size (an attention or a norm has several)."""
    if saved.producer < 0:
        return -1
    op = unit.forward[saved.producer]
    main = graph.size.get(graph.root.get(op.outputs[0], -1), (0, 0))
    small = saved.bytes.per_item < 0.6 * main[1] if main[1] else saved.bytes.per_item == 0
    return graph.root.get(op.outputs[1 if len(op.outputs) > 1 and small else 0], -1)


def _kernel(graph: Graph, members: list[int], users: dict[int, set[int]], kept: set[int], mode: str) -> Kernel:
    """One kernel: eager counts what its op was captured to move, a group what crosses its border."""
    ops, root, size = graph.ops, graph.root, graph.size
    if len(members) == 1 or mode == "eager":
        op = ops[members[0]]
        return Kernel(members, (op.read_bytes.fixed + op.written_bytes.fixed, op.read_bytes.per_item + op.written_bytes.per_item))
    inner = set(members)
    made = {root[value] for index in members for value in ops[index].outputs}
    read = {root[value] for index in members for value in ops[index].inputs} - made
    written = set()
    for value in made:
        outside = users.get(value, set()) - inner
        same_pass = {u for u in outside if (u >= graph.n_forward) == (members[0] >= graph.n_forward)}
        if same_pass or value in kept or not users.get(value):
            written.add(value)
        else:
            graph.inside.add(value)
    moved = [sum(size.get(value, (0, 0))[place] for value in read | written) for place in (0, 1)]
    return Kernel(members, (moved[0], moved[1]))


def _cuts(graph: Graph, unit: Unit) -> None:
    """Mark every value that tensor parallelism divides with its region's limit; logits stay cut up to the loss."""
    open_ended = {index for index, region in enumerate(unit.regions) if region.open_ended}
    for index, op in enumerate(graph.ops):
        region = op.region
        if region < 0 and op.kind in _FUSIBLE:  # the loss on logits that are still cut
            seen = [graph.cut[graph.root[v]] for v in op.inputs if graph.root.get(v) in graph.cut]
            follows = [cut for cut in seen if cut[1] in open_ended]
            if follows and max(op.read_bytes.per_item, op.written_bytes.per_item) > 0:
                for value in op.outputs:
                    graph.cut.setdefault(graph.root[value], follows[0])
            continue
        if region < 0:
            continue
        reduced = index < graph.n_forward and index in unit.regions[region].reduced
        whole_gradient = index >= graph.n_forward and op.kind == "matmul" and _leaves(op, unit)
        if not reduced and not whole_gradient:
            for value in op.outputs:
                graph.cut.setdefault(graph.root[value], (unit.regions[region].units, region))


def _leaves(op: Op, unit: Unit) -> bool:
    """Whether a backward product is the gradient of a region's input: whole, after the all-reduce."""
    forward = unit.forward[op.forward_op] if op.forward_op >= 0 else None
    if forward is None or forward.matmul is None or op.matmul is None:
        return False
    m, n, k = (forward.matmul[place] for place in (1, 2, 3))
    enters = op.forward_op not in unit.regions[op.region].reduced
    return enters and op.matmul[1] == m and op.matmul[2] == k and op.matmul[3] == n and not _weight_like(op)


def _weight_like(op: Op) -> bool:
    return op.written_bytes.per_item == 0
