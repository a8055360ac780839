"""States in other forms and places, and updates inside the backward: the same numbers where the arithmetic is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import meshwright as mw
import ranks
from meshwright.engine.stored import StoredOptimizer
from meshwright.parallel.copies import Copies
from parity import assert_same_as_single_device

QUICK = [
    ("single update=backward clip=two_pass", 1),
    ("zero1 update=backward clip=two_pass offload=optimizer:nvme={dir}", 2),
    ("fsdp update=backward clip=two_pass microbatches=2 offload=params:nvme={dir}@0.6,optimizer:nvme={dir}", 2),
    ("single offload=params:nvme={dir}", 1),
]
SLOW = [
    ("ddp update=backward clip=two_pass microbatches=2", 2),
    ("zero2 update=backward clip=two_pass microbatches=2", 2),
    ("fsdp update=backward clip=two_pass", 2),
    ("hsdp update=backward clip=two_pass microbatches=2", 4),
    ("tp update=backward clip=two_pass", 2),
    ("2d tp=2 update=backward clip=two_pass offload=optimizer:nvme={dir},params:nvme={dir}", 4),
    ("single offload=optimizer:nvme={dir}", 1),
    ("ddp offload=optimizer:nvme={dir}@0.3", 2),
    ("zero2 offload=optimizer:nvme={dir}", 2),
    ("fsdp offload=optimizer:nvme={dir}@0.5", 2),
    ("pp=2 microbatches=2 offload=optimizer:nvme={dir}", 2),
    ("pp=2 dp_shard=2 zero=3 microbatches=2 offload=optimizer:nvme={dir}", 4),
    ("fsdp offload=params:nvme={dir}", 2),
]
MODELS = ["gpt-tied", "unused", "rows"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("plan", "world_size"), QUICK)
def test_same_as_single_device(name: str, plan: str, world_size: int, tmp_path: Path) -> None:
    assert_same_as_single_device(name, plan.format(dir=tmp_path), world_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt-tied", "unused", "lora", "hf-gpt2"])
@pytest.mark.parametrize(("plan", "world_size"), SLOW)
def test_same_as_single_device_everywhere(name: str, plan: str, world_size: int, tmp_path: Path) -> None:
    assert_same_as_single_device(name, plan.format(dir=tmp_path), world_size)


class Wide(torch.nn.Module):
    """Large enough that an update takes several slices, with dropout; it writes to a buffer, assigns another and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(130, 130) for _ in range(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + x.detach().mean()
        self.seen += 1
        x = x + self.mean + self.seen
        for layer in self.layers:
            x = torch.nn.functional.dropout(torch.tanh(layer(x)), 0.2)
        return x


def wide(plan: str, beside: bool = False) -> tuple[list[float], dict[str, torch.Tensor], int]:
    torch.manual_seed(0)
    engine = mw.parallelize(
        Wide().double(),
        plan,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01),
        loss_fn=lambda output, batch: output.square().mean(),
        clip_grad_norm=0.05,
    )
    if beside and engine._applied.parked is not None:
        engine._applied.parked.ahead = True  # as where units travel to a device
    elif beside:
        engine.bound.beside = True  # type: ignore[union-attr]  # as where a device computes and its host updates
    draw = torch.Generator().manual_seed(engine.data_rank)
    norms = [engine.step(torch.randn(6, 130, generator=draw, dtype=torch.float64)).grad_norm for _ in range(4)]
    bound = engine.bound
    slices = len(bound._slices) if isinstance(bound, StoredOptimizer) else 0
    return norms, engine.full_state_dict(), slices


@pytest.mark.parametrize(
    "plan",
    [
        "fsdp update=backward clip=two_pass microbatches=2 offload=optimizer:nvme={dir}@0.7,params:nvme={dir}",
        "zero1 offload=optimizer:nvme={dir}",
    ],
)
def test_two_passes_draw_the_same_and_leave_buffers_alone(plan: str, tmp_path: Path) -> None:
    parts = " microbatches=2" if "microbatches" in plan else ""
    expected = ranks.run(2, wide, ("fsdp" if "fsdp" in plan else "zero1") + parts)[0]
    found = ranks.run(2, wide, plan.format(dir=tmp_path))[0]
    assert found[2] > 2
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "plan",
    [
        "zero1 offload=optimizer:nvme={dir}",
        "zero2",
        "ddp optimizer_state=bf16",
        "fsdp microbatches=2",
        "fsdp offload=params:nvme={dir}",
    ],
)
def test_an_update_beside_the_backward_gives_the_same(plan: str, tmp_path: Path) -> None:
    """The host's thread, on a machine whose device is the host: the same order of work, without streams."""
    text = plan.format(dir=tmp_path) + " update=backward clip=two_pass"
    expected, found = ranks.run(2, wide, text)[0], ranks.run(2, wide, text, True)[0]
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(found[1][name], value)


