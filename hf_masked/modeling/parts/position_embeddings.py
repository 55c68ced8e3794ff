"""Fixed two-dimensional sine-cosine positions, and tables fitted to another grid."""

import torch
from torch.nn import functional as F


def sincos_positions_2d(
    dim: int, grid: tuple[int, int], first_axis: str = "column", temperature: float = 10_000.0
) -> torch.Tensor:
    """Sine-cosine table of a grid (MAE's `util/pos_embed.py`; Vaswani et al., section 3.5, once per axis).

    Each axis takes one half of the width, laid out [sin | cos] with frequencies `temperature ** (-k / (dim / 4))`.

    Args:
        dim: width, divisible by 4.
        grid: (rows, columns).
        first_axis: which axis takes the first half: "column" as in MAE's released weights, or "row".
        temperature: base of the frequencies.

    Returns:
        float32 (rows * columns, dim), raster order, computed in float64.

    Raises:
        ValueError: if 4 does not divide `dim`, or for an unknown axis.
    """
    if dim % 4:
        raise ValueError(f"Sine-cosine positions need a width divisible by 4, not {dim}.")
    if first_axis not in ("column", "row"):
        raise ValueError(f"first_axis is {first_axis!r}; it must be 'column' or 'row'.")
    # On the CPU, whatever the default device: a model under construction may be on the meta device.
    frequencies = temperature ** -(torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    row, column = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float64, device="cpu"),
        torch.arange(grid[1], dtype=torch.float64, device="cpu"),
        indexing="ij",
    )
    axes = (column, row) if first_axis == "column" else (row, column)
    angles = [axis.flatten().outer(frequencies) for axis in axes]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def interpolate_positions(
    table: torch.Tensor, source_grid: tuple[int, int], target_grid: tuple[int, int]
) -> torch.Tensor:
    """Fits a table to another grid, bicubically along both axes; what stands before the grid's rows is kept.

    Args:
        table: (1, prefix + source rows * columns, dim).
        source_grid, target_grid: (rows, columns).

    Returns:
        (1, prefix + target rows * columns, dim); `table` itself when the grids are equal.
    """
    if source_grid == target_grid:
        return table
    units = source_grid[0] * source_grid[1]
    prefix, positions = table[:, : table.shape[1] - units], table[:, table.shape[1] - units :]
    positions = positions.unflatten(1, source_grid).permute(0, 3, 1, 2)  # (1, dim, rows, columns)
    fitted = F.interpolate(positions.float(), size=target_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, fitted.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
