"""Reductions that masked losses share."""

import torch


def masked_mean(loss_per_unit: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
    """Mean over the masked units of the whole batch; 0 where nothing is masked.

    Args:
        loss_per_unit: float (batch, units).
        bool_masked_pos: bool (batch, units).
    """
    mask = bool_masked_pos.to(loss_per_unit.dtype)
    return (loss_per_unit * mask).sum() / mask.sum().clamp(min=1)
