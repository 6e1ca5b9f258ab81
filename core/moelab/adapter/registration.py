"""What a user calls: a model, a tokenizer or a folder of moelab's for whoever takes those of transformers."""

from __future__ import annotations

import functools
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from moelab.adapter.causal_lm import MoelabForCausalLM
from moelab.adapter.classifier import MoelabForSequenceClassification
from moelab.adapter.config import MoelabConfig
from moelab.adapter.folders import MODEL_TYPE, is_run
from moelab.data.tokenizer import Tokenizer
from moelab.data.tokenizer_file import fast_tokenizer
from moelab.hf.carried import TOKENIZER_FILE
from moelab.nn.transformer import Transformer
from moelab.origin import read_origin

# What `AutoConfig.from_pretrained` takes for itself: `AutoModel` hands these to a model's class a second time.
OF_THE_HUB = (
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "code_revision", "subfolder", "token",
    "trust_remote_code", "_from_auto", "_from_pipeline", "_commit_hash", "gguf_file",
)  # fmt: skip


def as_transformers(model: Transformer) -> MoelabForCausalLM:
    """`model` as a transformers causal language model, whatever its routers; nothing is copied.

    `generate`, `labels`, masks, caches and `save_pretrained` are transformers' own. A model that `moelab.load` read
    stops where its folder says. Imports transformers, which is no dependency of moelab: raises ImportError without it.
    """
    return MoelabForCausalLM.of(model)


def as_classifier(model: Transformer, num_labels: int = 1, *, pad_token_id: int | None = None) -> Any:
    """`model` under a new head of `num_labels` numbers a sequence, as transformers' sequence classifiers are.

    One label is a reward, as TRL's RewardTrainer trains it. The head is drawn from torch's global stream.
    -> MoelabForSequenceClassification. Raises ImportError without transformers.
    """
    return MoelabForSequenceClassification.of(model, num_labels=num_labels, pad_token_id=pad_token_id)


def transformers_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer of moelab as one of transformers: the same ids, no token added, the end of a text as its padding."""
    fast = fast_tokenizer(tokenizer.files()[TOKENIZER_FILE], "the tokenizer")
    end = fast.id_to_token(tokenizer.eos_token_id)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=end, pad_token=end, padding_side="left")


def register_with_transformers() -> None:
    """Let `AutoConfig` and `AutoModelForCausalLM` read run folders, moelab checkpoints and model_type "moelab".

    A run folder has no config.json, so `AutoConfig.from_pretrained` is asked here first. Calling it again changes
    nothing. Hugging Face's own folders are read as before, by transformers' own classes.
    """
    AutoConfig.register(MODEL_TYPE, MoelabConfig, exist_ok=True)
    AutoModelForCausalLM.register(MoelabConfig, MoelabForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(MoelabConfig, MoelabForSequenceClassification, exist_ok=True)
    theirs = AutoConfig.from_pretrained
    if getattr(theirs, "reads_moelab", False):
        return

    @functools.wraps(theirs)
    def from_pretrained(pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_run(pretrained_model_name_or_path):
            return theirs(pretrained_model_name_or_path, *args, **kwargs)
        told = {"architectures": [MoelabForCausalLM.__name__], "name_or_path": str(pretrained_model_name_or_path)}
        config = MoelabConfig.of(read_origin(pretrained_model_name_or_path).model, **told)
        wants_rest = kwargs.pop("return_unused_kwargs", False)
        return (config, {key: kwargs[key] for key in kwargs if key not in OF_THE_HUB}) if wants_rest else config

    from_pretrained.reads_moelab = True  # type: ignore[attr-defined]
    AutoConfig.from_pretrained = staticmethod(from_pretrained)
