"""The picture of a report in README.md: trains twelve small runs, compares them, and takes the first screen.

    python benchmarks/report_picture.py [--runs runs/picture] [--picture docs/images/report.png] [--steps 400]
    python benchmarks/report_picture.py --report runs/demo/report_equal_flops/report.html       # of one that is there

Four recipes on the embedded corpus, three seeds each, some minutes on two cores; runs that are finished are not trained
again. The picture is taken by Chromium (`--chromium`: its program), without a window. Nothing in it is drawn by hand.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    "dense": ["model.moe=null"],
    "softmax": [],
    "sigmoid": ["model.moe.router.name=sigmoid_topk"],
    "no_balance_loss": ["model.moe.balance_losses=[]"],
}
SEEDS = 3
WIDTH, HEIGHT = 1240, 900
LARGEST = 200_000  # bytes


def train(folder: Path, steps: int) -> list[Path]:
    """-> the run folders."""
    paths = []
    for name, overrides in RECIPES.items():
        for seed in range(SEEDS):
            path = folder / f"{name}_seed{seed}"
            paths.append(path)
            if not (path / "summary.json").exists():
                common = [f"run_dir={path}", f"name={path.name}", f"seed={seed}", f"train.steps={steps}"]
                common += [f"evaluation.every={steps // 10}", "evaluation.sequences=128"]
                _moelab("train", str(ROOT / "configs/train/tiny_moe.yaml"), *common, *overrides)
    return paths


def take(report: Path, picture: Path, chromium: str) -> None:
    """The first screen of a report, in light colours."""
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000",
             f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={picture.resolve()}",
             report.resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    size = picture.stat().st_size
    if size > LARGEST:
        sys.exit(f"{picture}: {size} bytes, more than {LARGEST}: take a smaller screen")
    print(f"{picture}: {size} bytes")


def _moelab(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "moelab", *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/picture")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/images/report.png")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--report", type=Path, help="take the picture of this one, and train nothing")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    if options.chromium is None:
        sys.exit("no chromium here: install it, or name its program with --chromium")
    report = options.report
    if report is None:
        runs = train(options.runs, options.steps)
        _moelab("compare", *map(str, runs), "--baseline", "dense", "--output", str(options.runs / "report"))
        report = options.runs / "report" / "report.html"
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    take(report, options.picture, options.chromium)


if __name__ == "__main__":
    main()
