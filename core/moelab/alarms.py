"""Alarms: what says that a router has come to nothing, or is about to. Data, raised in one place and shown everywhere.

A rule reads one number of a logged step (docs/metrics.md has them all) and knows from when on it is alarming, and why.
`AlarmWatch` remembers which are on, so that each is told when it begins, when it gets much worse and when it ends.
Torch is not needed: `moelab compare` reads what summary.json keeps of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from moelab.errors import CheckpointError

GROWTH = 2.0  # an alarm is told again when its value is so many times as far beyond the threshold
# What divides out leaves the rounding of its parts, 1e-10 to 1e-7; a router that learns has 0.02 to 10, and had 4e-5 in
# its first steps behind a shared expert of a hundred times its weight.
NO_GRADIENT = 5e-6
STALE_ENTROPY, STALE_NORM, STALE_AFTER = 0.998, 0.1, 200
# In its first steps a model's hidden states hardly differ between tokens, and a healthy router sends most of them to
# the same few experts for a while: in configs/train/tiny_moe.yaml load entropies reach their floor at step 10 to 20.
SETTLED = 100
LOGS = 3  # in a row, where the number is that of a single step or of a short interval
Numbers = Mapping[str, float]


@dataclass(frozen=True)
class LayerFacts:
    """What is known of a MoE layer before a run."""

    num_experts: int
    num_experts_per_tok: float
    learns: bool = True  # False: its router follows a fixed rule, by design
    untrained: bool = True  # at the start of the run; False: it goes on from weights that were trained
    num_choices: int | None = None  # E' of its scores; None: num_experts


@dataclass(frozen=True)
class Alarm:
    """One layer's number beyond its threshold. `layer` is None for a number of the whole run."""

    name: str  # of a rule
    layer: int | None
    value: float
    threshold: float
    advice: str

    def sentence(self) -> str:
        """What is wrong, by how much, and what to do: one line."""
        where = "" if self.layer is None else f"layer {self.layer}: "
        says = RULE_OF[self.name].says if self.name in RULE_OF else f"{self.name}, {{value}} against {{threshold}}"
        return f"{where}{says.format(value=_number(self.value), threshold=_number(self.threshold))}; {self.advice}"


@dataclass(frozen=True)
class AlarmChange:
    """An alarm that began, grew or ended at a step."""

    step: int
    change: str  # "begins", "grows" or "ends"
    alarm: Alarm

    def sentence(self) -> str:
        """One line for a log."""
        if self.change == "ends":
            where = "" if self.alarm.layer is None else f"layer {self.alarm.layer}, "
            return f"step {self.step}: alarm over: {where}{self.alarm.name} ({_number(self.alarm.value)})"
        grown = " has grown" if self.change == "grows" else ""
        return f"step {self.step}: alarm{grown}: {self.alarm.name}: {self.alarm.sentence()}"


@dataclass(frozen=True)
class Rule:
    """A number of a layer, the threshold beyond which it is alarming, and what that means."""

    name: str
    tag: str  # moe/layer_NN/<tag>
    says: str  # with {value} and {threshold}
    advice: str
    threshold: float | Callable[[LayerFacts, Numbers], float | None]  # None: says nothing of this layer
    above: bool = True  # alarming above it; False: below
    logs: int = 1  # measurements in a row before it is raised: chance moves the numbers of a single step
    after: int = 0  # steps before which it is not judged
    begins: float = 0.0  # and share of the run's steps
    ends: float = 1.0
    nothing_learnt: bool = False  # while it is on, the router can't have learnt what its run is judged by
    from_untrained: bool = False  # judged only where the router was untrained at the start

    def limit(self, layer: LayerFacts, numbers: Numbers) -> float | None:
        """The threshold for this layer; None where the rule has nothing to say."""
        if (self.nothing_learnt or self.from_untrained) and not layer.learns:
            return None
        if self.from_untrained and not layer.untrained:
            return None
        return self.threshold(layer, numbers) if callable(self.threshold) else self.threshold


def _collapsed_entropy(layer: LayerFacts, numbers: Numbers) -> float | None:
    """ln(K + (E - K) / 10) / ln E: a tenth of the way from collapsed to balanced, in experts that count (exp of H).

    None where more than half of the experts serve each token: no collapse could be told from that.
    """
    experts = layer.num_experts
    served = max(numbers.get("experts_per_token", layer.num_experts_per_tok), 1.0)
    return math.log(served + 0.1 * (experts - served)) / math.log(experts) if 2 * served <= experts else None


