"""A Blueprint for people: a tree of blocks with parameters, FLOPs, saved bytes and what can be split, in plain text.

Amounts are for one item of a micro-batch unless a heading says otherwise. The same figures go to programs with
`--json`.
"""

from __future__ import annotations

from collections import Counter

from meshwright.blueprint.record import Blueprint, Boundary, Op, Region, Unit


def amount(value: float, unit: str = "") -> str:
    """A number with three digits and a decimal prefix: `1.24 G`, `512 B`."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}".rstrip()
    return f"{value:.3g} {unit}".rstrip()


def show(blueprint: Blueprint, items: int = 1) -> str:
    """The whole blueprint as text, amounts for a micro-batch of `items`."""
    lines = _head(blueprint, items)
    if blueprint.captured:
        lines += _tree(blueprint, items)
        for number, unit in enumerate(blueprint.kinds):
            lines += ["", *_unit(f"kind {_letter(number)}: {unit.class_name}", unit, items)]
        lines += ["", *_unit("outside the blocks", blueprint.rest, items)]
        lines += _cuts(blueprint, items)
    else:
        lines += [f"  {len(unit.instances)} x {unit.class_name}: {_span(unit.instances)}" for unit in blueprint.kinds]
    return "\n".join([*lines, *(f"note: {note}" for note in blueprint.notes)])


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"#{number + 1}"


def _head(blueprint: Blueprint, items: int) -> list[str]:
    name = blueprint.model
    kind = f" ({blueprint.class_name})" if blueprint.class_name != name else ""
    kernels = f", {blueprint.device} kernels" if blueprint.device != "cpu" else ""
    lines = [f"{name}{kind}, {blueprint.dtype}{kernels}"]
    lines.append(
        f"  {amount(blueprint.n_parameters)} parameters, {amount(blueprint.parameter_bytes, 'B')}; "
        f"{len(blueprint.calls)} block calls of {len(blueprint.kinds)} kinds"
    )
    if blueprint.captured:
        ids = ", ".join(f"[{', '.join(str(size.at(items)) for size in t.shape)}] {t.dtype}" for t in blueprint.batch)
        lines.append(f"  for {items} item{'s' if items != 1 else ''} ({ids}):")
        forward, backward = blueprint.forward_flops(items), blueprint.backward_flops(items)
        saved = amount(blueprint.saved_bytes(items), "B")
        lines.append(f"  {amount(forward, 'FLOP')} forward, {amount(backward, 'FLOP')} backward, {saved} saved for backward")
    return lines


def _tree(blueprint: Blueprint, items: int) -> list[str]:
    """Chains with runs of equal blocks, in the order in which they run."""
    rest = blueprint.rest
    lines = ["", f"{'':46}{'parameters':>12}{'forward':>14}{'backward':>14}{'saved':>11}"]
    for chain in blueprint.chains:
        lines.append(f"{chain.name or '(root)'}")
        start = chain.start
        while start < chain.stop:
            kind = blueprint.calls[start].kind
            stop = start
            while stop < chain.stop and blueprint.calls[stop].kind == kind:
                stop += 1
            unit, names = blueprint.kinds[kind], tuple(call.name for call in blueprint.calls[start:stop])
            label = f"  {stop - start:>3} x {_letter(kind)} {unit.class_name} {_span(names, chain.name)}"
            lines.append(_row(label, unit, items))
            start = stop
    lines.append(_row("outside the blocks", rest, items))
    return lines


def _row(label: str, unit: Unit, items: int) -> str:
    forward, backward = unit.forward_flops.at(items), unit.backward_flops.at(items)
    saved = amount(unit.activation_bytes.at(items), "B")
    work = f"{amount(forward, 'FLOP'):>14}{amount(backward, 'FLOP'):>14}"
    return f"{label:46}{amount(unit.n_parameters):>12}{work}{saved:>11}"


def _span(names: tuple[str, ...], parent: str = "") -> str:
    """`0..31` for consecutive numbers under one parent, else the first and the last name."""
    short = [name.removeprefix(f"{parent}.") for name in dict.fromkeys(names)]
    if len(short) == 1:
        return short[0]
    return f"{short[0]}..{short[-1]}"


def _unit(title: str, unit: Unit, items: int) -> list[str]:
    lines = [title]
    flops: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for op in (*unit.forward, *unit.backward):
        flops[op.kind] += op.flops.at(items)
        moved[op.kind] += (op.read_bytes + op.written_bytes).at(items)
        calls[op.kind] += 1
    for kind, _ in sorted(moved.items(), key=lambda item: -item[1]):
        if moved[kind]:
            done = f", {amount(flops[kind], 'FLOP')}" if flops[kind] else ""
            lines.append(f"  {kind:12} {calls[kind]:>5} ops, {amount(moved[kind], 'B')} moved{done}")
    roles: Counter[str] = Counter()
    for saved in unit.saved:
        roles["its own output" if saved.output else saved.role] += saved.bytes.at(items)
    if roles:
        lines.append("  saved: " + ", ".join(f"{amount(size, 'B')} {role}" for role, size in roles.most_common()))
    if unit.experts is not None:
        where = f"{len(unit.experts.stacked)} stacked weights" if unit.experts.stacked else "one module each"
        lines.append(f"  routing: {unit.experts.choices} of {unit.experts.experts} experts per token, {where}")
    alone = [op for op in unit.forward if op.mixes_sequence]
    if alone:
        lines.append(f"  positions meet in: {', '.join(dict.fromkeys(_short(op) for op in alone))}")
    shown = unit.regions[:6]
    lines += [f"  {_region(region, items)}" for region in shown]
    if len(unit.regions) > len(shown):
        lines.append(f"  ... and {len(unit.regions) - len(shown)} more regions")
    lines += [f"  whole: {_weight(name)} ({reason})" for name, reason in unit.whole[:6]]
    return lines


def _short(op: Op) -> str:
    return op.name.removeprefix("aten.").partition(".")[0].strip("_")


def _region(region: Region, items: int) -> str:
    what = "attention" if region.attention else "experts" if region.experts else region.kind
    columns = ", ".join(_weight(split.tensor) for split in region.columns)
    rows = ", ".join(_weight(split.tensor) for split in region.rows)
    path = " -> ".join(part for part in (columns, rows) if part)
    ends = f"all-reduce {amount(region.reduced_bytes.at(items), 'B')}" if region.reduced else "stays split"
    return f"split {what} up to {region.units} ways: {path}; {ends}"


def _weight(name: str) -> str:
    return name.removesuffix(".weight")


def _cuts(blueprint: Blueprint, items: int) -> list[str]:
    """What crosses where a pipeline may be cut: the smallest and the largest cut."""

    def sent(boundary: Boundary) -> int:
        tensors = (*boundary.flows, *(t for t in boundary.alive if not t.recomputable))
        return sum(tensor.bytes.at(items) for tensor in tensors)

    sizes = [sent(boundary) for boundary in blueprint.boundaries]
    if not sizes:
        return []
    if min(sizes) == max(sizes):
        return ["", f"a pipeline cut sends {amount(sizes[0], 'B')} after any block"]
    place = sizes.index(max(sizes))
    most = f"{amount(sizes[place], 'B')} (after {blueprint.calls[place].name})"
    return ["", f"a pipeline cut sends from {amount(min(sizes), 'B')} to {most}"]
