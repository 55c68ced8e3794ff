"""Block-wise masks: rectangles of random size, shape and place (BEiT, arXiv 2106.08254, algorithm 1)."""

import math

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.randomness import Draw

# Rectangles proposed per sample. BEiT goes on until none of ten tries fits; on its 14 x 14 grid at 40 % fewer than
# ten rectangles are placed, so that 32 proposals leave next to nothing to the final filling-up.
PROPOSALS = 32


def block_mask(
    draw: Draw, grid: tuple[int, int], ratio: float, min_units: int | None = None, min_aspect: float = 0.3
) -> torch.Tensor:
    """Masks rectangles until the count is reached.

    As in BEiT, a rectangle's area is uniform between `min_units` and what remains to be masked and its aspect ratio
    log-uniform in [`min_aspect`, 1 / `min_aspect`]; one that spans a side of the grid, or would mask nothing new or
    too much, is left out. Unlike BEiT, whose count varies, and like BEiT v2, what is still missing after `PROPOSALS`
    rectangles is filled with random units, so that every sample has the exact count.

    Args:
        draw: source of uniform numbers.
        grid: (rows, columns) in units.
        ratio: share of masked units in [0, 1].
        min_units: smallest area of a rectangle; by default BEiT's 16 of 196, in proportion to the grid.
        min_aspect: the flattest rectangle's height over width.

    Returns:
        bool (batch, rows * columns), True = masked, raster order, `num_masked_units(grid, ratio)` in each row.
    """
    rows, columns = grid
    target = num_masked_units(grid, ratio)
    min_units = max(1, round(rows * columns * 16 / 196)) if min_units is None else min_units
    filling_order = draw(rows * columns)
    numbers = draw(4 * PROPOSALS).view(-1, PROPOSALS, 4)
    mask = torch.zeros_like(filling_order, dtype=torch.bool)
    for proposal in range(PROPOSALS):
        remaining = target - mask.sum(dim=1)  # (batch,)
        block = _rectangles(numbers[:, proposal], remaining, rows, columns, min_units, min_aspect)
        new = (block & ~mask).sum(dim=1)
        mask = mask | (block & ((new > 0) & (new <= remaining))[:, None])
    # Masked units sort first, then the free ones in random order: the first `target` of them are the mask.
    order = filling_order.masked_fill(mask, -1.0).argsort(dim=1, stable=True)
    return torch.zeros_like(mask).scatter(1, order[:, :target], True)


def _rectangles(numbers, remaining, rows, columns, min_units, min_aspect):
    """One rectangle per sample from four uniform numbers, or none: bool (batch, rows * columns)."""
    area_number, aspect_number, row_number, column_number = numbers.unbind(dim=1)
    area = min_units + area_number * (remaining - min_units).clamp(min=0)
    aspect = torch.exp((2 * aspect_number - 1) * math.log(1 / min_aspect))
    height = (area * aspect).sqrt().round().clamp(min=1)
    width = (area / aspect).sqrt().round().clamp(min=1)
    fits = (height < rows) & (width < columns)
    top = (row_number * (rows - height + 1)).floor()
    left = (column_number * (columns - width + 1)).floor()
    row = torch.arange(rows, device=numbers.device)
    column = torch.arange(columns, device=numbers.device)
    in_rows = fits[:, None] & (row >= top[:, None]) & (row < (top + height)[:, None])  # (batch, rows)
    in_columns = (column >= left[:, None]) & (column < (left + width)[:, None])  # (batch, columns)
    return (in_rows[:, :, None] & in_columns[:, None, :]).flatten(1)
