"""How long a stranger's chat template may take, and how much it may write: jinja's sandbox bounds neither.

Time is the processor's, looked at in each round of a loop and each call of a macro. Sizes are looked at before a text
is made, where an operator, a method or a filter makes a long one of short ones.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any

from jinja2 import nodes, pass_eval_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.visitor import NodeTransformer

LONGEST = 1 << 25  # characters of a conversation, and of any text that a template makes in between; items of a list
SECONDS = 5.0  # of the processor, for one conversation; a template takes thousandths of one
WIDE = 99_999  # the most that a text is padded to, as jinja's own `range` has it
_WIDTH = re.compile(
    r"[%{].*?(\d{6}|\*)|\{[^{}]*\{", re.DOTALL
)  # in a pattern to be filled in: padding, or a number of it


def fits(length: int, what: str) -> None:
    """Raise SecurityError where `length` characters or items are too many."""
    if length > LONGEST:
        raise SecurityError(f"{what} of more than {LONGEST} characters")


def printable_value(value: Any) -> Any:
    """`value`; raises SecurityError where lists within lists would print as too much."""
    left, waiting = LONGEST >> 5, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            waiting.extend(one.values())
        elif isinstance(one, list | tuple):
            waiting.extend(one)
        left -= 1
        if left < len(waiting):
            raise SecurityError("a list of too many lists")
    return value


def check_replaced(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        fits(len(text) + text.count(old) * len(new), "a text")


def check_joined(between: Any, pieces: Iterable[Any]) -> None:
    each = [len(piece) if isinstance(piece, str) else len(str(printable_value(piece))) for piece in pieces]
    fits(sum(each) + len(str(between)) * len(each), "a text")


def check_pattern(text: Any) -> None:
    if _WIDTH.search(str(text)):
        raise SecurityError("a pattern that pads by a large number, or by one that it is given")


def _replaces(text: str, arguments: tuple[Any, ...]) -> None:
    check_replaced(text, *arguments[:2])


def _joins(text: str, arguments: tuple[Any, ...]) -> None:
    if isinstance(arguments[0], list | tuple):
        check_joined(text, arguments[0])


def _fills(text: str, arguments: tuple[Any, ...]) -> None:
    check_pattern(text)
    printable_value(arguments)


METHODS = {"replace": (2, _replaces), "join": (1, _joins), "format": (0, _fills), "format_map": (1, _fills)}


def check_call(called: Any, arguments: tuple[Any, ...]) -> None:
    """Raise SecurityError for a method of a text that would make a long one of it."""
    method = getattr(called, "__wrapped__", called)  # jinja puts its own around `format`
    text = getattr(method, "__self__", None)
    needed, check = METHODS.get(getattr(method, "__name__", ""), (0, None))
    if isinstance(text, str) and check is not None and len(arguments) >= needed:
        check(text, arguments)


def bounded_filters() -> dict[str, Callable[..., Any]]:
    """jinja's filters that make much of little, within bounds."""
    own: dict[str, Any] = {
        name: FILTERS[name] for name in ("join", "replace", "batch", "slice", "sum", "format", "string")
    }

    @pass_eval_context
    def join(context: EvalContext, value: Iterable[Any], d: str = "", attribute: Any = None) -> Any:
        pieces = list(value if attribute is None else map(make_attrgetter(context.environment, attribute), value))
        check_joined(d, pieces)
        return own["join"](context, pieces, d)

    @pass_eval_context
    def replace(context: EvalContext, s: str, old: str, new: str, count: int | None = None) -> Any:
        check_replaced(s, old, new)
        return own["replace"](context, s, old, new, count)

    def _padded(name: str) -> Callable[..., Any]:
        def apply(value: Any, number: int, fill_with: Any = None) -> Any:
            if not isinstance(number, int) or number > WIDE:
                raise SecurityError(f"{name} by {number}")
            return own[name](value, number, fill_with)

        return apply

    def added(value: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if not isinstance(start, int | float) or attribute is not None:
            raise SecurityError("sum of what is no number")
        return sum(value, start)

    def filled(value: str, *args: Any, **kwargs: Any) -> Any:
        check_pattern(value)
        printable_value((args, kwargs))
        return own["format"](value, *args, **kwargs)

    def string(value: Any) -> Any:
        return own["string"](printable_value(value))

    return {
        "join": join, "replace": replace, "batch": _padded("batch"), "slice": _padded("slice"), "sum": added,
        "format": filled, "string": string,
    }  # fmt: skip


class Bounds(Extension):
    """What loops, macros and the operator ~ of a template ask on their way; `begin` starts the clock anew."""

    until = 0.0

    def begin(self) -> None:
        """A conversation is about to be written."""
        self.until = time.thread_time() + SECONDS

    def goes_on(self) -> bool:
        """True. Raises SecurityError where the time is over."""
        if time.thread_time() > self.until:
            raise SecurityError(f"more than {SECONDS:.0f} seconds of the processor")
        return True

    def together(self, *values: Any) -> str:
        """`a ~ b`."""
        texts = [str(printable_value(value)) for value in values]
        fits(sum(map(len, texts)), "a text")
        return "".join(texts)

    def watched(self, tree: nodes.Template) -> nodes.Template:
        """`tree`, changed in place, so that it asks."""
        changed: nodes.Template = _Watching(self).visit(tree)
        return changed


class _Watching(NodeTransformer):
    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def _asks(self, line: int) -> nodes.Expr:
        found: nodes.Expr = self._bounds.call_method("goes_on", lineno=line)
        return found

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._asks(node.lineno), lineno=node.lineno))
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        found: nodes.Node = self._body(node)
        if node.test is not None:
            node.test = nodes.And(self._asks(node.lineno), node.test, lineno=node.lineno)
        return found

    visit_Macro = visit_CallBlock = _body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._bounds.call_method("together", node.nodes, lineno=node.lineno)
