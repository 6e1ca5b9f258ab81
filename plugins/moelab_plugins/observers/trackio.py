"""Writes a run to trackio, Hugging Face's local-first tracker. `pip install 'moelab[trackio]'`.

Read for this: the client's sources, 0.43 (__init__.py: init, run.py).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import Component, component, hookimpl
from moelab.alarms import Alarm, AlarmChange
from moelab.printable import printable
from moelab_plugins.observers._tracked import TrackedRun, name_of, plain, require

logger = logging.getLogger("moelab")


@dataclass
class TrackioOptions:
    project: str = "moelab"
    group: str | None = None
    space_id: str | None = None  # a Hugging Face Space to send to; null: TRACKIO_SPACE_ID, else nothing is sent

    def __post_init__(self) -> None:
        if not self.project:
            raise ValueError("project: must not be empty")


class TrackioObserver:
    """trackio: config, metrics under log's names, alarms as alerts, summary; `trackio show` opens its page.

    Written to this machine (TRACKIO_DIR, else where trackio keeps its projects) unless `space_id`, TRACKIO_SPACE_ID or
    TRACKIO_SERVER_URL names a place to send to. A resumed run goes on in the same run there.
    """

    def __init__(self, options: TrackioOptions, run_dir: Path) -> None:
        require("trackio")
        self.options = options
        self.tracked = TrackedRun("trackio")
        self.run: Any = None

    def on_train_begin(
        self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int, checkpoint: Path | None
    ) -> None:
        import trackio

        self.tracked.begin(checkpoint)
        options = self.options
        # trackio knows a run by its name: one of the same name in another folder must not be taken for it.
        name = f"{name_of(facts, run_dir)}-{self.tracked.id}"
        with contextlib.redirect_stdout(io.StringIO()):  # six lines; ours is one
            self.run = trackio.init(
                project=options.project, name=name, group=options.group, space_id=options.space_id, resume="allow",
                config=plain(config) | {"facts": plain(facts)}, embed=False,
            )  # fmt: skip
        sent = options.space_id or os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        where = f"sent to {sent}" if sent else f"in {trackio.TRACKIO_DIR}"
        logger.warning("trackio: run %s %s; `trackio show --project %s` opens it", name, where, options.project)

    def on_log(self, step: int, metrics: Mapping[str, float], alarms: list[Alarm], changes: list[AlarmChange]) -> None:
        import trackio

        self.run.log({**metrics, "alarms/on": len(alarms)}, step=step)
        with contextlib.redirect_stdout(io.StringIO()):  # the terminal has been told
            for change in changes:
                if change.change != "ends":
                    text = printable(change.sentence())
                    self.run.alert(change.alarm.name, text, level=trackio.AlertLevel.WARN, step=step)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        return self.tracked.files()

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        if self.run is None:  # the run failed before it began
            return
        import trackio

        self.run.log({"summary": plain(summary)}, step=step)
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # and not the run's own, or the process would finish it once more at its exit


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("trackio", TrackioOptions, TrackioObserver)]
