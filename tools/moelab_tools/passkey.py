"""Passkey retrieval: a number hidden in real text, at several depths and lengths, and asked for at the end.

After Mohtashami and Jaggi (2305.16300) 4.2, whose filler is one sentence again and again; here it is held-out text, so
that a model which only knows the filler gains nothing. Seeded, greedy, and right only where every digit is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moelab.data.corpus import TokenStream
from moelab.data.tokenizer import Tokenizer
from moelab.errors import DataError
from moelab.nn.generate import generate_batch
from moelab.nn.sampling import Sampling
from moelab.nn.transformer import Transformer
from moelab.seeds import derive_seed

DEPTHS, DIGITS = (0.0, 0.25, 0.5, 0.75, 1.0), 5
HIDDEN, QUESTION = (
    "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
    "\nWhat is the pass key? The pass key is ",
)


@dataclass(frozen=True)
class Trial:
    """One text with a key in it."""

    prompt: list[int]
    key: str
    depth: float


def make_trials(stream: TokenStream, tokenizer: Tokenizer, length: int, trials: int, seed: int = 0) -> list[Trial]:
    """`trials` at each of DEPTHS, of `length` tokens with the answer. DataError where that is too few for the words."""
    found = []
    for depth in DEPTHS:
        for number in range(trials):
            draw = np.random.default_rng(derive_seed(seed, "passkey", length, int(100 * depth), number))
            key = str(draw.integers(10 ** (DIGITS - 1), 10**DIGITS))
            hidden, question = (tokenizer.encode(text.format(key=key)).tolist() for text in (HIDDEN, QUESTION))
            room = length - len(hidden) - len(question) - len(tokenizer.encode(key))
            if room < 0 or room >= len(stream):
                raise DataError(
                    f"--passkey: of {length} tokens the words that hide a key and ask for it take {length - room}, and "
                    f"the rest is held-out text, of which there are {len(stream)}; give another --length"
                )
            begin = int(draw.integers(0, len(stream) - room))
            filler = np.asarray(stream.tokens[begin : begin + room]).astype(np.int64).tolist()
            cut = round(depth * room)
            found.append(Trial([*filler[:cut], *hidden, *filler[cut:], *question], key, depth))
    return found


def passkey_accuracy(model: Transformer, tokenizer: Tokenizer, trials: Sequence[Trial]) -> dict[str, float]:
    """{depth: share of keys that were given back digit by digit}."""
    right: dict[float, list[bool]] = {}
    longest = max(len(tokenizer.encode(trial.key)) for trial in trials)
    found = generate_batch(model, [trial.prompt for trial in trials], Sampling(longest, temperature=0.0))
    for trial, one in zip(trials, found, strict=True):
        answer = tokenizer.decode(one.ids[: len(tokenizer.encode(trial.key))])
        right.setdefault(trial.depth, []).append(answer.strip().startswith(trial.key))
    return {f"{depth:g}": sum(found) / len(found) for depth, found in right.items()}
