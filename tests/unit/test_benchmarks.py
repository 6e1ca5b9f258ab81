"""The benchmarks run, in small, and are honest about what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file


def _run(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "benchmarks" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_nothing_was_measured(root: Path, tmp_path: Path) -> None:
    done = _run(root, "gpu.py", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device; nothing was measured and nothing written" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_no_line_of_the_gpu_benchmark_fails_for_want_of_a_gpu(root: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0", reason="its experts are one of the sides")
    done = _run(root, "gpu.py", "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grouped_mm, torch's passes" in done.stdout
    assert "least ms by FLOPs | least ms by bytes" in done.stdout


@pytest.mark.parametrize("holds_on", [False, True], ids=["that ends", "that holds on"])
def test_a_part_of_the_gpu_benchmark_is_cut_off_when_its_time_is_over(root: Path, holds_on: bool) -> None:
    """The process itself ends where the part does not."""
    script = f"""
import time
from gpu_common import OutOfTime, at_most
def part():
    while True:
        try:
            time.sleep(600)
        except BaseException:
            if not {holds_on}:
                raise
try:
    with at_most(0.2, {0.2 if holds_on else 600}):
        part()
except OutOfTime:
    print("cut off")
with at_most(600, 600):
    print("and the next one")
"""
    command, benchmarks = [sys.executable, "-c", script], root / "benchmarks"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=benchmarks)
    if holds_on:
        assert done.returncode == 1 and not done.stdout, done.stderr
    else:
        assert done.stdout.split("\n") == ["cut off", "and the next one", ""], done.stderr


def test_a_spent_budget_of_the_gpu_benchmark_begins_no_part_and_says_which(root: Path) -> None:
    done = _run(root, "gpu.py", "--rehearse", "--budget", "0", "--parts", "kernels,whole")
    assert done.returncode == 0, done.stderr
    assert "not measured, 0 s were over: whole run, kernels" in done.stdout


def test_the_traffic_of_a_layer_is_that_of_its_products(root: Path) -> None:
    """Five tokens, two experts each of four: every matrix that the two products read or write, once."""
    script = """
import torch
from layer import LayerShape
x, gate_up, out = torch.zeros(10, 8), torch.zeros(4, 8, 6), torch.zeros(10, 6)
act, down, y = torch.zeros(10, 3), torch.zeros(4, 3, 8), torch.zeros(10, 8)
moved = sum(one.numel() for one in (x, gate_up, out, act, down, y))
shape = LayerShape("four", 8, 4, 2, 3)
assert shape.traffic(5, backward=False) == 2 * moved and shape.traffic(5, backward=True, width=4) == 12 * moved
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root / "benchmarks"
    )
    assert done.returncode == 0, done.stderr


def test_the_cpu_step_agrees_with_transformers_and_writes_its_table(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0", reason="4.x computes experts in one way")
    small = "--shape 4:2:16 --hidden 32 --layers 1 --shared 32 --vocab 64 --batch 2 --sequence 16 --rounds 2"
    done = _run(
        root,
        "cpu_step.py",
        *small.split(),
        "--dtype",
        "float32",
        "--out",
        str(tmp_path),
        "--sides",
        "transformers grouped_mm",
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "cpu_step.json").read_text())["results"]
    losses = [side["first_loss"] for side in result["sides"].values()]
    assert len(losses) == 2
    assert max(losses) - min(losses) < 1e-5
    assert "(as shipped), median of 2 rounds" in (tmp_path / "cpu_step.md").read_text()


def test_autotuning_is_measured_beside_the_constants(root: Path, tmp_path: Path) -> None:
    small = "--shape 4:2:16:64 --dtype float32 --batch 2 --sequence 160 --threads 1 --rounds 3"
    done = _run(root, "autotune.py", *small.split(), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "autotune.json").read_text())["results"]
    assert result["choices"] >= result["taken"] and len(result["ratios"]) == 3


def test_the_verdicts_simulation_writes_its_tables(root: Path, tmp_path: Path) -> None:
    done = _run(root, "verdict_coverage.py", "--replicates", "30", "--judged", "2", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "verdict_coverage.json").read_text())["results"]
    assert sorted(results) == ["coverage", "families", "judged", "planted"]
    single = [row for row in results["judged"] if row["shape"].startswith(("1 :", "2 :"))]
    assert single
    assert all(row["named"] == row["lowest"] == 0 for row in single)


def test_a_comparison_of_many_runs_is_timed(root: Path, tmp_path: Path) -> None:
    few = ["--variants", "2", "--seeds", "3", "--steps", "200", "--layers", "2", "--documents", "30", "--rounds", "1"]
    done = _run(root, "compare_runs.py", *few, "--folder", str(tmp_path), "--output", str(tmp_path / "results"))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results" / "compare_runs.json").read_text())["results"]
    assert (row["runs"], row["processor"] > 0) == (6, True)
    found = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert [line["counted"] for line in found["variants"]] == [3, 3]


