"""What a masked method predicts."""

import torch


def normalize_patches(patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Each patch less its mean, over its standard deviation (MAE, section 3, "reconstruction target").

    Mean and unbiased variance are taken over all values of a patch, channels included.

    Args:
        patches: (batch, units, values).
        eps: added to the variance.
    """
    mean, std = patch_statistics(patches, eps)
    return (patches - mean) / std


def denormalize_patches(normalized: torch.Tensor, patches: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Inverse of `normalize_patches`, with the statistics of `patches`, the true ones."""
    mean, std = patch_statistics(patches, eps)
    return normalized * std + mean


def patch_statistics(patches: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each patch, (batch, units, 1) each."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + eps).sqrt()
