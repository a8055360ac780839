"""A model that can't be captured costs one sentence that names the module, the line and what to do."""

import pytest
import torch
from torch import Tensor, nn

from meshwright.blueprint import execute
from meshwright.blueprint.inspection import inspect
from meshwright.errors import ConfigError, ModelError


class Body(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.kind == "branch" and x.sum() > 0:
            x = -x
        if self.kind == "item":
            x = x * float(x.mean().item())
        if self.kind == "mask":
            x = x[x > 0].sum() + x
        if self.kind == "custom":
            x = torch.ops.meshwright_test.twice(x)
        if self.kind == "bug":
            x = x @ torch.ones(3, 3)
        return self.b(x)


def model(kind: str) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), Body(kind), Body(kind))


@pytest.fixture(scope="module", autouse=True)
def custom_op():  # type: ignore[no-untyped-def]
    library = torch.library.Library("meshwright_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize(
    ("kind", "line", "advice"),
    [
        ("branch", "x.sum() > 0", "torch.where"),
        ("item", "x.mean().item()", "reads the value"),
        ("mask", "x[x > 0]", "size depends on computed values"),
        ("custom", "meshwright_test.twice(x)", "register"),
        ("bug", "x @ torch.ones(3, 3)", "check that the batch"),
    ],
)
def test_one_sentence_names_module_line_and_remedy(kind: str, line: str, advice: str) -> None:
    with pytest.raises(ModelError) as raised:
        inspect(model(kind), torch.randn(2, 8))
    text = str(raised.value)
    assert "module '1'" in text
    assert __file__ in text
    assert line in text
    assert advice in text
    assert "\n" not in text


def test_blocks_by_structure_still_come_if_the_capture_fails() -> None:
    blueprint = inspect(model("branch"), torch.randn(2, 8), strict=False)
    assert not blueprint.captured
    assert blueprint.blocks == ("1", "2")
    assert blueprint.n_parameters == sum(p.numel() for p in model("branch").parameters())
    assert "x.sum() > 0" in blueprint.notes[0]
    assert str(blueprint)


def test_the_model_is_left_as_it_was() -> None:
    broken = model("branch")
    before = {name: value.data_ptr() for name, value in broken.state_dict().items()}
    with pytest.raises(ModelError):
        inspect(broken, torch.randn(2, 8))
    assert {name: value.data_ptr() for name, value in broken.state_dict().items()} == before
    assert all("forward" not in vars(module) for module in broken.modules())
    assert all(not isinstance(p, torch._subclasses.FakeTensor) for p in broken.parameters())


class Caching(nn.Module):
    """Keeps what it made for the next call, as many models keep masks and tables."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.calls = nn.Linear(8, 8), None, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.table is None or self.table.shape[0] != x.shape[0]:
            self.table = self.linear(x).detach()
            self.extra = self.table
        return self.linear(x) + self.table + torch.rand([])


def test_what_a_forward_keeps_is_taken_back() -> None:
    model, x = Caching(), torch.randn(2, 8)
    torch.manual_seed(1)
    inspect(model, x)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    assert model.table is None
    assert model.calls == 0
    assert not hasattr(model, "extra")
    assert model(x).isfinite().all()


def test_a_batch_is_needed() -> None:
    with pytest.raises(ModelError, match="needs a batch"):
        inspect(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="batch dim"):
        inspect(nn.Linear(2, 2), {"x": 3})


def test_statistics_of_the_model_are_not_touched() -> None:
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    inspect(norm, torch.randn(2, 3, 8, 8))
    assert int(norm[1].num_batches_tracked) == 0
    assert torch.equal(norm[1].running_mean, torch.zeros(4))


def test_wrong_specs_name_the_nearest() -> None:
    for text, near in (
        ("gpt22", "gpt2"),
        ("gpt:layres=3", "layers"),
        ("llama:layers=x", "layers='x'"),
        ("llama:heads=3", "heads=3"),
        ("gpt:layers=2,layers=3", "layers is given twice"),
        ("gpt:hidden=100000000000,heads=1", "too large"),
    ):
        with pytest.raises(ConfigError, match=near):
            inspect(text)
    for seq in (4096, 0, -3):
        with pytest.raises(ConfigError, match=f"seq={seq}"):
            inspect("gpt2", seq=seq)
    with pytest.raises(ConfigError, match="no such file"):
        inspect("nowhere/config.json")


def test_what_builds_no_module_is_refused() -> None:
    for build, part in ((None, "not None"), (lambda: 3, "returned a int"), (lambda: nn.Linear(1 // 0, 1), "ZeroDivisionError")):
        with pytest.raises(ModelError, match=part):
            inspect(build, torch.randn(2, 2))  # type: ignore[arg-type]


def test_views_of_integers_too_many_to_compute_still_share_their_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "LARGEST_REAL", 2 * 64)  # the tokens of two samples, but not of three
    assert inspect("llama:layers=2,hidden=64,heads=4,vocab=50", seq=64).captured
