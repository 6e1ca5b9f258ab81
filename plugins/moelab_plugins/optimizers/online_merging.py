"""Online merging: each step of AdamW is merged with what an earlier training changed, so that it is not forgotten."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from moelab import CheckpointError, Component, ConfigError, Kept, OptimizerContext, Trained, component, hookimpl
from moelab.nn.names import matching
from moelab.nn.optimizing import Optimizer, WeightsOnDisk, each, noise_seed
from moelab.seeds import generator
from moelab.training.rounded import AdamWStep

KEY = "optimizer.algorithm"
LONG = 4096  # numbers of a row that is worth a call of its own
MERGED_AT_ONCE = 1 << 17  # numbers of a CPU's piece
ONDARE, ONTIES = "ondare", "onties"
PAPER, OFFICIAL = "paper", "official"


@dataclass
class OnlineMergingOptions:
    reference: str  # folder of the weights that are to be kept in mind: the model after supervised fine-tuning
    before: str  # folder of the weights that those were trained from
    method: str = ONDARE  # ondare: a random part of each step; onties: its largest part, by the sign of the larger
    alpha: float = 1e-6  # weight of what the reference changed; the paper scans 1e-7 to 1e-4, where it breaks
    reserve_rate: float = 1.0  # p: the share of a step, and of the reference's change, that is merged
    merge_every: int = 1  # K: steps between merges, which then merge the sum of K steps; above 1 it is kept too
    merge_routers: bool = False  # routers too; else they, and what `exclude` matches, step by AdamW alone
    exclude: list[str] = field(default_factory=list)  # patterns over names of parameters
    clip: float = 1.0  # no number of the reference's change is larger
    tau_dtype: str = "float32"  # in which that change is held: float32 or bfloat16
    compat: str = PAPER  # official: as the authors' code, where it departs from their paper
    seed: int = 0  # of official ondare's mask, which is drawn once

    def __post_init__(self) -> None:
        choices = {
            "method": (ONDARE, ONTIES), "compat": (PAPER, OFFICIAL), "tau_dtype": ("float32", "bfloat16"),
        }  # fmt: skip
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be {' or '.join(known)}, not '{getattr(self, key)}'")
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha must be in 0 .. 1, not {self.alpha}")
        if not 0 < self.reserve_rate <= 1:
            raise ValueError(f"reserve_rate must be above 0 and at most 1, not {self.reserve_rate}")
        if self.merge_every < 1:
            raise ValueError(f"merge_every must be at least 1, not {self.merge_every}")
        if self.clip <= 0:
            raise ValueError(f"clip must be positive, not {self.clip}")

    @property
    def is_adamw(self) -> bool:
        """Nothing is merged and nothing left out; the official OnTIES lets tau's signs decide all the same."""
        return self.alpha == 0 and self.reserve_rate == 1 and (self.method, self.compat) != (ONTIES, OFFICIAL)


