"""Markdown into TensorBoard's Text tab from outside a run: a comparison's verdicts. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from moelab.printable import printable

SUFFIX = ".texts"  # of files that hold nothing but what `write_texts` wrote


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """{tag: Markdown} into TensorBoard's Text tab, in the place of what this function wrote there before. No torch."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
        earlier.unlink()
    writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
    about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    for tag, text in texts.items():
        tensor = TensorProto(dtype="DT_STRING", string_val=[printable(text, keep="\n\t").encode()], tensor_shape=shape)
        value = Summary.Value(tag=f"{tag}/text_summary", metadata=about, tensor=tensor)
        writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))
    writer.close()
