"""What the processes of one command owe each other."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> None:
    """From here on this process ends with `parent`, which started it: a killed one must not leave another that writes.

    The kernel sees to it on Linux (prctl(2), PR_SET_PDEATHSIG); elsewhere only a parent that is gone already is
    noticed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
