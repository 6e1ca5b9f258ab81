"""Writes a run to Weights & Biases, offline unless asked otherwise. `pip install 'moelab[wandb]'`.

Read for this: the client's sources, 0.31 (wandb_init.py, wandb_login.py, wandb_settings.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moelab import Component, component, hookimpl
from moelab.alarms import Alarm, AlarmChange
from moelab.plugin_faults import quoted
from moelab.printable import printable
from moelab_plugins.observers._tracked import TrackedRun, alarm_lines, name_of, plain, require

logger = logging.getLogger("moelab")
MODES = ("online", "offline", "shared", "disabled")
ONLINE = ("online", "shared")
PROJECT = "moelab"
# Seconds, where the environment says nothing. The client's own are 90 for the first contact and forever for the last
# upload: a machine that has lost its network would hold on to its GPUs.
WAITS = {"init_timeout": 30, "finish_timeout": 120}


@dataclass
class WandbOptions:
    mode: str | None = None  # online, offline, shared or disabled; null: WANDB_MODE, else offline
    project: str | None = None  # null: WANDB_PROJECT, else moelab
    entity: str | None = None  # null: WANDB_ENTITY, else your default team
    group: str | None = None  # null: WANDB_RUN_GROUP
    tags: list[str] = field(default_factory=list)
    samples: bool = True  # generated texts of each evaluation, as a table

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"mode: must be one of {', '.join(MODES)}, not '{self.mode}'")


class WandbObserver:
    """Weights & Biases: config, metrics under log's names, alarms, samples, summary; offline until `wandb sync`.

    Offline unless `mode` or WANDB_MODE says otherwise; the client's other variables hold. Without a login or a network
    it goes on offline, and says so. A resumed run goes on in the same run there.
    """

    def __init__(self, options: WandbOptions, run_dir: Path) -> None:
        require("wandb")
        self.options = options
        self.tracked = TrackedRun("wandb")
        self.run: Any = None

    def on_train_begin(
        self, run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], step: int, checkpoint: Path | None
    ) -> None:
        self.tracked.begin(checkpoint)
        options = self.options
        about = {
            "project": options.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            "entity": options.entity,
            "group": options.group,
            "tags": options.tags or None,
            "name": os.environ.get("WANDB_NAME") or name_of(facts, run_dir),
            "id": os.environ.get("WANDB_RUN_ID") or self.tracked.id,
            "dir": os.environ.get("WANDB_DIR") or str(run_dir),
            "config": plain(config) | {"facts": plain(facts)},
            "allow_val_change": True,
        }
        self.run = _start(about, options.mode or os.environ.get("WANDB_MODE") or "offline")
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def on_log(self, step: int, metrics: Mapping[str, float], alarms: list[Alarm], changes: list[AlarmChange]) -> None:
        self._log(step, {**metrics, "alarms/on": len(alarms)})
        self.run.summary["alarms"] = alarm_lines(alarms)
        if self.run.offline:  # alerts are sent when they are synced: weeks late
            return
        for change in changes:
            if change.change != "ends":
                self.run.alert(change.alarm.name, printable(change.sentence()), level="WARN")

    def on_evaluate(self, step: int, metrics: Mapping[str, float], samples: list[str]) -> None:
        import wandb

        shown: dict[str, Any] = {}
        if samples and self.options.samples:
            shown["samples"] = wandb.Table(columns=["sample"], data=[[plain(sample)] for sample in samples])
        self._log(step, {**metrics, **shown})

    def on_checkpoint(self, step: int) -> dict[str, bytes]:
        return self.tracked.files()

    def on_train_end(self, step: int, summary: Mapping[str, Any], error: BaseException | None) -> None:
        if self.run is None:  # the run failed before it began
            return
        self.run.summary["run"] = plain(summary)
        self.run.finish(exit_code=0 if error is None else 1)

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        """Under the step of ours: the client's counter may not fall, and a resumed run comes by some steps again."""
        self.run.log({**values, "step": step}, step=step)


def _start(about: Mapping[str, Any], mode: str) -> Any:
    """The client's run; offline where online fails, for what is not sent can be synced and what is not kept can't."""
    if mode not in ONLINE:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # else an offline run, too, calls the client's makers
    import wandb

    if mode in ONLINE:
        try:
            # Else init would ask for a key at a terminal, and wait.
            if not wandb.login(prompt=False, verify=False):
                raise ConnectionError("not logged in; run `wandb login`, or set WANDB_API_KEY")
            run = wandb.init(**about, mode=mode, resume="allow", settings=_settings())
            logger.warning("wandb: sent live to %s", run.url or "the server")
            return run
        except Exception as error:  # of the client: no network, no such entity, a key that is refused
            logger.warning("wandb: %s is not possible (%s)", mode, quoted(error))
            wandb.teardown()
            mode = "offline"
    run = wandb.init(**about, mode=mode, resume="allow", settings=_settings())
    if mode == "offline":
        folder = Path(str(run.dir)).parent
        logger.warning("wandb: offline; `wandb sync %s` sends it, WANDB_MODE=online would send it live", folder)
    return run


def _settings() -> Any:
    """What the environment leaves open: no copy of the terminal (log.txt has it), our one line, how long to wait."""
    import wandb

    ours = {"console": "off", "silent": True, **WAITS}
    return wandb.Settings(**{key: value for key, value in ours.items() if f"WANDB_{key.upper()}" not in os.environ})


@hookimpl
def moelab_observers() -> list[Component[Path, object]]:
    return [component("wandb", WandbOptions, WandbObserver)]
