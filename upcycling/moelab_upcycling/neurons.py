"""What the initialisers share: copying planned neurons, and redrawing those that the plan says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moelab.errors import ConfigError
from moelab.initialisers import MATRICES, DenseMatrix, NeuronPlan
from moelab_upcycling.dense import statistics
from moelab_upcycling.dtypes import from_float32, to_float32
from moelab_upcycling.streams import choose, fill, normal_table, normals, stream

INDEX_SETS = ("shared", "independent")
STATISTICS = ("dropped", "dense", "config")


@dataclass(frozen=True)
class Streams:
    """The streams of one initialiser in one layer."""

    seed: int
    algorithm: str  # with its version: "experts/qwen2/1"
    layer_id: int

    def __call__(self, role: str, expert: int = 0, matrix: str = "") -> np.random.PCG64:
        return stream(self.seed, self.algorithm, self.layer_id, role, expert=expert, matrix=matrix)


def check_choice(key: str, value: str, legal: tuple[str, ...]) -> None:
    """For an options' __post_init__."""
    if value not in legal:
        raise ValueError(f"{key} must be one of {', '.join(legal)}, not '{value}'")


def check_fraction(key: str, value: float) -> None:
    """For an options' __post_init__."""
    if not 0 <= value <= 1:
        raise ValueError(f"{key} must be in 0 .. 1, not {value}")


def check_width(width: int, intermediate_size: int, cure: str) -> None:
    """An expert that takes each dense neuron at most once can't be wider than the dense FFN."""
    if width > intermediate_size:
        raise ConfigError(
            f"experts of {width} neurons are wider than the dense FFN of {intermediate_size}, so they would hold "
            f"twins, which stay equal for ever; {cure}"
        )


def choose_redrawn(
    streams: Streams, expert: int, width: int, fraction: float, *, independent: bool = False
) -> dict[str, npt.NDArray[np.bool_]]:
    """Exactly floor(fraction * width) neurons of an expert: one set for its three matrices, or one for each."""
    count = int(np.floor(fraction * width + 1e-9))  # 0.3 * 10 is 3, not 2.999...
    if independent:
        return {matrix: choose(streams("drop", expert, matrix), width, count) for matrix in MATRICES}
    mask = choose(streams("drop", expert), width, count)
    return dict.fromkeys(MATRICES, mask)


def nothing_redrawn(width: int) -> dict[str, npt.NDArray[np.bool_]]:
    return dict.fromkeys(MATRICES, np.zeros(width, dtype=bool))


def place_rows(
    out: npt.NDArray[Any],
    source: npt.NDArray[np.int32],
    changed: npt.NDArray[np.bool_],
    values: npt.NDArray[Any],
    new: npt.NDArray[Any],
) -> None:
    """out [r, D]: the dense rows `source` bit for bit, and new [k, D], in its order, where they changed."""
    if not len(new):
        values.take(source, axis=0, out=out, mode="clip")
        return
    kept = np.flatnonzero(~changed)
    out[kept] = values.take(source[kept], axis=0, mode="clip")
    out[np.flatnonzero(changed)] = new


def planned_rows(plan: NeuronPlan, matrix: str, values: npt.NDArray[Any], new: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """-> [n, D]: dense rows as planned, bit for bit, and new [k, D] for those that change."""
    changed = plan.changed(matrix)
    out = np.empty((len(changed), values.shape[1]), dtype=values.dtype)
    step, done = 64, 0  # rows at a time, so that the gathered rows are in cache when they are placed
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        count = int(np.count_nonzero(changed[part]))
        place_rows(out[part], plan.source[part], changed[part], values, new[done : done + count])
        done += count
    return out


def drawn_rows(
    count: int, dense: DenseMatrix, source: np.random.PCG64, moments: tuple[float, float]
) -> npt.NDArray[Any]:
    """-> [count, D] ~ N(mean, std^2), as the dense matrix is stored."""
    return normals(source, (count, dense.values.shape[1]), *moments, dense.dtype)


def add_noise(
    out: npt.NDArray[Any], rows: npt.NDArray[np.intp], dense: DenseMatrix, source: np.random.PCG64, std: float
) -> None:
    """out[rows] += N(0, std^2), summed in float32 and rounded once."""
    table = normal_table(0.0, std, "F32")
    step = 256  # a multiple of four rows, so that pieces don't change the draws
    noise = np.empty((min(step, len(rows)), out.shape[1]), dtype=np.float32)
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        part = noise[: len(chosen)]
        fill(source, table, part)
        out[chosen] = from_float32(to_float32(out[chosen], dense.dtype) + part, dense.dtype)


def redraw_moments(
    plan: NeuronPlan, rows: npt.NDArray[np.intp], dense: DenseMatrix, kind: str, config_std: float
) -> tuple[float, float]:
    """Mean and std to redraw with: of the dropped values themselves, of the whole dense matrix, or the config's."""
    if kind == "config":
        return 0.0, config_std
    return statistics(dense, plan.source[rows] if kind == "dropped" else None)


def elementwise_redraw(
    out: npt.NDArray[Any],
    dense: DenseMatrix,
    source: np.random.PCG64,
    fraction: float,
    moments: tuple[float, float] | None,
) -> None:
    """Each value of out [n, D] redrawn with probability `fraction`; moments None: those of the redrawn values."""
    limit = round(fraction * (1 << 16))
    raw = source.random_raw(-(-out.size // 4)).astype("<u8", copy=False).view("<u2")[: out.size].reshape(out.shape)
    mask = raw < limit
    if moments is None:
        dropped = to_float32(out[mask], dense.dtype).astype(np.float64)
        moments = (float(dropped.mean()), float(dropped.std(ddof=1))) if dropped.size > 1 else (0.0, 0.0)
    drawn = np.empty_like(out)
    fill(source, normal_table(*moments, dense.dtype), drawn)
    np.copyto(out, drawn, where=mask)
