"""The process of one rank: joins its peers, trains, and leaves quietly whatever happens.

Started as `python -c` by `launch.py` (or directly under torchrun and Slurm) with the run's folder and whether to resume.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

from meshwright.parallel.ranks import connect
from meshwright.plan import Plan
from meshwright.train import config, launch, loop

COMMAND = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "  # before the long imports: a Ctrl-C leaves no traceback
    "from meshwright.train.worker import main; main()"
)


def main() -> None:
    """Run the rank that the environment describes on `FOLDER resume|fresh`, and exit."""
    launch.die_with_parent()
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    code = launch.run_rank(int(os.environ.get("RANK", "0")), lambda: work(folder, mode == "resume"), folder)
    sys.stdout.flush()
    sys.stderr.flush()
    # Leave without unwinding: a peer that failed must not keep this process in a collective's destructor.
    os._exit(code)


def work(folder: Path, resume: bool) -> None:
    """Join the ranks and train the run whose resolved configuration lies in `folder`."""
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    warnings.showwarning = _in_a_line
    connect()
    resolved = config.load(folder / "plan.toml", [])
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    loop.train(resolved, Plan.parse(resolved.plan.text, ranks), folder, resume)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _in_a_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Print a warning of ours as a sentence, for its place in our code says nothing to a user; others as Python does."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    text = f"warning: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
