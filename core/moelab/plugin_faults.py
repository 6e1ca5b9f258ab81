"""Tells a plugin's mistake in one line: which part, of whom, what it did, and the file and line of its own code.

    model.moe.router: router 'bad' of my_lab, layer 0: returned a tuple; it must return ... (my_lab/routers.py:31)

What a plugin returns is checked where it is first called, and told by `PluginPart.fault`. What it raises is found
afterwards, in the traceback (`guilty`), so that nothing is wrapped while tokens flow. An object that calls plugins says
which ones: `plugin_parts() -> [(PluginPart, the built part)]`; a frame of such a part below a frame of its holder is
the part's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Protocol, runtime_checkable

from moelab.errors import ConfigError, UserError
from moelab.printable import printable
from moelab.shortage import shortage

LONGEST = 500  # characters of somebody else's error that are quoted
# What a stranger's code may raise that is told of; its sys.exit() would end the command as if all were done.
ANYTHING = (Exception, SystemExit)
OURS = ("moelab", "moelab_plugins", "moelab_upcycling", "moelab_tools")


@dataclass(frozen=True)
class PluginPart:
    """A part that a config chose, as messages call it."""

    kind: str  # router, balance loss, ...
    name: str  # in the config
    owner: str  # the module to blame
    where: str = ""  # its place in the config
    layer_id: int | None = None
    ours: bool = False  # built in: what it raises is moelab's own mistake, and keeps its traceback

    @classmethod
    def of(cls, kind: str, built: object, layer_id: int | None = None) -> PluginPart:
        """Of a part that no config chose: by its class, or its own name where it is a function."""
        named = built if hasattr(built, "__code__") else type(built)
        owner = str(getattr(named, "__module__", "?"))
        ours = owner.partition(".")[0] in OURS
        return cls(kind, getattr(named, "__name__", "?"), owner, layer_id=layer_id, ours=ours)

    @property
    def title(self) -> str:
        layer = "" if self.layer_id is None else f", layer {self.layer_id}"
        return f"{self.kind} '{self.name}' of {self.owner}{layer}"

    def at(self, layer_id: int | None) -> PluginPart:
        return replace(self, layer_id=layer_id)

    def fault(self, what: str, built: object = None) -> ConfigError:
        """What the part did, with the place of `built`'s code: "returned a tuple; it must return ..."."""
        return ConfigError(f"{self._key}{self.title}: {what}{place_of(built)}")

    def raised(self, error: BaseException) -> ConfigError:
        """What the part raised, with the file and line of the part's own code."""
        said = quoted(error) if isinstance(error, UserError) else f"raised {type(error).__name__}: {quoted(error)}"
        return ConfigError(f"{self._key}{self.title}: {said}{place_in(error, self.owner)}")

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """For a call of a part that no token waits for: raises ConfigError for what a stranger's part raised.

        A UserError is told as it is; what ran out (`shortage`) and what moelab's own parts raise stay what they are.
        """
        try:
            yield
        except UserError:
            raise
        except ANYTHING as error:
            if self.ours or shortage(error):
                raise
            raise self.raised(error) from error

    @property
    def _key(self) -> str:
        return f"{self.where}: " if self.where else ""


@runtime_checkable
class HoldsPlugins(Protocol):
    """Something that calls plugins: a MoE layer, a named balance loss."""

    def plugin_parts(self) -> Iterable[tuple[PluginPart, object]]: ...


def guilty(error: BaseException) -> PluginPart | None:
    """The part in whose code `error` was raised, by the frames of its traceback; None: in nobody's."""
    held: list[tuple[PluginPart, object]] = []
    found = None
    for frame, _ in _frames(error):
        own = _first_argument(frame)
        for part, built in held:
            if own is built or frame.f_code is getattr(built, "__code__", None):
                found = part
        if not isinstance(own, type) and callable(getattr(type(own), "plugin_parts", None)):
            held += own.plugin_parts()
    return found


def strangers_fault(error: BaseException) -> ConfigError | None:
    """`error` as a plugin's, if it was raised in the code of a plugin that is not built in, and memory did not end."""
    part = guilty(error)
    return None if part is None or part.ours or shortage(error) else part.raised(error)


def broken_package(error: BaseException) -> ConfigError | None:
    """`error` as an installed package's, if it was raised while that was imported: nothing of ours can be the cause."""
    bodies = [frame for frame, _ in _frames(error) if frame.f_code.co_name == "<module>"]
    module = str(bodies[-1].f_globals.get("__name__", "")) if bodies else "__main__"
    top = module.partition(".")[0]
    if top in (*OURS, "__main__") or shortage(error):
        return None
    return ConfigError(
        f"the package {top} is installed and can't be imported: {type(error).__name__}: {quoted(error)}"
        f"{place_in(error, top)}; mend or uninstall it, or do without what needs it"
    )


@contextmanager
def plugins_told() -> Iterator[None]:
    """What a stranger's plugin raises inside the block becomes one line, a ConfigError; all else passes."""
    try:
        yield
    except UserError:
        raise
    except ANYTHING as error:
        told = strangers_fault(error)
        if told is None:
            raise
        raise told from error


def place_of(built: object) -> str:
    """ " (my_lab/routers.py:31)": where the code of a part begins; "" where it has none."""
    kind = built if isinstance(built, type) else type(built)
    for holder, name in ((built, "__code__"), (kind, "forward"), (kind, "__call__"), (kind, "__init__")):
        found = getattr(holder, name, None)
        code = found if isinstance(found, CodeType) else getattr(found, "__code__", None)
        module = str(getattr(found, "__module__", None) or getattr(built, "__module__", ""))
        if code is not None and not _is_torch(module):
            return place_of_code(code, module)
    return ""


def place_of_code(code: CodeType, module: str) -> str:
    """ " (my_lab/routers.py:31)": where a function of a module begins."""
    return f" ({_short(code.co_filename, module)}:{code.co_firstlineno})"


def place_in(error: BaseException, owner: str) -> str:
    """ " (my_lab/routers.py:31)": the deepest frame of the owner's package that `error` came through; "" for none."""
    top = owner.partition(".")[0]
    places = [
        f" ({_short(frame.f_code.co_filename, module)}:{line})"
        for frame, line in _frames(error)
        if (module := str(frame.f_globals.get("__name__", ""))).partition(".")[0] == top
    ]
    return places[-1] if places else ""


def quoted(error: BaseException) -> str:
    """The error's own words in one line, or its name where it has none."""
    return printable(" ".join(str(error).split()) or type(error).__name__, LONGEST)


def article(value: object) -> str:
    """ "a tuple", "an int", "None": what something is, for "returned ..."."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _first_argument(frame: FrameType) -> Any:
    """`self`, under whatever name; None for a function without arguments."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _short(filename: str, module: str) -> str:
    """The file as its module is named, my_lab/routers.py: no path of this machine."""
    path = Path(filename)
    return "/".join(path.parts[-(module.count(".") + 1 + (path.stem == "__init__")) :])
