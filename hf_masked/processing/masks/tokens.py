"""Masks on the tokens of texts, whose number differs from row to row."""

import math

import torch

from hf_masked.processing.masks.counts import check_ratio
from hf_masked.randomness import Draw


def token_mask(draw: Draw, maskable: torch.Tensor, probability: float) -> torch.Tensor:
    """Masks tokens drawn uniformly without replacement, `floor(probability * tokens + u)` of each text with u uniform
    in [0, 1), so that the mean share is the probability (fairseq, `mask_tokens_dataset.py`); one always stays.

    Args:
        draw: source of uniform numbers; one for each token and one for each text.
        maskable: bool (batch, tokens), True where a token may be masked: no padding.
        probability: share of the maskable tokens to mask, in [0, 1].

    Returns:
        bool (batch, tokens), True = masked.

    Raises:
        ValueError: if `probability` is outside [0, 1].
    """
    check_ratio(probability)
    noise = draw(maskable.shape[1]).masked_fill(~maskable, 2.0)
    # In double, where the sum cannot be rounded up to one more.
    tokens = maskable.sum(dim=1, keepdim=True)
    counts = (probability * tokens.double() + draw(1).double()).floor().clamp(max=tokens - 1)
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks < counts


def fewest_and_most_masked(tokens: int, probability: float) -> tuple[int, int]:
    """The two counts that `token_mask` may mask of so many tokens."""
    return math.floor(probability * tokens), math.ceil(probability * tokens)
