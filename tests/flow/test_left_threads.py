"""A plugin's thread that does not end: the command does, with what it printed and its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """import moelab, sys, threading
def forever():
    threading.Event().wait()
def to_the_end():
    threading.main_thread().join()
    print("brought away", file=sys.stderr)
threading.Thread(target={target}, name="watcher").start()
@moelab.hookimpl
def moelab_routers():
    return []
"""


def started(folder: Path, target: str, *arguments: str) -> subprocess.Popen[str]:
    (folder / "my_lab.py").write_text(PLUGIN.format(target=target))
    return subprocess.Popen(
        [sys.executable, "-m", "moelab", *arguments, "plugins=[my_lab]"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("name", "code"), [("softmax_topk", 0), ("no_such_thing", 2)])
def test_a_command_ends_with_its_code_and_says_whose_thread_stays(name: str, code: int, tmp_path: Path) -> None:
    process = started(tmp_path, "forever", "plugins", name)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert ("Softmax" in out) == (code == 0)
    assert err.splitlines()[-1] == (
        "warning: the command is done and ends though a thread still runs, 'watcher' of my_lab (my_lab.py:2); a "
        "plugin's thread must end by itself or be a daemon"
    )


def test_a_thread_that_goes_when_the_command_is_done_is_let_go_in_peace(tmp_path: Path) -> None:
    process = started(tmp_path, "to_the_end", "plugins", "softmax_topk")
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (0, "brought away\n")


def test_a_run_waits_for_a_thread_that_may_bring_its_data_away_and_says_so(root: Path, tmp_path: Path) -> None:
    config = [str(root / "configs/train/tiny_moe.yaml"), "run_dir=run", "train.steps=1", "evaluation.sequences=1"]
    process = started(tmp_path, "forever", "train", *config)
    assert process.stderr is not None
    wait = "warning: the command is done and waits for a thread that still runs, 'watcher' of my_lab (my_lab.py:2)"
    try:
        assert next((line for line in process.stderr if line.startswith(wait)), "").endswith("Ctrl-C ends without it\n")
        assert (tmp_path / "run/summary.json").exists()
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGINT
    finally:
        process.kill()
