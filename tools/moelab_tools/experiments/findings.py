"""What came of an experiment: findings.json and reading.md, the same facts for programs and for people; nulls too."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moelab.atomic import check_output, write_file
from moelab.safe_files import Reading, read_object, read_text
from moelab.training.run_folder import write_json
from moelab_tools.compare import sentences
from moelab_tools.compare.comparison import Comparison
from moelab_tools.compare.verdict import Verdict
from moelab_tools.experiments.declaration import END, Declaration
from moelab_tools.experiments.logged import logged_section
from moelab_tools.experiments.reach_tables import lengths_section
from moelab_tools.experiments.register import FINDINGS, Register
from moelab_tools.experiments.routed_tables import routes_section

READING = "reading.md"
FORMAT_VERSION = 1  # of findings.json
KEPT = "<!-- What stands below this line is written by hand and kept. -->"


@dataclass(frozen=True)
class Settled:
    """A variant's verdict, from the look at which it had a word, else from the last."""

    verdict: Verdict
    seeds: int  # at that look


@dataclass
class Conclusion:
    """How an experiment ended."""

    why_it_ended: str
    settled: dict[str, Settled] = field(default_factory=dict)
    comparison: Comparison | None = None
    failed: dict[str, str] = field(default_factory=dict)  # run -> why
    seeds: list[int] = field(default_factory=list)  # that were run
    minutes: float = 0.0
    logged: dict[str, Any] | None = None  # name -> variant -> numbers
    lengths: dict[str, Any] | None = None  # variant -> moment -> what it made of longer texts; see `reached`
    routes: dict[str, Any] | None = None  # by layer and domain, how far runs kept them; see `agreed`


def check_findings(folder: Path) -> None:
    """Before the work: raises UserError where `write_findings` could not write there."""
    check_output(folder, "--results")
    for name in (FINDINGS, READING):
        check_output(folder / name, "--results", file=True)


