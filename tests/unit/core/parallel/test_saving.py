"""A model in pieces: built, read and saved by four processes of which none holds the whole, and read by any number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import moelab
import spread_models as spread
from moelab.checkpoint import CHECKPOINTS, MODEL, TRAINING, OwnWeights, checkpoints, stored_tensors
from moelab.errors import CheckpointError
from moelab.hf.save import save_hf
from moelab.integrity import inspect, newest_whole, verified
from moelab.training.checkpoint import restore_checkpoint
from processes import run_on


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which four processes saved, and what they found; what one process has beside it."""
    folder = tmp_path_factory.mktemp("saved")
    registry = moelab.Registry(entry_points=False)
    source = moelab.build_model(spread.config_of("softmax_global"), registry, seed=3)
    save_hf(source, folder / "hf", dtype=spread.grid.PRECISION.dtype, max_shard_size=20_000)
    wanted = {"read from Hugging Face": spread.digest(source), "read from one": spread.alone_state(folder / "alone")}
    for name in ("softmax_global", "noisy", "sigmoid_bias", "unlike"):
        wanted[f"drawn {name}"] = spread.digest(moelab.build_model(spread.config_of(name), registry, seed=1))
    ranks = run_on(4, spread.saves, folder / "processes", str(folder), str(folder / "hf"), str(folder / "alone"))
    assert all(found == ranks[0] for found in ranks)
    return folder, {"found": ranks[0], "wanted": wanted}


def test_each_process_fills_its_pieces_with_the_numbers_of_one(saved: tuple[Path, dict[str, Any]]) -> None:
    found, wanted = saved[1]["found"], saved[1]["wanted"]
    for key, tensors in wanted.items():
        assert found[key] == tensors, key


@pytest.mark.parametrize("mesh", list(spread.GO_ON))
def test_what_one_mesh_saved_any_mesh_and_one_process_restore(mesh: str, saved: tuple[Path, dict[str, Any]]) -> None:
    folder, found = saved[0], saved[1]["found"]
    for other in spread.GO_ON[mesh]:
        assert found[f"{mesh} to {other}"] == found[mesh], other
    assert found[f"{mesh} resumed"] == found[f"{mesh} went on"]
    model, training = spread.fresh(None, 7)
    restore_checkpoint(folder / mesh, model, training)
    assert spread.digest(model, training) == found[mesh]
    assert not inspect(folder / mesh).problems
    assert {path.name for path in (folder / mesh).glob("*.safetensors")} == {
        f"{kind}-{rank:05d}-of-00004.safetensors" for kind in ("model", "training") for rank in range(1, 5)
    }


def test_the_pieces_are_plain_safetensors_that_hold_each_number_once(saved: tuple[Path, dict[str, Any]]) -> None:
    folder = saved[0] / "replicas"
    files = [load_file(path) for path in sorted(folder.glob("model-*.safetensors"))]
    whole = {name: stored.read() for name, stored in stored_tensors(folder, MODEL).items()}
    assert sum(t.numel() for file in files for t in file.values()) == sum(t.numel() for t in whole.values())
    assert max(sum(t.numel() for t in file.values()) for file in files) < 0.4 * sum(t.numel() for t in whole.values())


def test_in_the_background_the_numbers_of_that_moment_are_written(saved: tuple[Path, dict[str, Any]]) -> None:
    found = saved[1]["found"]
    assert found["behind read"] == found["behind"]


def test_a_save_that_fails_on_one_process_fails_on_all_and_leaves_nothing(saved: tuple[Path, dict[str, Any]]) -> None:
    folder, found = saved[0], saved[1]["found"]
    assert "No space left on device" in found["full"]
    assert found["full"].endswith("(rank 2)")
    assert not list(folder.glob("*full*"))


def test_a_killed_save_has_no_folder_of_its_name(saved: tuple[Path, dict[str, Any]]) -> None:
    folder = saved[0]
    assert not (folder / "killed").exists()
    assert not (folder / ".killed.partial" / "manifest.json").exists()


