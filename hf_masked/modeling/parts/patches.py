"""Pictures as sequences of patches, masks as lists of indices, and the checks that both need."""

import math

import torch


def pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) of a size that may be given as one number."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def patch_grid(height: int, width: int, patch_size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of patches.

    Raises:
        ValueError: if the patch does not divide the picture.
    """
    if height % patch_size[0] or width % patch_size[1]:
        raise ValueError(
            f"Pictures of {height} x {width} pixels cannot be cut into patches of {patch_size[0]} x {patch_size[1]}: "
            "resize them to a multiple of the patch, or change `patch_size`."
        )
    return height // patch_size[0], width // patch_size[1]


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor:
    """(batch, channels, height, width) -> (batch, units, patch height * patch width * channels).

    Units in raster order; inside a patch the order is (row, column, channel), as in MAE's reference.
    """
    batch, channels, height, width = pixel_values.shape
    rows, columns = patch_grid(height, width, patch_size)
    patches = pixel_values.reshape(batch, channels, rows, patch_size[0], columns, patch_size[1])
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> torch.Tensor:
    """Inverse of `patchify`: (batch, units, patch height * patch width * channels) to a picture."""
    pixels = patches.unflatten(2, (*patch_size, -1)).unflatten(1, grid)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(
        patches.shape[0], -1, grid[0] * patch_size[0], grid[1] * patch_size[1]
    )


def take(units: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of (batch, units, dim) at `indices` (batch, n): (batch, n, dim)."""
    return units.gather(1, indices.unsqueeze(-1).expand(-1, -1, units.shape[-1]))


def visible_indices(bool_masked_pos: torch.Tensor, num_masked: int | None = None) -> torch.Tensor:
    """Raster positions of the visible units of each row.

    Args:
        bool_masked_pos: bool (batch, units), True = masked, the same count in each row.
        num_masked: that count, where it is known; else it is read from the mask, which waits for the device.

    Returns:
        int64 (batch, visible), ascending.

    Raises:
        ValueError: in eager mode, if rows differ in their count.
    """
    if num_masked is None:
        counts = bool_masked_pos.sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"`bool_masked_pos` masks {min(counts)} to {max(counts)} units per sample; an encoder that drops "
                "masked tokens needs the same count in each row."
            )
        num_masked = counts[0]
    order = bool_masked_pos.to(torch.int8).argsort(dim=1, stable=True)  # visible ones first, in raster order
    return order[:, : bool_masked_pos.shape[1] - num_masked]


def predicted_indices(
    bool_predicted_pos: torch.Tensor, bool_masked_pos: torch.Tensor, num_predicted: int | None = None
) -> torch.Tensor:
    """Raster positions of the units that are predicted, which are masked ones.

    Args:
        bool_predicted_pos: bool (batch, units), True = predicted, the same count in each row.
        bool_masked_pos: bool (batch, units), True = masked.
        num_predicted: that count, where it is known; else it is read from the mask, which waits for the device.

    Returns:
        int64 (batch, predicted), ascending.

    Raises:
        ValueError: in eager mode, if rows differ in their count, nothing or a visible unit is predicted.
    """
    units = bool_predicted_pos.shape[1]
    if num_predicted is not None:
        return visible_indices(~bool_predicted_pos, units - num_predicted)
    counts = bool_predicted_pos.sum(dim=1).tolist()
    if len(set(counts)) > 1 or (counts[0] == 0 and bool_masked_pos.any()):
        raise ValueError(
            f"`bool_predicted_pos` predicts {min(counts)} to {max(counts)} patches per picture; it must be the "
            "same count in each row, and at least one. With a mask of your own, pass a `bool_predicted_pos` that "
            "fits it, or set `prediction_ratio` to None, which predicts all that is masked."
        )
    if (bool_predicted_pos & ~bool_masked_pos).any():
        raise ValueError("`bool_predicted_pos` is True where `bool_masked_pos` is not: predict masked patches only.")
    return visible_indices(~bool_predicted_pos, units - counts[0])


def check_pixel_values(
    pixel_values: torch.Tensor, num_channels: int, patch_size: tuple[int, int] = (1, 1)
) -> tuple[int, int]:
    """The grid of patches of a batch of pictures.

    Raises:
        ValueError: for another rank, another number of channels, or a size that the patch does not divide.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (batch, channels, height, width)."
        )
    if pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` has {pixel_values.shape[1]} channels and the backbone takes {num_channels}: set "
            f"`num_channels={pixel_values.shape[1]}` in the backbone's config, or convert the pictures."
        )
    return patch_grid(pixel_values.shape[2], pixel_values.shape[3], patch_size)


def check_mask(
    bool_masked_pos: torch.Tensor, batch: int, grid: tuple[int, ...], name: str = "bool_masked_pos"
) -> None:
    """Raises a ValueError unless the mask is bool (batch, units)."""
    expected = (batch, math.prod(grid))
    if tuple(bool_masked_pos.shape) != expected or bool_masked_pos.dtype != torch.bool:
        raise ValueError(
            f"`{name}` is {bool_masked_pos.dtype} {tuple(bool_masked_pos.shape)}; expected torch.bool "
            f"{expected}: one value, True = masked, for each of the {' x '.join(map(str, grid))} units."
        )
