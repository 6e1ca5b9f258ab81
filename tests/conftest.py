"""Fixed seeds, a thread count from outside, subprocesses that find the sources, and tests in another order.

`--shuffle SEED` shuffles the files, and the tests within each: a file's tests stay together, so that what a module
fixture makes is made once. No seed of a test depends on it.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from moelab.kernels import onednn

ROOT = Path(__file__).resolve().parent.parent
SOURCES = os.pathsep.join(str(ROOT / folder) for folder in ("core", "plugins", "upcycling", "tools"))
THREADS = os.environ.get("OMP_NUM_THREADS", "1")
INHERITED = os.environ.get("PYTHONPATH")  # `make test-elsewhere` has a package there
torch.set_num_threads(int(THREADS))  # for what a module's fixture makes before its first test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run files, and the tests of each, in an order of this seed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("shuffle")
    if seed is None:
        return
    chance = random.Random(seed)
    place = {path: chance.random() for path in dict.fromkeys(item.path for item in items)}
    items.sort(key=lambda item: (place[item.path], chance.random()))


@pytest.fixture(autouse=True)
def _fixed(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(int(THREADS))
    torch.manual_seed(0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (SOURCES, INHERITED))))
    monkeypatch.setenv("OMP_NUM_THREADS", THREADS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))  # not the user's


@pytest.fixture(autouse=True)
def _planted_modules_are_forgotten(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test wrote and imported is not found by the next one that writes a module of the same name."""
    before = set(sys.modules)
    yield
    written = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        spec = getattr(sys.modules[name], "__spec__", None)
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if any(str(place).startswith(written) for place in places):
            del sys.modules[name]


@pytest.fixture
def root() -> Path:
    return ROOT


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Mapping[str, str]], None]]:
    """Makes kernels believe that /proc/cpuinfo says this."""

    def pretend(lines: Mapping[str, str]) -> None:
        onednn.onednn_is_wider.cache_clear()
        monkeypatch.setattr(onednn, "cpu_lines", lambda: lines)

    yield pretend
    onednn.onednn_is_wider.cache_clear()


@pytest.fixture
def zen_5(processor: Callable[[Mapping[str, str]], None]) -> None:
    """A processor on which oneDNN's vectors are wider than MKL's."""
    processor({"vendor_id": "AuthenticAMD", "cpu family": "26", "flags": "avx512f"})


@pytest.fixture
def zen_4(processor: Callable[[Mapping[str, str]], None]) -> None:
    """One on which they are no wider."""
    processor({"vendor_id": "AuthenticAMD", "cpu family": "25", "flags": "avx512f"})


@pytest.fixture
def heavy_stranger(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a `moelab` entry point that imports torch is installed, for subprocesses and here."""
    site = ROOT / "tests" / "elsewhere"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((os.environ["PYTHONPATH"], str(site))))
    monkeypatch.syspath_prepend(str(site))
    return site
