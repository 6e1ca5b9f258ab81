"""The runs of an experiment: every variant with every seed, planned before the first one starts, as tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moelab.builder import resolve_model
from moelab.config.alignment import below_stages
from moelab.config.files import Layer
from moelab.config.model import ModelConfig
from moelab.config.typed import SCHEMA
from moelab.errors import ConfigError
from moelab.origin import Origin
from moelab.planning.match import Match
from moelab.training.start import model_differences, refuse_others
from moelab_tools.experiments.declaration import Declaration
from moelab_tools.experiments.prepared import Preparation
from moelab_tools.sweep.launch import Task
from moelab_tools.sweep.matching import Matching, solve
from moelab_tools.sweep.plan import PlannedRun, plan_run
from moelab_tools.sweep.run import train_task


@dataclass
class Arms:
    """What an experiment trains."""

    declaration: Declaration
    out: Path
    preparation: Preparation
    extra: tuple[str, ...] = ()
    trust: bool = False
    force: bool = False
    matches: dict[str, Match] = field(default_factory=dict)

    def plan(self) -> dict[str, list[PlannedRun]]:
        """{variant: a run for each seed}, matched. Raises ConfigError for whatever is wrong in any of them."""
        config = self.declaration.config
        seeds = config.seed_list
        self.preparation.check(seeds[0])
        if config.match is not None and not self.matches:
            base = self.planned(config.baseline, seeds[0])
            how = Matching(config.match)
            others = [name for name in config.variants if name != config.baseline]
            self.matches = {name: solve(self.planned(name, seeds[0]), base, how) for name in others}
        return {name: [self.planned(name, seed) for seed in seeds] for name in config.variants}

    def planned(self, variant: str, seed: int) -> PlannedRun:
        """One run, with the weights it starts from if they are there, else with what they will be."""
        words = self._words(variant)
        below = self.preparation.below(words, seed)
        # A stage of post-training takes `data` from the run that it starts from; its order is its own all the same.
        own = [f"seed={seed}", "data.order_seed=null", f"declaration={self.declaration.hash}"]
        arguments = [*self.preparation.filled(words, seed), *own]
        run = plan_run(
            variant, arguments, self.out, trust=self.trust,
            below=(lambda said: below_stages(below, said)) if below is not None else None,
        )  # fmt: skip
        if below is not None:
            _check_start(run, below)
        return run

    def tasks(self, seeds: Sequence[int]) -> list[Task]:
        """Preparation and all variants, seed by seed, so that pairs are complete early."""
        found = self.preparation.shared_tasks()
        for seed in seeds:
            found += self.preparation.tasks(seed)
            for name in self.declaration.config.variants:
                found.append(self._task(name, seed))
        return found

    def _task(self, variant: str, seed: int) -> Task:
        return train_task(
            lambda: self.planned(variant, seed),
            self.planned(variant, seed),
            self.out,
            force=self.force,
            after=self.preparation.task_of(self._words(variant), seed),
        )

    def _words(self, variant: str) -> list[str]:
        config = self.declaration.config
        matched = [f"{one.key}={one.value}"] if (one := self.matches.get(variant)) else []
        return [*config.configs, *config.variants[variant], *matched, *self.extra]


def _check_start(run: PlannedRun, below: Layer) -> None:
    """What `moelab train` will refuse when the weights are there: another model that no override names."""
    theirs = SCHEMA.build(ModelConfig, below.tree["model"])
    resolve_model(theirs, run.registry)
    found = list(model_differences(run.config.model, theirs, run.registry, run.registry))
    origin = Origin(Path(below.origin), theirs, None)
    try:
        refuse_others(found, origin, run.config.train.init_overrides)
    except ConfigError as error:
        raise ConfigError(f"{error}; in the run {run.name}, and no run was started") from error
