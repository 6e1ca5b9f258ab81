"""A process that was killed leaves no other behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = """
import sys, time
from moelab.processes import die_with

die_with(int(sys.argv[1]))
print(1, flush=True)
time.sleep(600)
"""
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _runs(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_child_whose_parent_is_gone_already_does_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(os.getppid())], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


SLOW = """
import os, time
from dataclasses import dataclass
from pathlib import Path
import moelab

@dataclass
class Options:
    folder: str = "."

def slow(options, context):
    def apply(document):
        (Path(options.folder) / f"{os.getpid()}.begun").touch()
        time.sleep(600)
    return apply

@moelab.hookimpl
def moelab_text_filters():
    return [moelab.component("slow", Options, slow)]
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise")
def test_curation_that_is_killed_leaves_no_worker(tmp_path: Path) -> None:
    (tmp_path / "slow_filter.py").write_text(SLOW)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(3000)))
    (tmp_path / "data.yaml").write_text(
        f"plugins: [slow_filter]\nentry_points: false\nworkers: 2\noutput: {tmp_path / 'out'}\n"
        f"sources: [{{name: jsonl, paths: [{tmp_path / 'a.jsonl'}]}}]\n"
        f"stages: [{{name: slow, folder: {tmp_path}}}]\n"
    )
    command = [sys.executable, "-m", "moelab", "data", str(tmp_path / "data.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (begun := list(tmp_path.glob("*.begun"))):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while any(_runs(int(path.stem)) for path in begun):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Alive, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
