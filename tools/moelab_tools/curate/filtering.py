"""What one process does with one piece: documents through the stages, and what is kept, with its account, to disk."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moelab.atomic import write_file
from moelab.data.corpus import Document
from moelab.data.filtering import FilterContext, Rejected, TextFilter
from moelab.data.minhash import signature
from moelab.data.tagging import RESERVED, Tagger, tag_fault
from moelab.errors import ConfigError, DataError
from moelab.hookspecs import TAGGERS, TEXT_FILTERS
from moelab.paths import Places
from moelab.plugin_faults import PluginPart, article
from moelab.registry import Registry
from moelab.safe_files import Reading, read_object
from moelab_tools.curate.account import Account
from moelab_tools.curate.declaration import Stage

READING = Reading(DataError, "delete the folder, or give --force")
ZIPPED = 6  # level of gzip


@dataclass(frozen=True)
class Work:
    """What a process must know to build the filters as the others do."""

    stages: tuple[Stage, ...]
    plugins: tuple[str, ...]
    entry_points: bool
    places: Places  # of plugins
    data_places: Places
    settings: str  # digest of all that decides what becomes of a document
    folder: Path  # of the pieces
    write_text: bool
    keep_rejected: bool
    near: bool  # signatures are wanted
    tags: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Built:
    """A stage, ready."""

    name: str  # as the account calls it
    stage: Stage
    apply: TextFilter
    part: PluginPart


@dataclass(frozen=True)
class BuiltTagger:
    """A tagger, ready."""

    name: str  # the key of its answer
    apply: Tagger
    part: PluginPart


@dataclass(frozen=True)
class Parts:
    """All that a document passes."""

    stages: Sequence[Built]
    taggers: Sequence[BuiltTagger]


def build_parts(work: Work) -> Parts:
    """Raises ConfigError for whatever is wrong in a stage or a tagger."""
    registry = Registry(work.plugins, work.entry_points, work.places, points=[TEXT_FILTERS, TAGGERS])
    return Parts(_build_stages(work, registry), _build_taggers(work, registry))


def _build_taggers(work: Work, registry: Registry) -> list[BuiltTagger]:
    context, found = FilterContext(work.data_places, registry), dict[str, BuiltTagger]()
    for number, tagger in enumerate(work.tags):
        where, name = f"tags.{number}", str(tagger["name"])
        if name in RESERVED or name in found or not name.isidentifier():
            raise ConfigError(f"{where}: '{name}' can't be the key of a tag: it is another's, or no word")
        apply = registry.build(TAGGERS, tagger, context, where)
        found[name] = BuiltTagger(name, apply, registry.part(TAGGERS, tagger, where))
    return list(found.values())


def _build_stages(work: Work, registry: Registry) -> list[Built]:
    context, found = FilterContext(work.data_places, registry), []
    for number, stage in enumerate(work.stages):
        where = f"stages.{number}"
        apply = registry.build(TEXT_FILTERS, stage.part, context, where)
        part = registry.part(TEXT_FILTERS, stage.part, where)
        found.append(Built(f"{number + 1}. {stage.part['name']}", stage, apply, part))
    return found


def row_of(document: Document) -> dict[str, Any]:
    """As it is written down."""
    row = {"text": document.text, "domain": document.domain, "name": document.name}
    return row if document.messages is None else row | {"messages": document.messages}


def document_of(row: Mapping[str, Any]) -> Document:
    """What `row_of` wrote."""
    messages = row.get("messages")
    return Document(row["text"], row["domain"], row["name"], None if messages is None else tuple(messages))


def digest_of(documents: Iterable[Document]) -> str:
    """Of the texts, domains and names, in their order."""
    digest = hashlib.sha256()
    for document in documents:
        said = () if document.messages is None else (json.dumps(document.messages, sort_keys=True),)
        for text in (document.domain, document.name, document.text, *said):
            encoded = text.encode("utf-8", "replace")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def is_done(work: Work, number: int, digest: str) -> bool:
    """Whether an earlier start made this piece, of the same documents, under the same settings."""
    path = work.folder / f"{number:06d}.json"
    if not path.is_file():
        return False
    found = read_object(path, READING)
    return (found.get("input"), found.get("settings")) == (digest, work.settings)


def make_piece(work: Work, parts: Parts, number: int, documents: Sequence[Document], digest: str) -> None:
    """Writes NUMBER.jsonl.gz, .identities (uint64), .signatures (uint32) and, when these are whole, NUMBER.json."""
    account, kept = Account(), []
    left_out: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    kinds: dict[tuple[str, ...], int] = {}
    tagged: list[int] = []
    for document in documents:
        account.documents[document.domain] += 1
        account.characters[document.domain] += len(document.text)
        answer = _through(parts.stages, document, account, left_out, ask_all=not work.write_text)
        if answer is not None:
            account.kept[answer.domain] += 1
            account.kept_characters[answer.domain] += len(answer.text)
            kept.append(answer)
            tags = {tagger.name: _tag(tagger, answer) for tagger in parts.taggers}
            account.tag(answer.domain, tags, len(answer.text))
            tagged.append(kinds.setdefault(tuple(tags.values()), len(kinds)))
            rows.append(row_of(answer) | tags)
    _write_lines(work.folder / f"{number:06d}.jsonl.gz", rows)
    if work.keep_rejected:
        _write_lines(work.folder / f"{number:06d}.rejected.jsonl.gz", left_out)
    identities = np.array([one.identity for one in kept], np.uint64)
    write_file(work.folder / f"{number:06d}.identities", identities.tobytes())
    if work.near:
        signatures = b"".join(signature(one.text).tobytes() for one in kept)
        write_file(work.folder / f"{number:06d}.signatures", signatures)
    told = {
        "input": digest,
        "settings": work.settings,
        "domains": [one.domain for one in kept],
        "tags": {"names": [tagger.name for tagger in parts.taggers], "kinds": list(kinds), "of": tagged},
        "account": account.to_json(),
    }
    write_file(work.folder / f"{number:06d}.json", json.dumps(told))


def _through(
    built: Sequence[Built], document: Document, account: Account, left_out: list[dict[str, Any]], *, ask_all: bool
) -> Document | None:
    """What is left of it; None for nothing. `ask_all`: stages behind one that drops it are asked too, and counted."""

    def leave_out(stage: str, why: Rejected) -> None:
        domain, name, text = document.domain, document.name, document.text
        account.reject(stage, why.reason, domain, name, why.measured, text)
        left_out.append(row_of(document) | {"stage": stage, "reason": why.reason, "measured": why.measured})

    if not document.text.strip():
        leave_out("0. reading", Rejected("empty"))
        return None
    dropped_by: list[str] = []
    for one in built:
        if not one.stage.serves(document.domain):
            continue
        answer = _ask(one, document)
        account.asked[one.name, document.domain] += ask_all
        if isinstance(answer, Rejected):
            if not dropped_by:
                leave_out(one.name, answer)
            dropped_by.append(one.name)
            if not ask_all:
                return None
            continue
        if document.messages is not None:
            continue  # what is said in a conversation stays as it was said
        if answer.text != document.text and not dropped_by:
            account.changed[one.name, document.domain] += 1
        document = answer
    if dropped_by:
        account.dropped_by[document.domain, tuple(dropped_by)] += 1
    return None if dropped_by else document


def _ask(one: Built, document: Document) -> Document | Rejected:
    with one.part.blamed():
        answer = one.apply(document)
    if not isinstance(answer, Document | Rejected):
        raise one.part.fault(f"returned {article(answer)}; it must return a moelab.Document or Rejected", one.apply)
    return answer


def _tag(tagger: BuiltTagger, document: Document) -> str:
    with tagger.part.blamed():
        answer = tagger.apply(document)
    if (fault := tag_fault(answer)) is not None:
        raise tagger.part.fault(fault, tagger.apply)
    return answer


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
    write_file(path, gzip.compress(content, ZIPPED, mtime=0))
