"""What `meshwright inspect --plan P` shows when no model is named: the pipeline's schedule, drawn, with its bubble and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import ConfigError, PlanError
from meshwright.plan import AUTO, Plan

if TYPE_CHECKING:
    from meshwright.plan.schedule import Schedule
    from meshwright.plan.simulate import Simulation

_PLAIN_WIDTH = 120  # columns where no terminal says how many it has


def show_schedule(text: str, as_json: bool = False, svg_file: str | None = None) -> int:
    """Print (or with `svg_file` also write) the schedule of a plan text; returns 0. Raises `PlanError` if it has no pipeline.

    Forward, input gradient and weight gradient take one unit of time each on each stage, messages none; memory counts what one
    micro-batch keeps on one stage.
    """
    from rich.console import Console

    from meshwright.plan.schedule import build
    from meshwright.plan.simulate import simulate
    from meshwright.report import timeline

    plan = _with_pipeline(Plan.parse(text))
    schedule = build(plan.schedule, plan.pp, plan.virtual, plan.microbatches)
    simulation = simulate(schedule)
    if svg_file is not None:
        try:
            Path(svg_file).write_text(timeline.svg(schedule, simulation, str(plan)))
        except OSError as error:
            raise ConfigError(f"--svg {svg_file} can't be written: {error.strerror}") from error
    if as_json:
        print(json.dumps(summary(plan, schedule, simulation)))
        return 0
    console = Console(highlight=False)
    plural = "es" if schedule.microbatches > 1 else ""
    head = f"{plan}: {schedule.stages} stages on {schedule.ranks} ranks, {schedule.microbatches} micro-batch{plural}\n"
    console.print(head, soft_wrap=True)
    console.print(timeline.text(schedule, simulation, console.width if console.is_terminal else _PLAIN_WIDTH), soft_wrap=True)
    for line in _figures(schedule, simulation):
        console.print(line, soft_wrap=True)
    return 0


def summary(plan: Plan, schedule: Schedule, simulation: Simulation) -> dict[str, Any]:
    """Named values for programs; times in units of one forward of one stage, memory in micro-batches kept."""
    return {"plan": str(plan), "schedule": schedule.to_json(), "simulation": simulation.to_json()}


def _with_pipeline(plan: Plan) -> Plan:
    if plan.pp == AUTO:
        raise PlanError(f"the plan {str(plan)!r} leaves pp open: say how many stages, such as pp=4")
    if plan.pp == 1:
        raise PlanError(f"the plan {str(plan)!r} has no pipeline to draw (pp=1): the nearest that has is pp=2")
    return plan.resolve(plan.pp) if plan.degree_product() == plan.pp else _alone(plan)


def _alone(plan: Plan) -> Plan:
    """The pipeline of one data rank of a plan with more axes: all its pipelines run the same list."""
    return Plan(pp=plan.pp, schedule=plan.schedule, virtual=plan.virtual, microbatches=plan.microbatches).resolve(plan.pp)


def _figures(schedule: Schedule, simulation: Simulation) -> list[str]:
    step, bubble = float(simulation.step_s), float(simulation.bubble_fraction)
    peaks = [f"{peak:g}" for peak in simulation.rank_peak_bytes]
    messages = sum(not action.computes for row in schedule.actions for action in row) // 2
    return [
        f"step {step:g} (a stage's forward = 1), bubble {bubble:.1%} of all ranks' time, {messages} messages",
        f"micro-batches in flight at most, by rank: {', '.join(peaks)}",
        "actions (stage, kind, micro-batch; F forward, B backward, I input gradients, W weight gradients):",
        *(f"  rank {rank}: " + " ".join(map(str, schedule.computations(rank))) for rank in range(schedule.ranks)),
    ]