def _stale_norm(layer: LayerFacts, numbers: Numbers) -> float | None:
    """Only of a router that is as undecided as it can be: a small output alone may be what the text wants."""
    choices = layer.num_choices or layer.num_experts
    entropy = numbers.get("router_entropy")
    undecided = entropy is not None and choices > 1 and entropy > STALE_ENTROPY * math.log(choices)
    return STALE_NORM if undecided else None


# The reasons for the thresholds stand in docs/metrics.md, "Alarms".
RULES = (
    Rule(
        "no_expert", "experts_per_token", "no token reached an expert ({value} experts a token)",
        "look at capacity_factor, or at what the router asks of a score before it serves", 0.01, above=False,
    ),
    Rule(
        "dropped", "dropped_fraction", "{value} of the assignments were dropped", "raise capacity_factor", 0.5,
    ),
    Rule(
        "collapse", "load_entropy", "a few experts serve nearly all tokens (load entropy {value}, below {threshold})",
        "raise the weight of the balance loss or the bias_update_rate, or lower optimizer.lr", _collapsed_entropy,
        above=False, logs=LOGS, after=SETTLED, nothing_learnt=True,
    ),
    Rule(
        "overload", "max_violation", "the fullest expert has {value} more fair shares than its own",
        "balance more strongly: it sets the time of an expert-parallel step", 4.0, logs=LOGS, after=SETTLED,
    ),
    Rule(
        "dead_experts", "idle_fraction", "{value} of the experts got no token since the last log",
        "balance more strongly, or take fewer experts: these learn nothing", 0.25, logs=LOGS, after=SETTLED,
    ),
    Rule(
        "mostly_dead", "idle_fraction", "most experts got no token since the last log ({value})",
        "balance more strongly, or take fewer experts: these learn nothing", 0.5, logs=LOGS, nothing_learnt=True,
    ),
    Rule(
        "no_gradient", "router_gradient_ratio",
        "the router gets no gradient (a parameter of it {value} of what one of the model gets)",
        "let its weights depend on its parameters: take more than one expert a token, or norm_topk_prob=false",
        NO_GRADIENT, above=False, logs=2, nothing_learnt=True,
    ),
    Rule(
        "untaught", "text_gradient_share", "the text does not teach the router ({value} of its gradient)",
        "balance losses alone move it, if any do: take more than one expert a token, norm_topk_prob=false, or a "
        "smaller weight of the balance loss", 0.01, above=False, nothing_learnt=True,
    ),
    Rule(
        "unused", "routed_to_shared",
        "an undecided router behind its shared expert: the routed output is {value} of the shared one",
        "make the shared expert narrower, or scale the routed output (norm_topk_prob, routed_scaling_factor)",
        _stale_norm, above=False, after=STALE_AFTER, begins=0.5, nothing_learnt=True,
    ),
    Rule(
        "early_saturation", "saturation",
        "the router has stopped changing its mind early ({value} of its choices are those of half as many steps)",
        "lower the router's initial scale, or raise optimizer.lr if it hardly learns", 0.98, begins=0.1, ends=0.5,
        from_untrained=True,
    ),
)  # fmt: skip
RULE_OF = {rule.name: rule for rule in RULES}
NOT_FINITE = "not_finite"
RULE_OF[NOT_FINITE] = Rule(NOT_FINITE, "", "a logged number is {value}", "look at the loss and at optimizer.lr", 0.0)
LEARNT_NOTHING = frozenset(rule.name for rule in RULES if rule.nothing_learnt)


@dataclass
class _Entry:
    """What is remembered of a rule and a layer from its first number beyond the threshold."""

    alarm: Alarm  # as last measured
    first_step: int
    last_step: int  # at which it was still on
    worst: float
    in_a_row: int = 0  # measurements beyond the threshold
    on: bool = False
    told: float | None = None  # the value when it was last told; None: never raised


