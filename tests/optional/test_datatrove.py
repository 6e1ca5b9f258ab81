"""datatrove's filters as stages: what datatrove itself says of each document, and bad names told."""

from __future__ import annotations

from collections import Counter
from typing import Any
from urllib.error import URLError

import pytest

from moelab import ConfigError, Document, FilterContext, Registry, Rejected, TextFilter
from moelab.hookspecs import TEXT_FILTERS
from moelab_plugins.data_sources.embedded import read_domain

filters = pytest.importorskip("datatrove.pipeline.filters", reason="needs datatrove: pip install 'moelab[curate]'")
data = pytest.importorskip("datatrove.data")
pytest.importorskip("spacy", reason="datatrove's words are spaCy's")

NAMES = ("GopherRepetitionFilter", "GopherQualityFilter", "C4QualityFilter", "FineWebQualityFilter")


def stage(name: str, **options: Any) -> TextFilter:
    part = {"name": "datatrove", "filter": name, "options": options}
    return Registry(entry_points=False).build(TEXT_FILTERS, part, FilterContext(), "stages.0")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return [document for domain in ("docs_en", "code_py", "legal") for document in read_domain(domain, 0, 60_000)]


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_as_datatrove_does(name: str, documents: list[Document]) -> None:
    theirs, ours = getattr(filters, name)(), stage(name)
    seen: Counter[str] = Counter()
    for document in documents:
        own = data.Document(text=document.text, id="x")
        answer = theirs.filter(own)
        kept, reason = answer if isinstance(answer, tuple) else (answer, None)
        found = ours(document)
        if kept:
            assert isinstance(found, Document) and found.text == own.text
            assert (found.domain, found.name) == (document.domain, document.name)
        else:
            assert found == Rejected(reason)
        seen["kept" if kept else "left out"] += 1
    assert seen["left out"] and seen.total() == len(documents) > 10


def test_arguments_are_datatroves_and_a_formatter_changes_texts(documents: list[Document]) -> None:
    short = Document("A short text of a few words.", "web", "x")
    assert isinstance(stage("GopherQualityFilter")(short), Rejected)
    assert stage("GopherQualityFilter", min_doc_words=3, min_stop_words=1)(short) == short
    assert stage("FTFYFormatter")(Document("schÃ¶n", "web", "x")) == Document("schön", "web", "x")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("GopherQualityFiltre", {}, "has no 'GopherQualityFiltre', did you mean 'GopherQualityFilter'?"),
        ("GopherQualityFilter", {"min_doc_word": 3}, "has no such argument, did you mean 'min_doc_words'?"),
        ("GopherQualityFilter", {"exclusion_writer": 1}, "has no such argument"),
        ("SamplerFilter", {}, "draws lots"),
        ("LambdaFilter", {}, "takes a function"),
    ],
)
def test_a_wrong_name_is_told(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        stage(name, **options)


def test_a_filter_that_can_not_fetch_its_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr("datatrove.pipeline.filters.UnigramLogProbFilter.__init__", offline)
    with pytest.raises(ConfigError, match=r"UnigramLogProbFilter can't have the files that it fetches .*no network"):
        stage("UnigramLogProbFilter")
