"""Every command and example that the documents show is run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = [
    "model.spec=llama:layers=2,hidden=16,heads=2,vocab=256",
    "data.sequence_length=16",
    "data.validation_samples=4",
    "train.sample=3",
]


def _blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for index, block in enumerate(re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append((f"{page.name}-{index}", block))
    return found


def _commands() -> list[tuple[str, list[str]]]:
    pages = []
    for name, block in _blocks("console"):
        lines = [line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("meshwright")]
        if lines:
            pages.append((name, lines))
    return pages


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(("name", "code"), _blocks("python"), ids=[name for name, _ in _blocks("python")])
def test_python_examples_run(name: str, code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=_environment()
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "lines"), _commands(), ids=[name for name, _ in _commands()])
def test_commands_run_in_the_order_shown(name: str, lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text() * 3)
    for line in lines:
        words = shlex.split(line)
        small = SMALL if words[1] == "train" else []
        command = [sys.executable, "-m", "meshwright", *words[1:], *small]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=_environment())
        assert done.returncode == 0, (line, done.stderr)


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {word for _, block in _blocks("console") for word in re.findall(r"^make (\w+)", block, re.MULTILINE)}
    assert shown
    assert shown <= targets


def test_the_configuration_shown_is_the_default() -> None:
    from meshwright.train.config import Config, load

    ((_, block),) = _blocks("toml")
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"meshwright-docs-{os.getpid()}.toml"
    path.write_text(block)
    try:
        assert load(path, []) == Config()
    finally:
        path.unlink()


def test_links_and_files_named_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
        for name in re.findall(r"`((?:benchmarks|tests|docs)/[\w/.]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), (page.name, name)
