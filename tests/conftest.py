"""Settings that all tests share."""

import os

import pytest
from hypothesis import settings

# The same examples in every run, so that a failure of CI is one that can be looked at. HYPOTHESIS_PROFILE=new draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes four ranks or more is run apart, but for one model: on two cores such ranks take turns."""
    for item in items:
        chosen = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if chosen.get("world_size", 1) >= 4 and chosen.get("name") != "gpt":
            item.add_marker(pytest.mark.slow)
