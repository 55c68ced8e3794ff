"""Inverse block masks: all but one rectangle, which may wrap around the picture's edges (CAPI, arXiv 2502.08769)."""

import math

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.randomness import Draw


def inverse_block_mask(
    draw: Draw, grid: tuple[int, int], ratio: float, min_aspect: float = 0.5, roll: bool = True
) -> torch.Tensor:
    """Leaves one rectangle visible.

    Its height over width is log-uniform in [`min_aspect`, 1 / `min_aspect`], as far as the grid allows; its sides are
    rounded up, its place is uniform, and what it has too many are its last units in raster order. Then the whole mask
    is shifted cyclically by a uniform number of rows and columns, without which units near the edges would be masked
    more often (`data.py`, `InverseBlockMasking`).

    Args:
        draw: source of uniform numbers: five per sample.
        grid: (rows, columns) in units.
        ratio: share of masked units in [0, 1].
        min_aspect: the flattest rectangle's height over width, in (0, 1].
        roll: shift the mask.

    Returns:
        bool (batch, rows * columns), True = masked, raster order, `num_masked_units(grid, ratio)` in each row.

    Raises:
        ValueError: for a `min_aspect` outside (0, 1].
    """
    if not 0.0 < min_aspect <= 1.0:
        raise ValueError(f"min_aspect is {min_aspect}; it must lie in (0, 1], for example 0.5.")
    rows, columns = grid
    visible = rows * columns - num_masked_units(grid, ratio)
    numbers = draw(5)
    height, width = _sides(numbers[:, 0], visible, rows, columns, min_aspect)  # (batch,) each
    top = (numbers[:, 1] * (rows - height + 1)).floor()
    left = (numbers[:, 2] * (columns - width + 1)).floor()
    row = torch.arange(rows, device=numbers.device)[None, :, None]
    column = torch.arange(columns, device=numbers.device)[None, None, :]
    top, left, height, width = (value[:, None, None] for value in (top, left, height, width))
    block = ((row >= top) & (row < top + height) & (column >= left) & (column < left + width)).flatten(1)
    # The units of the rectangle sort first, in raster order.
    order = (~block).to(torch.int8).argsort(dim=1, stable=True)[:, :visible]
    if roll:
        down = (numbers[:, 3:4] * rows).long()
        right = (numbers[:, 4:5] * columns).long()
        order = (order // columns + down) % rows * columns + (order + right) % columns
    return torch.ones_like(block).scatter(1, order, False)


def _sides(number: torch.Tensor, units: int, rows: int, columns: int, min_aspect: float):
    """(height, width) of rectangles of at least so many units, whole float32 (batch,) each."""
    # Outside these a rectangle is wider or higher than the grid.
    least, most = math.log(max(units, 1) / columns**2), math.log(rows**2 / max(units, 1))
    low, high = (min(max(bound, least), most) for bound in (math.log(min_aspect), -math.log(min_aspect)))
    aspect = (low + (high - low) * number).exp()
    height = (units * aspect).sqrt().ceil().clamp(max=rows)
    width = (units / aspect).sqrt().ceil().clamp(max=columns)
    return height, width
