"""Which modules are the blocks: the outermost repeated units of a model, told from its structure alone.

Nothing runs here: the parameters may be on meta, sharded or materialised, and the answer takes milliseconds. Execution
order, what flows between blocks, and modules that are called several times are left to `chains.py`, which works on a
capture. Attribute names are compared with each other (numbered siblings such as `down1`, `down2` declare a sequence)
but never with a known word.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Leaves of torch.nn that are as large as a layer; other torch.nn leaves (Linear, LayerNorm, ...) are parts of one.
_LARGE_LEAVES = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Transformer)


def block_names(module: nn.Module) -> list[str]:
    """Names of the modules that are the repeated units of `module`, in registration order; `[]` if nothing repeats.

    A block is an element of a list of modules of one class (or of numbered or equally shaped sibling attributes) that
    owns parameters. The outermost repetition wins (a transformer layer, not the experts in it) except that stages,
    whose shapes all differ and which hold a list of units themselves, are looked into. No block lies inside another.
    Where only single `torch.nn` layers repeat (a plain MLP), those are the blocks; embedding tables are not, since they
    can't follow one another.
    """
    tree = _Tree(module)
    found = tree.blocks(module, "", repeated=False)
    if not found:
        found = tree.leaf_layers(module)
    return found


def structures(module: nn.Module) -> dict[int, int]:
    """For every module under `module`, by its `id`, a number that is equal for equal structures (class, names and
    shapes).
    """
    tree = _Tree(module)
    return {number: shape.exact for number, shape in tree.shapes.items()}


@dataclass(frozen=True)
class _Shape:
    """A module's structure: `kind` ignores shapes, `exact` has them; equal integers mean equal structures."""

    kind: int
    exact: int
    owns: bool  # any parameter in the subtree
    matrices: int  # parameters with two or more dims in the subtree
    unit: bool  # large enough to be a block: children with parameters, or a leaf that is more than one torch.nn layer


