"""The version of a run folder: what its readers, torch not needed, must know before they believe its names."""

from __future__ import annotations

# 2: `flops` of summary.json, metrics.jsonl and state.json are those that the experts served; before, those of the
# layout's num_experts_per_tok. Readers refuse what is newer than they are.
# 3: summary.json has `alarms` and `fixed_routers`; before, nothing is known of how a run's routers fared.
FORMAT_VERSION = 3
