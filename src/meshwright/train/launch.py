"""Starts local ranks with torchrun's own agent, and turns whatever ends them into one sentence.

The agent runs in this process. Its rendezvous is a store on a socket that is bound to loopback before torch sees it (torch's
own would listen on every interface), and gloo is told to use the loopback interface. Workers run in sessions of their own, so
Ctrl-C reaches only this process, which ends them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from meshwright.errors import MeshwrightError

ERRORS_VARIABLE = "MESHWRIGHT_ERRORS"
"""Names the folder in which a rank that fails leaves its error, for the process that started it."""

_LOST_PEER = re.compile(r"gloo/transport|Connection (closed|reset)|Broken pipe|remote process exited|NCCL communicator was aborted")


class _Loopback(RendezvousHandler):
    """The rendezvous of one node whose store nobody outside this machine can reach."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(1024)
        self._port = self._socket.getsockname()[1]
        self._store: dist.TCPStore | None = None

    def get_backend(self) -> str:
        return "meshwright-loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._store is None:
            # torch takes the descriptor over and closes it with the store.
            self._store = dist.TCPStore(
                "127.0.0.1", self._port, is_master=True, wait_for_workers=False, master_listen_fd=self._socket.detach()
            )
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return "meshwright"

    def shutdown(self) -> bool:
        self._store = None
        return True


def start_ranks(ranks: int, command: list[str]) -> int:
    """Run `command` as `ranks` local ranks and wait; return the exit code.

    On failure prints the first failing rank's error, with its rank, in one line on stderr. Ctrl-C ends all ranks at once.
    """
    logging.disable(logging.CRITICAL)  # this process only waits; what torch's agent would log, it says in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback_interface())
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        os.environ[ERRORS_VARIABLE] = folder
        specification = WorkerSpec(
            role="rank",
            local_world_size=ranks,
            entrypoint=command[0],
            args=tuple(command[1:]),
            rdzv_handler=_Loopback(),
            max_restarts=0,
            monitor_interval=0.05,
            master_addr="127.0.0.1",
        )
        agent = LocalElasticAgent(specification, DefaultLogsSpecs(log_dir=folder))
        try:
            result = agent.run()
        except SignalException as error:
            print("interrupted: all ranks have been ended", file=sys.stderr)
            return 128 + int(error.sigval)
        if result.state is WorkerState.SUCCEEDED:
            return 0
        return _report(Path(folder), {rank: failure.exitcode for rank, failure in result.failures.items()})


def _report(folder: Path, exit_codes: dict[int, int]) -> int:
    """Print the error of the rank that failed first; return the exit code for it."""
    errors = [json.loads(path.read_text()) for path in folder.glob("rank-*.json")]
    killed = any(code < 0 and code != -signal.SIGTERM for code in exit_codes.values())
    # A rank that loses its peer fails too, a moment later: that is news only if no rank has a cause of its own.
    causes = [error for error in errors if not (killed and error["lost_peer"])]
    if causes:
        first = min(causes, key=lambda error: (error["lost_peer"], error["time"]))
        print(f"error: rank {first['rank']}: {first['message']}", file=sys.stderr)
        return int(first["exit_code"])
    # A signal of its own, then an exit, then what the agent ended because of another.
    rank, code = min(exit_codes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[1] >= 0, item[0]), default=(0, 1))
    cause = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
    hint = " (the system may have been out of memory)" if code == -signal.SIGKILL else ""
    print(f"error: rank {rank} {cause}{hint}", file=sys.stderr)
    return 1


def run_rank(rank: int, body: Callable[[], None], log_folder: Path) -> int:
    """Run one rank's work; turn an exception into one sentence for whoever started it, and return the exit code.

    The sentence goes to the starter's error folder if there is one, else to stderr; an unexpected exception's traceback goes
    into `log_folder`.
    """
    try:
        body()
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        code = error.exit_code if isinstance(error, MeshwrightError) else 1
        message = _sentence(error, rank, log_folder)
        folder = os.environ.get(ERRORS_VARIABLE)
        if folder is None:
            print(f"error: rank {rank}: {message}", file=sys.stderr)
        else:
            lost_peer = not isinstance(error, MeshwrightError) and _LOST_PEER.search(str(error)) is not None
            record = {"rank": rank, "time": time.time(), "message": message, "exit_code": code, "lost_peer": lost_peer}
            partial = Path(folder) / f"rank-{rank}.partial"
            partial.write_text(json.dumps(record))
            partial.rename(Path(folder) / f"rank-{rank}.json")
        return code
    return 0


def _sentence(error: BaseException, rank: int, log_folder: Path) -> str:
    text = " ".join(str(error).split("\n")[0].split())
    if isinstance(error, MeshwrightError):
        return text
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    try:
        log_folder.mkdir(parents=True, exist_ok=True)
        log = log_folder / f"error-rank-{rank}.txt"
        log.write_text("".join(traceback.format_exception(error)))
        return f"{type(error).__name__}: {text or 'no message'}{where} (traceback in {log})"
    except OSError:
        return f"{type(error).__name__}: {text or 'no message'}{where}"


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it dies, however it dies (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _loopback_interface() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else next((name for name in names if name.startswith("lo")), "lo")
