"""Who takes part in a run, and who of them is gone: told through the launcher's store, when no collective works.

Every process leaves its name there. One that ends with an error of its own leaves its last words; one that merely
lost another says that it did, and looks for who is neither alive nor excused.
"""

from __future__ import annotations

import json
import time
from typing import Any

from moelab.lock import runs_here, this_process
from moelab.parallel.ranks import Lost
from moelab.safe_files import Reading, an_object, parse_json

PATIENCE = 5.0  # seconds until the launcher, or the other machine's processes, have seen that one is gone
_LOOK_EVERY = 0.1


class Roll:
    """Of one attempt; `store` is its own."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._others = store, rank, [r for r in range(size) if r != rank]
        store.set(f"process/{rank}", json.dumps(this_process()))

    def leave(self, words: str, *, mistake: bool) -> None:
        """This process ends with an error of its own. `mistake`: the user's, which is another exit code."""
        self._store.set(f"words/{self._rank}", json.dumps({"words": words, "mistake": mistake}))

    def lost(self) -> Lost:
        """Who ended, when a collective failed. Waits for as long as `PATIENCE`, and never raises."""
        try:
            self._store.set(f"victim/{self._rank}", "")
            deadline = time.monotonic() + PATIENCE
            while True:
                found = self._ended()
                if found is not None:
                    return found
                if time.monotonic() > deadline:
                    return self._silent()
                time.sleep(_LOOK_EVERY)
        except Exception:  # the store may be what is gone: its machine, or the launcher
            return Lost("another process of this run ended, and torchrun can't be asked which", left_to_main=False)

    def _ended(self) -> Lost | None:
        for other in self._others:
            if self._knows(f"words/{other}"):
                left = self._told(f"words/{other}")
                return Lost(f"{left['words']} (rank {other})", left_to_main=True, mistake=bool(left["mistake"]))
        gone = [other for other in self._others if self._is_gone(other)]
        if not gone:
            return None
        names = " and ".join(f"rank {other}{self._process(other)}" for other in gone)
        return Lost(f"{names} was killed, or ended without a word", left_to_main=self._left_to_main(gone))

    def _silent(self) -> Lost:
        """All live, so one did not come in time: whoever is not waiting."""
        silent = [other for other in self._others if not self._knows(f"victim/{other}")]
        if not silent:
            return Lost("the processes of this run lost each other, and none of them ended", left_to_main=True)
        names = " and ".join(f"rank {other}{self._process(other)}" for other in silent)
        return Lost(f"{names} did not come within parallel.timeout", left_to_main=self._left_to_main(silent))

    def _is_gone(self, other: int) -> bool:
        """Seen from here, or told by a process of its machine."""
        if self._knows(f"victim/{other}") or not self._knows(f"process/{other}"):
            return False
        if runs_here(self._told(f"process/{other}")) is False:
            self._store.set(f"gone/{other}", "")
        return self._knows(f"gone/{other}")

    def _left_to_main(self, gone: list[int]) -> bool:
        """Where the main process is among them the first that is left speaks."""
        return 0 not in gone or self._rank != min({self._rank, *self._others} - set(gone))

    def _process(self, other: int) -> str:
        if not self._knows(f"process/{other}"):
            return ""
        process = self._told(f"process/{other}")
        return f" (process {process['pid']} on {process['host']})"

    def _told(self, key: str) -> dict[str, Any]:
        return an_object(parse_json(self._store.get(key), key, Reading()), key, Reading())

    def _knows(self, key: str) -> bool:
        return bool(self._store.check([key]))
