"""What `moelab evaluate --length` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelab_tools.lengths.measure import AtLength


def length_lines(found: Mapping[str, Sequence[AtLength]]) -> list[str]:
    """{way: lengths} -> of one way all there is; of several what tells them apart."""
    if len(found) == 1:
        return one_way(next(iter(found.values())))
    wide = max(len(name) for name in found) + 2
    lengths = [one.length for one in next(iter(found.values()))]
    told = [f"{'nats/token':<{wide}}" + "".join(f"{length:>10}" for length in lengths)]
    told += [f"{name:<{wide}}" + "".join(f"{one.loss:>10.4f}" for one in ones) for name, ones in found.items()]
    if any(one.beyond is not None for ones in found.values() for one in ones):
        told += ["", f"{'beyond the trained length':<{wide}}"]
        told += [f"{name:<{wide}}" + "".join(_or_none(one.beyond) for one in ones) for name, ones in found.items()]
    if any(one.passkey for ones in found.values() for one in ones):
        told += ["", f"{'keys given back':<{wide}}"]
        told += [f"{name:<{wide}}" + "".join(_or_none(one.found, 2) for one in ones) for name, ones in found.items()]
    return told


def filled_lines(found: Mapping[str, Sequence[AtLength]]) -> list[str]:
    """What the options left out, each once; of several ways with the way's name."""
    named = [(f"{name}: " * (len(found) > 1), one) for name, ones in found.items() for one in ones]
    return list(dict.fromkeys(name + line for name, one in named for line in one.filled))


def one_way(found: Sequence[AtLength]) -> list[str]:
    """A table, and below it the loss by place at the greatest length, and what else was looked at."""
    rows = [f"{'length':>8} {'times':>6} {'nats/token':>11} {'beyond the trained length':>26} {'tokens':>9}"]
    for one in found:
        beyond = "-" if one.beyond is None else f"{one.beyond:.4f}"
        rows.append(f"{one.length:>8} {one.times:>5g}x {one.loss:>11.4f} {beyond:>26} {one.tokens:>9}")
    longest = max(found, key=lambda one: one.length)
    layers = list(longest.entropy)
    heads = f"  attention's entropy, nats, by layer: {', '.join(layers)}" if layers else ""
    rows += ["", f"by tokens before the target, at {longest.length}{heads}"]
    for name, loss in longest.positions.items():
        entropies = [longest.entropy[layer].get(name) for layer in layers]
        rows.append(f"{name:>16} {loss:.4f}  " + "  ".join("-" if one is None else f"{one:.2f}" for one in entropies))
    if any(one.drift_within for one in found):
        rows += ["", "share of assignments that move to other experts, by layer"]
        rows += [f"{'trained':>16} {_layers(found[0].drift_within)}  (its second half beside its first)"]
        rows += [f"{one.length:>16} {_layers(one.drift)}  (beyond the trained length)" for one in found if one.drift]
    if any(one.passkey for one in found):
        rows += ["", "keys given back, by depth"]
        rows += [f"{one.length:>16} {_layers(one.passkey, '.2f')}" for one in found]
    return [row.rstrip() for row in rows]


def _layers(values: Mapping[str, float], form: str = ".3f") -> str:
    return "  ".join(f"{name}: {value:{form}}" for name, value in values.items())


def _or_none(value: float | None, digits: int = 4) -> str:
    return f"{'-':>10}" if value is None else f"{value:>10.{digits}f}"
