"""The command line from a checkpoint that transformers made to one that transformers reads; kills and memory."""

from __future__ import annotations

import json
import random
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dense_checkpoints import Tiny, read_all, write_dense
from later_keys import later
from moelab.components import came_later
from moelab.config.upcycle import RecipeConfig
from moelab.data.lineage import lineage_of
from moelab.errors import ConfigError
from moelab_tools import cli
from moelab_upcycling.initialisers.experts.qwen2 import Qwen2Options
from moelab_upcycling.writer import BUFFER, BUFFERS

transformers = pytest.importorskip("transformers")

SCALED = [
    "model.vocab_size=500",
    "model.moe.layout.moe_intermediate_size=80",
    "model.moe.shared_expert.intermediate_size=640",
]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "moelab", *map(str, arguments)]


def run(*arguments: object, **keys: Any) -> subprocess.CompletedProcess[str]:
    """As a process of its own."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, **keys)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command line without a process, since importing torch and transformers takes seconds."""
    words = [str(argument) for argument in arguments]
    capsys.readouterr()
    code = cli.run(words)
    printed = capsys.readouterr()
    return subprocess.CompletedProcess(words, code, printed.out, printed.err)


def recipe(source: Path, output: Path, *overrides: str, workers: int = 1) -> list[str]:
    folders = (f"source={source}", f"output={output}", f"workers={workers}")
    return ["upcycle", "upcycle/qwen2_57b_a14b", *folders, *SCALED, *overrides]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random biases and norms: on a freshly initialised model many mistakes are invisible."""
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=512, hidden_size=56, intermediate_size=592, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.15, mean=1.0 if "norm" in name else 0.0)
    folder = tmp_path_factory.mktemp("flow") / "dense"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense_logits(dense: Path) -> torch.Tensor:
    return logits(dense)


def logits(folder: Path) -> torch.Tensor:
    """By transformers, which must find every tensor it wants and no other. -> [2, 24, V]"""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(48).reshape(2, 24) * 7 % 500
    with torch.inference_mode():
        return model(tokens).logits[..., :500]


@pytest.mark.parametrize(
    ("overrides", "exact"),
    [
        (["recipe.silence=0"], True),  # I11
        (["recipe.silence=0", "recipe.shared.name=dup"], True),
        ([], False),
        (  # I9: whole copies, weights that sum to one, and a silent shared expert
            ["model.moe.layout.moe_intermediate_size=592", "model.moe.layout.num_experts=4",
             "model.moe.layout.num_experts_per_tok=2", "model.moe.router.norm_topk_prob=true",
             "recipe.experts.name=sparse", "recipe.shared.name=zero"],
            True,
        ),
        (  # I10: virtual groups give half, the shared expert the other half
            ["recipe.experts.name=virtual_group", "recipe.router.name=tied_groups", "recipe.scaling.name=virtual_group",
             "model.moe.router.norm_topk_prob=true"],
            True,
        ),
    ],
    ids=["silenced", "silenced-dup", "default", "sparse", "virtual_group"],
)  # fmt: skip
def test_transformers_computes_the_dense_models_logits(
    dense: Path, dense_logits: torch.Tensor, tmp_path: Path, capsys, overrides: list[str], exact: bool
):
    done = run_here(capsys, *recipe(dense, tmp_path / "out", *overrides))
    assert done.returncode == 0, done.stderr
    before, after = dense_logits, logits(tmp_path / "out")
    difference = float((before - after).abs().max() / before.abs().max())
    assert (difference < 1e-5) if exact else (1e-4 < difference < 1)
    receipt = json.loads((tmp_path / "out/upcycle_receipt.json").read_text())
    assert len(receipt["layers"]) == 2
    assert (receipt["kl"] < 1e-8) == exact
    assert (receipt["start"] == "dense") == exact
    assert ("start: dense" in done.stdout) == exact, "what was promised is what is measured"


def test_the_command_says_what_it_did_and_verify_agrees(dense: Path, tmp_path: Path, capsys):
    done = run_here(capsys, *recipe(dense, tmp_path / "out"))
    assert re.search(r"content sha256 [0-9a-f]{64} of 415 of 415 tensors", done.stdout)
    assert "top-1 agreement" in done.stdout
    assert run_here(capsys, "verify", tmp_path / "out", "--source", dense, "--full").returncode == 0
    shard = tmp_path / "out/model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    wrong = run_here(capsys, "verify", tmp_path / "out", "--source", dense, "--full")
    assert wrong.returncode == 1
    assert f"byte {len(data) - 5}: 'model.layers.0.mlp.experts.63.down_proj.weight'" in wrong.stderr


def test_a_dry_run_and_a_hash_sink_leave_nothing(dense: Path, tmp_path: Path, capsys):
    dry = run_here(capsys, *recipe(dense, tmp_path / "out"), "--dry-run")
    assert "sliced: rows 512 -> 500" in dry.stdout
    hashed = run_here(capsys, *recipe(dense, tmp_path / "out"), "--sink", "hash")
    assert not (tmp_path / "out").exists()
    made = run_here(capsys, *recipe(dense, tmp_path / "out"), "--no-receipt")
    (first,), (second,) = (re.findall("content sha256 ([0-9a-f]+)", d.stdout) for d in (hashed, made))
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["source=nowhere"], "nowhere"),
        (["recipe.experts.reinit_fractoin=0.3"], "did you mean 'reinit_fraction'"),
        (["model.vocab_size=600"], "model.vocab_size=512 or fewer"),
        (["sed=1"], "did you mean 'seed'"),
        (["model.moe.layout.num_experts_per_tok=65"], "exceeds num_experts 64"),
        (["--layers", "2:9"], "not within the layers 0:2"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    dense: Path, tmp_path: Path, capsys, arguments: list[str], words: str
):
    done = run_here(capsys, *recipe(dense, tmp_path / "out"), *arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_process_ends_with_the_same_exit_code(dense: Path, tmp_path: Path):
    done = run(*recipe(dense, tmp_path / "out"), "sed=1")
    assert done.returncode == 2
    assert "did you mean 'seed'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(dense: Path, tmp_path: Path, capsys):
    """Four kills with SIGKILL, one with SIGTERM, at random moments of many shards, by one or two workers."""
    size = "max_shard_size=80KB"
    assert run_here(capsys, *recipe(dense, tmp_path / "whole", size), "--no-receipt").returncode == 0
    out, chance, stopped = tmp_path / "out", random.Random(0), 0
    for number in range(5):
        process = subprocess.Popen(
            command(*recipe(dense, out, size, workers=2 - number % 2), "--no-receipt"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        wanted = len(list(out.glob("model-*"))) + chance.randint(1, 6)
        while len(list(out.glob("model-*"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM if number == 2 else signal.SIGKILL)
        if process.wait() == 0:  # on a busy machine the watcher may come too late
            break
        stopped += 1
        assert not (out / "model.safetensors.index.json").exists()
        if number == 2:
            assert not list(out.glob(".*partial"))
    assert stopped
    done = run_here(capsys, *recipe(dense, out, size), "--no-receipt")
    assert done.returncode == 0, done.stderr
    kept = float(re.findall(r"([0-9.]+) GB verified and kept", done.stdout)[0])
    assert kept > 0
    first, second = read_all(tmp_path / "whole"), read_all(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    index = "model.safetensors.index.json"
    assert (tmp_path / "whole" / index).read_bytes() == (out / index).read_bytes()
    assert not list(out.glob(".*partial"))


LIGHT = """
import sys
from moelab.errors import ConfigError
from moelab_tools import cli
code = cli.run(sys.argv[1:])
assert "torch" not in sys.modules
sys.exit(code)
"""
PEAK = """
import moelab_tools.upcycling
for line in open("/proc/self/status"):
    if line.startswith("VmPeak:"):
        print(int(line.split()[1]) << 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_it_works_under_a_hard_memory_limit_without_torch(
    heavy_stranger: Path, dense: Path, tmp_path: Path, workers: int
):
    """The address space that Python and numpy take here, and 384 MB: 250 are used, torch would add 480 and more.

    Also where an installed package's entry point imports torch, to offer what upcycling has no use for.
    """
    imported = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    limit = int(imported.stdout) + (384 << 20)
    arguments = recipe(dense, tmp_path / "out", workers=workers)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments, "--no-receipt"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors.index.json").exists()


PLUGIN = '''
"""Experts that are the first neurons of the dense FFN, turned upside down."""
from dataclasses import dataclass
import numpy as np
import moelab
from moelab.initialisers import MATRICES, NeuronPlan

@dataclass
class Options:
    factor: float = -1.0

class Upside:
    def __init__(self, options, context):
        self.options, self.width = options, context.layout.moe_intermediate_size

    def plan(self, expert):
        nothing = np.zeros(self.width, dtype=bool)
        return NeuronPlan(np.arange(self.width, dtype=np.int32), dict.fromkeys(MATRICES, nothing))

    def materialise(self, plan, expert, matrix, dense):
        return dense.float32(plan.source) * np.float32(self.options.factor)

@moelab.hookimpl
def moelab_expert_initialisers():
    return [moelab.component("upside_down", Options, Upside)]
'''


def test_a_strangers_initialiser_runs_in_every_worker(dense: Path, tmp_path: Path):
    """From a module beside the config file, with no change here; verify finds it again."""
    (tmp_path / "upside.py").write_text(PLUGIN)
    config = tmp_path / "mine.yaml"
    config.write_text(
        "base: upcycle/qwen2_57b_a14b\nplugins: [upside]\nrecipe: {experts: {name: upside_down, factor: -0.5}}\n"
    )
    arguments = [f"source={dense}", f"output={tmp_path / 'out'}", "workers=2", *SCALED]
    done = run("upcycle", config, *arguments, "--no-receipt")
    assert done.returncode == 0, done.stderr
    made, source = read_all(tmp_path / "out"), read_all(dense)
    name = "model.layers.1.mlp.experts.9.down_proj.weight"
    assert torch.equal(made[name], -0.5 * source["model.layers.1.mlp.down_proj.weight"][:, :80])
    assert run("verify", tmp_path / "out", "--source", dense, "--trust-plugins", cwd=tmp_path).returncode == 0


MEASURE = """
import sys
from moelab.errors import ConfigError
from moelab_tools import cli
assert cli.run(sys.argv[1:]) == 0
for line in open("/proc/self/status"):  # getrusage's maximum is at least the memory of the process that started this
    if line.startswith("VmHWM:"):
        print(int(line.split()[1]) >> 10)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_layers_or_shards(tmp_path: Path):
    """40 layers of 4 MB each, in MB of peak memory; held, they or one large shard would add 150 and more."""
    peaks = {}
    few = ["model.vocab_size=64", "model.moe.layout.num_experts=8", "model.moe.layout.moe_intermediate_size=592"]
    sources = {layers: write_dense(tmp_path / f"dense{layers}", Tiny(hidden=128, layers=layers)) for layers in (2, 40)}
    for layers, size in ((2, "5GB"), (40, "5GB"), (40, "2MB")):
        source = sources[layers]
        output = tmp_path / f"out{layers}{size}"
        arguments = recipe(source, output, f"max_shard_size={size}", *few)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments, "--no-receipt"], capture_output=True, text=True, check=True
        )
        peaks[layers, size] = int(done.stdout.split()[-1])
        assert sum(path.stat().st_size for path in output.glob("*.safetensors")) > layers * 3_900_000
    buffers = BUFFERS * BUFFER >> 20  # a large shard fills them
    assert max(peaks.values()) - min(peaks.values()) < buffers + 25, peaks


@pytest.mark.parametrize(
    "source",
    [
        "moelab_routers = 1 / 0",
        "import moelab\n\n@moelab.hookimpl\ndef moelab_routers():\n    return 1 / 0",
        "import moelab\n\n@moelab.hookimpl\ndef moelab_ruoters():\n    return []",
    ],
)
def test_the_receipt_is_made_without_an_installed_package_that_is_broken(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
):
    """It has nothing for upcycling, and nothing that the model is built of."""
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moelab]\nplugin = broken_lab\n")
    (tmp_path / "broken_lab.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = run_here(capsys, *recipe(dense, tmp_path / "out"))
    assert made.returncode == 0, made.stderr
    told = [line for line in made.stderr.splitlines() if "made without an installed package" in line]
    assert len(told) == 1
    assert "broken" in told[0]
    assert (tmp_path / "out/upcycle_receipt.json").exists()


def test_what_stops_the_receipt_leaves_the_model_whole_and_says_so(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The receipt's text can't be read as the config says."""
    probe = "moelab_tools.upcycling.probe_of"
    monkeypatch.setattr(probe, mock.Mock(side_effect=ConfigError("receipt.source: nothing to read")))
    made = run_here(capsys, *recipe(dense, tmp_path / "out"))
    assert made.returncode == 2
    assert "nothing to read" in made.stderr
    assert f"The model in {tmp_path / 'out'} is whole" in made.stderr
    assert (tmp_path / "out/model.safetensors.index.json").exists()
    assert not (tmp_path / "out/upcycle_receipt.json").exists()


def test_what_the_receipt_lacks_is_told_before_the_conversion_begins(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for wrong, words in (("name=embeded", "no data source 'embeded'"), ("max_bytes=3", "no such option")):
        refused = run_here(capsys, *recipe(dense, tmp_path / "out", f"receipt.source.{wrong}"))
        assert refused.returncode == 2
        assert words in refused.stderr
        assert refused.stderr.endswith("or leave the receipt out with --no-receipt\n")
        assert not (tmp_path / "out").exists()


def test_a_conversion_goes_on_under_a_key_and_an_option_that_came_later(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = [*recipe(dense, tmp_path / "out"), "--no-receipt"]
    assert run_here(capsys, *words, "--layers", "0:1").returncode == 0
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    begun, hash_then = shard.stat().st_mtime_ns, json.loads((tmp_path / "out/upcycle.json").read_text())["plan"]
    assert run_here(capsys, *recipe(dense, tmp_path / "before"), "--no-receipt").returncode == 0
    with (
        later(RecipeConfig, "later", "float", field(default=0.5, metadata=came_later(0.5))),
        later(Qwen2Options, "later_option", "int", field(default=3, metadata=came_later(3))),
    ):
        refused = run_here(capsys, *words, "recipe.later=2")
        assert refused.returncode == 2
        assert "'later': 0.5" in refused.stderr  # there
        done = run_here(capsys, *words)
        assert done.returncode == 0, done.stderr
        assert run_here(capsys, "verify", tmp_path / "out", "--source", dense).returncode == 0
    assert shard.stat().st_mtime_ns == begun
    lines = (tmp_path / "out/upcycle_manifest.jsonl").read_text().splitlines()
    assert {json.loads(line)["plan"] for line in lines} == {hash_then}
    assert lineage_of(tmp_path / "out", "") == lineage_of(tmp_path / "before", ""), "a repetition of what there was"
    other = json.loads((tmp_path / "out/upcycle.json").read_text())
    other["identity"]["seed"] += 1  # it no longer says what it was begun by
    (tmp_path / "out/upcycle.json").write_text(json.dumps(other))
    with later(RecipeConfig, "later", "float", 0.5):
        assert run_here(capsys, *words).returncode == 2
