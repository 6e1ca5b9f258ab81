"""`MoelabForSequenceClassification`: numbers for a whole sequence from a model of moelab, such as a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from moelab.adapter.base import MoelabPreTrainedModel
from moelab.adapter.config import MoelabConfig
from moelab.nn.transformer import Transformer
from moelab.registry import Registry


class MoelabForSequenceClassification(MoelabPreTrainedModel):
    """A decoder with `score`, [num_labels, D], on each sequence's last real token; its language head stays unused.

    `num_labels=1` is a reward. The last real token is that of the attention mask, so padding may have any id and any
    side; without a mask it is the last one that is not `config.pad_token_id`, as transformers' own classes have it.
    """

    def __init__(
        self, config: MoelabConfig, decoder: Transformer | None = None, *, registry: Registry | None = None
    ) -> None:
        """`decoder`: what to stand on, its weights left as they are; None: one is built, initialised by seed 0."""
        super().__init__(config, decoder, registry=registry)
        self.num_labels = config.num_labels
        weight = self.model.embed_tokens.weight
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False, device=weight.device)
        self.score.to(weight.dtype)
        nn.init.normal_(self.score.weight, 0.0, config.initializer_range)
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
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        """input_ids [B, S] or inputs_embeds [B, S, D] -> logits [B, num_labels]; loss by transformers for `labels`."""
        passed, cache = self.passed(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
        )
        last = self._last_tokens(input_ids, attention_mask, passed.hidden)
        logits = self.score(passed.hidden[torch.arange(len(last), device=last.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=passed.states or None,
            attentions=passed.attentions or None,
        )
        return output if self._asked(return_dict, "return_dict") else output.to_tuple()

    def _last_tokens(self, input_ids: Tensor | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """-> [B] int64: where each sequence's last real token stands. Raises ValueError where nothing says it."""
        batch, seq = hidden.shape[:2]
        if mask is not None and mask.dim() == 2:
            real = mask[:, -seq:].to(hidden.device, torch.bool)
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        elif batch == 1:
            real = torch.ones(batch, seq, dtype=torch.bool, device=hidden.device)
        else:
            raise ValueError("attention_mask: give one, or set config.pad_token_id: which tokens are real isn't known")
        return (torch.arange(seq, device=hidden.device) * real).argmax(-1)
