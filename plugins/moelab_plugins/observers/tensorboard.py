"""Writes a run to TensorBoard: scalars, expert-load images, HParams, and texts.

What the tags mean and when they are alarming is in docs/metrics.md.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moelab import Component, component, hookimpl
from moelab.alarms import AlarmChange
from moelab.printable import printable
from moelab_plugins.observers._load_image import LEGEND, load_image, png

# The columns of TensorBoard's HParams tab. It reads them from whichever run it meets first, so they are the
# same for every run, and a plugin's options are folded into one text: `softmax_topk(norm_topk_prob=False)`.
PARTS = ("layout", "router", "shared_expert", "backend", "balance_losses")
NUMBERS = (
    "model.hidden_size", "model.num_hidden_layers", "train.steps", "train.batch_size", "train.sequence_length",
    "optimizer.lr", "optimizer.weight_decay", "schedule.warmup_steps", "seed",
)  # fmt: skip
TEXTS = ("schedule.name", "train.dtype", "train.init_from", "data.source.name")
LAYOUT_NUMBERS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
FACTS = ("parameters.total", "parameters.active", "flops_per_token")
# The table shows five columns at first, those marked as differing: what variants usually differ in.
SHOWN_FIRST = ("layout", "router", "shared_expert", "balance_losses", "optimizer.lr")
FINAL_METRICS = (
    "eval/loss", "eval/bits_per_byte", "eval/perplexity", "train/lm_loss", "moe/mean/max_violation",
    "moe/mean/dead_fraction", "moe/mean/load_entropy", "compute/served_flops_per_token", "perf/tokens_per_second",
    "perf/mfu",
)  # fmt: skip


@dataclass
class TensorBoardOptions:
    flush_secs: int = 10  # how long a number may wait before it is on disk
    images: bool = True  # expert load over (layer, expert)
    image_every: int = 1  # of the logged steps; an image is about 5 kB

    def __post_init__(self) -> None:
        if self.flush_secs < 1 or self.image_every < 1:
            raise ValueError("flush_secs and image_every must be at least 1")


class TensorBoardObserver:
    """TensorBoard event file in the run folder; open it with `tensorboard --logdir` on the folder of the runs."""

    def __init__(self, options: TensorBoardOptions, run_dir: Path) -> None:
        self.options = options
        self.run_dir = run_dir
        self.writer: Any = None
        self._backends: list[str] = []  # as last told
        self._logged = 0

    def on_train_begin(self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        earlier = any(run_dir.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(run_dir), flush_secs=self.options.flush_secs)
        if earlier:
            self._forget_what_follows(step)
        self._text("config", _verbatim(_yaml(config)), step)
        self._text("facts", _verbatim(_yaml(facts)), step)
        if self.options.images:
            self._text("expert_load_legend", LEGEND, step)
        self._begin_hparams(hparams(config, facts))

    def on_log(
        self,
        step: int,
        metrics: Mapping[str, float],
        loads: Mapping[int, list[float]],
        changes: list[AlarmChange],
        backends: list[str],
    ) -> None:
        self._scalars(step, metrics)
        if backends != self._backends:  # `auto` decides when it sees a size for the first time
            self._text("expert_backends", "\n".join(f"- {line}" for line in backends), step)
            self._backends = backends
        if loads and self.options.images and self._logged % self.options.image_every == 0:
            self._image("moe/expert_load", load_image(loads), step)
        self._logged += 1
        if changes:
            self._text("alarms", "\n".join(f"- {change.sentence()}" for change in changes), step)

    def on_evaluate(self, step: int, metrics: Mapping[str, float], samples: list[str]) -> None:
        self._scalars(step, metrics)
        for number, sample in enumerate(samples):
            self._text(f"samples/{number}", _verbatim(sample), step)
        self.writer.flush()

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        if self.writer is None:  # the run failed before it began
            return
        if error is not None:
            self._text("alarms", _verbatim(f"step {step}: the run stopped: {type(error).__name__}: {error}"), step)
        self._end_hparams(error)
        self.writer.close()

    def _scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for tag, value in metrics.items():
            self.writer.add_scalar(tag, value, step)

    def _forget_what_follows(self, step: int) -> None:
        """A killed process may have logged steps beyond its checkpoint; the resumed run writes them again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self.writer.file_writer.event_writer.add_event(Event(step=step + 1, session_log=start))

    def _text(self, tag: str, markdown: str, step: int) -> None:
        self.writer.add_text(tag, printable(markdown, keep="\n\t"), step)

    def _image(self, tag: str, pixels: Any, step: int) -> None:
        """pixels [height, width, 3] uint8."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(pixels))
        self._summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _summary(self, summary: Any, step: int | None = None) -> None:
        self.writer.file_writer.add_summary(summary, step)

    def _begin_hparams(self, values: Mapping[str, Any]) -> None:
        """In this very event file, not in a sub-run, so that its metrics are the run's own scalars."""
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        kinds = {str: api_pb2.DATA_TYPE_STRING, float: api_pb2.DATA_TYPE_FLOAT64}
        columns = [
            api_pb2.HParamInfo(name=name, type=kinds[type(value)], differs=name in SHOWN_FIRST)
            for name, value in values.items()
        ]
        metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in FINAL_METRICS]
        experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
        start = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            if isinstance(value, str):
                start.hparams[name].string_value = value
            else:
                start.hparams[name].number_value = value
        self._hparams_event(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=experiment))
        self._hparams_event(
            metadata.SESSION_START_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_start_info=start)
        )

    def _end_hparams(self, error: BaseException | None) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        if error is not None and not isinstance(error, Exception):
            return  # interrupted: it may be resumed, so its session stays open
        status = api_pb2.STATUS_SUCCESS if error is None else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        self._hparams_event(metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=end))

    def _hparams_event(self, tag: str, data: Any) -> None:
        """tensorboard.plugins.hparams.summary would do this, but imports TensorFlow."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata

        about = metadata.create_summary_metadata(data)
        self._summary(Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)]))


def hparams(config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str | float]:
    """One row of the HParams tab: the same columns for every run, empty text or 0 where a run has no such part."""
    moe = _at(config, "model.moe") or {}
    row: dict[str, str | float] = {part: describe_part(moe.get(part)) for part in PARTS}
    for key in LAYOUT_NUMBERS:
        row[key] = _number(_at(moe, f"layout.{key}"))
    for key in NUMBERS:
        row[key] = _number(_at(config, key))
    for key in TEXTS:
        row[key] = str(_at(config, key) or "")
    for key in FACTS:
        row[key] = _number(_at(facts, key))
    return {key: printable(value) if isinstance(value, str) else value for key, value in row.items()}


def describe_part(part: Any) -> str:
    """`{name: x, a: 1}` as `x(a=1)`; a list of parts joined by ` + `; nothing as an empty text."""
    if not part:
        return ""
    if isinstance(part, (list, tuple)):
        return " + ".join(describe_part(one) for one in part)
    options = ", ".join(f"{key}={value}" for key, value in part.items() if key != "name")
    return f"{part['name']}({options})" if options else str(part["name"])


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


def _plain(value: Any) -> Any:
    """Only what YAML knows: paths and other objects as their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _yaml(tree: Any) -> str:
    return str(yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True))


def _verbatim(text: str) -> str:
    """A Markdown code block by indentation: samples may hold backticks."""
    return "\n".join("    " + line for line in text.split("\n"))


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("tensorboard", TensorBoardOptions, TensorBoardObserver)]
