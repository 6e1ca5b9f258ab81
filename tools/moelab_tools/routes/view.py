"""A page of text coloured by expert: one HTML file that needs no network."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moelab.atomic import check_output, write_output
from moelab.checkpoint import CHECKPOINTS
from moelab.data.token_classes import CLASSES, class_of_ids
from moelab.data.tokenizer import Tokenizer, load_tokenizer
from moelab.errors import ConfigError, DataError
from moelab.printable import printable
from moelab.routes.files import HEAD, ROUTES, read_trace
from moelab.routes.trace import Trace
from moelab_tools.checkpoints import tokenizer_of
from moelab_tools.routes.meaning import LayerMeaning, meaning, to_json
from moelab_tools.waiting import Waiting

BYTES = "bytes"
LONGEST_PIECE, LONGEST_NAME = 80, 200  # characters of one token, of a document's name
JOINED = 4  # tokens that together may spell one character


def write_view(folder: Path, page: Path, *, tokenizer: str | None, tokens: int, against: Path | None) -> list[str]:
    """Write the page -> lines for the terminal. Raises UserError for traces and tokenizers that do not fit."""
    check_output(page, "--out", file=True, read=(folder / HEAD, folder / ROUTES))
    text, lines = view_of(folder, tokenizer=tokenizer, tokens=tokens, against=against)
    write_output(page, text, "--out")
    return lines


def view_of(folder: Path, *, tokenizer: str | None, tokens: int, against: Path | None) -> tuple[str, list[str]]:
    """The page, and lines for the terminal. Raises UserError for traces and tokenizers that do not fit."""
    trace = read_trace(folder)
    known = tokenizer_for(trace, tokenizer, folder)
    other = None if against is None else read_trace(against)
    if other is not None and (other.facts["tokenizer"] != trace.facts["tokenizer"]):
        raise DataError(f"--against {against}: was recorded with another tokenizer than {folder}")
    kinds = class_of_ids(known, trace.facts["vocab_size"])
    layers = len(trace.layers) + (0 if other is None else len(other.layers))
    with Waiting("reading what experts mean, layers", layers) as waiting:
        found = meaning(trace, kinds, seen=waiting.step)
        others = [] if other is None else meaning(other, kinds, seen=waiting.step)
    page = render(trace, known, found, others, tokens, str(folder), None if against is None else str(against))
    return page, _lines(found, _by_layer(others))


def tokenizer_for(trace: Trace, spec: str | None, folder: Path) -> Tokenizer:
    """The tokenizer whose fingerprint the trace has: bytes unless another is named."""
    if spec is not None and os.path.isdir(os.path.join(spec, CHECKPOINTS)):
        found = tokenizer_of(Path(spec), None)
    else:
        found = load_tokenizer(spec or BYTES)
    if found.fingerprint != trace.facts["tokenizer"]:
        said = f"'{spec}' is another" if spec else "that is not 'bytes'"
        raise ConfigError(
            f"{folder}: was recorded with a tokenizer of its own ({said}); name it with --tokenizer: the run, or the "
            "tokenizer.json beside its checkpoint"
        )
    return found


def render(
    trace: Trace,
    tokenizer: Tokenizer,
    found: Sequence[LayerMeaning],
    others: Sequence[LayerMeaning],
    tokens: int,
    name: str,
    other_name: str | None,
) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    windows = min(trace.windows, max(1, -(-tokens // trace.token_id.shape[1])))
    return environment.get_template("view.html.jinja").render(
        name=printable(name, LONGEST_NAME),
        source=printable(trace.facts["source"], LONGEST_NAME),
        other_name=None if other_name is None else printable(other_name, LONGEST_NAME),
        split=printable(trace.facts["data"].get("split", ""), LONGEST_NAME),
        tokens=trace.tokens,
        documents=len(trace.documents),
        shown=windows * trace.token_id.shape[1],
        found=found,
        others=_by_layer(others),
        data=_data(trace, tokenizer, found, windows),
    )


def _data(trace: Trace, tokenizer: Tokenizer, found: Sequence[LayerMeaning], windows: int) -> dict[str, Any]:
    """What the page's script reads. Every text in it is data: shown by textContent, never as markup."""
    return {
        "domains": [printable(domain, LONGEST_NAME) for domain in trace.domains],
        "classes": list(CLASSES),
        "windows": [_window(trace, tokenizer, window) for window in range(windows)],
        "layers": [
            to_json(one)
            | {"favourites": [[_piece(tokenizer.decode([token])) for token in mine] for mine in one.favourites]}
            | _routes(trace, one.layer_id, windows)
            for one in found
        ],
    }


def _window(trace: Trace, tokenizer: Tokenizer, window: int) -> dict[str, Any]:
    ids, documents = trace.token_id[window].astype(np.int64).tolist(), trace.document_id[window]
    changes = [0, *(np.flatnonzero(np.diff(documents.astype(np.int64))) + 1).tolist()]
    return {
        "ids": ids,
        "pieces": pieces(ids, tokenizer),
        # where a document begins: [token, its name, its domain]
        "documents": [
            [at, *(printable(text, LONGEST_NAME) for text in trace.documents[documents[at]])] for at in changes
        ],
    }


def _named(trace: Trace, document: int) -> list[str]:
    return [printable(text, LONGEST_NAME) for text in trace.documents[document]]


def _routes(trace: Trace, layer_id: int, windows: int) -> dict[str, Any]:
    """Experts and weights of the tokens shown, flat, with how many each token has; rounded to what is shown."""
    layer = trace.layer(layer_id)
    assert layer is not None
    end = windows * trace.token_id.shape[1]
    kept = slice(0, int(layer.starts[end]))
    return {
        "counts": np.diff(layer.starts[: end + 1]).tolist(),
        "experts": layer.expert[kept].tolist(),
        "weights": [round(float(weight), 3) for weight in layer.weight[kept]],
    }


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text: a character of several tokens stands at the first, "" at the others."""
    found: list[str] = []
    place = 0
    while place < len(ids):
        text, used = tokenizer.decode([ids[place]]), 1
        if "\ufffd" in text:
            for count in range(2, JOINED + 1):
                joined = tokenizer.decode(list(ids[place : place + count]))
                if "\ufffd" not in joined:
                    text, used = joined, min(count, len(ids) - place)
                    break
        found += [_piece(text), *[""] * (used - 1)]
        place += used
    return found


def _piece(text: str) -> str:
    return printable(text, LONGEST_PIECE, keep="\n\t")


def _by_layer(found: Sequence[LayerMeaning]) -> dict[int, LayerMeaning]:
    return {one.layer_id: one for one in found}


def _lines(found: Sequence[LayerMeaning], others: Mapping[int, LayerMeaning]) -> list[str]:
    lines = ["what a token's expert tells, in % of what there is to know (in brackets: by chance)"]
    lines.append(f"{'layer':>5}  {'token':>8}  {'domain':>18}  {'domain given token':>20}")
    for one in found:
        told = [
            "-" if info is None else f"{100 * info.share:.2f} ({100 * info.chance_share:.2f})"
            for info in (one.domain, one.domain_given_token)
        ]
        lines.append(f"{one.layer_id:>5}  {100 * one.of_token:>8.1f}  {told[0]:>18}  {told[1]:>20}")
        lines.append(f"{'':>7}{one.word(others.get(one.layer_id))}")
    return lines
