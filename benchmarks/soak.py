"""Hundreds of runs, each killed several times at random and gone on with, compared bit by bit with undisturbed ones.

    python benchmarks/soak.py [--kills 300] [--seed 0] [--processes 1] [--output benchmarks/results]

Training is killed by SIGKILL, SIGTERM, and SIGINT once or twice, at a moment or at a file operation; export --force
and upcycle by SIGKILL at a moment. Compared are weights, moments, counters of every checkpoint that is left,
metrics.jsonl, evaluation_documents.jsonl, summary.json and config.yaml, all but clocks. One core; a kill takes about a
second. Exit code 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kill_points
import small_runs
from kill_points import Scenario, must, upcycling
from killing import Ending, Kill, fork, run, wait
from moelab.manifest import MANIFEST
from report import machine, markdown_table, write_results
from small_runs import RUN, command, contents, copy, differences, write_config

SIGNALS = {
    "SIGKILL": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,), "SIGINT": (signal.SIGINT,),
    "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}  # fmt: skip
SETTINGS = (  # of training; each is run undisturbed once
    {},
    {"keep_checkpoints": 1, "save_every": 1},
    {"keep_checkpoints": 0, "save_every": 5, "log_every": 1},
    {"save_every": 0, "log_every": 7, "micro_batch_size": 1},
    {"dtype": "bfloat16", "save_every": 6},
    {"log_every": 1, "probe_every": 1},
)
STEPS = 24


@dataclass
class Reference:
    """An undisturbed run of one setting."""

    config: Path  # the folder that holds small.yaml
    seconds: float
    operations: int
    whole: dict[str, Any]
    each_step: dict[str, Any]  # the checkpoints of all steps


@dataclass
class Replaced:
    """A command that is killed and run again: what it ends as, and how long it takes undisturbed."""

    name: str
    scenario: Scenario
    wanted: dict[str, Any]
    seconds: float


@dataclass
class Soak:
    """What is counted."""

    chance: random.Random
    scratch: Path
    kills: Counter[str] = field(default_factory=Counter)
    missed: int = 0  # it had ended before
    runs: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def train_once(soak: Soak, reference: Reference) -> None:
    """A run killed one to six times, then let to its end."""
    folder = soak.scratch / "soaked"
    copy(reference.config, folder)
    interrupted, story = False, []
    for attempt in range(soak.chance.randint(1, 6)):
        how = soak.chance.choice(list(SIGNALS))
        ending = _disturbed(soak, _train(folder, resume=attempt > 0), folder, how, reference)
        story.append(f"{how} ({ending.code})")
        interrupted |= how != "SIGKILL"
        if ending.code == 0:
            soak.missed += 1
        elif ending.code in (-signal.SIGKILL, -signal.SIGTERM, 130):
            soak.kills[how] += 1
        else:
            soak.problems.append(f"{', '.join(story)}: {ending.said[-400:]}")
        soak.problems += [f"{', '.join(story)}: {one}" for one in kill_points.readable(folder)]
    ending = run(_train(folder, resume=True), folder)
    soak.runs["train"] += 1
    found = [] if ending.code == 0 else [f"exit code {ending.code}: {ending.said[-400:]}"]
    found += _compare(contents(folder), reference, interrupted)
    soak.problems += [f"{', '.join(story)}: {one}" for one in found]


def _train(folder: Path, *, resume: bool) -> Callable[[], int]:
    return command("train", folder / "small.yaml", f"run_dir={folder / RUN}", *(["--resume"] if resume else []))


def _disturbed(soak: Soak, first: Callable[[], int], folder: Path, how: str, reference: Reference) -> Ending:
    """At one of the file operations, at one of them in the middle, or at a moment."""
    chance, signals = soak.chance, SIGNALS[how]
    if chance.random() < 0.6:
        at = int(reference.operations * chance.random() ** 2)  # a run that goes on has fewer of them
        torn = how == "SIGKILL" and chance.random() < 0.3  # what goes on after it would write the half twice
        return run(first, folder, Kill(at, torn, signals))
    process, report = fork(first, folder)
    time.sleep(chance.uniform(0.0, 0.6 * reference.seconds))
    for number in signals:
        os.kill(process, number)
        time.sleep(chance.uniform(0.0, 0.05))
    return wait(process, report)


def _compare(found: dict[str, Any], reference: Reference, interrupted: bool) -> list[str]:
    """An interrupted run saved at its step too: then each checkpoint is compared with that of the same step."""
    if not interrupted:
        return differences(reference.whole, found)
    inside = f"{RUN}/checkpoints/"
    lines = differences(
        *({k: v for k, v in tree.items() if not k.startswith(inside)} for tree in (reference.whole, found))
    )
    own = ("config.yaml", MANIFEST)  # they say save_every; and undisturbed runs save nothing at step 0
    left = {
        key: value
        for key, value in found.items()
        if key.startswith(inside) and not key.endswith(own) and "step_00000000" not in key
    }
    newest = f"{inside}step_{STEPS:08d}/state.json"
    return lines + differences({k: reference.each_step.get(k) for k in left | {newest: None}}, left)


def replace_once(soak: Soak, one: Replaced) -> None:
    """A command that is killed at a moment one to three times, then let to its end."""
    scenario, name = one.scenario, one.name
    folder = soak.scratch / "work"
    copy(scenario.start, folder)
    for _ in range(soak.chance.randint(1, 2)):
        process, report = fork(scenario.first(folder), folder)
        time.sleep(soak.chance.uniform(0.0, one.seconds))
        os.kill(process, signal.SIGKILL)
        killed = wait(process, report).code == -signal.SIGKILL
        soak.kills[f"SIGKILL of {name}"] += killed
        soak.missed += not killed
        soak.problems += [f"{name}: {line}" for line in scenario.check(folder, [])]
    ending = run(scenario.again(folder), folder)
    soak.runs[name] += 1
    found = differences(one.wanted, contents(folder)) + ([] if ending.code == 0 else [ending.said[-400:]])
    soak.problems += [f"{name}: {line}" for line in found]


def references(scratch: Path) -> list[Reference]:
    """Each setting undisturbed, as it is and with a checkpoint at each step."""
    made = []
    for number, setting in enumerate(SETTINGS):
        config = scratch / f"config{number}"
        write_config(config, train={"steps": STEPS, **setting})
        folder = scratch / "soaked"
        copy(config, folder)
        started = time.monotonic()
        ending = must(run(_train(folder, resume=False), folder))
        seconds, whole = time.monotonic() - started, contents(folder)
        copy(config, folder)
        each = ("train.save_every=1", "train.keep_checkpoints=0")
        must(run(command("train", folder / "small.yaml", f"run_dir={folder / RUN}", *each), folder))
        made.append(Reference(config, seconds, len(ending.operations), whole, contents(folder)))
    return made


def others(scratch: Path) -> list[Replaced]:
    """export --force, and upcycle by two processes."""
    starts = kill_points.Starts(scratch, STEPS)
    made = []
    known = {"export --force": kill_points.SCENARIOS["export --force"](starts), "upcycle": upcycling(starts, workers=2)}
    for name, scenario in known.items():
        started = time.monotonic()
        wanted = starts.after(scenario.start, scenario.first)
        made.append(Replaced(name, scenario, wanted, time.monotonic() - started))
    return made


def soak_for(kills: int, seed: int) -> Soak:
    """Until so many kills hit."""
    scratch = Path(tempfile.mkdtemp(prefix="soak."))
    soak = Soak(random.Random(seed), scratch)
    try:
        known, replaced = references(scratch), others(scratch)
        while soak.kills.total() < kills:
            if soak.chance.random() < 0.8:
                train_once(soak, soak.chance.choice(known))
            else:
                replace_once(soak, soak.chance.choice(replaced))
            print(f"seed {seed}: {soak.kills.total()} kills, {soak.runs.total()} runs", flush=True)
            if soak.problems:
                print(*soak.problems[-3:], sep="\n", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return soak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300, help="that hit, at least, in each process")
    parser.add_argument("--seed", type=int, default=0, help="of the first process; the next has the next")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write soak.json and .md there")
    arguments = parser.parse_args()
    small_runs.load_libraries()
    seeds = range(arguments.seed, arguments.seed + arguments.processes)
    with ProcessPoolExecutor(arguments.processes, get_context("fork")) as pool:
        soaks = list(pool.map(partial(soak_for, arguments.kills), seeds))
    kills, runs = (sum((getattr(soak, name) for soak in soaks), Counter[str]()) for name in ("kills", "runs"))
    missed, problems = sum(soak.missed for soak in soaks), [line for soak in soaks for line in soak.problems]
    rows = [[how, str(count)] for how, count in sorted(kills.items())]
    rows += [["together", str(kills.total())], ["came too late", str(missed)]]
    rows += [["run again and compared", str(runs.total())], ["differences", str(len(problems))]]
    table = markdown_table(["what", "how often"], rows)
    print(table, *problems[:50], sep="\n")
    if arguments.output:
        facts = {key: value for key, value in machine().items() if key not in ("date", "load_average", "gpu")}
        results = {"seeds": list(seeds), "kills": kills, "missed": missed, "runs": runs, "problems": problems[:50]}
        write_results(arguments.output, "soak", facts, results, [table + "\n"])
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
