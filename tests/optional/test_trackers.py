"""The trackers' own clients, without a network: what they hold after a run and its resumption, and what fails gently.

`make test-extras` installs the clients and runs this; where one is missing it skips, unless MOELAB_REQUIRE_EXTRAS=1.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moelab import Registry, testing
from moelab.hookspecs import OBSERVERS

MISSING = [name for name in ("wandb", "trackio", "pyarrow") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(MISSING) and "MOELAB_REQUIRE_EXTRAS" not in os.environ, reason=f"not installed: {', '.join(MISSING)}"
)
SMALL = [
    "train.steps=4", "train.save_every=2", "train.log_every=1", "train.batch_size=2", "train.sequence_length=32",
    "evaluation.sequences=2", "evaluation.sample_tokens=4", "data.source.domains=[code_py]",
    "data.source.max_bytes_per_domain=60000", "name=tracked",
    "observers=[{name: wandb, project: kit}, {name: trackio}, {name: table, format: parquet}]",
]  # fmt: skip
# A wandb observer told of three steps by the trainer's own hands; argument 2: kill the client's service before them.
DRIVER = """
import logging, os, signal, subprocess, sys
from pathlib import Path
from moelab.registry import Registry
from moelab.training.observers import gather_observers
logging.basicConfig(format="%(message)s")
run = Path(sys.argv[1])
run.mkdir()
observers = gather_observers([{"name": "wandb"}], Registry(entry_points=False), run, [])
hook = observers.hook
hook.on_train_begin(run_dir=run, config={}, facts={"name": "x"}, step=0, checkpoint=None)
if sys.argv[2:] == ["kill"]:
    listed = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb"], capture_output=True, text=True).stdout
    assert listed, "no service to kill"
    [os.kill(int(pid), signal.SIGKILL) for pid in listed.split()]
for step in range(1, 4):
    hook.on_log(step=step, metrics={"train/loss": 1 / step}, loads={}, alarms=[], changes=[], backends=[])
hook.on_train_end(step=3, summary={"status": "finished"}, error=None)
print("dropped:", [one["error"] for one in observers.dropped])
"""


class Trap:
    """A proxy that answers nobody, and remembers who called."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._listen, daemon=True).start()

    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        return dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), url)

    def _listen(self) -> None:
        while True:
            try:
                caller, _ = self.socket.accept()
            except OSError:  # closed
                return
            self.calls.append(caller.recv(200))
            caller.close()


