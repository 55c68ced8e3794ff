"""What joint neural networks (arXiv 2408.00701) are made of: convolutions, and those that merge two streams."""

import torch
from torch import nn
from torch.nn import functional as F


class ConvBlock(nn.Module):
    """A convolution, batch norm if asked for, and a (leaky) ReLU.

    Args:
        before, after: channels.
        kernel_size, stride, padding: of the convolution; by default the size of the map stays (odd kernels).
        batch_norm: the convolution then has no bias.
        negative_slope: of the leaky ReLU; 0 is the ReLU.
    """

    def __init__(
        self,
        before: int,
        after: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        batch_norm: bool = False,
        negative_slope: float = 0.0,
    ):
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.convolution = nn.Conv2d(before, after, kernel_size, stride, padding, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(after) if batch_norm else nn.Identity()
        self.negative_slope = negative_slope

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, before, rows, columns) to (batch, after, rows, columns), for stride 1."""
        hidden = self.norm(self.convolution(hidden))
        return F.leaky_relu(hidden, self.negative_slope) if self.negative_slope else hidden.relu()


class JointConv(ConvBlock):
    """Merges the maps of two streams of any network into one of the same shape, which goes on in place of the first.

    Args:
        channels: of each map.
        kernel_size: odd.
        kwargs: of `ConvBlock`.
    """

    def __init__(self, channels: int, kernel_size: int = 3, **kwargs):
        super().__init__(2 * channels, channels, kernel_size, **kwargs)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) twice to the same shape; the two are not interchangeable.

        Raises:
            ValueError: for maps of different shapes.
        """
        if first.shape != second.shape:
            raise ValueError(
                f"The maps of the two streams have shapes {tuple(first.shape)} and {tuple(second.shape)}; a joint "
                "convolution merges maps of one shape."
            )
        return super().forward(torch.cat([first, second], dim=1))

    @torch.no_grad()
    def copy_first(self) -> None:
        """Sets the weights to those that hand the first map on and ignore the second."""
        nn.init.dirac_(self.convolution.weight)  # the identity on as many channels as come out: the first map's
        if self.convolution.bias is not None:
            nn.init.zeros_(self.convolution.bias)
