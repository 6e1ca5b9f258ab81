"""The one balance loss that Qwen2-MoE's config.json can speak of: `router_aux_loss_coef`, as the run had it."""

from __future__ import annotations

import logging
from typing import Any

from moelab.builder import build_balance_losses
from moelab.config.model import ModelConfig
from moelab.errors import ConfigError
from moelab.layouts import build_layouts
from moelab.moe.balance import NamedLoss
from moelab.moe.schedule import WeightSchedule
from moelab.registry import Registry

logger = logging.getLogger("moelab")
KEY = "router_aux_loss_coef"


def aux_loss_fields(config: ModelConfig) -> dict[str, float]:
    """{"router_aux_loss_coef": c}: what makes transformers add what the run's balance losses did; 0.0 when none does.

    Absent, transformers would take 0.001. What that field can't say is left out and told in one warning.
    """
    moe = config.moe
    if moe is None or not moe.balance_losses:
        return {KEY: 0.0}
    try:
        registry = Registry()
        losses = build_balance_losses(config, registry)
        sparse = frozenset(build_layouts(config, registry))
    except ConfigError as error:  # a loss of a plugin that is not installed here
        logger.warning("config.json: %s is 0.0: %s", KEY, error)
        return {KEY: 0.0}
    total, unsaid = 0.0, []
    for named in losses:
        answer = _coefficient(named, sparse)
        if isinstance(answer, str):
            unsaid.append(f"{named.name} ({answer})")
        else:
            total += answer
    if unsaid:
        logger.warning("config.json: %s is %g, without %s", KEY, total, "; ".join(unsaid))
    return {KEY: total}


def _coefficient(named: NamedLoss, sparse: frozenset[int]) -> float | str:
    """A loss' part of the coefficient, or why it has none."""
    if named.layers is not None and named.layers != sparse:
        return "not on all layers"
    if named.schedule != WeightSchedule():
        return "its weight follows a schedule"
    tell: Any = getattr(named.loss, "qwen2_moe_fields", None)
    answer = "that format has no such loss" if tell is None else tell()
    return answer if isinstance(answer, str) else float(answer[KEY])
