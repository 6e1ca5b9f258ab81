"""What routers that are made from prompts share: options, and the contrast of what is for an expert and against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from moelab import ConfigError
from moelab.initialisers import UpcycleContext


@dataclass
class PromptOptions:
    positive: list[list[str]] = field(default_factory=list)  # for each expert, what it is to be chosen for
    negative: list[list[str]] = field(default_factory=list)  # for each expert, what not; may be left out
    scale: float = 1.0  # norm of a row


def check_prompts(options: PromptOptions, context: UpcycleContext) -> None:
    """Raise ConfigError unless each expert has its prompts."""
    experts = context.layout.num_experts
    for key, prompts in (("positive", options.positive), ("negative", options.negative)):
        if len(prompts) != experts and (key == "positive" or prompts):
            raise ConfigError(f"{key} needs a list of prompts for each of the {experts} experts, has {len(prompts)}")
    if not all(options.positive):
        raise ConfigError("positive: every expert needs at least one prompt")


def contrasts(options: PromptOptions, mean: Callable[[list[str]], npt.NDArray[np.float64]]) -> npt.NDArray[np.float32]:
    """`mean` of an expert's prompts -> [D]; positive minus negative, of norm `scale`: [E, D]."""
    rows = []
    for expert, texts in enumerate(options.positive):
        row = mean(texts)
        if options.negative and options.negative[expert]:
            row = row - mean(options.negative[expert])
        length = float(np.linalg.norm(row))
        if length == 0:
            raise ConfigError(f"recipe.router: the prompts of expert {expert} cancel each other")
        rows.append(row / length)
    return (np.stack(rows) * options.scale).astype(np.float32)
