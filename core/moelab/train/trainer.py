"""The loop: batch, step, log, evaluate, save. Everything it calls can be tested alone."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from moelab.alarms import AlarmChange, AlarmWatch
from moelab.atomic import discard, write_file
from moelab.checkpoint import CHECKPOINTS, CONFIG
from moelab.config.run import RunConfig
from moelab.config.stored import seal, stored, to_yaml
from moelab.data.lineage import CONVERSION
from moelab.data.seen import read_record
from moelab.paths import user_path
from moelab.registry import Registry
from moelab.train.checkpoint import save_checkpoint
from moelab.train.evaluate import evaluate, sample_texts
from moelab.train.failure import check_evaluation
from moelab.train.interruption import Interruption
from moelab.train.limits import warn_of_disk
from moelab.train.observers import Observers, gather_observers, threads_told
from moelab.train.probe import look, probe_batch
from moelab.train.progress import Progress
from moelab.train.rescue import State, ending, save_what_is_good, shortages_told
from moelab.train.resume import PLUGINS, VERSIONS, find_resume, own_choice, restore, training_state
from moelab.train.router_numbers import layer_facts
from moelab.train.run_folder import (
    DOCUMENTS,
    LOG,
    METRICS,
    SAMPLES,
    SUMMARY,
    HeldLog,
    MetricsLog,
    close_log,
    is_finished,
    open_log,
    prepare_run_folder,
    write_json,
)
from moelab.train.run_lock import RunLock, hold
from moelab.train.save_clock import SaveClock
from moelab.train.schedule import learning_rate_factor
from moelab.train.setup import Setup, checkpoint_files, fixed_environment, prepare
from moelab.train.start import OVERRIDES
from moelab.train.step import Observe, StepResult, Update, train_step
from moelab.train.summary import BACKENDS, LOADS, backends, environment_facts, log_metrics, summary, versions

logger = logging.getLogger("moelab")


@dataclass
class Loop:
    """What one run carries from step to step."""

    setup: Setup
    run_dir: Path
    lock: RunLock
    observers: Observers
    metrics: MetricsLog
    progress: Progress
    alarms: AlarmWatch
    loads: dict[str, list[float]] = field(default_factory=dict)  # layer -> shares of the last logged step
    backends: list[str] = field(default_factory=list)  # that served so far
    samples: list[str] = field(default_factory=list)  # of the last evaluation
    changes: list[AlarmChange] = field(default_factory=list)  # of alarms, that no log has shown yet
    resumed: Path | None = None  # the checkpoint that the run goes on from
    saved: int | None = None  # the step of the last checkpoint, or of the start: nothing is lost since
    update: Update = field(default_factory=Update)
    clock: SaveClock = field(default_factory=SaveClock)
    interruption: Interruption = field(default_factory=Interruption)
    damaged: set[str] = field(default_factory=set)  # names of checkpoints that were passed over


def train(config: RunConfig, *, observers: Sequence[object] = (), force: bool = False, verify: bool = True) -> Path:
    """Run `config` to its end and return its folder. `observers` are added to the config's own.

    A run is resumed from its newest checkpoint that is as it was written; not `verify`: from the newest.

    Raises UserError before anything is written when the config, data, plugins or run folder are wrong;
    RunFailure when the loss stops being finite.
    """
    run_dir = user_path(config.run_dir, "run_dir")
    with ExitStack() as stack:
        with HeldLog() as held:
            registry = Registry(config.plugins, config.entry_points, config.places("plugins"))
            with shortages_told(config, registry):
                setup = prepare(config, registry, verify=verify)
            lock = stack.enter_context(hold(run_dir))
            choice = own_choice(setup)
            resumed = find_resume(setup, choice, run_dir)
            state = restore(setup, resumed) if resumed else {}
            prepare_run_folder(run_dir, resume=config.resume, force=force)
            warn_of_disk(run_dir, setup.model, config.train.keep_checkpoints)
            if resumed and (history := read_record(resumed)):
                setup = replace(setup, history=history)
            for line in setup.seen.lines():
                logger.warning("train.init_from: %s", line)
            if state.get("step") == config.train.steps and is_finished(run_dir):
                logger.warning("%s is finished: nothing is left to do", run_dir)
                return run_dir
        handler = open_log(run_dir / LOG, held.records)
        try:
            if config.as_written:
                keys = ", ".join(map(".".join, config.as_written))
                logger.warning("stored as written, not as resolved: %s; store_environment=true stores the values", keys)
            write_file(run_dir / CONFIG, to_yaml(setup.config))
            manager = gather_observers(setup.config.observers, registry, run_dir, observers)
            with closing(MetricsLog(run_dir / METRICS, state.get("step"))) as metrics:
                progress = Progress.of(state, setup.costs, setup.flops_per_token)
                watch = alarm_watch(setup, state)
                found = [] if state else [AlarmChange(0, "begins", alarm) for alarm in watch.on]
                loop = Loop(setup, run_dir, lock, manager, metrics, progress, watch, changes=found, saved=progress.step)
                loop.resumed = resumed
                loop.loads, loop.backends = state.get(LOADS, {}), state.get(BACKENDS, [])
                loop.damaged = {finding.folder.name for finding in choice.skipped} if choice else set()
                with threads_told():
                    _run(loop)
        finally:
            close_log(handler)
    return run_dir


def _run(loop: Loop) -> None:
    """All remaining steps, then the summary, also when something went wrong on the way."""
    setup, progress, metrics = loop.setup, loop.progress, loop.metrics
    facts = environment_facts(setup)
    logger.info("%s: %s", facts["name"], {key: facts[key] for key in ("components", "parameters")})
    error: BaseException | None = None
    try:
        loop.observers.hook.on_train_begin(
            run_dir=loop.run_dir, config=stored(setup.config), facts=facts, step=progress.step,
            checkpoint=loop.resumed,
        )  # fmt: skip
        with loop.interruption:
            if progress.step == 0:
                _evaluate(loop)
                _probe(loop)
            elif _due(progress.step, setup.config.evaluation.every) and not metrics.holds(progress.step, "eval/loss"):
                _evaluate(loop)  # the run ended in it, and saved the step before
            while progress.step < setup.config.train.steps:
                one_step(loop)
                loop.interruption.check()
        if not _due(progress.step, setup.config.evaluation.every) or progress.evaluation is None:
            _evaluate(loop)
        _write_evaluation(loop)
        _save(loop)
    except BaseException as problem:
        error = ending(problem, setup.config, setup.registry, progress.step)
        if loop.saved != progress.step:
            state = State(progress.step, whole=not loop.update.under_way)
            save_what_is_good(setup.model, setup.optimizer, partial(_save, loop, prune=False), error, state)
    _end(loop, facts, error)
    if error is not None:
        raise error


def _end(loop: Loop, facts: dict[str, Any], error: BaseException | None) -> None:
    """summary.json, and the observers' last word."""
    loop.lock.check()  # a folder that is gone gets no summary
    progress, dropped = loop.progress, loop.observers.dropped
    status = "finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    facts = facts | {BACKENDS: _backends(loop), "observers_dropped": dropped}
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
    rate = config.optimizer.lr * learning_rate_factor(config.schedule, progress.step, config.train.steps)
    for group in setup.optimizer.param_groups:
        group["lr"] = rate
    batch = setup.batches.batch(progress.step)
    last = progress.step + 1 == config.train.steps
    observe = _due(progress.step + 1, config.train.log_every) or last
    every = config.train.gradient_shares_every
    what = Observe(observe, observe and (_due(progress.step + 1, every) or (last and every > 0)))
    result = train_step(
        setup.model, setup.optimizer, setup.balance_losses, batch, progress.step, setup.step_settings,
        observe=what, update=loop.update,
    )  # fmt: skip
    with loop.interruption.held():
        progress.advance(batch.token_count, result.served, time.perf_counter() - started)
        loop.update.under_way = False
        if observe:
            _log(loop, result, rate)
    if _due(progress.step, config.evaluation.every):
        _evaluate(loop)
    save_every = config.train.save_every
    if loop.clock.due() if save_every is None else _due(progress.step, save_every):
        _save(loop)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _log(loop: Loop, result: StepResult, rate: float) -> None:
    loop.lock.check()
    chosen = _backends(loop)
    if chosen != loop.backends:  # `auto` decides when it sees a size for the first time
        logger.info("expert backends: %s", "; ".join(chosen))
        loop.backends = chosen
    report = log_metrics(result, rate, loop.progress, loop.setup)
    step, train = loop.progress.step, loop.setup.config.train
    probed = _probe(loop) if _due(step, train.probe_every) or step == train.steps else {}
    metrics = probed | report.metrics
    loop.loads = {str(layer): shares for layer, shares in report.loads.items()}
    changes = loop.alarms.look(step, metrics)
    for change in changes:
        logger.warning("%s", change.sentence())
    on = [{"name": alarm.name, "layer": alarm.layer, "value": alarm.value} for alarm in loop.alarms.on]
    loop.metrics.write(loop.progress.row() | metrics | ({"alarms": on} if on else {}))
    loop.observers.hook.on_log(
        step=step, metrics=metrics, loads=report.loads, alarms=loop.alarms.on, changes=loop.changes + changes,
        backends=chosen,
    )  # fmt: skip
    loop.changes = []


