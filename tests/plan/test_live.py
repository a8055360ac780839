"""The bytes that a prediction has alive at its worst moment are those that torch's allocator hands out in a real step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import meshwright as mw


class Residual(nn.Module):
    """Blocks inside a residual connection that the caller makes, with or without activations in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        parts = [lambda: nn.BatchNorm2d(32), lambda: nn.ReLU(in_place), lambda: nn.Conv2d(32, 32, 3, padding=1)]
        self.blocks = nn.ModuleList(nn.Sequential(*(part() for part in parts)) for _ in range(4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class Narrowing(nn.Module):
    """Blocks of two sizes: the first hold much more than the last."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(self.block(256, 1024) for _ in range(3))
        self.narrow = nn.ModuleList(self.block(256, 512) for _ in range(3))

    @staticmethod
    def block(width: int, inner: int) -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.wide, *self.narrow]:
            x = x + block(x)
        return x


def allocated(step: Callable[[], object]) -> int:
    """The most bytes that are handed out at once during `step`, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    now = most = 0
    for event in sorted(
        (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        now += event.nbytes()
        most = max(most, now)
    return most


def classes(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def squares(output: Tensor, batch: Any) -> Tensor:
    return (output - batch[0]).square().mean()


def transformer() -> nn.Module:
    layers = [nn.TransformerEncoderLayer(128, 4, 256, dropout=0.1, batch_first=True) for _ in range(3)]
    return nn.Sequential(*layers)


def images(items: int) -> tuple[Tensor, Tensor]:
    return torch.randn(items, 3, 24, 24), torch.arange(items) % 10


def sequences(width: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda items: (torch.randn(items, 64, width), torch.arange(items))


CASES = {
    "residual": (lambda: Residual(False), images, classes),
    "in-place": (lambda: Residual(True), images, classes),
    "transformer": (transformer, sequences(128), squares),
    "narrowing": (Narrowing, sequences(256), squares),
}


@pytest.mark.parametrize(
    ("name", "items"), [("residual", 4), ("in-place", 16), ("transformer", 8), ("narrowing", 4), ("narrowing", 16)]
)
def test_the_worst_moment_holds_what_the_allocator_hands_out(name: str, items: int) -> None:
    build, batch_of, loss_fn = CASES[name]
    model, batch = build(), batch_of(items)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss_fn(model(batch[0]), batch).backward()

    step()
    model.zero_grad(set_to_none=True)
    measured = allocated(step)
    blueprint = mw.inspect(model, batch_of(2), loss_fn=loss_fn)
    memory = mw.predict(blueprint, mw.Cluster.parse("CPU"), "single", items).memory_bytes
    assert memory["peak"] - memory["parameters"] - memory["optimizer"] == pytest.approx(measured, rel=0.03)
