"""Builds Qwen2's tokenizer.json from its published ranks, for training with the real vocabulary without a download hub.

    pip download --no-deps dashscope && unzip -j dashscope-*.whl dashscope/resources/qwen.tiktoken
    python -m moelab_tools.qwen2_tokenizer qwen.tiktoken FOLDER
    moelab train configs/train/tiny_moe.yaml data.tokenizer=FOLDER

A rank file says in which order tokens were made, not from which two parts; those are found by splitting each token with
the tokens that were made before it. Qwen2 = NFC, then its regular expression, then byte-level BPE, then three control
tokens (Qwen2 technical report, section 2.1: 151,643 regular tokens and 3 control tokens).
"""

from __future__ import annotations

import base64
import binascii
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from moelab.errors import DataError
from moelab.hf.tokenizer_config import QWEN2_WORDS
from moelab_tools.user_path import USER_PATH

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "add_prefix_space": False,
    "additional_special_tokens": list(CONTROL_TOKENS[1:]),
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": CONTROL_TOKENS[0],
    "errors": "replace",
    "model_max_length": 131072,
    "pad_token": CONTROL_TOKENS[0],
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of a .tiktoken file: a line is a token in base64, a blank, its rank; ranks are 0 .. n-1."""
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_text(encoding="ascii").split("\n")
        for line in filter(None, lines):
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}; give a qwen.tiktoken file") from error
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path} is no .tiktoken file ({error}); a line is BASE64 RANK, as 'IQ== 0'") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise DataError(
            f"{path}: {len(ranks)} ranks that are not 0 .. n-1 with all 256 bytes among them; is it cut short?"
        )
    return ranks


def find_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts of each token longer than a byte, in the order of their ranks."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _split(token, ranks, rank)
        if len(parts) != 2:
            raise DataError(f"rank {rank}, {token!r}: made of {len(parts)} earlier tokens, not 2; no byte-level BPE")
        merges.append((parts[0], parts[1]))
    return merges


def _split(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """BPE of `token` with the ranks below `limit`: the pair of lowest rank is joined until none is left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        joined = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        lowest = min(joined)
        if lowest >= limit:
            break
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def build_tokenizer(ranks: dict[bytes, int]) -> Any:
    """A `tokenizers.Tokenizer`; its ids are the ranks, then the control tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    from moelab.data.byte_tokenizer import byte_alphabet

    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    merges = [(spell(left), spell(right)) for left, right in find_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix=""))
    tokenizer.normalizer = normalizers.NFC()
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated"), pre_tokenizers.ByteLevel(**byte_level)]
    )
    tokenizer.post_processor = processors.ByteLevel(**byte_level)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    return tokenizer


def write_tokenizer(ranks_file: Path, folder: Path) -> Any:
    """tokenizer.json and tokenizer_config.json -> the tokenizer."""
    tokenizer = build_tokenizer(read_ranks(ranks_file))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    return tokenizer


@click.command()
@click.argument("ranks", type=USER_PATH)
@click.argument("folder", type=USER_PATH)
def main(ranks: Path, folder: Path) -> None:
    """Write Qwen2's tokenizer.json and tokenizer_config.json to FOLDER.

    \b
    Example:
      python -m moelab_tools.qwen2_tokenizer qwen.tiktoken qwen2-tokenizer
    """
    try:
        tokenizer = write_tokenizer(ranks, folder)
    except DataError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{folder}: {tokenizer.get_vocab_size(with_added_tokens=True):,} tokens")


if __name__ == "__main__":
    main()
