"""Masks from coloured noise: random, but clumped or spread as a filter says (ColorMAE, arXiv 2407.13036)."""

import functools
import math

import torch

from hf_masked.processing.masks.counts import num_masked_units
from hf_masked.processing.masks.random import random_mask
from hf_masked.randomness import Draw, keyed_draw, sample_keys

COLORS = ("red", "blue", "green", "purple", "white")


def color_mask(
    draw: Draw,
    grid: tuple[int, int],
    ratio: float,
    color: str = "green",
    sigma: float = 1.0,
    sigma_low: float = 0.5,
    sigma_high: float = 2.0,
    bank_size: int = 256,
    field_size: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Keeps the units with the largest values of a random window of filtered noise.

    Each sample takes a field of the bank, a window in it and two flips. ColorMAE's reference shares window and flips
    within a batch and has its fields in files, whose filters the paper gives without their widths: these are ours.

    Args:
        draw: source of uniform numbers: five per sample, or one per unit for white.
        grid: (rows, columns) in units.
        ratio: share of masked units in [0, 1].
        color: "red" (low frequencies: clumps), "blue" (high: spread out), "green" (a middle band: blobs at distances),
            "purple" (all but that band), or "white" (all: `random_mask`).
        sigma: deviation in units of the Gaussian of red and blue.
        sigma_low, sigma_high: of the two whose difference is green's band.
        bank_size, field_size: number and side of the fields; the side is at least that of the grid.
        seed: of the bank.

    Returns:
        bool (batch, rows * columns), True = masked, raster order, `num_masked_units(grid, ratio)` in each row.

    Raises:
        ValueError: for an unknown colour, widths in the wrong order, or a field smaller than the grid.
    """
    _check(grid, color, sigma, sigma_low, sigma_high, field_size)
    masked = num_masked_units(grid, ratio)
    if color == "white":
        return random_mask(draw, grid, ratio)
    numbers = draw(5)
    bank = _constant_bank(color, sigma, sigma_low, sigma_high, bank_size, field_size, seed, str(numbers.device))
    values = _windows(bank, numbers, grid)
    visible = values.argsort(dim=1, descending=True, stable=True)[:, : values.shape[1] - masked]
    return torch.ones_like(values, dtype=torch.bool).scatter(1, visible, False)


def _check(grid, color, sigma, sigma_low, sigma_high, field_size) -> None:
    if color not in COLORS:
        raise ValueError(f"Unknown noise colour {color!r}; known are {', '.join(COLORS)}.")
    if not (sigma > 0 and 0 < sigma_low < sigma_high):
        raise ValueError(
            f"sigma={sigma}, sigma_low={sigma_low}, sigma_high={sigma_high}: they must be positive and sigma_low "
            "smaller than sigma_high, for example 1, 0.5 and 2."
        )
    if field_size < max(grid):
        raise ValueError(
            f"The grid {grid[0]} x {grid[1]} does not fit into noise fields of {field_size} x {field_size} units: "
            f"raise field_size to {max(grid)} or more."
        )


def _windows(bank: torch.Tensor, numbers: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(batch, rows * columns) values of the bank: field, top, left and two flips from five uniform numbers."""
    fields, size = bank.shape[0], bank.shape[-1]
    field, top, left = (numbers[:, :3] * numbers.new_tensor([fields, size, size])).long().split(1, dim=1)
    rows, columns = _span(grid[0], numbers[:, 3:4]), _span(grid[1], numbers[:, 4:5])  # (batch, side) each
    # The filters are circular, so a window may begin anywhere and every unit has the same chance.
    rows, columns = (top + rows) % size, (left + columns) % size
    return bank[field.unsqueeze(2), rows.unsqueeze(2), columns.unsqueeze(1)].flatten(1)


def _span(side: int, number: torch.Tensor) -> torch.Tensor:
    """0 to side - 1, backwards in every second sample: (batch, side)."""
    steps = torch.arange(side, device=number.device)
    return torch.where(number < 0.5, side - 1 - steps, steps)


@torch.compiler.assume_constant_result
def _constant_bank(*settings) -> torch.Tensor:
    """`noise_bank`; a compiled graph would see through the cache and filter anew in each step."""
    return noise_bank(*settings)


@functools.lru_cache(maxsize=8)
def noise_bank(
    color: str,
    sigma: float,
    sigma_low: float,
    sigma_high: float,
    bank_size: int,
    field_size: int,
    seed: int,
    device: str,
) -> torch.Tensor:
    """Filtered white noise, float32 (bank_size, field_size, field_size) in [0, 1]; made once (4 MB by default)."""
    draw = keyed_draw(sample_keys(seed, 0, torch.arange(bank_size, device="cpu")))
    white = draw(field_size**2).view(bank_size, field_size, field_size)
    # In float64, so that rounding does not turn the order of two units from one machine to another.
    spectrum = torch.fft.fft2(white.double()) * _response(color, sigma, sigma_low, sigma_high, field_size)
    fields = torch.fft.ifft2(spectrum).real
    lowest, highest = fields.amin(dim=(1, 2), keepdim=True), fields.amax(dim=(1, 2), keepdim=True)
    return ((fields - lowest) / (highest - lowest)).float().to(device)


def _response(color: str, sigma: float, sigma_low: float, sigma_high: float, size: int) -> torch.Tensor:
    """The filter's factor at each frequency, float64 (size, size) (paper, section 3.2)."""
    frequency = torch.fft.fftfreq(size, dtype=torch.float64, device="cpu")  # cycles per unit
    square = frequency[:, None] ** 2 + frequency[None, :] ** 2

    def blur(deviation: float) -> torch.Tensor:
        return torch.exp(-2 * (math.pi * deviation) ** 2 * square)

    if color in ("red", "blue"):
        return blur(sigma) if color == "red" else 1 - blur(sigma)
    band = blur(sigma_low) - blur(sigma_high)
    return band if color == "green" else 1 - band
