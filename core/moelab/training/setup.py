"""From a config to all that a run needs, before anything is written: wrong input dies here."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from moelab.across_versions import as_ever
from moelab.alarms import Alarm
from moelab.builder import build_balance_losses, build_hollow, build_model, resolve_model
from moelab.checkpoint import CONFIG
from moelab.config.interpolation import KeyPath
from moelab.config.rope_scaling import as_part
from moelab.config.run import RunConfig, TrainConfig
from moelab.config.stages import fill_in, stand_in
from moelab.config.stored import to_yaml
from moelab.data.batches import ValidationBatches
from moelab.data.corpus import Corpus, DataContext
from moelab.data.lineage import LINEAGE, Lineage, trained
from moelab.data.promises import corpus_fault
from moelab.data.seen import RECORD, DataRecord, SeenText, record_of_run, seen_text
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.hookspecs import DATA_SOURCES, MIXERS, OBSERVERS, OPTIMIZERS, ROPE_SCALINGS
from moelab.integrity import Verify
from moelab.moe.balance import NamedLoss
from moelab.moe.block import MoEBlock
from moelab.nn.allocator import keep_freed_memory
from moelab.nn.checkpointing import apply_activation_checkpointing
from moelab.nn.count import Parameters, ServedCosts, count_parameters, flops_per_token, served_costs
from moelab.nn.narrow import narrow
from moelab.nn.optimizing import OptimizerContext, trained_parameters
from moelab.nn.room import check_room
from moelab.nn.transformer import Transformer
from moelab.origin import check_vocabulary
from moelab.parallel.process_group import processes_here, together
from moelab.parallel.ranks import ALONE, Ranks
from moelab.planning.memory import MemoryPlan
from moelab.registry import Registry
from moelab.training.adapters import Adapters, attach
from moelab.training.budget import settle_budget
from moelab.training.causality import Causality
from moelab.training.freeze import freeze
from moelab.training.mixture import Batches, build_batches
from moelab.training.optimizer import begin, build_optimizer, state_bytes
from moelab.training.past import named_weights, starting_history, starting_lineage
from moelab.training.precision import Precision, choose_precision, set_threads
from moelab.training.rehearsal import probe_step
from moelab.training.stages import Stage, build_stages, documents_read, held_out, rehearse
from moelab.training.start import Start, find_start, same_model, starting_model, starting_weights
from moelab.training.step import StepSettings

logger = logging.getLogger("moelab")


@dataclass(frozen=True)
class Setup:
    """A run, ready for its first step."""

    config: RunConfig  # resolved: every plugin default written out
    registry: Registry
    tokenizer: Tokenizer
    corpus: Corpus
    history: DataRecord  # the text that the starting weights have met
    lineage: Lineage | None  # how they were made; None: random weights
    named_weights: dict[KeyPath, Lineage]  # how those were made that other keys of the config name
    batches: Batches
    validation: ValidationBatches
    model: Transformer
    optimizer: torch.optim.Optimizer
    balance_losses: list[NamedLoss]
    step_settings: StepSettings
    threads: int
    parameters: Parameters
    start: Start
    flops_per_token: float  # forward and backward, as the routers declare
    causality: Causality  # which layers look at later tokens
    costs: ServedCosts  # by which the run counts what its experts served
    alarms: list[Alarm]  # found before the first step
    ranks: Ranks = ALONE  # the processes over which the run is laid
    adapters: Adapters | None = None  # what is trained in place of the model's parameters
    stages: tuple[Stage, ...] = ()  # of the run; what stands above is that of `stage`, the model's positions too
    stage: int = 0
    compiled: Any = None  # moelab.training.compiled.Compiled, where train.compile asks for it
    planned: MemoryPlan | None = None  # where train.memory_budget chose how to compute a step

    @property
    def seen(self) -> SeenText:
        """How much of the held-out text the starting weights have met."""
        source, scored = self.config.train.init_from, self.validation.documents_scored()
        return seen_text(self.history, source, self.corpus, self.tokenizer, scored)

    @property
    def learner(self) -> torch.nn.Module:
        """What the optimizer trains, and where gradients are: the model, with one more head, or its adapters."""
        return self.adapters or self.step_settings.head or self.model

    @property
    def first(self) -> int:
        """The first step of the stage; of the run where it has none."""
        return self.stages[self.stage].first if self.stages else 0

    @property
    def end(self) -> int:
        """The steps that are done when the stage, or the run, is."""
        return self.stages[self.stage].end if self.stages else self.config.train.steps

    @property
    def blocks(self) -> list[MoEBlock]:
        return [module for module in self.model.modules() if isinstance(module, MoEBlock)]


def prepare(config: RunConfig, registry: Registry, *, verify: Verify = True, ranks: Ranks = ALONE) -> Setup:
    """Build everything; nothing is written. Raises UserError for whatever is wrong, naming key, file or plugin.

    `verify`: a checkpoint that it starts from is compared with its checksums. `ranks`: over which the model is laid
    where they are several; a mistake that ends one of them ends all.
    """
    config = copy.deepcopy(config)
    threads = set_threads(config.train)
    precision = choose_precision(config.train)
    if precision.device.type == "cpu":
        keep_freed_memory()
    resolve_run(config, registry)
    if config.stages:
        stand_in(config, 0)
    losses = build_balance_losses(config.model, registry)
    _check_shapes(config, registry, precision, ranks, verify)
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config.model.vocab_size, tokenizer, config.data.tokenizer)
    start = _told_start(config, tokenizer, registry, verify)
    planned = settle_budget(config, registry, precision.device.type, start)
    corpus = build_corpus_of(config, registry, tokenizer)
    train, micro = config.train, config.train.micro_batch_size or config.train.batch_size // ranks.size
    stages = build_stages(config, corpus, registry)
    batches = stages[0].batches if stages else build_batches(config, corpus, registry)
    if ranks.size > 1:
        model, adapters = _spread_model(ranks, config, registry, losses, precision, start), None
    else:
        model, adapters = _whole_model(config, registry, precision, start)
    settings = StepSettings(micro, train.grad_clip, config.seed, precision)
    rehearse(model, stages, precision)
    rehearsal = probe_step(model, losses, batches.batch(0), settings)
    losses, compiled = _choose_ways(model, losses, train, precision)
    return Setup(
        config=config,
        registry=registry,
        tokenizer=tokenizer,
        corpus=corpus,
        history=starting_history(config, start),
        lineage=starting_lineage(config, start),
        named_weights=named_weights(config),
        batches=batches,
        validation=stages[0].validation if stages else held_out(config, corpus),
        model=model,
        optimizer=_optimizer(config, registry, model, adapters, tokenizer, ranks, verify),
        balance_losses=losses,
        step_settings=settings,
        threads=threads,
        parameters=count_parameters(model),
        start=start,
        flops_per_token=flops_per_token(model, train.sequence_length),
        costs=served_costs(model, train.sequence_length),
        alarms=rehearsal.alarms,
        causality=rehearsal.causality,
        ranks=ranks,
        adapters=adapters,
        stages=stages,
        planned=planned,
        compiled=compiled,
    )


def _told_start(config: RunConfig, tokenizer: Tokenizer, registry: Registry, verify: Verify) -> Start:
    start = find_start(config, tokenizer, registry, verify=verify)
    for line in start.told:
        logger.warning(line)
    return start


def _choose_ways(
    model: Transformer, losses: list[NamedLoss], train: TrainConfig, precision: Precision
) -> tuple[list[NamedLoss], Any]:
    """How the model and its losses are computed from the first step on; their rehearsal was plain.

    -> the losses, and what was compiled: moelab.training.compiled.Compiled, or None.
    """
    model.recompute_logits, run = train.recompute_logits, None
    if train.compile:
        compiled: Any = import_module("moelab.training.compiled")  # a second of imports
        run, losses = compiled.compile_parts(model, losses, precision.device.type)
    if train.activation_checkpointing:
        apply_activation_checkpointing(model, train.activation_checkpointing)
    return losses, run


def _whole_model(
    config: RunConfig, registry: Registry, precision: Precision, start: Start
) -> tuple[Transformer, Adapters | None]:
    """The starting model of a process alone, as it is trained: frozen parts, adapters, narrow parameters."""
    model = starting_model(config, registry, precision.device, start)
    freeze(model, config.train.freeze)
    adapters = attach(model, config.train.adapters, config.seed)
    if precision.kept == torch.bfloat16:
        narrow(model)
    return model, adapters


def _optimizer(
    config: RunConfig,
    registry: Registry,
    model: torch.nn.Module,
    adapters: Adapters | None,
    tokenizer: Tokenizer | None,
    ranks: Ranks,
    verify: Verify = True,
) -> torch.optim.Optimizer:
    """Built, and what it reads from disk read, unless the model is one without a number in it."""
    trained = trained_parameters(adapters or model, config.optimizer.learning_rates)
    context = OptimizerContext(
        trained, config.optimizer, ranks.size, adapters is not None,
        weights=same_model(config, registry, tokenizer, verify=verify),
    )  # fmt: skip
    optimizer = build_optimizer(context, registry)
    if not trained[0].parameter.is_meta:
        begin(optimizer)
    if adapters is not None:
        adapters.follow(optimizer)
    return optimizer


def with_head(setup: Setup, head: torch.nn.Module) -> Setup:
    """The setup of a run that trains the model with one more head; `head` holds the parameters of both, by name."""
    settings = dataclasses.replace(setup.step_settings, head=head)
    optimizer = _optimizer(setup.config, setup.registry, head, None, setup.tokenizer, setup.ranks)
    return dataclasses.replace(setup, optimizer=optimizer, step_settings=settings)


def _check_shapes(config: RunConfig, registry: Registry, precision: Precision, ranks: Ranks, verify: Verify) -> None:
    """Before the data: a wrong shape, one that no memory holds, or an optimizer that can't be, fails at once."""
    hollow, beside = build_model(config.model, registry, device="meta", seed=None), processes_here(ranks.size)
    if precision.kept == torch.bfloat16:
        narrow(hollow)
    state = None
    if not config.train.adapters:
        state = state_bytes(_optimizer(config, registry, hollow, None, None, ranks, verify))
    check_room(hollow, precision.device, state, shard=config.parallel.shard, beside=beside)


