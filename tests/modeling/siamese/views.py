"""What the tests of Siamese methods share: views, and weights that have moved."""

import torch
from torch import nn


def views(batch: int = 8, size: int = 32, num_views: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise, (batch, num_views, 3, size, size)."""
    return torch.randn(batch, num_views, 3, size, size, generator=torch.Generator().manual_seed(seed))


def smooth_pictures(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 16, 16)."""
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


def noisy(pictures: torch.Tensor, num_views: int, noise: float, generator: torch.Generator) -> torch.Tensor:
    """Views that share less, the more noise there is: (count, num_views, 3, 16, 16)."""
    numbers = torch.randn(len(pictures), num_views, *pictures.shape[1:], generator=generator)
    return (pictures.unsqueeze(1) + noise * numbers) / (1 + noise)


def hard_views(noise: float, num_views: int = 2, count: int = 256) -> torch.Tensor:
    """Smooth pictures in views that share little: (count, num_views, 3, 16, 16)."""
    return noisy(smooth_pictures(count), num_views, noise, torch.Generator().manual_seed(1))


@torch.no_grad()
def moved(*modules: nn.Module, seed: int = 1) -> None:
    """Changes every parameter, as steps of an optimizer do."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
