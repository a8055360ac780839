"""`meshwright inspect --plan P` prints, draws and saves the schedule, and refuses in one line."""

import json
import time
from pathlib import Path

import pytest

from meshwright.cli.main import main
from meshwright.plan.schedule import Schedule, build


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["inspect", *words])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_it_prints_and_draws(capsys, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "--plan", "pp=4 schedule=1f1b microbatches=8", "--svg", str(tmp_path / "step.svg"))
    assert code == 0
    assert "bubble 27.3%" in out
    assert "by rank: 4, 3, 2, 1" in out
    assert out.count("rank 3") == 2
    assert "3F0 3B0 3F1 3B1" in out
    assert (tmp_path / "step.svg").read_text().startswith("<svg")


def test_json_holds_the_list_itself(capsys) -> None:
    code, out, _ = run(capsys, "--plan", "zbv pp=2 microbatches=5", "--json")
    assert code == 0
    found = json.loads(out)
    assert Schedule.from_json(found["schedule"]) == build("zbv", 2, 2, 5)
    assert len(found["simulation"]["spans"]) == sum(len(build("zbv", 2, 2, 5).computations(rank)) for rank in range(2))


def test_other_axes_do_not_change_the_pipeline(capsys) -> None:
    _, plain, _ = run(capsys, "--plan", "pp=2 microbatches=4", "--json")
    _, more, _ = run(capsys, "--plan", "pp=2 microbatches=4 dp_shard=auto tp=2", "--json")
    assert json.loads(plain)["schedule"] == json.loads(more)["schedule"]


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["--plan", "fsdp"], ["pp=1", "pp=2"]),
        (["--plan", "1f1b"], ["pp open", "pp=4"]),
        (["--plan", "pp=4 schedule=dualpipev virtual=2 microbatches=2"], ["microbatches=2", "microbatches=8"]),
        (["--plan", "pp=4 schedule=1f1 microbatches=8"], ["1f1b"]),
        (["--plan", "pp=2", "--svg", "/nowhere/at/all.svg"], ["/nowhere/at/all.svg"]),
        ([], ["--model", "--plan"]),
    ],
)
def test_mistakes_cost_one_line_and_milliseconds(capsys, words: list[str], hints: list[str]) -> None:
    run(capsys, "--plan", "pp=2")  # what is imported once
    began = time.perf_counter()
    code, _, err = run(capsys, *words)
    assert time.perf_counter() - began < 1  # not a measurement: no model is built, no process started
    assert code == 2
    assert err.count("\n") == 1
    assert all(hint in err for hint in hints), err
