"""What all benchmarks share: the machine's description, medians, and results as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """What a figure can't be read without."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": processor,
        "cores": os.cpu_count(),
        "gpu": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> list[float]:
    """Upper and lower quartile; of times, so that rates come out in rising order."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [high, low]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(folder: Path, name: str, facts: dict[str, Any], results: Any, tables: Sequence[str]) -> None:
    """NAME.json and NAME.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"machine": facts, "results": results}, indent=2) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in facts.items())
    (folder / f"{name}.md").write_text(f"# {name}\n\n{described}\n" + "\n".join(tables))
    print(f"wrote {folder / name}.json and .md")
