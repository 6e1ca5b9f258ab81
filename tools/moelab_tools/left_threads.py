"""A thread that somebody's plugin left behind does not keep a command that is done from ending.

Python waits at its end for every thread that is no daemon. Most are gone by then or go soon (an executor's, one that
looks for the end of the main thread); what stays is told with whose it is. A run's may be bringing its data away: it is
waited for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from moelab.plugin_faults import place_of_code

SOON = 1.0  # seconds that a thread has to end by itself


def watch(code: int, tell: Callable[[str], None], *, trains: bool) -> None:
    """Call it last: this process ends with `code` even if a thread stays, and says so; with `trains`, it waits for it.

    Python's own end comes first, so that whoever goes in time is not disturbed, and what is registered for the end is
    done.
    """
    if left_threads():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done, and Python's own would trace back
        threading.Thread(target=_outlast, args=(code, tell, trains), daemon=True).start()


def left_threads() -> list[threading.Thread]:
    """Those that Python would wait for."""
    main = threading.main_thread()
    return [thread for thread in threading.enumerate() if not thread.daemon and thread is not main]


def in_words(thread: threading.Thread) -> str:
    """ "'watcher' of my_lab (my_lab.py:31)": its name, and whose code it runs, where that can be seen."""
    frame = None if thread.ident is None else sys._current_frames().get(thread.ident)
    theirs = None
    while frame is not None:  # outwards: the last one that is nobody's but theirs is where the thread began
        if _top(frame) not in sys.stdlib_module_names:
            theirs = frame
        frame = frame.f_back
    whose = "" if theirs is None else f" of {_top(theirs)}{place_of_code(theirs.f_code, _module(theirs))}"
    return f"'{thread.name}'{whose}"


def _outlast(code: int, tell: Callable[[str], None], trains: bool) -> None:
    until = time.monotonic() + SOON
    for thread in left_threads():
        thread.join(max(until - time.monotonic(), 0.0))
    left = ", ".join(map(in_words, left_threads()))
    if not left:
        return
    if trains:
        tell(f"warning: the command is done and waits for a thread that still runs, {left}; Ctrl-C ends without it")
        return
    tell(
        f"warning: the command is done and ends though a thread still runs, {left}; a plugin's thread must end by "
        "itself or be a daemon"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "?"))


def _top(frame: FrameType) -> str:
    return _module(frame).partition(".")[0]
