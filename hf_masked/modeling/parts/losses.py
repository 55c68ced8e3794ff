"""Reductions that masked losses share, and losses between the views of a pair."""

import torch
from torch.nn import functional as F


def masked_mean(loss_per_unit: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
    """Mean over the masked units of the whole batch; 0 where nothing is masked.

    Args:
        loss_per_unit: float (batch, units).
        bool_masked_pos: bool (batch, units); or float weights, of units that are masked in part.
    """
    mask = bool_masked_pos.to(loss_per_unit.dtype)
    return (loss_per_unit * mask).sum() / mask.sum().clamp(min=1e-6)


def negative_cosine(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of minus the cosine between the rows (SimSiam, equation 1), in float32: -1 where they point alike.

    Args:
        prediction, target: (batch, width).
    """
    return -F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()


def softmax_cross_entropy(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of `-softmax(target) . log softmax(prediction)` over channels (SimSiam, section 4.5), in float32.

    Args:
        prediction, target: (batch, width).
    """
    return F.cross_entropy(prediction.float(), target.float().softmax(dim=1))


def normalized_std(vectors: torch.Tensor) -> torch.Tensor:
    """Deviation over the batch of each channel of the L2-normalised rows, averaged (SimSiam, section 4.1).

    About 1 / sqrt(width) for rows that point everywhere alike, 0 for rows that are all the same: a scalar, without
    gradient.

    Args:
        vectors: (batch, width), at least two rows.
    """
    return F.normalize(vectors.detach().float(), dim=1).std(dim=0).mean()
