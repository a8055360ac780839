"""A factory's initial values depend on the seed and the code, never on the mesh, and nothing is left uninitialised."""

import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import meshwright as mw
import ranks
import zoo
from meshwright.parallel.materialise import build, derive_seed


class Peculiar(nn.Module):
    """Constructors do all sorts of things: read values back, resample, copy constants, cast, tie, leave plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated = nn.Linear(6, 8)
        nn.init.trunc_normal_(self.truncated.weight, std=0.02)  # a rejection loop that looks at values
        self.orthogonal = nn.Linear(8, 8)
        nn.init.orthogonal_(self.orthogonal.weight)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.rates = [float(rate) for rate in torch.linspace(0, 0.5, 3)]
        self.more_rates = torch.linspace(0, 0.5, 3).tolist()
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("table", torch.tensor([1.0, 2.0, 3.0]) * 2, persistent=False)
        self.register_buffer("frequencies", 10.0 ** (-torch.arange(0, 4).float()), persistent=False)
        self.register_buffer("from_numpy", torch.from_numpy(numpy.arange(3.0)))
        self.constant = torch.arange(4) * 3  # neither parameter nor buffer
        self.unset = nn.Parameter(torch.empty(3))
        with torch.no_grad():
            self.truncated.bias.copy_(torch.arange(8))
            self.orthogonal.weight[0] = 7.0
        self.truncated.weight.data.mul_(3.0)
        self.head = nn.Linear(8, 8, bias=False)
        self.head.weight = self.orthogonal.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.orthogonal(self.truncated(x)) * self.scale + self.unset.sum()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_values_are_those_that_the_code_asks_for() -> None:
    module, recording = build(lambda: Peculiar().double(), seed=1)
    assert recording is not None
    assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()) if tensor is not module.from_numpy)

    def value(tensor: torch.Tensor) -> torch.Tensor:
        return recording.value(tensor) if recording.knows(tensor) else tensor

    plain = Peculiar().double()
    for name, expected in plain.state_dict(keep_vars=True).items():
        found = value(dict(module.state_dict(keep_vars=True))[name])
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
    assert module.head.weight is module.orthogonal.weight
    assert module.rates == module.more_rates == [0.0, 0.25, 0.5]
    truncated = value(module.truncated.weight)
    assert 0.001 < truncated.std() < 0.12
    weight = value(module.orthogonal.weight)
    assert (weight[0] == 7).all()
    torch.testing.assert_close(weight[1:] @ weight[1:].T, torch.eye(7).double(), atol=1e-5, rtol=0)
    for name in ("table", "frequencies", "from_numpy", "constant"):
        torch.testing.assert_close(value(getattr(module, name)).double(), getattr(plain, name).double())
    assert value(module.truncated.bias).tolist() == list(range(8))
    assert value(module.scale).item() == 2.5
    assert not value(module.unset).any()


class Redrawn(nn.Module):
    """Values that are drawn again, whole or in part."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.part = nn.Parameter(torch.empty(4, 6)), nn.Parameter(torch.empty(4, 6))
        for parameter in (self.whole, self.part):
            nn.init.uniform_(parameter, 5.0, 6.0)
        nn.init.normal_(self.whole)
        nn.init.normal_(self.part[1:])
        with torch.no_grad():
            self.whole.mul_(2.0)


class Noted:
    """A generator that notes its seeds."""

    def __init__(self, generator: torch.Generator, seeds: list[int]) -> None:
        self.generator, self.seeds = generator, seeds

    def manual_seed(self, seed: int) -> torch.Generator:
        self.seeds.append(seed)
        return self.generator.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)


def test_what_is_drawn_again_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    module, recording = build(Redrawn, seed=1)
    assert recording is not None
    drawn = [derive_seed(1, ordinal) for ordinal in range(4)]
    monkeypatch.setattr(torch, "default_generator", Noted(torch.default_generator, seeds))
    whole = recording.value(module.whole)
    assert seeds == [drawn[2]]
    torch.testing.assert_close(whole, 2.0 * torch.empty(4, 6).normal_(generator=torch.Generator().manual_seed(drawn[2])))
    part = recording.value(module.part)
    assert seeds[1:] == [drawn[1], drawn[3]]
    assert (part[0] >= 5.0).all()
    torch.testing.assert_close(part[1:], torch.empty(3, 6).normal_(generator=torch.Generator().manual_seed(drawn[3])))


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    build(Peculiar, seed=1)
    assert torch.equal(torch.rand(2), expected)


def initial(plan: str, seed: int, name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 5)  # ranks are seeded differently
    factory: Any = Peculiar if name == "peculiar" else zoo.CASES[name].build
    engine = mw.parallelize(factory, plan, seed=seed)
    for tensor in (*engine.module.parameters(), *engine.module.buffers()):
        assert not tensor.is_meta
    if name == "peculiar":
        assert engine.module.constant.tolist() == [0, 3, 6, 9]
        assert engine.module.table.tolist() == [2.0, 4.0, 6.0]
        assert torch.isfinite(engine.infer(torch.ones(2, 6))).all()
    return engine.full_state_dict()


@pytest.mark.parametrize("name", ["peculiar", "gpt-tied", "hf-gpt2", "hf-llama", "recurrent", "resnet", "encoder-decoder"])
def test_a_factory_starts_equal_on_every_mesh(name: str) -> None:
    expected = ranks.run(1, initial, "single", 3, name)[0]
    assert all(value.isfinite().all() for value in expected.values())
    for plan, world_size in (("ddp", 2), ("zero1", 2), ("zero3", 2), ("zero2 precision=bf16", 2), ("hsdp", 4)):
        found = ranks.run(world_size, initial, plan, 3, name)[0]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), (plan, key)
    other = ranks.run(1, initial, "single", 4, name)[0]
    assert any(not torch.equal(other[key], value) for key, value in expected.items())


def own_values(plan: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch.distributed.get_rank())  # a user's mistake: every rank has other values
    return mw.parallelize(nn.Linear(5, 3), plan).full_state_dict()


@pytest.mark.parametrize("plan", ["ddp", "zero1", "zero3"])
def test_a_modules_own_values_are_rank_zeros(plan: str) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(5, 3).state_dict()
    found = ranks.run(2, own_values, plan)[0]
    assert all(torch.equal(found[name], value) for name, value in expected.items())


class Impossible(nn.Module):
    """Hands a tensor's memory to another library, which no recording can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        storage = self.layer.weight.detach().untyped_storage()
        assert storage.data_ptr() != 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def fallback() -> tuple[int, dict[str, torch.Tensor]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = mw.parallelize(Impossible, "zero3", seed=3)
    return sum("meta device" in str(w.message) for w in caught), engine.full_state_dict()


def test_a_factory_that_cannot_be_recorded_is_run_for_real_and_says_so() -> None:
    (said, weights), _ = ranks.run(2, fallback)
    assert said == 1
    assert weights["layer.weight"].abs().sum() > 0
