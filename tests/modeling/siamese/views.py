"""What the tests of Siamese methods share: views, and weights that have moved."""

import torch
from torch import nn


def views(batch: int = 8, size: int = 32, num_views: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise, (batch, num_views, 3, size, size)."""
    return torch.randn(batch, num_views, 3, size, size, generator=torch.Generator().manual_seed(seed))


def hard_views(noise: float, num_views: int = 2, count: int = 256) -> torch.Tensor:
    """Smooth pictures in views that share little: (count, num_views, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    pictures = nn.functional.interpolate(coarse, size=16, mode="bilinear").unsqueeze(1)
    return (pictures + noise * torch.randn(count, num_views, 3, 16, 16, generator=generator)) / (1 + noise)


@torch.no_grad()
def moved(*modules: nn.Module, seed: int = 1) -> None:
    """Changes every parameter, as steps of an optimizer do."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
