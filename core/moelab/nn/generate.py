"""Continuing a prompt over the KV cache, greedily or by temperature and top-p: token ids, or text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moelab.config.model import ModelConfig
from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.moe.routing import LayerRecord
from moelab.nn.kv_cache import KVCache
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


@dataclass(frozen=True)
class Speech:
    """What a model's token ids mean, and which of them end a text."""

    tokenizer: Tokenizer
    end_token_ids: tuple[int, ...]


class Decoder(Protocol):
    """What generating asks of a model: `nn.transformer.Transformer` is one."""

    config: ModelConfig
    training: bool
    lm_head: nn.Linear

    def train(self, mode: bool = True) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def hidden_states(self, input_ids: Tensor, *, cache: KVCache) -> tuple[Tensor, list[LayerRecord]]: ...


def continue_text(model: Decoder, prompt: str, speech: Speech, sampling: Sampling) -> str:
    """The prompt and what `model` goes on with, without the token that ends it.

    An empty prompt stands for the token that ends documents. Raises ConfigError for a tokenizer with an id that the
    model has no row for; what `generate` raises.
    """
    tokenizer, ends = speech.tokenizer, speech.end_token_ids
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer: gives ids up to {tokenizer.vocab_size - 1}, and the model has {model.config.vocab_size} rows; "
            "use the one that it was trained with"
        )
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eos_token_id]
    found = list(generate(model, ids, replace(sampling, end_token_ids=ends)))
    ended = bool(found) and found[-1] in ends
    return prompt + tokenizer.decode(found[:-1] if ended else found)


@torch.no_grad()
def generate(model: Decoder, prompt: list[int], sampling: Sampling) -> Iterator[int]:
    """Token ids that continue `prompt` (one sequence), one at a time; stops after any of end_token_ids.

    Raises ConfigError for an empty prompt, CheckpointError where the weights give no finite scores.
    """
    if not prompt:
        raise ConfigError("prompt: must hold at least one token")
    was_training = model.training
    model.train(False)
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


def _not_finite(model: Decoder) -> str:
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
