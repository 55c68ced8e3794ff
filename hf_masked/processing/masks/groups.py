"""Masks of groups of points: of a cloud's patches, which have centres in space and no raster (Point-MAE)."""

import torch

from hf_masked.processing.masks.counts import check_ratio
from hf_masked.randomness import Draw


def num_masked_groups(num_groups: int, ratio: float) -> int:
    """Groups masked per cloud, `int(ratio * num_groups)` as Point-MAE's reference counts them: 38 of 64 at 0.6.

    Raises:
        ValueError: if `ratio` is outside [0, 1].
    """
    check_ratio(ratio)
    return int(ratio * num_groups)


def random_group_mask(draw: Draw, num_groups: int, ratio: float) -> torch.Tensor:
    """Masks groups drawn uniformly without replacement.

    Args:
        draw: source of `num_groups` uniform numbers; the groups with the smallest stay visible.
        num_groups: of each cloud.
        ratio: share of masked groups in [0, 1].

    Returns:
        bool (batch, groups), True = masked.
    """
    masked = num_masked_groups(num_groups, ratio)
    noise = draw(num_groups)
    visible = noise.argsort(dim=1, stable=True)[:, : num_groups - masked]
    return torch.ones_like(noise, dtype=torch.bool).scatter(1, visible, False)


def block_group_mask(draw: Draw, center: torch.Tensor, ratio: float) -> torch.Tensor:
    """Masks a random group and those nearest to it.

    Args:
        draw: source of `groups` uniform numbers; the group of the smallest is the middle of the block.
        center: float32 (batch, groups, 3).
        ratio: share of masked groups in [0, 1].

    Returns:
        bool (batch, groups), True = masked.
    """
    num_groups = center.shape[1]
    masked = num_masked_groups(num_groups, ratio)
    first = draw(num_groups).argmin(dim=1)
    middle = center.gather(1, first.view(-1, 1, 1).expand(-1, 1, center.shape[2]))  # (batch, 1, 3)
    order = (center - middle).square().sum(dim=-1).argsort(dim=1, stable=True)
    mask = torch.zeros(center.shape[:2], dtype=torch.bool, device=center.device)
    return mask.scatter(1, order[:, :masked], True)


__all__ = ["block_group_mask", "num_masked_groups", "random_group_mask"]