class OnlineMerging(Optimizer):
    """AdamW whose steps are merged with tau, the change from a base to a reference model (OnDARE, OnTIES).

    Formula: D = AdamW's step without decay, tau = reference - base. OnDARE: w += (1 - a) B(D) + a B(tau), B keeps each
    number with probability p and rescales none. OnTIES: w += (1 - a) T(D) (+) a T(tau), T keeps the share p of the
    largest; x (+) y = x + y of equal signs, else the larger. Every K steps, D being their sum then.
    Source: Lu et al. 2024 (2405.17931), equations 3 to 7, algorithms 1 and 2. a = 0 with p = 1 is AdamW. The decay
    comes before the step, as AdamW has it; the paper names none, the authors' code decays after.
    Use: alignment (DPO) of a model that must not forget its fine-tuning. T counts by the matrix: of a stack each
    expert has its share, gate and up apart. An expert without tokens drifts by a tau all the same.
    Cost: a copy of the weights, for tau, which is read from disk anew where a run goes on, and one more if K > 1. One
    process. `compat: official` (github.com/QwenLM/online_merging_optimizers): OnDARE divides what it keeps by p and
    masks tau once; OnTIES elects signs by D + tau, unweighted, which is not AdamW with a = 0. No more is taken over.
    """

    def __init__(self, options: OnlineMergingOptions, context: OptimizerContext) -> None:
        if context.processes > 1:
            raise ConfigError(f"is for one process, and parallel asks for {context.processes}; take adamw or muon")
        if context.adapters:
            raise ConfigError("merges whole weights, and train.adapters trains factors of them; leave one of them out")
        self._options, self._seed = options, context.seed
        self._merged = {one.name: one for one in _chosen(options, context)}
        others = [one for one in context.trained if one.name not in self._merged]
        settings = context.settings
        super().__init__(
            [*context.groups(self._merged.values(), merged=True), *context.groups(others, merged=False)],
            {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": 0.0},
        )
        self._adamw = AdamWStep(context.moments, context.seed)
        self._tau: dict[str, Tensor] = {}  # {parameter: [numbers]}
        self._sums: dict[str, float] = {}  # {parameter: the sum of tau}, by which it is known again
        self._counts: dict[str, int] = {}  # {parameter: its steps}, which on an accelerator would have to be waited for
        self.register_load_state_dict_post_hook(lambda _: self._counts.clear())
        self._weights: dict[str, WeightsOnDisk] = {}
        for key in ("reference", "before"):
            if context.weights is None:  # a plan
                break
            found = self._weights[key] = context.weights(getattr(options, key), f"{KEY}.{key}")
            for one in self._merged.values():
                if found.shapes.get(one.name) != tuple(one.parameter.shape):
                    raise ConfigError(
                        f"{key}: {getattr(options, key)} holds no '{one.name}' of shape {tuple(one.parameter.shape)}; "
                        "name the model that is trained as it was before, or `exclude` it"
                    )

    def kept(self, group: Mapping[str, Any]) -> Kept:
        if not group["merged"]:
            return Kept(self._adamw.kept)
        beside = {"delta": torch.float32} if self._options.merge_every > 1 else {}
        tau: torch.dtype = getattr(torch, self._options.tau_dtype)
        return Kept(self._adamw.kept | beside, frozenset({"step", "tau_sum"}), tau.itemsize)

    @torch.no_grad()
    def begin(self) -> None:
        """Read tau, a parameter at a time. Raises ConfigError where it is 0 all over."""
        for name, one in self._merged.items():
            tau, base = (torch.empty(one.parameter.shape, device=one.parameter.device) for _ in range(2))
            self._weights["reference"].read_into(name, tau)
            self._weights["before"].read_into(name, base)
            tau.sub_(base).clamp_(-self._options.clip, self._options.clip)
            self._sums[name] = float(tau.sum(dtype=torch.float64))
            self._tau[name] = self._prepared(one, tau).to(getattr(torch, self._options.tau_dtype)).view(-1)
        if not any(bool(tau.any()) for tau in self._tau.values()):
            raise ConfigError(
                f"{KEY}.before: {self._options.before} holds the same weights as the reference "
                f"{self._options.reference}, "
                "so that there is nothing to keep in mind"
            )

    def restored(self) -> str | None:
        """After a state was put back: whether tau is what it was."""
        self._counts.clear()
        for _, name, parameter in each(self):
            then = self.state.get(parameter, {}).get("tau_sum")
            if then is not None and float(then) != self._sums.get(name):
                return (
                    f"was written with another {KEY}.reference or before: what they differ by in '{name}' is something "
                    "else now"
                )
        return None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Every parameter that has a gradient. Raises CheckpointError where tau was not read (`begin`)."""
        assert closure is None, "a training step has its gradients already"
        for group, name, parameter in each(self):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not group["merged"]:
                self._adamw(group, name, parameter, state)
                continue
            if name not in self._tau:
                raise CheckpointError(f"{KEY}: tau of '{name}' was not read; call begin() before the first step")
            if "step" not in state:
                self._adamw.begin(state, parameter)
                state["tau_sum"] = torch.tensor(self._sums[name], dtype=torch.float64)
                if self._options.merge_every > 1:
                    state["delta"] = torch.zeros_like(parameter, dtype=torch.float32)
            self._step(group, self._merged[name], state)

    def _step(self, group: Mapping[str, Any], one: Trained, state: dict[str, Any]) -> None:
        options, parameter = self._options, one.parameter
        count = self._counts[one.name] = self._counts.get(one.name) or int(state["step"])  # once, then without a look
        count = self._counts[one.name] = count + 1
        if options.is_adamw and options.merge_every == 1:
            self._adamw(group, one.name, parameter, state)
            return
        beta1, beta2 = group["betas"]
        root = (1 - beta2**count) ** 0.5
        merge = _Merge(
            options, one, self._tau[one.name], state["delta"].view(-1) if "delta" in state else None,
            rate=-group["lr"] * root / (1 - beta1**count), eps=group["eps"] * root,
            decay=1 - group["lr"] * group["weight_decay"], now=count % options.merge_every == 0,
            noise=Bits(noise_seed(self._seed, "online merging", one.name, state["step"]), parameter.device),
        )  # fmt: skip
        size = MERGED_AT_ONCE if parameter.device.type == "cpu" else max(parameter.numel(), 1)
        if options.method == ONTIES:  # whole matrices, of which the largest numbers are looked for
            matrix = one.slices(parameter)[0].numel()
            size = matrix * max(1, size // matrix)
        self._adamw(group, one.name, parameter, state, size, merge)

    def _prepared(self, one: Trained, tau: Tensor) -> Tensor:
        """What of tau is the same in each step: the share that OnTIES keeps; in the official code OnDARE's too."""
        options, p = self._options, self._options.reserve_rate
        if options.method == ONTIES:
            return largest(one.slices(tau).flatten(1), p)
        if options.compat == OFFICIAL and p < 1:
            stream = generator(options.seed, "tau", one.name, device=tau.device)
            kept = torch.empty(tau.shape, device=tau.device).bernoulli_(p, generator=stream)
            return tau.mul_(kept / p).clamp_(-options.clip, options.clip)
        return tau


class Bits:
    """Random bits of one parameter in one step; numpy's on a CPU, which take half of torch's time there."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        on_cpu = device.type == "cpu"
        self._numpy = np.random.SFC64(seed) if on_cpu else None
        self._torch = None if on_cpu else torch.Generator(device=device).manual_seed(seed)

    def masks(self, count: int, p: float) -> Tensor:
        """[count, 2] bool, each True with probability p: 16 bits below a bound that is drawn for all of them.

        p * 2^16 is no whole number: the bound is one of its neighbours, as often as it lies near it.
        """
        lanes = self._draw(1 + -(-count // 2)).view(torch.int16)
        low, up = divmod(p * 2**16, 1.0)
        bound = int(low) - 2**15 + (lanes[0].float() < up * 2**16 - 2**15).to(torch.int32)
        return lanes[4 : 4 + 2 * count].view(-1, 2) < bound

    def _draw(self, count: int) -> Tensor:
        """[count] int64, all bits at random."""
        if self._numpy is not None:
            return torch.from_numpy(self._numpy.random_raw(count).view(np.int64))
        drawn = torch.empty(count, dtype=torch.int64, device=self._device)
        return drawn.random_(-(2**63), None, generator=self._torch)


@dataclass
class _Merge:
    """What is done to each piece of one parameter after AdamW's step: the merged one in its place. Tensors [n] fp32."""

    options: OnlineMergingOptions
    one: Trained
    tau: Tensor
    delta: Tensor | None  # the sum of the steps since the last merge
    rate: float  # AdamW's step is rate m / (sqrt(v) + eps): with the corrections of both moments
    eps: float
    decay: float  # 1 - lr wd
    now: bool
    noise: Bits

    def __call__(self, begin: int, before: Tensor, weight: Tensor, first: Tensor, second: Tensor) -> None:
        options, part = self.options, slice(begin, begin + weight.numel())
        root = second.sqrt().add_(self.eps)
        if self.delta is not None and not self.now:
            self.delta[part].addcdiv_(first, root, value=self.rate)
            return
        if options.is_adamw:  # its very bits
            return
        if self.delta is None:
            step = torch.div(first, root, out=root).mul_(self.rate)
        else:
            before.sub_(self.delta[part])
            step = self.delta[part].addcdiv_(first, root, value=self.rate)
        tau = self.tau[part].to(weight.dtype)
        merged = (
            _ties(self.one, options, step, tau) if options.method == ONTIES else _dare(self.noise, options, step, tau)
        )
        torch.add(before.mul_(self.decay), merged, out=weight)
        if self.delta is not None:
            self.delta[part].zero_()


def _dare(noise: Bits, options: OnlineMergingOptions, step: Tensor, tau: Tensor) -> Tensor:
    """(1 - a) B(step) + a B(tau)."""
    a, p, official = options.alpha, options.reserve_rate, options.compat == OFFICIAL
    if p == 1:
        return (step * (1 - a)).add_(tau, alpha=a)
    kept = noise.masks(step.numel(), p)
    merged = (step * kept[:, 0]).mul_((1 - a) / p if official else 1 - a)
    return merged.add_(tau if official else tau * kept[:, 1], alpha=a)


def _ties(one: Trained, options: OnlineMergingOptions, step: Tensor, tau: Tensor) -> Tensor:
    """(1 - a) T(step) (+) a tau, tau being sparse already."""
    a = options.alpha
    width = one.slices(one.parameter)[0].numel()
    kept = largest(step.view(-1, width), options.reserve_rate).view(-1)
    if options.compat == OFFICIAL:
        sign = torch.where(kept + tau >= 0, 1.0, -1.0)
        ours, theirs = (x * (x.sign() == sign) for x in (kept, tau))
        return ours.mul_(1 - a).add_(theirs, alpha=a)
    ours, theirs = kept * (1 - a), tau * a
    # What is above 0 and what is below: of one sign one of the two is the sum, of unlike ones each is one of them.
    above, below = (ours.clamp(*bounds).add_(theirs.clamp(*bounds)) for bounds in ((0, None), (None, 0)))
    sign = (above + below).sign_()  # of the larger; torch.where would take four times as long
    return above.mul_(sign.clamp(min=0)).sub_(below.mul_(sign.clamp_(max=0)))


def largest(values: Tensor, share: float) -> Tensor:
    """[n, m] -> the same with 0 for all but the share of each row's largest magnitudes, at least one; ties stay."""
    count, width = max(1, int(share * values.shape[1])), values.shape[1]
    if share >= 1 or count == width:
        return values
    sizes = values.abs()
    if sizes.device.type != "cpu":
        return values * (sizes >= sizes.kthvalue(width - count + 1, dim=1, keepdim=True).values)
    bounds = np.partition(sizes.numpy(), width - count, axis=1)[:, width - count]  # a fortieth of torch's time
    if width < LONG:
        return values * (sizes >= torch.from_numpy(bounds)[:, None])
    below = np.nextafter(bounds, np.float32(0))  # what hardshrink, a tenth of a mask's time, makes 0
    return torch.stack([hardshrink(row, float(end)) for row, end in zip(values, below, strict=True)])


def _chosen(options: OnlineMergingOptions, context: OptimizerContext) -> list[Trained]:
    names = [one.name for one in context.trained]
    excluded = {name for pattern in options.exclude for name in matching(names, pattern, f"{KEY}.exclude")}
    found = [
        one for one in context.trained if one.name not in excluded and (options.merge_routers or not one.is_router)
    ]
    if not found:
        raise ConfigError("exclude: matches every parameter that is trained, so that nothing is merged")
    return found


@hookimpl
def moelab_optimizers() -> list[Component[OptimizerContext, Optimizer]]:
    return [component("online_merging", OnlineMergingOptions, OnlineMerging)]
