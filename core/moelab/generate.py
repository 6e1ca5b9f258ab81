"""Continuing a prompt over the KV cache: greedy, temperature, top-p."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.errors import CheckpointError, ConfigError
from moelab.nn.kv_cache import KVCache
from moelab.nn.transformer import Transformer
from moelab.seeds import generator


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; top_p as in Holtzman et al. 2020."""

    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    end_token_ids: tuple[int, ...] = ()  # any of them ends the text

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or not self.temperature >= 0 or not 0 < self.top_p <= 1:  # NaN is neither
            raise ConfigError("sampling: max_new_tokens and temperature must not be negative, top_p must be in (0, 1]")


@torch.no_grad()
def generate(model: Transformer, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """Token ids that continue `prompt` (one sequence), one at a time; stops after any of end_token_ids.

    Raises ConfigError for an empty prompt, CheckpointError where the weights give no finite scores.
    """
    if not prompt:
        raise ConfigError("prompt: must hold at least one token")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    noise = generator(sampling.seed, "generate")
    cache = KVCache(model.config.num_hidden_layers)
    input_ids = torch.tensor([prompt], device=device)
    try:
        for _ in range(sampling.max_new_tokens):
            x, _ = model.hidden_states(input_ids, cache=cache)
            logits = model.lm_head(x[:, -1])  # [1, V]
            scores = logits[0].float().cpu()
            if not scores.isfinite().all():
                raise CheckpointError(_not_finite(model))
            token = _choose(scores, sampling, noise)
            yield token
            if token in sampling.end_token_ids:
                return
            input_ids = torch.tensor([[token]], device=device)
    finally:
        model.train(was_training)


def _not_finite(model: Transformer) -> str:
    """Which tensor of the model is to blame, the first in its order."""
    for name, tensor in model.state_dict().items():
        bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
        if bad:
            return f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite; the weights are damaged, use others"
    return "the scores of the next token are NaN or infinite though all weights are finite: these weights overflow"


def _choose(logits: Tensor, sampling: Sampling, noise: torch.Generator) -> int:
    """logits [V] on the host -> a token id."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    temperature = max(sampling.temperature, torch.finfo(torch.float32).tiny)
    probabilities = ((logits - logits.max()) / temperature).softmax(-1)  # the best is 0 / t, however small t is
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        beyond = ordered.cumsum(0) - ordered >= sampling.top_p  # the token that crosses top_p stays in
        probabilities = torch.zeros_like(probabilities).scatter(0, index, ordered.masked_fill(beyond, 0.0))
    return int(torch.multinomial(probabilities, 1, generator=noise))
