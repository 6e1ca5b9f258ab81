"""What torchrun tells the processes that it starts, and what outlives one attempt of theirs: its agent's store.

With --max-restarts it starts all processes anew when one has ended. A run that has begun in its folder says so in the
store, so that the next attempt goes on from the newest checkpoint as with --resume, while one that was refused, since
another run lies there, is refused again. Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

REACHED_WITHIN = 60.0  # seconds; the store is a thread of torchrun itself, or of its first node
TOGETHER = 10.0  # seconds that a process which ends for a mistake waits for the others to find it too


def world() -> int:
    """Processes that were started together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def attempt() -> int:
    """How often torchrun has started them anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restartable() -> bool:
    """Whether this launch may try again, or does."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def store(timeout: float = REACHED_WITHIN) -> Any:
    """A client of the store that all processes share; the first one serves it where no agent does."""
    distributed: Any = import_module("torch.distributed")
    serves = not _agent() and rank() == 0
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, world(), is_master=serves, timeout=timedelta(seconds=timeout))


def begin(run_dir: Path) -> None:
    """From here on `run_dir` holds this launch's own run."""
    if _agent() and restartable():
        store().set(_begun(run_dir), "yes")


def has_begun(run_dir: Path) -> bool:
    """Whether an earlier attempt of this launch had begun its run in `run_dir`, so that this one goes on."""
    return _agent() and attempt() > 0 and bool(store().check([_begun(run_dir)]))


def was_said(text: str) -> bool:
    """Whether a process of this launch, in any attempt, asked this of the same text before: one of them speaks."""
    if not _agent() or (world() == 1 and not restartable()):
        return rank() != 0
    return int(store().add(f"moelab/said/{text}", 1)) > 1


def has_agent() -> bool:
    """Whether torchrun started several processes, whose store outlives each of them."""
    return _agent() and world() > 1


def machine_share() -> tuple[int, int]:
    """(which, of how many) of this machine's processes this is, as torchrun says."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def exchange(text: str) -> list[str]:
    """What each process says in its n-th call, to every one, in the order of the ranks; they need not have joined yet.

    All of them call it alike. It waits for as long as another one takes: if that one ends, torchrun ends them all.
    """
    shared, key = store(), f"moelab/exchange/{attempt()}"
    call = shared.add(f"{key}/calls/{rank()}", 1)
    shared.set(f"{key}/{call}/{rank()}", text)
    told = []
    for other in range(world()):
        while not shared.check([f"{key}/{call}/{other}"]):
            time.sleep(0.01)
        told.append(shared.get(f"{key}/{call}/{other}").decode())
    return told


def end(code: int, mistake: bool) -> NoReturn:
    """End one of several processes, at once.

    Two things that torchrun would count as this process's failure can't come between: threads of the process group's
    that abort while Python takes itself apart (seen now and then), and the SIGTERM that the first process to end with a
    `mistake` brings upon the others, which are about to end with the same code.
    """
    if mistake and _agent():
        with contextlib.suppress(Exception):  # the store is a courtesy here
            ended, key = store(), f"moelab/ended/{attempt()}"
            ended.add(key, 1)
            deadline = time.monotonic() + TOGETHER
            while ended.add(key, 0) < world() and time.monotonic() < deadline:
                time.sleep(0.02)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _begun(run_dir: Path) -> str:
    return f"moelab/begun/{run_dir.absolute()}"
