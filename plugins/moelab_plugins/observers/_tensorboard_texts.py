"""Markdown for TensorBoard's Text tab: of a run, and from outside one, a comparison's verdicts. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moelab.alarms import RULE_OF, Alarm, AlarmChange
from moelab.printable import printable, ranges

SUFFIX = ".texts"  # of files that hold nothing but what `write_texts` wrote
NOW, PAST = "alarms/now", "alarms/past"  # TensorBoard sorts them so


def now(step: int, alarms: Iterable[Alarm], error: BaseException | None = None) -> str:
    """Markdown of what is wrong at `step`: a line for each rule, not for each layer."""
    on = list(alarms)
    told = [f"- {line}" for line in _by_rule(on)]
    if error is not None:
        told.insert(0, verbatim(f"the run stopped: {type(error).__name__}: {error}"))
    count = f"{len(on)} alarm{'s are' if len(on) > 1 else ' is'} on" if on else "no alarm is on"
    return "\n\n".join([f"**Step {step}: {count}**", *told])


def past(changes: Iterable[AlarmChange]) -> str:
    """Markdown of what began, grew or ended at a step: a line for each rule and kind of change."""
    by_kind: dict[tuple[str, str], list[AlarmChange]] = {}
    for change in changes:
        by_kind.setdefault((change.change, change.alarm.name), []).append(change)
    lines = []
    for same in by_kind.values():
        worst = _worst([change.alarm for change in same])
        told = next(change for change in same if change.alarm is worst)
        lines.append(f"- {told.sentence()}{_also(worst, [change.alarm for change in same])}")
    return "\n".join(lines)


def verbatim(text: str) -> str:
    """A Markdown code block by indentation: samples may hold backticks."""
    return "\n".join("    " + line for line in text.split("\n"))


def text_summary(tag: str, markdown: str) -> Any:
    """A Summary that TensorBoard shows in its Text tab under this very tag; torch's writer would lengthen it."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    content = printable(markdown, keep="\n\t").encode()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=shape)
    return Summary(value=[Summary.Value(tag=tag, metadata=about, tensor=tensor)])


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """{tag: Markdown} into TensorBoard's Text tab, in the place of what this function wrote there before. No torch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        earlier.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    for tag, text in texts.items():
        writer.add_event(Event(wall_time=time.time(), step=0, summary=text_summary(tag, text)))
    writer.close()


def _by_rule(alarms: Iterable[Alarm]) -> list[str]:
    by_name: dict[str, list[Alarm]] = {}
    for alarm in alarms:
        by_name.setdefault(alarm.name, []).append(alarm)
    return [
        f"**{name}** {(worst := _worst(same)).sentence()}{_also(worst, same)}"
        for name, same in by_name.items()
    ]  # fmt: skip


def _worst(alarms: list[Alarm]) -> Alarm:
    """Farthest beyond its threshold; all of one rule."""
    above = RULE_OF[alarms[0].name].above if alarms[0].name in RULE_OF else True
    return (max if above else min)(alarms, key=lambda alarm: alarm.value)


def _also(worst: Alarm, same: list[Alarm]) -> str:
    """` (and in layers 0-3, 7)`: where else it is, in runs of neighbours."""
    others = [alarm.layer for alarm in same if alarm is not worst and alarm.layer is not None]
    return f" (and in layer{'s' if len(others) > 1 else ''} {ranges(others)})" if others else ""
