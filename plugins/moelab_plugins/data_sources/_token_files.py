"""Files of token ids as others write them, mapped into memory, with where their documents begin.

    x.npy            numpy's; or, as OLMo names its files, raw numbers without numpy's header (`dtype` says which)
    x.bin, x.idx     Megatron-LM's: the index says type, sequences and documents
    x.ds, x.ds.index datatrove's and nanotron's: the index says where each document ends
    anything else    raw little-endian numbers of `dtype`

Sources: Megatron-LM, megatron/core/datasets/indexed_dataset.py (_IndexWriter, _IndexReader, DType); datatrove 0.10.1,
pipeline/tokens/tokenizer.py (TokenizedFile); OLMo, olmo/data/memmap_dataset.py (raw memmaps, ends of documents among
the tokens). N tokens, n documents of a file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moelab import ConfigError, DataError
from moelab.safe_files import Reading, check_regular, map_array

READING = Reading(
    DataError, "data.source names it: write it again, mend the path, or say `dtype` where it is raw numbers"
)
DTYPES = ("uint16", "int32", "uint32", "int64")
NUMPY = b"\x93NUMPY"  # numpy.lib.format.MAGIC_PREFIX
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_HEAD = 34  # bytes: magic, version (8), code of the type (1), sequences (8), entries of the documents (8)
MEGATRON_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}  # those that hold ids


def map_tokens(file: Path, dtype: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """file -> ids [N] on disk, and where documents begin and the last one ends [n + 1] int64 where an index says it.

    Raises DataError for a file that is damaged, or whose index does not fit it; ConfigError where `dtype` is missing.
    """
    index = file.with_suffix(".idx") if file.suffix == ".bin" else file.with_name(f"{file.name}.index")
    if file.suffix == ".bin" and index.is_file() and _begins(index, MEGATRON):
        return _megatron(file, index)
    if index.is_file() and file.suffix != ".npy":
        return _datatrove(file, index)
    if file.suffix == ".npy" and (dtype is None or _begins(file, NUMPY)):
        array = map_array(file, READING)
    else:
        array = _map_raw(file, dtype)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"data.source: {file} holds {array.dtype} of shape {list(array.shape)}; it must be one row of integers"
        )
    return array, None


def _begins(file: Path, magic: bytes) -> bool:
    check_regular(file, READING)
    with file.open("rb") as content:
        return content.read(len(magic)) == magic


def _megatron(file: Path, index: Path) -> tuple[np.ndarray, np.ndarray]:
    content = _map_raw(index, "uint8")
    if len(content) < MEGATRON_HEAD:
        READING.refuse(index, f"has {len(content)} bytes, too few for the head of a Megatron index")
    head = bytes(content[:MEGATRON_HEAD])
    version, code = int.from_bytes(head[9:17], "little"), head[17]
    sequences, entries = (int.from_bytes(head[at : at + 8], "little") for at in (18, 26))
    if version != 1 or code not in MEGATRON_TYPES:
        READING.refuse(index, f"is a Megatron index of version {version} and type {code}, which hold no token ids")
    if (
        sequences > len(content)
        or entries > len(content)
        or MEGATRON_HEAD + 12 * sequences + 8 * entries > len(content)
    ):
        READING.refuse(index, f"is cut short: it speaks of {sequences} sequences and {entries} documents")
    lengths = np.frombuffer(content, "<i4", sequences, MEGATRON_HEAD).astype(np.int64)
    pointers = np.frombuffer(content, "<i8", sequences, MEGATRON_HEAD + 4 * sequences)
    first = np.frombuffer(content, "<i8", entries, MEGATRON_HEAD + 12 * sequences)  # sequence of each document
    array = _map_raw(file, MEGATRON_TYPES[code])
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    if (lengths < 0).any() or ends[-1] != len(array):
        READING.refuse(file, f"has {len(array)} tokens, and its index speaks of {ends[-1]}")
    if not np.array_equal(pointers, ends[:-1] * array.itemsize):
        READING.refuse(index, "has sequences in another order than they lie in the file, which can't be read")
    if len(first) and (first[0] < 0 or first[-1] > sequences or (np.diff(first) < 0).any()):
        READING.refuse(index, "has documents whose sequences don't rise from 0 to their number")
    return array, np.unique(np.concatenate([[0], ends[first], [len(array)]]).astype(np.int64))


def _datatrove(file: Path, index: Path) -> tuple[np.ndarray, np.ndarray]:
    ends, size = _map_raw(index, "uint64"), check_regular(file, READING)
    rising = len(ends) > 0 and ends[-1] > 0 and bool((np.diff(ends.astype(np.int64)) >= 0).all())
    if not rising or size not in (2 * int(ends[-1]), 4 * int(ends[-1])):
        last = int(ends[-1]) if len(ends) else 0
        READING.refuse(file, f"has {size} bytes, and its index ends at token {last}: that is not 2 or 4 bytes a token")
    array = _map_raw(file, "uint16" if size == 2 * int(ends[-1]) else "uint32")
    return array, np.unique(np.concatenate([[0], ends.astype(np.int64)]))


def _map_raw(file: Path, dtype: str | None) -> np.ndarray:
    if dtype is None:
        raise ConfigError(f"dtype: {file} is raw binary; say what it holds: {', '.join(DTYPES)}")
    size = check_regular(file, READING)
    if size % np.dtype(dtype).itemsize:
        READING.refuse(file, f"has {size} bytes, no whole number of {dtype}s")
    if not size:
        return np.zeros(0, dtype)  # an empty file can't be mapped
    try:
        return np.memmap(file, np.dtype(dtype).newbyteorder("<"), "r")
    except (OSError, ValueError) as error:
        READING.refuse(file, f"can't be mapped: {error}", error)
