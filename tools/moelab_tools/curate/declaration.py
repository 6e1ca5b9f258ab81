"""What `moelab data` is told: sources, stages, and where the result lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from moelab.config.model import Part
from moelab.data.token_cache import DOMAIN
from moelab.errors import ConfigError, near


@dataclass
class DeduplicateConfig:
    """Which copies go. Of a group the first in the order of reading stays."""

    exact: bool = True  # the same text but for case and white space
    near: float | None = 0.75  # estimated Jaccard similarity of 5-word shingles from which one is a copy; null: none is

    def check(self) -> None:
        """Raises ConfigError for a share that is none."""
        if self.near is not None and not 0 < self.near <= 1:
            raise ConfigError(f"deduplicate.near: {self.near} is no share above 0 and up to 1; null keeps near copies")


@dataclass
class TokensConfig:
    """The tokenised corpus that training maps into memory, with its split."""

    tokenizer: str | None = None  # as `data.tokenizer`: `bytes`, a tokenizer.json or its folder; null: text alone
    validation_fraction: float = 0.1  # of the documents: those whose text hashes below it are held out
    split_seed: int = 0  # of the split

    def check(self) -> None:
        """Raises ConfigError for a share that is none."""
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(f"tokens.validation_fraction: {self.validation_fraction} is no share between 0 and 1")


@dataclass
class SelectConfig:
    """Which of what is left is taken, when copies have gone: the documents whose tags say most, and cover most."""

    documents: int | None = None  # so many, at most; null: all
    by: list[str] | None = None  # tags that count, `domain` too; null: all of `tags`

    def check(self, tags: Sequence[str]) -> None:
        """Raises ConfigError for a number that is none, or a tag that nobody gives. tags: the taggers' names."""
        if self.documents is None:
            return
        if self.documents < 1:
            raise ConfigError(f"select.documents: {self.documents}; at least 1, or null for all")
        known = [*tags, DOMAIN]
        for name in self.names(tags):
            if name not in known:
                raise ConfigError(f"select.by: no tag '{name}'{near(name, known)} `tags` gives: {', '.join(known)}")
        if not self.names(tags):
            raise ConfigError("select.documents: there is nothing to select by; give `tags`, as [{name: language}]")

    def names(self, tags: Sequence[str]) -> list[str]:
        """The tags that count."""
        return list(tags) if self.by is None else list(self.by)


@dataclass
class CurateConfig:
    """All of a `moelab data` run."""

    sources: list[Part] = field(default_factory=list)  # data sources, as `data.source`
    # Text filters in their order, each {name: ..., its options}. `domains: [...]` gives one these domains alone,
    # `but: [...]` all others.
    stages: list[Part] = field(default_factory=list)
    # Taggers of what is kept, each {name: ..., its options}: a key of that name in every row, a column of the cache.
    tags: list[Part] = field(default_factory=list)
    deduplicate: DeduplicateConfig = field(default_factory=DeduplicateConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    output: str = MISSING  # folder that is made
    workers: int = 2  # processes; the bytes do not depend on it
    piece_mb: float = 4.0  # of text that a process takes at a time, and that a kill loses
    seed: int = 0  # of the choice of text, where a source chooses
    keep_rejected: bool = False  # write what is left out too, with the reason
    report_only: bool = False  # count, and write no text
    plugins: list[str] = field(default_factory=list)  # modules beside the config file, or on the path
    entry_points: bool = True  # False: ignore installed packages' plugins

    def check(self) -> None:
        """Raises ConfigError naming the key."""
        if not self.sources:
            raise ConfigError("sources: nothing to read; give `sources: [{name: text, paths: [...]}]`")
        if self.workers < 1:
            raise ConfigError(f"workers: {self.workers}; at least 1")
        if not self.piece_mb > 0:
            raise ConfigError(f"piece_mb: {self.piece_mb}; above 0")
        self.deduplicate.check()
        self.select.check([str(tag.get("name")) for tag in self.tags])
        self.tokens.check()


@dataclass(frozen=True)
class Stage:
    """A text filter and the domains that it is for."""

    part: dict[str, Any]  # {name: ..., options}
    domains: tuple[str, ...] | None  # None: all
    but: tuple[str, ...]

    def serves(self, domain: str) -> bool:
        """Whether documents of this domain pass through it."""
        return domain not in self.but and (self.domains is None or domain in self.domains)


def stages(config: CurateConfig) -> list[Stage]:
    """The stages, with their domains apart. Raises ConfigError for what is no list of names."""
    found = []
    for number, given in enumerate(config.stages):
        options = dict(given)
        limits: dict[str, tuple[str, ...] | None] = {}
        for key in ("domains", "but"):
            names = options.pop(key, None)
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise ConfigError(f"stages.{number}.{key}: {names!r} is no list of domains, as [code, maths]")
            limits[key] = None if names is None else tuple(names)
        found.append(Stage(options, limits["domains"], limits["but"] or ()))
    return found
