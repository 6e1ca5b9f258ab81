"""Random processes of a run are killed at random moments under `torchrun --max-restarts`, until it has ended by itself.

    python benchmarks/restart_soak.py [--kills 100] [--minutes 20] [--seed 0] [--output benchmarks/results]

Each launch draws a mesh of 2 or 4 processes and how often it saves; one process is killed by SIGKILL at a moment after
each start, also while the others begin, save or end. The folder is then compared with that of an undisturbed run on the
same mesh: weights, moments and counters of every checkpoint that is left, metrics.jsonl, evaluation_documents.jsonl,
summary.json and config.yaml, all but clocks. Exit code 1 where anything differs, or where a process failed unasked.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools")]
sys.path[:0] = SOURCES

from report import machine, markdown_table, write_results  # noqa: E402
from small_runs import contents, differences, write_config  # noqa: E402

MESHES: dict[str, dict[str, int]] = {
    "replicate2": {"replicate": 2},
    "shard2": {"shard": 2},
    "expert2": {"shard": 2, "expert": 2},
    "shard4_expert2": {"shard": 4, "expert": 2},
}
SAVES = (1, 4, 20)  # steps between checkpoints
STEPS = 200
BEGINS = 10.0  # seconds after a start within which it is killed that is to be killed while it begins
LASTS = 4.0  # seconds after all have joined and built the model, for the others
EACH = 15  # kills in a launch
RUNNING = 0.7  # of the kills
BUILT = "parameters, "  # the main process says how many, when it has
FAILED = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


@dataclass
class Launch:
    """What became of one."""

    mesh: str
    save_every: int
    killed: list[tuple[int, float]] = field(default_factory=list)  # (rank, seconds after its start)
    stopped: list[float] = field(default_factory=list)  # seconds from a kill until all others were gone
    running: int = 0  # kills of a process that trained, saved or evaluated
    built: int = 0  # attempts that got so far
    named: int = 0  # kills of which a message named the rank
    code: int = 0
    unasked: list[str] = field(default_factory=list)  # failures of processes that nobody killed
    different: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results")
    asked = parser.parse_args()
    draw, ends = random.Random(asked.seed), time.monotonic() + 60 * asked.minutes
    references: dict[tuple[str, int], dict[str, Any]] = {}
    launches: list[Launch] = []
    with tempfile.TemporaryDirectory() as name:
        while sum(len(one.killed) for one in launches) < asked.kills and time.monotonic() < ends:
            launch = Launch(draw.choices(list(MESHES), weights=(2, 2, 3, 1))[0], draw.choice(SAVES))
            key = (launch.mesh, launch.save_every)
            if key not in references:
                undisturbed = Launch(*key)
                references[key] = soak(undisturbed, Path(name) / "run", None, 0, ends)
                assert (undisturbed.code, undisturbed.unasked) == (0, []), undisturbed
            most = min(EACH, asked.kills - sum(len(one.killed) for one in launches))
            found = soak(launch, Path(name) / "run", draw, most, ends)
            launch.different = differences(references[key], found)
            launches.append(launch)
            print(launch, flush=True)
    return tell(launches, asked)


def soak(launch: Launch, folder: Path, draw: random.Random | None, most: int, ends: float) -> dict[str, Any]:
    """One launch to its end, with kills by `draw`; -> what its folder holds."""
    shutil.rmtree(folder, ignore_errors=True)
    train = {"steps": STEPS, "batch_size": 4, "save_every": launch.save_every, "log_every": 10}
    config = write_config(folder, train=train, evaluation={"every": 80})
    parallel = MESHES[launch.mesh]
    world = parallel.get("replicate", 1) * parallel.get("shard", 1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["--max-restarts", "1000", "-m", "moelab", "train", str(config), f"run_dir={folder / 'run'}"]
    command += [f"parallel.{key}={value}" for key, value in parallel.items()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES), "OMP_NUM_THREADS": "1"}
    log = folder / "said.txt"
    with log.open("w") as said:
        launcher = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        attempt = 0
        while draw is not None and len(launch.killed) < most and time.monotonic() < ends:
            if not kill_one(launch, launcher, log, attempt, world, draw):
                break
            attempt += 1
        launch.code = launcher.wait()
    text = log.read_text()
    failed = [code for code, _ in FAILED.findall(text)]
    # torchrun tells of the first that it sees: at times it is one that lost the killed one, and ended with 1.
    launch.unasked = [code for code in failed if code not in ("-9", "1")]
    launch.unasked += ["surplus"] * max(0, len(failed) - len(launch.killed) - len(launch.unasked))
    launch.named = len(re.findall(r"rank \d+ \(process \d+ on .*was killed", text))
    if launch.code or launch.unasked:
        print(text[-6000:], file=sys.stderr)
    return contents(folder / "run")


def kill_one(launch: Launch, launcher: Any, log: Path, attempt: int, world: int, draw: random.Random) -> bool:
    """Kill one process of this attempt, at a moment; False where the run ended before."""
    while len(ranks := processes(launcher.pid, attempt)) < world:
        if launcher.poll() is not None:
            return False
        time.sleep(0.05)
    started, rank, running = time.monotonic(), draw.randrange(world), draw.random() < RUNNING
    begun, after = None, draw.uniform(0.0, LASTS if running else BEGINS)
    while begun is None or time.monotonic() < begun + after:
        if launcher.poll() is not None:
            return False
        if begun is None and (not running or log.read_text().count(BUILT) > launch.built):
            begun = time.monotonic()
        time.sleep(0.01)
    launch.built = log.read_text().count(BUILT)
    after = time.monotonic() - started
    try:
        os.kill(ranks[rank], signal.SIGKILL)
    except ProcessLookupError:
        return False
    killed = time.monotonic()
    launch.killed.append((rank, round(after, 2)))
    launch.running += running
    while processes(launcher.pid, attempt) and launcher.poll() is None:
        time.sleep(0.02)
    launch.stopped.append(round(time.monotonic() - killed, 2))
    return True


def processes(parent: int, attempt: int) -> dict[int, int]:
    """{rank: process id} of what a launcher has started in this attempt and still runs."""
    found: dict[int, int] = {}
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except OSError:
        return {}
    for child in children:
        try:
            words = dict(
                word.split("=", 1) for word in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in word
            )
        except OSError:
            continue
        if words.get("TORCHELASTIC_RESTART_COUNT") == str(attempt) and "RANK" in words:
            found[int(words["RANK"])] = int(child)
    return found


def tell(launches: list[Launch], asked: argparse.Namespace) -> int:
    """The results; 1 where something was wrong."""
    running = sum(one.running for one in launches)
    kills = sum(len(one.killed) for one in launches)
    stopped = sorted(seconds for one in launches for seconds in one.stopped)
    bad = [one for one in launches if one.code or one.unasked or one.different]
    rows = [
        [
            one.mesh, str(one.save_every), str(len(one.killed)), str(one.running), str(one.named), str(one.code),
            ", ".join(one.unasked) or "none", "; ".join(one.different[:2]) or "none",
        ]
        for one in launches
    ]  # fmt: skip
    head = [
        "mesh", "steps between saves", "kills", "of these while it ran", "messages with the rank",
        "torchrun's exit code",
        "failures that were no kill", "differences",
    ]  # fmt: skip
    summary = (
        f"\n{kills} kills of a random process ({running} while it trained, saved or evaluated, the others "
        f"while it began) in {len(launches)} launches of {STEPS} steps (seed {asked.seed}); "
        f"{len(launches) - len(bad)} ended by themselves with every file equal to the undisturbed run's. All other "
        f"processes were gone {stopped[len(stopped) // 2] if stopped else 0} s after a kill (median), "
        f"{stopped[-1] if stopped else 0} s at most. A process that is killed before it has joined the others, or "
        "after it has left them, has no one to name it.\n"
    )
    write_results(
        asked.output, "restart_soak", machine(), [vars(one) for one in launches],
        [summary, markdown_table(head, rows), ""],
    )  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
