"""Masks as pure functions: uniform numbers and a grid in, a boolean mask out.

Every function has the form `mask(draw, grid, ratio, **options) -> bool (batch, units)` with True = masked, raster
order and the same count in every row. They run on whatever device `draw` draws on. A new kind is one file here and
one line in `MASKS`, or `register_mask` from outside the package.
"""

from collections.abc import Callable

import torch

from hf_masked.processing.masks.block import block_mask
from hf_masked.processing.masks.clips import frame_mask, num_masked_in_frames, num_masked_in_tubes, tube_mask
from hf_masked.processing.masks.coarse import coarse_mask
from hf_masked.processing.masks.color import color_mask
from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.processing.masks.grid import grid_mask
from hf_masked.processing.masks.inverse_block import inverse_block_mask
from hf_masked.processing.masks.partial import num_predicted_units, num_skipped_units, partial_mask
from hf_masked.processing.masks.random import random_mask
from hf_masked.randomness import Draw

MaskFunction = Callable[..., torch.Tensor]

MASKS: dict[str, MaskFunction] = {
    "random": random_mask,
    "block": block_mask,
    "coarse": coarse_mask,
    "color": color_mask,
    "grid": grid_mask,
    "inverse_block": inverse_block_mask,
    "tube": tube_mask,
    "frame": frame_mask,
}

# Those that need a plane, (rows, columns), and those that need a clip, (times, rows, columns); others take any grid.
PLANE_MASKS = ("block", "coarse", "color", "grid", "inverse_block")
CLIP_MASKS = ("tube", "frame")


def register_mask(name: str, function: MaskFunction) -> None:
    """Makes `function` available as `mask_kind=name`.

    Raises:
        ValueError: if the name is taken by another function.
    """
    if MASKS.setdefault(name, function) is not function:
        raise ValueError(f"A mask named {name!r} exists already ({MASKS[name].__module__}): choose another name.")


def make_mask(kind: str, draw: Draw, grid: tuple[int, ...], ratio: float, **options) -> torch.Tensor:
    """The mask of the given kind: bool (batch, units), see the functions of `MASKS`.

    Raises:
        ValueError: for an unknown kind.
    """
    if kind not in MASKS:
        raise ValueError(f"Unknown mask kind {kind!r}; known are {', '.join(sorted(MASKS))}.")
    return MASKS[kind](draw, grid, ratio, **options)


def num_masked_of_kind(kind: str, grid: tuple[int, ...], ratio: float) -> int:
    """How many units `make_mask` masks per sample, of the kinds whose count follows from grid and ratio alone."""
    counts = {"tube": num_masked_in_tubes, "frame": num_masked_in_frames}
    return counts.get(kind, num_masked_units)(grid, ratio)


__all__ = [
    "CLIP_MASKS",
    "MASKS",
    "PLANE_MASKS",
    "block_mask",
    "coarse_mask",
    "color_mask",
    "frame_mask",
    "grid_mask",
    "inverse_block_mask",
    "make_mask",
    "num_masked_of_kind",
    "num_masked_units",
    "num_predicted_units",
    "num_skipped_units",
    "partial_mask",
    "random_mask",
    "register_mask",
    "tube_mask",
]
