"""Reductions that masked losses share, and losses between the views of a pair."""

import torch
from torch.nn import functional as F

from hf_masked.modeling.parts.gather import gather_rows, process_rank


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


def info_nce(
    queries: torch.Tensor, keys: torch.Tensor, negatives: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfoNCE against negatives that all queries share (MoCo, arXiv 1911.05722, equation 1), in float32.

    Args:
        queries: (batch, dim), of unit length, as all the others.
        keys: (batch, dim), the positives.
        negatives: (negatives, dim).
        temperature: of the softmax.

    Returns:
        loss: the mean over the queries.
        logits: (batch, 1 + negatives), the positive's first.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, negatives = queries.float(), keys.float(), negatives.float()
        positive = (queries * keys).sum(dim=1, keepdim=True)
        logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return F.cross_entropy(logits, target), logits


def nt_xent(
    first: torch.Tensor,
    second: torch.Tensor,
    temperature: float,
    anchors: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each view of a picture finds the other one among all views of all processes (SimCLR, equation 1), in float32.

    Args:
        first, second: (batch, dim), the views, of unit length.
        temperature: of the softmax.
        anchors: (batch, dim) each, of unit length, that look for `second` and for `first` in the place of the views;
            what a view is not compared with, itself, they are not compared with either.

    Returns:
        loss: the mean over the first views plus that over the second ones, of this process: twice the mean over all
            2 * batch of them, as `objective.py` has it.
        logits: (batch, batch * processes) of the first view with all second ones.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = first.float(), second.float()
        anchors = (first, second) if anchors is None else tuple(anchor.float() for anchor in anchors)
        all_first, all_second = gather_rows(first), gather_rows(second)
        own = process_rank() * len(first) + torch.arange(len(first), device=first.device)
        across = [anchor @ views.T for anchor, views in zip(anchors, (all_second, all_first), strict=True)]
        within = [
            (anchor @ views.T).scatter(1, own.unsqueeze(1), -torch.inf)
            for anchor, views in zip(anchors, (all_first, all_second), strict=True)
        ]
        logits = [torch.cat(pair, dim=1) / temperature for pair in zip(across, within, strict=True)]
    return sum(F.cross_entropy(side, own) for side in logits), across[0] / temperature
