"""What differs between two blueprints, in words: after a change of the model, the library or torch."""

from __future__ import annotations

from collections import Counter

from meshwright.blueprint.record import Blueprint, Unit
from meshwright.blueprint.show import amount


def differences(first: Blueprint, second: Blueprint, items: int = 1) -> list[str]:
    """One sentence per difference that matters to a plan; `[]` for equal blueprints. Amounts are for `items` items."""
    found: list[str] = []
    totals = [
        ("parameters", first.n_parameters, second.n_parameters, ""),
        ("bytes of parameters", first.parameter_bytes, second.parameter_bytes, "B"),
        ("forward", first.forward_flops(items), second.forward_flops(items), "FLOP"),
        ("backward", first.backward_flops(items), second.backward_flops(items), "FLOP"),
        ("saved for backward", first.saved_bytes(items), second.saved_bytes(items), "B"),
    ]
    found += [f"{what}: {_change(a, b, unit)}" for what, a, b, unit in totals if a != b]
    if first.sequence != second.sequence:
        found.append(f"sequence: {first.sequence} -> {second.sequence}")
    gone, new = set(first.blocks) - set(second.blocks), set(second.blocks) - set(first.blocks)
    found += [f"block {name} is gone" for name in sorted(gone)] + [f"block {name} is new" for name in sorted(new)]
    if len(first.kinds) != len(second.kinds):
        found.append(f"kinds of blocks: {len(first.kinds)} -> {len(second.kinds)}")
    for one, two in zip((*first.kinds, first.rest), (*second.kinds, second.rest), strict=False):
        found += _unit(one, two)
    if not found and first != second:
        found.append("only details of single ops differ")
    return found


def _unit(one: Unit, two: Unit) -> list[str]:
    where = one.instances[0] if one.instances else "outside the blocks"
    before, after = Counter(op.name for op in one.forward), Counter(op.name for op in two.forward)
    found = []
    for name in sorted((before - after) | (after - before)):
        found.append(f"{where}: {name} {before[name]} -> {after[name]} times in forward")
    regions = {(r.units, r.columns, r.rows) for r in one.regions}, {(r.units, r.columns, r.rows) for r in two.regions}
    if regions[0] != regions[1]:
        found.append(f"{where}: what can be split differs ({len(one.regions)} -> {len(two.regions)} regions)")
    return found


def _change(a: int, b: int, unit: str) -> str:
    share = f" ({b / a - 1:+.2%})" if a else ""
    return f"{amount(a, unit)} -> {amount(b, unit)}{share}"