def _probe(loop: Loop) -> dict[str, float]:
    """Show a fixed batch to the observers that want to see one; -> the numbers that they found, by tag."""
    setup, hook = loop.setup, loop.observers.hook.on_probe
    if setup.config.train.probe_every == 0 or not setup.blocks or not loop.observers.listens("on_probe"):
        return {}
    batch = probe_batch(setup.validation, setup.step_settings.micro_batch_size)
    probe = look(setup.model, batch, list(setup.corpus.domains), setup.step_settings.precision)
    found = hook(step=loop.progress.step, probe=probe)
    return {tag: float(value) for numbers in reversed(found) if numbers for tag, value in numbers.items()}


def alarm_watch(setup: Setup, state: Mapping[str, Any]) -> AlarmWatch:
    """As it was when a resumed run left off; what a new one found before its first step has been told."""
    lineage = setup.lineage
    untrained = lineage is None or any(stage == CONVERSION for stage, _ in lineage.stages[-1:])
    watch = AlarmWatch(layer_facts(setup.blocks, untrained=untrained), setup.config.train.steps)
    if state:
        watch.restore(state.get("alarms", []))
    else:
        watch.look(0, {}, setup.alarms)
    return watch


def _backends(loop: Loop) -> list[str]:
    """Those that served this process and, as its checkpoint says, those before it."""
    return sorted({*loop.backends, *backends(loop.setup)})


