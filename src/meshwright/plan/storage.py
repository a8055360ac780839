"""Which ways of storing and updating model states go together; the executor and the planner ask the same."""

from __future__ import annotations

from meshwright.errors import PlanError
from meshwright.plan.plan import Plan, offloads


def refuse_contradictions(plan: Plan) -> None:
    """Raise `PlanError` for a resolved plan whose fields contradict each other on any machine."""
    if any(item.what == "params" for item in offloads(plan.offload)) and refuses_params(plan):
        raise PlanError("offload=params takes parameters that are sharded in units: use dp_shard=N zero=3, or one rank, and pp=1")
    if plan.master != "fp32" and plan.precision != "bf16":
        raise PlanError(f"master={plan.master} keeps bfloat16 weights: add precision=bf16, or leave master out")
    if plan.clip != "exact" and plan.update == "step":
        raise PlanError(f"clip={plan.clip} is for update=backward: add that, or leave clip out")
    if plan.update == "backward" and plan.pp != 1:
        raise PlanError(
            f"update=backward: a pipeline (pp={plan.pp}) has all gradients before the first is whole: leave update out, or use pp=1"
        )
    if plan.update == "backward" and plan.precision == "fp16" and plan.clip != "two_pass":
        raise PlanError(
            "update=backward: precision=fp16 looks at all gradients before the first update: use bf16, or clip=two_pass"
        )


def refuses_params(plan: Plan) -> bool:
    """Whether a resolved plan's parameters can't be moved: they are not in units that one rank holds, or that ranks share."""
    alone = plan.shards == 1 and plan.degree_product() > 1
    return plan.zero != 3 or alone or plan.pp != 1
