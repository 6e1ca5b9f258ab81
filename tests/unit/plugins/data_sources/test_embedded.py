"""The default corpus: real text in five domains, quickly, without running any of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moelab import ConfigError, Corpus, DataContext, Registry
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hookspecs import DATA_SOURCES
from moelab_plugins.data_sources import _installed_text
from moelab_plugins.data_sources.embedded import read_domain

CONTEXT = DataContext(ByteTokenizer(), validation_fraction=0.05, seed=0)


def build(context: DataContext = CONTEXT, **options: Any) -> Corpus:
    node = {"name": "embedded", **options}
    return Registry(entry_points=False).build(DATA_SOURCES, node, context, "data.source")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build()


def test_all_five_domains_have_text_to_train_on_and_to_hold_out(corpus: Corpus) -> None:
    assert corpus.domains == ["code_cpp", "code_py", "docs_en", "legal", "maths"]
    for domain in corpus.domains:
        entry = corpus.manifest[domain]
        assert entry["validation_documents"] >= 2
        assert entry["bytes"] > (50_000 if domain == "legal" else 1_000_000)
        assert entry["sources"]


def test_it_is_the_same_each_time_and_another_for_another_seed(corpus: Corpus) -> None:
    again = build()
    assert again.fingerprint == corpus.fingerprint
    assert np.array_equal(again.train.tokens, corpus.train.tokens)
    other = build(DataContext(ByteTokenizer(), seed=1), domains=["code_py"], max_bytes_per_domain=200_000)
    this = build(domains=["code_py"], max_bytes_per_domain=200_000)
    chosen = [{*found.train.document_names, *found.validation.document_names} for found in (other, this)]
    assert len(chosen[0] & chosen[1]) < 0.8 * len(chosen[0])  # other files, not only another split


@pytest.mark.parametrize("domain", ["code_cpp", "code_py", "maths"])
def test_files_are_read_until_there_is_enough(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it quick: at most one file more than is kept is read."""
    sizes: list[int] = []
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        data = real(path)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Path, "read_bytes", read)
    documents = read_domain(domain, 0, 500_000)
    assert len(sizes) <= 2 * len(documents) + 10  # some are left out: too long, too short, not UTF-8
    assert sum(sizes) < 2_000_000


def test_domains_read_as_what_they_are_called() -> None:
    signs = {
        "code_py": "def ",
        "code_cpp": "#include",
        "maths": "assert ",
        "legal": "WARRANT",
        "docs_en": "the ",
    }
    for domain, sign in signs.items():
        documents = read_domain(domain, 0, 300_000)
        assert sum(sign in document.text.replace("warrant", "WARRANT") for document in documents) > 0.6 * len(documents)
        assert len({document.name for document in documents}) == len(documents)
        assert not any(Path(document.name).is_absolute() for document in documents)


def test_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are parsed at most: packages that were not there before are not there after."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("networkx", "pydoc_data")]:
        monkeypatch.delitem(sys.modules, name)
    build(max_bytes_per_domain=100_000)
    assert not [name for name in sys.modules if name.split(".")[0] in ("networkx", "pydoc_data")]


def test_a_missing_package_drops_its_domain_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = _installed_text._package
    monkeypatch.setattr(_installed_text, "_package", lambda name: None if name == "sympy" else real(name))
    corpus = build(max_bytes_per_domain=50_000)
    assert "maths" not in corpus.domains
    assert "'maths' is left out" in caplog.text


def test_the_standard_library_alone_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_installed_text, "_package", lambda name: None)
    monkeypatch.setattr(_installed_text, "LICENSED", ())
    assert {"code_py", "docs_en"} <= set(build(max_bytes_per_domain=50_000).domains)


def test_the_size_is_kept_to() -> None:
    corpus = build(domains=["code_py"], max_bytes_per_domain=120_000)
    assert 60_000 < corpus.manifest["code_py"]["bytes"] <= 120_000


def test_docstrings_are_found_without_running_the_source() -> None:
    source = (
        f'"""{"Module text. " * 10}"""\nraise SystemExit\n'
        f'def f():\n    """{"Function text. " * 10}"""\n    return "{"no docstring " * 20}"\n'
        f'add_docstr(torch.abs, "{"C text. " * 20}")\n'
    )
    found = "\n".join(_installed_text._docstrings(source))
    assert all(part in found for part in ("Module text.", "Function text.", "C text."))
    assert "no docstring" not in found
    assert list(_installed_text._docstrings("def broken(")) == []


def test_an_unknown_domain_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.source.*no domain 'code_pi', did you mean 'code_py'\?.*Known: "):
        build(domains=["code_pi"])
