"""The page of a trace: all of a stranger's text is data, and the tables say what the colours mean."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.token_classes import CLASSES, class_of_ids
from moelab.routes.trace import LayerTrace, Trace
from moelab_tools.routes.meaning import meaning
from moelab_tools.routes.view import pieces, render
from traced_models import traced

HOSTILE = "</script><img src=x onerror=alert(1)>\u202etxt\x1b[31m"


def _trace(text: bytes = b"") -> Trace:
    trace = traced({"name": "softmax_topk"})[1]
    ids = trace.token_id.copy()
    ids.reshape(-1)[: len(text)] = np.frombuffer(text, np.uint8)
    return replace(trace, token_id=ids, facts=trace.facts | {"vocab_size": 257, "source": HOSTILE})


def _page(trace: Trace) -> str:
    tokenizer = ByteTokenizer()
    found = meaning(trace, class_of_ids(tokenizer, 257), permutations=5)
    return render(trace, tokenizer, found, found, 100, HOSTILE, HOSTILE)


def test_a_strangers_text_and_names_are_data():
    page = _page(replace(_trace(HOSTILE.encode()), documents=[(HOSTILE, HOSTILE)] * 3))
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page
    assert not set(re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page))
    assert "default-src 'none'" in page
    assert "innerHTML" not in page
    assert re.search(r"https?://", page) is None


def test_the_pages_data_are_the_traces_routes():
    trace = _trace()
    page = _page(trace)
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])  # type: ignore[index]
    assert len(data["windows"]) == 7
    for shown, layer in zip(data["layers"], trace.layers, strict=True):
        assert shown["experts"] == layer.expert[: 7 * 16 * 2].tolist()
        assert shown["weights"] == pytest.approx(layer.weight[: 7 * 16 * 2].tolist(), abs=5e-4)
        assert shown["loads"] == np.bincount(layer.expert, minlength=8).tolist()
        assert np.array(shown["by_domain"]).sum(1).tolist() == shown["loads"]
        assert np.array(shown["by_class"]).sum(1).tolist() == shown["loads"]


def test_a_character_of_several_tokens_stands_at_its_first():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode("a\u00e9\u4e2d\U0001f600b\n").tolist()
    assert pieces(ids, tokenizer) == ["a", "\u00e9", "", "\u4e2d", "", "", "\U0001f600", "", "", "", "b", "\n"]
    assert pieces(ids[2:4], tokenizer) == ["\ufffd", "\ufffd"], "cut within characters"


def test_kinds_of_tokens_are_told_by_their_spelling(tmp_path: Path):
    kinds = class_of_ids(ByteTokenizer(), 259)
    told = {text: CLASSES[kinds[ord(text)]] for text in "a7,_ \n\t"}
    assert told == {
        "a": "letters", "7": "digits", ",": "punctuation", "_": "punctuation", " ": "white space",
        "\n": "line break", "\t": "white space",
    }  # fmt: skip
    assert [CLASSES[kinds[i]] for i in (0xC3, 256, 258)] == ["part of a character", "special", "special"]


def _layer(expert: np.ndarray) -> LayerTrace:
    return LayerTrace(0, 4, "Planted", 1, expert.astype(np.uint8), np.ones(len(expert), np.float32))


def _word(follows: str, seed: int) -> str:
    """Domains with different alphabets: an expert of the token knows the domain, and nothing beyond."""
    chance = np.random.default_rng(seed)
    documents, length = 16, 64
    domain = np.arange(documents) % 2
    token = chance.integers(0, 6, (documents, length)) + 3 * domain[:, None]
    expert = {
        "token": token % 4, "domain": np.repeat(domain, length).reshape(documents, length),
        "nothing": chance.integers(0, 4, (documents, length)),
    }[follows]  # fmt: skip
    number = np.repeat(np.arange(documents), length).reshape(documents, length).astype(np.uint8)
    trace = Trace(
        token.astype(np.uint8), token.astype(np.uint8), np.zeros_like(number), number, number,
        [(f"n{i}", f"d{d}") for i, d in enumerate(domain)], [_layer(expert.ravel())], {},
    )  # fmt: skip
    (found,) = meaning(trace, np.zeros(16, np.uint8))
    assert found.of_token == pytest.approx(1.0) if follows == "token" else found.of_token < 1
    return found.word()


def test_the_word_tells_the_byte_from_the_domain():
    """Each is wrong in one case of twenty by design: of 12 more than 4 are wrong with probability 2e-4."""
    assert _word("domain", 0) == "domain, beyond the token"
    words = [_word("token", seed) for seed in range(12)]
    assert words.count("domain, by its tokens alone") >= 8
    words = [_word("nothing", seed) for seed in range(12)]
    assert words.count("no more than chance") >= 7  # two looks each
