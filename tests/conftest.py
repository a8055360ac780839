"""Settings that all tests share."""

import os

from hypothesis import settings

# The same examples in every run, so that a failure of CI is one that can be looked at. HYPOTHESIS_PROFILE=new draws others.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
