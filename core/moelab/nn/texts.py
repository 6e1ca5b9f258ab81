"""Prompts and what a model goes on with, as text: `generate_batch` with a tokenizer and a folder's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from moelab.data.tokenizer import Tokenizer
from moelab.errors import ConfigError, near
from moelab.nn.decoding import Decoder
from moelab.nn.generate import Continuation, generate_batch
from moelab.nn.sampling import Sampling

SETTINGS = tuple(entry.name for entry in fields(Sampling) if entry.name != "end_token_ids")


@dataclass(frozen=True)
class Speech:
    """What a model's token ids mean, which of them end a text, and how its folder wants them drawn."""

    tokenizer: Tokenizer
    end_token_ids: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)  # fields of `Sampling`

    def sampling(self, given: Mapping[str, Any]) -> Sampling:
        """`given` fields of `Sampling`, None for none, above the folder's, above the defaults; its own end tokens.

        Raises ConfigError for a name that is none.
        """
        for name in given:
            if name not in SETTINGS:
                raise ConfigError(
                    f"generate: no setting {name!r}{near(name, SETTINGS)} There are {', '.join(SETTINGS)}"
                )
        said = {name: value for name, value in given.items() if value is not None}
        if isinstance(said.get("stop"), str):
            said["stop"] = (said["stop"],)
        if "stop" in said:
            said["stop"] = tuple(said["stop"])  # a command gives none as an empty one
        return Sampling(**{**self.settings, **said, "end_token_ids": self.end_token_ids})

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; an empty one stands for the token that ends documents."""
        ids: list[int] = self.tokenizer.encode(prompt).tolist()
        return ids or [self.tokenizer.eos_token_id]

    def text(self, found: Continuation) -> str:
        """What was added, without the token, or from the text on, that ended it."""
        ended = found.ended
        text = self.tokenizer.decode(found.ids[:-1] if isinstance(ended, int) else found.ids)
        return text[: text.index(ended)] if isinstance(ended, str) and ended in text else text


def continue_texts(
    model: Decoder,
    prompts: Sequence[str],
    speech: Speech,
    sampling: Sampling,
    *,
    samples: int = 1,
    batch_size: int | None = None,
) -> list[list[str]]:
    """Each prompt with each of its `samples` continuations, without what ended it: a list for each prompt.

    Raises ConfigError for a tokenizer with an id that the model has no row for; what `generate_batch` raises.
    """
    tokenizer = speech.tokenizer
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer: gives ids up to {tokenizer.vocab_size - 1}, and the model has {model.config.vocab_size} rows; "
            "use the one that it was trained with"
        )
    ids = [speech.encode(prompt) for prompt in prompts]
    found = generate_batch(model, ids, sampling, samples=samples, batch_size=batch_size, tokenizer=tokenizer)
    texts: list[list[str]] = [[] for _ in prompts]
    for one in found:
        texts[one.prompt].append(prompts[one.prompt] + speech.text(one))
    return texts
