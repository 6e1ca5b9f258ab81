"""The one place where a stranger's chat template runs: jinja in a sandbox, with what transformers offers templates.

Names, filters and blocks are those of transformers 5.23 (chat_template_utils.py, `_cached_compile_jinja_template`):
`raise_exception`, `strftime_now`, `tojson` without HTML's escapes, `{% generation %}`, break and continue. What a
template can't do here: reach Python's internals, change what it is given, make a text longer than LONGEST, take more
than some seconds (chat_bounds.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from moelab.data.chat_bounds import LONGEST, Bounds, bounded_filters, check_call, fits, printable_value
from moelab.errors import DataError
from moelab.printable import printable

# Of a text: what pads it by a number, or puts others in its place; of a number: its bytes.
STRETCHING = frozenset({"ljust", "rjust", "center", "zfill", "expandtabs", "translate", "to_bytes"})


def compile_template(source: str, where: str, marks: tuple[str, str]) -> Callable[[Mapping[str, Any]], str]:
    """What renders `source`: {name: plain value} -> text, with `marks` around what `{% generation %}` holds.

    `where`: as messages call the template. Raises DataError, also when it renders: for no jinja, for what the template
    itself refuses (`raise_exception`), and for what a sandbox refuses.
    """
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, finalize=printable_value,
        extensions=[_Generation, Bounds, "jinja2.ext.loopcontrols"],
    )  # fmt: skip
    bounds: Any = environment.extensions[Bounds.identifier]
    environment.filters.update(bounded_filters(), tojson=_tojson)
    for name in ("center", "indent", "wordwrap", "urlize", "xmlattr", "random", "pprint"):
        environment.filters.pop(name, None)
    environment.globals = {
        "range": environment.globals["range"], "dict": _dictionary, "namespace": _Namespace, "marks": marks,
        "raise_exception": _raise_exception, "strftime_now": lambda form: datetime.now().strftime(form),
    }  # fmt: skip

    def compiled() -> Template:
        code = environment.compile(bounds.watched(environment.parse(source)))
        return Template.from_code(environment, code, environment.globals)

    template = _told(where, compiled)

    def render(values: Mapping[str, Any]) -> str:
        bounds.begin()
        return _joined(template.generate(**values))

    return lambda values: _told(where, lambda: render(values))


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's own, which also looks at the operators and calls by which a short template makes a long text."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def concat(self, pieces: Iterable[str]) -> str:
        """What blocks and macros write."""
        return _joined(iter(pieces))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_call(__obj, args)
        return ImmutableSandboxedEnvironment.call(__self, __context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        long = str | bytes | list | tuple
        if operator == "+" and isinstance(left, long) and isinstance(right, long):
            fits(len(left) + len(right), "a text")
        text = next((value for value in (left, right) if isinstance(value, long)), None)
        if operator == "*" and text is not None:
            count = right if text is left else left
            if isinstance(count, int) and count * len(text) > LONGEST:
                raise SecurityError(f"a text times {count}")
        if operator == "%" and isinstance(left, str):
            raise SecurityError("the operator % on a text; write ~")
        if operator == "**":
            raise SecurityError("the operator **")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        stretches = isinstance(obj, str | int) and attr in STRETCHING
        return not stretches and super().is_safe_attribute(obj, attr, value)


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes, put between the environment's marks."""

    tags = {"generation"}  # noqa: RUF012 (as jinja reads it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        marks: Any = self.environment.globals["marks"]
        opening, closing = marks
        return f"{opening}{caller()}{closing}"


class _Namespace(Namespace):
    """Refuses names that begin with an underscore, which lead into Python."""

    def __init__(*args: Any, **values: Any) -> None:  # a name may be `self`
        given = dict(*args[1:], **values)
        for name in given:
            _check_name(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with the name {name!r}")


def _dictionary(*args: Any, **values: Any) -> dict[Any, Any]:
    return dict(*args, **values)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    if isinstance(indent, int) and indent > 16:
        raise SecurityError(f"tojson with an indent of {indent}")
    return json.dumps(printable_value(value), ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _joined(pieces: Iterator[str]) -> str:
    found, length = [], 0
    for piece in pieces:
        length += len(piece)
        if length > LONGEST:
            raise SecurityError(f"a text of more than {LONGEST} characters")
        found.append(piece)
    return "".join(found)


def _told(where: str, call: Callable[[], Any]) -> Any:
    """What `call` gives; whatever goes wrong in a template is the template's, and told as its."""
    try:
        return call()
    except DataError:
        raise
    except SecurityError as error:
        raise DataError(f"{where}: does what a template may not: {printable(error, 300)}; use another") from error
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        place = f", line {line}" if line else ""
        raise DataError(
            f"{where}{place}: {printable(error, 600)}; change the messages as it says, or use another template"
        ) from error
    except (Exception, RecursionError) as error:  # TypeError, ZeroDivisionError, ...: as in any program
        kind = type(error).__name__
        raise DataError(f"{where}: can't render this ({kind}: {printable(error, 300)}); use another") from error
