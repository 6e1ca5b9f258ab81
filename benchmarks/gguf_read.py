"""How fast a GGUF file is read by one core: bytes in, decoded values out, the header apart.

    python benchmarks/gguf_read.py FILE.gguf

CPU seconds of this process, so that neighbours count for little; needs the extra `gguf`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from moelab_upcycling.source import DenseSource


def main() -> None:
    path = Path(sys.argv[1])
    started = time.process_time()
    source = DenseSource(path)
    header = time.process_time() - started
    started, read, made = time.process_time(), 0, 0
    with source:
        for name, tensor in source.tensors.items():
            read += tensor.nbytes
            made += sum(piece.nbytes for piece in source.pieces(name))
    seconds = time.process_time() - started
    print(
        f"header {header:.2f} s; {read / 1e6:.0f} MB read, {made / 1e6:.0f} MB of values in {seconds:.2f} CPU s: ",
        end="",
    )
    print(f"{read / 1e6 / seconds:.0f} MB/s of the file, {made / 1e6 / seconds:.0f} MB/s of values")


if __name__ == "__main__":
    main()