def _spread_model(
    ranks: Ranks,
    config: RunConfig,
    registry: Registry,
    losses: Sequence[NamedLoss],
    precision: Precision,
    start: Start,
) -> Transformer:
    """The starting model in pieces over the ranks: cut before there is a number in it, so that none holds it all."""
    parallel: Any = import_module("moelab.parallel.parallelise")  # a second of imports that one process saves
    filling: Any = import_module("moelab.parallel.filling")
    with together(ranks):  # what fails on one of them fails before they wait for each other
        stored = starting_weights(config, registry, start)
        model = build_hollow(config.model, registry, device=precision.device, seed=config.seed)
        freeze(model, config.train.freeze)
    meshes = import_module("moelab.parallel.mesh").make_meshes(config.parallel, ranks.size, precision.device.type)
    with together(ranks):
        resharding = config.parallel.reshard_after_forward
        parallel.parallelise(model, meshes, losses, reshard_after_forward=resharding)
        hollow = filling.make_room(model, precision.device)
        filling.fill_hollow(model, hollow, stored, config.model.initializer_range, config.seed)
    return model


def resolve_run(config: RunConfig, registry: Registry) -> None:
    """Write every default of every chosen plugin into the config, in place."""
    resolve_parts(config, registry)
    if config.stages:
        stand_in(config, -1)


