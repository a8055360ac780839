"""`meshwright plan`, `predict` and `doctor`: text for people, JSON for programs, one sentence for mistakes."""

import json
from pathlib import Path

import pytest

from meshwright.cli.main import main

MODEL = "llama:layers=2,hidden=256,heads=4,ffn=512,vocab=1024,sequence=128"
WHERE = ["--model", MODEL, "--cluster", "2x4xH100-80GB", "--global-batch", "32"]
KEYS = {"plan", "step_seconds", "tokens_per_second_per_device", "model_tflops_per_device", "hardware_tflops_per_device", "mfu"}
KEYS |= {"bubble_fraction", "memory_bytes", "fits", "time_seconds"}


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(words)
    return int(left.value.code or 0)


def test_plan_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", *WHERE) == 0
    shown = capsys.readouterr().out
    for part in ("fastest of", "ddp:", "one change would buy", "twice the bandwidth between nodes", "not among them"):
        assert part in shown


@pytest.mark.parametrize("command", [["plan", "--top", "3"], ["predict", "--plan", "fsdp"]])
def test_json_has_the_fields_of_the_contract(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command, *WHERE, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"model", "cluster", "searched", "rejected", "seconds", "candidates"} <= found.keys()
    for candidate in found["candidates"]:
        assert candidate.keys() >= KEYS | {"device_bytes", "host_bytes", "disk_bytes"}
        assert set(candidate["memory_bytes"]) == {"parameters", "gradients", "optimizer", "activations", "temporary", "peak"}
        assert sum(candidate["time_seconds"].values()) == pytest.approx(candidate["step_seconds"])
    steps = [candidate["step_seconds"] for candidate in found["candidates"]]
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--model", "lama3", "--cluster", "8xH100", "--global-batch", "8"],
        ["plan", "--model", MODEL, "--cluster", "8xZ9", "--global-batch", "8"],
        ["plan", "--model", MODEL, "--cluster", "8xH100", "--global-batch", "0"],
        ["plan", *WHERE, "--fix", "tp=3"],
        ["predict", *WHERE, "--plan", "dp_shard=3"],
        ["predict", *WHERE, "--plan", "fsdp microbatches=64"],
    ],
)
def test_mistakes_exit_with_2_and_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_doctor_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path))
    assert run("doctor") == 0
    assert "not measured yet" in capsys.readouterr().out
    assert run("doctor", "--json") == 0
    assert json.loads(capsys.readouterr().out)["probe"] is None
