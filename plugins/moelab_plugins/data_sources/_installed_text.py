"""Real text that is already on the machine: the standard library and the packages moelab depends on.

Each reader yields (name, text) in a seeded order. Files are read, Python sources at most parsed: nothing is
imported or run. What is missing yields nothing.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Texts = Iterator[tuple[str, str]]

LARGEST_FILE = 48 * 1024  # bytes; what is larger is nearly always generated, and one document must not be a domain
LARGEST_SOURCE = 1024 * 1024  # of a file that is taken in pieces
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"} | {
    "encodings",  # tables
    "pydoc_data",  # is docs_en
    "ops",  # torch/include/ATen/ops: 7000 generated headers that differ in a name
}
# Where docstrings are longer than code, so that little is parsed for much prose.
DOCUMENTED = {
    "torch": ("_torch_docs.py", "_tensor_docs.py", "functional.py", "nn", "optim", "distributions", "linalg"),
    "numpy": ("lib", "_core", "linalg", "ma", "polynomial", "fft"),
    "networkx": ("algorithms", "classes", "generators"),
}
TESTED = ("integrals", "solvers", "series", "functions", "polys", "simplify")  # of sympy
# Fixed, so that installing something else leaves the corpus as it is: what moelab itself needs, with what that needs.
# fmt: off
LICENSED = (
    "torch", "numpy", "scipy", "tensorboard", "sympy", "networkx", "mpmath", "jinja2", "click", "rich",
    "pluggy", "omegaconf", "safetensors", "tokenizers", "grpcio", "pillow", "protobuf", "markdown", "werkzeug",
    "markupsafe", "pygments", "pyyaml", "absl-py", "typing_extensions", "fsspec", "filelock", "setuptools",
    "packaging", "markdown-it-py", "mdurl", "huggingface_hub", "tqdm",
)
# fmt: on


@dataclass(frozen=True)
class Reader:
    """One domain: where its text comes from and which packages' versions decide it."""

    texts: Callable[[int], Texts]  # seed -> (name, text), in seeded order
    packages: tuple[str, ...]

    def versions(self) -> dict[str, str]:
        """{package: version} of those that are installed."""
        found = {}
        for package in self.packages:
            if package == "python":
                found[package] = platform.python_version()
                continue
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found


def code_py(seed: int) -> Texts:
    """The standard library's sources, without tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    # _sysconfigdata*: the compiler flags of one machine.
    files = [file for file in _walk(library, ".py") if not file.name.startswith("_sysconfigdata")]
    return _read(_shuffled(files, library, seed, "python"))


def code_cpp(seed: int) -> Texts:
    """torch's C++ and CUDA headers."""
    folder = _package("torch")
    if folder is None:
        return iter(())
    include = folder / "include"
    return _read(_shuffled(list(_walk(include, ".h", ".hpp", ".cuh", ".inl")), include, seed, "torch/include"))


def maths(seed: int) -> Texts:
    """sympy's tests: formulas and what they are equal to."""
    folder = _package("sympy")
    if folder is None:
        return iter(())
    files = [
        file
        for part in TESTED
        for file in (folder / part).glob("**/tests/test_*.py")
        if "__pycache__" not in file.parts
    ]
    return _read(_shuffled(files, folder, seed, "sympy"))


def docs_en(seed: int) -> Texts:
    """Python's own manual topics, then the docstrings of numerical libraries."""
    yield from _topics()
    files = []
    for package, parts in DOCUMENTED.items():
        folder = _package(package)
        if folder is None:
            continue
        for part in parts:
            found = [folder / part] if part.endswith(".py") else list(_walk(folder / part, ".py"))
            files += [(f"{package}/{file.relative_to(folder).as_posix()}", file) for file in found]
    for name, file in _by_hash(files, seed):
        text = _decoded(file, LARGEST_SOURCE)  # torch's largest documentation file is long and all prose
        prose = "\n\n".join(_docstrings(text)) if text else ""
        if len(prose) >= 500:
            yield name, prose


def legal(seed: int) -> Texts:
    """The licence files of moelab's dependencies; collections are cut at their ruled lines."""
    files = []
    for package in LICENSED:
        try:
            found = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for entry in found:
            if ".dist-info" in entry.parts[0] and re.match(r"licen[cs]e|notice|copying", entry.name, re.IGNORECASE):
                files.append((f"{package}/{'/'.join(entry.parts[1:])}", Path(str(entry.locate()))))
    files.append(("python/LICENSE.txt", Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt"))
    for name, text in _read(_by_hash(files, seed), LARGEST_SOURCE):
        pieces = re.split(r"^[-=*#_ ]{20,}$", text, flags=re.MULTILINE)
        for number, piece in enumerate(pieces):
            if len(piece) >= 400:
                yield (f"{name}#{number}" if len(pieces) > 1 else name), piece.strip() + "\n"


READERS = {
    "code_py": Reader(code_py, ("python",)),
    "docs_en": Reader(docs_en, ("python", *DOCUMENTED)),
    "code_cpp": Reader(code_cpp, ("torch",)),
    "maths": Reader(maths, ("sympy",)),
    "legal": Reader(legal, ("python", *LICENSED)),
}


def _package(name: str) -> Path | None:
    """A top-level package's folder, without importing it."""
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(locations[0]) if locations else None


def _walk(folder: Path, *suffixes: str) -> Iterator[Path]:
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith("config-")]
        yield from (Path(here, name) for name in names if name.endswith(suffixes))


def _shuffled(files: list[Path], root: Path, seed: int, prefix: str) -> Iterator[tuple[str, Path]]:
    return _by_hash([(f"{prefix}/{file.relative_to(root).as_posix()}", file) for file in files], seed)


def _by_hash(files: list[tuple[str, Path]], seed: int) -> Iterator[tuple[str, Path]]:
    """Ordered by a hash of seed and name: the same wherever the files lie and however the folder lists them."""
    return iter(sorted(files, key=lambda pair: hashlib.sha256(f"{seed}/{pair[0]}".encode()).digest()))


def _read(files: Iterator[tuple[str, Path]], largest: int = LARGEST_FILE) -> Texts:
    for name, file in files:
        text = _decoded(file, largest)
        if text:
            yield name, text


def _decoded(file: Path, largest: int) -> str | None:
    """None for what is missing, too large, binary, or not UTF-8 (a few sources are latin-1)."""
    try:
        data = file.read_bytes() if file.stat().st_size <= largest else b"\0"
        return None if b"\0" in data else data.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # others' invalid escapes
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _topics() -> Texts:
    """pydoc_data/topics.py is one dictionary of name to text."""
    text = _decoded(Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py"), LARGEST_SOURCE)
    tree = _parse(text) if text else None
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                try:
                    yield f"python/topics/{ast.literal_eval(key)}", str(ast.literal_eval(value))  # type: ignore[arg-type]
                except ValueError:  # not a literal
                    continue


def _docstrings(source: str) -> Iterator[str]:
    """Docstrings, and the long texts that C functions get through `add_docstr(function, text)`."""
    tree = _parse(source)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= 80:
                yield text
        elif isinstance(node, ast.Call) and "add_" in ast.unparse(node.func) and "doc" in ast.unparse(node.func):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Constant) and isinstance(inner.value, str) and len(inner.value) >= 80:
                    yield inspect.cleandoc(inner.value)
