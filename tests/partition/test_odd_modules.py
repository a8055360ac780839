"""Odd modules compute under tensor and context parallelism what they compute on one device, or are refused in a sentence."""

from __future__ import annotations

import pytest
from odd import compare
from odd_modules import CASES

import ranks

WITHOUT_SEQUENCE = {"cumulativeaverage", "cutstatistics"}


def under(name: str, plan: str) -> dict[str, float] | str:
    return compare(CASES[name], plan)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", ["tp=2", "tp=2 sp=on", "cp=2"])
def test_same_as_single_device(name: str, plan: str) -> None:
    found = ranks.run(2, under, name, plan)[0]
    if plan == "cp=2" and name in WITHOUT_SEQUENCE:
        assert isinstance(found, str)
        assert found.startswith("PlanError: cp=2: the batch has no sequence")
    else:
        assert not found
