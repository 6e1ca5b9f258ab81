"""Qwen2's tokenizer from a rank file, on a small one; the real file is tested in tests/optional."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from click.testing import CliRunner

from moelab.data.tokenizer import load_tokenizer
from moelab.errors import DataError
from moelab_tools.qwen2_tokenizer import find_merges, main, read_ranks

BYTES = [bytes([byte]) for byte in reversed(range(256))]
ACCENTED = "é".encode()
RANKS = {token: rank for rank, token in enumerate([*BYTES, b"ab", b"ba", b"aba", b"12", ACCENTED, b" aba"])}


def write(path: Path, ranks: dict[bytes, int]) -> Path:
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    return path


def test_a_token_is_made_of_the_parts_that_were_made_before_it():
    """aba is ab + a and not a + ba, because ab came first."""
    assert find_merges(RANKS) == [
        (b"a", b"b"),
        (b"b", b"a"),
        (b"ab", b"a"),
        (b"1", b"2"),
        (ACCENTED[:1], ACCENTED[1:]),
        (b" ", b"aba"),
    ]


def test_it_splits_and_normalises_as_qwen2_does(tmp_path: Path):
    done = CliRunner().invoke(main, [str(write(tmp_path / "ranks", RANKS)), str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    tokenizer = load_tokenizer(str(tmp_path / "made"))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (len(RANKS) + 3, len(RANKS))
    assert tokenizer.encode("aba aba").tolist() == [RANKS[b"aba"], RANKS[b" aba"]]
    assert tokenizer.encode("12").tolist() == [RANKS[b"1"], RANKS[b"2"]]  # digits stand alone
    assert tokenizer.encode("e\u0301").tolist() == [RANKS[ACCENTED]]  # NFC
    text = " \n\tx  \r\n中文 🚀"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("IQ== 0\nI", "is no .tiktoken file"),
        ("IQ= 0\n", "is no .tiktoken file"),
        ("I!Q== 0\n", "is no .tiktoken file"),
        ("IQ== 0\n", "1 ranks"),
        ("", "0 ranks"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, words: str):
    (tmp_path / "ranks").write_text(content)
    with pytest.raises(DataError, match=words):
        read_ranks(tmp_path / "ranks")
    done = CliRunner().invoke(main, [str(tmp_path / "ranks"), str(tmp_path / "made")])
    assert done.exit_code == 2
    assert not (tmp_path / "made").exists()


def test_a_gap_in_the_ranks_and_a_token_without_parts_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"not 0 \.\. n-1"):
        read_ranks(write(tmp_path / "ranks", {t: r for t, r in RANKS.items() if t != b"aba"}))
    with pytest.raises(DataError, match="made of 3 earlier tokens"):
        find_merges({token: rank for rank, token in enumerate([*BYTES, b"xyz"])})


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere can't be read"):
        read_ranks(tmp_path / "nowhere")