def test_it_is_exported_tensor_by_tensor(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """From the files of four processes as from one, with no model in memory."""
    model = moelab.build_model(spread.config_of("softmax_global"), moelab.Registry(entry_points=False), seed=3)
    save_hf(model, tmp_path / "whole", max_shard_size=20_000)
    hollow = moelab.build_model(spread.config_of("softmax_global"), device="meta", seed=None)
    save_hf(hollow, tmp_path / "read", max_shard_size=20_000, weights=OwnWeights(saved[0] / "exported"))
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "read").iterdir())
    for name in files:
        assert (tmp_path / "read" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


MIDDLE = "model-00003-of-00004.safetensors"


def _remove(folder: Path, other: Path) -> None:
    (folder / MIDDLE).unlink()


def _cut(folder: Path, other: Path) -> None:
    content = (folder / MIDDLE).read_bytes()
    (folder / MIDDLE).write_bytes(content[:-8])


def _swap(folder: Path, other: Path) -> None:
    second = folder / "model-00002-of-00004.safetensors"
    content = second.read_bytes()
    second.write_bytes((folder / MIDDLE).read_bytes())
    (folder / MIDDLE).write_bytes(content)


def _stale(folder: Path, other: Path) -> None:
    shutil.copyfile(other / MIDDLE, folder / MIDDLE)


def _extra(folder: Path, other: Path) -> None:
    save_file(load_file(folder / MIDDLE), folder / "model-00005-of-00005.safetensors")


def _whole_beside(folder: Path, other: Path) -> None:
    save_file(load_file(folder / MIDDLE), folder / MODEL)


def _pickle(folder: Path, other: Path) -> None:
    (folder / "__0_0.distcp").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_remove, MIDDLE),
        (_cut, MIDDLE),
        (_swap, "model-00002-of-00004.safetensors"),
        (_stale, MIDDLE),
        (_extra, "model-00005-of-00005.safetensors"),
        (_whole_beside, MODEL),
        (_pickle, ".metadata"),
    ],
)
def test_a_file_that_is_not_as_written_is_named(
    damage: Callable[[Path, Path], None], named: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0] / "expert2", tmp_path / "step")
    damage(tmp_path / "step", saved[0] / "behind")
    assert any(problem.startswith(f"{named}: ") for problem in inspect(tmp_path / "step").problems)


def test_a_folder_of_pickles_is_refused_unopened(tmp_path: Path) -> None:
    """As torch's distributed checkpoint leaves one."""
    _pickle(tmp_path, tmp_path)
    with pytest.raises(CheckpointError, match=r"\.metadata, __0_0\.distcp there is not opened: a pickle runs code"):
        moelab.load(tmp_path)


def test_processes_that_go_on_read_a_checkpoint_once_and_hear_the_same_of_it(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number, source in enumerate(("expert2", "behind", "replicas")):
        shutil.copytree(saved[0] / source, run / CHECKPOINTS / f"step_{number:08d}")
    oldest, middle, newest = checkpoints(run)
    _remove(newest, oldest)
    content = bytearray((newest / "training-00001-of-00004.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "training-00001-of-00004.safetensors").write_bytes(content)
    wanted = newest_whole(run)
    assert wanted.folder == middle
    with pytest.raises(CheckpointError) as refused:
        verified(newest)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = run_on(3, spread.goes_on, tmp_path / "processes", str(run), store.port)
    assert {one["choice"] for one in found} == {repr(wanted)}
    assert {one["refused"] for one in found} == {str(refused.value)}
    total = sum(one["read"] for one in found)  # of the middle one, whole, each time it is looked at
    assert total == spread.bytes_of(middle)
    assert max(one["read"] for one in found) < 0.45 * total


@pytest.mark.parametrize("damage", [_remove, _cut])
def test_unverified_too_a_missing_or_short_file_is_refused_by_name(
    damage: Callable[[Path, Path], None], saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(saved[0] / "expert2", tmp_path / "step")
    damage(tmp_path / "step", saved[0])
    with pytest.raises(CheckpointError, match=MIDDLE):
        stored_tensors(tmp_path / "step", MODEL)
    assert stored_tensors(tmp_path / "step", TRAINING)
