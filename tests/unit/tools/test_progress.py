"""What the terminal shows of a run's end."""

from __future__ import annotations

from moelab_tools.progress import still_on


def alarm(name: str, layer: int | None, value: float, first_step: int = 3, on: bool = True) -> dict[str, object]:
    return {"name": name, "layer": layer, "value": value, "first_step": first_step, "on": on}


def test_a_rule_that_is_on_in_many_layers_takes_one_line() -> None:
    many = [alarm("busiest", layer, 0.5 + layer / 4, first_step=9 - layer) for layer in (0, 1, 2, 5)]
    assert still_on([*many, alarm("busiest", 6, 9.0, on=False), alarm("stuck", None, 2.0)]) == [
        "alarm still on: busiest, layers 0-2, 5, since step 4, 0.5 to 1.75",
        "alarm still on: stuck, since step 3, 2",
    ]
