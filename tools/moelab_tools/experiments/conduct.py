"""Runs an experiment as it was declared: look by look, until it is decided, hopeless, out of budget, or at its end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import moelab
from moelab.atomic import check_output
from moelab.config.stages import planned_tokens
from moelab.errors import ConfigError, RunFailure
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import write_json
from moelab_tools.compare.comparison import Comparison, compare
from moelab_tools.compare.report import write_report
from moelab_tools.compare.runs import read_runs
from moelab_tools.compare.sequential import HOPELESS, Plan
from moelab_tools.compare.table import print_comparison
from moelab_tools.compare.verdict import BETTER, IDENTICAL, NEGLIGIBLE, NO_SPREAD, WORSE, Verdict
from moelab_tools.experiments.arms import Arms
from moelab_tools.experiments.declaration import END, RESULTS, Declaration, read_declaration
from moelab_tools.experiments.findings import Conclusion, Settled, check_findings, write_findings
from moelab_tools.experiments.logged import logged
from moelab_tools.experiments.prepared import Preparation
from moelab_tools.experiments.reached import Looks, reached
from moelab_tools.experiments.register import registered, write_register
from moelab_tools.experiments.routed import Routed, agreed
from moelab_tools.sweep.launch import Outcome, Task, Worker, launch
from moelab_tools.sweep.matching import told as told_match
from moelab_tools.sweep.plan import REPORT, PlannedRun
from moelab_tools.sweep.run import hold_folder, readable, refuse_changed, workers
from moelab_tools.sweep.state import state_of

DECIDED = (BETTER, WORSE, NEGLIGIBLE, IDENTICAL, NO_SPREAD)
TIMES = "minutes.json"  # in the experiment's folder: what each run took, so that the budget outlives a stop


@dataclass(frozen=True)
class ExperimentRequest:
    """The command line."""

    experiment: str | Path
    out: Path | None = None  # None: runs/experiments/NAME
    results: Path | None = None  # None: beside the declaration; of one that came with an installed moelab, in `out`
    jobs: int | None = None
    amend: str | None = None
    force: bool = False
    dry_run: bool = False
    trust: bool = False
    extra: tuple[str, ...] = ()  # overrides of all training runs: this is then not the declared experiment


@dataclass
class Experiment:
    """One experiment on its way."""

    declaration: Declaration
    request: ExperimentRequest
    arms: Arms
    console: Console
    worker: Worker
    at_once: int
    spent: dict[str, float] = field(default_factory=dict)  # task -> seconds
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.arms.out

    def say(self, text: str, style: str = "") -> None:
        self.console.print(escape(text), style=style or None, highlight=False, soft_wrap=True)

    def minutes(self) -> float:
        """Of this machine, by what its tasks took."""
        return sum(self.spent.values()) / 60 / min(self.at_once, max(len(self.spent), 1))

    def run(self, planned: dict[str, list[PlannedRun]]) -> Conclusion:
        """Every look that is needed; raises KeyboardInterrupt when it was stopped."""
        config = self.declaration.config
        conclusion = Conclusion("")
        for at, count in enumerate(config.looks):
            reason = self._beyond_budget(count, conclusion.seeds)
            if reason is not None:
                conclusion.why_it_ended = reason
                break
            seeds = config.seed_list[:count]
            self._launch(seeds)
            conclusion.seeds = seeds
            runs = [run for name in planned for run in planned[name][:count]]
            plan = Plan(config.looks, at, config.protocol.spending) if len(config.looks) > 1 else None
            conclusion.comparison = self._compare(runs, plan, conclusion)
            verdicts = _verdicts(conclusion.comparison, config.protocol.axis, list(config.variants))
            for name, verdict in verdicts.items():
                known = conclusion.settled.get(name)
                if known is None or known.verdict.verdict not in DECIDED:
                    conclusion.settled[name] = Settled(verdict, count)
            conclusion.why_it_ended = self._ended(conclusion, at)
            if conclusion.why_it_ended:
                break
        self._look_at_lengths(planned, conclusion)
        self._look_at_routes(planned, conclusion)
        conclusion.minutes = self.minutes()
        return conclusion

    def _look_at_lengths(self, planned: dict[str, list[PlannedRun]], conclusion: Conclusion) -> None:
        """Of the seeds that were run, where the declaration asks."""
        asked, count = self.declaration.config.lengths, len(conclusion.seeds)
        if asked is None or not count:
            return
        looks = Looks(asked, self.arms)
        self._do([*self.arms.tasks(conclusion.seeds), *looks.tasks(planned, count)])
        conclusion.failed |= {name: one.why for name, one in self.outcomes.items() if not one.well}
        conclusion.lengths = reached(looks, planned, count)

    def _look_at_routes(self, planned: dict[str, list[PlannedRun]], conclusion: Conclusion) -> None:
        """Of the seeds that were run, where the declaration asks."""
        asked, count = self.declaration.config.routes, len(conclusion.seeds)
        if asked is None or not count:
            return
        routed = Routed(asked, self.arms)
        self._do([*self.arms.tasks(conclusion.seeds), *routed.tasks(planned, count)])
        conclusion.failed |= {name: one.why for name, one in self.outcomes.items() if not one.well}
        conclusion.routes, wrong = agreed(routed, planned, count)
        conclusion.failed |= wrong

    def _launch(self, seeds: Sequence[int]) -> None:
        self._do(self.arms.tasks(seeds))

    def _do(self, tasks: Sequence[Task]) -> None:
        """What is done already is not done again."""
        outcomes = launch(tasks, self.worker, self.console, at_once=self.at_once, known=self.outcomes)
        for name in outcomes.keys() - self.outcomes.keys():
            self.spent[name] = self.spent.get(name, 0.0) + outcomes[name].seconds
        self.outcomes |= outcomes  # what failed in an earlier look is not tried again in this call
        write_json(self.out / TIMES, self.spent)
        if any(one.kind == "interrupted" or one.why == "the sweep was stopped" for one in outcomes.values()):
            raise KeyboardInterrupt

    def _compare(self, runs: Sequence[PlannedRun], plan: Plan | None, conclusion: Conclusion) -> Comparison | None:
        config = self.declaration.config
        folders, lost = readable(runs)
        ended = {name: one for name, one in self.outcomes.items() if not one.well}
        conclusion.failed = {name: ended[name].why if name in ended else why for name, why in lost.items()}
        conclusion.failed |= {name: one.why for name, one in ended.items() if name not in lost}
        baseline = next((run.name for run in runs if run.variant == config.baseline and run.folder in folders), None)
        if baseline is None or len(folders) < 2:
            return None
        comparison = compare(
            read_runs(folders),
            baseline,
            practical=config.protocol.practical / 100,
            error=config.protocol.error,
            plan=plan,
        )
        if config.logged is not None:
            variant_of = {run.folder: run.variant for run in runs}
            by_variant = {name: [one for one in comparison.runs if variant_of.get(one.path) == name]
                          for name in config.variants}  # fmt: skip
            conclusion.logged = logged(config.logged, by_variant, config.baseline, config.protocol.error)
        print_comparison(comparison, self.console)
        write_report(comparison, self.out / REPORT)
        return comparison

    def _ended(self, conclusion: Conclusion, at: int) -> str:
        """Why no further look is needed, in a sentence; empty where one is."""
        looks, variants = self.declaration.config.looks, set(self.declaration.config.variants)
        where = f"look {at + 1} of {len(looks)}, with {looks[at]} seeds"
        wanted = variants - {self.declaration.config.baseline}
        decided = {name for name, one in conclusion.settled.items() if one.verdict.verdict in DECIDED}
        if wanted <= decided:
            return f"Decided at {where}." if len(looks) > 1 else f"Decided, with {looks[at]} seeds."
        if at == len(looks) - 1:
            return f"All {looks[at]} seeds are in; not decided: {', '.join(sorted(wanted - decided))}."
        chances = {
            name: conclusion.settled[name].verdict.prospect for name in wanted - decided if name in conclusion.settled
        }
        known = {name: chance for name, chance in chances.items() if chance is not None}
        if not self.declaration.config.protocol.give_up or len(known) < len(wanted - decided):
            return ""
        if all(chance < HOPELESS for chance in known.values()):
            listing = ", ".join(f"{name} {100 * chance:.0f} %" for name, chance in sorted(known.items()))
            return f"Given up at {where}: {looks[-1]} seeds won't decide what is left (chance of a word: {listing})."
        return ""

    def _beyond_budget(self, count: int, done: Sequence[int]) -> str | None:
        """Why the runs of this look are not started."""
        config, budget = self.declaration.config, self.declaration.config.budget
        seeds = config.seed_list[len(done) : count]
        first = self.arms.planned(config.baseline, config.seed_list[0]).config
        tokens = len(config.variants) * count * planned_tokens(first)
        if budget.tokens is not None and tokens > budget.tokens:
            return f"The budget ended before {count} seeds: they read {tokens:.3g} tokens of {budget.tokens:.3g}."
        tasks = [task.name for task in self.arms.tasks(seeds)]
        todo = [name for name in tasks if name not in self.spent]
        if budget.minutes is None or not self.spent or not todo:
            return None
        kinds: dict[str, list[float]] = {}
        for name, seconds in self.spent.items():
            if seconds > 0:
                kinds.setdefault(_kind(name), []).append(seconds)
        expected = sum(sum(known) / len(known) for name in todo if (known := kinds.get(_kind(name))))
        minutes = self.minutes() + expected / 60 / self.at_once
        if minutes > budget.minutes:
            return (
                f"The budget ended before {count} seeds: they would bring it to {minutes:.0f} minutes of "
                f"{budget.minutes:g}."
            )
        return None


def _kind(task: str) -> str:
    """`dense_seed0.hf` -> `dense.hf`."""
    head, _, tail = task.rpartition("_seed")
    return head + "".join(tail.partition(".")[1:])


def _verdicts(comparison: Comparison | None, axis: str, variants: Sequence[str]) -> dict[str, Verdict]:
    if comparison is None:
        return {}
    lines = {line.name: line for line in comparison.lines}
    found = {name: lines[name].difference if axis == END else lines[name].at_equal.get(axis)
             for name in variants if name in lines}  # fmt: skip
    return {name: verdict for name, verdict in found.items() if verdict is not None}


def run_experiment(request: ExperimentRequest, console: Console, worker: Worker | None = None) -> Conclusion | None:
    """-> what came of it; None for a dry run.

    Raises UserError before anything is written for whatever is wrong in the declaration or in any of its runs; and
    RunFailure when runs failed, after the findings of the others were written.
    """
    declaration = read_declaration(request.experiment)
    for word in request.extra:
        if "=" not in word:
            raise ConfigError(f"{word}: an experiment takes overrides, KEY=VALUE; files are named in its declaration")
    out = folder_of(request)
    results = request.results or results_folder(declaration, out, tried=bool(request.extra))
    if not request.dry_run:
        check_output(out, "--out")
        check_findings(results)
    register, bold = registered(declaration, out, results, request.amend)
    given = {"extra": request.extra, "trust": request.trust, "force": request.force}
    arms = Arms(declaration, out, Preparation(declaration, out, **given), **given)  # type: ignore[arg-type]
    planned = arms.plan()
    if declaration.config.routes is not None:
        Routed(declaration.config.routes, arms).check()
    at_once, worker = workers(request.jobs, worker)
    experiment = Experiment(declaration, request, arms, console, worker, at_once, _times(out))
    for line in bold:
        experiment.say(line, "bold red")
    _tell(experiment, planned)
    refuse_changed({run.name: state_of(run) for runs in planned.values() for run in runs}, force=request.force)
    if request.dry_run:
        return None
    with hold_folder(out):
        write_register(register, out)
        conclusion = experiment.run(planned)
        path = write_findings(declaration, register, conclusion, _command(request), results)
    experiment.say(f"{conclusion.why_it_ended} findings: {path}; report: {out / REPORT}")
    if conclusion.failed:
        listing = "\n".join(f"  {name}: {why}" for name, why in conclusion.failed.items())
        raise RunFailure(f"{len(conclusion.failed)} runs did not end well; the same command goes on:\n{listing}")
    return conclusion


def folder_of(request: ExperimentRequest) -> Path:
    """Where its runs lie; what is only tried out has a folder of its own."""
    name = read_declaration(request.experiment).name + "_tried" * bool(request.extra)
    return request.out or Path("runs/experiments") / name


def results_folder(declaration: Declaration, out: Path, tried: bool) -> Path:
    """Where findings lie unless it was said: never inside an installed package, which pip owns."""
    folder = declaration.path.resolve().parent
    installed = folder.is_relative_to(Path(moelab.__file__).resolve().parent)
    return (out if tried or installed else declaration.path.parent) / RESULTS


def _tell(experiment: Experiment, planned: dict[str, list[PlannedRun]]) -> None:
    declaration = experiment.declaration
    config = declaration.config
    experiment.say(config.question, "bold")
    if experiment.request.extra:
        words = " ".join(experiment.request.extra)
        experiment.say(
            f"TRYING OUT with {words}: not the declared experiment; findings stay in {experiment.out}", "bold"
        )
    experiment.say(
        f"{len(planned)} variants, baseline {config.baseline}; {len(config.seed_list)} seeds, looks at "
        f"{', '.join(map(str, config.looks))}; at most {len(planned) * len(config.seed_list)} runs, and "
        f"{len(config.prepare)} steps of preparation a seed; declaration {declaration.hash[:16]}"
    )
    for name, one in experiment.arms.matches.items():
        experiment.say(told_match(name, config.baseline, one))
    if experiment.request.dry_run:
        for task in experiment.arms.tasks(config.seed_list):
            experiment.say(f"  {task.name}" + (f", after {', '.join(task.after)}" if task.after else ""))


def _times(out: Path) -> dict[str, float]:
    path = out / TIMES
    known = read_object(path, Reading(cure="delete it: only the budget of minutes needs it")) if path.is_file() else {}
    return {name: float(value) for name, value in known.items() if isinstance(value, int | float)}


def _command(request: ExperimentRequest) -> str:
    words = ["moelab", "experiment", str(request.experiment), *request.extra]
    return shlex.join(words)
