"""Continuing prompts over the KV cache, many at a time: token ids, or text.

A text hangs on its prompt, the weights, the seed and its numbers (which prompt, which sample) alone: rows of a batch
are independent but for rounding, padding is seen by nobody, and random numbers belong to a row. Where a router can't
promise that, texts are made one by one, which is told.
B rows: one for each sample of each prompt. V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.data.tokenizer import Tokenizer
from moelab.errors import CheckpointError, ConfigError
from moelab.moe.routing import Routing
from moelab.nn.decoding import Decoder, Decoding, computes_apart
from moelab.nn.sampling import Draws, Sampling, choose

BATCH_SIZE = 32  # rows at once, where the caller says nothing ...
MOST_POSITIONS = 1 << 17  # ... and positions of all of them, prompts and new tokens: keys and values take memory
STOP_SLACK = 8  # tokens more than a stop text has bytes that are looked through for it
logger = logging.getLogger("moelab")


@dataclass(frozen=True)
class Continuation:
    """What a model went on with."""

    prompt: int  # which of the prompts
    sample: int  # which of its samples
    ids: list[int]  # the new tokens, with the one that ended them
    ended: int | str | None  # the end token, or the stop text; None: max_new_tokens came first
    routes: dict[int, Tensor] | None = None  # layer -> experts [n, K] int64 of prompt and text but the last token


@dataclass
class _Row:
    """A text while it grows."""

    prompt: int
    sample: int
    draws: Draws
    ids: list[int]
    ended: int | str | None = None
    passed: dict[int, list[Tensor]] | None = None  # layer -> experts [n, K] of each pass; None: nobody asks

    def add(self, token: int, sampling: Sampling, decode: Callable[[list[int]], str] | None) -> bool:
        """Take a token; -> whether the text ends with it."""
        self.ids.append(token)
        if token in sampling.end_token_ids:
            self.ended = token
        elif sampling.stop and decode is not None:
            longest = max(len(text.encode()) for text in sampling.stop)
            tail = decode(self.ids[-longest - STOP_SLACK :])
            self.ended = next((text for text in sampling.stop if text in tail), None)
        return self.ended is not None or len(self.ids) >= sampling.max_new_tokens

    def note(self, experts: Mapping[int, Tensor], text: int, begin: int = 0) -> None:
        """Keep the routes of a pass, {layer: experts [texts, n, K]}, of this text, which begins at `begin`."""
        assert self.passed is not None
        for layer, expert in experts.items():
            self.passed.setdefault(layer, []).append(expert[text, begin:])

    def found(self) -> Continuation:
        routes = None if self.passed is None else {layer: torch.cat(each) for layer, each in self.passed.items()}
        return Continuation(self.prompt, self.sample, self.ids, self.ended, routes)


def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int | None = None,
    tokenizer: Tokenizer | None = None,
    routes: bool = False,
    seeds: Sequence[int] | None = None,
) -> list[Continuation]:
    """`samples` continuations of each of `prompts`, token ids; in order, the samples of a prompt side by side.

    `batch_size`: rows at once; None: 32, less where they are long. It changes nothing but time and memory, and the last
    bits of scores. `tokenizer`: for stop texts. `routes`: tell which experts wrote each, of routers of a fixed K.
    `seeds`: of each prompt, in place of sampling.seed and its number, so that it may come in any company.
    Raises ConfigError for an empty prompt or ids that the model has no row for, CheckpointError where the weights give
    no finite scores.
    """
    check_prompts(model, prompts)
    if samples < 1 or (batch_size is not None and batch_size < 1):
        raise ConfigError("generate: samples and batch_size must be at least 1")
    if sampling.stop and tokenizer is None:
        raise ConfigError("generate: stop texts need a tokenizer")
    keys = [(sampling.seed, prompt) for prompt in range(len(prompts))] if seeds is None else [(one, 0) for one in seeds]
    rows = [_Row(prompt, sample, Draws(*keys[prompt], sample), [], passed={} if routes else None)
            for prompt in range(len(prompts)) for sample in range(samples)]  # fmt: skip
    decode = None if tokenizer is None else tokenizer.decode
    if sampling.max_new_tokens > 0:
        with _evaluating(model):  # once, where nobody looks between two tokens
            for some in _batches(rows, prompts, sampling, _rows_at_once(model, batch_size)):
                for _ in _grow(model, prompts, some, sampling, decode):
                    pass
    return [row.found() for row in rows]


def generate(
    model: Decoder, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer | None = None
) -> Iterator[int]:
    """Token ids that continue `prompt`, one at a time: sample 0 of prompt 0 of `generate_batch`, as it grows."""
    check_prompts(model, [prompt])
    if sampling.max_new_tokens == 0:
        return
    row = _Row(0, 0, Draws(sampling.seed, 0, 0), [])
    for _ in _grow(model, [prompt], [row], sampling, None if tokenizer is None else tokenizer.decode):
        yield row.ids[-1]


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raise ConfigError, saying which, for a prompt without tokens or with ids that the model has no row for."""
    rows = model.embed_tokens.num_embeddings
    for number, prompt in enumerate(prompts, 1):
        which = "prompt" if len(prompts) == 1 else f"prompt {number}"
        if len(prompt) == 0:
            raise ConfigError(f"{which}: must hold at least one token")
        if min(prompt) < 0 or max(prompt) >= rows:
            raise ConfigError(f"{which}: holds ids in {min(prompt)} .. {max(prompt)}, and the model has {rows} rows")


