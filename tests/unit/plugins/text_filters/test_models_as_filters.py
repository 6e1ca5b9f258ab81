"""Models as filters: what a classifier learns and how sure it is, and bits per byte by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moelab
from moelab import ConfigError, Document, FilterContext, Places, Registry, Rejected, TextFilter, testing
from moelab.hookspecs import TEXT_FILTERS
from moelab_plugins.text_filters._ngram_classifier import buckets, train

REGISTRY = Registry(entry_points=False, points=[TEXT_FILTERS])


def stage(base: Path, name: str, **options: Any) -> TextFilter:
    context = FilterContext(Places(search=(base,)))
    return REGISTRY.build(TEXT_FILTERS, {"name": name, **options}, context, "stages.0")


def texts(seed: int, count: int, share: float) -> list[str]:
    """Words 0 .. 99; a share of a text's words comes from the lower half."""
    chance = np.random.default_rng(seed)
    low = chance.random((count, 60)) < share
    return [" ".join(f"w{n}" for n in row) for row in np.where(low, 0, 50) + chance.integers(0, 50, (count, 60))]


def test_buckets_are_the_distinct_ngrams_in_lower_case() -> None:
    assert len(buckets("The cat, the CAT", 1, 1 << 30)) == 3
    assert len(buckets("The cat, the CAT", 2, 1 << 30)) == 3 + 3  # the cat | cat , | , the
    assert np.array_equal(buckets("The cat", 2, 64), buckets("the  CAT\n", 2, 64))
    assert len(buckets("", 2, 64)) == 0 and len(buckets("one", 3, 64)) == 1


def test_it_tells_two_kinds_apart_and_its_probabilities_are_shares() -> None:
    wanted, other = texts(1, 1500, 0.56), texts(2, 500, 0.44)  # the best that can be done is about 0.82
    made = train(wanted, other, ngrams=1, size=1 << 12, passes=5)
    assert 300 < made.quality.documents < 500
    fresh = [(1, text) for text in texts(3, 1000, 0.56)] + [(0, text) for text in texts(4, 1000, 0.44)]
    given, label = np.array([made.probability(text) for _, text in fresh]), np.array([kind for kind, _ in fresh])
    assert ((given > 0.5) == label).mean() > 0.72
    place = (given * 5).astype(int)
    assert sum((place == n).sum() * abs(given[place == n].mean() - label[place == n].mean()) for n in set(place)) < 160
    again = train(wanted[::-1], other, ngrams=1, size=1 << 12, passes=5)
    assert np.array_equal(made.weights, again.weights)


def test_a_stage_keeps_what_is_like_the_wanted_examples(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, share in (("good", 0.9), ("bad", 0.1)):
        rows = [{"body": text} for text in texts(len(name), 60, share)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"wanted": ["good.jsonl"], "other": ["bad.jsonl"], "text_key": "body"}
    apply = stage(tmp_path, "classifier", **given)
    assert "60 wanted documents and 60 others" in caplog.text and "rightly" in caplog.text
    good, bad = (Document(texts(9, 1, share)[0], "d", "n") for share in (0.9, 0.1))
    assert apply(good) == good
    answer = apply(bad)
    assert isinstance(answer, Rejected) and answer.measured.endswith("at least 0.5")
    for changed, said in (({"wanted": []}, "both kinds"), ({"text_key": "text"}, "no string 'text'")):
        with pytest.raises(moelab.UserError, match=said):
            stage(tmp_path, "classifier", **given | changed)
    (tmp_path / "few.jsonl").write_text(json.dumps({"body": "one"}) + "\n")
    with pytest.raises(ConfigError, match="other: 1 different documents; at least 20"):
        stage(tmp_path, "classifier", **given | {"other": ["few.jsonl"]})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder.parent / "text.txt").write_text("abc" * 400 + "|" + "abcd" * 300)
    config = moelab.load_config(
        "train/tiny_moe", f"data.source={{name: text, paths: [{folder.parent}], separator: '|'}}", "train.steps=2",
        "train.sequence_length=32", "train.batch_size=2", "observers=[]", "evaluation.prompts=[]", f"run_dir={folder}",
    )  # fmt: skip
    moelab.train(config)
    return folder


def test_bits_per_byte_are_the_models_loss_over_bytes(run: Path, tmp_path: Path) -> None:
    model, text = moelab.load(run), "abcabcxyz é"
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        chances = model(ids).logits.double().log_softmax(-1)
    expected = -float(chances[0, :-1].gather(1, ids[0, 1:, None]).sum()) / np.log(2) / (ids.shape[1] - 1)
    document = Document(text, "d", "n")
    kept = stage(tmp_path, "perplexity", model=str(run), at_least=expected - 1e-3, at_most=expected + 1e-3)
    assert kept(document) == document and kept(Document("a", "d", "n")) == Document("a", "d", "n")
    hard = stage(tmp_path, "perplexity", model=str(run), at_most=expected - 1e-3)(document)
    easy = stage(tmp_path, "perplexity", model=str(run), at_least=expected + 1e-3)(document)
    assert isinstance(hard, Rejected) and hard.reason == "too hard for the model"
    assert isinstance(easy, Rejected) and easy.measured.startswith(f"{expected:.3f} bits per byte")
    testing.check_text_filter(REGISTRY.components(TEXT_FILTERS)["perplexity"], {"model": str(run), "at_most": 8.05})
    with pytest.raises(ConfigError, match="every text is kept"):
        stage(tmp_path, "perplexity", model=str(run))
