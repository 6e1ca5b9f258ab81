"""What /proc says of this machine's processor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cpu_lines() -> Mapping[str, str]:
    """What /proc/cpuinfo says of the first core; {} where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")[:8192]
    except OSError:
        return {}
    first = text.partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
