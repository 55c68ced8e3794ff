"""How many units a ratio masks: one rule for every kind of mask."""

import math


def num_masked_units(grid: tuple[int, ...], ratio: float) -> int:
    """Units masked per sample: all but `int(units * (1 - ratio))`, as MAE's reference counts them.

    Raises:
        ValueError: if `ratio` is outside [0, 1].
    """
    check_ratio(ratio)
    units = math.prod(grid)
    return units - int(units * (1 - ratio))


def check_ratio(ratio: float) -> None:
    """Raises a ValueError if `ratio` is outside [0, 1]."""
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"The mask ratio is {ratio}; it must lie in [0, 1], for example 0.75.")
