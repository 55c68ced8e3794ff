"""Masks of clips that know time from space: tubes and whole frames (space-only and time-only sampling of MAE-ST, arXiv
2205.09113).

Masks that do not, which the paper prefers, are `random_mask` on a grid of three axes.
"""

import math

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.processing.masks.random import random_mask
from hf_masked.randomness import Draw


def tube_mask(draw: Draw, grid: tuple[int, int, int], ratio: float) -> torch.Tensor:
    """Masks the same random places at all times.

    Args:
        draw: source of uniform numbers, one per place; those with the smallest stay visible.
        grid: (times, rows, columns) in units.
        ratio: share of masked places in [0, 1].

    Returns:
        bool (batch, times * rows * columns), True = masked, time slowest, `num_masked_in_tubes(grid, ratio)` in each
        row.

    Raises:
        ValueError: for a grid without time, or a ratio outside [0, 1].
    """
    times, rows, columns = _axes(grid, "tube")
    return random_mask(draw, (rows, columns), ratio).repeat(1, times)


def frame_mask(draw: Draw, grid: tuple[int, int, int], ratio: float) -> torch.Tensor:
    """Masks random times as a whole.

    Args:
        draw: source of uniform numbers, one per time; those with the smallest stay visible.
        grid: (times, rows, columns) in units.
        ratio: share of masked times in [0, 1].

    Returns:
        bool (batch, times * rows * columns), True = masked, time slowest, `num_masked_in_frames(grid, ratio)` in each
        row.

    Raises:
        ValueError: for a grid without time, or a ratio outside [0, 1].
    """
    times, rows, columns = _axes(grid, "frame")
    return random_mask(draw, (times,), ratio).repeat_interleave(rows * columns, dim=1)


def num_masked_in_tubes(grid: tuple[int, int, int], ratio: float) -> int:
    """Units that `tube_mask` masks per sample."""
    return grid[0] * num_masked_units(grid[1:], ratio)


def num_masked_in_frames(grid: tuple[int, int, int], ratio: float) -> int:
    """Units that `frame_mask` masks per sample."""
    return num_masked_units(grid[:1], ratio) * math.prod(grid[1:])


def _axes(grid: tuple[int, ...], kind: str) -> tuple[int, ...]:
    if len(grid) != 3:
        raise ValueError(
            f"A mask of the kind {kind!r} needs a grid (times, rows, columns), not {tuple(grid)}: use it with methods "
            "that learn from clips, or choose another kind."
        )
    return tuple(grid)
