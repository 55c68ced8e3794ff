"""Clips as sequences of tubelets (patches of a few frames), their learned positions, and stock ViViTs on visible
tubelets only. A clip is (frames, channels, height, width); tubelets are in the order time, row, column."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, VivitConfig
from transformers import initialization as init

from hf_masked.modeling.parts.backbones import run_layers
from hf_masked.modeling.parts.patches import pair, patch_grid, take

Grid = tuple[int, int, int]  # (times, rows, columns)


def tubelet_grid(num_frames: int, height: int, width: int, tubelet_size: Grid) -> Grid:
    """(times, rows, columns) of tubelets.

    Raises:
        ValueError: if the tubelet does not divide the clip.
    """
    if num_frames % tubelet_size[0]:
        raise ValueError(
            f"Clips of {num_frames} frames cannot be cut into tubelets of {tubelet_size[0]} frames: take a multiple "
            "of them, or change `tubelet_size`."
        )
    return num_frames // tubelet_size[0], *patch_grid(height, width, tubelet_size[1:])


def clip_grid_of(config: VivitConfig) -> Grid:
    """(times, rows, columns) of tubelets at a backbone's own clip size."""
    return tubelet_grid(config.num_frames, *pair(config.image_size), tuple(config.tubelet_size))


def check_clips(pixel_values: torch.Tensor, num_channels: int, tubelet_size: Grid, repeats: int = 1) -> Grid:
    """The grid of tubelets of a batch of clips.

    Args:
        pixel_values: (batch, frames, channels, height, width); with several `repeats` (batch, repeats, frames, ...).
        repeats: clips of each video.

    Raises:
        ValueError: for another rank, another number of repeats or channels, or a size that the tubelet does not
            divide.
    """
    leading = "batch" if repeats == 1 else f"batch, {repeats} repeated samples"
    rank = 5 if repeats == 1 else 6
    if pixel_values.ndim != rank or (repeats > 1 and pixel_values.shape[1] != repeats):
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected ({leading}, frames, channels, height, "
            "width): `repeated_samples` in the config says how many clips a video gives."
        )
    num_frames, channels, height, width = pixel_values.shape[-4:]
    if channels != num_channels:
        raise ValueError(
            f"`pixel_values` has {channels} channels and the backbone takes {num_channels}: set "
            f"`num_channels={channels}` in the backbone's config, or convert the clips. Frames come before channels."
        )
    return tubelet_grid(num_frames, height, width, tubelet_size)


def patchify_clip(pixel_values: torch.Tensor, tubelet_size: Grid) -> torch.Tensor:
    """(batch, frames, channels, height, width) -> (batch, tubelets, frames * height * width * channels of one).

    Inside a tubelet the order is (frame, row, column, channel), as in MAE-ST's reference.
    """
    depth, height, width = tubelet_size
    clip = pixel_values.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(1, (-1, depth))
    # (batch, times, depth, channels, rows, height, columns, width)
    return clip.permute(0, 1, 4, 6, 2, 5, 7, 3).flatten(4).flatten(1, 3)


def unpatchify_clip(tubelets: torch.Tensor, grid: Grid, tubelet_size: Grid) -> torch.Tensor:
    """Inverse of `patchify_clip`: (batch, tubelets, values) to clips."""
    clip = tubelets.unflatten(2, (*tubelet_size, -1)).unflatten(1, grid)
    # (batch, times, rows, columns, depth, height, width, channels)
    clip = clip.permute(0, 1, 4, 7, 2, 5, 3, 6)
    return clip.flatten(6, 7).flatten(4, 5).flatten(1, 2)


class SeparablePositions(nn.Module):
    """Learned positions of a class token and of tubelets: at time t and place s, temporal[t] + spatial[s].

    Args:
        hidden_size: width.
        grid: of tubelets.
    """

    def __init__(self, hidden_size: int, grid: Grid):
        super().__init__()
        self.spatial = nn.Parameter(torch.zeros(1, grid[1] * grid[2], hidden_size))
        self.temporal = nn.Parameter(torch.zeros(1, grid[0], hidden_size))
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))

    @torch.no_grad()
    def init_weights(self) -> None:
        for table in (self.spatial, self.temporal, self.class_token):
            init.trunc_normal_(table, std=0.02)

    def forward(self) -> torch.Tensor:
        """The joint table, (1, 1 + tubelets, hidden), the class token's row first."""
        return joint_positions(self.class_token, self.temporal, self.spatial)


