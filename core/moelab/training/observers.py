"""The observers of one run, told between steps. One that raises is told of once and dropped; the run goes on."""

from __future__ import annotations

import inspect
import logging
import numbers
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy

from moelab import hookspecs
from moelab.checkpoint import CONFIG, MODEL, STATE, TRAINING
from moelab.config.model import Part
from moelab.errors import near
from moelab.hookspecs import OBSERVERS
from moelab.manifest import MANIFEST
from moelab.plugin_faults import PluginPart, article, place_in, quoted
from moelab.registry import Registry

logger = logging.getLogger("moelab")
PREFIX = "on_"
HOOKS = [name for name in vars(hookspecs.RunHooks) if name.startswith(PREFIX)]


def _check_numbers(answer: object) -> None:
    """Raise TypeError for what is no {tag: number}, and not None."""
    if answer is None:
        return
    if not isinstance(answer, Mapping):
        raise TypeError(f"returned {article(answer)}; it must return {{tag: number}} or None")
    for tag, value in answer.items():
        if not isinstance(tag, str) or isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"returned {value!r} for {tag!r}; it must return {{tag: number}} or None")


def _check_files(answer: object) -> None:
    """Raise TypeError for what is no {name: content}, and not None; ValueError for a name that a checkpoint has."""
    if answer is None:
        return
    if not isinstance(answer, Mapping) or not all(isinstance(content, bytes) for content in answer.values()):
        raise TypeError(f"returned {article(answer)}; it must return {{file name: bytes}} or None")
    for name in answer:
        if name in (MODEL, TRAINING, STATE, CONFIG, MANIFEST) or Path(name).name != name:
            raise ValueError(f"returned a file {name!r}; it must be the name of one more file of a checkpoint")


ANSWERS = {"on_probe": _check_numbers, "on_checkpoint": _check_files}  # hooks whose answer is used


def _check_method(method: Any, name: str, part: PluginPart) -> None:
    """Raise ConfigError for a method that is no hook, or asks for what its hook is not told."""
    if name not in HOOKS:
        raise part.fault(f"has {name}, which is no hook{near(name, HOOKS)} There are: {', '.join(HOOKS)}", method)
    told = list(inspect.signature(getattr(hookspecs.RunHooks, name)).parameters)[1:]
    for argument, parameter in inspect.signature(method).parameters.items():
        wanted = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        if wanted and argument not in told:
            raise part.fault(
                f"{name} asks for '{argument}', which it is not told{near(argument, told)} It may ask for: "
                f"{', '.join(told)}", method,
            )  # fmt: skip


class Observers:
    """`observers.hook.on_log(step=..., ...)` tells each one in order, with the arguments that it names.

    `dropped`: those that raised, for summary.json. KeyboardInterrupt and SystemExit pass.
    """

    def __init__(self) -> None:
        self.dropped: list[dict[str, Any]] = []
        self.hook = SimpleNamespace(**{name: partial(self._tell, name) for name in HOOKS})  # -> what each answered
        self._manager = _Manager("moelab")
        self._manager.add_hookspecs(hookspecs.RunHooks)
        self._parts: dict[int, PluginPart] = {}

    def add(self, observer: object, part: PluginPart) -> None:
        """Raises ConfigError for one without hooks, a method that is no hook, or an argument that a hook hasn't."""
        if isinstance(observer, type):
            raise part.fault(f"built the class {observer.__name__}, not an object of it")
        named = [name for name in dir(observer) if name.startswith(PREFIX) and callable(getattr(observer, name))]
        if not named:
            raise part.fault(
                f"built {article(observer)} without a hook; it must have one of {', '.join(HOOKS)}", observer
            )
        for name in named:
            _check_method(getattr(observer, name), name, part)
        self._manager.register(observer, name=f"{part.name} of {part.owner} ({len(self._parts)})")
        self._parts[id(observer)] = part

    def listens(self, hook: str) -> bool:
        """Whether anybody wants to be told."""
        return bool(getattr(self._manager.hook, hook).get_hookimpls())

    def _tell(self, hook: str, **arguments: Any) -> list[Any]:
        answers = []
        for method in list(getattr(self._manager.hook, hook).get_hookimpls()):
            try:
                answer = method.function(*(arguments[name] for name in method.argnames))
                if hook in ANSWERS:
                    ANSWERS[hook](answer)
                answers.append(answer)
            except Exception as error:  # a stranger's: a full disk, a server that is gone, a mistake
                self._drop(method.plugin, hook, arguments.get("step"), error)
        return answers

    def _drop(self, observer: object, hook: str, step: int | None, error: Exception) -> None:
        self._manager.unregister(observer)
        part = self._parts[id(observer)]
        place = place_in(error, part.owner)
        said = f"{type(error).__name__}: {quoted(error)}"
        self.dropped.append(
            {
                "observer": part.name,
                "owner": part.owner,
                "hook": hook,
                "step": step,
                "error": said,
                "at": place.strip(" ()"),
            }
        )
        when = "" if step is None else f" at step {step}"
        logger.warning(
            "%s: raised %s in %s%s%s; it is dropped, and the run goes on without it",
            part.title,
            said,
            hook,
            when,
            place,
        )


class _Manager(pluggy.PluginManager):
    """Every method named `on_...` is a hook, without a marker; a misspelt one is an error."""

    def parse_hookimpl_opts(self, plugin: object, name: str) -> Any:
        return {} if name.startswith(PREFIX) else None


def gather_observers(nodes: Sequence[Part], registry: Registry, run_dir: Path, extra: Sequence[object]) -> Observers:
    """The config's observers in order, then `extra`. Raises ConfigError naming the one that is none."""
    found = [
        (registry.build(OBSERVERS, node, run_dir, where), registry.part(OBSERVERS, node, where))
        for node, where in ((node, f"observers.{index}") for index, node in enumerate(nodes))
    ]
    found += [(observer, PluginPart.of(OBSERVERS.kind, observer)) for observer in extra]
    observers = Observers()
    for observer, part in found:
        observers.add(observer, part)
    return observers


@contextmanager
def threads_told() -> Iterator[None]:
    """A thread of an observer that dies of an error is one line, not a traceback; who waits for it hears of it too."""
    before = threading.excepthook

    def tell(died: threading.ExceptHookArgs) -> None:
        if died.exc_value is not None:
            name = getattr(died.thread, "name", "?")
            logger.warning("a thread of an observer (%s) ended: %s", name, quoted(died.exc_value))

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before