def _evaluate(loop: Loop) -> None:
    setup = loop.setup
    loop.lock.check()
    evaluation = loop.progress.evaluation = evaluate(setup.model, setup.validation, setup.step_settings.precision)
    metrics = evaluation.metrics() | evaluation.detail(_held_out_documents(setup))
    if loop.progress.step > 0 or setup.config.train.init_from is not None:  # random weights have nothing to say
        loop.samples = sample_texts(setup.model, setup.tokenizer, setup.config.evaluation, setup.config.seed)
    loop.metrics.write(loop.progress.row() | metrics)
    check_evaluation(setup.model, metrics["eval/loss"], loop.progress.step)
    loop.observers.hook.on_evaluate(step=loop.progress.step, metrics=metrics, samples=loop.samples)


def _write_evaluation(loop: Loop) -> None:
    """What each held-out document cost, since comparisons pair runs over documents; and the last samples."""
    assert loop.progress.evaluation is not None
    rows = loop.progress.evaluation.document_rows(_held_out_documents(loop.setup))
    write_file(loop.run_dir / DOCUMENTS, "".join(row + "\n" for row in rows))
    config = loop.setup.config
    about = {"step": loop.progress.step, "seed": config.seed, "temperature": config.evaluation.temperature}
    samples = zip(config.evaluation.prompts, loop.samples, strict=False)  # none where evaluation.sample_tokens is 0
    rows = [json.dumps({"prompt": prompt, "text": text, **about}) for prompt, text in samples]
    write_file(loop.run_dir / SAMPLES, "".join(row + "\n" for row in rows))


def _held_out_documents(setup: Setup) -> tuple[list[str], list[str]]:
    """Names of the held-out documents, and the domain of each."""
    stream = setup.corpus.validation
    return list(stream.document_names), [setup.corpus.domains[i] for i in stream.document_domain]


def _save(loop: Loop, *, prune: bool = True) -> None:
    setup, progress = loop.setup, loop.progress
    loop.lock.check()
    folder = loop.run_dir / CHECKPOINTS / f"step_{progress.step:08d}"
    if loop.saved == progress.step:  # nothing has changed since
        _prune(loop, folder)  # which a kill may have kept the process that saved from
        return
    state = progress.state() | {
        "data_fingerprint": setup.corpus.fingerprint,
        PLUGINS: setup.registry.versions(),
        VERSIONS: versions(),
        OVERRIDES: setup.start.overrides,
        "lineage": setup.lineage.to_json() if setup.lineage else None,
        "alarms": loop.alarms.state(),
        LOADS: loop.loads,
        BACKENDS: _backends(loop),
    }
    outside = fixed_environment(setup.config)
    if outside:
        state["environment"] = seal(outside)
    files = checkpoint_files(setup, progress.step)
    for own in loop.observers.hook.on_checkpoint(step=progress.step):
        files = {**(own or {}), **files}
    with loop.clock.saving():
        save_checkpoint(folder, setup.model, training_state(setup), state, files)
    if prune:
        _prune(loop, folder)
    logger.info("checkpoint: %s", folder.relative_to(loop.run_dir))
    loop.saved = progress.step
    loop.observers.hook.on_save(step=progress.step, path=folder)


def _prune(loop: Loop, newest: Path) -> None:
    """Keep `newest`, which is whole, and those before it that the config asks for; the damaged ones aren't counted.

    What lies after it is damaged: it stays until it is written anew.
    """
    loop.damaged.discard(newest.name)
    keep = loop.setup.config.train.keep_checkpoints
    found = [path for path in sorted(newest.parent.glob("step_*")) if keep and path.name <= newest.name]
    whole = [path for path in found if path.name not in loop.damaged]
    for old in sorted(set(found) - set(whole[-keep:])):
        discard(old)
