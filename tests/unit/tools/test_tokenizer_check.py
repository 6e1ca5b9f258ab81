"""What transformers makes of a folder is a line of an export, whatever it raises on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab.data.tokenizer import load_tokenizer
from moelab_tools.tokenizer_check import check_auto_tokenizer


def test_a_limit_that_is_no_number_is_told_as_transformers_error(tmp_path: Path) -> None:
    """It is taken when the folder is read, and raises when a text is."""
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer("bytes")
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": {"a": 1}}))
    verdict = check_auto_tokenizer(tmp_path, tokenizer, 257)
    assert verdict is not None
    assert "TypeError" in verdict.error
