"""Errors that are the user's to mend (exit code 2) and runs that failed (exit code 1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from moelab.printable import LONGEST_MESSAGE, printable


class UserError(ValueError):
    """The input is wrong. The message says what, where, and what to do; the command line exits with 2.

    Whatever it quotes of a stranger's is spelled out and cut here, for the terminal and for who calls from Python.
    """

    left_to_main = False  # whether the main process of several tells it, so that it is heard once

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, LONGEST_MESSAGE, keep="\n"))


class ConfigError(UserError):
    """The configuration is wrong; the message names the key, its file or override, and what would be right."""


class CheckpointError(UserError):
    """A checkpoint can't be read or written; the message names the file and the cure."""


class DataError(UserError):
    """A corpus or tokenizer can't be used; the message names the file and the cure."""


class RunFailure(RuntimeError):
    """A run stopped through no fault of its input, say on a NaN loss; the command line exits with 1."""

    left_to_main = False  # as above

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message, LONGEST_MESSAGE, keep="\n"))


def near(name: object, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" when something close is known, else a full stop."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else "."
