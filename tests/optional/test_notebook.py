"""Cells in a real Jupyter kernel. Only where nbclient, ipykernel and ipywidgets are installed: README.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="needs ipykernel")
pytest.importorskip("ipywidgets", reason="needs ipywidgets")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
nbformat = pytest.importorskip("nbformat", reason="needs nbformat")

SMALL = [
    "train/tiny_moe", "train.steps=4", "train.batch_size=4", "train.sequence_length=32", "train.log_every=2",
    "evaluation.sequences=4", "evaluation.sample_tokens=4", "data.source.domains=[code_py]",
    "data.source.max_bytes_per_domain=60000",
]  # fmt: skip


def _run(*cells: str) -> Any:
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


@pytest.fixture(autouse=True)
def _kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of this very Python, wherever others are registered."""
    folder = tmp_path / "jupyter" / "kernels" / "python3"
    folder.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (folder / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "test", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_a_notebook_shows_the_bar_the_numbers_and_the_result(tmp_path: Path) -> None:
    arguments = [*SMALL, f"run_dir={tmp_path / 'run'}"]
    code = f"from moelab import session\nrun = session.train(*{arguments!r})"
    training, shown, texts = _run(code, "run", "run.model.generate(['import ', 'def '], 4)").cells
    drawn = [output["data"] for output in training.outputs if output.output_type == "display_data"]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in drawn), "a bar"
    assert any("held-out: loss" in data["text/plain"] for data in drawn)
    assert "finished at step 4; held-out" in shown.outputs[-1]["data"]["text/plain"]
    assert texts.outputs[-1]["data"]["text/plain"].startswith("['import ")
