"""Retrieval: which pictures are nearest to a picture, and are they of its class?"""

from collections.abc import Sequence

import torch
from torch.nn import functional as F


@torch.inference_mode()
def retrieval(
    features: torch.Tensor,
    labels: torch.Tensor,
    gallery_features: torch.Tensor | None = None,
    gallery_labels: torch.Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 512,
) -> dict[str, float]:
    """Recall@k and mean average precision of a ranking by cosine similarity.

    Recall@k is the share of queries with a picture of their class among the k nearest (Jegou et al., TPAMI 2011; the
    convention of metric learning). Average precision is the mean, over the pictures of the query's class, of the
    precision at their rank. Queries whose class the gallery has not got are left out of both.

    Args:
        features: float (n, width) of the queries, on any device, where the work is done.
        labels: int64 (n,), their classes.
        gallery_features: float (m, width) of the pictures that are ranked; by default the queries themselves, each
            without itself.
        gallery_labels: int64 (m,).
        ks: numbers of neighbours.
        chunk_size: queries at once; memory is a few times chunk_size x m floats.

    Returns:
        "recall@k" for each of `ks`, and "mean_average_precision", in [0, 1].

    Raises:
        ValueError: for a k that is not in 1 to the size of the gallery, or if no query has its class in the gallery.
    """
    alone = gallery_features is None
    gallery_features, gallery_labels = (features, labels) if alone else (gallery_features, gallery_labels)
    device, size = features.device, len(gallery_features) - alone
    for k in ks:
        if not 1 <= k <= size:
            raise ValueError(f"k is {k}; it must lie in 1 to {size}, the number of pictures that are ranked.")
    gallery = F.normalize(gallery_features.to(device).float(), dim=1)
    labels, gallery_labels = labels.to(device), gallery_labels.to(device)
    found, precisions, queries = dict.fromkeys(ks, 0), 0.0, 0
    for rows in torch.arange(len(features), device=device).split(chunk_size):
        similarity = F.normalize(features[rows].float(), dim=1) @ gallery.T  # (chunk, m)
        if alone:
            similarity[torch.arange(len(rows), device=device), rows] = -torch.inf
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :size]
        hits = gallery_labels[order] == labels[rows, None]  # bool (chunk, size), the nearest first
        hits = hits[hits.any(dim=1)]
        queries += len(hits)
        precisions += float(average_precision(hits).sum())
        for k in ks:
            found[k] += int(hits[:, :k].any(dim=1).sum())
    if queries == 0:
        raise ValueError("No query has a picture of its class in the gallery: there is nothing to retrieve.")
    recalls = {f"recall@{k}": found[k] / queries for k in ks}
    return recalls | {"mean_average_precision": precisions / queries}


@torch.inference_mode()
def nearest(features: torch.Tensor, queries: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest neighbours of the first pictures among all others, by cosine similarity.

    Args:
        features: float (n, width).
        queries: how many pictures, from the first on.
        count: neighbours of each.

    Returns:
        similarity: float (queries, count), the largest first; which pictures: int64 (queries, count).

    Raises:
        ValueError: for more neighbours than there are other pictures.
    """
    if not 1 <= count < len(features):
        raise ValueError(f"{count} neighbours are asked for, and there are {len(features) - 1} other pictures.")
    normalized = F.normalize(features.float(), dim=1)
    similarity = normalized[:queries] @ normalized.T
    similarity.fill_diagonal_(-torch.inf)
    return similarity.topk(count, dim=1)


def average_precision(hits: torch.Tensor) -> torch.Tensor:
    """Float (n,) of bool (n, m): which of the ranked pictures are right, the nearest first, one at least per row."""
    precision = hits.cumsum(dim=1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)  # at each rank
    return (precision * hits).sum(dim=1) / hits.sum(dim=1)
