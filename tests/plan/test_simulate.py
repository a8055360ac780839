"""The simulator's bubble equals the closed forms exactly, and its memory what the papers say is in flight."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.schedule import Schedule, build
from meshwright.plan.simulate import StageCost, simulate

parts = st.fractions(Fraction(1, 20), 9, max_denominator=20)
cost = st.builds(StageCost, parts, parts, parts)


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 8), st.integers(1, 20), cost)
def test_gpipe_and_1f1b_have_the_textbook_bubble(name: str, ranks: int, m: int, each: StageCost) -> None:
    assert simulate(build(name, ranks, 1, m), each).bubble_fraction == Fraction(ranks - 1, m + ranks - 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 20), cost)
def test_interleaved_has_the_textbook_bubble_also_where_m_does_not_divide(
    ranks: int, virtual: int, more: int, each: StageCost
) -> None:
    m = ranks + more
    assert simulate(build("interleaved", ranks, virtual, m), each).bubble_fraction == Fraction(ranks - 1, virtual * m + ranks - 1)


def test_whole_numbers_give_the_closed_form_to_the_last_bit() -> None:
    for m in range(1, 30):
        assert simulate(build("1f1b", 4, 1, m)).bubble_fraction == 3 / (m + 3)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("m", [16, 19, 32])
def test_zero_bubble_schedules_have_the_bubbles_of_their_papers(ranks: int, m: int) -> None:
    """ZB-H1: (P - 1)(F + I - W) idle seconds (arXiv:2401.10241); ZB-V and DualPipeV in unit time: less than 1F1B's over three."""
    each = StageCost(Fraction(4), Fraction(5), Fraction(3))
    zero_bubble = simulate(build("zero_bubble", ranks, 1, m), each)
    assert zero_bubble.step_s == m * 12 + (ranks - 1) * (4 + 5 - 3)
    for name in ("zbv", "dualpipev"):
        unit = simulate(build(name, ranks, 2, m))
        assert unit.step_s <= m * 6 + (ranks - 1)
    assert simulate(build("zbv", 2, 2, 16)).bubble_fraction <= Fraction(1, 97)


def test_layerwise_uses_one_rank_at_a_time() -> None:
    assert simulate(build("layerwise", 4)).bubble_fraction == 3 / 4


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 20))
def test_micro_batches_in_flight(ranks: int, m: int) -> None:
    """GPipe keeps all m, 1F1B min(m, P - rank) (arXiv:2104.04473), interleaved what its warm-up and one more make."""
    saved = StageCost(saved_bytes=10)
    assert simulate(build("gpipe", ranks, 1, m), saved).peak_bytes == (10 * m,) * ranks
    assert simulate(build("1f1b", ranks, 1, m), saved).peak_bytes == tuple(10 * min(m, ranks - rank) for rank in range(ranks))
    expected = tuple(10 * min(2 * ranks * m, ranks + 2 * (ranks - 1 - rank) + 1) for rank in range(ranks))
    whole_rounds = build("interleaved", ranks, 2, ranks * m)
    assert simulate(whole_rounds, saved).rank_peak_bytes == expected


def test_held_bytes_stay_from_input_gradient_to_weight_gradient() -> None:
    row = "0F0 0F1 0I0 0I1 0W0 0W1"
    from meshwright.plan.schedule import Action

    schedule = Schedule("mine", 1, 1, 2, (0,), (), (), (tuple(map(Action.parse, row.split())),))
    assert simulate(schedule, StageCost(saved_bytes=10, held_bytes=4)).peak_bytes == (20,)
    assert simulate(schedule, StageCost(saved_bytes=10, held_bytes=15)).peak_bytes == (30,)
    assert simulate(schedule, StageCost(saved_bytes=10)).peak_bytes == (20,)


def test_unequal_stages_wait_for_the_slowest() -> None:
    """Two stages, the second three times as slow: by hand, the last stage starts after one F and never waits again."""
    slow = [StageCost(1, 1, 1), StageCost(3, 3, 3)]
    simulation = simulate(build("1f1b", 2, 1, 4), slow)
    assert simulation.step_s == 1 + 4 * 9 + 2
    assert simulation.busy_s == (12, 36)
    assert simulation.bubble_fraction == 30 / 78


def test_transfers_delay_their_readers_and_share_their_link() -> None:
    """GPipe on two ranks, messages of 5 s on one link each way: forwards arrive at 6, 11, 16, gradients follow in turn."""
    simulation = simulate(build("gpipe", 2, 1, 3), StageCost(1, 1, 1), transfer_s=5)
    starts = {str(span.action): span.start_s for span in simulation.spans}
    assert [starts[f"1F{m}"] for m in range(3)] == [6, 11, 16]
    assert [starts[f"1B{m}"] for m in range(3)] == [17, 19, 21]
    assert [starts[f"0B{m}"] for m in range(3)] == [24, 29, 34]
    assert simulation.step_s == 36
    assert simulate(build("gpipe", 2, 1, 3), StageCost(1, 1, 1), transfer_s={(0, 1): 5}).step_s == 36


def test_an_edge_that_jumps_over_stages_is_waited_for() -> None:
    schedule = build("gpipe", 3, 1, 1, ((0, 1), (0, 2), (1, 2)))
    late = simulate(schedule, StageCost(1, 1, 1), {(0, 1): 0, (1, 2): 0, (0, 2): 10})
    starts = {str(span.action): span.start_s for span in late.spans}
    assert starts["2F0"] == 11
    assert starts["0B0"] == 11 + 1 + 2 + 10


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"]), st.integers(1, 4), st.integers(1, 9), st.data())
def test_bounds_hold_for_any_costs(name: str, ranks: int, m: int, data) -> None:
    virtual = {"interleaved": 2, "zbv": 2}.get(name, 1)
    schedule = build(name, ranks, virtual, m)
    costs = data.draw(st.lists(cost, min_size=schedule.stages, max_size=schedule.stages))
    free, slow = simulate(schedule, costs), simulate(schedule, costs, transfer_s=Fraction(1, 3))
    through = sum(each.forward_s + each.input_gradient_s for each in costs)
    assert free.step_s >= max(max(free.busy_s), through)
    assert free.step_s <= slow.step_s
    assert 0 <= free.bubble_fraction < 1
    for rank in range(ranks):
        mine = [span for span in free.spans if span.rank == rank]
        assert all(first.end_s <= second.start_s for first, second in itertools.pairwise(mine))


def test_a_wrong_number_of_costs_is_refused() -> None:
    with pytest.raises(PlanError, match="3 stage costs for 4 stages"):
        simulate(build("1f1b", 4, 1, 4), [StageCost()] * 3)
