"""A configuration round-trips, and every wrong key, type or value is one sentence with the nearest that works."""

from pathlib import Path

import pytest

from meshwright.errors import ConfigError
from meshwright.train.config import Config, load
from meshwright.train.loop import make_optimizer, rate_schedule


def test_the_resolved_file_reads_back_equal(tmp_path: Path) -> None:
    config = load(None, ["train.steps=7", "optimizer.lr=1", "data=some text.txt", "log.every=3", "plan.text=zero2 precision=bf16"])
    assert config.train.steps == 7
    assert config.optimizer.lr == 1.0
    assert config.data.source == "some text.txt"
    path = tmp_path / "plan.toml"
    path.write_text(config.to_toml())
    assert load(path, []) == config
    assert load(None, []) == Config()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["train.stps=7"], ["'stps'", "'steps'"]),
        (["trian.steps=7"], ["[trian]", "[train]"]),
        (["train.steps=many"], ["train.steps='many'", "int"]),
        (["train.steps=0"], ["train.steps=0"]),
        (["steps"], ["table.key=value"]),
        (["train.on_nonfinite=ignore"], ["'ignore'", "stop"]),
        (["schedule.decay=cosin"], ["'cosin'", "'cosine'"]),
        (["checkpoint.async=true"], ["checkpoint.async"]),
        (["data.validation_fraction=2"], ["validation_fraction=2.0"]),
        (["optimizer.betas=[0.9, 'x']"], ["optimizer.betas"]),
    ],
)
def test_wrong_settings(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, settings)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[train]\nsteps = ", "[[train]]\nsteps=1", "train = 3", "[trian]\nx=1"])
def test_wrong_files(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load(path, [])
    with pytest.raises(ConfigError, match="can't be read"):
        load(tmp_path / "missing.toml", [])


@pytest.mark.parametrize("setting", ["optimizer.name=AdamX", "optimizer.extra={nonsense = 1}", "optimizer.lr=-1"])
def test_wrong_optimizers(setting: str) -> None:
    with pytest.raises(ConfigError):
        make_optimizer(load(None, [setting]).optimizer)


def test_the_schedule_warms_up_and_decays() -> None:
    factor = rate_schedule(load(None, ["schedule.warmup=10", "schedule.final=0.1"]).schedule, 100)
    assert [factor(0), factor(9)] == [0.1, 1.0]
    assert factor(100) == pytest.approx(0.1)
    assert all(factor(s) >= factor(s + 1) for s in range(10, 99))
