"""A second reader: llama.cpp reads what `moelab upcycle` and `moelab export` write and computes our logits.

Only with MOELAB_LLAMA_CPP=FOLDER, a build by setup_llama_cpp.sh; README.md has the commands.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

import moelab
from moelab import session
from moelab_tools.exporting import export
from moelab_tools.qwen2_tokenizer import CONFIG, build_tokenizer

pytest.importorskip("transformers")
from parity.reference import DENSE, MOE, load_reference, reference_model

BUILD = os.environ.get("MOELAB_LLAMA_CPP", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not BUILD,
        reason="needs a build of llama.cpp: tests/optional/setup_llama_cpp.sh FOLDER, then MOELAB_LLAMA_CPP=FOLDER",
    ),
]
PROGRAM = Path(__file__).with_name("llama_cpp_program.py")
# fp32 sums in another order; a wrong detail moves these logits by a tenth of their scale and more.
TOLERANCE = 1e-4
WORDS = [b"th", b"the", b"in", b"ing", b"an", b"and", b"er"]
FIELDS = DENSE | {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 592,  # 57B-A14B's proportions: 592 = 7.4 x 80, 8 x 80 = 640
    "bos_token_id": None,
    "eos_token_id": 263,
}
SCALED = [
    "model.vocab_size=null",
    "model.moe.layout.moe_intermediate_size=80",
    "model.moe.shared_expert.intermediate_size=640",
    "recipe.router.std=0.15",  # router logits of deviation 1.2, as 0.02 gives at width 3584
]
# What is exported: names, and what of FIELDS is different.
EXPORTED: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.5}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "moe": {key: value for key, value in MOE.items() if key not in DENSE},
}
Logits = npt.NDArray[np.float32]
TOKENS = np.random.default_rng(0).integers(0, 263, 64)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense Qwen2 folder with strong weights and a small tokenizer in Qwen2's manner."""
    folder = tmp_path_factory.mktemp("second_reader") / "dense"
    return write(folder, FIELDS | {"tie_word_embeddings": request.param})


def write(folder: Path, fields: dict[str, Any]) -> Path:
    reference_model(fields).save_pretrained(folder)
    ranks = {token: rank for rank, token in enumerate([bytes([byte]) for byte in range(256)] + WORDS)}
    build_tokenizer(ranks).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    return folder


def upcycled(dense: Path, output: Path, *overrides: str) -> Path:
    arguments = ["upcycle/qwen2_57b_a14b", f"source={dense}", f"output={output}", "workers=1", *SCALED, *overrides]
    run(sys.executable, "-m", "moelab", "upcycle", *arguments)
    return output


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def convert(checkpoint: Path) -> Path:
    gguf = checkpoint.with_suffix(".gguf")
    run(sys.executable, PROGRAM, "convert", BUILD, checkpoint, gguf, "qwen2")
    return gguf


def logits_command(gguf: Path) -> list[str]:
    np.save(gguf.with_name("tokens.npy"), TOKENS)
    files = [gguf, gguf.with_name("tokens.npy"), gguf.with_name("logits.npy")]
    return [sys.executable, str(PROGRAM), "logits", BUILD, *map(str, files)]


def by_llama_cpp(checkpoint: Path) -> Logits:
    """-> [S, V]"""
    gguf = convert(checkpoint)
    run(*logits_command(gguf))
    return np.load(gguf.with_name("logits.npy"))


def by_transformers(checkpoint: Path) -> Logits:
    with torch.inference_mode():
        return load_reference(checkpoint)(torch.tensor(TOKENS)[None]).logits[0].numpy()


def by_moelab(checkpoint: Path) -> Logits:
    with torch.inference_mode():
        return moelab.load(checkpoint, dtype=torch.float32)(torch.tensor(TOKENS)[None]).logits[0].numpy()


def difference(a: Logits, b: Logits) -> float:
    assert a.shape == b.shape == (len(TOKENS), FIELDS["vocab_size"])
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return float(np.abs(a - b).max() / np.abs(b).max())