def resolve_parts(config: RunConfig, registry: Registry) -> None:
    """The same for a config that stands in a stage, and stays there."""
    resolve_model(config.model, registry)
    config.optimizer.algorithm = registry.resolve(OPTIMIZERS, config.optimizer.algorithm, OPTIMIZERS.key)
    config.data.source = registry.resolve(DATA_SOURCES, config.data.source, "data.source")
    if config.data.mixer is not None:
        config.data.mixer = registry.resolve(MIXERS, config.data.mixer, "data.mixer")
    fill_in(config)
    for number, stage in enumerate(config.stages):
        where = f"stages.{number}"
        if stage.rope_scaling is not None:
            part = as_part(stage.rope_scaling)
            stage.rope_scaling = registry.resolve(ROPE_SCALINGS, part, f"{where}.rope_scaling")
        if stage.mixer is not None:
            stage.mixer = registry.resolve(MIXERS, stage.mixer, f"{where}.mixer")
    config.observers = [registry.resolve(OBSERVERS, o, f"observers.{i}") for i, o in enumerate(config.observers)]


def build_corpus_of(config: RunConfig, registry: Registry, tokenizer: Tokenizer) -> Corpus:
    """The corpus that `data` describes."""
    data = config.data
    context = DataContext(tokenizer, data.validation_fraction, data.seed, config.places("data"), data.split_seed)
    corpus = registry.build(DATA_SOURCES, data.source, context, "data.source")
    fault = corpus_fault(corpus, tokenizer.vocab_size)
    if fault is not None:
        chosen, _ = registry.select(DATA_SOURCES, data.source, "data.source")
        raise registry.part(DATA_SOURCES, data.source, "data.source").fault(fault, chosen.build)
    return dataclasses.replace(corpus, commits=context.account.commits)


def checkpoint_files(setup: Setup, step: int, made: Mapping[str, Any]) -> dict[str, bytes]:
    """What goes into the checkpoint of this step beside its tensors. `made`: of their making, what no config says."""
    read = documents_read(setup.stages, step) if setup.stages else setup.batches.documents_read(step)
    record = setup.history | record_of_run(setup.corpus, setup.tokenizer, read)
    config = as_ever(dataclasses.asdict(setup.config), RunConfig, setup.registry)
    lineage = trained(config, setup.lineage, made, setup.named_weights)
    own = {CONFIG: to_yaml(setup.config).encode(), RECORD: record.to_bytes(), LINEAGE: lineage.to_bytes()}
    return own | setup.tokenizer.files() | setup.start.files
