"""Where measured ways are kept, of training and of generation: a file for each machine, in the user's cache."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

import moelab
from moelab.atomic import write_file
from moelab.errors import UserError
from moelab.paths import user_path
from moelab.processor import cpu_lines
from moelab.records import read_record
from moelab.safe_files import Reading
from moelab.ways import Found

logger = logging.getLogger("moelab")
SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "OMP_WAIT_POLICY")
CPU_FACTS = ("vendor_id", "cpu family", "model", "model name")  # of /proc/cpuinfo
LARGEST = 16 << 20  # bytes
READING = Reading(UserError, "it is measured anew")


def machine_facts(threads: int, device: torch.device) -> dict[str, str]:
    """What a measurement hangs on, beside the problem."""
    lines = cpu_lines()
    facts = {name: lines.get(name, "") for name in CPU_FACTS} | {
        "architecture": platform.machine(), "cores": str(os.cpu_count()), "threads": str(threads),
        "capability": torch.backends.cpu.get_cpu_capability(), "torch": str(torch.__version__),
        "moelab": moelab.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }  # fmt: skip
    return facts | {name: os.environ[name] for name in SWITCHES if name in os.environ}


def place_of(machine: Mapping[str, str]) -> Path | None:
    """A machine's file: of this user, under XDG_CACHE_HOME or ~/.cache; None for a user without a home folder."""
    try:
        folder = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME")
    except UserError:
        return None
    name = machine["model name"] or machine["architecture"] if machine["device"] == "cpu" else machine["device"]
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    digest = sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:12]
    return folder / "moelab" / "autotune" / f"{words}-{digest}.json"


def read_kept(path: Path | None, machine: Mapping[str, str], *, tell: bool = True) -> dict[str, Found]:
    """What is kept of this machine; {} where there is nothing, or nothing of use, which is told in a line, once."""
    try:
        if path is None or not path.exists():
            return {}
        record = read_record(path, READING, limit=LARGEST)
        there = record.record("machine")
        for name in {**machine, **there.values}:
            if there.text(name, "") != machine.get(name, ""):
                here = machine.get(name, "")
                READING.refuse(path, f"is of another machine ({name}: '{there.text(name, '')}' there, '{here}' here)")
        kept = {}
        for problem, each in record.record("problems").records():
            step = each.number("step", None, least=0)
            kept[problem] = Found(each.text("way"), each.record("seconds").numbers(), step)
    except (UserError, OSError) as error:
        if tell:
            logger.warning("autotune: %s", error)
        return {}
    return kept


def keep(path: Path | None, machine: Mapping[str, str], found: Mapping[str, Found]) -> None:
    """For the next run; that it can't be written is told in a line."""
    if path is None:
        logger.warning("autotune: nothing is kept, without a home folder; XDG_CACHE_HOME can name a place")
        return
    problems = {problem: asdict(each) for problem, each in sorted(found.items())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"machine": dict(machine), "problems": problems}, indent=1) + "\n")
    except (UserError, OSError) as error:
        logger.warning("autotune: %s can't be kept (%s): the next run measures again", path, error)
