"""Stock convolutional nets on the visible units of pictures alone: what is masked has no features at any stage.

SparK (arXiv 2301.03580, section 3.1) calls this sparse convolution: zeros stand where nothing is visible, outputs
there are dropped, so that the masked region never shrinks, and norms know the visible positions only.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel


def positions_of_units(units: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Raster positions of what stands in some units, unit by unit, in a map that has side x side positions per unit.

    Args:
        units: int64 (batch, units), raster positions in `grid`.
        grid: (rows, columns) of units.

    Returns:
        int64 (batch, units * side ** 2).
    """
    columns = grid[1]
    top = (units // columns * side)[:, :, None, None]
    left = (units % columns * side)[:, :, None, None]
    step = torch.arange(side, device=units.device)
    return ((top + step[:, None]) * columns * side + left + step).flatten(1)


class VisibleUnits:
    """The visible units of a batch, and the way between maps of any resolution and the features at visible positions.

    Features at visible positions are (batch, channels, n, 1), a unit's positions one after the other: a map of visible
    positions without neighbourhoods, on which norms (batch norm with the statistics of the visible positions alone),
    1 x 1 convolutions and activations of a stock model run as they are. In memory the channels come last.

    Args:
        visible: int64 (batch, visible) raster positions of the visible units.
        grid: (rows, columns) of units.
    """

    def __init__(self, visible: torch.Tensor, grid: tuple[int, int]):
        self.visible = visible
        self.grid = grid
        self._positions: dict[int, torch.Tensor] = {}

    def take(self, maps: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, channels, n, 1), n = visible units * positions of a unit."""
        batch, channels, height, _ = maps.shape
        positions = self._positions_of_units(height // self.grid[0])
        features = maps.permute(0, 2, 3, 1).reshape(-1, channels).index_select(0, positions)
        return features.view(batch, -1, 1, channels).permute(0, 3, 1, 2)

    def spread(self, features: torch.Tensor, fill: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, channels, n, 1) -> (batch, channels, height, width); where nothing is visible zeros, or `fill`.

        Args:
            features: at visible positions.
            fill: (channels,).
        """
        batch, channels, n, _ = features.shape
        side = math.isqrt(n // self.visible.shape[1])
        height, width = self.grid[0] * side, self.grid[1] * side
        fill = features.new_zeros(channels) if fill is None else fill.to(features.dtype)
        maps = fill.expand(batch * height * width, channels)
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        maps = maps.index_copy(0, self._positions_of_units(side), rows)
        return maps.view(batch, height, width, channels).permute(0, 3, 1, 2)

    def through(self, layer: nn.Module, features: torch.Tensor) -> torch.Tensor:
        """A convolution or pooling on features at visible positions, which sees zeros at the others.

        Args:
            layer: with `kernel_size` and `stride`, square; the stride alone makes its output smaller than its input.
            features: (batch, channels, n, 1).

        Returns:
            (batch, output channels, n / stride ** 2, 1).
        """
        if layer.kernel_size == layer.stride == (1, 1):
            return layer(features)
        return self.take(layer(self.spread(features)))

    def _positions_of_units(self, side: int) -> torch.Tensor:
        """int64 (batch * n,): the visible ones among all positions of the batch, units being side x side."""
        if side not in self._positions:
            rows, columns = self.grid
            first = torch.arange(len(self.visible), device=self.visible.device) * rows * columns * side**2
            self._positions[side] = (positions_of_units(self.visible, self.grid, side) + first[:, None]).flatten()
        return self._positions[side]


def visible_stages(backbone: PreTrainedModel, pixel_values: torch.Tensor, units: VisibleUnits) -> list[torch.Tensor]:
    """Runs a stock ResNet, ConvNeXt or ConvNeXt V2 on the visible units of pictures.

    Batch norm in training takes its statistics, and updates the running ones, over the visible positions. With all
    units visible this is the stock model.

    Args:
        pixel_values: float (batch, channels, height, width).
        units: whose grid the model's stride makes.

    Returns:
        The features of the stem and of each stage, (batch, channels, n, 1).
    """
    pixels = units.take(pixel_values.to(backbone.dtype))
    return STAGES[backbone.config.model_type](backbone, pixels, units)


def _resnet_stages(backbone, features, units):
    embedder = backbone.embedder
    stages = [units.through(embedder.pooler, _convolution_layer(embedder.embedder, features, units))]
    for stage in backbone.encoder.stages:
        features = stages[-1]
        for block in stage.layers:
            features = _residual_block(block, features, units)
        stages.append(features)
    return stages


def _residual_block(block, features, units):
    residual = features
    if not isinstance(block.shortcut, nn.Identity):
        residual = block.shortcut.normalization(units.through(block.shortcut.convolution, residual))
    for layer in block.layer:
        features = _convolution_layer(layer, features, units)
    return block.activation(features + residual)


def _convolution_layer(layer, features, units):
    return layer.activation(layer.normalization(units.through(layer.convolution, features)))


def _convnext_stages(backbone, features, units):
    embeddings = backbone.embeddings
    stages = [embeddings.layernorm(units.through(embeddings.patch_embeddings, features))]
    for stage in backbone.encoder.stages:
        features = stages[-1]
        for layer in stage.downsampling_layer.children():
            features = units.through(layer, features) if isinstance(layer, nn.Conv2d) else layer(features)
        for block in stage.layers:
            features = _convnext_block(block, features, units)
        stages.append(features)
    return stages


def _convnext_block(block, features, units):
    residual = features
    features = units.through(block.dwconv, features).permute(0, 2, 3, 1)  # (batch, n, 1, channels)
    features = block.act(block.pwconv1(block.layernorm(features)))
    if hasattr(block, "grn"):
        features = block.grn(features)
    features = block.pwconv2(features)
    if getattr(block, "layer_scale_parameter", None) is not None:
        features = block.layer_scale_parameter * features
    return residual + block.drop_path(features.permute(0, 3, 1, 2))


# Of the stock models that can run so, by model_type.
STAGES = {"resnet": _resnet_stages, "convnext": _convnext_stages, "convnextv2": _convnext_stages}
