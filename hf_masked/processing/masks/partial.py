"""Which of the masked units are predicted, where that is not all of them (CrossMAE, arXiv 2401.14391, section 3.3)."""

import math

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.randomness import Draw


def num_skipped_units(units: int, ratio: float, prediction_ratio: float) -> int:
    """Units per sample that are masked and not predicted, as CrossMAE's reference counts them."""
    return int(units * (ratio - prediction_ratio))


def num_predicted_units(grid: tuple[int, ...], ratio: float, prediction_ratio: float | None) -> int:
    """Units per sample that are masked and predicted; without a `prediction_ratio` all that are masked."""
    skipped = 0 if prediction_ratio is None else num_skipped_units(math.prod(grid), ratio, prediction_ratio)
    return num_masked_units(grid, ratio) - skipped


def partial_mask(draw: Draw, mask: torch.Tensor, ratio: float, prediction_ratio: float) -> torch.Tensor:
    """Chooses the predicted units at random among the masked ones.

    Args:
        draw: source of uniform numbers, one per unit; the masked units with the smallest ones are left out.
        mask: bool (batch, units), True = masked.
        ratio: share of masked units.
        prediction_ratio: share of predicted units, at most `ratio`; both count in all units.

    Returns:
        bool (batch, units), True = masked and predicted: all masked units but `num_skipped_units(...)` per row.
    """
    skipped = num_skipped_units(mask.shape[1], ratio, prediction_ratio)
    order = draw(mask.shape[1]).masked_fill(~mask, 1.0).argsort(dim=1, stable=True)
    return mask.scatter(1, order[:, :skipped], False)
