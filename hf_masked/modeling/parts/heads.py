"""Heads: the small networks between an encoder's vector and the pair loss, and from an encoder's map to pixels."""

import math
from itertools import pairwise

import torch
from torch import nn
from transformers import initialization as init


class MLPHead(nn.Sequential):
    """Linear layers with batch norm and ReLU between them.

    A linear layer that batch norm follows has no bias of its own, except the last one, whose bias the reference
    implementation of SimSiam keeps, frozen: see `redundant_bias`.

    Args:
        sizes: widths from the input to the output, at least two.
        batch_norm: normalise the hidden layers.
        last_norm: normalise the output: None, "plain" (without scale and shift), "scale" (without shift) or "affine".
        last_bias: of the last linear layer.
    """

    def __init__(
        self, sizes: list[int], batch_norm: bool = True, last_norm: str | None = None, last_bias: bool = True
    ):
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes[:-1]):
            layers += [nn.Linear(before, after, bias=not batch_norm)]
            layers += [nn.BatchNorm1d(after)] if batch_norm else []
            layers += [nn.ReLU(inplace=True)]
        layers += [nn.Linear(sizes[-2], sizes[-1], bias=last_bias)]
        if last_norm is not None:
            layers += [nn.BatchNorm1d(sizes[-1], affine=last_norm != "plain")]
            if last_norm == "scale":
                layers[-1].bias = None
        super().__init__(*layers)

    @property
    def redundant_bias(self) -> nn.Parameter | None:
        """The bias that the batch norm after it takes away again: never trained."""
        return self[-2].bias if isinstance(self[-1], nn.BatchNorm1d) else None


class PixelShuffleHead(nn.Sequential):
    """One linear layer from each cell of a map to that cell's pixels: (batch, hidden, rows, columns) to
    (batch, channels, rows * stride, columns * stride).

    Args:
        hidden_size: width of the map.
        stride: side of a cell in pixels.
        num_channels: of the picture.
    """

    def __init__(self, hidden_size: int, stride: int, num_channels: int):
        super().__init__(
            nn.Conv2d(hidden_size, stride**2 * num_channels, kernel_size=1),
            nn.PixelShuffle(stride),
        )


@torch.no_grad()
def init_as_torch(module: nn.Module) -> None:
    """torch's own initialisation of a linear layer, a convolution or a batch norm, of what has not been loaded."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        if module.bias is not None:
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        if module.affine:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
        init.zeros_(module.running_mean)
        init.ones_(module.running_var)
        init.zeros_(module.num_batches_tracked)