def home(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of somebody who is logged in nowhere."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_", "HF_"))}
    return kept | {"HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio")} | variables


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[bytes]]]:
    """A run of four steps whose last checkpoint was lost, gone on with from step 2 -> (folder, network calls)."""
    folder, trap = tmp_path_factory.mktemp("tracked"), Trap()
    command = [sys.executable, "-m", "moelab", "train", "train/tiny_moe", "run_dir=run", *SMALL]
    environment = home(folder, **trap.environment())
    for words in ([], ["--resume"]):
        done = subprocess.run(
            [*command, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "is dropped" not in done.stderr
        assert "wandb: offline; `wandb sync " in done.stderr
        if not words:
            (folder / "run/checkpoints/step_00000004").rename(folder / "lost")
    yield folder, trap.calls
    trap.socket.close()


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline file: seven bytes, then LevelDB's log format with Protobuf in it."""
    from wandb.proto import wandb_internal_pb2 as protocol

    content, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # the end of a block
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = protocol.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb_holds_config_metrics_and_summary_under_logs_names(resumed: tuple[Path, list[bytes]]) -> None:
    """Of one run, whichever process wrote it; each step under its own number."""
    folder, _ = resumed
    files = sorted(folder.glob("run/wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    logged = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    wanted = {(row["step"], tag): row[tag] for row in logged for tag in ("train/loss", "eval/loss") if tag in row}
    steps, found, ids = [], {}, set()
    for file in files:
        records = list(wandb_records(file))
        (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
        ids.add((run.run_id, run.project, run.display_name))
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["train"]["steps"] == 4
        assert config["facts"]["parameters"]["total"] > 0
        rows = [
            {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        assert all(row["step"] == row["_step"] for row in rows)
        steps.append([row["step"] for row in rows])
        found |= {(row["step"], tag): row[tag] for row in rows for tag in ("train/loss", "eval/loss") if tag in row}
    assert steps == [[0, 1, 2, 3, 4], [3, 4]]
    assert found == wanted
    assert [(project, name) for _, project, name in ids] == [("kit", "tracked")], "one run"
    summaries = [record.summary for record in records if record.WhichOneof("record_type") == "summary"]
    last = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for s in summaries for item in s.update}
    assert last["alarms"] == []
    assert (last["run"] if "run" in last else {"status": last["run.status"]})["status"] == "finished"


def test_trackio_holds_them_in_one_run(resumed: tuple[Path, list[bytes]]) -> None:
    folder, _ = resumed
    database = sqlite3.connect(folder / "trackio" / "moelab.db")
    rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    told = [(step, json.loads(metrics)) for _, step, metrics in rows]
    losses = [(step, numbers["train/loss"]) for step, numbers in told if "train/loss" in numbers]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 3, 4]
    assert losses[2:4] == losses[4:], "what was logged beyond the checkpoint comes again, and is the same"
    assert losses[-1][1] == json.loads((folder / "run/summary.json").read_text())["final"]["train/loss"]
    ((config,),) = database.execute("select distinct config from configs").fetchall()
    assert json.loads(config)["train"]["steps"] == 4
    assert told[-1][1]["summary"]["status"] == "finished"


def test_parquet_holds_each_step_once_with_config_and_summary(resumed: tuple[Path, list[bytes]]) -> None:
    from pyarrow import parquet

    folder, _ = resumed
    table = parquet.read_table(folder / "run/metrics.parquet")
    assert table["step"].to_pylist() == [0, 1, 2, 3, 4]
    logged = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert table["train/loss"].to_pylist()[1:] == [row["train/loss"] for row in logged if "train/loss" in row]
    about = {key.decode(): json.loads(value) for key, value in table.schema.metadata.items()}
    assert about["config"]["train"]["steps"] == 4
    assert about["summary"]["status"] == "finished"


def test_nobody_was_called(resumed: tuple[Path, list[bytes]]) -> None:
    assert resumed[1] == []


def drive(folder: Path, *words: str, **variables: str) -> tuple[str, str]:
    """(what was said, what was printed last) of the driver."""
    command = [sys.executable, "-c", DRIVER, str(folder / "run"), *words]
    done = subprocess.run(
        command, env=home(folder, **variables), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, done.stdout.splitlines()[-1]


def test_wandb_goes_on_offline_where_nobody_is_logged_in(tmp_path: Path) -> None:
    said, last = drive(tmp_path, WANDB_MODE="online")
    assert "wandb: online is not possible (not logged in; run `wandb login`, or set WANDB_API_KEY)" in said
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert last == "dropped: []"


def test_wandb_goes_on_offline_where_there_is_no_network(tmp_path: Path) -> None:
    """A port that nobody listens to; the wait is the variable's."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said, last = drive(
        tmp_path, WANDB_MODE="online", WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}",
        WANDB_INIT_TIMEOUT="2",
    )  # fmt: skip
    assert "wandb: online is not possible (" in said
    assert "refused" in said
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert last == "dropped: []"


def test_a_client_that_dies_is_dropped_and_the_run_goes_on(tmp_path: Path) -> None:
    """As of a full disk, or when the machine ends it for its memory."""
    said, last = drive(tmp_path, "kill")
    assert "it is dropped, and the run goes on without it" in said
    assert last.startswith("dropped: ['"), last  # by whichever error the client notices it first


def test_wandbs_own_variables_hold(tmp_path: Path) -> None:
    drive(tmp_path, WANDB_DIR=str(tmp_path), WANDB_RUN_ID="mine", WANDB_PROJECT="theirs", WANDB_NAME="other")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    (run,) = (record.run for record in wandb_records(file) if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == ("mine", "theirs", "other")
    (tmp_path / "disabled").mkdir()
    drive(tmp_path / "disabled", WANDB_MODE="disabled")
    assert not (tmp_path / "disabled" / "run" / "wandb").exists()


def test_a_full_disk_stops_trackio_and_not_the_run(tmp_path: Path) -> None:
    """Where its folder ought to be there is a file."""
    (tmp_path / "trackio").write_text("full")
    words = ["run_dir=run", *SMALL, "observers=[{name: trackio}]", "train.steps=2"]
    done = subprocess.run(
        [sys.executable, "-m", "moelab", "train", "train/tiny_moe", *words],
        cwd=tmp_path, env=home(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_conforms(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in home(tmp_path, WANDB_MODE="offline").items():
        monkeypatch.setenv(key, value)
    testing.check_observer(Registry(entry_points=False).components(OBSERVERS)[name])
