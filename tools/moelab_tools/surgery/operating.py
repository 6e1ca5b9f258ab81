"""All of `moelab surgery`, in order: what is asked, what it is decided by, plan, write, receipt, and in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moelab
from moelab.atomic import check_place
from moelab.config.scalars import settle
from moelab.config.text import read_tree
from moelab.errors import ConfigError
from moelab.hookspecs import SURGERIES
from moelab.loading import read_model
from moelab.moe.surgery import Scores, Surgery
from moelab.routes.files import read_trace
from moelab.surgery.carry_out import Operation, finish, left_out, prepare_operation, room_for, write_run
from moelab.surgery.patient import Patient, open_patient, plan_all, run_to_operate_on, surgeries_of
from moelab.surgery.scores import FROM_TRACE, from_trace, measure
from moelab.training.precision import choose_precision, set_threads
from moelab_tools.checkpoints import evaluation_config
from moelab_tools.surgery.receipt import layers_told, receipt_of
from moelab_tools.surgery.texts import HELD_OUT, Texts, texts_of
from moelab_tools.waiting import Waiting


@dataclass(frozen=True)
class Asked:
    """The command line."""

    checkpoint: Path
    output: Path
    name: str
    arguments: tuple[str, ...]  # key=value of the surgery's options
    layers: str | None
    data: str  # train or held-out: what the experts are scored on
    trace: Path | None
    tokens: int
    seed: int
    over: tuple[str, ...]  # key=value of the run's config: other data
    receipt: bool
    dry_run: bool
    trust: bool
    verify: bool


def operate(asked: Asked) -> Iterator[str]:
    """Do it; -> lines to print. Raises UserError before anything is written for whatever can't be."""
    check_place(asked.output)  # before all bytes are read for their checksums
    folder = run_to_operate_on(asked.checkpoint, verify=asked.verify)
    run, registry = evaluation_config(folder, asked.over, trust=asked.trust)
    set_threads(run.train)
    patient = open_patient(folder, registry=registry)
    node = {"name": asked.name, **_options(asked.arguments)}
    layers = patient.layers(asked.layers)
    surgeries = surgeries_of(patient, node, layers, asked.seed)
    needs = frozenset[str]().union(*(surgery.needs for surgery in surgeries.values()))
    scores = {} if asked.trace is None else _of_trace(asked, patient, surgeries, needs)
    measured = bool(needs) and asked.trace is None
    with room_for(asked.output) as beside:  # before the work
        texts = texts_of(folder, run, registry) if measured else None
        if texts is not None:
            scores = _measure(asked, patient, surgeries, needs, texts)
        plans = plan_all(patient, node, surgeries, scores, asked.seed)
        identity = {
            "surgery": patient.registry.resolve(SURGERIES, node, SURGERIES.key), "layers": layers,
            "scored_on": _scored_on(asked, needs),
        }  # fmt: skip
        operation = prepare_operation(patient, plans, identity, asked.seed)
        if texts is None and asked.receipt:  # a plan that can't be is refused before this
            texts = texts_of(folder, run, registry)
        yield from _plan_lines(operation)
        if asked.dry_run:
            return
        checkpoint = write_run(operation, beside, asked.output)
        report: dict[str, Any] = {
            "moelab": moelab.__version__,
            "source": str(patient.folder),
            "seed": asked.seed,
            **identity,
        }
        report["layers_of_the_model"] = layers_told(operation, scores)
        if texts is not None and asked.receipt:
            with Waiting("receipt, layers", patient.config.model.num_hidden_layers) as waiting:
                probe = texts.probe(asked.tokens)
                receipt = receipt_of(patient.folder, checkpoint, probe, patient.registry, waiting.step)
            report["receipt"] = receipt
            yield from _receipt_lines(receipt, all(one.plan.exact for one in plans.values()))
        finish(beside, asked.output, report)
    yield from _ending(operation, asked.output)


