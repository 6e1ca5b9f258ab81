"""Code that a stranger's folder names, or that lies in it, does not run; what the user names or trusts does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = """
from dataclasses import dataclass
from pathlib import Path
import torch
import moelab

with open(Path(__file__).parent / "ran", "a") as file:
    file.write("import\\n")


@dataclass
class Options:
    pass


class First(torch.nn.Module):
    def __init__(self, options, context):
        super().__init__()
        self.k, self.experts = context.num_experts_per_tok, context.num_experts

    def forward(self, x, info):
        expert = torch.arange(self.k, device=x.device).expand(len(x), -1)
        weight = torch.full(expert.shape, 1 / self.k, device=x.device)
        return moelab.Routing.from_topk(expert, weight, self.experts, token_mask=info.mask)


@moelab.hookimpl
def moelab_routers():
    return [moelab.component("planted_first", Options, First)]
"""
TINY = [
    "model.moe.router={name: planted_first}", "model.moe.balance_losses=[]", "train.steps=1", "train.batch_size=2",
    "train.sequence_length=32", "evaluation.sequences=2", "evaluation.sample_tokens=0", "observers=[]",
    "data.source.domains=[legal]", "data.source.max_bytes_per_domain=60000",
]  # fmt: skip


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose config names a module that lies beside it, and libraries' names planted in the run."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "planted.py").write_text(PLUGIN)
    root = Path(__file__).resolve().parent.parent.parent
    (folder / "mine.yaml").write_text(f"base: {root / 'configs/train/tiny_moe.yaml'}\nplugins: [planted]\n")
    done = moelab(folder, "train", str(folder / "mine.yaml"), f"run_dir={folder / 'run'}", *TINY)
    assert done.returncode == 0, done.stderr
    (folder / "ran").unlink()
    for place in (folder, folder / "run", next((folder / "run" / "checkpoints").iterdir())):
        for name in ("triton", "colorama", "gmpy2", "tabulate", "IPython"):
            (place / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r})\n")
    return folder


def moelab(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "moelab", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


COMMANDS = {
    "generate": ["generate", "RUN", "--tokens", "2"],
    "evaluate": ["evaluate", "RUN"],
    "export": ["export", "RUN", "OUT"],
    "explain a run": ["explain", "RUN"],
    "explain its config": ["explain", "RUN/config.yaml"],
    "plan": ["plan", "RUN"],
    "train from its config": ["train", "RUN/config.yaml", "run_dir=OUT"],
    "train from its weights": ["train", "train/tiny_moe", "train.init_from=RUN", "run_dir=OUT", *TINY[1:]],
    "train anew": ["train", "RUN", "run_dir=OUT"],
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_command_refuses_what_the_folder_names_and_runs_nothing(stranger: Path, tmp_path: Path, what: str) -> None:
    arguments = [a.replace("RUN", str(stranger / "run")).replace("OUT", str(tmp_path / "out")) for a in COMMANDS[what]]
    done = moelab(tmp_path, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "planted" in done.stderr
    assert "--trust-plugins" in done.stderr
    assert not (stranger / "ran").exists(), (stranger / "ran").read_text()
    assert not (tmp_path / "out").exists()


def test_load_refuses_it_too(stranger: Path, tmp_path: Path) -> None:
    code = f"import moelab; moelab.load({str(stranger / 'run')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "CheckpointError" in done.stderr
    assert "planted" in done.stderr
    assert not (stranger / "ran").exists()


def test_compare_needs_none_of_it(stranger: Path, tmp_path: Path) -> None:
    done = moelab(tmp_path, "compare", str(stranger / "run"), "--output", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert not (stranger / "ran").exists()


def test_what_the_user_trusts_or_names_runs(stranger: Path, tmp_path: Path) -> None:
    run = str(stranger / "run")
    assert moelab(tmp_path, "generate", run, "--tokens", "2", "--trust-plugins").returncode == 0
    assert (stranger / "ran").read_text() == "import\n"
    (stranger / "ran").unlink()
    (tmp_path / "planted.py").write_text(PLUGIN)  # the user's own, where they stand
    done = moelab(tmp_path, "explain", run, "plugins=[planted]", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["layers"][0]["parts"]["router"]["owner"] == "planted"
    assert (tmp_path / "ran").exists()
    assert not (stranger / "ran").exists(), "the stored search_path is data"


def test_verify_refuses_the_plugins_of_an_upcycled_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "planted.py").write_text(PLUGIN)
    stored = {"plan": "x", "search_path": [str(tmp_path / "out")], "identity": {"plugins": ["planted"], "config": {}}}
    (tmp_path / "out" / "upcycle.json").write_text(json.dumps(stored))
    done = moelab(tmp_path, "verify", str(tmp_path / "out"), "--source", str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "planted" in done.stderr
    assert not (tmp_path / "out" / "ran").exists()
