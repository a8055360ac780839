"""Draws a simulated pipeline step: a row per rank, time to the right, for the terminal or as an SVG file.

Forwards, backwards, input gradients and weight gradients have their letters (F, B, I, W) and colours; idle time is dotted. A
rank with several stages shows the later ones brighter (terminal; lower case for every other one) or darker (SVG). Nothing is
computed here.
"""

from __future__ import annotations

from html import escape

from rich.style import Style
from rich.text import Text

from meshwright.plan.schedule import Schedule
from meshwright.plan.simulate import Simulation, Span

_COLOURS = {"F": (86, 141, 219), "B": (93, 176, 108), "I": (74, 178, 178), "W": (226, 173, 76)}
_ROW, _GAP, _LEFT, _TOP = 26, 6, 62, 34
_LEAST_WIDTH = 40
_MOST_BLOCKS = 4


def text(schedule: Schedule, simulation: Simulation, width: int = 100) -> Text:
    """Return the step as lines of at most `width` columns, with colours for a terminal that has them.

    A step that is too long for one line goes on in a further block of lines, if four blocks are enough; else it is squeezed.
    """
    name = len(str(schedule.ranks - 1)) + 6
    room = max(_LEAST_WIDTH, width - name)
    spans = [span for span in simulation.spans if span.end_s > span.start_s]
    legible = max(len(_label(schedule, span)) / float(span.end_s - span.start_s) for span in spans)
    columns = min(round(legible * float(simulation.step_s)), _MOST_BLOCKS * room)
    rows = [_row(schedule, simulation, rank, columns) for rank in range(schedule.ranks)]
    drawing = Text(no_wrap=True)
    for first in range(0, columns, room):
        if first:
            drawing.append("\n")
        for rank, row in enumerate(rows):
            drawing.append(f"rank {rank}".ljust(name))
            drawing.append_text(row[first : first + room])
            drawing.append("\n")
    return drawing


def _row(schedule: Schedule, simulation: Simulation, rank: int, columns: int) -> Text:
    scale = columns / float(simulation.step_s)
    row = Text()
    for span in (span for span in simulation.spans if span.rank == rank):
        first, last = round(float(span.start_s) * scale), round(float(span.end_s) * scale)
        row.append("." * (first - len(row)), Style(dim=True))
        row.append(_fitted(_label(schedule, span), last - first), Style(color="black", bgcolor=_terminal_colour(schedule, span)))
    row.append("." * (columns - len(row)), Style(dim=True))
    return row


def svg(schedule: Schedule, simulation: Simulation, title: str = "", width: int = 1200) -> str:
    """Return the step as one self-contained SVG document of `width` pixels."""
    step = float(simulation.step_s)
    scale = (width - _LEFT - 10) / step
    height = _TOP + schedule.ranks * (_ROW + _GAP) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="10" y="20" font-size="14" fill="#222222">{escape(title)}</text>',
    ]
    for rank in range(schedule.ranks):
        y = _TOP + rank * (_ROW + _GAP)
        parts.append(f'<text x="10" y="{y + 17}" fill="#222222">rank {rank}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{step * scale:.2f}" height="{_ROW}" fill="#eeeeee"/>')
    parts += [_box(schedule, span, scale) for span in simulation.spans]
    used = [kind for kind in "FBIW" if any(span.action.kind == kind for span in simulation.spans)]
    words = {"F": "forward", "B": "backward", "I": "input gradients", "W": "weight gradients"}
    for number, kind in enumerate(used):
        x, y = _LEFT + 130 * number, height - 22
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" fill="{_hex(_COLOURS[kind])}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 11}" fill="#222222">{words[kind]}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _box(schedule: Schedule, span: Span, scale: float) -> str:
    x, wide = _LEFT + float(span.start_s) * scale, float(span.end_s - span.start_s) * scale
    y = _TOP + span.rank * (_ROW + _GAP)
    loop = _loop(schedule, span)
    colour = _hex(tuple(round(part * 0.82**loop) for part in _COLOURS[span.action.kind]))
    words = f"stage {span.action.stage}, {span.action}, {float(span.start_s):.6g} s to {float(span.end_s):.6g} s"
    box = (
        f'<g><title>{words}</title><rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{_ROW}" fill="{colour}" stroke="#ffffff" '
        'stroke-width="0.7"/>'
    )
    label = str(span.action.microbatch)
    if wide >= 7 * len(label):
        box += f'<text x="{x + wide / 2:.2f}" y="{y + 17}" text-anchor="middle" fill="#ffffff">{label}</text>'
    return box + "</g>"


def _label(schedule: Schedule, span: Span) -> str:
    """Kind and micro-batch; lower case for every other stage of a rank, for those who see no colours."""
    kind = span.action.kind
    return f"{kind.lower() if _loop(schedule, span) % 2 else kind}{span.action.microbatch}"


def _fitted(label: str, columns: int) -> str:
    """The label if it fits, the kind alone if only that does, drawn out to the span's width."""
    shown = next((word for word in (label, label[:1]) if len(word) <= columns), "")
    return shown.ljust(columns, "-")


def _loop(schedule: Schedule, span: Span) -> int:
    return schedule.stages_of(span.rank).index(span.action.stage)


def _terminal_colour(schedule: Schedule, span: Span) -> str:
    loop = _loop(schedule, span)
    red, green, blue = (round(part + (255 - part) * (1 - 0.7**loop)) for part in _COLOURS[span.action.kind])
    return f"rgb({red},{green},{blue})"


def _hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour)
