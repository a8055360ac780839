"""`meshwright train`, as a user runs it: whole processes, their files, their words, and how they end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

import meshwright as mw
from meshwright.parallel.ranks import slurm_environment
from meshwright.train.config import load

TINY = [
    "model.spec=llama:layers=2,hidden=16,heads=2,vocab=256",
    "data.sequence_length=16",
    "data.global_batch=8",
    "data.validation_samples=10",
    "train.sample=5",
    "checkpoint.every=2",
    "log.every=1",
]
COMMAND = [sys.executable, "-m", "meshwright"]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return path


def _environment() -> dict[str, str]:
    here = str(Path(__file__).parent)
    cache = str(Path(tempfile.gettempdir()) / f"meshwright-tests-{os.getpid()}")  # predictions' errors are not the user's
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MESHWRIGHT_CACHE": cache}


def _arguments(text: Path, *more: str) -> list[str]:
    return [*COMMAND, "train", f"data={text}", *TINY, *more]


def _train(text: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_arguments(text, *more), capture_output=True, text=True, timeout=120, env=_environment())


def _losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def single(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "single"
    done = _train(text, "--plan", "single", "--ranks", "1", "--steps", "5", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_writes_what_it_promises_and_has_the_single_device_curve(text: Path, single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fsdp"
    done = _train(text, "--plan", "fsdp", "--ranks", "2", "--steps", "5", "--out", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    for words in (
        "dp_shard=2 zero=3",
        "storage float32",
        "step 5/5",
        "tokens/s",
        "left",
        "validation loss",
        "a sample",
        str(folder),
    ):
        assert words in done.stderr
    assert "mfu unknown" in done.stderr
    assert json.loads(done.stdout)["steps"] == 5  # what a program reads is alone there
    assert load(folder / "plan.toml", []).train.steps == 5
    prediction = json.loads((folder / "prediction.json").read_text())
    assert prediction["plan"] == "dp_shard=2 zero=3"
    assert prediction["memory_bytes"]["peak"] == pytest.approx(16 * prediction["parameters"] / 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = ["step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_second", "mfu", "peak_memory_bytes"]
    assert all(list(line) == keys for line in lines)
    assert [line["step"] for line in lines] == list(range(5))
    assert all(line["mfu"] is None and line["tokens"] == 128 and len(line["peak_memory_bytes"]) == 2 for line in lines)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]
    assert [line["loss"] for line in lines] == pytest.approx(_losses(single), rel=1e-5)


@pytest.mark.parametrize("spec", [[], ["model.spec=models:WithDropout"]])
def test_a_resumed_run_continues_the_curve_exactly(text: Path, tmp_path: Path, spec: list[str]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ["schedule.decay=none", *spec, "--ranks", "2"]
    assert _train(text, *common, "--steps", "6", "--out", str(whole)).returncode == 0
    assert _train(text, *common, "--steps", "3", "--out", str(parts)).returncode == 0
    done = _train(text, *common, "--steps", "6", "--out", str(parts), "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    assert _losses(parts) == _losses(whole)


def test_resume_alone_needs_only_the_folder(text: Path, single: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "train", "--resume", "--out", str(single), "--plan", "zero2", "--ranks", "2", "--steps", "6"],
        capture_output=True,
        text=True,
        timeout=120,
        env=_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "dp_shard=2 zero=2" in done.stdout
    assert len(_losses(single)) == 6


def test_it_joins_a_torchrun_launch(text: Path, single: Path, tmp_path: Path) -> None:
    folder = tmp_path / "joined"
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "meshwright",
        "train",
    ]
    settings = [f"data={text}", *TINY, "--plan", "ddp", "--steps", "3", "--out", str(folder)]
    done = subprocess.run([*launcher, *settings], capture_output=True, text=True, timeout=120, env=_environment())
    assert done.returncode == 0, done.stderr
    assert _losses(folder) == pytest.approx(_losses(single)[:3], rel=1e-5)


def test_slurm_is_translated() -> None:
    step = {
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "77",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.5",
    }
    found = slurm_environment(step)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("3", "4", "1", "10.0.0.5")
    assert slurm_environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == {}
    assert slurm_environment(step | {"RANK": "0"}) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "fsdpp"], ["'fsdpp'", "'fsdp'"]),
        (["--plan", "ep=2"], ["ep=2", "not available"]),
        (["--plan", "tp=2", "--ranks", "2", "model.spec=gpt:heads=3,hidden=48"], ["tp=2", "3 heads", "tp=3"]),
        (["--plan", "dp_shard=3", "--ranks", "2"], ["3 ranks", "dp_shard=2"]),
        (["--plan", "pp=4 microbatches=2", "--ranks", "4"], ["4 stages", "2 blocks", "pp=2"]),
        (["--plan", "interleaved pp=2 microbatches=2", "--ranks", "2"], ["virtual=2", "2 blocks", "pp=2 virtual=1"]),
        (["--plan", "1f1b pp=2 virtual=2", "--ranks", "2"], ["virtual=2", "virtual=1", "interleaved"]),
        (["--plan", "dualpipev pp=2 microbatches=2", "--ranks", "2"], ["microbatches=2", "microbatches=4", "zbv"]),
        (["--plan", "1f1b pp=2 microbatches=16", "--ranks", "2"], ["data.global_batch=8", "16 microbatches"]),
        (["train.stps=3"], ["'stps'", "'steps'"]),
        (["data.global_batch=7", "--ranks", "2"], ["data.global_batch=7", "8"]),
        (["data.global_batch=8", "--ranks", "16"], ["data.global_batch=8", "16 data ranks"]),
        (["data=/no/such/file"], ["/no/such/file"]),
        (["data.sequence_length=5000"], ["fewer than data.global_batch=8"]),
        (["model.spec=gpt-tinny"], ["'gpt-tinny'", "'gpt-tiny'"]),
        (["model.spec=llama:layer=2"], ["'layer'", "'layers'"]),
        (["model.spec=no.such.module:model"], ["no.such.module"]),
        (["model.spec=:model"], ["':model'"]),
        (["model.spec=broken:model"], ["broken", "ZeroDivisionError"]),
        (["model.spec=gpt:heads=0"], ["heads=0"]),
        (["model.spec=gpt:layers=0"], ["layers=0"]),
        (["--plan", "zero1 zero=3"], ["zero is given twice"]),
        (["train.seed=-1"], ["train.seed=-1"]),
        (["model.spec=llama:vocab=100"], ["vocab=100", "vocab=256"]),
        (["optimizer.name=Adan"], ["'Adan'"]),
        (["--ranks", "0"], ["--ranks 0"]),
        (["--steps", "0"], ["--steps 0"]),
        (["--steps", "x"], ["--steps"]),
        (["/no/such/config.toml"], ["/no/such/config.toml"]),
        (["--resume"], ["--out"]),
        (["--resume", "--out", "/no/such/run"], ["no run to resume"]),
        (["--out", "/proc/nothing"], ["/proc/nothing"]),
        (["--plan", "ep", "--ranks", "2"], ["ep=2", "not available"]),
        (["--plan", "ddp update=backward", "--ranks", "2"], ["clip=two_pass"]),
        (["model.spec=models:nothing"], ["returned a NoneType"]),
        (["model.spec=models:fails"], ["ValueError", "no such thing"]),
        (["optimizer.betas=[0.9]"], ["[optimizer]"]),
        (["schedule.warmup=-1"], ["schedule.warmup=-1"]),
    ],
)
def test_a_users_mistake_costs_one_line_and_starts_nothing(
    text: Path, tmp_path: Path, arguments: list[str], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    from meshwright.cli.main import main

    folder = tmp_path / "run"
    out = [] if "--out" in arguments or arguments == ["--resume"] else ["--out", str(folder)]
    with pytest.raises(SystemExit) as ended:
        main(["train", f"data={text}", *TINY, *arguments, *out])
    assert ended.value.code == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    for word in words:
        assert word in error
    assert not (folder / "plan.toml").exists()
    assert not list(folder.glob("**/*.partial"))


def test_a_folder_that_holds_a_run_is_not_overwritten(text: Path, single: Path) -> None:
    before = (single / "metrics.jsonl").read_text()
    done = _train(text, "--out", str(single))
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (single / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("setting", ["data.global_batch=16", "model.spec=gpt-tiny", "data.sequence_length=8", "train.seed=3"])
def test_a_resumed_run_stays_the_same_run(text: Path, single: Path, setting: str, capfd: pytest.CaptureFixture[str]) -> None:
    from meshwright.cli.main import main

    before = (single / "plan.toml").read_text()
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", "--out", str(single), setting])
    assert ended.value.code == 2
    assert "a resumed run keeps" in capfd.readouterr().err
    assert (single / "plan.toml").read_text() == before


def _ranks_of(folder: Path) -> list[int]:
    """Processes whose command line names the run's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if str(folder) in line:
                found.append(int(entry.name))
    return found


