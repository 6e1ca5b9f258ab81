"""All of `moelab sweep`: plan, refuse, launch, compare."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from moelab.atomic import check_output
from moelab.errors import ConfigError, RunFailure, UserError, near
from moelab.planning.match import Match
from moelab.training.run_folder import prepare_run_folder, write_json
from moelab.training.run_lock import hold
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.report import write_report
from moelab_tools.compare.runs import read_runs
from moelab_tools.compare.table import print_comparison
from moelab_tools.compare.verdict import PRACTICAL
from moelab_tools.sweep.axes import MOST_RUNS, parse_words
from moelab_tools.sweep.launch import LocalWorker, Outcome, Task, Worker, launch
from moelab_tools.sweep.matching import FAR, Matching, match_variants, told
from moelab_tools.sweep.plan import LOGS, RECORD, REPORT, RUNS, PlannedRun, plan_runs, write_config
from moelab_tools.sweep.state import State, state_of


@dataclass(frozen=True)
class SweepRequest:
    """The command line."""

    arguments: Sequence[str]
    out: Path
    jobs: int | None = None  # at a time; None: 1, and all where they outlive the sweep
    matching: Matching | None = None
    baseline: str | None = None  # a variant
    practical: float = PRACTICAL
    dry_run: bool = False
    force: bool = False  # train again what has changed
    trust: bool = False


def run_sweep(request: SweepRequest, console: Console, worker: Worker | None = None) -> Comparison | None:
    """-> the comparison of its runs; None for a dry run.

    Raises UserError before anything is written or started for whatever is wrong in any of the runs, and RunFailure
    when some of them failed, after all others have ended and were compared.
    """
    if not request.dry_run:
        check_output(request.out, "--out")
    planned, matches = plan_sweep(request)
    runs = [run for variant in planned.values() for run in variant]
    states = {run.name: state_of(run) for run in runs}
    _tell_plan(console, request, planned, matches, states)
    refuse_changed(states, force=request.force)
    if request.dry_run:
        return None
    with hold_folder(request.out):
        write_json(request.out / RECORD, _record(request, planned, matches))
        tasks = [train_task(partial(_itself, run), run, request.out, force=request.force) for run in runs]
        at_once, worker = workers(request.jobs, worker)
        outcomes = launch(tasks, worker, console, at_once=at_once)
        comparison = compare_runs(runs, request, console)
    refuse_outcomes(outcomes, request.out)
    return comparison


def plan_sweep(request: SweepRequest) -> tuple[dict[str, list[PlannedRun]], dict[str, Match]]:
    """Every run, checked, and how variants were matched."""
    planned = plan_runs(parse_words(request.arguments), request.out, trust=request.trust)
    if request.baseline is not None and request.baseline not in planned:
        names = list(planned)
        hint = near(request.baseline, names)
        raise ConfigError(f"--baseline {request.baseline}: no such variant{hint} They are: {', '.join(names)}")
    if request.matching is None:
        return planned, {}
    if len(planned) < 2:
        raise ConfigError("--match: there is one variant, so there is nothing to match; give an axis, as in key=a,b")
    reference = request.baseline or next(iter(planned))
    return match_variants(planned, reference, request.matching, request.out, trust=request.trust)


def refuse_changed(states: Mapping[str, State], *, force: bool) -> None:
    """Raises UserError for run folders that hold another run, unless they may be deleted."""
    changed = {name: state.why for name, state in states.items() if state.kind == "changed"}
    if changed and not force:
        first = "; ".join(f"{name} ({why})" for name, why in list(changed.items())[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{len(changed)} runs lie there under another config: {first}{more}. Give the values that are there "
            "(KEY=VALUE), choose another --out, or give --force to delete just these and train them again; runs that "
            "are the same are kept either way"
        )


def _itself(run: PlannedRun) -> PlannedRun:
    return run


def train_task(
    plan: Callable[[], PlannedRun], run: PlannedRun, out: Path, *, force: bool = False, after: tuple[str, ...] = ()
) -> Task:
    """The run is planned anew, its config written and its folder looked at when its turn has come.

    By then the weights that it starts from are there. `run` is what is known of it before.
    """

    def arguments() -> list[str] | None:
        now = plan()
        state = state_of(now)
        refuse_changed({now.name: state}, force=force)
        if state.kind == "finished":
            return None
        if state.kind == "changed":
            with hold(now.folder):
                prepare_run_folder(now.folder, resume=False, force=True)
        return ["align" if now.config.alignment else "train", str(write_config(now, out)), "--resume"]

    return Task(
        name=run.name,
        log=out / LOGS / f"{run.name}.log",
        arguments=arguments,
        after=after,
        metrics=run.folder / "metrics.jsonl",
        steps=run.config.train.steps,
    )


def workers(jobs: int | None, worker: Worker | None) -> tuple[int, Worker]:
    """(how many at once, who runs them): the machine's threads are divided, unless OMP_NUM_THREADS says how many."""
    if worker is not None:
        return jobs or (MOST_RUNS if worker.goes_on else 1), worker
    jobs = 1 if jobs is None else jobs
    if jobs < 1:
        raise ConfigError(f"--jobs: at least 1, not {jobs}")
    given = os.environ.get("OMP_NUM_THREADS")
    threads = None if given or jobs == 1 else max((os.cpu_count() or 1) // jobs, 1)
    return jobs, LocalWorker(threads)


@contextmanager
def hold_folder(out: Path) -> Iterator[None]:
    """One sweep at a time writes to a folder. Raises UserError naming the process that does."""
    try:
        holding = hold(out)
        holding.__enter__()
    except UserError as error:
        raise UserError(str(error).replace("run_dir", "--out")) from error
    try:
        yield
    finally:
        holding.__exit__(None, None, None)


def compare_runs(runs: Sequence[PlannedRun], request: SweepRequest, console: Console) -> Comparison | None:
    """Of those that left something to compare; the others are told."""
    folders, lost = readable(runs)
    for name, why in lost.items():
        console.print(
            f"[bold]{escape(name)} is not in the comparison: {escape(why)}[/]", highlight=False, soft_wrap=True
        )
    if not folders:
        return None
    baseline = next((run.name for run in runs if run.variant == request.baseline and run.folder in folders), None)
    if request.baseline is not None and baseline is None:
        console.print(f"[bold]--baseline {escape(request.baseline)}: none of its runs came to an end[/]")
    comparison = compare(read_runs(folders), baseline, practical=request.practical)
    print_comparison(comparison, console)
    report = write_report(comparison, request.out / REPORT)
    console.print(f"report: {report}; runs: {request.out / RUNS}", highlight=False, soft_wrap=True, markup=False)
    return comparison


def readable(runs: Sequence[PlannedRun]) -> tuple[list[Path], dict[str, str]]:
    """(folders that `moelab compare` takes, {run: why it is none})."""
    folders, lost = [], {}
    for run in runs:
        try:
            read_runs([run.folder])
            folders.append(run.folder)
        except UserError as error:
            lost[run.name] = str(error)
    return folders, lost


def refuse_outcomes(outcomes: Mapping[str, Outcome], out: Path) -> None:
    """Raises KeyboardInterrupt where the sweep was stopped, else RunFailure where a run did not end well."""
    bad = {name: one for name, one in outcomes.items() if not one.well}
    if any(one.kind == "interrupted" or one.why == "the sweep was stopped" for one in bad.values()):
        raise KeyboardInterrupt
    if bad:
        listing = "\n".join(f"  {name}: {one.kind}: {one.why}" for name, one in bad.items())
        raise RunFailure(
            f"{len(bad)} of {len(outcomes)} runs did not end well; the same command goes on with them:\n{listing}"
        )


def _tell_plan(
    console: Console,
    request: SweepRequest,
    planned: Mapping[str, Sequence[PlannedRun]],
    matches: Mapping[str, Match],
    states: Mapping[str, State],
) -> None:
    counts = [f"{name} ({len(runs)})" for name, runs in planned.items()]
    kinds = [state.kind for state in states.values()]
    known = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    _say(console, f"{len(states)} runs in {request.out}: {', '.join(counts)}; {known}")
    reference = request.baseline or next(iter(planned))
    for name, one in matches.items():
        mark = "warning: " if abs(one.error) > FAR else ""
        _say(console, f"{mark}{told(name, reference, one)}")
    if request.dry_run:
        for runs in planned.values():
            for run in runs:
                _say(console, f"  {run.name}: {states[run.name].kind} {states[run.name].why}".rstrip())
    folder = request.out / RUNS
    others = sorted({one.name for one in folder.iterdir()} - states.keys()) if folder.is_dir() else []
    if others:
        _say(console, f"not of this sweep, and left alone: {', '.join(others[:5])}{' ...' * (len(others) > 5)}")


def _say(console: Console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


def _record(
    request: SweepRequest, planned: Mapping[str, Sequence[PlannedRun]], matches: Mapping[str, Match]
) -> dict[str, Any]:
    """sweep.json: what was asked, so that the folder tells how it was made."""
    return {
        "arguments": list(request.arguments),
        "baseline": request.baseline,
        "match": asdict(request.matching) if request.matching else None,
        "matched": {name: asdict(one) for name, one in matches.items()},
        "runs": {
            run.name: {"variant": run.variant, "arguments": list(run.arguments), "hash": run.hash()}
            for runs in planned.values()
            for run in runs
        },
    }
