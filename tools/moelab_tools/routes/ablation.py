"""The outcome of `moelab ablate`: ranked, corrected for how many were looked at, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moelab.data.token_classes import CLASSES
from moelab.printable import printable
from moelab_tools.compare.contrast import LEVEL
from moelab_tools.routes.asked import Asked
from moelab_tools.routes.effects import Tally
from moelab_tools.routes.intervals import Estimate, corrected

LABEL = 33  # characters of a name in the table
WIDTH = 80


@dataclass(frozen=True)
class Ablation:
    """Effects in the order in which they were asked for."""

    asked: Sequence[Asked]
    tally: Tally
    source: str
    split: str  # which text

    @cached_property
    def effects(self) -> list[Estimate]:
        return self.tally.effects()

    @cached_property
    def p_values(self) -> list[float | None]:
        return corrected(self.effects)

    @property
    def ranking(self) -> list[int]:
        """Indices, the costliest first."""
        return sorted(range(len(self.asked)), key=lambda index: -self.effects[index].value)

    def load(self, index: int) -> float | None:
        """Share of the layers' assignments that a removal takes away."""
        experts = self.asked[index].experts
        if experts is None:
            return 1.0 if self.asked[index].kind == "silence" else None
        taken = sum(self.tally.loads[layer][list(mine)].sum() for layer, mine in experts.items())
        return float(taken / sum(self.tally.loads[layer].sum() for layer in experts))

    def beyond_sum(self) -> dict[int, Estimate]:
        """{index of a set of experts: its cost less the sum of what its members cost alone}."""
        alone = {
            (one.rest, layer, mine[0]): index
            for index, one in enumerate(self.asked)
            for layer, mine in (one.experts or {}).items()
            if len(one.experts or {}) == 1 and len(mine) == 1
        }
        found = {}
        for index, one in enumerate(self.asked):
            members = [(one.rest, layer, expert) for layer, mine in (one.experts or {}).items() for expert in mine]
            if len(members) > 1 and all(member in alone for member in members):
                rest = self.tally.added[index] - sum(self.tally.added[alone[member]] for member in members)
                found[index] = self.tally.effects(rest[None])[0]
        return found

    def word(self, index: int) -> str:
        p = self.p_values[index]
        if p is None or p > LEVEL:
            return "not resolved"
        return "costs" if self.effects[index].value > 0 else "gains"

    def to_json(self) -> dict[str, Any]:
        domains = {domain: self.tally.by_domain(domain) for domain in self.tally.domains}
        classes = {CLASSES[kind]: self.tally.by_class(kind) for kind in self.tally.classes}
        beyond = self.beyond_sum()
        entries = []
        for index in self.ranking:
            one = self.asked[index]
            entry = {
                "what": one.label, "kind": one.kind, "rest": one.rest or None,
                "layers": list(one.counterfactual.layers),
                "experts": None if one.experts is None else {str(k): list(v) for k, v in one.experts.items()},
                "load": self.load(index), "change": self.effects[index].to_json(), "p_holm": self.p_values[index],
                "word": self.word(index),
                "by_domain": {name: found[index].to_json() for name, found in domains.items()},
                "by_class": {name: found[index].to_json() for name, found in classes.items()},
            }  # fmt: skip
            if index in beyond:
                entry["beyond_sum_of_members"] = beyond[index].to_json()
            entries.append(entry)
        return {
            "source": self.source, "text": self.split, "unit": "nats a token", "loss": self.tally.loss,
            "tokens": int(self.tally.tokens.sum()), "documents": len(self.tally.documents),
            "intervals": "95 %, over documents, each alone; by_domain and by_class are not corrected for their number",
            "corrected_for": len(self.asked), "counterfactuals": entries,
        }  # fmt: skip

    def lines(self, top: int) -> list[str]:
        """A table of at most 80 columns: the `top` costliest, and the least costly ones if there are more."""
        tally, count = self.tally, len(self.asked)
        said = [
            f"{self.source}: {tally.loss:.4f} nats a token on {int(tally.tokens.sum()):,} tokens of "
            f"{len(tally.documents)} documents ({self.split})",
            "change of the loss, 95 % over documents, each alone; of this one model: no seed is in it",
            f"p: Holm's, for {count} looks" + self._ways(),
            "",
            f"{'':>4} {'changed':<{LABEL}} {'load %':>6}  {'nats a token':<26} {'p':>6}",
        ]
        order = self.ranking
        shown = order if count <= top else [*order[: top - top // 4], *order[count - top // 4 :]]
        for rank, index in enumerate(order):
            if index not in shown:
                if rank == top - top // 4:
                    said.append(f"     ... {count - top} more: --top {count}, --out FOLDER or --json")
                continue
            load, p = self.load(index), self.p_values[index]
            said.append(
                f"{rank + 1:>4} {printable(self.asked[index].label)[:LABEL]:<{LABEL}} "
                f"{'' if load is None else f'{100 * load:.1f}':>6}  {self.effects[index].told():<26} "
                f"{'' if p is None else '<.001' if p < 0.001 else f'{p:.3f}':>6}"
            )
        said += ["", self._verdicts(), *self._detail(order[0]), *self._sets()]
        return said

    def _ways(self) -> str:
        ways = {one.rest for one in self.asked} - {""}
        told = {
            "renormalise": "; a token's other weights are scaled to the same sum",
            "drop": "; a token's other weights stay as they are",
        }
        return "; both ways for the other weights" if len(ways) > 1 else "".join(told[way] for way in ways)

    def _verdicts(self) -> str:
        words = [self.word(index) for index in range(len(self.asked))]
        told = {"costs": "cost loss", "gains": "gain by it", "not resolved": "not resolved"}
        counted = ", ".join(f"{words.count(word)} {said}" for word, said in told.items() if word in words)
        return f"of {len(words)} at 5 % together: {counted}"

    def _detail(self, index: int) -> list[str]:
        """Where the costliest one costs it."""
        tally, label = self.tally, printable(self.asked[index].label)
        lines = [f"{label}, where:"]
        rows = [(domain, tally.by_domain(domain)[index], self._share(domain=domain)) for domain in tally.domains]
        rows += [(CLASSES[kind], tally.by_class(kind)[index], self._share(kind=kind)) for kind in tally.classes]
        for name, effect, share in rows:
            lines.append(f"     {printable(name, 24):<24} {100 * share:>5.1f} % of tokens  {effect.told()}")
        return [line[:WIDTH] for line in lines]

    def _share(self, domain: str | None = None, kind: int | None = None) -> float:
        tokens = self.tally.tokens
        mine = np.array([domain is None or own == domain for _, own in self.tally.documents])
        part = tokens[mine] if kind is None else tokens[mine][:, kind]
        return float(part.sum() / tokens.sum())

    def _sets(self) -> list[str]:
        return [
            f"{printable(self.asked[index].label)}: beyond the sum of each alone {effect.told()}"
            for index, effect in self.beyond_sum().items()
        ]
