"""Stereo matching by classification over disparities: the cost volume and the expected disparity."""

import torch
from torch.nn import functional as F


def concat_cost_volume(left: torch.Tensor, right: torch.Tensor, planes: int) -> torch.Tensor:
    """Features of each left pixel beside those of the right pixel that each disparity pairs it with.

    Plane i pairs column x with the right picture's column x - i; columns x < i, whose partner lies outside, are zero
    in both halves (Chang and Chen, arXiv 1803.08669, section 3.3).

    Args:
        left, right: float (batch, channels, height, width).
        planes: disparities, from 0, in pixels of the maps.

    Returns:
        (batch, 2 * channels, planes, height, width), the left features first.
    """
    width = left.shape[-1]
    # All windows of the right rows, padded on the left; the last one is not shifted.
    windows = F.pad(right, (planes - 1, 0)).unfold(3, width, 1)  # (batch, channels, height, planes, width)
    shifted = windows.flip(3).transpose(2, 3)
    outside = torch.arange(width, device=left.device) < torch.arange(planes, device=left.device)[:, None]
    repeated = left[:, :, None].masked_fill(outside[:, None], 0)  # (batch, channels, planes, height, width)
    return torch.cat([repeated, shifted], dim=1)


def soft_argmin(scores: torch.Tensor) -> torch.Tensor:
    """The expected disparity (Kendall et al., arXiv 1703.04309, section 3.4), of scores, which are negative costs.

    Args:
        scores: (batch, disparities, height, width), the higher the likelier; the softmax is taken in float32.

    Returns:
        float32 (batch, height, width), in [0, disparities - 1].
    """
    probabilities = scores.float().softmax(dim=1)
    disparities = torch.arange(scores.shape[1], device=scores.device, dtype=torch.float32)
    return (probabilities * disparities.view(-1, 1, 1)).sum(dim=1)


def warp_to_left(right: torch.Tensor, disparity: torch.Tensor) -> torch.Tensor:
    """The right picture as the left camera would see it: column x shows the right column x - disparity.

    Args:
        right: float (batch, channels, height, width).
        disparity: float (batch, height, width), in pixels.

    Returns:
        (batch, channels, height, width), linear between columns, the border repeated outside.
    """
    width = right.shape[-1]
    columns = (torch.arange(width, device=right.device) - disparity).clamp(0, width - 1)  # (batch, height, width)
    lower = columns.floor().long()
    share = (columns - lower).to(right.dtype)[:, None]
    lower = lower[:, None].expand_as(right)
    upper = (lower + 1).clamp(max=width - 1)
    return right.gather(3, lower) * (1 - share) + right.gather(3, upper) * share
