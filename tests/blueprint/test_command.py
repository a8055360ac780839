"""`meshwright inspect`: text for people, JSON for programs, files to keep and compare."""

import argparse
import json
from pathlib import Path

import pytest

from meshwright.cli import inspect as command
from meshwright.errors import ConfigError

MODEL = "llama:layers=2,hidden=32,heads=4,vocab=64"


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers()).add_argument("--json", action="store_true")
    arguments = parser.parse_args(["inspect", *words])
    return int(arguments.run(arguments))


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", MODEL, "--seq", "16") == 0
    shown = capsys.readouterr().out
    for part in ("2 x A Block 0..1", "split attention up to 4 ways", "parameters", "a pipeline cut sends"):
        assert part in shown


def test_json_has_named_values(capsys: pytest.CaptureFixture[str]) -> None:
    run("--model", MODEL, "--seq", "16", "--items", "3", "--json", "--ops")
    values = json.loads(capsys.readouterr().out)
    assert values["items"] == 3
    assert values["kinds"][0]["instances"] == ["blocks.0", "blocks.1"]
    assert sum(op["flops"] for op in values["kinds"][0]["forward"]) == values["kinds"][0]["forward_flops"]
    assert values["boundaries"][0]["flows"][0]["bytes"] == 3 * 16 * 32 * 4


def test_save_load_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "model.json")
    run("--model", MODEL, "--seq", "16", "--save", file)
    first = capsys.readouterr().out
    run("--load", file)
    assert capsys.readouterr().out == first
    run("--model", MODEL, "--seq", "16", "--compare", file)
    assert capsys.readouterr().out.strip() == "no difference"
    run("--model", MODEL + ",ffn=64", "--seq", "16", "--compare", file)
    assert "parameters:" in capsys.readouterr().out


def test_mistakes() -> None:
    with pytest.raises(ConfigError):
        run("--model", MODEL, "--items", "0")
    with pytest.raises(ConfigError):
        run("--load", "nowhere.json")
    with pytest.raises(ConfigError, match="can't be written"):
        run("--model", MODEL, "--save", "/no/such/folder/b.json")
