"""k-means on the sphere with clusters of equal size, as MoEfication splits an FFN."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moelab.initialisers import DenseMatrix

_ROWS = 512  # normalised at a time


def balanced_kmeans(dense: DenseMatrix, start: npt.NDArray[np.int32], rounds: int) -> npt.NDArray[np.int32]:
    """start [clusters]: rows that are the first centroids -> [clusters, F / clusters] row ids, ascending in each."""
    clusters, count = len(start), len(dense.values)
    size = count // clusters
    centroids = _normalised(dense, start).astype(np.float64)  # [clusters, D]
    for _ in range(rounds):
        label = _assign(_similarity(dense, centroids), size)
        moved = np.zeros_like(centroids)
        for first in range(0, count, _ROWS):
            rows = np.arange(first, min(first + _ROWS, count))
            np.add.at(moved, label[rows], _normalised(dense, rows))
        centroids = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-30)
    return np.argsort(label, kind="stable").astype(np.int32).reshape(clusters, size)


def _similarity(dense: DenseMatrix, centroids: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """-> [F, clusters], on a grid: the last bits, which depend on the machine, decide nothing."""
    count = len(dense.values)
    found = np.empty((count, len(centroids)))
    for first in range(0, count, _ROWS):
        rows = np.arange(first, min(first + _ROWS, count))
        found[rows] = _normalised(dense, rows) @ centroids.T
    return np.round(found, 9)


def _normalised(dense: DenseMatrix, rows: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    values = dense.float32(rows).astype(np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-30)


def _assign(similarity: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.intp]:
    """Those with most to lose choose first; a full cluster takes no more. -> [F] cluster."""
    count, clusters = similarity.shape
    ordered = np.sort(similarity, axis=1)
    regret = ordered[:, -1] - ordered[:, -2] if clusters > 1 else ordered[:, -1]
    preference = np.argsort(-similarity, axis=1, kind="stable")
    room = [size] * clusters
    label = np.empty(count, dtype=np.intp)
    for row in np.argsort(-regret, kind="stable").tolist():
        for cluster in preference[row].tolist():
            if room[cluster]:
                room[cluster] -= 1
                label[row] = cluster
                break
    return label
