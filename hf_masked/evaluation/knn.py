"""Weighted nearest-neighbour classification of frozen features."""

import torch
from torch.nn import functional as F


@torch.inference_mode()
def weighted_knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
    chunk_size: int = 512,
) -> float:
    """Accuracy when the k nearest training pictures vote with the weight exp(cosine similarity / temperature).

    Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978), section
    3.4; DINO (arXiv 2104.14294) takes k = 20 and the temperature 0.07.

    Args:
        train_features: float (n, width), on any device, where the work is done.
        train_labels: int64 (n,), classes from 0.
        test_features: float (m, width).
        test_labels: int64 (m,).
        k: number of neighbours.
        temperature: the smaller, the more the nearest neighbours count.
        chunk_size: test pictures at once; memory is chunk_size x n floats.

    Returns:
        The share of test pictures whose class got the most votes.

    Raises:
        ValueError: for a k that is not in 1 to n.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}; it must lie in 1 to {len(train_features)}, the number of training features.")
    device = train_features.device
    train_labels, test_labels = train_labels.to(device), test_labels.to(device)
    train_features = F.normalize(train_features.float(), dim=1)
    num_classes = int(train_labels.max()) + 1
    correct = 0
    for features, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        similarity = F.normalize(features.to(device).float(), dim=1) @ train_features.T  # (chunk, n)
        similarity, neighbours = similarity.topk(k, dim=1)
        votes = torch.zeros(len(labels), num_classes, device=device)
        votes.scatter_add_(1, train_labels[neighbours], (similarity / temperature).exp())
        correct += int((votes.argmax(dim=1) == labels).sum())
    return correct / len(test_labels)
