"""The version of a run folder: what its readers, torch not needed, must know before they believe its names."""

from __future__ import annotations

from typing import Any

# 2: `flops` of summary.json, metrics.jsonl and state.json are those that the experts served; before, those of the
# layout's num_experts_per_tok. Readers refuse what is newer than they are.
# 3: summary.json has `alarms` and `fixed_routers`; before, nothing is known of how a run's routers fared.
FORMAT_VERSION = 3

METRICS, SUMMARY = "metrics.jsonl", "summary.json"  # of a run folder

# How far a run was: what each line of metrics.jsonl has beside its tags.
COUNTERS = ("step", "tokens", "flops", "flops_declared", "seconds")
ROW_ALARMS = "alarms"  # and where any are on, these: no tag either

# How a run came to its end, of summary.json (and, but for the second, of state.json): which was its lowest evaluation
# (`moelab.training.best`), whether it ended early, how train.steps changed on the way (`moelab.training.plan`).
BEST_EVALUATION, ENDED_EARLY, REPLANNED = "best_evaluation", "ended_early", "replanned"

# Of summary.json: weights that keys of the config beside train.init_from name. {recipes: {key: how they were made},
# stages: their seeds, where they are not the run's own past}
NAMED_WEIGHTS = "named_weights"

# What a clock or the machine decides, wherever it stands in summary.json, metrics.jsonl or state.json: two processes
# that do the same steps agree in everything else. `logged` begins with seconds.
CLOCK = frozenset(
    {
        "seconds", "logged", "peak_flops", "perf/tokens_per_second", "perf/mfu", "perf/memory_gb", "perf/data_share",
    }
)  # fmt: skip


def without_clock(value: Any) -> Any:
    """The same JSON value without the keys of CLOCK, at any depth."""
    if isinstance(value, dict):
        return {key: without_clock(one) for key, one in value.items() if key not in CLOCK}
    return [without_clock(one) for one in value] if isinstance(value, list) else value
