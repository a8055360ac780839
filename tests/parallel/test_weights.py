"""Initial values from safetensors files: every plan's ranks read their own part of them."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import meshwright as mw
import parity
import ranks
import zoo
from meshwright.parallel.parameters import collect
from meshwright.parallel.weights import Weights
from parallel.test_memory import Mlp, live_bytes, only_what_is_new

PLANS = {"single": 1, "ddp": 2, "zero2": 2, "fsdp": 2, "tp": 2, "pp=2": 2, "2d tp=2": 4}


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Two files and their index, as large checkpoints are published."""
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
    places = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def loaded(plan: str, folder: str) -> dict[str, torch.Tensor]:
    case = zoo.CASES["gpt-tied"]
    engine = mw.parallelize(
        lambda: zoo.build("gpt-tied"),
        plan,
        optimizer=parity.adamw,
        loss_fn=case.loss,
        example_batch=case.batch(0, 4),
        weights=folder,
    )
    return engine.full_state_dict()


def test_every_plan_starts_from_the_files(tmp_path: Path) -> None:
    expected = {name: torch.randn_like(value) for name, value in zoo.build("gpt-tied").state_dict().items()}
    expected["head.weight"] = expected["embedding.weight"]
    _write(tmp_path, {name: value for name, value in expected.items() if name != "embedding.weight"})  # a tie, by its other name
    for plan, size in {**PLANS, f"fsdp offload=params:nvme={tmp_path}": 2}.items():
        found = ranks.run(size, loaded, plan, str(tmp_path))[0]
        assert all(torch.equal(found[name], value) for name, value in expected.items()), plan


@only_what_is_new()
def highest_at_start(plan: str, folder: str | None) -> tuple[int, int]:
    """(highest live bytes whenever a tensor's values have been made, between here and the engine's end, parameters)."""
    seen: list[int] = []
    if folder is None:
        from meshwright.parallel.materialise import Recording

        owner, name = Recording, "value"
    else:
        owner, name = Weights, "read"
    original: Any = getattr(owner, name)

    def watched(*arguments: Any) -> torch.Tensor:
        made: torch.Tensor = original(*arguments)
        seen.append(live_bytes())
        return made

    setattr(owner, name, watched)
    try:
        engine = mw.parallelize(Mlp, plan, weights=folder)
    finally:
        setattr(owner, name, original)
    gc.collect()
    return max(seen), sum(entry.shape.numel() for entry in engine.table)


@pytest.mark.parametrize("source", ["seed", "files"])
@pytest.mark.parametrize("plan", ["fsdp", "fsdp offload=params:nvme={dir}"])
def test_no_rank_ever_holds_more_than_its_shard_and_one_tensor(plan: str, source: str, tmp_path: Path) -> None:
    _write(tmp_path, Mlp().state_dict())
    folder = str(tmp_path) if source == "files" else None
    layer = 4 * (192 * 192 + 192)
    for highest, parameters in ranks.run(4, highest_at_start, plan.format(dir=tmp_path), folder):
        shard = 4 * parameters // 4
        kept = 3 * layer // 4 if "nvme" in plan else shard  # buffers of a unit
        assert highest <= kept + 3.2 * layer, "the whole tensor, twice while it is drawn, and the unit that is gathered once"


def refused(folder: str) -> list[str]:
    found = []
    for each in sorted(Path(folder).iterdir()):
        with pytest.raises((mw.ModelError, mw.ConfigError)) as error:
            mw.parallelize(Mlp, "single", weights=each)
        found.append(str(error.value))
    return found


def test_files_that_do_not_fit_are_refused_in_a_sentence(tmp_path: Path) -> None:
    good = Mlp().state_dict()
    for name, tensors in {
        "a-missing": {key: value for key, value in good.items() if key != "layers.3.bias"},
        "b-shape": good | {"layers.3.bias": torch.zeros(5)},
        "c-unknown": good | {"other": torch.zeros(5)},
        "d-empty": {},
    }.items():
        (tmp_path / name).mkdir()
        if tensors:
            _write(tmp_path / name, tensors)
    (tmp_path / "e-damaged.safetensors").write_bytes(b"\xff" * 20)
    messages = refused(str(tmp_path))
    for part, message in zip(
        ["no tensor 'layers.3.bias'", "has shape [5]", "'other'", "no safetensors file", "no complete"], messages, strict=True
    ):
        assert part in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{nope", "weight_map"),
        ("[]", "weight_map"),
        ('{"weight_map": null}', "weight_map"),
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "beside it"),
        ('{"weight_map": {"a": "/etc/elsewhere.safetensors"}}', "beside it"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "not there"),
    ],
)
def test_an_index_that_is_none_or_leads_elsewhere(index: str, says: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path.parent / "elsewhere.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(mw.ConfigError, match=says):
        Weights(tmp_path)


def test_a_tensor_in_two_files_and_one_of_whole_numbers(tmp_path: Path) -> None:
    with pytest.raises(mw.ConfigError, match="path of a safetensors file"):
        Weights(3)  # type: ignore[arg-type]
    table = collect(torch.nn.Linear(2, 2, bias=False))
    save_file({"weight": torch.zeros(2, 2, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(mw.ModelError, match="whole numbers"):
        Weights(tmp_path).check(table, {})
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(mw.ConfigError, match=r"a\.safetensors and b\.safetensors"):
        Weights(tmp_path)
