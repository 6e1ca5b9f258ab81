"""The one reader of files that others wrote: bytes, text, JSON, JSON lines, headers of safetensors and of .npy.

Whatever lies there, the answer is a value or one error of the caller's kind that names the path, the place, what is
wrong and the cure. Nothing waits (a FIFO, a device), nothing grows beyond a small multiple of the file's own size, and
no number is taken on trust: JSON is bounded in bytes, depth, values and digits, and keys stand once. Free of torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moelab.errors import UserError
from moelab.printable import printable

if TYPE_CHECKING:
    import numpy as np

LARGEST_TEXT = 128 << 20  # bytes; the largest tokenizer.json in use has about 35 MB
LARGEST_LINE = 64 << 20
LARGEST_HEADER = 100_000_000  # bytes: MAX_HEADER_SIZE of safetensors (src/tensor.rs)
DEEPEST = 64  # lists and objects within each other
MOST_CONTAINERS, MOST_VALUES = 4_000_000, 16_000_000  # of one JSON text; an empty one takes 64 bytes
LONGEST_INTEGER = 40  # digits: a run's FLOPs have 22
CURE = "download or write it again"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Reading:
    """How the failures of one reader are told: as which error, and with which cure at the end."""

    error: type[UserError] = UserError
    cure: str = CURE

    def refuse(self, where: object, problem: str, cause: BaseException | None = None) -> NoReturn:
        """Raise the error. `where`: a path, or path:line."""
        place = printable(where, 600)
        raise self.error(f"{place}: {printable(problem, 800)}; {self.cure}") from cause


def read_bytes(path: Path, reading: Reading, limit: int = LARGEST_TEXT) -> bytes:
    """All of a regular file of at most `limit` bytes; FIFOs, devices and folders are refused, links are followed."""
    descriptor, size = _open(path, reading)
    with os.fdopen(descriptor, "rb") as file:
        if size > limit:
            reading.refuse(path, f"has {size} bytes, more than the {limit} that a file of its kind may have")
        try:
            content = file.read(size + 1)  # no more is allocated
            while len(content) <= limit and (more := file.read(1 << 20)):  # it grows, or /proc knows no size
                content += more
        except (OSError, MemoryError) as error:
            reading.refuse(path, f"can't be read: {_reason(error)}", error)
    if len(content) > limit:
        reading.refuse(path, f"has more than the {limit} bytes that a file of its kind may have")
    return content


def check_regular(path: Path, reading: Reading) -> int:
    """For what another library opens: -> its bytes. Refuses what is no regular file that can be opened."""
    descriptor, size = _open(path, reading)
    os.close(descriptor)
    return size


def read_text(path: Path, reading: Reading, limit: int = LARGEST_TEXT) -> str:
    """A file's UTF-8, without its byte-order mark."""
    return decode(read_bytes(path, reading, limit), path, reading)


def decode(content: bytes, where: object, reading: Reading) -> str:
    """UTF-8 bytes -> text, without its byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reading.refuse(where, f"is no UTF-8 text (byte {error.start}: 0x{content[error.start]:02x})", error)


def read_json(
    path: Path, reading: Reading, *, limit: int = LARGEST_TEXT, finite: bool = True, whole: bool = True
) -> Any:
    """The value that a JSON file holds, see `parse_json`."""
    return parse_json(read_bytes(path, reading, limit), path, reading, finite=finite, whole=whole)


def read_object(path: Path, reading: Reading, *, limit: int = LARGEST_TEXT, finite: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds, see `parse_json`."""
    return an_object(read_json(path, reading, limit=limit, finite=finite), path, reading)


def an_object(value: Any, where: object, reading: Reading) -> dict[str, Any]:
    """`value` where it is a mapping with text as keys, else the error."""
    if not isinstance(value, dict):
        reading.refuse(where, f"holds {kind_of(value)}, not an object")
    return value


