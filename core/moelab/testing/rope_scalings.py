"""What every scaling of the rotary embedding must do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelab.components import Component
from moelab.config.rope_scaling import RopeContext
from moelab.nn.positional_promises import scaling_built
from moelab.nn.rope import Rope, RopeScaling, rotate
from moelab.testing.report import make_options, promised, run_checks
from moelab.testing.tensors import assert_close, assert_finite, host_waits

LENGTHS = (1, 16, 64, 640)  # the model's own is 64


@dataclass
class RopeScalingCase:
    """One scaling under test. `reference(k, context, length) -> radians a position` of frequency k, if any."""

    component: Component[RopeContext, RopeScaling | None]
    options: Any = None
    context: RopeContext = field(default_factory=lambda: RopeContext(16, 10_000.0, 64))
    reference: Callable[[int, RopeContext, int], float] | None = None

    def __post_init__(self) -> None:
        self.options = make_options(self.component, self.options)

    def build(self) -> RopeScaling | None:
        return self.component.build(self.options, self.context)

    def rope(self) -> Rope:
        """The embedding with it."""
        return Rope(self.context.head_dim, self.context.rope_theta, self.build())

    def frequencies(self, length: int) -> tuple[Tensor, float]:
        return self.rope().frequencies(torch.device("cpu"), length)


def says_what_it_is(case: RopeScalingCase) -> None:
    """A callable with `length_matters` and `reach`, or None."""
    promised(scaling_built(case.build()), case.component.build)


def returns_frequencies_and_a_factor(case: RopeScalingCase) -> None:
    """[head_dim / 2] fp32, positive, none faster than plain, slower ones last; and a positive number."""
    plain, _ = Rope(case.context.head_dim, case.context.rope_theta).frequencies(torch.device("cpu"))
    for length in LENGTHS:
        found, factor = case.frequencies(length)
        assert isinstance(found, Tensor), f"returned {type(found).__name__} for the frequencies, not a tensor"
        assert found.shape == plain.shape, f"frequencies of shape {tuple(found.shape)}, not {tuple(plain.shape)}"
        assert found.dtype == torch.float32, f"frequencies in {found.dtype}, not float32"
        assert_finite(found, "a frequency")
        assert bool((found > 0).all()), "a frequency is not positive"
        assert bool((found <= plain * (1 + 1e-5)).all()), "a frequency is faster than the plain one"
        assert bool((found[1:] <= found[:-1] * (1 + 1e-5)).all()), "frequencies rise"
        assert isinstance(factor, int | float), f"the factor on cos and sin is {factor!r}, not a number"
        assert factor > 0, f"the factor on cos and sin is {factor}"


def keeps_what_it_is_given(case: RopeScalingCase) -> None:
    """The frequencies handed in stay as they are, and another call gives the same."""
    scaling = case.build()
    if scaling is None:
        return
    plain, _ = Rope(case.context.head_dim, case.context.rope_theta).frequencies(torch.device("cpu"))
    before, first = plain.clone(), scaling(plain, 640)[0]
    assert torch.equal(plain, before), "changes the frequencies that it is given, in place"
    scaling(plain, 64)
    assert torch.equal(scaling(plain, 640)[0], first), "a second call gives other frequencies: it remembers the first"


def says_whether_the_length_matters(case: RopeScalingCase) -> None:
    """Frequencies that change with the length of the text are declared."""
    scaling = case.build()
    first, factor = case.frequencies(LENGTHS[0])
    same = all(torch.equal(case.frequencies(n)[0], first) and case.frequencies(n)[1] == factor for n in LENGTHS)
    if scaling is not None and scaling.length_matters:
        assert not same, "declares length_matters, and gives the same for texts of 1 to 640 tokens"
    else:
        assert same, "gives other frequencies for a longer text, and doesn't declare length_matters"


def only_distances_count(case: RopeScalingCase) -> None:
    """A query and a key score the same wherever they stand, at the same distance."""
    query, key = torch.empty(2, 1, 1, 1, case.context.head_dim).normal_(generator=torch.Generator().manual_seed(4))
    scores = []
    for place in (0, 20):
        tables = [case.rope().tables(torch.tensor([[place + far]]), torch.float32, 64) for far in (9, 0)]
        scores.append((rotate(query, *tables[0]) * rotate(key, *tables[1])).sum())
    assert_close(scores[1], scores[0], "the score of two tokens 9 apart, at 0 and at 20", 1e-4)


def waits_for_nothing(case: RopeScalingCase) -> None:
    """No operation asks for a value."""
    found = host_waits(lambda: case.frequencies(640))
    assert not found, f"{found[0]} waits for the device"


def equals_its_closed_form(case: RopeScalingCase) -> None:
    """Where one is declared: to 1e-5."""
    if case.reference is not None:
        for length in LENGTHS:
            expected = [case.reference(k, case.context, length) for k in range(case.context.head_dim // 2)]
            found = case.frequencies(length)[0].double()
            assert_close(found / torch.tensor(expected).double(), torch.ones_like(found), "against the formula", 1e-5)


ROPE_SCALING_CHECKS: tuple[Callable[[RopeScalingCase], None], ...] = (
    says_what_it_is,
    returns_frequencies_and_a_factor,
    keeps_what_it_is_given,
    says_whether_the_length_matters,
    only_distances_count,
    waits_for_nothing,
    equals_its_closed_form,
)


def check_rope_scaling(
    component: Component[RopeContext, RopeScaling | None],
    options: Any = None,
    reference: Callable[[int, RopeContext, int], float] | None = None,
) -> None:
    """Run every check of ROPE_SCALING_CHECKS; raises ConformanceError naming those that fail."""
    case = RopeScalingCase(component, options, reference=reference)
    run_checks("rope scaling", component, case, ROPE_SCALING_CHECKS)
