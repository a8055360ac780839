"""The order in which ranks compute is torch's own wherever torch has one, and the promise of the paper elsewhere."""

import pytest
from torch.distributed.pipelining import schedules as torchs

from meshwright.errors import PlanError
from meshwright.plan.orders import SCHEDULES, check_counts, compute_orders, stage_ranks

CLASSES = {
    "gpipe": torchs.ScheduleGPipe,
    "1f1b": torchs.Schedule1F1B,
    "interleaved": torchs.ScheduleInterleaved1F1B,
    "looped_bfs": torchs.ScheduleLoopedBFS,
    "zero_bubble": torchs.ScheduleInterleavedZeroBubble,
    "zbv": torchs.ScheduleZBVZeroBubble,
    "dualpipev": torchs.ScheduleDualPipeV,
}


def torch_order(name: str, ranks: int, virtual: int, microbatches: int) -> list[list[tuple[int, str, int]]]:
    """Torch's own compute lists, from its classes' methods on an object without stages (making one needs a process group)."""
    schedule = object.__new__(CLASSES[name])
    rounds = max(1, microbatches // ranks)
    fields = {
        "_n_microbatches": microbatches,
        "_num_stages": ranks * virtual,
        "num_stages": ranks * virtual,
        "pp_group_size": ranks,
        "_stages": [None] * virtual,
        "n_local_stages": virtual,
        "number_of_rounds": rounds,
        "microbatches_per_round": microbatches // rounds,
    }
    for field, value in fields.items():
        setattr(schedule, field, value)
    if name in ("gpipe", "1f1b"):
        rows = schedule._get_pipeline_order().values()
    else:
        rows = [schedule._calculate_single_rank_operations(rank) for rank in range(ranks)]
    flat = [[part for action in row if action for part in action.sub_actions or (action,)] for row in rows]
    kept = [[part for part in row if part.computation_type.value in "FBIW"] for row in flat]
    if name == "1f1b":  # torch 2.13's table (not its run) numbers the last rank's forwards from 1
        kept[-1] = [part._replace(microbatch_index=kept[-1][at // 2 * 2 + 1].microbatch_index) for at, part in enumerate(kept[-1])]
    return [[(part.stage_index, part.computation_type.value, part.microbatch_index) for part in row] for row in kept]


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_lists_equal_torchs(name: str, ranks: int) -> None:
    compared = 0
    for virtual in (1,) if name in ("gpipe", "1f1b") else (2,) if name in ("zbv", "dualpipev") else (1, 2, 3):
        for microbatches in (1, 2, 3, 4, 6, 8, 10, 16, 17, 24):
            rounds = max(1, microbatches // ranks)
            if name in ("interleaved", "zero_bubble") and microbatches % rounds:
                continue  # torch refuses these
            if (name == "dualpipev" and microbatches < 2 * ranks) or (name == "1f1b" and microbatches < ranks):
                continue
            found = [list(map(tuple, row)) for row in compute_orders(name, ranks, virtual, microbatches)]
            assert found == torch_order(name, ranks, virtual, microbatches), (virtual, microbatches)
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize(("ranks", "stages"), [(2, 4), (4, 8)])
def test_stages_lie_on_the_ranks_where_torch_puts_them(name: str, ranks: int, stages: int) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    style = "v" if name in ("zbv", "dualpipev") else "loop"
    assert stage_ranks(name, ranks, 2) == tuple(generate_stage_to_rank_mapping(ranks, stages, style=style).values())


@pytest.mark.parametrize(
    ("counts", "nearest"),
    [
        (("zbv", 4, 1, 8), "virtual=2"),
        (("dualpipev", 4, 3, 8), "virtual=2"),
        (("dualpipev", 4, 2, 7), "microbatches=8"),
        (("gpipe", 4, 2, 8), "virtual=1"),
        (("1f1b", 4, 3, 8), "virtual=1"),
        (("layerwise", 4, 1, 2), "microbatches=1"),
        (("layerwise", 4, 2, 1), "virtual=1"),
    ],
)
def test_counts_that_a_schedule_cannot_take_name_the_nearest_that_it_can(counts: tuple[str, int, int, int], nearest: str) -> None:
    with pytest.raises(PlanError, match=nearest):
        compute_orders(*counts)
    name, ranks, virtual, microbatches = counts
    field, value = nearest.split("=")
    assert f"{field}={virtual if field == 'virtual' else microbatches}" in _message(*counts)
    check_counts(
        name, ranks, int(value) if field == "virtual" else virtual, int(value) if field == "microbatches" else microbatches
    )


def _message(*counts) -> str:
    with pytest.raises(PlanError) as caught:
        check_counts(*counts)
    return str(caught.value)


def test_every_schedule_takes_some_counts() -> None:
    for name in SCHEDULES:
        virtual = 2 if name in ("zbv", "dualpipev") else 1
        assert compute_orders(name, 3, virtual, 1 if name == "layerwise" else 6)
