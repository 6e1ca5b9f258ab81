"""Runs that ended elsewhere than planned, and the best of a run's evaluations: what their losses are worth.

The lowest of several looks at one held-out text is too low by chance, the more so the more looks there were. So a
comparison goes by each run's last evaluation; `--best` asks for the lowest, and is told what that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab.errors import UserError
from moelab.train.format import BEST_EVALUATION, ENDED_EARLY, REPLANNED
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
    """What a reader must know before believing the losses of such runs."""
    told = [line for run in runs for line in (*_replanned(run), *_ended_early(run))]
    picked = [run for run in runs if run.picked is not None]
    if picked:
        looks = ", ".join(f"{run.name} step {run.picked}, of {_looks(run)} looks" for run in picked)
        told.insert(
            0,
            f"Compared is the lowest of each run's evaluations ({looks}), as asked, not the last: the lowest of "
            "several looks at one text is too low by chance, more so with more looks, and no interval here counts that",
        )
    for run in runs:
        best, last = run.summary.get(BEST_EVALUATION) or {}, run.final("eval/loss")
        kept, loss = best.get("kept"), best.get("loss")
        if run.picked is None and kept and loss is not None and last is not None and loss < last * (1 - DIFFERS):
            told.append(
                f"{run.name}: compared is its last evaluation ({last:.4f} nats per token), not the checkpoint that it "
                f"kept as the best of {_looks(run)} ({loss:.4f} at step {best.get('step')}), which is picked by the "
                "held-out loss itself; --best compares those"
            )
    return told


def _replanned(run: Run) -> list[str]:
    told = []
    for change in run.summary.get(REPLANNED) or []:
        done = (
            f"{run.name}: train.steps became {change['steps']} at step {change['step']}, where {change['planned']} "
            "were planned"
        )
        if change.get("rewarm_steps") is None:
            told.append(
                f"{done}; its rates are those of a run planned so. If that was decided by looking at its loss, no "
                "interval here counts the look"
            )
        else:
            told.append(
                f"{done}; its rate had come down to {change['factor']:.3g} of optimizer.lr and rose again over "
                f"{change['rewarm_steps']} steps: another recipe than {change['steps']} steps planned from the start"
            )
    return told


def _ended_early(run: Run) -> list[str]:
    ended = run.summary.get(ENDED_EARLY)
    if not ended:
        return []
    return [
        f"{run.name}: ended early, at step {run.summary.get('steps')} of {ended.get('planned')} (train.patience="
        f"{ended.get('patience')}): its end was chosen by this held-out loss, and its learning rate had not come down "
        "to where the schedule ends"
    ]


def _looks(run: Run) -> Any:
    return (run.summary.get(BEST_EVALUATION) or {}).get("evaluations")
