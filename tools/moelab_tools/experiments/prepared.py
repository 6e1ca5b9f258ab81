"""Weights that variants start from: for each seed a small graph of training, export and upcycling, made once.

    prepared/runs/dense_seed0    a dense run           prepared/hf/dense_seed0         the same as a Hugging Face folder
    prepared/upcycled/qwen2_seed0                      prepared/stamps/                what made each, as a hash
    prepared/runs/sft_seed0    a stage of post-training   prepared/corpora/curated    text, the same for all seeds

A step whose stamp says that it was made of the same is not made again; an upcycling that was killed goes on.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moelab.config.alignment import below_stages
from moelab.config.files import Layer
from moelab.config.load import load_config
from moelab.config.model import ModelConfig
from moelab.config.overlay import overlay
from moelab.config.upcycle import UpcycleConfig
from moelab.errors import ConfigError, UserError
from moelab.registry import Registry
from moelab.safe_files import Reading, read_object
from moelab.training.run_folder import is_finished, write_json
from moelab_tools.curate.declaration import CurateConfig
from moelab_tools.experiments.declaration import INIT, Declaration, Step, reference
from moelab_tools.sweep.launch import Task
from moelab_tools.sweep.plan import PlannedRun, digest, plan_run
from moelab_tools.sweep.run import train_task
from moelab_tools.sweep.state import identity
from moelab_upcycling.same_plan import AXES

PREPARED = "prepared"
ORDER = 1000  # added to the seed: a variant does not meet its source's batches again one by one


@dataclass
class Preparation:
    """The steps of one experiment in its folder."""

    declaration: Declaration
    out: Path
    extra: tuple[str, ...] = ()  # overrides of every training run, for trying out
    trust: bool = False
    force: bool = False
    runs: dict[str, PlannedRun] = field(default_factory=dict)  # of the training steps, by task
    _trees: dict[str, Layer] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.out / PREPARED

    @property
    def steps(self) -> dict[str, Step]:
        return {step.name: step for step in self.declaration.config.prepare}

    def place(self, step: str, seed: int) -> Path:
        """The folder that a reference to a step stands for."""
        if self.steps[step].data is not None:
            return self.folder / "corpora" / step
        return self.folder / ("runs" if self.steps[step].trains else "upcycled") / f"{step}_seed{seed}"

    def hugging_face(self, step: str, seed: int) -> Path:
        return self.folder / "hf" / f"{step}_seed{seed}"

    def filled(self, words: list[str], seed: int) -> list[str]:
        """Arguments with the prepared folders in place of their names; files by their paths."""
        return [self._filled(word, seed) for word in self.declaration.arguments(words)]

    def _filled(self, word: str, seed: int) -> str:
        name = reference(word)
        if name is None:
            return word
        key, _, value = word.partition("=")
        return f"{key}={self.place(name, seed)}{value.strip()[1:].removeprefix(name)}"

    def below(self, words: list[str], seed: int) -> Layer | None:
        """What the weights that these words name will say of themselves, while they are not there."""
        named = [name for word in words if word.partition("=")[0].strip() == INIT and (name := reference(word))]
        if not named or self.made(named[-1], seed):
            return None
        return self._tree(named[-1])

    def made(self, step: str, seed: int) -> bool:
        """Whether the step's weights are there, and whole."""
        if self.steps[step].trains:
            return is_finished(self.place(step, seed))
        return self.place(step, seed).is_dir() and self._stamp(f"{step}_seed{seed}").is_file()

    def _stamp(self, task: str) -> Path:
        return self.folder / "stamps" / f"{task}.json"

    def tasks(self, seed: int) -> list[Task]:
        """Every step for one seed, in the order of the declaration, but for those of `shared_tasks`."""
        found: list[Task] = []
        for step in self.declaration.config.prepare:
            if step.trains:
                found.append(self._train(step, seed))
                if any(other.source == step.name for other in self.steps.values()):
                    found.append(self._export(step.name, seed))
            elif step.upcycle is not None:
                found.append(self._upcycle(step, seed))
        return found

    def shared_tasks(self) -> list[Task]:
        """The corpora, which all seeds read."""
        return [self._curate(step) for step in self.declaration.config.prepare if step.data is not None]

    def check(self, seed: int) -> None:
        """Build every step without weights. Raises ConfigError naming the step."""
        for step in self.declaration.config.prepare:
            if step.trains:
                self.planned(step, seed)
            elif step.data is not None:
                self._check_data(step)
            else:
                self._tree(step.name)

    def task_of(self, words: list[str], seed: int) -> tuple[str, ...]:
        """The tasks that must have ended before these words can be used."""
        names = [name for word in words if (name := reference(word)) is not None]
        return tuple(
            dict.fromkeys(name if self.steps[name].data is not None else f"{name}_seed{seed}" for name in names)
        )

    def planned(self, step: Step, seed: int) -> PlannedRun:
        """The run of a step that trains."""
        words = [*step.words, *self.extra]
        below = self.below(words, seed)
        arguments = [*self.filled(words, seed), f"seed={seed}", f"data.order_seed={seed + ORDER}"]
        arguments.append(f"declaration={self.declaration.hash}")
        given = (lambda said: below_stages(below, said)) if below is not None else None
        return plan_run(step.name, arguments, self.folder, trust=self.trust, below=given, seeds=f"seed{seed}")

    def _train(self, step: Step, seed: int) -> Task:
        words = [*step.words, *self.extra]
        run = self.planned(step, seed)
        self.runs[run.name] = run
        return train_task(
            lambda: self.planned(step, seed), run, self.folder, force=self.force, after=self.task_of(words, seed)
        )

    def _export(self, name: str, seed: int) -> Task:
        source, output = self.place(name, seed), self.hugging_face(name, seed)
        command = ["export", str(source), str(output), "--dtype", "float32", "--force"]
        return self._stamped(f"{name}_seed{seed}.hf", command, output, (f"{name}_seed{seed}",), ["export"])

    def _upcycle(self, step: Step, seed: int) -> Task:
        assert step.source is not None
        output = self.place(step.name, seed)
        words = self.declaration.arguments(step.upcycle or [])
        given = [f"source={self.hugging_face(step.source, seed)}", f"output={output}", f"seed={seed}"]
        meant = ["upcycle", seed, *self.declaration.meaning(step.upcycle or [])]
        after = (f"{step.source}_seed{seed}.hf",)
        return self._stamped(f"{step.name}_seed{seed}", ["upcycle", *words, *given], output, after, meant)

    def _curate(self, step: Step) -> Task:
        output = self.place(step.name, 0)
        words = self.declaration.arguments(step.data or [])
        command = ["data", *words, f"output={output}", "--force"]
        return self._stamped(step.name, command, output, (), ["data", *self.declaration.meaning(step.data or [])])

    def _check_data(self, step: Step) -> None:
        try:
            load_config([*self.declaration.arguments(step.data or []), f"output={step.name}"], CurateConfig)
        except ConfigError as error:
            raise ConfigError(f"{error}; in the step {step.name} of {self.declaration.path}") from error

    def _stamped(self, name: str, command: list[str], output: Path, after: tuple[str, ...], meant: list[Any]) -> Task:
        """A task that is not done again where its stamp says that it was made of the same; `meant`: free of places."""
        stamp = self._stamp(name)

        def made_of() -> str:
            return digest([meant, *(self._identity(one) for one in after)])

        def arguments() -> list[str] | None:
            known = _hash_in(stamp)
            if known == made_of() and output.is_dir():
                return None
            if known not in (None, made_of()) and output.is_dir():
                if not self.force:
                    raise UserError(f"{output}: was made of something else; give --force to make it and its like anew")
                shutil.rmtree(output)
            stamp.unlink(missing_ok=True)
            return command

        def done() -> None:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_json(stamp, {"hash": made_of(), "command": command})

        return Task(name, self.folder / "logs" / f"{name}.log", arguments, after, done=done)

    def _identity(self, task: str) -> str:
        """What a task made, as far as its own inputs tell."""
        if task in self.runs:
            return identity(self.runs[task])
        stamp = self._stamp(task)
        return _hash_in(stamp) or ""

    def _tree(self, name: str) -> Layer:
        """Of a step's weights: the model and the tokenizer, from its config alone. Each is asked once."""
        if name not in self._trees:
            step = self.steps[name]
            if step.trains:
                run = self.planned(step, self.declaration.config.seed_list[0])
                tree = {"model": asdict(run.config.model), "data": {"tokenizer": run.config.data.tokenizer}}
            else:
                tree = self._upcycled_tree(step)
            self._trees[name] = Layer(f"the step {name} of {self.declaration.path}", tree, data=True)
        return self._trees[name]

    def _upcycled_tree(self, step: Step) -> dict[str, Any]:
        assert step.source is not None
        words = self.declaration.arguments(step.upcycle or [])
        try:
            loaded = load_config([*words, f"source={step.source}", f"output={step.name}"], UpcycleConfig)
        except ConfigError as error:
            raise ConfigError(f"{error}; in the step {step.name} of {self.declaration.path}") from error
        config = loaded.config
        registry = Registry(config.plugins, config.entry_points, loaded.places("plugins"))
        for axis, point in AXES.items():
            registry.resolve(point, getattr(config.recipe, axis), f"recipe.{axis}")
        dense = self._tree(step.source).tree
        return dense | {"model": overlay(dense["model"], config.model, ModelConfig)}


def _hash_in(stamp: Path) -> str | None:
    """What a step was made of; None where it was not ended."""
    if not stamp.is_file():
        return None
    return str(read_object(stamp, Reading(cure="delete it, and the step is made again")).get("hash"))
