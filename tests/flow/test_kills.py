"""Killed at each of its file operations and gone on with, a command ends as if nothing had happened.

A sample of what benchmarks/kill_points.py and benchmarks/soak.py try by hand, in a process that has computed nothing,
since it forks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SAMPLE = """
import shutil
import small_runs
small_runs.load_libraries()
import kill_points, moelab.hf.save
from kill_points import in_a_folder_of_its_own

for name, every in (("train, keep_checkpoints=1", 40), ("save_hf over another", 1)):
    tried = in_a_folder_of_its_own(name, steps=4, every=every)
    assert tried.points >= tried.operations // every > 10, tried
    assert not tried.problems, "\\n".join(tried.problems)


def put_in_place(new, target):
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


moelab.hf.save.put_in_place = put_in_place
found = in_a_folder_of_its_own("save_hf over another", steps=4, every=3).problems
assert any("neither the old nor the new one" in line for line in found), "a planted window was not seen"
print("seen to the end")
"""


def test_no_kill_point_of_a_small_run_or_save_leaves_anything_else(root: Path) -> None:
    """The sample is whole: a window that is planted is seen."""
    path = os.pathsep.join([str(root / "benchmarks"), os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", SAMPLE], cwd=root, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert "seen to the end" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