class _Tree:
    """Structures of every module under a root, numbered once so that comparing two subtrees is comparing two integers."""

    def __init__(self, root: nn.Module) -> None:
        self._numbers: dict[Hashable, int] = {}
        self.shapes: dict[int, _Shape] = {}
        self._holding: dict[int, bool] = {}
        self._measure(root)

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def shape(self, module: nn.Module) -> _Shape:
        return self.shapes[id(module)]

    def _measure(self, module: nn.Module) -> _Shape:
        known = self.shapes.get(id(module))
        if known is not None:
            return known
        children = [(name, self._measure(child)) for name, child in _children(module)]
        own: tuple[tuple[Any, ...], ...] = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        if is_parametrized(module):  # a weight and what it is made from count as one
            made = module.parametrizations.items()  # type: ignore[union-attr, operator]
            own += tuple((name, *(tuple(p.shape) for p in parts.parameters())) for name, parts in made)
        buffers = tuple((name, tuple(b.shape)) for name, b in module.named_buffers(recurse=False))
        is_container = isinstance(module, _CONTAINERS)
        # A container says nothing by its class: what it holds tells one Sequential from another.
        cls = type_before_parametrizations(module)  # a parametrized module has a class of its own
        kind = self._number((cls, tuple(shape.kind for _, shape in children) if is_container else ()))
        exact = self._number((cls, own, buffers, tuple((name, shape.exact) for name, shape in children)))
        owns = bool(own) or any(shape.owns for _, shape in children)
        own_matrices = sum(any(len(size) >= 2 for size in sizes) for _, *sizes in own)
        is_torch_leaf = cls.__module__.startswith("torch.nn.modules") and not isinstance(module, _LARGE_LEAVES)
        unit = any(shape.owns for _, shape in children) or (own_matrices > 0 and not is_torch_leaf)
        matrices = own_matrices + sum(shape.matrices for _, shape in children)
        shape = _Shape(kind, exact, owns, matrices, unit and owns)
        self.shapes[id(module)] = shape
        return shape

    def _is_stage_list(self, module: nn.Module) -> bool:
        """A container that only strings units together, as opposed to a Sequential of single layers that is a unit
        itself.
        """
        owning = [child for _, child in _children(module) if self.shape(child).owns]
        strings_units = bool(owning) and all(self.shape(child).unit for child in owning)
        # Of single layers with their norms (one matrix each) a unit is made, not a stage.
        return isinstance(module, _CONTAINERS) and strings_units and any(self.shape(c).matrices > 1 for c in owning)

    def blocks(self, module: nn.Module, prefix: str, repeated: bool) -> list[str]:
        """Blocks under `module`; `repeated` says that its siblings repeat it, so that a list of one is a chain as well."""
        children = [(name, child) for name, child in _children(module) if self.shape(child).owns]
        if isinstance(module, _CONTAINERS):
            members = self._list_members(module, children, repeated)
        else:
            members = self._attribute_members(children)
        stages = self._stages([child for name, child in children if name in members])
        found: list[str] = []
        for name, child in children:
            path = f"{prefix}{name}"
            if name not in members:
                found += self.blocks(child, f"{path}.", repeated)
            elif id(child) in stages or isinstance(child, nn.ModuleList | nn.ModuleDict):  # these can't be called
                inside = self.blocks(child, f"{path}.", True)
                found += inside or ([] if isinstance(child, nn.ModuleList | nn.ModuleDict) else [path])
            else:
                found.append(path)
        return found

    def _holds_blocks(self, module: nn.Module) -> bool:
        """Whether a repetition lies inside; remembered by structure, since every level of the tree asks about all below
        it.
        """
        exact = self.shape(module).exact
        if exact not in self._holding:
            inside = self.blocks(module, "", repeated=False)
            self._holding[exact] = any(self.shape(module.get_submodule(name)).matrices > 1 for name in inside)
        return self._holding[exact]

    def _list_members(self, module: nn.Module, children: list[tuple[str, nn.Module]], repeated: bool) -> set[str]:
        """Elements of a list that are repeated units. A Sequential may begin and end with something else; a ModuleList
        may not.
        """
        units = [(name, child, self.shape(child).kind) for name, child in children if self.shape(child).unit]
        units = [unit for unit in units if not self._is_stage_list(unit[1])] or units
        counts = Counter(kind for _, _, kind in units)
        if repeated and len(units) == len(children):
            return {name for name, _, _ in units}
        if not units or max(counts.values()) < 2:
            return set()
        if not isinstance(module, nn.Sequential) and len(units) == len(children):
            return {name for name, _, _ in units}
        adjacent = [i for i in range(1, len(units)) if units[i][2] == units[i - 1][2]]
        if not adjacent:
            return {name for name, _, kind in units if counts[kind] > 1}
        inside = {kind for _, _, kind in units[adjacent[0] - 1 : adjacent[-1] + 1]}
        return {name for name, _, kind in units if kind in inside}

    def _attribute_members(self, children: list[tuple[str, nn.Module]]) -> set[str]:
        """Attributes that repeat: numbered names of one class, or equal structures that hold no repetition themselves."""
        numbered: dict[Hashable, list[str]] = defaultdict(list)
        equal: dict[Hashable, list[str]] = defaultdict(list)
        for name, child in children:
            shape = self.shape(child)
            if not any(self.shape(grandchild).owns for _, grandchild in _children(child)):
                continue  # a leaf is a part of something, unless a list says otherwise
            stem = re.sub(r"\d+", "#", name)
            if stem != name:
                numbered[stem, shape.kind if not isinstance(child, _CONTAINERS) else "container"].append(name)
            if not self._holds_blocks(child):
                equal[shape.exact].append(name)
        families = [*numbered.values(), *equal.values()]
        return {name for family in families if len(family) >= 2 for name in family}

    def _stages(self, members: list[nn.Module]) -> set[int]:
        """Members to look into: lists of units, and families that differ in every shape and hold repeated units
        themselves.
        """
        stages = {id(child) for child in members if self._is_stage_list(child)}
        families: dict[int, list[nn.Module]] = defaultdict(list)
        for child in members:
            families[self.shape(child).kind].append(child)
        for family in families.values():
            all_differ = len({self.shape(child).exact for child in family}) == len(family)
            if all_differ and any(self._holds_blocks(child) for child in family):
                stages |= {id(child) for child in family}
        return stages

    def leaf_layers(self, module: nn.Module) -> list[str]:
        """Single layers with a weight matrix that repeat in one list: what a plain MLP or a VGG consists of."""
        found: list[str] = []
        for name, parent in module.named_modules():
            # A list inside a module that has other weights too is a part of that module, not a chain of its own.
            above = [module.get_submodule(path) for path in _ancestors(name)]
            if not all(isinstance(place, _CONTAINERS) for place in (parent, *above)):
                continue
            layers = [(key, child) for key, child in parent.named_children() if self._is_weight_layer(child)]
            counts = Counter(type_before_parametrizations(child) for _, child in layers)
            found += [f"{name}.{key}".lstrip(".") for key, child in layers if counts[type_before_parametrizations(child)] >= 2]
        return found

    def _is_weight_layer(self, module: nn.Module) -> bool:
        inside = sum(self.shape(child).matrices for _, child in _children(module))
        return self.shape(module).matrices > inside and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A module's children, but for the one in which torch keeps what its weights are made from (a weight norm): that is its own."""
    kept = module.parametrizations if is_parametrized(module) else None
    return [(name, child) for name, child in module.named_children() if child is not kept]


def _ancestors(name: str) -> list[str]:
    """Paths between the root and a module, both excluded: `a` and `a.b` for `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
