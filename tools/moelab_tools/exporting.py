"""A checkpoint becomes a Hugging Face folder that keeps what the model was, and says what it wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moelab.checkpoint import MODEL, is_moelab, stored_tensors
from moelab.data.lineage import carried_lineage
from moelab.data.seen import carried_record
from moelab.data.tokenizer import Tokenizer
from moelab.data.tokenizer_file import definition_of
from moelab.hf.carried import TOKENIZER_FILE, carried_files
from moelab.hf.config import CONFIG_FILE
from moelab.hf.files import TensorFolder, read_json
from moelab.hf.save import check_target, save_hf
from moelab.hf.tokenizer_config import as_it_is, llama_cpp_remark, named_token_ids
from moelab.integrity import verified
from moelab.loading import open_model
from moelab.nn.transformer import Transformer
from moelab.origin import Origin, carried_ids, check_vocabulary, end_token_ids, read_origin
from moelab.stored_weights import StoredWeights
from moelab_tools.tokenizer_check import check_auto_tokenizer

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def export(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
    trust: bool = False,
    verify: bool = True,
) -> list[str]:
    """Write `output`; -> lines that say what was written, why so, and who reads it.

    `dtype`: bfloat16, float32 or float16; None: the one in which the checkpoint stores its matrices. Raises
    CheckpointError or ConfigError for what can't be read, or can't be said in that format, before anything is written.
    """
    check_target(output, force=force)  # before all bytes are read for their checksums
    origin = read_origin(verified(checkpoint, verify=verify))
    model, weights = open_model(origin.folder, trust=trust)
    return write_folder(origin, model, weights, output, dtype=dtype, max_shard_size=max_shard_size, force=force)


def write_folder(
    origin: Origin,
    model: Transformer,
    weights: StoredWeights,
    output: Path,
    *,
    dtype: str | None,
    max_shard_size: str,
    force: bool,
    more: Mapping[str, bytes] | None = None,
    closing: Callable[[], Mapping[str, bytes]] = dict,
) -> list[str]:
    """`export` of weights that are made, or read, as they are written; what goes along is the origin's, and `more`.

    `closing`: files that tell of the tensors, once these are written.
    """
    tokenizer = origin.own_tokenizer()
    if tokenizer is not None:
        check_vocabulary(model.config.vocab_size, tokenizer, origin.tokenizer or str(origin.folder))
    chosen, why = written_dtype(origin, dtype)
    files = _files(origin, tokenizer, dense=model.config.moe is None) | dict(more or {})
    save_hf(
        model,
        output,
        dtype=chosen,
        max_shard_size=max_shard_size,
        extra_files=files,
        config_extra=_ids(origin, tokenizer, files),
        force=force,
        weights=weights,
        closing=closing,
    )
    made = output.resolve()  # x/../y is there for us, not for the system, where there is no x
    return [
        f"written: {output}",
        f"dtype: {str(chosen).removeprefix('torch.')}, {why}",
        _kept(files, output),
        *_tokenizer_lines(made, tokenizer, files, model),
        *_llama_cpp_limits(made),
    ]


def written_dtype(origin: Origin, asked: str | None) -> tuple[torch.dtype, str]:
    """(what to write, why)."""
    if is_moelab(origin.folder):
        whole = stored_tensors(origin.folder, MODEL).values()
        found = [(tensor.parts[0].dtype, len(tensor.shape)) for tensor in whole]
    else:
        found = [(tensor.dtype, len(tensor.shape)) for tensor in TensorFolder(origin.folder).tensors.values()]
    stored = Counter(dtype for dtype, axes in found if axes > 1)
    own = DTYPES.get(stored.most_common(1)[0][0], torch.float32) if stored else torch.float32
    name = str(own).removeprefix("torch.")
    if asked is not None:
        rounded = "" if asked == name else f"; {origin.folder} stores {name}"
        return getattr(torch, asked), f"as asked{rounded}"
    if is_moelab(origin.folder):
        return own, "as the run stores its parameters; --dtype bfloat16 takes half the space and rounds them"
    return own, f"as {origin.folder} stores its matrices"


def _files(origin: Origin, tokenizer: Tokenizer | None, *, dense: bool) -> dict[str, bytes]:
    files = carried_files(origin.folder) | carried_record([origin.folder]) | carried_lineage(origin.folder)
    if tokenizer is None:
        return files
    return as_it_is({**tokenizer.files(), **files}, dense=dense)


def _ids(origin: Origin, tokenizer: Tokenizer | None, files: dict[str, bytes]) -> dict[str, Any]:
    """The ids that the source named; where it named none, the token that ended documents, as Qwen2's base models do."""
    ids = carried_ids(origin.folder)
    if tokenizer is not None and "eos_token_id" not in ids:
        end = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
        ids = {**end, **named_token_ids(files), **ids}
    return ids


def _kept(files: dict[str, bytes], output: Path) -> str:
    ends = end_token_ids(output)
    said = f"; ends at {', '.join(map(str, ends[0]))} ({ends[1]})" if ends else "; no token ends a text"
    return f"along with it: {', '.join(sorted(files)) or 'nothing'}{said}"


def _tokenizer_lines(
    output: Path, tokenizer: Tokenizer | None, files: dict[str, bytes], model: Transformer
) -> list[str]:
    if tokenizer is None:
        return [f"tokenizer: the checkpoint holds none, so {output} has none"]
    verdict = check_auto_tokenizer(output, tokenizer, model.config.vocab_size)
    if verdict is None:
        checked = (
            "transformers: not installed here, so whether its AutoTokenizer gives the ids trained on was not checked"
        )
    else:
        checked = verdict.line(output) if verdict.right else f"warning: {verdict.line(output)}"
    return [checked, llama_cpp_remark(definition_of(files[TOKENIZER_FILE], TOKENIZER_FILE))]


def _llama_cpp_limits(output: Path) -> list[str]:
    """What llama.cpp (as in llama-cpp-python 0.3.36) does not compute of a Qwen2-MoE."""
    config = read_json(output / CONFIG_FILE)
    if config["model_type"] != "qwen2_moe":
        return []
    limits = {
        "tie_word_embeddings": "doesn't load a Qwen2-MoE with tied embeddings",
        "norm_topk_prob": "leaves norm_topk_prob out: other outputs",
        "mlp_only_layers": "can't convert dense layers",
    }
    found = [text for key, text in limits.items() if config.get(key)]
    found += (
        ["can't convert dense layers"] if config["decoder_sparse_step"] > 1 and not config["mlp_only_layers"] else []
    )
    return [f"llama.cpp: {'; '.join(found)}"] if found else []
