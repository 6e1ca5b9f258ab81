"""Writes a run to TensorBoard: scalars, charts of its first questions, expert-load images, HParams, and texts.

What the tags mean and when they are alarming is in docs/metrics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moelab import Component, component, hookimpl
from moelab.alarms import Alarm, AlarmChange
from moelab_plugins.observers._load_image import load_image, png
from moelab_plugins.observers._tensorboard_hparams import beginning, ending, hparams
from moelab_plugins.observers._tensorboard_layout import layout_summary
from moelab_plugins.observers._tensorboard_tags import PICTURE, alarms_on, shown
from moelab_plugins.observers._tensorboard_texts import NOW, PAST, now, past, text_summary, verbatim


@dataclass
class TensorBoardOptions:
    flush_secs: int = 10  # how long a number may wait before it is on disk
    images: bool = True  # expert load over (layer, expert)
    image_every: int = 1  # of the logged steps; an image is 4 kB, or 20 kB for 28 layers of 64 experts

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
        self._alarms: list[Alarm] = []
        self._logged = 0
        self._resumed = False  # and what is wrong now has not been told since

    def on_train_begin(self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        earlier = any(run_dir.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(run_dir), flush_secs=self.options.flush_secs)
        if earlier:
            self._forget_what_follows(step)
        self._resumed = earlier
        self._text("config", verbatim(_yaml(config)), step)
        self._text("facts", verbatim(_yaml(facts)), step)
        self._summary(layout_summary())
        for summary in beginning(hparams(config, facts)):
            self._summary(summary)

    def on_log(
        self,
        step: int,
        metrics: Mapping[str, float],
        loads: Mapping[int, list[float]],
        alarms: list[Alarm],
        changes: list[AlarmChange],
        backends: list[str],
    ) -> None:
        self._scalars(step, shown(metrics) | alarms_on(alarms))
        if backends != self._backends:  # `auto` decides when it sees a size for the first time
            self._text("expert_backends", "\n".join(f"- {line}" for line in backends), step)
            self._backends = backends
        if loads and self.options.images and self._logged % self.options.image_every == 0:
            self._image(PICTURE, load_image(loads, step), step)
        if changes or self._resumed:  # a run without alarms has no such text: those that have are found at once
            self._text(NOW, now(step, alarms), step)
            self._resumed = False
        if changes:
            self._text(PAST, past(changes), step)
        self._alarms = list(alarms)
        self._logged += 1

    def on_evaluate(self, step: int, metrics: Mapping[str, float], samples: list[str]) -> None:
        self._scalars(step, shown(metrics))
        for number, sample in enumerate(samples):
            self._text(f"samples/{number}", verbatim(sample), step)
        self.writer.flush()

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        if self.writer is None:  # the run failed before it began
            return
        if self._alarms or error is not None:
            self._text(NOW, now(step, self._alarms, error), step)
        for one in ending(error):
            self._summary(one)
        self.writer.close()

    def _scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        for tag, value in numbers.items():
            self.writer.add_scalar(tag, value, step)

    def _forget_what_follows(self, step: int) -> None:
        """A killed process may have logged steps beyond its checkpoint; the resumed run writes them again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self.writer.file_writer.event_writer.add_event(Event(step=step + 1, session_log=start))

    def _text(self, tag: str, markdown: str, step: int) -> None:
        self._summary(text_summary(tag, markdown), step)

    def _image(self, tag: str, pixels: Any, step: int) -> None:
        """pixels [height, width, 3] uint8."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = pixels.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png(pixels))
        self._summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def _summary(self, summary: Any, step: int | None = None) -> None:
        self.writer.file_writer.add_summary(summary, step)


def _plain(value: Any) -> Any:
    """Only what YAML knows: paths and other objects as their text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _yaml(tree: Any) -> str:
    return str(yaml.safe_dump(_plain(tree), sort_keys=False, allow_unicode=True))


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("tensorboard", TensorBoardOptions, TensorBoardObserver)]
