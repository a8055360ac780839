"""What `meshwright inspect --model M --plan P` shows: the weights that the plan cuts, its stages, every message's bytes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from meshwright.plan import AUTO, Plan

if TYPE_CHECKING:
    from meshwright.parallel.preview import Preview


def show_layout(model: str, text: str, seq: int | None, items: int, as_json: bool) -> int:
    """Print what `tp`, `sp`, `cp` and `pp` of a plan do to a model, for micro-batches of `items`; returns 0. No ranks are needed.

    Raises `PlanError` for a plan that the model does not allow, with the nearest that it does.
    """
    found = layout(model, Plan.parse(text), seq, items)
    print(json.dumps(found.to_json()) if as_json else found)
    return 0


def layout(model: str, plan: Plan, seq: int | None = None, items: int = 1) -> Preview:
    """Read a model spec, on meta, as rank 0 of the plan would run it. Open degrees count as 1: nothing says how many ranks are
    here.
    """
    import dataclasses

    from meshwright.blueprint.execute import build_on_meta
    from meshwright.blueprint.sample import reading
    from meshwright.blueprint.spec import parse_spec
    from meshwright.parallel.preview import preview

    spec = parse_spec(model, **({} if seq is None else {"sequence": seq})).with_sequence(seq)
    module = build_on_meta(spec.build)
    batch, loss_fn = spec.sample(module, seq, items)
    open_degrees: dict[str, Any] = {
        name: 1 for name in ("dp_replicate", "dp_shard", "tp", "cp", "pp", "ep") if getattr(plan, name) == AUTO
    }
    return preview(module, dataclasses.replace(plan, **open_degrees), reading(None, loss_fn)(module), batch)
