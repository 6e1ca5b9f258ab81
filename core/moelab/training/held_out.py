"""A run's evaluations on held-out text: when one is made, who is told, and what the last one leaves in the folder."""

from __future__ import annotations

import json

from moelab.atomic import write_file
from moelab.training.best import Best
from moelab.training.evaluate import evaluate, sample_texts
from moelab.training.failure import check_evaluation
from moelab.training.loop import Loop
from moelab.training.run_folder import DOCUMENTS, SAMPLES
from moelab.training.saving import save_best
from moelab.training.setup import Setup


def evaluate_run(loop: Loop) -> None:
    setup = loop.setup
    loop.lock.check()
    evaluation = loop.progress.evaluation = evaluate(
        setup.model, setup.validation, setup.step_settings.precision, setup.ranks
    )
    loss = evaluation.loss()
    told = loop.progress.step > 0 or setup.config.train.init_from is not None  # random weights have nothing to say
    loop.best = _best_of_stage(loop)
    lowest = told and loop.best.look(loop.progress.step, loss)
    loop.ended_early = ends_early(loop)
    metrics = evaluation.metrics() | evaluation.detail(held_out_documents(setup))
    metrics |= setup.step_settings.objective.evaluate(setup.step_settings.precision)
    if told:
        with setup.step_settings.precision.exact():
            loop.samples = sample_texts(setup.model, setup.tokenizer, setup.config.evaluation, setup.config.seed)
    loop.metrics.write(loop.progress.row() | metrics)
    check_evaluation(setup.model, metrics["eval/loss"], loop.progress.step)
    loop.observers.hook.on_evaluate(step=loop.progress.step, metrics=metrics, samples=loop.samples)
    if lowest and setup.config.train.keep_best:
        save_best(loop, {DOCUMENTS: _document_lines(loop).encode()})


def ends_early(loop: Loop) -> bool:
    """Whether the run waits no longer for a lower held-out loss, in its last stage and before its last step."""
    setup, train = loop.setup, loop.setup.config.train
    last = setup.stage == max(len(setup.stages) - 1, 0)
    return last and loop.progress.step < train.steps and _best_of_stage(loop).over(train.patience)


def _best_of_stage(loop: Loop) -> Best:
    setup = loop.setup
    return loop.best.of_stage(setup.stages[setup.stage].first) if setup.stages else loop.best


def write_evaluation(loop: Loop) -> None:
    """What each held-out document cost, since comparisons pair runs over documents; and the last samples."""
    write_file(loop.run_dir / DOCUMENTS, _document_lines(loop))
    config = loop.setup.config
    about = {"step": loop.progress.step, "seed": config.seed, "temperature": config.evaluation.temperature}
    samples = zip(config.evaluation.prompts, loop.samples, strict=False)  # none where evaluation.sample_tokens is 0
    rows = [json.dumps({"prompt": prompt, "text": text, **about}) for prompt, text in samples]
    write_file(loop.run_dir / SAMPLES, "".join(row + "\n" for row in rows))


def _document_lines(loop: Loop) -> str:
    """JSON lines of the last evaluation, a document each."""
    assert loop.progress.evaluation is not None
    rows = loop.progress.evaluation.document_rows(held_out_documents(loop.setup))
    return "".join(row + "\n" for row in rows)


def held_out_documents(setup: Setup) -> tuple[list[str], list[str]]:
    """Names of the held-out documents, and the domain of each."""
    stream = setup.corpus.validation
    return list(stream.document_names), [setup.corpus.domains[i] for i in stream.document_domain]
