"""Runs that ended elsewhere than planned, and the best of a run's evaluations: what their losses are worth.

The lowest of several looks at one held-out text is too low by chance, the more so the more looks there were. So a
comparison goes by each run's last evaluation; `--best` asks for the lowest, and is told what that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab.errors import UserError
from moelab.training.format import BEST_EVALUATION, ENDED_EARLY, REPLANNED
from moelab_tools.compare.runs import Run, read_documents

BEST, DOCUMENTS = "best", "evaluation_documents.jsonl"  # of a run folder, and of the first
DIFFERS = 1e-9  # relative: a lowest loss that is lower than the last one


def rewarmed(run: Run) -> list[Mapping[str, Any]]:
    """The changes of `train.steps` that made another recipe of it: those for which its rate rose again."""
    return [change for change in run.summary.get(REPLANNED) or [] if change.get("rewarm_steps") is not None]


def at_best(run: Run) -> Run:
    """`run` with the documents and the numbers of its lowest evaluation in place of the last one's.

    Raises UserError where it kept none.
    """
    best = run.summary.get(BEST_EVALUATION) or {}
    folder, step = run.path / BEST, best.get("step")
    if step is None or not (folder / DOCUMENTS).is_file():
        raise UserError(
            f"--best: {run.path} kept no best checkpoint (train.keep_best=true); leave it out, or compare the last "
            "evaluations, without --best"
        )
    row = next((row for row in reversed(run.rows) if row["step"] == step and "eval/loss" in row), {})
    final = run.summary.get("final", {}) | {tag: value for tag, value in row.items() if tag.startswith("eval")}
    documents = read_documents(folder / DOCUMENTS, finished=True)
    return replace(run, documents=documents, summary=run.summary | {"final": final}, picked=step)


def endings(runs: Sequence[Run]) -> list[str]:
    """What a reader must know before believing the losses of such runs: one sentence a kind, the runs named in it."""
    changes = [(run, change) for run in runs for change in run.summary.get(REPLANNED) or []]
    risen = [one for one in changes if one[1].get("rewarm_steps") is not None]
    early = [(run, ended) for run in runs if (ended := run.summary.get(ENDED_EARLY))]
    kinds = [
        (
            [f"{run.name} (step {run.picked}, of {_best(run).get('evaluations')} looks)" for run in _picked(runs)],
            "compared is the lowest of each run's evaluations, as asked, not the last: the lowest of several looks at "
            "one text is too low by chance, more so with more looks, and no interval here counts that",
        ),
        (
            [_became(run, change) for run, change in changes if (run, change) not in risen],
            "train.steps was changed on the way, and the rates are those of a run planned so. If that was decided by "
            "looking at a loss, no interval here counts the look",
        ),
        (
            [
                f"{_became(run, change)} from {change['factor']:.3g} of optimizer.lr over {change['rewarm_steps']} "
                "steps"
                for run, change in risen
            ],
            "train.steps was changed on the way, after the rate had come down, and it rose again: another recipe than "
            "so many steps planned from the start",
        ),
        (
            [
                f"{run.name} (at step {run.summary.get('steps')} of {ended.get('planned')}, train.patience="
                f"{ended.get('patience')})"
                for run, ended in early
            ],
            "ended early: the end was chosen by this held-out loss, and the learning rate had not come down to where "
            "the schedule ends",
        ),
        (
            [_kept(run) for run in runs if _kept_lower(run)],
            "compared is the last evaluation, not the checkpoint kept as the best, which is picked by the held-out "
            "loss itself; --best compares those",
        ),
    ]
    return [f"{', '.join(named)}: {what}" for named, what in kinds if named]


def _picked(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.picked is not None]


def _became(run: Run, change: Mapping[str, Any]) -> str:
    return f"{run.name} ({change['planned']} to {change['steps']} at step {change['step']})"


def _best(run: Run) -> Mapping[str, Any]:
    return run.summary.get(BEST_EVALUATION) or {}


def _kept_lower(run: Run) -> bool:
    """Whether it kept a best checkpoint whose loss is lower than that of its last evaluation."""
    loss, last = _best(run).get("loss"), run.final("eval/loss")
    if run.picked is not None or not _best(run).get("kept") or loss is None or last is None:
        return False
    return bool(loss < last * (1 - DIFFERS))


def _kept(run: Run) -> str:
    best = _best(run)
    return (
        f"{run.name} ({run.final('eval/loss'):.4f} nats per token; {best['loss']:.4f} at step {best.get('step')}, the "
        f"lowest of {best.get('evaluations')})"
    )
