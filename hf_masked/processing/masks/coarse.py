"""Coarse masks: random squares of several units (SimMIM, arXiv 2111.09886, section 3.2)."""

import torch

from hf_masked.processing.masks.random import random_mask
from hf_masked.randomness import Draw


def coarse_mask(draw: Draw, grid: tuple[int, int], ratio: float, unit: int = 2) -> torch.Tensor:
    """Masks squares of `unit` x `unit` units, drawn uniformly without replacement.

    Args:
        draw: source of uniform numbers, one per square; the squares with the smallest stay visible.
        grid: (rows, columns) in units, both divisible by `unit`.
        ratio: share of masked squares in [0, 1].
        unit: side of a square in units.

    Returns:
        bool (batch, rows * columns), True = masked, raster order, `num_masked_units(squares, ratio)` squares in each
        row.

    Raises:
        ValueError: if `unit` does not divide the grid, or the ratio lies outside [0, 1].
    """
    rows, columns = grid
    if unit < 1 or rows % unit or columns % unit:
        raise ValueError(f"Squares of {unit} x {unit} units do not tile the grid {rows} x {columns}.")
    squares = (rows // unit, columns // unit)
    mask = random_mask(draw, squares, ratio).unflatten(1, squares)  # (batch, rows of squares, columns of squares)
    return mask.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)
