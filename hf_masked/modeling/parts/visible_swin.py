"""Stock Swin on the visible units of pictures alone: what is masked is in no window and in no linear layer.

A unit is what one position of the last stage stands for, so that patch merging, which happens inside of units, never
meets a masked token. GreenMIM (Lang Huang et al., arXiv 2205.13515), from which LocalMIM has its Swin, packs the
visible tokens of several windows into one call of the attention, in a way that must be searched for each mask, so that
a batch shares one. Here linear layers see visible tokens alone, and only the attention itself, a small part of the
work, runs on whole windows, in which masked tokens have no weight: the same mathematics, for any masks.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_masked.modeling.parts.backbones import init_layers_as_mae, xavier_uniform_as_matrix
from hf_masked.modeling.parts.blocks import eager_attention
from hf_masked.modeling.parts.patches import pair, take
from hf_masked.modeling.parts.relative_positions import TABLE
from hf_masked.modeling.parts.visible_units import positions_of_units


class VisibleWindows:
    """The windows of one stage, shifted or not: where its visible tokens stand in them, and which of them meet.

    A window has window_size x window_size slots. As in stock Swin, windows begin at the upper left, those that reach
    beyond the lower and the right edge hold padding, which is attended to, and shifted ones that wrap around an edge
    are divided there.

    Args:
        positions: int64 (batch, n), raster positions of the visible tokens.
        grid: (rows, columns) of all tokens.
        window_size, shift: in tokens.
    """

    def __init__(self, positions: torch.Tensor, grid: tuple[int, int], window_size: int, shift: int):
        (batch, n), num_tokens, device = positions.shape, grid[0] * grid[1], positions.device
        token, region = _slots(grid, window_size, shift, device)  # (windows, slots) each
        # Behind the tokens stands one for all padding.
        visible = torch.zeros(batch, num_tokens + 1, dtype=torch.bool, device=device).scatter(1, positions, True)
        visible[:, num_tokens] = True
        seen = visible[:, token].unsqueeze(2)  # (batch, windows, 1, slots)
        meet = region.unsqueeze(2) == region.unsqueeze(1)  # (windows, slots, slots)
        # A slot sees itself in any case: without anything to attend to, softmax would give NaN, also in gradients.
        itself = torch.eye(token.shape[1], dtype=torch.bool, device=device)
        self.attended = (meet & seen | itself).flatten(0, 1).unsqueeze(1)  # (batch * windows, 1, slots, slots)
        slot_of = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
        slot_of = slot_of.scatter(0, token.flatten(), torch.arange(token.numel(), device=device))
        first = torch.arange(batch, device=device) * token.numel()
        self._slots = (slot_of[positions] + first[:, None]).flatten()  # (batch * n,)
        self._windows = (batch * token.shape[0], token.shape[1])
        self._tokens = (batch, n)

    def spread(self, tokens: torch.Tensor, fill: torch.Tensor | None) -> torch.Tensor:
        """(batch, n, hidden) -> (batch * windows, slots, hidden), with `fill` (hidden,), or zeros, in other slots."""
        hidden = tokens.shape[-1]
        fill = tokens.new_zeros(hidden) if fill is None else fill.to(tokens.dtype)
        rows = fill.expand(self._windows[0] * self._windows[1], hidden)
        return rows.index_copy(0, self._slots, tokens.flatten(0, 1)).unflatten(0, self._windows)

    def take(self, windows: torch.Tensor) -> torch.Tensor:
        """(batch * windows, slots, hidden) -> (batch, n, hidden)."""
        return windows.flatten(0, 1).index_select(0, self._slots).unflatten(0, self._tokens)


def _slots(grid, window_size, shift, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each slot the token, or rows * columns for padding, and a number that only slots that may meet share.

    Returns:
        int64 (windows, slots), twice.
    """
    lines, wrapped = [], []
    for side in grid:
        padded = -(-side // window_size) * window_size
        line = torch.arange(padded, device=device) + shift
        lines.append((line % padded).unflatten(0, (-1, window_size)))  # (windows along the side, window_size)
        wrapped.append((line >= padded).long().unflatten(0, (-1, window_size)))
    row, column = lines[0][:, None, :, None], lines[1][None, :, None, :]
    token = torch.where((row < grid[0]) & (column < grid[1]), row * grid[1] + column, grid[0] * grid[1])
    region = 2 * wrapped[0][:, None, :, None] + wrapped[1][None, :, None, :]
    return token.flatten(2).flatten(0, 1), region.flatten(2).flatten(0, 1)


def visible_swin_stages(
    backbone: PreTrainedModel, pixel_values: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]
) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
    """Runs a stock Swin on the visible units of pictures; with all of them it is the stock model.

    Args:
        backbone: of the size that `check_window` allows.
        pixel_values: float (batch, channels, height, width).
        visible: int64 (batch, visible) raster positions of the visible units.
        grid: (rows, columns) of units.

    Returns:
        Of each stage, after its patch merging and without the final norm: its tokens (batch, n, hidden), unit by unit
        and in raster order inside of units; their raster positions, int64 (batch, n); the (rows, columns) of all.
    """
    config, embeddings = backbone.config, backbone.embeddings
    other_size = tuple(pixel_values.shape[-2:]) != pair(config.image_size)
    pixel_values = pixel_values.to(embeddings.patch_embeddings.projection.weight.dtype)
    tokens, _ = embeddings(pixel_values, interpolate_pos_encoding=other_size)  # (batch, rows * columns, hidden)
    # Of a unit, in tokens.
    side = 2 ** (len(config.depths) - 1)
    positions = positions_of_units(visible, grid, side)
    tokens = take(tokens, positions)
    stages = []
    for stage in backbone.encoder.layers:
        size = (grid[0] * side, grid[1] * side)
        # A map that one window fills in one direction is not shifted.
        shifts = (0, config.window_size // 2) if min(size) > config.window_size else (0,)
        windows = [VisibleWindows(positions, size, config.window_size, shift) for shift in shifts]
        for number, layer in enumerate(stage.blocks):
            tokens = _checkpointed(layer, tokens, windows[number % len(windows)])
        if stage.downsample is not None:
            # Each unit is a small picture.
            units = tokens.unflatten(1, (-1, side * side)).flatten(0, 1)
            tokens = stage.downsample(units, (side, side)).unflatten(0, visible.shape).flatten(1, 2)
            side //= 2
            positions = positions_of_units(visible, grid, side)
        stages.append((tokens, positions, (grid[0] * side, grid[1] * side)))
    return stages


def _checkpointed(layer, tokens, windows):
    # What the stock layer does when it is called, which it is not.
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(_layer, layer, tokens, windows)
    return _layer(layer, tokens, windows)


def _layer(layer: nn.Module, tokens: torch.Tensor, windows: VisibleWindows) -> torch.Tensor:
    """A stock `SwinLayer` on visible tokens: (batch, n, hidden) -> the same shape."""
    attended = _attention(layer.attention, layer.layernorm_before(tokens), windows)
    tokens = tokens + layer.drop_path(layer.dropout(attended))
    return tokens + layer.dropout(layer.mlp(layer.layernorm_after(tokens)))


def _attention(attention: nn.Module, tokens: torch.Tensor, windows: VisibleWindows) -> torch.Tensor:
    """A stock `SwinAttention` on visible tokens: (batch, n, hidden) -> the same shape."""
    query, key, value = (
        # Padding is zero before the projection, and so its bias after it.
        windows.spread(projection(tokens), projection.bias).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )  # (batch * windows, heads, slots, head width) each
    bias = attention.relative_position_bias().to(query.dtype)  # (1, heads, slots, slots)
    bias = torch.where(windows.attended, bias, float("-inf"))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention)
    dropout = attention.attention_dropout if attention.training else 0.0
    context, _ = attend(attention, query, key, value, bias, scaling=attention.scaling, dropout=dropout)
    return attention.o_proj(windows.take(context.flatten(2)))


@torch.no_grad()
def init_swin_as_mae(backbone: PreTrainedModel) -> None:
    """MAE's initialisation of a stock Swin, of what has not been loaded, as LocalMIM's reference has it.

    Linear layers and the patch convolution as in `init_vit_as_mae`; tables of relative positions truncated
    normal(0, 0.02).
    """
    xavier_uniform_as_matrix(backbone.embeddings.patch_embeddings.projection.weight)
    init_layers_as_mae(backbone.encoder)
    for module in backbone.encoder.modules():
        if hasattr(module, TABLE):
            init.trunc_normal_(getattr(module, TABLE), std=0.02)
