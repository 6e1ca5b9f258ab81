"""Where runs send held-out text, against what they began from: the tasks that trace them, and the shares by domain."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab.errors import ConfigError, UserError
from moelab.routes.agreement import compare_routes
from moelab.routes.files import read_trace
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import write_json
from moelab_tools.compare.contrast import t_limit
from moelab_tools.experiments.arms import Arms
from moelab_tools.experiments.logged import differences
from moelab_tools.experiments.routing import Routing
from moelab_tools.routes.agreeing import Part, Row, rows
from moelab_tools.sweep.launch import Task
from moelab_tools.sweep.plan import LOGS, PlannedRun, digest
from moelab_tools.sweep.state import identity

ROUTES = "routes"  # in the experiment's folder: a trace of each run, and a stamp beside it
Place = tuple[str, str | None]  # layer, domain; None: all of them
Planned = Mapping[str, Sequence[PlannedRun]]  # variant -> a run for each seed


@dataclass(frozen=True)
class Routed:
    """Every run of an experiment that has experts, at its end."""

    asked: Routing
    arms: Arms

    def check(self) -> None:
        """Raise ConfigError where what runs are compared with has no experts."""
        if self.began(self.arms.declaration.config.seed_list[0]).config.model.moe is None:
            raise ConfigError(f"routes.against: the model of {self.asked.against} has no experts, so it has no routes")

    def began(self, seed: int) -> PlannedRun:
        preparation = self.arms.preparation
        return preparation.planned(preparation.steps[self.asked.against], seed)

    def tasks(self, planned: Planned, count: int) -> list[Task]:
        """Of the first `count` seeds; each is one call of `moelab trace`, not made again where its stamp stands."""
        found = []
        for place, seed in enumerate(self.arms.declaration.config.seed_list[:count]):
            found.append(self._task(self.began(seed)))
            found += [self._task(runs[place]) for runs in with_experts(planned).values()]
        return found

    def folder(self, run: PlannedRun) -> Path:
        return self.arms.out / ROUTES / run.name

    def _task(self, run: PlannedRun) -> Task:
        name, out = f"{run.name}.{ROUTES}", self.folder(run)
        stamp = out.with_name(f"{run.name}.json")

        def made_of() -> str:
            return digest([self.asked.tokens, identity(run)])

        def arguments() -> list[str] | None:
            stamped = stamp.is_file() and read_object(stamp, Reading(cure="delete it")).get("hash") == made_of()
            if stamped and out.is_dir():
                return None
            stamp.unlink(missing_ok=True)
            shutil.rmtree(out, ignore_errors=True)  # a trace of something else
            words = ["trace", str(run.folder), "--tokens", str(self.asked.tokens), "--out", str(out)]
            return words + ["--trust-plugins"] * self.arms.trust

        def done() -> None:
            write_json(stamp, {"hash": made_of()})

        return Task(name, self.arms.out / LOGS / f"{name}.log", arguments, after=(run.name,), done=done)


def with_experts(planned: Planned) -> Planned:
    return {variant: runs for variant, runs in planned.items() if runs[0].config.model.moe is not None}


def agreed(routed: Routed, planned: Planned, count: int) -> tuple[dict[str, Any], dict[str, str]]:
    """(what findings.json tells, {run: why it is not part of it}), of the runs whose traces are there."""
    config = routed.arms.declaration.config
    found: dict[str, dict[int, list[Row]]] = {}
    wrong: dict[str, str] = {}
    for variant, runs in with_experts(planned).items():
        found[variant] = {}
        for run, seed in zip(runs[:count], config.seed_list, strict=False):
            folders = routed.folder(routed.began(seed)), routed.folder(run)
            if not all(folder.is_dir() for folder in folders):
                continue  # its task says why
            try:
                traces = read_trace(folders[0]), read_trace(folders[1])
                names = (routed.began(seed).name, run.name)
                found[variant][seed] = rows(compare_routes(*traces, names), traces[0])
            except UserError as error:
                wrong[f"{run.name}.{ROUTES}"] = str(error)
    known = {variant: ones for variant, ones in found.items() if ones}
    table = [
        {
            "layer": place[0],
            "domain": place[1],
            "variants": _variants(place, known, config.baseline, config.protocol.error),
        }
        for place in _places(known)
    ]
    return {"against": routed.asked.against, "tokens": routed.asked.tokens, "table": table}, wrong


def _places(known: Mapping[str, Mapping[int, Sequence[Row]]]) -> list[Place]:
    """Layer by layer, of each the whole text before its domains, where it has several."""
    every = [row for ones in known.values() for found in ones.values() for row in found]
    layers = dict.fromkeys(row.layer for row in every)
    domains = sorted({domain for row in every for domain in row.by_domain})
    return [(layer, domain) for layer in layers for domain in (None, *(domains if len(domains) > 1 else ()))]


def _variants(
    place: Place, known: Mapping[str, Mapping[int, Sequence[Row]]], baseline: str, error: float
) -> dict[str, Any]:
    """{variant: the mean of its seeds' shares with Student's interval, and how it differs from the baseline's}."""
    parts = {variant: {seed: part for seed, found in ones.items() if (part := _part(place, found)) is not None}
             for variant, ones in known.items()}  # fmt: skip
    shares = {variant: {seed: part.equal.value for seed, part in ones.items()}
              for variant, ones in parts.items() if ones}  # fmt: skip
    told: dict[str, Any] = {}
    contrasts = differences(shares, baseline, error)
    for variant, by_seed in shares.items():
        values = np.array(list(by_seed.values()))
        several = len(values) > 1
        spread = float(values.std(ddof=1)) if several else None
        half = float(t_limit(error, len(values) - 1)) * spread / math.sqrt(len(values)) if spread is not None else None
        mean = float(values.mean())
        told[variant] = {
            "seeds": len(values),
            "share": mean,
            "share_low": None if half is None else max(0.0, mean - half),
            "share_high": None if half is None else min(1.0, mean + half),
            "sd_over_seeds": spread,
            "chance": float(np.mean([part.chance for part in parts[variant].values()])),
            "documents": min(part.equal.documents for part in parts[variant].values()),
        } | contrasts.get(variant, {})
    return told


def _part(place: Place, found: Sequence[Row]) -> Part | None:
    layer, domain = place
    row = next((row for row in found if row.layer == layer), None)
    if row is None:
        return None
    return row.whole if domain is None else row.by_domain.get(domain)
