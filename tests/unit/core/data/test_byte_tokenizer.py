"""The byte tokenizer, and that its files make transformers' tokenizers give the same ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moelab.data.byte_tokenizer import ByteTokenizer, byte_alphabet
from moelab.data.json_tokenizer import JsonTokenizer
from moelab.data.tokenizer import load_tokenizer

TEXTS = [
    "",
    "def f(x):\n\treturn x  # ok\r\n",
    "naïve café, 漢字, \U0001f600\u200d, \x7f\x01\x00 \xa0\xad",
    " leading and  double spaces ",
    "<|endoftext|> inside a text <|endoftext|>",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in ByteTokenizer().files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes_of_utf8(text: str) -> None:
    ids, byte_counts = ByteTokenizer().encode_with_bytes(text)
    assert ids.dtype == np.int32
    assert ids.tolist() == list(text.encode())
    assert byte_counts.sum() == len(text.encode())
    assert ByteTokenizer().decode(ids) == text


def test_every_byte_has_its_own_printable_character() -> None:
    alphabet = byte_alphabet()
    assert len(set(alphabet)) == 256
    assert alphabet[ord("A")] == "A"
    assert alphabet[ord(" ")] == "Ġ"  # as GPT-2 spells it


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizers_and_transformers_give_the_same_ids_and_text(text: str, folder: Path) -> None:
    from transformers import AutoTokenizer

    ours = ByteTokenizer()
    ids = ours.encode(text).tolist()
    library = JsonTokenizer(ours.files()["tokenizer.json"], "tokenizer.json")
    theirs = AutoTokenizer.from_pretrained(folder)
    assert library.encode(text).tolist() == ids
    assert library.decode([*ids, 256]) == text + "<|endoftext|>" == ours.decode([*ids, 256])
    assert theirs(text, add_special_tokens=False)["input_ids"] == ids
    assert theirs.decode(ids) == text
    assert (theirs.eos_token_id, len(theirs)) == (256, 257) == (library.eos_token_id, library.vocab_size)


def test_transformers_fast_class_reads_the_file_alone(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    every = "".join(map(chr, range(1, 0x250)))
    assert fast(every)["input_ids"] == list(every.encode())


def test_a_saved_byte_tokenizer_is_recognised(folder: Path) -> None:
    again = load_tokenizer(str(folder))
    assert isinstance(again, ByteTokenizer)
    assert again.fingerprint == load_tokenizer("bytes").fingerprint


def test_decoding_never_raises() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xE6, 0xBC]) == "\ufffd"
    assert tokenizer.decode(np.array([-5, 65, 300, 256, 66])) == "A<|endoftext|>B"
    assert tokenizer.decode([]) == ""
    assert tokenizer.encode("\ud800").tolist() == [ord("?")]


def test_the_end_of_a_document_stands_for_no_bytes() -> None:
    assert ByteTokenizer().id_bytes().tolist() == [1] * 256 + [0]
