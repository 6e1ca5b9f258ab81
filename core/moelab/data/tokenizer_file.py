"""The one door to the `tokenizers` library: a stranger's tokenizer.json, looked through before it is handed over.

Its ids decide how large tables become, so they may not run far beyond what the file itself lists. The library is
written in Rust, and what it doesn't foresee ends as a panic, which is no Exception in Python. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer as FastTokenizer

from moelab.errors import DataError, UserError
from moelab.printable import printable
from moelab.records import Record
from moelab.safe_files import Reading, an_object, parse_json, read_bytes

T = TypeVar("T")
READING = Reading(
    DataError, "transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(folder)` writes a tokenizer.json"
)
# Ids that no token has: padding of the embedding to a round number, reserved ones. Published ones have 1,000 at most.
FREE_IDS = 1 << 16


def load_fast(path: Path, reading: Reading = READING) -> FastTokenizer:
    """The library's tokenizer of a file. Raises `reading.error` naming it."""
    content = read_bytes(path, reading)
    check_definition(definition_of(content, path, reading), path, reading)
    return fast_tokenizer(content, path, reading)


def definition_of(content: bytes, where: object, reading: Reading = READING) -> dict[str, Any]:
    """The object that a tokenizer.json, or a tokenizer_config.json, holds."""
    return an_object(parse_json(content, where, reading), where, reading)


def check_definition(definition: Mapping[str, Any], where: object, reading: Reading = READING) -> None:
    """Refuse ids that can't be, before a table is made for them: 0 .. twice as many as tokens, and some to spare."""
    record = Record(str(where), definition, reading)
    vocabulary = record.record("model").values.get("vocab", {})
    if not isinstance(vocabulary, dict | list):
        record.record("model").refuse("vocab", "an object, token -> id, or a list of tokens")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = record.listed("added_tokens", dict, optional=True)
    ids += [Record(f"{where}: added_tokens.{place}", token, reading).integer("id") for place, token in enumerate(added)]
    most = 2 * (len(vocabulary) + len(added)) + FREE_IDS
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < most:
            reading.refuse(
                where, f"has the token id {printable(repr(token_id), 60)}, where ids of {len(ids)} tokens end by {most}"
            )


def fast_tokenizer(content: bytes, where: object, reading: Reading = READING) -> FastTokenizer:
    """The library's tokenizer of a checked definition."""
    return guarded(lambda: FastTokenizer.from_str(content.decode()), where, reading)


def guarded(call: Callable[[], T], where: object, reading: Reading = READING) -> T:
    """What `call` returns; whatever the library raises or panics with, as one error."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        reading.refuse(where, f"is no tokenizer.json of the `tokenizers` library ({error})", error)
