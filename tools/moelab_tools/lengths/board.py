"""What lengths gave, for TensorBoard: every way is a run of its own, so that their curves lie over each other.

Steps of these charts are tokens: before the target in `*_by_place`, of the whole sequence in the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CATEGORY = "Longer texts: tokens to the right"
Curves = dict[str, list[tuple[int, float]]]


def write_board(folder: Path, kept: Mapping[str, Any]) -> None:
    """Event files of all ways below `folder`; `kept` as `kept.read_kept` gives it."""
    from moelab_plugins.observers._tensorboard_curves import write_curves

    for name, ones in kept["ways"].items():
        write_curves(folder / name, CATEGORY, curves_of(ones))


def curves_of(ones: Sequence[Mapping[str, Any]]) -> Curves:
    """Of one way: by place at the greatest length, and by length."""
    longest = max(ones, key=lambda one: one["length"])
    curves: Curves = {"length/loss": [(one["length"], one["loss"]) for one in ones]}
    curves["length/loss_beyond"] = [(one["length"], one["beyond"]) for one in ones if one["beyond"] is not None]
    curves["length/loss_by_place"] = _places(longest["positions"])
    curves["length/passkey"] = [
        (one["length"], sum(one["passkey"].values()) / len(one["passkey"])) for one in ones if one["passkey"]
    ]
    for layer in longest["entropy"]:
        curves[f"length/entropy_by_place/layer_{layer}"] = _places(longest["entropy"][layer])
    for layer in longest["drift_by_place"]:
        curves[f"length/drift_by_place/layer_{layer}"] = _places(longest["drift_by_place"][layer])
    return {tag: points for tag, points in curves.items() if points}


def _places(values: Mapping[str, float]) -> list[tuple[int, float]]:
    """{"0064-0127": value} -> a point at each bin's beginning."""
    return [(int(name.split("-")[0]), value) for name, value in values.items()]
