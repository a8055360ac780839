"""The drawings show every computation where it runs, and fit the width that they are given."""

import re
import xml.etree.ElementTree as ElementTree
from fractions import Fraction

import pytest

from meshwright.plan.schedule import build
from meshwright.plan.simulate import StageCost, simulate
from meshwright.report import timeline

SCHEDULES = [("1f1b", 4, 1, 8), ("zbv", 4, 2, 12), ("interleaved", 2, 3, 7), ("dualpipev", 2, 2, 4), ("layerwise", 3, 1, 1)]


@pytest.mark.parametrize("counts", SCHEDULES)
@pytest.mark.parametrize("width", [60, 120, 400])
def test_text_has_every_computation_in_order_and_fits(counts, width: int) -> None:
    schedule = build(*counts)
    simulation = simulate(schedule)
    lines = timeline.text(schedule, simulation, width).plain.splitlines()
    assert max(map(len, lines)) <= width
    name = len("rank 0 ")
    for rank in range(schedule.ranks):
        row = "".join(line[name:] for line in lines if line.startswith(f"rank {rank} "))
        labels = re.findall(r"[FBIWfbiw]\d*", row)
        expected = [f"{a.kind}{a.microbatch}" for a in schedule.computations(rank)]
        if all(label[1:] for label in labels):  # wide enough for the numbers
            assert [label.upper() for label in labels] == expected
        else:
            assert len(row) >= 100
            assert {label[0].upper() for label in labels} <= set("FBIW")


def test_idle_time_is_dotted_in_proportion() -> None:
    schedule = build("1f1b", 4, 1, 8)
    lines = timeline.text(schedule, simulate(schedule), 400).plain.splitlines()
    for line in lines:
        row = line.removeprefix(line[:7])
        assert row.count(".") / len(row) == pytest.approx(9 / 33)


def test_uneven_costs_draw_too() -> None:
    schedule = build("1f1b", 2, 1, 3)
    simulation = simulate(schedule, [StageCost(Fraction(1, 3), 0, Fraction(5, 2)), StageCost(1e-3, 2, 0)], transfer_s=0.1)
    assert timeline.text(schedule, simulation, 80).plain.count("rank 0")
    ElementTree.fromstring(timeline.svg(schedule, simulation))


@pytest.mark.parametrize("counts", SCHEDULES)
def test_svg_is_well_formed_and_has_a_box_for_every_computation(counts) -> None:
    schedule = build(*counts)
    root = ElementTree.fromstring(timeline.svg(schedule, simulate(schedule), "a <title> & more", width=900))
    space = "{http://www.w3.org/2000/svg}"
    boxes = root.findall(f"{space}g")
    assert len(boxes) == sum(len(schedule.computations(rank)) for rank in range(schedule.ranks))
    for box in boxes:
        rectangle = box.find(f"{space}rect")
        assert 0 <= float(rectangle.get("x")) <= float(rectangle.get("x")) + float(rectangle.get("width")) <= 900
    assert "a <title> & more" in [text.text for text in root.findall(f"{space}text")]
