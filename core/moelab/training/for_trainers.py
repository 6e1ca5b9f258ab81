"""An optimizer of `optimizer.algorithm` for another trainer: transformers', TRL's, or a loop of one's own.

    optimizer = moelab.optimizer_for(model, {"lr": 1e-6, "algorithm": {"name": "online_merging", ...}})
    DPOTrainer(model, ..., optimizers=(optimizer, None))

Such a trainer sets the groups' `lr` as it likes, keeps `optimizer.state_dict()`, and seeds nothing between steps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from moelab.builder import resolve_model
from moelab.config.run import OptimizerConfig, RunConfig, TrainConfig
from moelab.config.typed import SCHEMA
from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError
from moelab.nn.optimizing import Optimizer, OptimizerContext, trained_parameters
from moelab.nn.transformer import Transformer
from moelab.registry import Registry
from moelab.training.optimizer import begin, build_optimizer
from moelab.training.start import same_model


def optimizer_for(
    model: nn.Module,
    settings: OptimizerConfig | Mapping[str, Any],
    *,
    registry: Registry | None = None,
    tokenizer: Tokenizer | None = None,
    seed: int = 0,
) -> Optimizer:
    """Of what is trained in `model`, a Transformer or what one lies in (`moelab.as_transformers`, a reward head).

    `settings`: as the section `optimizer` of a config. Patterns go by the Transformer's own names, whatever it lies in.
    `registry`: the plugins that the caller names; None: the installed ones. `tokenizer`: compared with those of the
    folders that the algorithm reads; None: not. `seed`: of whatever it draws, each step anew. Each group's `lr` is set
    already; a rate set later is to be times its `factor` (a LambdaLR keeps it so).

    Raises ConfigError for what can't be, CheckpointError for folders that can't be read.
    """
    if not isinstance(settings, OptimizerConfig):
        settings = SCHEMA.build(OptimizerConfig, dict(settings), ("optimizer",))
    settings.check()
    registry = registry or Registry()
    within = next(((name, one) for name, one in model.named_modules() if isinstance(one, Transformer)), None)
    if within is None:
        raise ConfigError("optimizer: there is no model of moelab in what is to be trained; moelab.as_transformers")
    path, inner = within
    inside = f"{path}." if path else ""
    run = RunConfig(run_dir="-", model=copy.deepcopy(inner.config), train=TrainConfig(steps=1, sequence_length=1))
    resolve_model(run.model, registry)
    trained = trained_parameters(model, settings.learning_rates, inside)
    if not trained:
        raise ConfigError("optimizer: nothing of the model is trained: every parameter is frozen")
    context = OptimizerContext(trained, settings, seed=seed, weights=same_model(run, registry, tokenizer))
    optimizer = build_optimizer(context, registry)
    begin(optimizer)
    return optimizer
