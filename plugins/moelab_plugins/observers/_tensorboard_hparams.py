"""The HParams tab: a row for each run, of names and of the options that are not their plugin's defaults."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from moelab.printable import printable
from moelab.training.parts import LOSSES, described
from moelab_plugins.observers import _tensorboard_tags as tags

# TensorBoard reads the columns from whichever run it meets first, so they are the same for every run.
PARTS = ("router", LOSSES, "layers", "layout", "shared_expert", "backend")  # names alone
ROUTER_OPTIONS, OTHER_OPTIONS = "router_options", "other_options"
NUMBERS = (
    "model.hidden_size", "model.num_hidden_layers", "train.steps", "train.batch_size", "train.sequence_length",
    "optimizer.lr", "optimizer.weight_decay", "schedule.warmup_steps", "seed",
)  # fmt: skip
TEXTS = ("optimizer.algorithm.name", "schedule.name", "train.dtype", "train.init_from", "data.source.name")
LAYOUT_NUMBERS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
FACTS = ("parameters.total", "parameters.active", "flops_per_token")
# The table shows five columns at first, those marked as differing: what variants usually differ in.
SHOWN_FIRST = ("router", ROUTER_OPTIONS, LOSSES, "layers", "optimizer.lr")
METRICS = {  # of the worst layer, where there are several
    tags.HELD_OUT: "held-out bits per byte",
    tags.LOSS: "held-out loss",
    tags.FULLEST: "MaxVio",
    tags.DEAD: "dead experts",
    tags.ALARMS: "alarms on",
    tags.FLOPS: "FLOPs per token",
    tags.ACTIVE: "active parameters",
    tags.SPEED: "tokens per second",
    tags.TRAINING_LOSS: "training loss",
}


def hparams(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str | float]:
    """One row: the same columns for every run, empty text or 0 where a run has no such part."""
    components, options = facts.get("components", {}), facts.get("options", {})
    row: dict[str, str | float] = {part: str(components.get(part, "")) for part in PARTS}
    row[ROUTER_OPTIONS] = described(options.get("router", {}))
    row[OTHER_OPTIONS] = other_options(config, options)
    for key in LAYOUT_NUMBERS:
        row[key] = _number(_at(config, f"model.moe.layout.{key}"))
    for key in NUMBERS:
        row[key] = _number(_at(config, key))
    for key in TEXTS:
        row[key] = str(_at(config, key) or "")
    for key in FACTS:
        row[key] = _number(_at(facts, key))
    return {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def other_options(config: Mapping[str, Any], options: Mapping[str, Mapping[str, Any]]) -> str:
    """`load_balance: weight=0.01; shared_expert: ...`: of all parts but the router, without what has its own column."""
    losses = _at(config, f"model.moe.{LOSSES}") or []
    told = []
    for path, mine in options.items():
        kind, _, index = path.partition(".")
        if kind == "router":
            continue
        name = str(losses[int(index)]["name"]) if kind == LOSSES else kind
        rest = {key: value for key, value in mine.items() if not (kind == "layout" and key in LAYOUT_NUMBERS)}
        told += [f"{name}: {described(rest)}"] if rest else []
    return "; ".join(told)


def beginning(values: Mapping[str, Any]) -> list[Any]:
    """Summaries of the columns and of a run's row. They go into the run's own event file, not into a sub-run, so that
    the metrics are the run's own scalars."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    kinds = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64}
    columns = [
        api_pb2.HParamInfo(name=name, type=kinds[type(value)], differs=name in SHOWN_FIRST)
        for name, value in values.items()
    ]
    metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=name) for tag, name in METRICS.items()]
    experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
    start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    return [
        _summary(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment)),
        _summary(metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)),
    ]


def ending(error: BaseException | None) -> list[Any]:
    """The summary of how a run ended; none of an interrupted one, which may be resumed."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    if error is not None and not isinstance(error, Exception):
        return []
    status = api_pb2.STATUS_SUCCESS if error is None else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    return [_summary(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))]


def _summary(tag: str, data: Any) -> Any:
    """tensorboard.plugins.hparams.summary would do this, but imports TensorFlow."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    about = metadata.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)])


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