class Late(Copies):
    """Copies as lazy as a device's may be: nothing is there before it has been waited for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rising: list[Any] = []
        self.falling: list[Any] = []

    def down(self, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        self.falling.append((torch.full_like(tensor, torch.nan, dtype=dtype), tensor))
        return self.falling[-1][0]

    def begun(self) -> Any:
        begun, self.falling = self.falling, []
        return begun

    def fill(self, pairs: Any) -> Any:
        return list(pairs)

    def arrived(self, begun: Any) -> None:
        for target, source in begun:
            target.copy_(source)
        begun.clear()

    def up(self, target: torch.Tensor, value: torch.Tensor) -> None:
        self.rising.append((target, value.clone()))

    def land(self) -> None:
        self.arrived(self.rising)


@pytest.mark.parametrize(
    "plan",
    [
        "offload=optimizer:nvme={dir},params:nvme={dir}",
        "update=backward clip=two_pass microbatches=2 offload=optimizer:nvme={dir},params:nvme={dir}",
        "update=backward clip=two_pass optimizer_state=bf16 offload=optimizer:nvme={dir}",
    ],
)
def test_nothing_counts_on_a_copy_before_it_has_waited_for_it(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan.format(dir=tmp_path)
    beside = "params" not in plan
    expected = wide(plan)
    monkeypatch.setattr("meshwright.engine.stored.Copies", Late)
    monkeypatch.setattr("meshwright.parallel.parked.Copies", Late)
    found = wide(plan, beside)
    assert found[0] == expected[0]
    assert {name for name, value in expected[1].items() if not torch.equal(found[1][name], value)} == set()


def test_what_goes_wrong_beside_the_backward_stops_the_step() -> None:
    engine = mw.parallelize(
        torch.nn.Linear(4, 4), "update=backward", optimizer=torch.optim.AdamW, loss_fn=lambda output, batch: output.square().mean()
    )
    assert isinstance(engine.bound, StoredOptimizer)
    engine.bound.beside = True
    engine.step(torch.ones(2, 4))
    engine.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step(torch.ones(2, 4))


def test_delayed_clipping_uses_the_norm_of_the_step_before() -> None:
    """The first step is exact; then each is what clipping by the last norm makes of it, computed by hand."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    by_hand = torch.nn.Linear(5, 3).double()
    by_hand.load_state_dict(model.state_dict())
    engine = mw.parallelize(
        model,
        "update=backward clip=delayed",
        optimizer=lambda params: torch.optim.SGD(params, lr=0.5),
        loss_fn=lambda output, batch: output.square().mean(),
        clip_grad_norm=0.1,
    )
    last = None
    for step in range(4):
        batch = torch.randn(4, 5, dtype=torch.float64) * (step + 1)
        by_hand.zero_grad()
        by_hand(batch).square().mean().backward()
        norm = torch.stack([p.grad.square().sum() for p in by_hand.parameters() if p.grad is not None]).sum().sqrt().item()
        factor = min(1.0, 0.1 / ((norm if last is None else last) + 1e-6))
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.5 * factor * parameter.grad
        last = norm
        assert engine.step(batch).grad_norm == pytest.approx(norm, rel=1e-9)
    for name, value in engine.full_state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-9, atol=1e-12)


def test_state_dict_of_the_torch_optimizer_is_whole() -> None:
    engine = mw.parallelize(
        torch.nn.Linear(4, 4), "update=backward", optimizer=torch.optim.AdamW, loss_fn=lambda output, batch: output.square().mean()
    )
    engine.step(torch.ones(2, 4))
    kept = engine.optimizer.state_dict()
    assert all(state["exp_avg"].shape in ((4, 4), (4,)) for state in kept["state"].values())
    engine.step(torch.ones(2, 4))
    engine.optimizer.load_state_dict(kept)
    again = engine.optimizer.state_dict()
    for number, state in kept["state"].items():
        assert all(torch.equal(value, again["state"][number][key]) for key, value in state.items())
