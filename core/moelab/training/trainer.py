"""The loop: batch, step, log, evaluate, save. Everything it calls can be tested alone."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moelab import launcher
from moelab.alarms import AlarmChange
from moelab.atomic import write_file
from moelab.checkpoint import BEST, CONFIG
from moelab.config.run import RunConfig
from moelab.config.stored import stored, to_yaml
from moelab.data.packing import PackedBatches
from moelab.data.seen import read_record
from moelab.errors import ConfigError
from moelab.in_shares import in_shares
from moelab.integrity import Verify
from moelab.parallel.process_group import joined, together
from moelab.parallel.ranks import Ranks
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.training.autotune import WAYS, find_ways
from moelab.training.best import Best, with_folder
from moelab.training.borders import as_in, enter_if_due, stage_facts
from moelab.training.failure import NotFinite
from moelab.training.format import BEST_EVALUATION, ENDED_EARLY, REPLANNED
from moelab.training.held_out import ends_early, evaluate_run, write_evaluation
from moelab.training.interruption import Interruption
from moelab.training.limits import warn_of_disk
from moelab.training.logged import alarm_watch, log_step, probe
from moelab.training.loop import Loop, due, evaluation_due, served_backends
from moelab.training.observers import gather_observers, threads_told
from moelab.training.optimizer import set_learning_rate, state_bytes
from moelab.training.plan import Plan, to_json
from moelab.training.precision import choose_precision
from moelab.training.progress import Progress
from moelab.training.rescue import State, ending, save_what_is_good, shortages_told
from moelab.training.resume import as_left_off, find_resume, own_choice, replan, restore
from moelab.training.run_folder import (
    LOG,
    METRICS,
    SUMMARY,
    HeldLog,
    MetricsLog,
    close_log,
    forget_results,
    is_finished,
    open_log,
    prepare_run_folder,
    write_json,
)
from moelab.training.run_lock import hold
from moelab.training.saving import save, settle_if_done, settled
from moelab.training.setup import Setup, prepare
from moelab.training.shadow import writing_folder
from moelab.training.step import Observe, train_step
from moelab.training.summary import BACKENDS, LOADS, environment_facts, summary
from moelab.ways import using

logger = logging.getLogger("moelab")
Preparing = Callable[..., Setup]  # (config, registry, verify=..., ranks=...), as `moelab.training.setup.prepare`


def train(
    config: RunConfig,
    *,
    observers: Sequence[object] = (),
    force: bool = False,
    verify: bool = True,
    interruption: Interruption | None = None,
    preparing: Preparing = prepare,
) -> Path:
    """Run `config` to its end and return its folder. `observers` are added to the config's own.

    A run is resumed from its newest checkpoint that is as it was written; not `verify`: from the newest.

    Several processes that torchrun started all call it, and share the run as `config.parallel` says. `interruption`:
    what has listened for signals while the config was read. `preparing`: what makes the setup of the config; of
    post-training, that of `moelab.alignment`.

    Raises UserError before anything is written when the config, data, plugins or run folder are wrong;
    RunFailure when the loss stops being finite.
    """
    if config.alignment and preparing is prepare:
        raise ConfigError("alignment: post-training is run by `moelab align`, or moelab.align")
    run_dir = user_path(config.run_dir, "run_dir")
    device = choose_precision(config.train).device
    if launcher.has_begun(run_dir):  # another attempt of the same torchrun
        config, force = copy.copy(config), False
        config.resume = True
        logger.warning("%s: torchrun starts it again (attempt %d): it goes on", run_dir, launcher.attempt())
    with (
        (interruption or Interruption()).listening() as heard,
        joined(config.parallel, device) as ranks,
        writing_folder(run_dir, ranks, resume=config.resume) as folder,
    ):
        chosen = Asked(observers if ranks.main else (), force, in_shares(verify), heard, preparing)
        _train(config, ranks, folder, chosen)
    return run_dir


@dataclass(frozen=True)
class Asked:
    """What a caller asks beside the config."""

    observers: Sequence[object]
    force: bool
    verify: Verify
    interruption: Interruption
    preparing: Preparing


def _train(config: RunConfig, ranks: Ranks, run_dir: Path, asked: Asked) -> None:
    """The part of one of the ranks, which writes into `run_dir`."""
    with ExitStack() as stack:
        with HeldLog() as held, together(ranks):
            registry = Registry(config.plugins, config.entry_points, config.places("plugins"))
            with shortages_told(config, registry):
                setup = asked.preparing(config, registry, verify=asked.verify, ranks=ranks)
            lock = stack.enter_context(hold(run_dir))
            choice = own_choice(setup)
            resumed = find_resume(setup, choice, run_dir)
            setup = as_left_off(setup, resumed) if resumed else setup
            state = restore(setup, resumed) if resumed else {}
            plan = replan(setup, resumed, state) if resumed else Plan(config.schedule, config.train.steps)
            best = Best.of(state, resumed)
            prepare_run_folder(run_dir, resume=config.resume, force=asked.force)
            keep = config.train.keep_checkpoints + config.train.keep_best
            warn_of_disk(run_dir, setup.model, keep, state_bytes(setup.optimizer, stored=True), setup.adapters)
            if resumed and (history := read_record(resumed)):
                setup = replace(setup, history=history)
            for line in setup.seen.lines():
                logger.warning("train.init_from: %s", line)
            done = _nothing_left(config, state, best) if is_finished(run_dir) else None
            if done is not None:
                logger.warning("%s %s", run_dir, done)
                return
            launcher.begin(run_dir)
            forget_results(run_dir)
            if state and config.train.keep_best:
                anew = to_json(plan.changes) != state.get(REPLANNED, [])
                best = with_folder(best, run_dir / BEST, state["step"], replanned=anew)
        handler = open_log(run_dir / LOG, held.records)
        try:
            if config.as_written:
                keys = ", ".join(map(".".join, config.as_written))
                logger.warning("stored as written, not as resolved: %s; store_environment=true stores the values", keys)
            write_file(run_dir / CONFIG, to_yaml(as_in(setup, -1).config))
            chosen = setup.config.observers if ranks.main else ()
            manager = gather_observers(chosen, registry, run_dir, asked.observers)
            with closing(MetricsLog(run_dir / METRICS, state.get("step"))) as metrics:
                progress = Progress.of(state, setup.costs, setup.flops_per_token)
                watch = alarm_watch(setup, state)
                found = [] if state else [AlarmChange(0, "begins", alarm) for alarm in watch.on]
                loop = Loop(setup, run_dir, lock, manager, metrics, progress, watch, plan, best, changes=found)
                loop.resumed, loop.saved, loop.interruption = resumed, progress.step, asked.interruption
                loop.ended_early = ends_early(loop)
                loop.loads, loop.backends = state.get(LOADS, {}), state.get(BACKENDS, [])
                loop.damaged = {finding.folder.name for finding in choice.skipped} if choice else set()
                loop.ways = find_ways(setup, state)
                with threads_told(), using(loop.ways):
                    _run(loop)
        finally:
            close_log(handler)


def _nothing_left(config: RunConfig, state: Mapping[str, Any], best: Best) -> str | None:
    """Why a finished run doesn't go on, in words; None: it does."""
    step, train = state.get("step", 0), config.train
    if step == train.steps:
        return "is finished: nothing is left to do"
    if best.over(train.patience):
        return f"has {best.sentence(train.patience, step, train.steps)}; with a higher train.patience it goes on"
    return None