def test_the_readme_gets_its_figures_from_the_demos_comparisons(root: Path, tmp_path: Path) -> None:
    line = {"name": "upcycled", "counted": 3, "score": 3.25, "verdict": "better",
            "difference": {"difference": -0.5, "low": -0.75, "high": -0.25}}  # fmt: skip
    for report in ("report_equal_tokens", "report_equal_flops"):
        (tmp_path / report).mkdir()
        said = {"variants": [line], "sentences": [
            "upcycled is better than dense: −0.5 bits per byte (1 %). It took 2 × the FLOPs.", "At equal tokens: ...",
            "upcycled_b is worse than dense.",
        ]}  # fmt: skip
        (tmp_path / report / "comparison.json").write_text(json.dumps(said))
    readme = tmp_path / "README.md"
    readme.write_text((root / "README.md").read_text())
    for _ in range(2):
        done = _run(root, "demo_figures.py", str(tmp_path), "7", "two cores", "--readme", str(readme))
        assert done.returncode == 0, done.stderr
    text = readme.read_text()
    assert text.count("On two cores it took 7 min") == 1
    assert text.count(" upcycled (3 seeds)              3.2500  −0.5000 [−0.7500, −0.2500]  better\n") == 2
    for budget in ("tokens", "FLOPs"):
        assert f"- At equal {budget}: upcycled is better than dense; upcycled_b is worse than dense.\n" in text
    written = text.split("<!-- demo: begin")[1].split("<!-- demo: end")[0]
    assert max(len(line) for line in written.split("```")[1].splitlines()) <= 80
    assert text.split("<!-- demo: end -->")[1] == (root / "README.md").read_text().split("<!-- demo: end -->")[1]


def test_evaluation_is_timed_by_batch_size(root: Path, tmp_path: Path) -> None:
    small = ["data.source.max_bytes_per_domain=30000", "train.sequence_length=64", "evaluation.sequences=6"]
    done = _run(root, "evaluation.py", "configs/train/tiny_moe.yaml", *small, "--sizes", "1", "4", "--rounds", "1",
                "--output", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [(row["sequences"], row["default"]) for row in rows] == [(1, False), (4, False), (256, True)]
    assert all(row["moved"] < 1e-5 for row in rows)


def test_generation_gives_the_texts_of_transformers_and_writes_its_table(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers", minversion="5.0", reason="4.x computes experts in one way")
    small = "--shape 4:2:16 --hidden 32 --layers 1 --shared 32 --vocab 64 --prompt 6 --tokens 8 --rounds 2 --batch 1 3"
    done = _run(root, "generation.py", *small.split(), "--peers", "eager", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "generation.json").read_text())["results"]
    assert [result["batch"] for result in results] == [1, 3]
    assert all(result["different"] == 0 or result["behind"] < 1e-4 for result in results)


def test_a_recorded_run_is_replayed_as_it_was(root: Path, tmp_path: Path) -> None:
    """The recorded tokens are those of the run; a layer of the run's E and K gets them one by one."""
    train = "train.steps=3 data.source.name=embedded evaluation.sequences=8 model.moe.layout.num_experts=6"
    config, run, file = root / "configs/train/tiny_moe.yaml", tmp_path / "run", tmp_path / "routing.safetensors"
    moelab = [sys.executable, "-m", "moelab", "train", str(config), f"run_dir={run}", *train.split()]
    subprocess.run(moelab, check=True, capture_output=True, timeout=600)
    done = _run(root, "record_routing.py", str(run), "--tokens", "200", "--layer", "1", "--out", str(file))
    assert done.returncode == 0, done.stderr
    recorded = load_file(file)["expert"].long()
    assert recorded.shape == (200, 2)
    replay = (
        "import sys, torch, layer; from pathlib import Path; layer.RECORDED = Path(sys.argv[1]);"
        "shape = layer.LayerShape('x', 8, int(sys.argv[2]), 2, 8);"
        "print(layer.draw_routing(shape, 200, 'replayed', torch.device('cpu')).expert.tolist())"
    )
    for experts in (6, 12):
        command = [sys.executable, "-c", replay, str(file), str(experts)]
        shown = subprocess.run(
            command, cwd=root / "benchmarks", check=True, capture_output=True, text=True, timeout=600
        )
        replayed = torch.tensor(json.loads(shown.stdout)).view(200, 2)
        if experts == 6:
            assert any(torch.equal(replayed, recorded.roll(-shift, 0)) for shift in range(200))
        assert 0 <= int(replayed.min()) <= int(replayed.max()) < experts
        assert bool((replayed[:, 0] != replayed[:, 1]).all())


def test_two_checkouts_are_measured_in_pairs(root: Path, tmp_path: Path) -> None:
    done = _run(root, "two_checkouts.py", str(root), str(root), "--pairs", "1", "--steps", "1", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("new / old") == 2
    nothing = _run(root, "two_checkouts.py", str(tmp_path), str(root), "--pairs", "1")
    assert nothing.returncode == 2
    assert f"{tmp_path}: is no checkout" in nothing.stderr
