"""Curves for TensorBoard from outside a training run, each folder of them one of its runs. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from moelab_plugins.observers._tensorboard_layout import exact_summary

SUFFIX = ".curves"  # of files that hold nothing but what `write_curves` wrote


def write_curves(folder: Path, category: str, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """{tag: (step, value)s} as scalars, in the place of what this function wrote there before.

    Under `category` of the Custom Scalars tab they are drawn as they are; elsewhere TensorBoard smooths them.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        earlier.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    writer.add_event(Event(wall_time=time.time(), step=0, summary=exact_summary(category, curves)))
    for tag, points in curves.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
    writer.close()