def _run(loop: Loop) -> None:
    """All remaining steps, then the summary, also when something went wrong on the way."""
    setup, progress, metrics = loop.setup, loop.progress, loop.metrics
    whole = as_in(setup, -1)  # what is told of a run in stages is its last one, which is what it makes
    facts = environment_facts(whole) | stage_facts(setup) | {REPLANNED: to_json(loop.plan.changes)}
    if isinstance(setup.batches, PackedBatches) and not setup.stages:  # which tell of their own
        logger.info("data.packing %s: %s", setup.config.data.packing, setup.batches.fill.line())
    for stage in setup.stages:
        logger.info("stage %s", stage.line())
    logger.info("%s: %s", facts["name"], {key: facts[key] for key in ("components", "parameters")})
    error: BaseException | None = None
    try:
        loop.observers.hook.on_train_begin(
            run_dir=loop.run_dir, config=stored(whole.config), facts=facts, step=progress.step,
            checkpoint=loop.resumed,
        )  # fmt: skip
        with loop.interruption:
            _end_if_asked(loop)  # while the run was built
            if progress.step == 0:
                evaluate_run(loop)
                probe(loop)
            elif evaluation_due(setup, progress.step) and not metrics.holds(progress.step, "eval/loss"):
                evaluate_run(loop)  # the run ended in it, and saved the step before
            while progress.step < setup.config.train.steps and not loop.ended_early:
                enter_if_due(loop)
                one_step(loop)
                _end_if_asked(loop)
        if loop.ended_early:
            logger.warning(loop.best.sentence(setup.config.train.patience, progress.step, setup.config.train.steps))
        if not due(progress.step, setup.config.evaluation.every) or progress.evaluation is None:
            evaluate_run(loop)
        write_evaluation(loop)
        save(loop, wait=True)
    except BaseException as problem:
        if setup.ranks.size > 1:  # the launcher ends all when it hears of one: that waits until the caller told it
            Interruption().to_the_end()
        error = ending(problem, setup.config, setup.registry, progress.step, setup.ranks)
        # A rank that fails alone can't save what lies on all of them; the others hear of it when it is gone.
        agreed = setup.ranks.size == 1 or loop.agreed or isinstance(error, NotFinite)
        if loop.saved != progress.step and agreed:
            state = State(progress.step, whole=not loop.update.under_way)
            saving = partial(save, loop, prune=False, wait=True)
            save_what_is_good(setup.model, setup.optimizer, saving, error, state, setup.ranks)
        if agreed:
            settled(loop)
    _end(loop, facts, error)
    if error is not None:
        raise error


