"""No schedule that deadlocks, forgets, repeats or mismatches can be made; every legal one is made right."""

import contextlib
import dataclasses
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.plan.orders import SCHEDULES
from meshwright.plan.schedule import Action, Schedule, build, chain

counts = st.tuples(st.sampled_from(SCHEDULES), st.integers(1, 6), st.integers(1, 4), st.integers(1, 20))


def legal(drawn: tuple[str, int, int, int]) -> tuple[str, int, int, int]:
    name, ranks, virtual, microbatches = drawn
    virtual = {"zbv": 2, "dualpipev": 2, "gpipe": 1, "1f1b": 1, "layerwise": 1}.get(name, virtual)
    microbatches = {"layerwise": 1, "dualpipev": microbatches + 2 * ranks}.get(name, microbatches)
    return name, ranks, virtual, microbatches


def edges_of(stages: int, draw: random.Random) -> tuple[tuple[int, int], ...]:
    """A chain with some tensors that jump over stages."""
    jumps = {tuple(sorted(draw.sample(range(stages), 2))) for _ in range(draw.randrange(4))} if stages > 2 else set()
    return tuple(sorted(jumps | set(chain(stages))))


def run_in_any_order(schedule: Schedule) -> None:
    """Execute the lists with values instead of tensors, picking ranks at random: another reading of what a list means.

    A forward of a stage needs what its sources made; each pair of ranks has one first-in-first-out pipe in each direction. SEND and
    RECV only post; a computation waits for what it needs.
    """
    picker = random.Random(0)
    sent: dict[tuple[int, int], list[tuple]] = {}
    asked: dict[tuple[int, int], list[tuple]] = {}
    here: list[set[tuple]] = [set() for _ in range(schedule.ranks)]
    at = [0] * schedule.ranks
    live = set(range(schedule.ranks))
    stuck: set[int] = set()
    owners = schedule.stage_ranks
    while live:
        assert live - stuck, f"no rank can go on: {at}"
        rank = picker.choice(sorted(live - stuck))
        if at[rank] == len(schedule.actions[rank]):
            live.discard(rank)
            continue
        stage, kind, m, peer = schedule.actions[rank][at[rank]]
        if kind.startswith("SEND"):
            assert (stage, kind[-1], m) in here[rank]
            sent.setdefault((rank, owners[peer]), []).append((stage, kind[-1], m, peer))
            stuck.clear()
        elif kind.startswith("RECV"):
            asked.setdefault((owners[peer], rank), []).append((peer, kind[-1], m, stage))
        elif kind == "W":
            assert (stage, "B", m) in here[rank]
        else:
            for link in (link for link in asked if link[1] == rank):
                while asked[link] and sent.get(link):
                    message = sent[link].pop(0)
                    assert message == asked[link].pop(0)
                    here[rank].add(message)
            pairs = schedule.edges if kind == "F" else schedule.gradients
            sources = [a for a, b in pairs if b == stage] if kind == "F" else [b for a, b in pairs if a == stage]
            made = "F" if kind == "F" else "B"
            # What another rank made is a message to this very stage; what this rank made itself lies here.
            if not {(s, made, m) if owners[s] == rank else (s, made, m, stage) for s in sources} <= here[rank]:
                stuck.add(rank)
                continue
            here[rank].add((stage, made, m))
        at[rank] += 1
    assert not any(sent.values())
    assert not any(asked.values())


