"""A model of a folder: a run, a moelab checkpoint, or a Hugging Face folder that moelab reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import MISSING

from moelab import CheckpointError, Component, GeneratorContext, Question, Reply, TextGenerator, component, hookimpl
from moelab.hub import user_folder

logger = logging.getLogger("moelab")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class CheckpointOptions:
    path: str = MISSING  # a run folder, a moelab checkpoint, a Hugging Face folder or its name there
    max_new_tokens: int = 512  # of a reply
    temperature: float | None = None  # 0: greedy; null, of this and the next two: as generation_config.json says
    top_p: float | None = None
    top_k: int | None = None
    device: str = "cpu"  # torch's
    dtype: str = "float32"  # of the weights: float32, bfloat16 or float16

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: must be at least 1, not {self.max_new_tokens}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}, not '{self.dtype}'")


class Checkpoint:
    """A loaded model, its tokenizer and its chat template."""

    def __init__(self, options: CheckpointOptions, context: GeneratorContext, folder: Path) -> None:
        """Raises CheckpointError for a folder that can't be loaded or has no tokenizer, ConfigError for sampling."""
        import torch

        from moelab.loading import chat_template_of, read_model, speech_of
        from moelab.manifest import fingerprint

        self._where, self._folder = context.where, folder
        self._speech, self._template = speech_of(folder), chat_template_of(folder)
        asked = {key: getattr(options, key) for key in ("max_new_tokens", "temperature", "top_p", "top_k")}
        sampling = self._speech.sampling(asked)
        ends = dict.fromkeys((*sampling.end_token_ids, *self._template.end_token_ids))
        self._sampling = replace(sampling, end_token_ids=tuple(ends))
        self._model = read_model(
            folder, dtype=getattr(torch, options.dtype), device=options.device, trust=context.trust
        )
        self.identity = {"folder": str(folder), "weights": fingerprint(folder)}
        self._told = False

    def __call__(self, questions: Sequence[Question]) -> list[Reply]:
        """All of them at once."""
        from moelab.nn.generate import generate_batch

        prompts = [
            self._template.render(list(one.messages), add_generation_prompt=True).ids.tolist() for one in questions
        ]
        self._tell_of_long(max(map(len, prompts)))
        found = generate_batch(
            self._model, prompts, self._sampling, batch_size=len(prompts), tokenizer=self._speech.tokenizer,
            seeds=[one.seed for one in questions],
        )  # fmt: skip
        return [Reply(self._speech.text(one), one.ended is not None) for one in found]

    def _tell_of_long(self, longest: int) -> None:
        most, new = self._model.config.max_position_embeddings, self._sampling.max_new_tokens
        if longest + new > most and not self._told:
            self._told = True
            logger.warning(
                "%s: a question of %d tokens and a reply of up to %d reach beyond the %d positions of %s (told once)",
                self._where, longest, new, most, self._folder,
            )  # fmt: skip


def checkpoint(options: CheckpointOptions, context: GeneratorContext) -> TextGenerator:
    """Replies of a model that moelab runs, in the chat template of its folder; ChatML where it has none.

    Source: none; sampling is `moelab generate`'s, with a random stream for each question.
    Use: on one machine, and for replies that can be made again.
    Cost: the last bits of scores hang on the batch, and a near-tie can turn on them; `batch_size: 1` rules it out.
    """
    from moelab.integrity import verified

    where = f"{context.where}.path"
    try:
        folder = verified(user_folder(options.path, where))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return Checkpoint(options, context, folder)


@hookimpl
def moelab_generators() -> list[Component[GeneratorContext, TextGenerator]]:
    return [component("checkpoint", CheckpointOptions, checkpoint)]
