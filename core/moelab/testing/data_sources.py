"""What every data source must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moelab.components import Component
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.data.corpus import Corpus, DataContext
from moelab.data.identity import token_identities
from moelab.data.promises import corpus_fault
from moelab.data.tokenizer import Tokenizer
from moelab.paths import Places
from moelab.testing.report import make_options, promised, run_checks


@dataclass
class DataSourceCase:
    """One data source under test, with options that name some text."""

    component: Component[DataContext, Corpus]
    options: Any = None
    base: Path = Path()  # relative paths count from here, as from a config file's folder
    tokenizer: Tokenizer = field(default_factory=ByteTokenizer)

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self, split_seed: int = 0) -> Corpus:
        """A fresh corpus, half of whose documents are held out."""
        context = DataContext(self.tokenizer, 0.5, 0, Places(search=(self.base,)), split_seed)
        corpus = self.component.build(self.options, context)
        promised(corpus_fault(corpus, self.tokenizer.vocab_size), self.component.build)
        return corpus


def returns_a_corpus(case: DataSourceCase) -> None:
    """Streams of token ids that the tokenizer knows, cut into documents of known domains."""
    corpus = case.build()
    assert len(corpus.train), "the training text is empty"
    assert len(corpus.validation), "the held-out text is empty"


def gives_the_same_again(case: DataSourceCase) -> None:
    """A run that is resumed reads what it read before."""
    first, second = case.build(), case.build()
    assert first.fingerprint == second.fingerprint, "another fingerprint at the second reading"
    for name in ("train", "validation"):
        tokens = [getattr(corpus, name).tokens for corpus in (first, second)]
        assert np.array_equal(*tokens), f"other {name} tokens at the second reading"


def holds_no_training_document_out(case: DataSourceCase) -> None:
    """A document that is trained on says nothing when it is held out."""
    corpus = case.build()
    eos = case.tokenizer.eos_token_id
    train, held_out = (
        token_identities(stream.tokens, stream.document_starts, eos) for stream in (corpus.train, corpus.validation)
    )
    copies = np.flatnonzero(np.isin(held_out, train))
    assert not len(copies), (
        f"{len(copies)} held-out documents are trained on too, such as "
        f"'{corpus.validation.document_names[copies[0]]}'; moelab.build_corpus drops them"
    )


DATA_SOURCE_CHECKS: tuple[Callable[[DataSourceCase], None], ...] = (
    returns_a_corpus,
    gives_the_same_again,
    holds_no_training_document_out,
)


def check_data_source(component: Component[DataContext, Corpus], options: Any = None, *, base: Path = Path()) -> None:
    """Run every check of DATA_SOURCE_CHECKS; raises ConformanceError naming those that fail."""
    run_checks("data source", component, DataSourceCase(component, options, base), DATA_SOURCE_CHECKS)
