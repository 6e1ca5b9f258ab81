"""Which tag of TensorBoard a logged number stands under, so that its first page answers three questions.

Which run is better, is a router dying, what does it cost? TensorBoard sorts groups (what stands before the first `/`)
by ASCII and opens the first two; groups that begin with a capital come before all others. What is measured layer by
layer has its mean and its worst in `Routers`, and a group of its own below: `layers_max_violation/layer_03`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from moelab.alarms import RULES, Alarm

# Its cards are numbered, so that the four that fit on a screen answer all three questions.
HELD_OUT, HELD_OUT_LOSS = "Overview/1_held_out_bits_per_byte", "Overview/1_held_out_loss"
ALARMS = "Overview/2_alarms_on"
FLOPS = "Overview/3_flops_per_token"
TRAINING_LOSS = "Overview/4_training_loss"
FULLEST = "Overview/5_max_violation_worst_layer"
SPEED = "Overview/6_tokens_per_second"
DEAD = "Overview/7_dead_experts_worst_layer"
MEMORY = "Overview/8_memory_gb"
LOSS = "Training/held_out_loss"
ACTIVE = "Speed/served_active_parameters"
PICTURE = "Pictures/expert_load"

RENAMED = {
    "eval/bits_per_byte": HELD_OUT,
    "eval/loss": LOSS,
    "train/lm_loss": TRAINING_LOSS,
    "compute/served_flops_per_token": FLOPS,
    "perf/tokens_per_second": SPEED,
    "perf/memory_gb": MEMORY,
}
REPEATED = "eval/perplexity"  # exp(eval/loss): the same curve again
GROUPS = {"train": "Training", "perf": "Speed", "compute": "Speed"}
LAYER, MEAN = re.compile(r"moe/(layer_\d+)/(.+)"), re.compile(r"moe/mean/(.+)")
# The worst of all layers, of each metric that an alarm watches: a mean hides the one router that dies.
WORST = {"dead_fraction": max} | {rule.tag: max if rule.above else min for rule in RULES}
WORST_TAG = {"max_violation": FULLEST, "dead_fraction": DEAD}


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """{tag of TensorBoard: value} for the numbers of one log or one evaluation, by their own names."""
    found = {tag_of(name): value for name, value in metrics.items() if name != REPEATED}
    if "eval/loss" in metrics and "eval/bits_per_byte" not in metrics:  # no bytes are known of this text
        found[HELD_OUT_LOSS] = metrics["eval/loss"]
    by_metric: dict[str, list[float]] = {}
    for name, value in metrics.items():
        layer = LAYER.fullmatch(name)
        if layer and layer[2] in WORST:
            by_metric.setdefault(layer[2], []).append(value)
    worst = {WORST_TAG.get(key, f"Routers/{key}/worst_layer"): WORST[key](all_) for key, all_ in by_metric.items()}
    return found | worst


def tag_of(name: str) -> str:
    """The tag of one number; names of others stay as they are."""
    if name in RENAMED:
        return RENAMED[name]
    if layer := LAYER.fullmatch(name):
        return f"layers_{layer[2]}/{layer[1]}"
    if mean := MEAN.fullmatch(name):
        return f"Routers/{mean[1]}/mean"
    group, slash, rest = name.partition("/")
    return f"{GROUPS[group]}/{rest}" if slash and group in GROUPS else name


def alarms_on(alarms: Iterable[Alarm]) -> dict[str, float]:
    """How many alarms are on: 0 in a sound run, a dense one too."""
    return {ALARMS: float(len(list(alarms)))}