@dataclass
class AlarmWatch:
    """The alarms of a run: which are on, and since when. `steps` is the whole run's."""

    layers: Mapping[int, LayerFacts]
    steps: int
    _entries: dict[tuple[str, int | None], _Entry] = field(default_factory=dict)

    @property
    def on(self) -> list[Alarm]:
        """Raised and not over, in the order in which they came."""
        return [entry.alarm for entry in self._entries.values() if entry.on]

    def look(self, step: int, metrics: Numbers, found: Iterable[Alarm] = ()) -> list[AlarmChange]:
        """Judge the numbers of a logged step, by tag; `found` are alarms that were found otherwise, at any time."""
        changes = [change for alarm in found for change in self._meet(step, alarm, 1)]
        for rule in RULES:
            if not max(rule.after, rule.begins * self.steps) <= step <= rule.ends * self.steps:
                continue
            for layer_id, layer in self.layers.items():
                prefix = f"moe/layer_{layer_id:02d}/"
                numbers = {tag: metrics[prefix + tag] for tag in _READ if prefix + tag in metrics}
                value = numbers.get(rule.tag)
                limit = None if value is None else rule.limit(layer, numbers)
                if value is None or not math.isfinite(value):
                    continue
                if limit is not None and (value > limit if rule.above else value < limit):
                    changes += self._meet(step, Alarm(rule.name, layer_id, value, limit, rule.advice), rule.logs)
                else:
                    changes += self._part(step, (rule.name, layer_id), value)
        changes += self._not_finite(step, metrics)
        return changes

    def to_json(self) -> list[dict[str, Any]]:
        """Every alarm that was raised, as summary.json keeps it."""
        return [
            asdict(entry.alarm) | {"first_step": entry.first_step, "last_step": entry.last_step, "worst": entry.worst}
            | {"on": entry.on, "nothing_learnt": entry.alarm.name in LEARNT_NOTHING}
            for entry in self._entries.values() if entry.told is not None
        ]  # fmt: skip

    def state(self) -> list[dict[str, Any]]:
        """All that a resumed run must know to go on as if it had not stopped."""
        return [asdict(entry) for entry in self._entries.values()]

    def restore(self, state: Any) -> None:
        """Take up `state()`. Raises CheckpointError for what is none."""
        try:
            entries = [_Entry(**{**entry, "alarm": Alarm(**entry["alarm"])}) for entry in state]
            numbers = [
                n for e in entries for n in (e.alarm.value, e.alarm.threshold, e.first_step, e.last_step, e.worst)
            ]
            if not all(isinstance(number, (int, float)) for number in numbers):
                raise TypeError("a value is no number")
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"state.json: `alarms` are not what moelab writes ({error})") from error
        self._entries = {(entry.alarm.name, entry.alarm.layer): entry for entry in entries}

    def _meet(self, step: int, alarm: Alarm, logs: int) -> list[AlarmChange]:
        """A number beyond its threshold."""
        new = _Entry(alarm, step, step, alarm.value)
        entry = self._entries.setdefault((alarm.name, alarm.layer), new)
        if entry.in_a_row == 0 and entry.told is None:
            entry.first_step, entry.worst = step, alarm.value
        entry.in_a_row += 1
        entry.alarm = alarm
        entry.worst = (max if RULE_OF[alarm.name].above else min)(entry.worst, alarm.value)
        if entry.in_a_row < logs:
            return []
        entry.last_step = step
        if not entry.on:
            entry.on, entry.told = True, alarm.value
            return [AlarmChange(step, "begins", alarm)]
        if _excess(alarm.value, alarm.threshold) > GROWTH * _excess(entry.told or 0.0, alarm.threshold):
            entry.told = alarm.value
            return [AlarmChange(step, "grows", alarm)]
        return []

    def _part(self, step: int, key: tuple[str, int | None], value: float) -> list[AlarmChange]:
        """A number within its bounds."""
        entry = self._entries.get(key)
        if entry is None:
            return []
        was_on, entry.on, entry.in_a_row = entry.on, False, 0
        return [AlarmChange(step, "ends", replace(entry.alarm, value=value))] if was_on else []

    def _not_finite(self, step: int, metrics: Numbers) -> list[AlarmChange]:
        bad = [tag for tag, value in metrics.items() if not math.isfinite(value)]
        if not bad:
            return self._part(step, (NOT_FINITE, None), 0.0)
        advice = f"{', '.join(bad[:3])}{' and more' if len(bad) > 3 else ''}; {RULE_OF[NOT_FINITE].advice}"
        return self._meet(step, Alarm(NOT_FINITE, None, metrics[bad[0]], 0.0, advice), 1)


_READ = {rule.tag for rule in RULES} | {"router_entropy"}


def _excess(value: float, threshold: float) -> float:
    return abs(value - threshold) if math.isfinite(value) else math.inf


def _number(value: float) -> str:
    return f"{value:.3g}"
