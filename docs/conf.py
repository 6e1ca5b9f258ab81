"""The documentation as a site: `make docs` writes build/docs, offline, with warnings as errors.

The pages are the Markdown that GitHub shows, where it shows it. A page that only points at a file of the repository's
root (start.md at README.md) shows that file; api.md gets what docstrings say. Nothing is written beside the sources.

Why Sphinx with MyST and furo (looked up in November 2026): Sphinx 9 is released and maintained, and furo follows it
(2025.12.19 "Add support for Sphinx 9", says its changelog). What many use besides is in motion: MkDocs 1 has seen no
release since August 2024, MkDocs 2 drops plugins and themes, Material for MkDocs is in maintenance until about the end
of 2026, and its successor Zensical reads the same files but had no plugins of others yet, which pages made from
docstrings need. (From what users of theirs write; their own announcements could not be opened.) All of furo's files are
its own, so a built site makes no request.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for source in ("core", "plugins", "upcycling", "tools"):
    sys.path.insert(0, str(ROOT / source))

import moelab  # noqa: E402  (found by the lines above)

project = "moelab"
smartquotes = False  # "--resume" is two characters more than a dash
html_show_copyright = False
version = release = moelab.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"moelab {version}"
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # GitHub's anchors: [Verdicts](compare.md#verdicts)
myst_enable_extensions: list[str] = []  # plain Markdown, as on GitHub
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True
nitpicky = False  # types of torch and of the standard library have no page here

PAGE_OF = {"README.md": "start", "CONTRIBUTING.md": "contributing", "AGENTS.md": "map", "CHANGELOG.md": "changelog"}
FILE_OF = {page: file for file, page in PAGE_OF.items()}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def show_the_file(app: Any, page: str, content: list[str]) -> None:
    """Put a file of the root in the place of the page that points at it, and set links right for the site."""
    if page == "api":
        content[0] += api_directives()
        return
    file = FILE_OF.get(page)
    text = (ROOT / file).read_text(encoding="utf-8") if file else content[0]
    folder = ROOT if file else (ROOT / "docs" / page).parent
    here = (ROOT / "docs" / page).parent
    content[0] = LINK.sub(lambda found: f"]({_target(folder / found[1], here)}{found[2] or ''})", text)
    if page == "plugins/README":
        content[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def _target(path: Path, here: Path) -> str:
    path = path.resolve()
    if path.parent == ROOT and path.name in PAGE_OF:
        path = ROOT / "docs" / f"{PAGE_OF[path.name]}.md"
    target = os.path.relpath(path, here)
    return target if path.suffix != ".md" or path.is_relative_to(ROOT / "docs") else f"path:{target}"  # to be opened


def api_directives() -> str:
    """The public names by what they are; autodoc writes each."""
    groups: dict[str, list[str]] = {"Functions": [], "Contracts and data": [], "Errors": []}
    for name in (public for public in moelab.__all__ if not public.startswith("_")):
        thing = getattr(moelab, name)
        error = isinstance(thing, type) and issubclass(thing, Exception)
        kind = "Errors" if error else "Contracts and data" if isinstance(thing, type) else "Functions"
        directive = "autoexception" if error else "autoclass" if isinstance(thing, type) else "autofunction"
        if not isinstance(thing, type) and not hasattr(thing, "__code__"):
            directive = "autodata"
        groups[kind].append(f".. {directive}:: moelab.{name}\n" + "   :no-value:\n" * (directive == "autodata"))
    return "".join(
        f"\n## {title}\n\n```{{eval-rst}}\n" + "\n".join(found) + "```\n" for title, found in groups.items() if found
    )


def as_restructured_text(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with `code` and indented blocks: write them so that autodoc reads that."""
    if name == "moelab.hookimpl":  # an instance, whose docstring is that of its class: pluggy's
        lines[:] = ["The mark of a plugin's hook functions."]
    written: list[str] = []
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        item, within = line.startswith("- "), before.startswith(("- ", "  "))
        if before.strip() and (item != within if not line.startswith(" ") else False):
            written.append("")  # a list begins or ends
        if line.startswith("    ") and not before.strip() and not _in_block(written):
            written += ["::", "", line]
        elif line.startswith("  "):
            written.append(line if _in_block(written) else f"  {_escaped(line.strip())}")
        else:
            written.append(_escaped(line))
    lines[:] = [*written, ""]


def _in_block(written: list[str]) -> bool:
    last = next((number for number in range(len(written) - 1, -1, -1) if written[number].strip()), -1)
    return last >= 0 and written[last].startswith("    ")


def _escaped(line: str) -> str:
    parts = line.split("`")
    if len(parts) % 2 == 0:  # code that goes on in the next line
        return line.replace("`", "'").replace("*", r"\*").replace("_ ", r"\_ ").replace("|", r"\|")
    plain = [re.sub(r"([*|])", r"\\\1", re.sub(r"_(?=\W|$)", r"\\_", part)) for part in parts]
    return "".join(f"``{part}``" if number % 2 else plain[number] for number, part in enumerate(parts))


def setup(app: Any) -> None:
    app.connect("source-read", show_the_file)
    app.connect("autodoc-process-docstring", as_restructured_text)