def _options(arguments: tuple[str, ...]) -> dict[str, Any]:
    """key=value, each value as a config reads it. Raises ConfigError for another word."""
    found = {}
    for argument in arguments:
        key, separator, text = argument.partition("=")
        if not separator or not key.isidentifier():
            raise ConfigError(f"'{argument}': is no option of a surgery; write KEY=VALUE (`moelab plugins surgery`)")
        found[key] = settle(read_tree(text, f"{key}="))
    return found


def _of_trace(
    asked: Asked, patient: Patient, surgeries: Mapping[int, Surgery], needs: frozenset[str]
) -> dict[int, Scores]:
    assert asked.trace is not None
    if not needs:
        raise ConfigError(f"--trace: {asked.name} as asked for looks at no routes; leave it out")
    missing = sorted(needs - FROM_TRACE)
    if missing:
        raise ConfigError(f"--trace: a trace holds routes, and no outputs: {', '.join(missing)} need the model")
    return from_trace(read_trace(asked.trace), {layer: patient.layouts[layer].num_experts for layer in surgeries})


def _measure(
    asked: Asked, patient: Patient, surgeries: Mapping[int, Surgery], needs: frozenset[str], texts: Texts
) -> dict[int, Scores]:
    precision = choose_precision(texts.run.train)
    model = read_model(patient.folder, device=precision.device, registry=patient.registry)
    batches = texts.batches(asked.data, asked.tokens)
    with Waiting("scoring, batches", len(batches)) as waiting:
        return measure(model, batches, precision, list(surgeries), needs, seen=waiting.step)


def _scored_on(asked: Asked, needs: frozenset[str]) -> str | None:
    if not needs:
        return None
    return f"the trace {asked.trace}" if asked.trace else f"{asked.tokens} tokens of {asked.data} text"


def _plan_lines(operation: Operation) -> Iterator[str]:
    scored = operation.identity["scored_on"]
    name = operation.identity["surgery"]["name"]
    yield f"{name}: {operation.patient.folder}" + (f", decided by {scored}" if scored else "")
    if scored and HELD_OUT in scored:
        yield "  note: decided and judged by the same text, so the receipt flatters it"
    for layer_id, surgery in operation.layers.items():
        old, plan = operation.patient.layouts[layer_id], surgery.plan
        yield (
            f"  layer {layer_id}: {old.num_experts} experts of {old.moe_intermediate_size}, top "
            f"{old.num_experts_per_tok} -> {len(plan.experts)} of {plan.moe_intermediate_size}, top "
            f"{plan.num_experts_per_tok}; {'exact' if plan.exact else 'not exact'}: {plan.because}"
        )
    for warning in dict.fromkeys(line for one in operation.layers.values() for line in one.plan.warnings):
        yield f"  note: {warning}"


def _receipt_lines(receipt: Mapping[str, Any], exact: bool) -> Iterator[str]:
    yield f"receipt: {receipt['verdict']}"
    if exact and receipt["kind"] != "same":
        yield "  WARNING: the plan said that the function stays, and it did not: a fault of the surgery or of a router"
    yield (
        f"  {receipt['tokens']:,} held-out tokens of {receipt['documents']} documents: loss "
        f"{receipt['loss_before']:.4f} before, {receipt['loss_after']:.4f} after (uniform "
        f"{receipt['loss_uniform']:.2f}); top-1 agreement {receipt['top1_agreement']:.1%}"
    )


def _ending(operation: Operation, output: Path) -> Iterator[str]:
    patient, step = operation.patient, operation.patient.state["step"]
    gone = left_out(patient, output)
    if gone:
        yield f"left out: {', '.join(gone)}, of observers that count experts by number"
    steps = patient.config.train.steps
    more = " train.steps=MORE" if isinstance(steps, int) and step >= steps else ""
    yield f"written: {output}, step {step}, with the optimizer's moments; its log begins here"
    yield f"go on with: moelab train {output}/config.yaml --resume{more}"
