"""Imports the modules that `plugins` names, and nothing else that lies beside the config or in the current folder.

No such folder gets onto sys.path: a `triton.py` or `colorama.py` in it would be taken for the library that torch or
rich look for. The environment comes first, so a folder can't shadow what is installed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from moelab.errors import ConfigError, near
from moelab.hookspecs import MARK
from moelab.plugin_faults import ANYTHING, place_in, quoted

logger = logging.getLogger("moelab")


def import_plugin(name: str, folders: Sequence[Path] = ()) -> ModuleType:
    """The module `name`, installed or in one of `folders`, first match; that others have one too is told.

    Raises ConfigError when there is none, when it can't be parsed, when it needs a module that is not installed, or
    when another file of that name is imported in this process already.
    """
    try:
        with _searching(name.partition(".")[0], folders):
            module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _not_found(name, error, folders) from error
    except SyntaxError as error:
        place = "" if error.filename is None else f" ({Path(error.filename).name}:{error.lineno})"
        raise ConfigError(f"plugins: cannot import '{name}': {error.msg}{place}") from error
    except ANYTHING as error:  # ValueError also: an empty name, or one that begins with a dot
        raise ConfigError(
            f"plugins: cannot import '{name}': {type(error).__name__}: {quoted(error)}{place_in(error, name)}"
        ) from error
    return module


def check_hooks(module: ModuleType, name: str, hooks: Sequence[str]) -> None:
    """Raise ConfigError for a module that is no plugin: one without a hook, or with a hook that lacks its marker."""
    marked = [key for key, value in vars(module).items() if hasattr(value, MARK)]
    forgotten = sorted(key for key in vars(module) if key in hooks and key not in marked)
    if forgotten:
        raise ConfigError(f"plugins: '{name}': {forgotten[0]} lacks its marker; write @moelab.hookimpl above it")
    if not marked:
        alike = [key for key in vars(module) if key.startswith("moelab_")]
        hint = f" ('{alike[0]}' is none{near(alike[0], hooks)})" if alike else ""
        raise ConfigError(f"plugins: '{name}' is no plugin: it implements no hook of moelab{hint}; see docs/plugins.md")


class _Beside:
    """Finds one top-level name in the given folders; asked after all other finders."""

    def __init__(self, top: str, folders: Sequence[Path]) -> None:
        self.top, self.folders = top, [str(folder.resolve()) for folder in folders]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(fullname, self.folders) if path is None and fullname == self.top else None


@contextmanager
def _searching(top: str, folders: Sequence[Path]) -> Iterator[None]:
    finder = _Beside(top, folders)
    _refuse_another(top, finder)
    installed = PathFinder.find_spec(top)
    if installed is None and top not in sys.modules:
        _tell_others(top, folders)
    # Any folder of that name in sys.path passes for a namespace package, a project's around its package above all.
    first = installed is not None and installed.origin is None
    sys.meta_path.insert(0 if first else len(sys.meta_path), finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def _tell_others(top: str, folders: Sequence[Path]) -> None:
    specs = [PathFinder.find_spec(top, [str(folder)]) for folder in folders]
    files = list(dict.fromkeys(str(Path(spec.origin).resolve()) for spec in specs if spec and spec.origin))
    if len(files) > 1:
        logger.warning("plugins: '%s' is in several places; %s is taken, and not %s", top, *files[:2])


def _refuse_another(top: str, finder: _Beside) -> None:
    """Python keeps one module of a name: a second run of this process must not get the first one's code unawares."""
    loaded, wanted = sys.modules.get(top), finder.find_spec(top, None)
    have = getattr(getattr(loaded, "__spec__", None), "origin", None)
    if have is None or wanted is None or wanted.origin is None or Path(have).resolve() == Path(wanted.origin).resolve():
        return
    if PathFinder.find_spec(top) is None:  # not installed, so it came from another config's folder
        raise ConfigError(
            f"plugins: '{top}' is imported from {have} already, beside this config lies {wanted.origin}; one process "
            "can have one module of a name: rename it, or run them apart"
        )


def _not_found(name: str, error: ModuleNotFoundError, folders: Sequence[Path]) -> ConfigError:
    missing = error.name or "?"
    if (name + ".").startswith(missing + "."):
        listed = ", ".join(map(str, folders)) or "no folder"
        return ConfigError(f"plugins: cannot import '{name}': no such module is installed; looked for in {listed}")
    beside = any(
        (folder / f"{missing.partition('.')[0]}{suffix}").exists() for folder in folders for suffix in (".py", "")
    )
    cure = (
        "; it lies in a folder where only what `plugins` names is looked for: put both into one package "
        "(a folder with __init__.py) and name that"
        if beside
        else ""
    )
    return ConfigError(f"plugins: '{name}' needs the module '{missing}', which is not installed{cure}")