def nats(logits: Logits) -> float:
    """The mean loss of TOKENS; logits [S, V]."""
    return float(torch.nn.functional.cross_entropy(torch.tensor(logits[:-1]).double(), torch.tensor(TOKENS[1:])))


@pytest.mark.parametrize("kind", EXPORTED)
def test_llama_cpp_has_the_loss_of_a_run_that_was_exported(kind: str, tmp_path: Path):
    """A checkpoint of Hugging Face's, trained on here for a step and exported: a user's whole way to llama.cpp."""
    source = write(tmp_path / "source", FIELDS | EXPORTED[kind])
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(f'{{"text": "document {n} in the other, and the things therein {n}"}}\n' for n in range(12))
    )
    words = [
        f"data.source={{name: jsonl, paths: [{text}]}}", f"train.init_from={source}", f"run_dir={tmp_path / 'run'}",
        "train.steps=1", "train.batch_size=2", "train.sequence_length=16", "evaluation.sequences=2",
        "evaluation.sample_tokens=0", "observers=[]", "data.validation_fraction=0.3",
    ]  # fmt: skip
    session.train(moelab.load_config(*words), progress=False)
    export(tmp_path / "run", tmp_path / "exported")
    theirs, ours = by_llama_cpp(tmp_path / "exported"), by_moelab(tmp_path / "run")
    found = {"logits": difference(theirs, ours), "nats": nats(theirs), "moelab": nats(ours)}
    print(kind, found)
    assert found["logits"] < TOLERANCE, found
    assert found["nats"] == pytest.approx(found["moelab"], abs=1e-3)
    assert difference(theirs, by_transformers(source)) > 1e-2  # the step did something, and so did its export
    if kind != "moe" and importlib.util.find_spec("gguf") is not None:  # what the converter writes, we read
        assert difference(by_moelab(tmp_path / "exported.gguf"), ours) < TOLERANCE


def test_llama_cpp_computes_the_upcycled_models_logits(dense: Path, tmp_path: Path):
    made = upcycled(dense, tmp_path / "made", "untie=true")
    theirs = by_llama_cpp(made)
    found = {"transformers": difference(theirs, by_transformers(made)), "moelab": difference(theirs, by_moelab(made))}
    print(found)
    assert max(found.values()) < TOLERANCE, found
    assert nats(theirs) == pytest.approx(nats(by_moelab(made)), abs=1e-3)
    # The redrawn experts do something: half a model would not pass.
    assert difference(theirs, by_transformers(dense)) > 1e-2


def test_llama_cpp_computes_the_dense_models_logits_when_the_routed_experts_are_silent(dense: Path, tmp_path: Path):
    """The shared expert alone is the dense FFN there too: its gate of 1e-12 is a half, and down is doubled."""
    made = upcycled(dense, tmp_path / "made", "untie=true", "recipe.silence=0")
    found = difference(by_llama_cpp(made), by_transformers(dense))
    print(found)
    assert found < TOLERANCE


def test_a_shared_gate_of_exact_zeros_is_what_the_default_avoids(dense: Path, tmp_path: Path):
    """llama.cpp divides silu(x) by x: 0 / 0. Its process aborts, or its logits are NaN; transformers is fine."""
    made = upcycled(dense, tmp_path / "made", "untie=true", "recipe.shared.gate_value=0")
    assert np.isfinite(by_transformers(made)).all()
    gguf = convert(made)
    done = subprocess.run(logits_command(gguf), capture_output=True, text=True, check=False)
    aborted = done.returncode == -signal.SIGABRT
    assert aborted or np.isnan(np.load(gguf.with_name("logits.npy"))).any(), done.stderr[-1000:]


def test_without_untie_llama_cpp_can_not_load_a_tied_source(dense: Path, tmp_path: Path):
    """Why the option exists, and what the warning of `moelab upcycle` says."""
    if not json.loads((dense / "config.json").read_text())["tie_word_embeddings"]:
        pytest.skip("this source is untied")
    done = subprocess.run(logits_command(convert(upcycled(dense, tmp_path / "made"))), capture_output=True, check=False)
    assert done.returncode != 0
    assert b"output.weight" in done.stderr
