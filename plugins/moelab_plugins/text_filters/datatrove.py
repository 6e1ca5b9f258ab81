"""datatrove's filters and formatters as stages. `pip install 'moelab[curate]'`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from omegaconf import MISSING

from moelab import Component, ConfigError, Document, FilterContext, Rejected, TextFilter, component, hookimpl
from moelab.errors import near

ROOMS = {"Filter": "datatrove.pipeline.filters", "Formatter": "datatrove.pipeline.formatters"}  # by how names end
NOT_OURS = ("exclusion_writer", "batch_size")  # what is left out stands in moelab's own account
# Of more than one document, or of a function that no file can hold.
REFUSED = {"SamplerFilter": "draws lots", "LambdaFilter": "takes a function; write a text filter of your own"}


@dataclass
class DatatroveOptions:
    filter: str = MISSING  # GopherQualityFilter, FineWebQualityFilter, FTFYFormatter, ...: as datatrove calls it
    options: dict[str, Any] = field(
        default_factory=dict
    )  # its arguments, as datatrove calls them; others: its defaults


def datatrove(options: DatatroveOptions, context: FilterContext) -> TextFilter:
    """Any filter or formatter of datatrove, with its own defaults; `domains` and `but` say for whom.

    What it makes of a text is kept: C4's drops lines. Its reason is the account's.

    Source: datatrove 0.10.1. Its defaults are the papers': Gopher 2112.11446, C4 1910.10683, FineWeb 2406.17557. The
    order of FineWeb is in configs/data/web.yaml, as datatrove's examples/fineweb.py has it.
    Use: text of the web, held to what others did to it.
    Cost: made for English pages: of code, mathematics and other languages next to nothing is left.
    """
    made = _made(options)
    document_of = import_module("datatrove.data").Document
    if hasattr(made, "format") and not hasattr(made, "filter"):
        return lambda document: replace(document, text=made.format(document.text))

    def apply(document: Document) -> Document | Rejected:
        own = document_of(text=document.text, id=document.name, metadata={"domain": document.domain})
        answer = made.filter(own)
        kept, reason = answer if isinstance(answer, tuple) else (answer, None)
        if not kept:
            return Rejected(str(reason or options.filter))
        return document if own.text == document.text else replace(document, text=own.text)

    return apply


def _made(options: DatatroveOptions) -> Any:
    """Raises ConfigError for a name or an argument that is not there, and for packages that are not installed."""
    room = next((room for end, room in ROOMS.items() if options.filter.endswith(end)), ROOMS["Filter"])
    try:
        module = import_module(room)
    except ImportError as error:
        raise ConfigError(f"filter: needs datatrove ({error}): pip install 'moelab[curate]'") from error
    known = {
        name: kind for name, kind in vars(module).items() if isinstance(kind, type) and name.endswith(tuple(ROOMS))
    }
    if options.filter in REFUSED:
        raise ConfigError(f"filter: datatrove's {options.filter} {REFUSED[options.filter]}")
    if options.filter not in known:
        raise ConfigError(
            f"filter: {room} has no '{options.filter}'{near(options.filter, known)} It has: {', '.join(sorted(known))}"
        )
    arguments = [name for name in inspect.signature(known[options.filter]).parameters if name not in NOT_OURS]
    if unknown := [name for name in options.options if name not in arguments]:
        raise ConfigError(
            f"options.{unknown[0]}: {options.filter} has no such argument{near(unknown[0], arguments)} It takes: "
            f"{', '.join(arguments)}"
        )
    try:
        return known[options.filter](**options.options)
    except ImportError as error:
        raise ConfigError(f"filter: {options.filter} needs more than is installed ({error})") from error
    except OSError as error:  # a model or a list of words that it fetches
        raise ConfigError(
            f"filter: {options.filter} can't have the files that it fetches ({error}); begin once with a network, or "
            "take another filter"
        ) from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"options: {options.filter} refuses them: {error}") from error


@hookimpl
def moelab_text_filters() -> list[Component[FilterContext, TextFilter]]:
    return [component("datatrove", DatatroveOptions, datatrove)]
