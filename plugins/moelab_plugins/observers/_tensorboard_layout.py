"""The Custom Scalars tab: six charts that answer which run is better, whether a router is dying and what it costs.

TensorBoard joins the layouts of all runs and drops charts that are equal, so it is the same for every run. It smooths
lines by 0.6, which moves the last of three evaluations by a tenth of a nat. It doesn't smooth a line that has a margin
(tf-custom-scalar-margin-chart-card of TensorBoard 2.21, read), so what is not noise is drawn with a margin of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moelab_plugins.observers import _tensorboard_tags as tags

FIRST = "Which is better, is a router dying, what does it cost?"
CHARTS = {  # title: tags
    "Better: held-out bits per byte (or nats per token)": (tags.HELD_OUT, tags.HELD_OUT_LOSS),
    "Better: training loss, nats": (tags.TRAINING_LOSS,),
    "Dying: experts without a token, worst layer": (tags.DEAD,),
    "Dying: MaxVio, worst layer": (tags.FULLEST,),
    "Cost: FLOPs per token, as served": (tags.FLOPS,),
    "Cost: tokens per second": (tags.SPEED,),
}
BY_LAYER = "Layer by layer: choose one run on the left"
LAYERS = {
    "MaxVio": "max_violation",
    "Experts without a token": "idle_fraction",
    "Load entropy: 1 is balanced": "load_entropy",
    "Router entropy, nats": "router_entropy",
    "Router's gradient by the model's": "router_gradient_ratio",
    "Routed output by the shared one": "routed_to_shared",
}


def layout_summary() -> Any:
    """The Summary that holds the layout."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    charts = [_exact(title, *charted) for title, charted in reversed(CHARTS.items())]  # shown last first, in 2.21
    by_layer = [_lines(title, f"layers_{metric}/") for title, metric in LAYERS.items()]
    categories = [
        layout_pb2.Category(title=FIRST, chart=charts),
        layout_pb2.Category(title=BY_LAYER, chart=by_layer, closed=True),
    ]
    return _summary(categories)


def exact_summary(category: str, charted: Iterable[str]) -> Any:
    """A Summary that draws each of these tags as it is."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    charts = [_exact(tag, tag) for tag in reversed(list(charted))]
    return _summary([layout_pb2.Category(title=category, chart=charts)])


def _summary(categories: list[Any]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    content = layout_pb2.Layout(category=categories).SerializeToString()
    tensor = TensorProto(dtype="DT_STRING", string_val=[content], tensor_shape=TensorShapeProto())
    about = metadata.create_summary_metadata()
    return Summary(value=[Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, metadata=about, tensor=tensor)])


def _exact(title: str, *charted: str) -> Any:
    from tensorboard.plugins.custom_scalar import layout_pb2

    series = [layout_pb2.MarginChartContent.Series(value=tag, lower=tag, upper=tag) for tag in charted]
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=series))


def _lines(title: str, pattern: str) -> Any:
    """pattern: a regular expression, held against the beginning of each tag."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[pattern]))
