"""What runs made of longer texts: the tasks that look at them, and what is concluded from what they kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab.atomic import write_file
from moelab.checkpoint import CHECKPOINTS
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import write_json
from moelab_tools.compare.pairing import Losses
from moelab_tools.compare.verdict import Rules, Verdict, judge
from moelab_tools.experiments.arms import Arms
from moelab_tools.experiments.declaration import said
from moelab_tools.experiments.reaching import Reaching
from moelab_tools.lengths.kept import FILE, FOLDER, read_kept
from moelab_tools.passkey import DEPTHS
from moelab_tools.sweep.launch import Task
from moelab_tools.sweep.plan import LOGS, PlannedRun, digest
from moelab_tools.sweep.state import identity

WAYS, STAMPS = "ways.yaml", "lengths"  # in the experiment's folder
SHOWN = ("difference", "low", "high", "could_have_seen")


@dataclass(frozen=True)
class Looks:
    """Every run of an experiment at every moment."""

    asked: Reaching
    arms: Arms

    def tasks(self, planned: Mapping[str, Sequence[PlannedRun]], count: int) -> list[Task]:
        """Of the first `count` seeds; each is one call of `moelab evaluate`, not made again where its stamp stands."""
        write_file(self.arms.out / WAYS, json.dumps(self.asked.ways, indent=2) + "\n")
        seeds = range(count)
        return [
            self._task(planned[variant][seed], moment) for seed in seeds for variant in planned
            for moment in self.asked.moments
        ]  # fmt: skip

    def _task(self, run: PlannedRun, moment: str) -> Task:
        name = f"{run.name}.{moment}"
        stamp = self.arms.out / STAMPS / f"{name}.json"

        def made_of() -> str:
            return digest([said(self.asked), identity(run), moment])

        def arguments() -> list[str] | None:
            if stamp.is_file() and read_object(stamp, Reading(cure="delete it")).get("hash") == made_of():
                return None
            asked = self.asked
            words = ["evaluate", str(self.checkpoint(run, moment)), "--length", asked.at, "--tokens", str(asked.tokens)]
            words += ["--ways", str(self.arms.out / WAYS)]
            return words + (["--passkey", str(asked.passkey)] if asked.passkey else [])

        def done() -> None:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_json(stamp, {"hash": made_of()})

        return Task(name, self.arms.out / LOGS / f"{name}.log", arguments, after=(run.name,), done=done)

    def checkpoint(self, run: PlannedRun, moment: str) -> Path:
        return run.folder / CHECKPOINTS / f"step_{self.asked.moments[moment]:08d}"

    def kept(self, run: PlannedRun, moment: str) -> dict[str, Any] | None:
        path = run.folder / FOLDER / self.checkpoint(run, moment).name / FILE
        return read_kept(path) if path.is_file() else None


def reached(looks: Looks, planned: Mapping[str, Sequence[PlannedRun]], count: int) -> dict[str, Any]:
    """{variant: {moment: what came of it}}, for findings.json.

    Words are given at the greatest length of each table, and hold for all tables together: each has its part of the
    protocol's error. The intervals of the other lengths hold for their own table's ways at that length.
    """
    protocol = looks.arms.declaration.config.protocol
    tables = len(planned) * len(looks.asked.moments)
    found: dict[str, Any] = {}
    for variant, runs in planned.items():
        found[variant] = {}
        for moment in looks.asked.moments:
            known = {run.config.seed: one for run in runs[:count] if (one := looks.kept(run, moment)) is not None}
            if known:
                rules = Rules(True, protocol.practical / 100, error=protocol.error)
                found[variant][moment] = _moment(looks.asked, known, rules, tables)
    return found


def _moment(asked: Reaching, known: Mapping[int, Mapping[str, Any]], rules: Rules, tables: int) -> dict[str, Any]:
    """`known`: what was kept of each seed."""
    first = next(iter(known.values()))
    lengths = [one["length"] for one in first["ways"][asked.baseline]]
    told = []
    for place, length in enumerate(lengths):
        longest = length == max(lengths)
        own = Rules(True, rules.practical, error=rules.error / tables if longest else rules.error)
        told.append({"length": length} | _length(asked, known, place, own, longest=longest))
    return {"trained": first["trained"], "seeds": sorted(known), "lengths": told}


def _length(
    asked: Reaching, known: Mapping[int, Mapping[str, Any]], place: int, rules: Rules, *, longest: bool
) -> dict[str, Any]:
    at = {way: {seed: one["ways"][way][place] for seed, one in known.items()} for way in asked.ways}
    losses = {way: _losses(by_seed) for way, by_seed in at.items()}
    verdicts = judge(losses, asked.baseline, rules)
    base = losses[asked.baseline].score
    return {"ways": {
        way: _way(asked, losses[way], list(at[way].values()), verdicts.get(way), (base, longest)) for way in asked.ways
    }}  # fmt: skip


def _losses(by_seed: Mapping[int, Mapping[str, Any]]) -> Losses:
    """Of the documents that every seed has, which are all of them where the text is one."""
    shared = sorted(set.intersection(*(set(one["documents"]) for one in by_seed.values())))
    nats = np.array([[one["documents"][name][0] for name in shared] for one in by_seed.values()])
    size = np.array([next(iter(by_seed.values()))["documents"][name][1] for name in shared], dtype=np.float64)
    return Losses(tuple(by_seed), nats, size)


def _way(
    asked: Reaching, losses: Losses, ones: Sequence[Mapping[str, Any]], verdict: Verdict | None, at: tuple[float, bool]
) -> dict[str, Any]:
    base, longest = at
    scores = losses.nats.sum(1) / losses.size.sum()
    told: dict[str, Any] = {
        "loss": losses.score,
        "sd_over_seeds": float(scores.std(ddof=1)) if len(scores) > 1 else None,
        "documents": len(losses.size),
        "moved": _mean([_mean(list(one["drift"].values())) for one in ones]),
        "moved_within": _mean([_mean(list(one["drift_within"].values())) for one in ones]),
        "entropy": _mean([_mean([_last(layer, one["length"]) for layer in one["entropy"].values()]) for one in ones]),
    }
    if asked.passkey:
        keys = round(sum(share for one in ones for share in one["passkey"].values()) * asked.passkey)
        told["keys"] = {"found": keys, "of": len(ones) * asked.passkey * len(DEPTHS)}
    if verdict is not None:
        known = asdict(verdict)
        told |= {f"{key}_percent": 100 * known[key] / base if known[key] is not None else None for key in SHOWN}
        told["pairs"] = verdict.pairs
        if longest:
            told["verdict"] = verdict.verdict
            told["concluded"] = asked.decision.get(verdict.verdict, f"nothing: the verdict is '{verdict.verdict}'")
    return told


def _last(places: Mapping[str, float], length: int) -> float:
    """Of the last bin that begins below the length."""
    return [value for name, value in places.items() if int(name.split("-")[0]) < length][-1]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
