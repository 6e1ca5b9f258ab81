"""The one way to the terminal: whatever a command prints, names of strangers act on nothing there.

`guarded()` stands around a whole command, so that print, click and logging go through it; rich writes past it what it
composed of styles and text, and `make_console()` has the texts spelled out before.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook, RenderResult
from rich.segment import Segment

from moelab.printable import printable

KEPT = "\n\t"  # of the controls, what lays a text out


class Guard:
    """A text stream that spells out what would act, and what its encoding has no character for."""

    encoding, errors = "utf-8", "backslashreplace"

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream  # rich's own name: it writes there, control sequences of its own included

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tries, to learn what kind of stream this is
            raise TypeError(f"a text stream takes no {type(text).__name__}")
        stream = self.rich_proxied_file
        encoding = stream.encoding or "utf-8"
        stream.write(printable(text, keep=KEPT).encode(encoding, self.errors).decode(encoding))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def guarded() -> Iterator[None]:
    """sys.stdout and sys.stderr go through a Guard."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (Guard(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def wrapped(text: str, stream: TextIO) -> str:
    """`text` for `stream`: on a terminal broken between words, what goes on indented; elsewhere as it is.

    A log's line stays one line, which is looked for as one.
    """
    if not stream.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(_broken(line, width) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    """Words longer than the terminal is wide stay whole: they are paths."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(line, width, subsequent_indent=f"{indent}  ", break_long_words=False, break_on_hyphens=False)


def make_console(width: int | None = None, *, stderr: bool = False) -> Console:
    """A rich console for texts of anybody; `width` where there is no terminal."""
    # Held on to: while a bar is drawn, rich puts a stream of its own over the two and looks through one layer only, so
    # that the bar's controls would end in the guard, which spells them out.
    stream: Any = sys.stderr if stderr else sys.stdout
    file: Any = stream if isinstance(stream, Guard) else None
    console = Console(file=file, stderr=stderr)
    if width is not None and not console.is_terminal:
        console = Console(file=file, stderr=stderr, width=width)
    console.push_render_hook(_SpeltOut())
    return console


def fold(text: str, width: int, first: str = "", rest: str = "") -> str:
    """A text in lines of at most `width` columns, words whole; `first` and `rest` stand before the lines."""
    lines = textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(lines or [first])


class _SpeltOut(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Spelt(renderable) for renderable in renderables]


class _Spelt:
    """What is drawn, its texts printable; rich's own controls stay."""

    def __init__(self, drawn: RenderableType) -> None:
        self.drawn = drawn

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.drawn, options):
            yield segment if segment.control else Segment(printable(segment.text, keep=KEPT), segment.style)
