"""One matrix of each checkpoint -> the merged one, by the formulas of mergekit (arcee-ai/mergekit at a6e4028).

Read there: merge_methods/linear.py, merge_methods/generalized_task_arithmetic.py, sparsify.py, registry.py. Sources:
linear, model soups (2203.05482); task arithmetic (2212.04089); TIES (2306.01708); DARE (2311.03099). Each matrix is
taken by itself, as Hugging Face's folders have them, so each expert's gate, up and down have their own share. Ours:
all sums in float32 (mergekit's `dtype: float32`), and of equal magnitudes those that come first are kept.

M models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from moelab_tools.merging.declaration import DARE_TIES, DENSITY, L1, LINEAR, TIES, MergeConfig
from moelab_tools.merging.report import TensorAccount

LEAST = 1e-7  # below it a sum of magnitudes is not scaled to another (mergekit's eps)


def merged(
    config: MergeConfig,
    base: Tensor | None,
    models: Sequence[Tensor],
    weights: Sequence[float],
    stream: Callable[[int], torch.Generator],
    account: TensorAccount,
) -> Tensor:
    """base and each of the models [...] fp32, weights [M] -> [...] fp32. `stream`: of one model's mask.

    `account`: counts what each model changed, and what was kept of it.
    """
    weight = torch.tensor(weights, dtype=torch.float32).view(-1, *[1] * models[0].dim())
    if config.method == LINEAR:
        total = (weight * torch.stack(list(models))).sum(0)
        return total / weight.sum(0) if config.normalizes else total
    assert base is not None
    changes = [model - base for model in models]
    account.count(account.changed, [change != 0 for change in changes])
    if config.sparse:
        changes = [
            _sparse(change, config.models[number].density, config, partial(stream, number))
            for number, change in enumerate(changes)
        ]
        account.count(account.kept, [change != 0 for change in changes])
    weighted = weight * torch.stack(changes)
    if config.method in (TIES, DARE_TIES):
        majority = (weighted.sum(0) >= 0) * 2.0 - 1.0
        agree = weighted.sign() == majority
        account.count(account.agreeing, list(agree))
        mixed, divisor = (weighted * agree).sum(0), (weight * agree).sum(0)
        divisor[divisor == 0] = 1
    else:
        mixed, divisor = weighted.sum(0), weight.sum(0)
        divisor[divisor.abs() < 1e-8] = 1
    if config.normalizes:
        mixed /= divisor
    return base + config.scale * mixed


def _sparse(change: Tensor, density: float, config: MergeConfig, stream: Callable[[], torch.Generator]) -> Tensor:
    """What is kept of a change, with zeros in between."""
    if density >= 1:
        return change
    if config.method == TIES:
        return change * _largest(change, density)
    mask = torch.empty_like(change).bernoulli_(density, generator=stream())
    kept = change * mask
    if config.rescale == DENSITY:
        return kept / density
    before, after = change.abs().sum(), kept.abs().sum()
    return kept * (before / after) if config.rescale == L1 and before >= LEAST and after >= LEAST else kept


def _largest(change: Tensor, density: float) -> Tensor:
    """The mask of its largest magnitudes: a share of them, at least one, just so many."""
    sizes = change.abs().flatten()
    count = max(1, int(density * sizes.numel()))
    bound = float(np.partition(sizes.numpy(), sizes.numel() - count)[sizes.numel() - count])
    mask = sizes > bound
    ties = (sizes == bound).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(change.shape)