def _rows_at_once(model: Decoder, batch_size: int | None) -> int:
    """What was asked for; 1, which is told, where texts of a batch would change each other."""
    if batch_size == 1:
        return 1
    for part, router in model.plugin_parts():
        if not getattr(router, "causal_in_evaluation", True):
            logger.warning(
                "generate: one text at a time: %s looks at other tokens in evaluation too, so that texts of a batch "
                "would change each other", part.title,
            )  # fmt: skip
            return 1
    return batch_size or BATCH_SIZE


def _batches(
    rows: Sequence[_Row], prompts: Sequence[Sequence[int]], sampling: Sampling, batch_size: int
) -> Iterator[list[_Row]]:
    """Rows of like length together, the longest first: what doesn't fit is known at once."""
    held: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(prompts[row.prompt])):
        longest = len(prompts[held[0].prompt]) + sampling.max_new_tokens if held else 0
        if held and (len(held) >= batch_size or (len(held) + 1) * longest > MOST_POSITIONS):
            yield held
            held = []
        held.append(row)
    if held:
        yield held


def _grow(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    rows: list[_Row],
    sampling: Sampling,
    decode: Callable[[list[int]], str] | None,
) -> Iterator[None]:
    """Tokens for all rows, until each has ended; yields after every one."""
    batch: Decoding | None = None
    live, token = list(rows), torch.empty(0)
    for position in range(sampling.max_new_tokens):
        with _evaluating(model):
            if batch is None:
                batch, scores = _begin(model, prompts, live, sampling)
                seen = _seen(prompts, live, sampling, scores)
            else:
                scores = batch(token)
                if live[0].passed is not None:
                    experts = _experts(batch.routings, len(live))
                    for index, row in enumerate(live):
                        row.note(experts, index)
            token = choose(scores, sampling, seen, [row.draws for row in live], position)
            found = token.tolist()
            if min(found) < 0:
                raise CheckpointError(_not_finite(model))
            stays = [
                index
                for index, (row, one) in enumerate(zip(live, found, strict=True))
                if not row.add(one, sampling, decode)
            ]
            if seen is not None:
                seen.scatter_(1, token.unsqueeze(1), True)
            if len(stays) < len(live):
                live = [live[index] for index in stays]
                if live:
                    kept = torch.tensor(stays, device=token.device)
                    batch.take_rows(kept)
                    token, seen = token[kept], None if seen is None else seen[kept]
        yield
        if not live:
            return


def _begin(
    model: Decoder, prompts: Sequence[Sequence[int]], rows: Sequence[_Row], sampling: Sampling
) -> tuple[Decoding, Tensor]:
    """The prompts of rows in one forward pass, each once, padded on the left -> what goes on, and scores [B, V]."""
    numbers = sorted({row.prompt for row in rows})
    texts = [prompts[number] for number in numbers]
    longest = max(map(len, texts))
    device = model.embed_tokens.weight.device
    ids = torch.tensor([[text[0]] * (longest - len(text)) + list(text) for text in texts]).to(device)
    padding = torch.tensor([longest - len(text) for text in texts])
    batch = Decoding(model, len(rows), longest, sampling.max_new_tokens, sampling.autotune)
    scores = batch.read(ids, padding.to(device))
    places = [numbers.index(row.prompt) for row in rows]
    if rows[0].passed is not None:
        experts = _experts(batch.routings, len(texts))
        for row, place in zip(rows, places, strict=True):
            row.note(experts, place, int(padding[place]))
    if places != list(range(len(numbers))):
        spread = torch.tensor(places, device=device)
        batch.take_rows(spread)
        scores = scores.index_select(0, spread)
    return batch, scores


def _experts(routings: Mapping[int, Routing], texts: int) -> dict[int, Tensor]:
    """{layer: experts [texts, n, K] int64} of a pass over n tokens of each. Waits for the device.

    Raises ConfigError for a router that gives tokens unlike numbers of experts, dropping some or by its nature.
    """
    for layer, routing in routings.items():
        if routing.top_k is None or routing.served is not None:
            raise ConfigError(f"generate: layer {layer} gives tokens unlike numbers of experts; no routes can be told")
    return {layer: r.expert.view(texts, -1, r.top_k or 0).cpu() for layer, r in routings.items()}


def _seen(prompts: Sequence[Sequence[int]], rows: Sequence[_Row], sampling: Sampling, scores: Tensor) -> Tensor | None:
    """[B, V] bool, the tokens of each prompt; None where nothing asks."""
    if sampling.repetition_penalty == 1:
        return None
    seen = torch.zeros(scores.shape, dtype=torch.bool)
    for index, row in enumerate(rows):
        seen[index, torch.tensor(prompts[row.prompt])] = True
    return seen.to(scores.device)


@contextmanager
def _evaluating(model: Decoder) -> Iterator[None]:
    """The model in evaluation, as it was afterwards; nothing is kept for a backward pass."""
    was_training = model.training
    if not was_training and torch.is_inference_mode_enabled():  # it is already, around all tokens
        yield
        return
    if was_training:
        model.train(False)
    try:
        with torch.inference_mode() if computes_apart(model) else torch.no_grad():
            yield
    finally:
        if was_training:
            model.train(True)


def _not_finite(model: Decoder) -> str:
    """Which tensor of the model is to blame, the first in its order."""
    for name, tensor in model.state_dict().items():
        bad = int((~tensor.isfinite()).sum()) if tensor.is_floating_point() else 0
        if bad:
            return f"{name}: {bad} of {tensor.numel()} numbers are NaN or infinite; the weights are damaged, use others"
    return "the scores of the next token are NaN or infinite though all weights are finite: these weights overflow"