def _gone(folder: Path) -> bool:
    deadline = time.monotonic() + 3
    while _ranks_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _ranks_of(folder)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("FailsOnRankOne", ["rank 1", "ValueError", "the second batch is cursed", "models.py"]),
        ("Dies", ["rank 1", "SIGKILL"]),
        ("Explodes", ["rank", "gradient norm is nan", "on_nonfinite=skip"]),
    ],
)
def test_the_first_failing_rank_speaks_and_nothing_is_left(text: Path, tmp_path: Path, model: str, words: list[str]) -> None:
    folder = tmp_path / "run"
    done = _train(text, f"model.spec=models:{model}", "--ranks", "2", "--steps", "5", "--out", str(folder), "--plan", "ddp")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert _gone(folder)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ending_the_command_ends_every_rank_at_once(text: Path, tmp_path: Path, ending: signal.Signals) -> None:
    folder = tmp_path / "run"
    arguments = _arguments(text, "model.spec=models:Slow", "--ranks", "2", "--steps", "100", "--out", str(folder))
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metrics.read_text(), process.stderr
    assert len(_ranks_of(folder)) == 3
    process.send_signal(ending)
    process.wait(timeout=10)
    assert _gone(folder)
    assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]


def test_nothing_listens_beyond_loopback(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = _arguments(text, "model.spec=models:Slow", "--ranks", "2", "--steps", "100", "--out", str(folder))
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
    try:
        metrics = folder / "metrics.jsonl"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        listening = _listening(_ranks_of(folder))
        assert listening, "the store at least must be found"
        assert all(address in ("127.0.0.1", "::1") for address in listening), listening
    finally:
        process.kill()
        process.wait()
    assert _gone(folder)


def _listening(pids: list[int]) -> list[str]:
    sockets = set()
    for pid in pids:
        for link in (Path("/proc") / str(pid) / "fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    addresses = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                raw = bytes.fromhex(fields[1].split(":")[0])
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                import ipaddress

                address: Any = ipaddress.ip_address(words)
                addresses.append(str(getattr(address, "ipv4_mapped", None) or address))
    return addresses


def test_importing_loads_and_starts_nothing_beyond_torch() -> None:
    code = "import torch, sys, threading; before = set(sys.modules); import meshwright; "
    code += "print(threading.active_count(), set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    threads, _, modules = done.stdout.partition(" ")
    assert threads == "1"
    assert all(name.startswith("meshwright") for name in eval(modules))
    assert all(getattr(mw, name) is not None for name in mw.__all__)


def test_auto_is_resolved_before_the_run_and_the_run_says_how_right_the_prediction_was(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "auto"
    done = _train(text, "--plan", "auto", "--ranks", "2", "--steps", "5", "--out", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["last"]["step"] == 4  # and nothing else is on stdout
    prediction = json.loads((folder / "prediction.json").read_text())
    assert prediction["prediction"]["plan"] == prediction["plan"]
    assert f'text = "{prediction["plan"]}"' in (folder / "plan.toml").read_text()
    assert f"predicted {prediction['prediction']['step_seconds']:.4g} s a step, measured" in done.stderr


def test_a_warning_is_one_line_without_a_place_in_our_code(text: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    done = _train(text, "--plan", "single offload=optimizer:cpu", "--ranks", "1", "--steps", "1", "--out", out)
    assert done.returncode == 0
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("warning: offload=optimizer:cpu")
