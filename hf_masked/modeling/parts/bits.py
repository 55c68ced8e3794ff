"""Masks as bits, eight to a byte, in NumPy's order: the first element is the highest bit of the first byte."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

_PLACES = (128, 64, 32, 16, 8, 4, 2, 1)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """bool of any shape -> uint8 (ceil(elements / 8),), the last byte filled with zeros."""
    flat = mask.flatten().to(torch.uint8)
    rows = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (rows * torch.tensor(_PLACES, dtype=torch.uint8, device=mask.device)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """uint8 (ceil(elements / 8),) -> bool of a shape."""
    places = torch.tensor(_PLACES, dtype=torch.uint8, device=packed.device)
    return (packed[:, None] & places).ne(0).flatten()[: math.prod(shape)].view(tuple(shape))


def packed_size(shape: Sequence[int]) -> int:
    """Bytes of a packed mask."""
    return math.ceil(math.prod(shape) / 8)


__all__ = ["pack_bits", "packed_size", "unpack_bits"]
