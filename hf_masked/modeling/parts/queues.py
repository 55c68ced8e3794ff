"""Queues: what earlier batches have left behind, for losses that need more negatives than a batch holds."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init


class FeatureQueue(nn.Module):
    """The latest unit vectors, first in, first out (MoCo, arXiv 1911.05722, section 3.2).

    It begins with random unit vectors and is saved with the model. A model that holds one calls `init_weights()` in
    its `_init_weights`.

    Args:
        size: how many vectors, a multiple of the batch over all processes.
        dim: of the vectors.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("vectors", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random unit vectors and an oldest one, the first, of what has not been loaded."""
        init.copy_(self.vectors, F.normalize(torch.randn_like(self.vectors, dtype=torch.float32), dim=1))
        init.zeros_(self.pointer)

    def forward(self) -> torch.Tensor:
        """(size, dim): a copy, because a backward pass may come after `enqueue`."""
        return self.vectors.clone()

    @torch.no_grad()
    def enqueue(self, keys: torch.Tensor) -> None:
        """Puts the newest vectors in the place of the oldest.

        Args:
            keys: (batch, dim), those of all processes, in the same order in each.

        Raises:
            ValueError: if the queue does not hold a whole number of such batches.
        """
        size, count = len(self.vectors), len(keys)
        if size % count:
            raise ValueError(
                f"queue_size is {size}; it must be a multiple of the batch over all processes, here {count}: choose "
                f"{max(size // count, 1) * count}, or another batch, and drop the last, incomplete one."
            )
        rows = (self.pointer + torch.arange(count, device=keys.device)) % size
        self.vectors.index_copy_(0, rows, keys.to(self.vectors.dtype))
        self.pointer.copy_((self.pointer + count) % size)
