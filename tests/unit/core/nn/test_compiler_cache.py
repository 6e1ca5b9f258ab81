"""A folder that torch's compiler can't make ends no run that compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moelab.nn import compiler_cache

PROGRAM = """
import os, sys, torch
from moelab.nn.compiler_cache import ensure_compiler_cache
ensure_compiler_cache()
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""


def test_an_optimizer_is_built_where_the_compilers_folder_is_a_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    environment = os.environ | {compiler_cache.VARIABLE: str(taken), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert str(taken) in done.stderr
    assert "stands in for it" in done.stderr
    instead = Path(done.stdout.strip())
    assert instead.name.startswith("moelab_compiler_")
    assert not instead.exists()  # any more


def test_the_usual_folder_is_named_as_torch_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for name in ("someone", "a:b/c"):
        monkeypatch.setenv("LOGNAME", name)
        assert Path(default_cache_dir()).name == f"torchinductor_{compiler_cache._user()}"
