"""Kills each command at every one of its file operations, goes on, and compares with the undisturbed result.

    python benchmarks/kill_points.py [NAME...] [--every 1] [--processes 1] [--output benchmarks/results]

A point is a kill (SIGKILL) before an operation, or in the middle of a write. After each: what was whole must still be
there and readable; the command runs again (training with --resume); then every file must be equal, bit for bit but for
clocks, and nothing left over. Prints a table; exit code 1 where anything differs. Minutes on one core; --every 10 is
a sample.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import moelab.atomic
import small_runs
from killing import WRITES, Ending, Kill, Operation, run
from make_source import make_source
from moelab.builder import build_model
from moelab.config.model import ModelConfig
from moelab.hf.save import save_hf
from report import machine, markdown_table, write_results
from small_runs import OUTPUT, RUN, command, contents, copy, differences, write_config

Check = Callable[[Path, Sequence[Operation]], list[str]]  # (folder, what was done) -> what is wrong


@dataclass
class Scenario:
    """A command in a folder of its own, where `start` is copied first."""

    start: Path
    first: Callable[[Path], Callable[[], int]]
    again: Callable[[Path], Callable[[], int]]
    check: Check = lambda folder, done: []
    refused_when_done: bool = False  # the second time it is refused (exit code 2) where the first one was complete


@dataclass
class Tried:
    """What came of a scenario."""

    name: str
    operations: int = 0
    points: int = 0
    problems: list[str] = field(default_factory=list)


def enumerate_points(name: str, scenario: Scenario, scratch: Path, every: int = 1) -> Tried:
    """Each point, or each `every`-th."""
    folder = scratch / "work"
    copy(scenario.start, folder)
    whole = must(run(scenario.first(folder), folder))
    wanted = contents(folder)
    kills = [Kill(at) for at in range(len(whole.operations))]
    kills += [Kill(at, torn=True) for at, one in enumerate(whole.operations) if one.kind in WRITES]
    tried = Tried(name, len(whole.operations))
    for kill in sorted(kills, key=lambda kill: (kill.at, kill.torn))[::every]:
        copy(scenario.start, folder)
        tried.points += 1
        at = whole.operations[kill.at]
        where = f"{name}, {'in' if kill.torn else 'before'} {kill.at} ({at.kind} {at.path})"
        ending = run(scenario.first(folder), folder, kill)
        problems = [] if ending.code == -9 else [f"not killed: exit code {ending.code}, {ending.said[-300:]}"]
        problems += scenario.check(folder, whole.operations[: kill.at])
        problems += _go_on(scenario, folder, wanted)
        tried.problems += [f"{where}: {problem}" for problem in problems]
    return tried


def _go_on(scenario: Scenario, folder: Path, wanted: dict[str, Any]) -> list[str]:
    ending: Ending = run(scenario.again(folder), folder)
    found = differences(wanted, contents(folder))
    found += [f"left over: {path.relative_to(folder)}" for path in sorted(folder.rglob(".*lock"))]
    if ending.code == 2 and scenario.refused_when_done and not found:
        return []
    return found + ([] if ending.code == 0 else [f"exit code {ending.code}: {ending.said[-300:]}"])


def has_a_checkpoint(folder: Path, done: Sequence[Operation]) -> list[str]:
    """Once one was put in place, there is always one that can be read."""
    renamed = [one for one in done if one.kind == "rename" and Path(one.path).name.startswith("step_")]
    return readable(folder) if renamed else []


def readable(folder: Path) -> list[str]:
    """The newest checkpoint, if there is a folder of checkpoints that are not half written."""
    from moelab.checkpoint import MODEL, TRAINING, newest_checkpoint, read_state, stored_tensors
    from moelab.errors import CheckpointError

    newest = newest_checkpoint(folder / RUN)
    if newest is None:
        return ["no checkpoint is left"] if list((folder / RUN / "checkpoints").glob("step_*")) else []
    try:
        (
            read_state(newest),
            [stored.read() for name in (MODEL, TRAINING) for stored in stored_tensors(newest, name).values()],
        )
    except CheckpointError as error:
        return [f"the newest checkpoint can't be read: {error}"]
    return []


def is_old_or_new(
    names: Sequence[str], old: dict[str, Any], new: dict[str, Any], aside: Mapping[str, str] | None = None
) -> Check:
    """Each of these files, or all below these folders, is as it was or as it will be: never absent, never mixed.

    `aside`: where else the old one may be, whole.
    """

    def below(tree: dict[str, Any], name: str) -> dict[str, Any]:
        return {key[len(name) :]: one for key, one in tree.items() if key == name or key.startswith(f"{name}/")}

    def check(folder: Path, done: Sequence[Operation]) -> list[str]:
        found = contents(folder)
        problems = []
        for name in names:
            here, before, after = (below(tree, name) for tree in (found, old, new))
            if not here and aside is not None and name in aside:
                here = below(found, aside[name])
            if here not in (before, after):
                problems.append(f"{name} is neither the old nor the new one: {differences(after, here)[:3]}")
        return problems

    return check


def index_means_complete(new: dict[str, Any]) -> Check:
    """Where an upcycling's index stands, so does all that it names."""

    def check(folder: Path, done: Sequence[Operation]) -> list[str]:
        found = contents(folder)
        if f"{OUTPUT}/model.safetensors.index.json" not in found:
            return []
        missing = [name for name in new if name.startswith(OUTPUT) and name not in found and "receipt" not in name]
        return [f"the index stands beside {missing} missing"] if missing else []

    return check


