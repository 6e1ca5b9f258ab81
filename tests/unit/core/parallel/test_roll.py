"""Who ended, as the others find out: by its last words, by its process, or by its silence."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch.distributed as dist

from moelab.lock import _born, runs_here, this_process
from moelab.parallel import roll as module
from moelab.parallel.ranks import Lost
from moelab.parallel.roll import Roll


@pytest.fixture
def rolls() -> list[Roll]:
    store = dist.HashStore()
    return [Roll(store, rank, 3) for rank in range(3)]


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ranks whose processes don't run."""
    found: set[int] = set()
    monkeypatch.setattr(module, "runs_here", lambda process: int(process["pid"]) not in found)
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    return found


def enrol(roll: Roll, rank: int) -> None:
    """As a process of its own, whose number is its rank's."""
    roll._store.set(f"process/{rank}", f'{{"pid": {rank}, "host": "there"}}')


def test_last_words_are_told_with_their_rank_and_kind(rolls: list[Roll]) -> None:
    rolls[2].leave("no such file", mistake=True)
    assert rolls[0].lost() == Lost("no such file (rank 2)", left_to_main=True, mistake=True)


def test_a_process_that_is_gone_is_named_and_one_that_lost_it_is_not(rolls: list[Roll], killed: set[int]) -> None:
    for rank, roll in enumerate(rolls):
        enrol(roll, rank)
    killed |= {1}
    assert rolls[2].lost() == Lost("rank 1 (process 1 on there) was killed, or ended without a word", left_to_main=True)
    killed |= {2}  # ended because of the other
    assert "rank 2" not in rolls[0].lost().text


def test_where_the_main_process_is_gone_the_first_that_is_left_speaks(rolls: list[Roll], killed: set[int]) -> None:
    for rank, roll in enumerate(rolls):
        enrol(roll, rank)
    killed |= {0}
    assert [rolls[rank].lost().left_to_main for rank in (1, 2)] == [False, True]


def test_who_does_not_come_in_time_is_named(rolls: list[Roll], killed: set[int]) -> None:
    rolls[1].lost()
    assert rolls[0].lost().text.endswith("did not come within parallel.timeout")
    assert rolls[0].lost().text.startswith("rank 2 (process")


def test_a_store_that_is_gone_is_no_other_error() -> None:
    class Gone:
        def set(self, key: str, value: str) -> None:
            if not key.startswith("process"):
                raise RuntimeError("connection refused")

    assert "can't be asked which" in Roll(Gone(), 0, 2).lost().text


def test_a_process_that_ended_does_not_run_though_nobody_has_asked_how() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    born = _born(child.pid)
    process = this_process() | {"pid": child.pid, "born": born}
    if born is None:
        pytest.skip("no /proc")
    assert runs_here(process) is True
    child.stdin.close()
    deadline = time.monotonic() + 60
    while runs_here(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runs_here(process) is False
    child.wait()
    assert runs_here(process | {"boot": "of another machine"}) is None