def parse_json(
    content: str | bytes, where: object, reading: Reading, *, finite: bool = True, whole: bool = True
) -> Any:
    """The value that `content` spells, within the limits above. `where`: a path, or path:line.

    `finite`: refuses NaN and Infinity, which JSON doesn't have and moelab writes of metrics. `whole`: refuses halves of
    surrogate pairs, which no file and no terminal takes; a corpus may hold them.
    """
    text = decode(content, where, reading) if isinstance(content, bytes) else content
    brackets = text.count("[") + text.count("{")
    if brackets > MOST_CONTAINERS or text.count(",") > MOST_VALUES:
        reading.refuse(where, f"holds more than {MOST_CONTAINERS} lists and objects, or {MOST_VALUES} values")
    bounded = _float if finite else float
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=bounded, parse_constant=_constant if finite else None,
            object_pairs_hook=_once,
        )  # fmt: skip
    except json.JSONDecodeError as error:
        place = f" at line {error.lineno}, column {error.colno}" if "\n" in text else f" at character {error.pos + 1}"
        reading.refuse(where, f"is not JSON{place}: {error.msg}", error)
    except RecursionError as error:
        reading.refuse(where, f"is nested too deeply, more than {DEEPEST} levels", error)
    except (ValueError, MemoryError) as error:  # what the hooks below refuse
        reading.refuse(where, f"can't be used: {error}", error)
    if brackets > DEEPEST and _deeper_than(value, DEEPEST):
        reading.refuse(where, f"is nested too deeply, more than {DEEPEST} levels")
    if whole and _SURROGATE.search(text) and _has_halves(value):
        reading.refuse(where, "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def json_lines(
    path: Path, reading: Reading, *, finite: bool = False, torn: bool = False
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path:line, object) of a file with one JSON object a line; empty lines are passed over.

    `torn`: a last line that can't be read is left out, as a kill while it was written leaves it.
    """
    lines = read_bytes(path, reading).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = parse_json(line, where, reading, finite=finite)
        except UserError:
            if torn and number == len(lines):  # without its line feed
                return
            raise
        yield where, an_object(value, where, reading)


def lines_from_end(path: Path, reading: Reading, limit: int = LARGEST_TEXT) -> Iterator[bytes]:
    """The lines of a file, the last one first, read as far as they are asked for: at most its last `limit` bytes.

    What stands behind the last line feed is left out: somebody writes it just now, or was killed while writing it.
    """
    descriptor, end = _open(path, reading)
    least, block, rest, torn = max(0, end - limit), 1 << 16, b"", True
    with os.fdopen(descriptor, "rb") as file:
        while end > least:
            start = max(least, end - block)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            if lines and torn:
                lines, torn = lines[:-1], False
            yield from reversed(lines)
            end, block = start, 2 * block  # so that a line of any length is put together in linear time
    if least == 0 and not torn:
        yield rest


def read_tensor_header(path: Path, reading: Reading) -> tuple[dict[str, Any], int, int]:
    """(header, bytes before the first tensor, bytes of the file) of a safetensors file, by its own description.

    8 bytes of length, little endian, then as much JSON, then the tensors (huggingface/safetensors README, "Format").
    What the entries say is the library's to check; their number and the header's size are bounded here.
    """
    descriptor, size = _open(path, reading)
    with os.fdopen(descriptor, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            reading.refuse(path, f"is no whole safetensors file ({size} bytes): truncated or damaged")
        content = file.read(length)
    where = f"{path}: is no whole safetensors file: its header"
    return an_object(parse_json(content, where, reading), where, reading), 8 + length, size


def read_arrays(path: Path, reading: Reading) -> dict[str, np.ndarray]:
    """{name: array} of a safetensors file whose types numpy has."""
    from safetensors.numpy import load_file  # noqa: PLC0415  (configs are read without it)

    read_tensor_header(path, reading)
    try:
        return load_file(path)
    except Exception as error:  # the library's own, and KeyError for a type that numpy lacks
        reading.refuse(path, f"can't be read ({printable(error, 300)}): cut short or damaged", error)


def map_array(path: Path, reading: Reading) -> np.ndarray:
    """An .npy file, mapped: what its header speaks of must be there. Never unpickles."""
    import numpy as np  # noqa: PLC0415  (configs are read without it)

    size = check_regular(path, reading)
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header is parsed as Python: SyntaxError, tokenize.TokenError, OverflowError, ...
        if "pickle" in str(error):  # numpy goes on with how to load it all the same, which is nobody's cure
            reading.refuse(path, "is no .npy array: it has no such header, or holds pickled objects", error)
        reading.refuse(path, f"is no .npy array ({type(error).__name__}: {printable(error, 300)})", error)
    spoken_of = getattr(array, "offset", size - array.nbytes) + array.nbytes
    if spoken_of != size:
        reading.refuse(path, f"has {size} bytes, and its header speaks of {spoken_of}: other files put behind it?")
    return array


def kind_of(value: Any) -> str:
    """What a JSON or YAML value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def _open(path: Path, reading: Reading) -> tuple[int, int]:
    """(descriptor, size) of a regular file; opening a FIFO that nobody writes to does not wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        reading.refuse(path, "no such file", error)
    except (OSError, ValueError) as error:
        reading.refuse(path, f"can't be read: {_reason(error)}", error)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        reading.refuse(path, "is a folder" if stat.S_ISDIR(status.st_mode) else "is no regular file")
    return descriptor, status.st_size


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def _integer(digits: str) -> int:
    count = len(digits.lstrip("-"))
    if count > LONGEST_INTEGER:
        raise ValueError(f"an integer of {count} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is beyond all bounds")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key '{printable(twice, 60)}' stands twice in one object")
    return found


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            inner
            for node in level
            for inner in (node.values() if type(node) is dict else node)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return bool(level)


def _has_halves(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
