"""Can seldom chosen experts be removed? The question of JustVugg/colibri #1621, put to one of our own models.

There (OLMoE in int8, 16 layers of 64 experts; issue and its follow-up comment, read) 220 experts that carried 0.66 % of
the traffic cost 0.25 to 0.33 nats when their weights were zeroed, 220 experts by chance, with 22.5 %, 0.38 to 0.39. So
one cold expert costs less than one by chance, and 22 to 29 times as much for its traffic.

Here: the fifth of each layer's experts (220 of 1024 is a fifth too) that text of the training split chose least, their
assignments dropped and the token's other weights left, which is what zeroed weights do. Beside them two controls, each
drawn several times: as many experts by chance, and as many assignments by chance. **A departure**: the second control
is ours; without it "22 times as much for its traffic" compares an effect with a far larger one that has bent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moelab.data.batches import Batch
from moelab.moe.overrides import RemoveAtRandom
from moelab.routes.counterfactuals import Counterfactual, by_layer, losses, removal
from moelab.seeds import derive_seed
from moelab_tools.routes.asked import layers_of
from moelab_tools.routes.effects import Text, tally
from moelab_tools.routes.intervals import Estimate
from moelab_tools.routes.source import Source

FRACTION, DRAWS = 0.2, 5
Experts = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Arm:
    """One way of removing."""

    name: str
    traffic: float  # share of all assignments of this text
    change: Estimate  # nats a token

    @property
    def per_percent(self) -> float:
        return self.change.value / max(100 * self.traffic, 1e-9)


@dataclass(frozen=True)
class Rare:
    """The arms, and what tells them apart."""

    experts: Experts
    counted_on: str
    arms: Sequence[Arm]  # cold, as many by chance, as much traffic by chance
    against_experts: Estimate  # cold minus as many experts by chance
    against_traffic: Estimate  # cold minus as much traffic by chance
    rank_correlation: float  # of load and cost, over single experts
    singles: int
    loss: float

    def lines(self) -> list[str]:
        cold = self.arms[0]
        named = ", ".join(f"{layer}: {' '.join(map(str, mine))}" for layer, mine in self.experts.items())
        said = [
            f"the {FRACTION:.0%} of each layer's experts that {self.counted_on} chose least (layer: experts)",
            f"  {named}",
            "dropped, the token's other weights left as they are; controls: means of "
            f"{DRAWS} draws; own loss {self.loss:.4f}",
            "",
            f"{'removed':<30} {'traffic %':>9}  {'nats a token':<28} {'per 1 %':>8}",
        ]
        for arm in self.arms:
            said.append(f"{arm.name:<30} {100 * arm.traffic:>9.2f}  {arm.change.told():<28} {arm.per_percent:>8.4f}")
        said += [
            "",
            f"cold less as many experts:  {self.against_experts.told()}",
            f"cold less as much traffic:  {self.against_traffic.told()}",
            f"load and cost of {self.singles} single experts: rank correlation {self.rank_correlation:+.2f}",
        ]
        return [*said, self._verdict(cold)]

    def _verdict(self, cold: Arm) -> str:
        change, other = cold.change, self.against_traffic
        if change.half is None:
            return "one document: nothing can be said of other text"
        if change.value - change.half > 0:
            first = "not removable: their removal costs loss"
        elif change.value + change.half < 0:
            first = "better removed: without them the loss is lower"
        else:
            first = f"not resolved: at most {change.value + change.half:.4f} nats a token"
        if other.half is None or abs(other.value) <= other.half:
            return f"{first}; no more than any assignments of that number, as far as can be seen"
        return f"{first}; {'more' if other.value > 0 else 'less'} than as many assignments picked by chance"

    def to_json(self) -> dict[str, Any]:
        return {
            "study": "rare", "unit": "nats a token", "loss": self.loss, "counted_on": self.counted_on,
            "experts": {str(layer): list(mine) for layer, mine in self.experts.items()},
            "arms": [
                {"name": arm.name, "traffic": arm.traffic, "change": arm.change.to_json(),
                 "per_percent_of_traffic": arm.per_percent} for arm in self.arms
            ],
            "cold_less_as_many_experts": self.against_experts.to_json(),
            "cold_less_as_much_traffic": self.against_traffic.to_json(),
            "rank_correlation_of_load_and_cost": self.rank_correlation, "single_experts": self.singles,
        }  # fmt: skip


def rare(source: Source, text: Text, *, seed: int) -> Rare:
    """Counts on training text where it is known, else on the text itself, and says which."""
    from scipy.stats import spearmanr

    layers = layers_of(source.model)
    counting = list(source.training) if source.training is not None else text.batches
    where = "training text" if source.training is not None else "this very text"
    cold = _coldest(_loads(source, counting))
    here = _loads(source, text.batches)
    share = {layer: float(here[layer][list(mine)].sum() / max(here[layer].sum(), 1)) for layer, mine in cold.items()}
    draws = [_by_chance(cold, layers, derive_seed(seed, "experts", draw)) for draw in range(DRAWS)]
    singles: list[Experts] = [{layer: (e,)} for layer, experts in layers.items() for e in range(experts)]
    asked: list[Counterfactual] = [removal(one, renormalise=False) for one in (cold, *draws, *singles)]
    asked += [
        by_layer(
            {layer: RemoveAtRandom(part, derive_seed(seed, "traffic", draw), False) for layer, part in share.items()}
        )
        for draw in range(DRAWS)
    ]
    counted = tally(source.model, text, source.tokenizer, source.precision, asked)
    added = counted.added
    sums = np.stack([added[0], added[1 : 1 + DRAWS].mean(0), added[-DRAWS:].mean(0)])
    effects = counted.effects(np.concatenate([sums, sums[:1] - sums[1:2], sums[:1] - sums[2:3]]))
    alone = counted.effects()[1 + DRAWS : 1 + DRAWS + len(singles)]
    loads = [_traffic([one], here) for one in singles]
    return Rare(
        cold, where,
        [
            Arm("the coldest experts", _traffic([cold], here), effects[0]),
            Arm("as many experts by chance", _traffic(draws, here), effects[1]),
            Arm("as much traffic by chance", _traffic([cold], here), effects[2]),
        ],
        effects[3], effects[4],
        float(spearmanr(loads, [one.value for one in alone]).statistic), len(singles), counted.loss,
    )  # fmt: skip


def _loads(source: Source, batches: Sequence[Batch]) -> dict[int, np.ndarray]:
    """{layer: [E] assignments}."""
    found: dict[int, np.ndarray] = {}
    for told in losses(source.model, batches, source.precision, []):
        for record in told.records:
            found[record.layer_id] = found.get(record.layer_id, 0) + record.counts.cpu().numpy()
    return found


def _coldest(loads: Mapping[int, np.ndarray]) -> dict[int, tuple[int, ...]]:
    return {
        layer: tuple(sorted(np.argsort(load, kind="stable")[: max(1, round(FRACTION * len(load)))].tolist()))
        for layer, load in loads.items()
    }


def _by_chance(cold: Experts, layers: Mapping[int, int], seed: int) -> dict[int, tuple[int, ...]]:
    chance = np.random.default_rng(seed)
    return {
        layer: tuple(sorted(chance.choice(layers[layer], len(mine), replace=False).tolist()))
        for layer, mine in cold.items()
    }


def _traffic(removed: Sequence[Experts], loads: Mapping[int, np.ndarray]) -> float:
    """Mean share of all layers' assignments that go to these experts."""
    total = sum(load.sum() for load in loads.values())
    return float(
        np.mean([sum(loads[layer][list(mine)].sum() for layer, mine in one.items()) / total for one in removed])
    )
