"""The default corpus: five kinds of real text that are installed anyway, so a run needs no download."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field

from moelab import Component, Corpus, DataContext, Document, build_corpus, component, hookimpl
from moelab_plugins.data_sources._installed_text import READERS

logger = logging.getLogger("moelab")


@dataclass
class EmbeddedOptions:
    domains: list[str] = field(default_factory=lambda: list(READERS))
    max_bytes_per_domain: int = 1_500_000  # read before duplicates go; which files is decided by data.seed

    def __post_init__(self) -> None:
        for domain in self.domains:
            if domain not in READERS:
                close = difflib.get_close_matches(domain, READERS, n=1)
                hint = f", did you mean '{close[0]}'?" if close else "."
                raise ValueError(f"domains: no domain '{domain}'{hint} Known: {', '.join(READERS)}")
        if self.max_bytes_per_domain < 1:
            raise ValueError(f"max_bytes_per_domain must be at least 1, not {self.max_bytes_per_domain}")


def embedded(options: EmbeddedOptions, context: DataContext) -> Corpus:
    """Python, C++, English documentation, maths and licences, read from what is installed."""
    documents: list[Document] = []
    sources: dict[str, dict[str, str]] = {}
    for domain in dict.fromkeys(options.domains):
        found = read_domain(domain, context.seed, options.max_bytes_per_domain)
        if not found:
            logger.warning("data.source: domain '%s' is left out: its packages are not installed", domain)
        documents += found
        sources[domain] = READERS[domain].versions()
    return build_corpus(documents, context, sources=sources)


def read_domain(domain: str, seed: int, max_bytes: int) -> list[Document]:
    """Documents in seeded order, until one more would exceed `max_bytes`; never none if there are any."""
    documents: list[Document] = []
    size = 0
    for name, text in READERS[domain].texts(seed):
        size += len(text.encode())
        if size > max_bytes and len(documents) >= 2:  # two: one to train on, one to hold out
            break
        documents.append(Document(text, domain, name))
    return documents


@hookimpl
def moelab_data_sources() -> list[Component[DataContext, Corpus]]:
    return [component("embedded", EmbeddedOptions, embedded)]
