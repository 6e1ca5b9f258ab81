"""Kills each command at every one of its file operations, goes on, and compares with the undisturbed result.

    python benchmarks/kill_points.py [NAME...] [--every 1] [--output benchmarks/results]

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import small_runs
from killing import WRITES, Ending, Kill, Operation, run
from report import machine, markdown_table, write_results
from small_runs import OUTPUT, RUN, command, contents, copy, differences, write_config

Check = Callable[[Path, Sequence[Operation]], list[str]]  # (folder, what was done) -> what is wrong


@dataclass
class Scenario:
    """A command in a folder of its own. `start` is copied there first; paths below are within the folder."""

    name: str
    start: Path
    first: Callable[[Path], Callable[[], int]]
    again: Callable[[Path], Callable[[], int]]
    check: Check = lambda folder, done: []
    refused_when_done: bool = False  # the second time it is refused (exit code 2) where the first one was complete
    skip: tuple[str, ...] = ()  # files that are not compared


@dataclass
class Tried:
    """What came of a scenario."""

    name: str
    operations: int = 0
    points: int = 0
    problems: list[str] = field(default_factory=list)


def enumerate_points(scenario: Scenario, scratch: Path, every: int = 1) -> Tried:
    """Each point, or each `every`-th."""
    folder = scratch / "work"
    copy(scenario.start, folder)
    whole = run(scenario.first(folder), folder)
    assert whole.code == 0, whole.said
    wanted = contents(folder, scenario.skip)
    kills = [Kill(at) for at in range(len(whole.operations))]
    kills += [Kill(at, torn=True) for at, one in enumerate(whole.operations) if one.kind in WRITES]
    tried = Tried(scenario.name, len(whole.operations))
    for kill in sorted(kills, key=lambda kill: (kill.at, kill.torn))[::every]:
        copy(scenario.start, folder)
        tried.points += 1
        at = whole.operations[kill.at]
        where = f"{scenario.name}, {'in' if kill.torn else 'before'} {kill.at} ({at.kind} {at.path})"
        ending = run(scenario.first(folder), folder, kill)
        problems = [] if ending.code == -9 else [f"not killed: exit code {ending.code}, {ending.said[-300:]}"]
        problems += scenario.check(folder, whole.operations[: kill.at])
        problems += _go_on(scenario, folder, wanted)
        tried.problems += [f"{where}: {problem}" for problem in problems]
    return tried


def _go_on(scenario: Scenario, folder: Path, wanted: dict[str, Any]) -> list[str]:
    ending: Ending = run(scenario.again(folder), folder)
    found = differences(wanted, contents(folder, scenario.skip))
    if ending.code == 2 and scenario.refused_when_done and not found:
        return []
    return found + ([] if ending.code == 0 else [f"exit code {ending.code}: {ending.said[-300:]}"])


def has_a_checkpoint(folder: Path, done: Sequence[Operation]) -> list[str]:
    """Once one was put in place, there is always one that can be read."""
    renamed = [one for one in done if one.kind == "rename" and Path(one.path).name.startswith("step_")]
    return readable(folder) if renamed else []


def readable(folder: Path) -> list[str]:
    """The newest checkpoint, if there is a folder of checkpoints that are not half written."""
    from moelab.checkpoint import MODEL, TRAINING, newest_checkpoint, read_state, read_tensors
    from moelab.errors import CheckpointError

    newest = newest_checkpoint(folder / RUN)
    if newest is None:
        return ["no checkpoint is left"] if list((folder / RUN / "checkpoints").glob("step_*")) else []
    try:
        read_state(newest), read_tensors(newest / MODEL), read_tensors(newest / TRAINING)
    except CheckpointError as error:
        return [f"the newest checkpoint can't be read: {error}"]
    return []


def is_old_or_new(names: Sequence[str], old: dict[str, Any], new: dict[str, Any]) -> Check:
    """Each of these files, or all below these folders, is as it was or as it will be: never absent, never mixed."""

    def check(folder: Path, done: Sequence[Operation]) -> list[str]:
        found = contents(folder)
        problems = []
        for name in names:
            here, before, after = (
                {key: value for key, value in tree.items() if key == name or key.startswith(f"{name}/")}
                for tree in (found, old, new)
            )
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


def scenarios(scratch: Path, steps: int = 24, upcycling_workers: int = 1) -> list[Scenario]:
    """All that is enumerated; `scratch` gets what they start from."""
    fresh = scratch / "fresh"
    write_config(fresh, train={"steps": steps})
    trained = scratch / "trained"
    copy(fresh, trained)
    _must(run(_train(trained), trained))
    two = scratch / "two"
    copy(trained, two)
    _must(run(_train(two, "seed=1", f"run_dir={two / 'other'}"), two))
    softmax = scratch / "softmax"
    copy(fresh, softmax)
    _must(run(_train(softmax, *small_runs.EXPORTABLE), softmax))
    exported = scratch / "exported"
    copy(softmax, exported)
    _must(run(command("export", exported / RUN, exported / OUTPUT, "--dtype", "bfloat16"), exported))
    return [
        *(_training(fresh, keep) for keep in (2, 1)),
        Scenario("train --force", trained, _starting_over, _starting_over),
        _exporting(scratch, softmax),
        _replacing(scratch, exported),
        _upcycling(scratch, upcycling_workers),
        _comparing(scratch, two),
    ]  # fmt: skip


def _train(folder: Path, *more: str) -> Callable[[], int]:
    return command("train", folder / "small.yaml", f"run_dir={folder / RUN}", *more)


def _training(fresh: Path, keep: int) -> Scenario:
    own = f"train.keep_checkpoints={keep}"
    return Scenario(
        f"train, keep_checkpoints={keep}", fresh, lambda f: _train(f, own), lambda f: _train(f, own, "--resume"),
        has_a_checkpoint,
    )  # fmt: skip


def _starting_over(folder: Path) -> Callable[[], int]:
    return _train(folder, "seed=3", "--force")


def _exporting(scratch: Path, trained: Path) -> Scenario:
    def export(folder: Path) -> Callable[[], int]:
        return command("export", folder / RUN, folder / OUTPUT, "--max-shard-size", "9KB")

    new = _after(scratch, trained, export)
    return Scenario("export", trained, export, export, is_old_or_new([OUTPUT], {}, new), refused_when_done=True)


def _replacing(scratch: Path, exported: Path) -> Scenario:
    def export(folder: Path) -> Callable[[], int]:
        return command("export", folder / RUN, folder / OUTPUT, "--force")

    old, new = contents(exported), _after(scratch, exported, export)
    return Scenario("export --force", exported, export, export, is_old_or_new([OUTPUT], old, new))


def _upcycling(scratch: Path, workers: int) -> Scenario:
    from make_source import make_source
    from moelab.config.model import ModelConfig

    start = scratch / "dense"
    model = ModelConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(None):
        make_source(start / "source", model)
    layout = "{name: uniform, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 16}"

    def upcycle(folder: Path) -> Callable[[], int]:
        return command(
            "upcycle", f"source={folder / 'source'}", f"output={folder / OUTPUT}", f"workers={workers}",
            "entry_points=false", "max_shard_size=20KB", f"model.moe.layout={layout}",
            "model.moe.shared_expert={name: gated, intermediate_size: 32}",
        )  # fmt: skip

    return Scenario("upcycle", start, upcycle, upcycle, index_means_complete(_after(scratch, start, upcycle)))


def _comparing(scratch: Path, two: Path) -> Scenario:
    def compare(folder: Path) -> Callable[[], int]:
        return command("compare", folder / RUN, folder / "other", "--output", folder / "report")

    new = _after(scratch, two, compare)
    start = scratch / "compared"
    copy(two, start)
    other = _after(scratch, start, lambda f: command("compare", f / RUN, "--output", f / "report"), keep=start)
    names = ["report/report.html", "report/comparison.json"]
    return Scenario("compare", start, compare, compare, is_old_or_new(names, other, new))


def _after(
    scratch: Path, start: Path, first: Callable[[Path], Callable[[], int]], keep: Path | None = None
) -> dict[str, Any]:
    """What is there when it ran undisturbed; the folder itself becomes `keep`."""
    folder = scratch / "work"  # where it will run later: some files name it
    copy(start, folder)
    _must(run(first(folder), folder))
    if keep is not None:
        copy(folder, keep)
    return contents(folder)


def _must(ending: Ending) -> None:
    if ending.code:
        raise SystemExit(f"the undisturbed command failed, exit code {ending.code}: {ending.said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="scenarios; all of them without any")
    parser.add_argument("--every", type=int, default=1, help="try each n-th point")
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--output", type=Path, help="also write kill_points.json and .md there")
    arguments = parser.parse_args()
    small_runs.load_libraries()
    scratch = Path(tempfile.mkdtemp(prefix="kill_points."))
    found: list[Tried] = []
    try:
        known = {one.name: one for one in scenarios(scratch, arguments.steps)}
        for name in arguments.names or known:
            tried = enumerate_points(known[name], scratch, arguments.every)
            found.append(tried)
            print(f"{name}: {tried.operations} operations, {tried.points} points, {len(tried.problems)} differences")
            print("".join(f"  {line}\n" for line in tried.problems[:20]), end="", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    table = markdown_table(
        ["command", "file operations", "points killed at", "differences"],
        [[one.name, str(one.operations), str(one.points), str(len(one.problems))] for one in found],
    )
    print(table)
    if arguments.output:
        facts = {key: value for key, value in machine().items() if key not in ("date", "load_average", "gpu")}
        rows = [{**vars(one), "problems": one.problems[:20]} for one in found]
        write_results(arguments.output, "kill_points", facts, rows, [table + "\n"])
    return int(any(one.problems for one in found))


if __name__ == "__main__":
    sys.exit(main())