def _end_if_asked(loop: Loop) -> None:
    """Raise KeyboardInterrupt on all ranks after the same step, where a signal came to one."""
    if loop.setup.ranks.any(loop.interruption.requested):
        loop.agreed = True
        raise KeyboardInterrupt


def _end(loop: Loop, facts: dict[str, Any], error: BaseException | None) -> None:
    """summary.json, and the observers' last word."""
    loop.lock.check()  # a folder that is gone gets no summary
    progress, dropped = loop.progress, loop.observers.dropped
    status = "finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    facts = facts | {BACKENDS: served_backends(loop), "observers_dropped": dropped}
    facts[WAYS] = loop.ways.chosen if loop.ways else {}
    facts[BEST_EVALUATION] = loop.best.to_json() | {"kept": (loop.run_dir / BEST).is_dir()}
    train = loop.setup.config.train
    facts[ENDED_EARLY] = {"planned": train.steps, "patience": train.patience} if loop.ended_early else None
    report = summary(facts, progress, status, loop.metrics.newest, loop.loads, loop.alarms.to_json())
    if error is not None:
        report["error"] = f"{type(error).__name__}: {error}"
        logger.info("%s after %d steps: %s", status, progress.step, report["error"])  # the caller hears it anyway
    told = len(dropped)
    try:
        write_json(loop.run_dir / SUMMARY, report)
        loop.observers.hook.on_train_end(step=progress.step, summary=report, error=error)
        if len(dropped) > told:
            write_json(loop.run_dir / SUMMARY, report)
    except OSError as problem:
        if error is None:
            raise ending(problem, loop.setup.config, loop.setup.registry, progress.step) from problem
        logger.error("%s can't be written: %s", SUMMARY, problem)


def one_step(loop: Loop) -> None:
    setup, progress, config = loop.setup, loop.progress, loop.setup.config
    started = time.perf_counter()
    rate = config.optimizer.lr * loop.plan.factor(progress.step)
    set_learning_rate(setup.optimizer, rate)
    with loop.reading.timed():
        batch = setup.batches.batch(progress.step)
    last = progress.step + 1 == setup.end
    observe = due(progress.step + 1, config.train.log_every) or last
    every = config.train.gradient_shares_every
    what = Observe(observe, observe and (due(progress.step + 1, every) or (last and every > 0)))
    result = train_step(
        setup.model, setup.optimizer, setup.balance_losses, batch, progress.step, setup.step_settings,
        observe=what, update=loop.update, ranks=setup.ranks, adapters=setup.adapters,
    )  # fmt: skip
    with loop.interruption.held():
        progress.advance(batch.token_count, result.served, time.perf_counter() - started)
        loop.update.under_way = False
        if observe:
            log_step(loop, result, rate)
    if evaluation_due(setup, progress.step):
        evaluate_run(loop)
    save_every = config.train.save_every
    if setup.ranks.any(loop.clock.due()) if save_every is None else due(progress.step, save_every):
        save(loop)
    else:
        settle_if_done(loop)
