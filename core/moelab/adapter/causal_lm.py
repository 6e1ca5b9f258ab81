"""`MoelabForCausalLM`: a model of moelab inside transformers' `PreTrainedModel`, with any router, dense ones too.

Its config.json holds the model's part of a moelab config under model_type "moelab". A folder is data here as
everywhere: its weights are safetensors or not read, its plugins the installed ones or those that the caller names.
"""

from __future__ import annotations

import logging
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from moelab.adapter.base import VERSION, MoelabPreTrainedModel
from moelab.adapter.config import MoelabConfig
from moelab.errors import CheckpointError, ConfigError, UserError
from moelab.hf.save import save_hf
from moelab.hf.write_config import write_config
from moelab.nn.loss import IGNORE_INDEX, logits_and_cross_entropy
from moelab.nn.transformer import Transformer
from moelab.registry import Registry

logger = logging.getLogger("moelab")

EMBEDDING, HEAD = "model.embed_tokens.weight", "model.lm_head.weight"
SAID_TO_LOSS = {"shift_labels", "num_items_in_batch", "cache_position"}  # of forward's other arguments


class MoelabForCausalLM(MoelabPreTrainedModel, GenerationMixin):
    """A decoder and its head. Balance losses are the trainer's, so `loss` is the cross-entropy alone."""

    _tied_weights_keys = {HEAD: EMBEDDING} if VERSION >= 5 else [HEAD]

    def __init__(
        self, config: MoelabConfig, decoder: Transformer | None = None, *, registry: Registry | None = None
    ) -> None:
        """`decoder`: what to wrap, its weights left as they are; None: one is built, initialised by seed 0."""
        super().__init__(config, decoder, registry=registry)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids [B, S] or inputs_embeds [B, S, D] -> logits [B, S, V], or the last `logits_to_keep` of them.

        attention_mask [B, P + S] or [B, 1, S, P + S]; position_ids [B, S], and where they begin anew without a mask,
        as sequences packed into one; labels [B, S], shifted here, -100 ignored. Padding is left out of what
        routers count. Raises ValueError, naming the argument, for what contradicts itself.
        """
        passed, cache = self.passed(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
        )
        logits, loss = self._judged(passed.hidden, labels, logits_to_keep, kwargs)
        router_logits = tuple(r.routing.logits for r in passed.records if r.routing.logits is not None)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=passed.states or None,
            attentions=passed.attentions or None,
            router_logits=(router_logits or None) if output_router_logits else None,
        )
        return output if self._asked(return_dict, "return_dict") else output.to_tuple()

    def _judged(
        self, hidden: Tensor, labels: Tensor | None, keep: int | Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and loss: by transformers' own function, or with the same numbers by ours, which costs less."""
        head, shifted = self.model.lm_head, kwargs.get("shift_labels")
        plain = (
            type(head) is nn.Linear and head.bias is None and not head._forward_hooks and not head._forward_pre_hooks
        )
        if labels is None or not plain or not isinstance(keep, int) or keep or set(kwargs) - SAID_TO_LOSS:
            logits = head(hidden[:, slice(-keep, None) if isinstance(keep, int) else keep])
            if labels is None:
                return logits, None
            return logits, self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX) if shifted is None else shifted
        logits, nats = logits_and_cross_entropy(hidden, head.weight, targets.to(hidden.device))
        count = kwargs.get("num_items_in_batch")
        if count is None:
            count = (targets != IGNORE_INDEX).sum()
        return logits, nats.sum() / (count.to(nats.device) if isinstance(count, Tensor) else count)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.lm_head = new_embeddings  # type: ignore[assignment]

    @classmethod
    def of(cls, model: Transformer, **fields: Any) -> MoelabForCausalLM:
        """On `model` itself, in the mode it is in, told where its texts end if its folder says so."""
        adapted: MoelabForCausalLM = super().of(model, **fields)
        try:
            speech = model.speech() if callable(model.speech) else model.speech
        except UserError:  # a folder without a tokenizer
            speech = None
        if speech is not None:
            model.speech = speech
            ends = list(speech.end_token_ids)
            adapted.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
            adapted.generation_config.pad_token_id = ends[0]
        return adapted

    def save_pretrained(
        self, save_directory: str | PathLike[str], *args: Any, export: bool = False, **kwargs: Any
    ) -> None:
        """As transformers writes it, under model_type "moelab", for whoever has moelab: any router, any layout.

        `export`: as Qwen2 or Qwen2-MoE instead, which needs no moelab, where that format can say the model; else, told
        in a line, as above. What a trainer saves to go on from it reads by the names of its own parameters.
        """
        if export:
            ids = {name: getattr(self.generation_config, name) for name in ("eos_token_id", "pad_token_id")}
            known = {name: value for name, value in ids.items() if value is not None}
            try:
                write_config(self.model, dtype=self.dtype, extra=known)  # asked before anything is written
            except (CheckpointError, ConfigError) as error:
                logger.warning("%s: written as model_type moelab, which needs moelab: %s", save_directory, error)
            else:
                save_hf(self.model, Path(save_directory), dtype=self.dtype, config_extra=known, force=True)
                return
        super().save_pretrained(save_directory, *args, **kwargs)
