"""Histograms of oriented gradients (HOG): the target of MaskFeat and LocalMIM, and how to draw them."""

import math

import torch
from torch.nn import functional as F


def hog(pixel_values: torch.Tensor, cell_size: tuple[int, int], num_bins: int = 9) -> torch.Tensor:
    """`gradient_histograms`, each of Euclidean length 1 (or 0): float32 (batch, channels, num_bins, rows, columns)."""
    return F.normalize(gradient_histograms(pixel_values, cell_size, num_bins), dim=2)


@torch.no_grad()
def gradient_histograms(
    pixel_values: torch.Tensor,
    cell_size: tuple[int, int],
    num_bins: int = 9,
    gradient_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Per channel and cell, how much gradient there is in each unsigned direction.

    Sobel gradients (x, y) of the picture, mirrored at its edges, count with their magnitude in one bin of
    `floor(num_bins * atan2(x, y) / pi) mod num_bins` (MaskFeat, section 3.2, and SlowFast's `HOGLayerC`). Computed in
    float32 whatever the input. Flat regions give exact zeros: differences are taken before sums, because
    normalising would blow the rounding errors of a convolution up to length 1.

    Args:
        pixel_values: float (batch, channels, height, width), at least 2 x 2 pixels.
        cell_size: (height, width) of a cell in pixels; divides the picture.
        num_bins: directions in half a turn.
        gradient_bias: float (2,), added to x and y (LocalMIM's `hog_bias`).

    Returns:
        float32 (batch, channels, num_bins, rows, columns) of cells: means over their pixels.
    """
    picture = F.pad(pixel_values.float(), (1, 1, 1, 1), mode="reflect")
    x = _smooth(picture[..., :-2] - picture[..., 2:], dim=-2)
    y = _smooth(picture[..., :-2, :] - picture[..., 2:, :], dim=-1)
    if gradient_bias is not None:
        x, y = x + gradient_bias[0], y + gradient_bias[1]
    magnitude = (x.square() + y.square()).sqrt()
    direction = (torch.atan2(x, y) / math.pi * num_bins).floor().remainder(num_bins)
    # One bin at a time: a scatter is not deterministic on GPUs, all at once would take num_bins pictures' memory.
    return torch.stack(
        [F.avg_pool2d(magnitude * (direction == number), cell_size) for number in range(num_bins)], dim=2
    )


def pooled_histograms(histograms: torch.Tensor, factor: int) -> torch.Tensor:
    """`gradient_histograms` of cells that are `factor` times as high and wide."""
    pooled = F.avg_pool2d(histograms.flatten(1, 2), factor)
    return pooled.unflatten(1, histograms.shape[1:3])


def _smooth(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums of three neighbours, the middle one twice."""
    size = values.shape[dim] - 2
    return values.narrow(dim, 0, size) + 2 * values.narrow(dim, 1, size) + values.narrow(dim, 2, size)


def cells_to_units(cells: torch.Tensor, cells_per_unit: tuple[int, int] = (1, 1)) -> torch.Tensor:
    """(batch, channels, bins, rows, columns) of cells to one vector per unit: (batch, units, values).

    Units in raster order; inside a unit the order is (channel, bin, row of the cell, column of the cell), as in
    SlowFast.
    """
    height, width = cells_per_unit
    cells = cells.flatten(1, 2)
    cells = cells.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (batch, values, rows, height, columns, width)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def units_to_cells(
    units: torch.Tensor, grid: tuple[int, int], num_channels: int, cells_per_unit: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    """Inverse of `cells_to_units`, for units in a grid (rows, columns)."""
    height, width = cells_per_unit
    values = units.unflatten(1, grid).unflatten(
        3, (-1, height, width)
    )  # (batch, rows, columns, values, height, width)
    return values.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3).unflatten(1, (num_channels, -1))


def hog_glyphs(cells: torch.Tensor, cell_size: tuple[int, int], pixel_values: torch.Tensor) -> torch.Tensor:
    """Draws histograms: in each cell a line per bin through the middle, along the edge, as bright as the bin is full.

    Args:
        cells: (batch, channels, bins, rows, columns), of `hog` or predicted; what is negative is not drawn.
        cell_size: (height, width) of a cell in pixels.
        pixel_values: (batch, channels, height, width), whose smallest and largest values are the drawing's black and
            white, picture by picture.

    Returns:
        (batch, channels, height, width).
    """
    glyphs = _glyphs(cells.shape[2], cell_size).to(cells)  # (bins, height, width)
    # (batch, channels, rows, columns, height, width): where lines cross the brightest shows.
    drawn = cells.movedim(2, -1)[..., None, None].mul(glyphs).amax(dim=-3).clamp(0, 1)
    drawn = drawn.movedim(-2, -3).flatten(4).flatten(2, 3)
    black, white = (extreme(pixel_values, dim=(1, 2, 3), keepdim=True) for extreme in (torch.amin, torch.amax))
    return black + (white - black) * drawn


def _glyphs(num_bins: int, cell_size: tuple[int, int]) -> torch.Tensor:
    """A line one pixel wide per bin, softened at its borders: (bins, height, width)."""
    height, width = cell_size
    row = torch.arange(height)[:, None] - (height - 1) / 2
    column = torch.arange(width)[None, :] - (width - 1) / 2
    # `hog` has directions as atan2(x, y): the gradient's angle from the vertical axis. Edges stand across it.
    angle = (torch.arange(num_bins) + 0.5)[:, None, None] * math.pi / num_bins
    distance = (column * angle.sin() + row * angle.cos()).abs()
    return (1.25 - distance).clamp(0, 1)
