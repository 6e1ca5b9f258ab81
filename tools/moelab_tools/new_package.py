"""A package with one part, from the one template there is: examples/plugin_package, which a wheel carries along.

The template is a package that works, with a part of each kind: what belongs to another kind is left out, and the names
are put in. A file belongs to a kind if it is called after it; so does a line that names such a file, or its module.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.atomic import partial
from moelab.errors import ConfigError, near
from moelab.hookspecs import EXTENSION_POINTS, ExtensionPoint
from moelab.registry import Registry
from moelab.safe_files import Reading, read_text

PACKAGE, DISTRIBUTION = "my_plugin", "my-plugin"  # names in the template; a part is my_<kind>, its class My<Kind>
TEXTS = (".py", ".toml", ".md", ".yaml", ".csv")
READING = Reading(cure="install moelab anew")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class NewPackage:
    """What to write, and where."""

    kind: str  # as the template calls it: router, balance_loss, ...
    name: str  # of the package and of its part
    folder: Path

    def files(self) -> dict[str, str]:
        """{path in the package's folder: text}."""
        others = set(kinds()) - {self.kind}
        found = {}
        for path in sorted(template_folder().rglob("*")):
            below = path.relative_to(template_folder())
            if path.suffix not in TEXTS or below.stem.removeprefix("test_") in others or _made(below):
                continue
            lines = read_text(path, READING).splitlines(keepends=True)
            kept = [line for line in lines if not any(_names(line, other) for other in others)]
            found[self._renamed(below.as_posix())] = self._renamed("".join(kept))
        return found

    def write(self) -> None:
        """Put the folder in place whole, or not at all: over nothing, an empty folder at most."""
        files, beside = self.files(), partial(self.folder)
        shutil.rmtree(beside, ignore_errors=True)
        try:
            for name, text in files.items():
                path = beside / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            beside.rename(self.folder)
        except OSError as error:
            raise ConfigError(f"{self.folder}: can't be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def _renamed(self, text: str) -> str:
        names = {
            f"my_{self.kind}": self.name, f"My{_camel(self.kind)}": _camel(self.name), PACKAGE: self.name,
            DISTRIBUTION: self.name.replace("_", "-"),
        }  # fmt: skip
        return re.sub("|".join(sorted(names, key=len, reverse=True)), lambda found: names[found[0]], text)


def template_folder() -> Path:
    """Beside this module in a wheel, else in the repository's examples."""
    here = Path(__file__).resolve().parent
    installed = here / "plugin_package"
    return installed if installed.is_dir() else here.parent.parent / "examples" / "plugin_package"


def kinds() -> dict[str, ExtensionPoint[Any, Any]]:
    """{name of a kind: its extension point} of all that the template has a part of."""
    have = {path.stem for path in (template_folder() / PACKAGE).glob("*.py")}
    return {name: point for point in EXTENSION_POINTS if (name := point.kind.replace(" ", "_")) in have}


def new_package(kind: str, name: str, parent: Path) -> NewPackage:
    """Check what was asked for. Raises ConfigError for an unknown kind, a name that can't be one, or what is there."""
    return NewPackage(_kind(kind), _checked(name, kinds()[_kind(kind)]), _free(parent / name))


def _kind(said: str) -> str:
    """`layout`, `expert-layout` and `expert_layouts` are expert_layout."""
    known = kinds()
    word = re.sub(r"(?<=[^s])s$|(?<=ss)es$", "", re.sub(r"[-\s]", "_", said.strip().lower()))
    fitting = [kind for kind in known if kind == word] or [kind for kind in known if kind.endswith(f"_{word}")]
    if len(fitting) != 1:
        raise ConfigError(f"KIND: no template for '{said}'{near(word, known)} There are: {', '.join(known)}")
    return fitting[0]


def _checked(name: str, point: ExtensionPoint[Any, Any]) -> str:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ConfigError(f"NAME: '{name}' can't name a module; write small letters, digits and _, as in my_router")
    if name in ("tests", PACKAGE) or name in sys.stdlib_module_names or importlib.util.find_spec(name) is not None:
        raise ConfigError(f"NAME: there is a module '{name}' already, which the package would hide or be hidden by")
    owner = Registry(points=[point]).components(point).get(name)
    if owner is not None:
        raise ConfigError(f"NAME: there is a {point.kind} '{name}' already, of {owner.owner}; take another name")
    return name


def _free(folder: Path) -> Path:
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder}: exists already, and nothing is overwritten; take another name, or move it away")
    if not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent}: no such folder; make it first")
    return folder


def _made(path: Path) -> bool:
    """By a build, a test or an editor in the template's own folder."""
    return any(part.startswith((".", "__pycache__")) or part in ("dist", "build", "runs") for part in path.parts)


def _names(line: str, kind: str) -> bool:
    """Whether a line names a module or file of this kind: `my_plugin.router`, `router.yaml`."""
    return re.search(rf"\b(my_plugin\.{kind}\b|(test_)?{kind}\.(py|yaml|csv)\b)", line) is not None


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
