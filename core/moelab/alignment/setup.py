"""A stage's setup: the run's own, with examples in place of text, and TRL's loss in place of the next token's."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch

from moelab.adapter.base import MoelabPreTrainedModel
from moelab.adapter.registration import as_classifier, as_transformers
from moelab.alignment.batches import ExampleBatches
from moelab.alignment.examples import Examples
from moelab.alignment.held_out import HeldOut
from moelab.alignment.judge import build_judge
from moelab.alignment.objective import Alignment, Headed
from moelab.alignment.replay import weighers
from moelab.alignment.sampled import SampledBatches
from moelab.alignment.trainers import build_trainer
from moelab.config.alignment import KEY, PAIRED, AlignmentConfig
from moelab.config.run import RunConfig
from moelab.data.rewards import RewardContext
from moelab.errors import CheckpointError, ConfigError
from moelab.hub import user_folder
from moelab.integrity import Verify
from moelab.loading import load
from moelab.origin import read_origin, same_tokenizer
from moelab.parallel.ranks import ALONE, Ranks
from moelab.registry import Registry
from moelab.seeds import derive_seed
from moelab.training.setup import Setup, prepare, with_head

logger = logging.getLogger("moelab")
STAGE = f"{KEY}.0"
REWARD = f"{STAGE}.reward"


@dataclass(frozen=True)
class Preparing:
    """`moelab.training.setup.prepare` of one stage whose examples are read."""

    examples: Examples

    def __call__(self, config: RunConfig, registry: Registry, *, verify: Verify = True, ranks: Ranks = ALONE) -> Setup:
        """Raises UserError before anything is written, as `prepare` does, and for what the stage can't be done with."""
        (stage,) = config.alignment
        setup = prepare(config, registry, verify=verify, ranks=ranks)
        if stage.router == "freeze":
            for block in setup.blocks:
                if hasattr(block.router, "after_step"):
                    block.router.after_step = None  # what it does not learn by gradient, it does not learn so either
        if stage.stage == "reward":
            torch.manual_seed(derive_seed(config.seed, "reward head"))
            policy: Any = as_classifier(setup.model)
            setup = with_head(setup, Headed(setup.model, policy.score))
        else:
            policy = as_transformers(setup.model)
        reference = _reference(setup, stage, verify)
        seed, on_cpu = setup.config.seed, setup.step_settings.precision.device.type == "cpu"
        loss_of = reference if stage.stage in PAIRED else None
        trainer = build_trainer(stage, policy, loss_of, setup.tokenizer, seed, on_cpu=on_cpu)
        objective = Alignment(stage, trainer, policy, reference, self.examples.fingerprint)
        objective.account = self.examples.account
        batches: Any = ExampleBatches(
            self.examples.rows,
            setup.config.train.batch_size,
            setup.config.order_seed,
            setup.tokenizer.eos_token_id,
            len(setup.corpus.train.document_names),
        )
        if self.examples.held_out:
            size = setup.config.train.micro_batch_size or setup.config.train.batch_size
            objective.held_out = HeldOut(stage.stage, self.examples.held_out, size, batches.pad_id)
            objective.held_out_fingerprint = self.examples.held_out_fingerprint
        if stage.reward is not None:
            device = setup.step_settings.precision.device
            told = RewardContext(config.places(KEY), REWARD, device, batches.pad_id, setup.registry, setup.tokenizer)
            judge = build_judge(stage.reward, setup.registry, told)
            for row in self.examples.rows:
                judge.check(row.where, row.fields)
            decode, seed = setup.tokenizer.decode, setup.config.order_seed
            batches = SampledBatches(batches, policy, judge, stage, decode, self.examples.ends, seed)
            objective.sampled = batches.metrics
        if stage.replay != "none":
            weighers(setup.model)
        losses = setup.balance_losses if stage.balance else []
        settings = dataclasses.replace(setup.step_settings, objective=objective)
        return dataclasses.replace(setup, batches=batches, step_settings=settings, balance_losses=losses)


def _reference(setup: Setup, stage: AlignmentConfig, verify: Verify) -> MoelabPreTrainedModel | None:
    """What the policy is held against; None where nothing asks for it."""
    if stage.reference is None and stage.stage not in PAIRED:
        return None
    named = stage.reference or setup.config.train.init_from
    where = f"{STAGE}.reference" if stage.reference else "train.init_from"
    assert named is not None, "check_alignment asks for train.init_from"
    try:
        folder = user_folder(named, where)
        origin = read_origin(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if stage.reference and origin.own_tokenizer() is not None and not same_tokenizer(setup.tokenizer, origin.folder):
        raise ConfigError(
            f"{where}: {folder} has another tokenizer than the policy, so its log-probabilities are of other tokens; "
            "name weights that were trained with the same one"
        )
    device = setup.step_settings.precision.device
    model = load(folder, device=device, registry=setup.registry, verify=bool(verify))
    if model.config.vocab_size != setup.model.config.vocab_size:
        raise ConfigError(
            f"{where}: {folder} has {model.config.vocab_size} token ids and the policy "
            f"{setup.model.config.vocab_size}; name weights of the same vocabulary"
        )
    return as_transformers(model)
