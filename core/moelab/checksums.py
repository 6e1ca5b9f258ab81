"""The one arithmetic of checksums: xxh3-128 of bytes, of a span of a file, of whatever comes in pieces.

XXH3 with 128 bits (xxHash, Collet: the 128-bit hash of the XXH3 family, canonical big-endian digest in hexadecimal).
A tensor's checksum is that of its little-endian bytes in C order, which are its bytes in a safetensors file. It finds
damage, not forgery: whoever can change a file can change its checksum.
"""

from __future__ import annotations

import os

from xxhash import xxh3_128

ALGORITHM = "xxh3-128"
_PIECE = 512 << 10  # bytes: stays in the second-level cache between the read and the hash
running = xxh3_128  # update(buffer) any number of times, then hexdigest()


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Of a contiguous buffer, as 32 hexadecimal digits."""
    return xxh3_128(data).hexdigest()


def checksum_of_span(descriptor: int, offset: int, size: int, *, keep_cached: bool = True) -> str:
    """Of `size` bytes of an open file from `offset`, or of fewer where it ends before.

    `keep_cached`: False drops what was read from the page cache, where it will not be read again.
    """
    digest, buffer = xxh3_128(), memoryview(bytearray(min(_PIECE, max(size, 1))))
    end = offset + size
    while offset < end:
        count = os.preadv(descriptor, [buffer[: min(_PIECE, end - offset)]], offset)
        if not count:
            break
        digest.update(buffer[:count])
        if not keep_cached and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        offset += count
    return digest.hexdigest()