class JointPositions(nn.Module):
    """Learned positions, a row for the class token and one for each tubelet. Arguments as of `SeparablePositions`."""

    def __init__(self, hidden_size: int, grid: Grid):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1] * grid[2], hidden_size))

    @torch.no_grad()
    def init_weights(self) -> None:
        init.trunc_normal_(self.table, std=0.02)

    def forward(self) -> torch.Tensor:
        """The table, (1, 1 + tubelets, hidden), the class token's row first."""
        return self.table


def joint_positions(class_token: torch.Tensor, temporal: torch.Tensor, spatial: torch.Tensor) -> torch.Tensor:
    """(1, 1, hidden), (1, times, hidden) and (1, places, hidden) -> (1, 1 + times * places, hidden), time slowest."""
    table = temporal.unsqueeze(2) + spatial.unsqueeze(1)  # (1, times, places, hidden)
    return torch.cat([class_token, table.flatten(1, 2)], dim=1)


def fit_clip_positions(table: torch.Tensor, source: Grid, target: Grid) -> torch.Tensor:
    """Fits a joint table to another grid: bicubically over space, then linearly over time; the class token's row
    stays.

    Args:
        table: (1, 1 + source tubelets, dim).

    Returns:
        (1, 1 + target tubelets, dim); `table` itself when the grids are equal.
    """
    if source == target:
        return table
    class_token, positions = table[:, :1], table[0, 1:].float().unflatten(0, source)
    space = positions.permute(0, 3, 1, 2)  # (times, dim, rows, columns)
    space = F.interpolate(space, size=target[1:], mode="bicubic", align_corners=False)
    time = space.flatten(1).T.unsqueeze(0)  # (1, dim * rows * columns, times)
    time = F.interpolate(time, size=target[0], mode="linear", align_corners=False)
    fitted = time[0].T.unflatten(1, (-1, target[1] * target[2])).transpose(1, 2)  # (times, places, dim)
    return torch.cat([class_token, fitted.flatten(0, 1).unsqueeze(0).to(table.dtype)], dim=1)


def encode_visible_clip(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    visible: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    final_norm: bool = True,
    **kwargs,
) -> torch.Tensor:
    """Runs a stock ViViT on some of a clip's tubelets; on all of them it is the plain backbone.

    Clips of another size or length than the config's get interpolated positions.

    Args:
        pixel_values: float (batch, frames, channels, height, width).
        visible: int64 (batch, visible) positions of the tubelets to see, or None for all.
        positions: (1, 1 + tubelets, hidden) at the config's clip size, in place of the backbone's own table.
        final_norm: return the tokens after the final norm, as the plain backbone does; else the last layer's output.
        kwargs: passed to the layers.

    Returns:
        (batch, 1 + visible, hidden), the class token first.
    """
    embeddings, size = backbone.embeddings, tuple(backbone.config.tubelet_size)
    projection = embeddings.patch_embeddings.projection
    num_frames, _, height, width = pixel_values.shape[1:]
    positions = embeddings.position_embeddings if positions is None else positions
    positions = fit_clip_positions(
        positions, clip_grid_of(backbone.config), tubelet_grid(num_frames, height, width, size)
    )
    class_token, positions = embeddings.cls_token + positions[:, :1], positions[:, 1:]
    # A convolution whose stride is its kernel is a linear layer on tubelets; it runs on the visible ones only.
    tubelets = patchify_clip(pixel_values, size)  # (batch, tubelets, values)
    if visible is not None:
        tubelets, positions = take(tubelets, visible), positions[0][visible]
    tubelets = tubelets.unflatten(2, (*size, -1)).permute(0, 1, 5, 2, 3, 4).flatten(2)  # the kernel's order
    weight = projection.weight.flatten(1)
    tokens = F.linear(tubelets.to(weight.dtype), weight, projection.bias) + positions
    class_token = class_token.expand(tokens.shape[0], -1, -1).to(tokens.dtype)
    tokens = embeddings.dropout(torch.cat([class_token, tokens], dim=1))  # (batch, 1 + visible, hidden)
    tokens = run_layers(backbone, tokens, **kwargs)
    return backbone.layernorm(tokens) if final_norm else tokens
