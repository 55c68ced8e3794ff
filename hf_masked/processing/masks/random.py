"""Random masks: every unit has the same chance (MAE, arXiv 2111.06377, section 3)."""

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.randomness import Draw


def random_mask(draw: Draw, grid: tuple[int, ...], ratio: float) -> torch.Tensor:
    """Masks units drawn uniformly without replacement.

    Args:
        draw: source of uniform numbers; the units with the smallest numbers stay visible.
        grid: units per axis, e.g. (rows, columns).
        ratio: share of masked units in [0, 1].

    Returns:
        bool (batch, units), True = masked, raster order, `num_masked_units(grid, ratio)` in each row.
    """
    masked = num_masked_units(grid, ratio)
    noise = draw(torch.Size(grid).numel())
    visible = noise.argsort(dim=1, stable=True)[:, : noise.shape[1] - masked]
    return torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)
