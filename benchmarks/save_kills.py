"""Processes of a run are killed in the middle of a save, under `torchrun --max-restarts`, until the run has ended.

    python benchmarks/save_kills.py [--kills 12] [--processes 3] [--seed 0] [--output benchmarks/results]

A plugin of the run counts what a process changes below its folder of checkpoints (`killing.py`) and ends it by SIGKILL
before one of these operations, or in the middle of a write: one process of each attempt, drawn with the operation. By
default there are three processes, over which nothing divides evenly. The folder is then compared with that of an
undisturbed run, as `restart_soak.py` does. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools", "benchmarks")]
sys.path[:0] = SOURCES

from report import machine, markdown_table, write_results  # noqa: E402
from small_runs import contents, differences, write_config  # noqa: E402

STEPS, SAVE_EVERY = 40, 2
OPERATIONS = 70  # of one process, within some saves of which each has about 20 of the main one and 8 of another
FAILED = re.compile(r"exitcode: (-?\d+)\)")

PLUGIN = """
import json
import os
from pathlib import Path

from killing import Kill, Watch
from moelab import hookimpl

HERE = Path(__file__).parent


class Telling(Watch):
    def meet(self, kind, path, half=None):
        before = len(self.operations)
        if self.kill is not None and before == self.kill.at and isinstance(path, (str, bytes, os.PathLike)):
            told = os.path.abspath(os.fsdecode(path))
        elif self.kill is not None and before == self.kill.at:
            told = os.readlink(f"/proc/self/fd/{path}") if path >= 0 else ""
        else:
            told = ""
        if told.startswith(self.folder + os.sep):
            with (HERE / "killed.jsonl").open("a") as file:
                file.write(json.dumps([int(os.environ["RANK"]), kind, told[len(self.folder) + 1 :], self.kill.torn]))
                file.write("\\n")
        super().meet(kind, path, half)


plan = json.loads((HERE / "plan.json").read_text())
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
if attempt < len(plan) and plan[attempt]["rank"] == int(os.environ["RANK"]):
    Telling(HERE / "run" / "checkpoints", Kill(plan[attempt]["at"], plan[attempt]["torn"])).install()


@hookimpl
def moelab_routers():
    return []
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    asked = parser.parse_args()
    draw = random.Random(asked.seed)
    plan = [
        {"rank": draw.randrange(asked.processes), "at": draw.randrange(OPERATIONS), "torn": draw.random() < 0.3}
        for _ in range(asked.kills)
    ]
    with tempfile.TemporaryDirectory() as name:
        wanted, _, _ = launch(Path(name) / "here", asked.processes, [])
        shutil.rmtree(Path(name) / "here")  # the same place, which config.yaml names
        found, killed, code = launch(Path(name) / "here", asked.processes, plan)
    wrong = [*differences(wanted, found), *([f"torchrun ended with {code}"] if code else [])]
    rows = [[str(rank), kind + (", half of it" if torn else ""), path] for rank, kind, path, torn in killed]
    told = (
        f"\n{len(killed)} kills of one of {asked.processes} processes in the middle of a save, of a run of {STEPS} "
        f"steps with a save every {SAVE_EVERY} (seed {asked.seed}; {len(plan)} were drawn, some of them may lie behind "
        f"the end). torchrun ended with {code}. Differences from an undisturbed run: {'; '.join(wrong) or 'none'}.\n"
    )
    print(told)
    facts = machine() | {"processes": asked.processes}
    lines = [told, markdown_table(["rank", "killed before", "of"], rows), ""]
    write_results(asked.output, "save_kills", facts, [{"killed": killed, "wrong": wrong, "code": code}], lines)
    return 1 if wrong else 0


def launch(folder: Path, processes: int, plan: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any], int]:
    """One launch to its end -> (what its folder holds, the kills, torchrun's exit code)."""
    train = {"steps": STEPS, "batch_size": 2 * processes, "save_every": SAVE_EVERY, "log_every": 5}
    config = write_config(folder, train=train, evaluation={"every": 16})
    (folder / "save_killer.py").write_text(PLUGIN)
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", "1000", "-m", "moelab", "train", str(config), f"run_dir={folder / 'run'}"]
    command += ["plugins=[save_killer]", f"parallel.shard={processes}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    told = folder / "killed.jsonl"
    killed = [json.loads(line) for line in told.read_text().splitlines()] if told.exists() else []
    unasked = [code for code in FAILED.findall(said.stderr) if code not in ("-9", "1")]
    if said.returncode or unasked:
        print(said.stderr[-6000:], file=sys.stderr)
    return contents(folder / "run"), killed, said.returncode or len(unasked)


if __name__ == "__main__":
    sys.exit(main())
