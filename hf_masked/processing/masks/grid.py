"""Grid masks: the same count in each small window, so that visible units are spread evenly."""

import torch

from hf_masked.processing.masks.counts import check_ratio
from hf_masked.randomness import Draw


def grid_mask(draw: Draw, grid: tuple[int, int], ratio: float, window: int = 2, regular: bool = False) -> torch.Tensor:
    """Masks the same number of units in every window.

    With `regular=False` each window keeps units of its own choice (uniform sampling of UM-MAE, arXiv 2205.10063);
    with `regular=True` all windows of a sample keep the same ones (grid-wise sampling of MAE, arXiv 2111.06377,
    figure 6).

    Args:
        draw: source of uniform numbers.
        grid: (rows, columns) in units, both divisible by `window`.
        ratio: share of masked units; `ratio * window**2` must be a whole number.
        window: side of a window in units.
        regular: whether all windows of a sample share one choice.

    Returns:
        bool (batch, rows * columns), True = masked, raster order.

    Raises:
        ValueError: if the window does not divide the grid or the ratio does not divide the window, or lies outside
            [0, 1].
    """
    rows, columns = grid
    if rows % window or columns % window:
        raise ValueError(f"A window of {window} does not divide the grid {rows} x {columns}: choose one that does.")
    cells = window * window
    check_ratio(ratio)
    masked = round(ratio * cells)
    if abs(masked - ratio * cells) > 1e-6:
        raise ValueError(
            f"A mask ratio of {ratio} is no whole number of the {cells} units of a window: choose k / {cells}."
        )
    down, across = rows // window, columns // window
    noise = draw(cells if regular else down * across * cells)
    noise = noise.view(noise.shape[0], -1, cells).expand(-1, down * across, -1)
    visible = noise.argsort(dim=2, stable=True)[:, :, : cells - masked]
    mask = torch.ones_like(noise, dtype=torch.bool).scatter(2, visible, False)
    return mask.view(-1, down, across, window, window).transpose(2, 3).reshape(-1, rows * columns)
