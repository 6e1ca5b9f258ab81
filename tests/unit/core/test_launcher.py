"""What a launch remembers of its attempts, in the store that its agent keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from moelab import launcher


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """torchrun's, of two processes that may be started anew."""
    store = dist.HashStore()
    monkeypatch.setattr(launcher, "store", lambda: store)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": "2", "RANK": "0",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return store


def test_the_next_attempt_goes_on_in_the_folder_where_the_first_began(
    agent: dist.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launcher.begin(tmp_path / "mine")
    assert not launcher.has_begun(tmp_path / "mine")  # the first attempt itself: another run may lie there
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert launcher.has_begun(tmp_path / "mine")
    assert not launcher.has_begun(tmp_path / "other")


def test_a_mistake_is_said_by_the_first_that_finds_it_and_not_again(
    agent: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not launcher.was_said("no such key")
    monkeypatch.setenv("RANK", "0")
    assert launcher.was_said("no such key")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert launcher.was_said("no such key")
    assert not launcher.was_said("another")


def test_without_torchrun_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    launcher.begin(tmp_path)
    assert not launcher.has_begun(tmp_path)
    assert not launcher.was_said("no such key")
    assert (launcher.world(), launcher.rank(), launcher.attempt()) == (1, 0, 0)
