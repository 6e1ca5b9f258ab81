"""The wheel, installed away from the checkout, finds its configs and plugins."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_the_installed_wheel_trains_a_shipped_config(root: Path, tmp_path: Path) -> None:
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "build", "--wheel", "--no-isolation", "-o", str(tmp_path), str(root)], check=True, capture_output=True
    )
    assert next(tmp_path.glob("*.whl")).stat().st_size < 2_000_000
    site = tmp_path / "site"
    install = [*python, "pip", "install", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(next(tmp_path.glob("*.whl")))], check=True, capture_output=True)
    assert sorted(p.name for p in site.iterdir() if p.name.startswith("moelab") and "dist-info" not in p.name) == [
        "moelab", "moelab_plugins", "moelab_tools", "moelab_upcycling",
    ]  # fmt: skip
    outcome = subprocess.run(
        [*python, "moelab", "train", "train/tiny_moe", "run_dir=run", "train.steps=1", "evaluation.sequences=2",
         "data.source.domains=[code_py]"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "run" / "summary.json").is_file()
    new = [*python, "moelab", "new", "observer", "watching"]
    environment = os.environ | {"PYTHONPATH": str(site)}
    outcome = subprocess.run(new, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr
    kit = [*python, "pytest", "-q", "watching"]
    outcome = subprocess.run(kit, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout
