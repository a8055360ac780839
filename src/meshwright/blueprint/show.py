"""A Blueprint for people."""

from __future__ import annotations

from meshwright.blueprint.record import Blueprint


def show(blueprint: Blueprint) -> str:
    """The blueprint as text."""
    return blueprint.model
