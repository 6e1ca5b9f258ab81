"""Debian packages as a source, where the package that reads them is not installed."""

from __future__ import annotations

import sys

import pytest

from moelab import ConfigError, DataContext, Registry
from moelab.data.byte_tokenizer import ByteTokenizer
from moelab.hookspecs import DATA_SOURCES


def test_what_must_be_installed_is_said_before_a_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arpy", None)
    part = {"name": "debian", "packages": {"nowhere.deb": "0" * 64}}
    with pytest.raises(
        ConfigError, match=r"needs the package arpy, which is not installed: pip install 'moelab\[debian\]'"
    ):
        Registry(entry_points=False).build(DATA_SOURCES, part, DataContext(ByteTokenizer()), "data.source")