@dataclass
class Starts:
    """What the scenarios begin with, each made when it is first asked for, below `scratch`."""

    scratch: Path
    steps: int = 24

    @cached_property
    def fresh(self) -> Path:
        """A config alone."""
        folder = self.scratch / "fresh"
        write_config(folder, train={"steps": self.steps, "save_every": max(1, self.steps // 4)})
        return folder

    @cached_property
    def trained(self) -> Path:
        """And its run."""
        return self._made("trained", self.fresh, _train)

    @cached_property
    def two(self) -> Path:
        """And another seed's."""
        return self._made("two", self.trained, lambda f: _train(f, "seed=1", f"run_dir={f / 'other'}"))

    @cached_property
    def softmax(self) -> Path:
        """A run that Hugging Face's format can hold."""
        return self._made("softmax", self.fresh, lambda f: _train(f, *small_runs.EXPORTABLE))

    @cached_property
    def exported(self) -> Path:
        """And its export, in another dtype than it will be replaced by."""
        return self._made(
            "exported", self.softmax, lambda f: command("export", f / RUN, f / OUTPUT, "--dtype", "bfloat16")
        )

    @cached_property
    def compared(self) -> Path:
        """Two runs, and a report of one of them."""
        return self._made("compared", self.two, lambda f: command("compare", f / RUN, "--output", f / "report"))

    @cached_property
    def dense(self) -> Path:
        """A checkpoint to upcycle."""
        model = ModelConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        with contextlib.redirect_stdout(None):
            make_source(self.scratch / "dense" / "source", model)
        return self.scratch / "dense"

    def after(self, start: Path, first: Callable[[Path], Callable[[], int]]) -> dict[str, Any]:
        """What is there when it ran undisturbed, where it will run later: some files name the place."""
        folder = self.scratch / "work"
        copy(start, folder)
        must(run(first(folder), folder))
        return contents(folder)

    def _made(self, name: str, start: Path, first: Callable[[Path], Callable[[], int]]) -> Path:
        self.after(start, first)
        copy(self.scratch / "work", self.scratch / name)
        return self.scratch / name


def _train(folder: Path, *more: str) -> Callable[[], int]:
    return command("train", folder / "small.yaml", f"run_dir={folder / RUN}", *more)


def _training(starts: Starts, keep: int) -> Scenario:
    own = f"train.keep_checkpoints={keep}"
    return Scenario(starts.fresh, lambda f: _train(f, own), lambda f: _train(f, own, "--resume"), has_a_checkpoint)


def _starting_over(starts: Starts) -> Scenario:
    def start_over(folder: Path) -> Callable[[], int]:
        return _train(folder, "seed=3", "--force")

    return Scenario(starts.trained, start_over, start_over)


def _exporting(starts: Starts) -> Scenario:
    def export(folder: Path) -> Callable[[], int]:
        return command("export", folder / RUN, folder / OUTPUT, "--max-shard-size", "9KB")

    check = is_old_or_new([OUTPUT], {}, starts.after(starts.softmax, export))
    return Scenario(starts.softmax, export, export, check, refused_when_done=True)


def _replacing(starts: Starts, exchange: bool = True) -> Scenario:
    def export(folder: Path) -> Callable[[], int]:
        replace = command("export", folder / RUN, folder / OUTPUT, "--force")

        def without_exchange() -> int:
            moelab.atomic.exchange = lambda one, other: False
            return replace()

        return replace if exchange else without_exchange

    old, new = contents(starts.exported), starts.after(starts.exported, export)
    aside = {} if exchange else {OUTPUT: f".{OUTPUT}.replaced"}
    return Scenario(starts.exported, export, export, is_old_or_new([OUTPUT], old, new, aside))


def _saving(starts: Starts) -> Scenario:
    """The same from Python, a model of two thousand parameters: cheap enough for the tests."""
    config = ModelConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip

    def save(folder: Path, seed: int = 1) -> Callable[[], int]:
        return lambda: save_hf(build_model(config, seed=seed), folder / OUTPUT, max_shard_size=2000, force=True) or 0  # type: ignore[func-returns-value]

    start = starts.scratch / "saved"
    start.mkdir()
    must(run(save(start, seed=0), start))
    return Scenario(start, save, save, is_old_or_new([OUTPUT], contents(start), starts.after(start, save)))


def upcycling(starts: Starts, workers: int = 1) -> Scenario:
    """By this process, or by several of its own, whose operations are not seen."""
    layout = "{name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}"

    def upcycle(folder: Path) -> Callable[[], int]:
        return command(
            "upcycle", f"source={folder / 'source'}", f"output={folder / OUTPUT}", f"workers={workers}",
            "entry_points=false", "max_shard_size=20KB", f"model.moe.layout={layout}",
            "model.moe.shared_expert={name: gated, intermediate_size: 32}",
        )  # fmt: skip

    return Scenario(starts.dense, upcycle, upcycle, index_means_complete(starts.after(starts.dense, upcycle)))


def _comparing(starts: Starts) -> Scenario:
    def compare(folder: Path) -> Callable[[], int]:
        return command("compare", folder / RUN, folder / "other", "--output", folder / "report")

    names = ["report/report.html", "report/comparison.json"]
    check = is_old_or_new(names, contents(starts.compared), starts.after(starts.compared, compare))
    return Scenario(starts.compared, compare, compare, check)


SCENARIOS: dict[str, Callable[[Starts], Scenario]] = {
    "train, keep_checkpoints=2": lambda starts: _training(starts, 2),
    "train, keep_checkpoints=1": lambda starts: _training(starts, 1),
    "train --force": _starting_over,
    "export": _exporting,
    "export --force": _replacing,
    "export --force, no exchange": lambda starts: _replacing(starts, exchange=False),
    "save_hf over another": _saving,
    "upcycle": upcycling,
    "compare": _comparing,
}


def must(ending: Ending) -> Ending:
    """Of what is not disturbed."""
    if ending.code:
        raise SystemExit(f"an undisturbed command failed, exit code {ending.code}: {ending.said}")
    return ending


def in_a_folder_of_its_own(name: str, steps: int, every: int) -> Tried:
    """A scenario from nothing to its end."""
    scratch = Path(tempfile.mkdtemp(prefix="kill_points."))
    try:
        return enumerate_points(name, SCENARIOS[name](Starts(scratch, steps)), scratch, every)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all of them without any: {'; '.join(SCENARIOS)}")
    parser.add_argument("--every", type=int, default=1, help="try each n-th point")
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--processes", type=int, default=1, help="scenarios at a time")
    parser.add_argument("--output", type=Path, help="also write kill_points.json and .md there")
    arguments = parser.parse_args()
    small_runs.load_libraries()
    names, found = arguments.names or list(SCENARIOS), []
    one = partial(in_a_folder_of_its_own, steps=arguments.steps, every=arguments.every)
    with ProcessPoolExecutor(arguments.processes, get_context("fork")) as pool:
        for tried in pool.map(one, names):
            found.append(tried)
            counts = f"{tried.operations} operations, {tried.points} points, {len(tried.problems)} differences"
            print(f"{tried.name}: {counts}", *tried.problems[:20], sep="\n  ", flush=True)
    table = markdown_table(
        ["command", "file operations", "points killed at", "differences"],
        [[tried.name, str(tried.operations), str(tried.points), str(len(tried.problems))] for tried in found],
    )
    print(table)
    if arguments.output:
        facts = {key: value for key, value in machine().items() if key not in ("date", "load_average", "gpu")}
        rows = [{**vars(tried), "problems": tried.problems[:20]} for tried in found]
        write_results(arguments.output, "kill_points", facts, rows, [table + "\n"])
    return int(any(tried.problems for tried in found))


if __name__ == "__main__":
    sys.exit(main())
