"""What a run does with its ranks: the Plan, and what it costs."""

from meshwright.plan.plan import AUTO, NAMED_PLANS, Plan

__all__ = ["AUTO", "NAMED_PLANS", "Plan"]
