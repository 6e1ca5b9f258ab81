"""What filters would make of a text, without filtering it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moelab import Component, Document, FilterContext, Rejected, Tagger, component, hookimpl
from moelab.errors import ConfigError
from moelab.hookspecs import TEXT_FILTERS


@dataclass
class PassesOptions:
    filters: list[dict[str, Any]] = field(default_factory=list)  # text filters, each {name: ..., its options}


def passes(options: PassesOptions, context: FilterContext) -> Tagger:
    """yes where a document would pass all of these text filters, else no; it is kept as it is either way.

    As a part of the domain it makes of one corpus both sides of a comparison: the filtered text and the relaxed one,
    with the same split, held-out text and fingerprint, between which a mixer's `domains` choose.

    Source: none.
    Use: to learn what a filter is worth before text is let go; for mixtures by quality.
    Cost: each filter runs; one that changes texts changes what those behind it see, and not what is kept.
    """
    if options.filters and context.registry is None:
        raise ConfigError("filters: can't be built without a registry; run `moelab data`")
    built = [
        context.registry.build(TEXT_FILTERS, context.registry.resolve(TEXT_FILTERS, one, where), context, where)
        for number, one in enumerate(options.filters)
        if context.registry is not None and (where := f"tags.passes.filters.{number}")
    ]

    def apply(document: Document) -> str:
        seen: Document | Rejected = document
        for one in built:
            if not isinstance(seen, Rejected):
                seen = one(seen)
        return "no" if isinstance(seen, Rejected) else "yes"

    return apply


@hookimpl
def moelab_taggers() -> list[Component[FilterContext, Tagger]]:
    return [component("passes", PassesOptions, passes)]
