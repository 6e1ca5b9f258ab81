"""examples/plugin_package, the template of `moelab new`, built, installed and used for real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moelab_tools.new_package import kinds

TEMPLATE = Path(__file__).resolve().parents[2] / "examples" / "plugin_package"
PYTHON = [sys.executable, "-m"]


def run(*words: str, cwd: Path, site: Path | None = None) -> str:
    path = os.environ["PYTHONPATH"] + (f"{os.pathsep}{site}" if site else "")
    done = subprocess.run(
        [*PYTHON, *words], cwd=cwd, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What pip makes of a copy."""
    shutil.copytree(TEMPLATE, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__", "runs", ".*"))
    run("build", "--wheel", "--no-isolation", "-o", "dist", cwd=tmp_path / "copy")
    wheel = next((tmp_path / "copy" / "dist").glob("*.whl"))
    run("pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "site"), str(wheel), cwd=tmp_path)
    return tmp_path / "site"


def test_the_installed_package_passes_its_tests_is_listed_and_trains(site: Path, tmp_path: Path) -> None:
    away = tmp_path / "away"
    shutil.copytree(TEMPLATE / "tests", away / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(TEMPLATE / "data_source.csv", away)
    run("pytest", "-q", "-p", "no:cacheprovider", cwd=away, site=site)
    entries = json.loads(run("moelab", "plugins", "--json", cwd=away, site=site))
    listed = {(entry["extension_point"].replace(" ", "_"), entry["name"], entry["owner"]) for entry in entries}
    assert {(kind, f"my_{kind}", f"my_plugin.{kind}") for kind in kinds()} <= listed
    chosen = ["model.moe.router.name=my_router", "model.moe.layout={name: my_expert_layout}",
              "model.moe.shared_expert={name: my_shared_expert}", "model.moe.backend.name=my_expert_backend",
              "model.moe.balance_losses=[{name: my_balance_loss}]", "observers=[{name: my_observer}]",
              "model.attention={name: my_attention}", "model.rope_scaling={name: my_rope_scaling}",
              "data.source={name: my_data_source, file: data_source.csv}"]  # fmt: skip
    small = ["train.steps=2", "train.batch_size=2", "train.sequence_length=32", "evaluation.sequences=2"]
    run("moelab", "train", "train/tiny_moe", "run_dir=run", *chosen, *small, cwd=away, site=site)
    assert json.loads((away / "run" / "best.json").read_text())["metric"] == "eval/loss"
