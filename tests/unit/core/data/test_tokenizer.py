"""Tokenizers from files: whole-text byte counts, the end of a document, and what is wrong with bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moelab.data.json_tokenizer import _bytes_by_offset
from moelab.data.tokenizer import load_tokenizer
from moelab.errors import DataError

TRAINING = ["the cat sat on the mat, the café too", "def main(): return 漢字 + 'cat'"] * 4
TEXTS = ["the cat", "  the   café\n\n漢字\U0001f600 x", "", "<|endoftext|> </s> e\u0301"]


def byte_level(eos: str | None = "<|endoftext|>", normalise: bool = False) -> Any:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalise:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[eos] if eos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    return tokenizer


def word_level() -> Any:
    vocab = {"[UNK]": 0, "</s>": 1, "the": 2, "cat": 3, "café": 4}
    tokenizer: Any = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def saved(tokenizer: Any, folder: Path) -> str:
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "nfc", "word_level"])
def test_byte_counts_sum_to_the_text(kind: str, text: str, tmp_path: Path) -> None:
    """Whatever the tokenizer drops or normalises: bits per byte divides by the text's own bytes."""
    made = {"byte_level": byte_level, "nfc": lambda: byte_level(normalise=True), "word_level": word_level}[kind]()
    tokenizer = load_tokenizer(saved(made, tmp_path))
    ids, byte_counts = tokenizer.encode_with_bytes(text)
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert len(ids) == len(byte_counts)
    assert byte_counts.sum() == len(text.encode())


def test_byte_level_tokens_have_their_own_lengths_even_inside_a_character(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(byte_level(), tmp_path))
    ids, byte_counts = tokenizer.encode_with_bytes("a \U0001f600")  # never seen: its four bytes are four tokens
    assert byte_counts.tolist()[-4:] == [1, 1, 1, 1]
    lengths = tokenizer.id_bytes()
    assert lengths is not None
    assert lengths[ids].tolist() == byte_counts.tolist()
    assert lengths[tokenizer.eos_token_id] == 0


def test_words_take_the_white_space_before_them(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(word_level(), tmp_path))
    ids, byte_counts = tokenizer.encode_with_bytes("The  café cat \n")
    assert ids.tolist() == [2, 4, 3]
    assert byte_counts.tolist() == [3, 7, 6]  # "The", "  café" in UTF-8, " cat \n"
    assert tokenizer.id_bytes() is None


def test_offsets_that_go_back_take_nothing_away() -> None:
    """A post-processor gives the tokens it adds the place (0, 0)."""
    encoding: Any = SimpleNamespace(ids=[5, 6, 7], offsets=[(0, 3), (0, 0), (3, 4)])
    assert _bytes_by_offset("caf\xe9 ", encoding, 6).tolist() == [3, 0, 3]


def test_a_special_token_spelled_in_a_text_does_not_end_the_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(byte_level(), tmp_path))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_vocab_size_is_one_more_than_the_largest_id(tmp_path: Path) -> None:
    made = word_level()
    made.model = models.WordLevel({"[UNK]": 0, "</s>": 7}, unk_token="[UNK]")
    assert load_tokenizer(saved(made, tmp_path)).vocab_size == 8


def test_decoding_ignores_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(byte_level(), tmp_path))
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.append(ids, [10**6, -1])) == "the cat"


def test_a_tokenizer_may_cut_texts_short_in_its_file_but_not_here(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(2)
    assert len(load_tokenizer(saved(made, tmp_path)).encode("the cat sat on the mat")) > 2


def test_the_saved_files_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(saved(byte_level(), tmp_path))
    again = tmp_path / "again"
    again.mkdir()
    for name, content in tokenizer.files().items():
        (again / name).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(again)
    assert theirs("the café sat")["input_ids"] == tokenizer.encode("the café sat").tolist()
    assert theirs.eos_token_id == tokenizer.eos_token_id
    assert load_tokenizer(str(again)).fingerprint == tokenizer.fingerprint


def test_without_an_end_of_document_token_the_error_names_the_cure(tmp_path: Path) -> None:
    path = saved(byte_level(eos=None), tmp_path)
    with pytest.raises(DataError, match=r"no token that ends a document.*tokenizer_config\.json"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "!"}}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([tokenizer.eos_token_id]) == "!"


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json is no tokenizer\.json"):
        load_tokenizer(str(path))


def test_a_missing_file_is_named_with_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'bytes', or the path"):
        load_tokenizer(str(tmp_path))
