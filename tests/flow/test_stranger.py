"""A third party adds a router, from an installed package and from a plain module, with no change here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUTER = '''
"""Tokens go to the experts after their own id."""
from dataclasses import dataclass
import torch
import moelab

@dataclass
class Options:
    stride: int = 1  # distance between a token's experts

class ById(torch.nn.Module):
    """Experts by token id, equal weights."""
    def __init__(self, options, context):
        super().__init__()
        self.stride, self.k, self.experts = options.stride, context.num_experts_per_tok, context.num_experts

    def forward(self, x, info):
        steps = self.stride * torch.arange(self.k, device=x.device)
        expert = (info.token_id[:, None] + steps) % self.experts
        weight = torch.full(expert.shape, 1 / self.k, device=x.device)
        return moelab.Routing.from_topk(expert, weight, self.experts, token_mask=info.mask)

@moelab.hookimpl
def moelab_routers():
    return [moelab.component("by_id", Options, ById)]
'''
PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "stranger-routers"
version = "3.1.4"
[project.entry-points.moelab]
stranger = "stranger_routers"
[tool.hatch.build.targets.wheel]
packages = ["stranger_routers"]
"""
OVERRIDES = [
    "model.moe.router={name: by_id, stride: 3}", "model.moe.balance_losses=[]", "train.steps=2", "train.batch_size=2",
    "train.sequence_length=32", "evaluation.sequences=2", "evaluation.sample_tokens=0",
    "data.source.domains=[code_py]", "data.source.max_bytes_per_domain=60000",
]  # fmt: skip


def _moelab(root: Path, site: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if site is not None:
        environment["PYTHONPATH"] += os.pathsep + str(site)
    return subprocess.run(
        [sys.executable, "-m", "moelab", *arguments],
        cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real distribution, built into a wheel and installed into a folder of its own."""
    project = tmp_path_factory.mktemp("stranger")
    (project / "stranger_routers").mkdir()
    (project / "stranger_routers" / "__init__.py").write_text(ROUTER)
    (project / "pyproject.toml").write_text(PYPROJECT)
    python = [sys.executable, "-m"]
    subprocess.run(
        [*python, "build", "--wheel", "--no-isolation", "-o", "dist"], cwd=project, check=True, capture_output=True
    )
    wheel = next((project / "dist").glob("*.whl"))
    target = project / "site"
    install = [*python, "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def test_an_installed_package_is_found_by_its_entry_point(root: Path, site: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = _moelab(root, site, "train", "configs/train/tiny_moe.yaml", f"run_dir={run}", *OVERRIDES)
    assert outcome.returncode == 0, outcome.stderr
    assert '"stranger-routers": "3.1.4"' in (run / "summary.json").read_text()


def test_it_is_listed_with_its_owner_options_and_doc(root: Path, site: Path) -> None:
    listing = _moelab(root, site, "plugins", "--json")
    assert listing.returncode == 0, listing.stderr
    for word in ("by_id", "stranger_routers", "stride", "Experts by token id, equal weights."):
        assert word in listing.stdout


def test_entry_points_can_be_left_out(root: Path, site: Path, tmp_path: Path) -> None:
    arguments = ["configs/train/tiny_moe.yaml", f"run_dir={tmp_path / 'run'}", "entry_points=false", *OVERRIDES]
    outcome = _moelab(root, site, "train", *arguments)
    assert outcome.returncode == 2
    assert "no router 'by_id'" in outcome.stderr


def test_a_plain_module_beside_the_config_is_enough(root: Path, tmp_path: Path) -> None:
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "routers.py").write_text(ROUTER)
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {root / 'configs/train/tiny_moe.yaml'}\nplugins: [my_lab.routers]\n")
    run = tmp_path / "run"
    outcome = _moelab(root, None, "train", str(config), f"run_dir={run}", *OVERRIDES)
    assert outcome.returncode == 0, outcome.stderr
    loaded = _moelab(root, None, "generate", str(run), "--tokens", "4", "--trust-plugins")
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import moelab\n@moelab.hookimpl\ndef moelab_ruoters():\n    return []\n", ["moelab_ruoters"]),
        ("import numpie\n", ["numpie", "not installed"]),
        ("def broken(:\n", ["my_plugin", "syntax"]),
        (ROUTER.replace('"by_id"', '"softmax_topk"'), ["softmax_topk", "my_plugin", "overrides=True"]),
    ],
)
def test_a_broken_plugin_is_named(root: Path, tmp_path: Path, source: str, words: list[str]) -> None:
    (tmp_path / "my_plugin.py").write_text(source)
    config = tmp_path / "mine.yaml"
    config.write_text(f"base: {root / 'configs/train/tiny_moe.yaml'}\nplugins: [my_plugin]\n")
    outcome = _moelab(root, None, "train", str(config), f"run_dir={tmp_path / 'run'}")
    assert outcome.returncode == 2, outcome.stderr
    assert len(outcome.stderr.strip().splitlines()) == 1, outcome.stderr
    for word in words:
        assert word in outcome.stderr
