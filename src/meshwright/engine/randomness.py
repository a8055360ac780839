"""Where dropout draws from: a place in the run, so that a resumed run draws what an unbroken one would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from meshwright import _torch
from meshwright.parallel.materialise import derive_seed


@contextmanager
def seeded(device: torch.device, *place: int) -> Iterator[None]:
    """Draw from `place` (seed, step, micro-batch, data rank, and so on) inside; leave the caller's generators as they were."""
    generators = _torch.seeded_default_generators(device)
    states = [generator.get_state() for generator in generators]
    seed = derive_seed(*place)
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, before in zip(generators, states, strict=True):
            generator.set_state(before)
