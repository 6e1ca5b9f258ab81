"""What Python and notebooks call: a config becomes a run, and a run a result that one can look into.

`moelab train` does the same with the same words; nothing here is decided differently.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from moelab.alignment.run import align as run_stages
from moelab.alignment.run import check_installed, lowest_layer
from moelab.checkpoint import BEST
from moelab.config.load import Loaded
from moelab.config.load import load_config as load_layers
from moelab.config.run import RunConfig
from moelab.errors import ConfigError, UserError
from moelab.in_shares import in_shares
from moelab.integrity import Verify
from moelab.loading import load
from moelab.nn.transformer import Transformer
from moelab.origin import origin_layer
from moelab.registry import Registry
from moelab.safe_files import Reading, json_lines, read_object
from moelab.training import trainer
from moelab.training.run_folder import METRICS, SUMMARY
from moelab.training.setup import Setup
from moelab.training.setup import prepare as prepare_run

logger = logging.getLogger("moelab")

PROGRESS = "moelab_tools.progress"  # of the command line, above this library and named as a string
READING = Reading(UserError, "look at the run's log.txt, or train it again")


@dataclass(frozen=True)
class TrainedRun:
    """What `moelab.train` leaves: the folder, and what lies in it, read when asked for."""

    run_dir: Path
    registry: Registry = field(repr=False)  # the plugins that the run was made with

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json: status, steps, final numbers, alarms."""
        return read_object(self.run_dir / SUMMARY, READING, finite=False)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, oldest first; `pandas.DataFrame(run.metrics)` takes them."""
        return [dict(row) for _, row in json_lines(self.run_dir / METRICS, READING)]

    @cached_property
    def model(self) -> Transformer:
        """Of the last checkpoint, in evaluation mode, on the CPU."""
        return load(self.run_dir, registry=self.registry)

    @cached_property
    def best_model(self) -> Transformer:
        """Of the checkpoint with the lowest held-out loss. Raises CheckpointError without `train.keep_best`."""
        return load(self.run_dir / BEST, registry=self.registry)

    def __repr__(self) -> str:
        final = self.summary.get("final", {})
        units = {"eval/loss": "nats a token", "eval/bits_per_byte": "bits per byte"}
        loss = ", ".join(f"{final[tag]:.4f} {unit}" for tag, unit in units.items() if tag in final)
        return f"{self.run_dir}: {self.summary.get('status')} at step {self.summary.get('steps')}; held-out {loss}"


def load_config(*arguments: str | PathLike[str], verify: bool = True) -> RunConfig:
    """Config files, laid over each other from left to right, and `key=value` overrides -> a checked config.

        moelab.load_config("configs/train/tiny_moe.yaml", "seed=1", "run_dir=runs/b")

    As on the command line, shipped configs go by name ("train/tiny_moe"), and with `train.init_from` or `resume=true`
    model and tokenizer are the checkpoint's (`verify`: compared with its checksums). Plugins and data are looked for
    beside the files, too. Raises ConfigError naming the key and who set it.
    """
    return _load(arguments, verify=verify).config


def train(
    *config: RunConfig | str | PathLike[str],
    observers: Sequence[object] = (),
    resume: bool = False,
    force: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> TrainedRun:
    """Train as `moelab train` does, from config files and `key=value`, or from one RunConfig.

        run = moelab.train("train/tiny_moe", "run_dir=runs/a", "train.steps=100")
        run.summary["final"]["eval/loss"], run.model.generate("import ")

    `observers` hear of the run beside the config's own; any object with methods named as `moelab.hookspecs.RunHooks`
    names them. `resume`: go on from run_dir's newest undamaged checkpoint; `force`: delete the run that it holds;
    `progress`: a bar in a terminal or notebook, lines elsewhere. KeyboardInterrupt (a notebook's stop button) saves
    first. Raises UserError before anything is written where something is wrong, RunFailure where training fails.
    """
    loaded = _load_any(config, resume=resume, verify=in_shares(verify))
    run = loaded.config
    if run.resume and force:
        raise ConfigError("resume and force: one goes on, the other deletes; give one of them")
    shown = _progress(run.train.steps) if progress else []
    try:
        run_dir = trainer.train(run, observers=[*shown, *observers], force=force, verify=verify)
    except ConfigError as error:
        raise loaded.blame(error) from error
    return TrainedRun(run_dir, _registry(run))


def align(
    *config: RunConfig | str | PathLike[str],
    resume: bool = False,
    force: bool = False,
    observers: Sequence[object] = (),
    progress: bool = True,
    verify: bool = True,
) -> list[TrainedRun]:
    """Run the stages of `alignment`, as `moelab align` does: config files and 'key=value', or one RunConfig.

    -> a run for each stage, in order. `observers` see every stage. Raises ConfigError without the extra `align`,
    UserError before anything of a stage is written where something is wrong, RunFailure where training fails.
    """
    check_installed()
    if len(config) == 1 and isinstance(config[0], RunConfig):
        loaded = _load_any(config, resume=resume, verify=in_shares(verify))
    else:
        texts = [fspath(argument) for argument in [*config, *(["resume=true"] if resume else [])]]  # type: ignore[arg-type]
        loaded = load_layers(texts, RunConfig, below=partial(lowest_layer, verify=in_shares(verify)))
    run = loaded.config

    def watching(own: RunConfig) -> list[object]:
        return [*(_progress(own.train.steps) if progress else []), *observers]

    try:
        folders = run_stages(run, observers=watching, force=force, verify=verify)
    except ConfigError as error:
        raise loaded.blame(error) from error
    return [TrainedRun(folder, _registry(run)) for folder in folders]


def generate(
    model: Transformer | str | PathLike[str],
    prompt: str | Sequence[str],
    max_new_tokens: int | None = None,
    *,
    registry: Registry | None = None,
    trust: bool = False,
    **how: Any,
) -> Any:
    """Each prompt with its continuation, many at a time: one text for one, a list for several, as `moelab generate`.

        moelab.generate("runs/tiny_moe", ["import ", "def "], 40, temperature=0.0)

    `model`: one, also inside `moelab.as_transformers`, or whatever folder `moelab.load` takes, with its `registry` and
    `trust`. `how`: `samples`, `batch_size`, `tokenizer` and the settings of `Transformer.generate`, which says what it
    raises.
    """
    chosen: Any = load(fspath(model), registry=registry, trust=trust) if isinstance(model, str | PathLike) else model
    if not isinstance(chosen, Transformer):
        chosen = getattr(chosen, "model", None)
    if not isinstance(chosen, Transformer):
        raise ConfigError(f"generate: takes a model of moelab or the folder of one, not {type(model).__name__}")
    return chosen.generate(prompt, max_new_tokens, **how)


def prepare(config: RunConfig, *, verify: bool = True) -> Setup:
    """All that a run needs, ready for its first step, and nothing written: for a loop of your own.

    `.model`, `.optimizer`, `.balance_losses`, `.batches.batch(step)`, `.validation`, `.tokenizer`: as
    `examples/minimal_loop.py` uses them. Raises UserError for whatever is wrong, naming key, file or plugin.
    """
    return prepare_run(config, _registry(config), verify=verify)


def _load(arguments: Sequence[Any], *, verify: Verify) -> Loaded[RunConfig]:
    for argument in arguments:
        if not isinstance(argument, str | PathLike):
            raise ConfigError(
                f"config: takes config files and 'key=value', or one RunConfig alone, not {type(argument).__name__} "
                "beside others; change a RunConfig's fields, or give these to moelab.load_config"
            )
    texts = [fspath(argument) for argument in arguments]
    return load_layers(texts, RunConfig, below=partial(origin_layer, verify=verify))


def _load_any(arguments: Sequence[Any], *, resume: bool, verify: Verify) -> Loaded[RunConfig]:
    if len(arguments) != 1 or not isinstance(arguments[0], RunConfig):
        return _load([*arguments, *(["resume=true"] if resume else [])], verify=verify)
    config = copy.copy(arguments[0])
    config.resume = config.resume or resume
    config.check()
    return Loaded(config, [])


def _registry(config: RunConfig) -> Registry:
    return Registry(config.plugins, config.entry_points, config.places("plugins"))


def _progress(steps: int) -> list[object]:
    """Who shows how far it is; nobody where the command line is not installed beside the library."""
    if find_spec(PROGRESS.partition(".")[0]) is None:
        return []
    return [import_module(PROGRESS).TrainingProgress(steps)]