@settings(max_examples=150, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_every_legal_schedule_runs_to_its_end(drawn, draw: random.Random) -> None:
    name, ranks, virtual, microbatches = legal(drawn)
    edges = edges_of(ranks * virtual, draw)
    gradients = tuple(edge for edge in edges if edge[1] - edge[0] == 1 or draw.random() < 0.5)
    schedule = build(name, ranks, virtual, microbatches, edges, gradients)
    done = Counter((a.stage, a.kind, a.microbatch) for row in schedule.actions for a in row if a.computes)
    assert max(done.values()) == 1
    for stage in range(ranks * virtual):
        for m in range(microbatches):
            assert done[stage, "F", m] == 1
            assert (done[stage, "B", m], done[stage, "I", m], done[stage, "W", m]) in ((1, 0, 0), (0, 1, 1))
    run_in_any_order(schedule)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@settings(max_examples=150, deadline=None)
@given(counts, st.randoms(use_true_random=False))
def test_a_damaged_list_cannot_be_built(drawn, draw: random.Random) -> None:
    """Drop, repeat, change or move one action: always refused. Swap two: refused, or still a list that runs to its end."""
    schedule = build(*legal(drawn))
    rows = [list(row) for row in schedule.actions]
    row = rows[draw.randrange(len(rows))]
    place, damage = draw.randrange(len(row)), draw.choice(["drop", "repeat", "replace", "kind", "peer", "move", "swap"])
    if damage == "drop":
        row.pop(place)
    elif damage == "repeat":
        row.insert(draw.randrange(len(row)), row[place])
    elif damage == "replace":
        row[place] = row[place]._replace(microbatch=schedule.microbatches)
    elif damage == "kind":
        others = {"F", "B", "I", "W"} if row[place].computes else {"SEND_F", "RECV_F", "SEND_B", "RECV_B"}
        row[place] = row[place]._replace(kind=draw.choice(sorted(others - {row[place].kind})))
    elif damage == "peer":
        row[place] = row[place]._replace(peer=row[place].peer + draw.choice([-1, 1, schedule.stages]))
    elif damage == "move":
        draw.choice([other for other in rows if other is not row] or [[]]).insert(0, row.pop(place))
    else:
        other = draw.randrange(len(row))
        row[place], row[other] = row[other], row[place]
    damaged = tuple(map(tuple, rows))
    if damage != "swap":
        with pytest.raises(PlanError) as caught:
            dataclasses.replace(schedule, actions=damaged)
        assert "\n" not in str(caught.value)
        return
    with contextlib.suppress(PlanError):
        run_in_any_order(dataclasses.replace(schedule, actions=damaged))


def rebuilt(*rows: str) -> Schedule:
    actions = tuple(tuple(map(Action.parse, row.split())) for row in rows)
    return Schedule("mine", 2, 1, 2, (0, 1), ((0, 1),), ((0, 1),), actions)


GOOD = ("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F0 1F0 1B0 1RECV_F1 1SEND_B0 1F1 1B1 1SEND_B1")


def test_a_list_written_by_hand_in_torchs_notation_is_taken() -> None:
    assert str(rebuilt(*GOOD)) == f"rank 0: {GOOD[0]}\nrank 1: {GOOD[1]}"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ((GOOD[0].replace("0SEND_F1 ", ""), GOOD[1]), "0F1, 0SEND_F1"),
        ((GOOD[0].replace(" 0B1", ""), GOOD[1]), "0F1, 0I1, 0W1"),
        ((GOOD[0] + " 0B1", GOOD[1]), "0B1 twice"),
        ((GOOD[0], GOOD[1].replace("1RECV_F1", "1RECV_F3")), "1RECV_F3"),
        ((GOOD[0].replace("0F0 0SEND_F0", "0SEND_F0 0F0"), GOOD[1]), "0F0, 0SEND_F0"),
        ((GOOD[0], GOOD[1].replace("1RECV_F1 1SEND_B0 1F1", "1SEND_B0 1RECV_F1 1F1")), "disagree"),
        ((GOOD[0].replace("0F1 0SEND_F1 0RECV_B0 0B0", "0RECV_B0 0B0 0F1 0SEND_F1"), GOOD[1]), "disagree"),
        (
            (
                GOOD[0].replace("0F1 0SEND_F1 0RECV_B0 0B0", "0RECV_B0 0B0 0F1 0SEND_F1"),
                "1RECV_F0 1F0 1SEND_B0 1RECV_F1 1F1 1B0 1B1 1SEND_B1",
            ),
            "1B0, 1SEND_B0",
        ),
        (
            ("0F0 0SEND_F0 0RECV_B0 0B0 0F1 0SEND_F1 0RECV_B1 0B1", "1RECV_F0 1F0 1RECV_F1 1F1 1B0 1SEND_B0 1B1 1SEND_B1"),
            "disagree",
        ),
        (
            ("0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1", "1RECV_F1 1F1 1RECV_F0 1F0 1B0 1SEND_B0 1B1 1SEND_B1"),
            "disagree",
        ),
    ],
)
def test_wrong_lists_are_refused_in_words(wrong: tuple[str, str], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        rebuilt(*wrong)


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    """Two stages on two ranks each; each rank first wants what the other would make later."""
    schedule = build("interleaved", 2, 2, 2)
    rows = [list(row) for row in schedule.actions]
    first = rows[0]
    first.remove(Action.parse("2RECV_F0"))
    first.insert(0, Action.parse("2RECV_F0"))
    first.remove(Action.parse("2F0"))
    first.insert(1, Action.parse("2F0"))
    with pytest.raises(PlanError, match=r"waits for ever|disagree"):
        dataclasses.replace(schedule, actions=tuple(map(tuple, rows)))


@pytest.mark.parametrize("text", ["2F0", "11B3", "0SEND_F1", "3RECV_B12", "0SEND_F1@3", "4I0", "4W7"])
def test_actions_round_trip_as_text(text: str) -> None:
    assert str(Action.parse(text)) == text


@pytest.mark.parametrize("text", ["F0", "2X0", "2F", "", "2F0 2B0", "(0F1;0B0)OVERLAP_F_B"])
def test_text_that_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no action"):
        Action.parse(text)


@pytest.mark.parametrize("edges", [((1, 0),), ((0, 4),), ((0, 0),)])
def test_edges_go_from_a_stage_to_a_later_one(edges) -> None:
    with pytest.raises(PlanError, match="does not go from a stage to a later one"):
        build("1f1b", 3, 1, 2, edges)
