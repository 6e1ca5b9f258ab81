"""Tokenizers from files: whole-text byte counts, the end of a document, and what is wrong with bad ones."""

from __future__ import annotations

import json
import re
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
    for (many_ids, many_counts), one in zip(tokenizer.encode_many(TEXTS), TEXTS, strict=True):
        expected = tokenizer.encode_with_bytes(one)
        assert (many_ids.tolist(), many_counts.tolist()) == (expected[0].tolist(), expected[1].tolist())
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
    assert _bytes_by_offset("caf\xe9 ", encoding).tolist() == [3, 0, 3]


def test_a_special_token_spelled_in_a_text_does_not_end_the_document(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(byte_level(), tmp_path))
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_a_unigram_vocabulary_finds_no_control_token_in_a_text(tmp_path: Path) -> None:
    """It has </s> among its pieces with score 0, the best there is."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581a", -2.0), ("b", -3.0), *((c, -9.0) for c in "</s>\u2581")]
    made: Any = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<unk>", "</s>"])
    made.encode_special_tokens = True
    text = "a</s>b é</s>"
    assert 1 in made.encode(text).ids  # what the library alone makes of it
    tokenizer = load_tokenizer(saved(made, tmp_path))
    ids, counts = tokenizer.encode_with_bytes(text)
    assert tokenizer.eos_token_id == 1
    assert 1 not in ids
    assert 0 in ids  # nobody has a token for the accent
    assert tokenizer.encode(text).tolist() == ids.tolist()
    assert counts.sum() == len(text.encode())


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


def sampling(definition: dict[str, Any]) -> None:
    definition["model"]["dropout"] = 0.5


def cutting(definition: dict[str, Any]) -> None:
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                             "pad_type_id": 0, "pad_token": "!"}  # fmt: skip


@pytest.mark.parametrize(("change", "named"), [(sampling, "model.dropout 0.5"), (cutting, "truncation.*padding")])
def test_a_text_has_the_same_ids_each_time_and_all_of_them(
    change: Any, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    definition = json.loads(byte_level().to_str())
    expected = byte_level().encode(TRAINING[0]).ids
    change(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(str(tmp_path))
    (message,) = caplog.messages
    assert re.search(named, message)
    carried = Tokenizer.from_buffer(tokenizer.files()["tokenizer.json"])  # what a checkpoint's readers get
    for _ in range(5):
        assert tokenizer.encode(TRAINING[0]).tolist() == carried.encode(TRAINING[0]).ids == expected
    again = tmp_path / "again"
    again.mkdir()
    (again / "tokenizer.json").write_bytes(tokenizer.files()["tokenizer.json"])
    assert load_tokenizer(str(again)).fingerprint == tokenizer.fingerprint
    assert len(caplog.messages) == 1


def test_a_file_without_chance_in_it_is_carried_byte_for_byte(tmp_path: Path) -> None:
    path = saved(byte_level(), tmp_path)
    assert load_tokenizer(path).files()["tokenizer.json"] == Path(path).read_bytes()


def test_special_tokens_are_known_by_their_spelling(tmp_path: Path) -> None:
    made = byte_level()
    made.add_special_tokens(["<|im_start|>"])
    made.add_tokens(["ordinary"])
    assert set(load_tokenizer(saved(made, tmp_path)).special_tokens) == {"<|endoftext|>", "<|im_start|>"}


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
    with pytest.raises(DataError, match=r"tokenizer\.json: .*writes a tokenizer\.json"):
        load_tokenizer(str(path))


def test_a_missing_file_is_named_with_what_may_be_given(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'bytes', or the path"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("token_id", [2**31, 2**17, -1, 10**30, True, "1", 0.5])
def test_an_id_far_beyond_the_listed_tokens_is_refused_before_a_table_is_made(token_id: object, tmp_path: Path) -> None:
    definition = {
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": token_id}, "unk_token": "a"},
        "added_tokens": [],
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    with pytest.raises(DataError, match="has the token id"):
        load_tokenizer(str(path))