def write_findings(
    declaration: Declaration, register: Register, conclusion: Conclusion, command: str, folder: Path
) -> Path:
    """findings.json, comparison.json and reading.md in `folder`; -> reading.md. Text below its mark is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    findings = findings_json(declaration, register, conclusion, command)
    write_json(folder / FINDINGS, findings)
    path = folder / READING
    old = read_text(path, Reading(cure="move it away")) if path.is_file() else ""
    by_hand = old.partition(KEPT)[2].strip() or "## Reading\n\nNot written yet."
    write_file(path, f"{reading(findings)}\n{KEPT}\n\n{by_hand}\n")
    return path


def findings_json(declaration: Declaration, register: Register, conclusion: Conclusion, command: str) -> dict[str, Any]:
    """All that the pages show, and no place of a machine."""
    config, comparison = declaration.config, conclusion.comparison
    lines = {line.name: line for line in comparison.lines} if comparison else {}
    base = lines[config.baseline].score if config.baseline in lines else None
    variants = {}
    for name in config.variants:
        line = lines.get(name)
        variants[name] = {
            "loss": line.score if line else None,
            "sd_over_seeds": line.score_sd if line else None,
            "parameters_total": line.parameters_total if line else None,
            "parameters_active_served": line.parameters_active_served if line else None,
            "flops_served": line.flops if line else None,
            "max_violation": line.max_violation if line else None,
            **({} if name == config.baseline else _verdict(conclusion.settled.get(name), config.decision, base)),
        }
    return {
        "format_version": FORMAT_VERSION,
        "name": declaration.name,
        "question": config.question,
        "declaration": register.to_json(),
        "command": command,
        "ended": conclusion.why_it_ended,
        "seeds": conclusion.seeds,
        "measure": comparison.measure.name if comparison else None,
        "axis": config.protocol.axis,
        "baseline": config.baseline,
        "baseline_loss": base,
        "variants": variants,
        "failed": conclusion.failed,
        **({} if conclusion.logged is None else {"logged": conclusion.logged}),
        **({} if conclusion.lengths is None else {"lengths": conclusion.lengths}),
        **({} if conclusion.routes is None else {"routes": conclusion.routes}),
        "sentences": sentences.headlines(comparison) if comparison else [],
        "covers": sentences.what_intervals_cover(comparison) if comparison else [],
        "remarks": [*sentences.remarks(comparison), *comparison.seen, *comparison.warnings] if comparison else [],
        "runs": _runs(comparison),
        "minutes": round(conclusion.minutes, 1),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }


def _verdict(settled: Settled | None, decision: Mapping[str, str], base: float | None) -> dict[str, Any]:
    if settled is None:
        return {"verdict": None, "concluded": "nothing: its runs did not come to an end"}
    found = asdict(settled.verdict)
    keys = ("verdict", "difference", "low", "high", "p", "pairs", "method", "could_have_seen", "smaller",
            "seeds_for_smaller", "remarks")  # fmt: skip
    share = {
        f"{key}_percent": 100 * found[key] / base if base and found[key] is not None else None
        for key in ("difference", "low", "high", "could_have_seen", "smaller")
    }
    unknown = f"nothing: the verdict is '{found['verdict']}'"
    told = decision.get(found["verdict"], unknown)
    return {key: found[key] for key in keys} | share | {"seeds_at_verdict": settled.seeds, "concluded": told}


def _runs(comparison: Comparison | None) -> dict[str, Any]:
    if comparison is None:
        return {}
    return {
        run.name: {
            "status": run.status,
            "seed": run.seed,
            "declaration": run.config.get("declaration"),
            "data": (run.summary.get("data") or {}).get("fingerprint"),
            "tokens": run.amount("tokens"),
        }
        for run in comparison.runs
    }


def reading(findings: Mapping[str, Any]) -> str:
    """The generated part of reading.md."""
    declared = findings["declaration"]["declared"]
    protocol = declared["protocol"]
    told = [f"# {findings['name']}", "", f"**{findings['question']}**", ""]
    told += [f"**Changed after the first run**: {one['changed']}. Why: {one['why']}\n"
             for one in findings["declaration"]["amendments"]]  # fmt: skip
    told += ["## Declared before the first run", ""]
    told += [
        f"- baseline `{findings['baseline']}`, seeds {seeds_of(declared)}, looks: {protocol['looks'] or 'the end'}"
    ]
    axis = "the last evaluation" if protocol["axis"] == END else f"equal {protocol['axis']}"
    told += [f"- compared at {axis}; false words in at most {100 * protocol['error']:g} % over all variants and looks; "
             f"below {protocol['practical']:g} % of the loss is negligible"]  # fmt: skip
    told += [f"- {word}: {text}" for word, text in declared["decision"].items()]
    told += [f"- hash `{findings['declaration']['hash'][:16]}`", "", "## Found", ""]
    told += [f"{findings['ended']} Unit: {findings['measure'] or 'none'}.", "", *table(findings), ""]
    told += [f"- **{name}**: {one['concluded']}" for name, one in findings["variants"].items() if "concluded" in one]
    told += ["", *(f"{one}" for one in findings["sentences"]), "", *findings["covers"], ""]
    told += [f"- **{name}** did not end well: {why}" for name, why in findings["failed"].items()]
    told += [f"- {one}" for one in findings["remarks"]]
    told += ["", *logged_section(findings), *lengths_section(findings), *routes_section(findings)]
    told += ["", "## Again", "", f"    {findings['command']}", "",
             f"{len(findings['runs'])} runs, {findings['minutes']:g} minutes; all numbers: findings.json."]  # fmt: skip
    return "\n".join(told) + "\n"


def seeds_of(declared: Mapping[str, Any]) -> str:
    seeds = declared["seeds"]
    return seeds if isinstance(seeds, str) else ", ".join(map(str, seeds))


def table(findings: Mapping[str, Any]) -> list[str]:
    """Markdown: a variant a row."""
    head = ("variant", "loss", "sd over seeds", "difference, % [interval]", "verdict", "seeds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, one in findings["variants"].items():
        loss, spread = (_number(one[key], 4) for key in ("loss", "sd_over_seeds"))
        if name == findings["baseline"]:
            lines.append(f"| {name} | {loss} | {spread} | baseline | | {len(findings['seeds'])} |")
            continue
        difference = _number(one.get("difference_percent"), 2, sign=True)
        low, high = (_number(one.get(f"{key}_percent"), 2, sign=True) for key in ("low", "high"))
        seeds = one.get("seeds_at_verdict", "")
        lines.append(
            f"| {name} | {loss} | {spread} | {difference} [{low}, {high}] | {one['verdict'] or 'none'} | {seeds} |"
        )
    return lines


def _number(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None:
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def read_findings(path: Path) -> dict[str, Any]:
    """findings.json as it was written."""
    return read_object(path, Reading(cure="run the experiment again"))
