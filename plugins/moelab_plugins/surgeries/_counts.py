"""What several surgeries ask of their options: numbers of experts that can be, and copies of one."""

from __future__ import annotations

from moelab import ConfigError, NewExpert, SurgeryContext

NOT_DECLARED = "its router does not say what becomes of the weights of experts that have equal rows"


def check_top_k(asked: int | None, usual: int, experts: int) -> int:
    """K after the surgery: what was asked for, or `usual`. Raises ConfigError where so many experts aren't there."""
    top_k = usual if asked is None else asked
    if not 1 <= top_k <= experts:
        said = "num_experts_per_tok" if asked is not None else "num_experts_per_tok, which stays if it is not given"
        raise ConfigError(f"{said}: {top_k} of the {experts} experts that are left; give 1 .. {experts}")
    return top_k


def check_experts(experts: list[int], context: SurgeryContext) -> None:
    """Raises ConfigError for an index that is outside, or there twice."""
    count = context.layout.num_experts
    for expert in experts:
        if not 0 <= expert < count:
            raise ConfigError(f"experts: {expert} is none of the experts 0 .. {count - 1} of layer {context.layer_id}")
    if len(set(experts)) < len(experts):
        raise ConfigError(f"experts: {experts} names one twice")


def copies_of(
    expert: int, count: int, *, share: float, down: float = 1.0, noise: float = 0.0, row_noise: float = 0.0
) -> list[NewExpert]:
    """The expert and its `count` - 1 copies, which alone get noise; each has `share` of the weight that it had."""
    first = NewExpert((expert,), down=down, weight=share, copies=count)
    copy = NewExpert((expert,), down=down, weight=share, copies=count, noise=noise, row_noise=row_noise)
    return [first, *[copy] * (count - 1)]
