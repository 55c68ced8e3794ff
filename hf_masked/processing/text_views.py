"""Views of texts: tokens that are left out, and stretches that are cut out."""

import torch

from hf_masked.randomness import Draw


def kept_by_deletion(draw: Draw, movable: torch.Tensor, probability: float) -> torch.Tensor:
    """Leaves tokens out, each with the same probability; of each text one stays at least.

    Word deletion of SimCSE (Gao et al., EMNLP 2021, arXiv 2104.08821, table 1) and of Contriever (Izacard et al.,
    arXiv 2112.09118, section 3.1), on tokens.

    Args:
        draw: source of uniform numbers, one for each token.
        movable: bool (batch, tokens), False for padding and for tokens that have to stay.
        probability: in [0, 1).

    Returns:
        bool (batch, tokens): those of `movable` that stay.
    """
    noise = draw(movable.shape[1]).masked_fill(~movable, -1.0)
    stays = (noise >= probability) | (noise == noise.amax(dim=1, keepdim=True))
    return movable & stays


def kept_by_crop(draw: Draw, movable: torch.Tensor, scale: tuple[float, float]) -> torch.Tensor:
    """Cuts out one stretch of each text (SimCSE, table 1; Contriever, section 3.1).

    Args:
        draw: source of uniform numbers, two for each text.
        movable: as of `kept_by_deletion`.
        scale: smallest and largest share of the text's tokens.

    Returns:
        bool (batch, tokens): those of `movable` that stay, one at least.
    """
    share, place = draw(2).double().split(1, dim=1)
    tokens = movable.sum(dim=1, keepdim=True)
    length = ((scale[0] + share * (scale[1] - scale[0])) * tokens).round().clamp(min=1)
    start = (place * (tokens - length + 1)).floor()
    number = movable.cumsum(dim=1) - 1  # of each token among the movable ones
    return movable & (number >= start) & (number < start + length)


def close_gaps(input_ids: torch.Tensor, keep: torch.Tensor, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Moves the tokens that stay to the front, in their order, and fills up with padding.

    Args:
        input_ids: int64 (batch, tokens).
        keep: bool (batch, tokens).
        pad_token_id: what is filled up with.

    Returns:
        input_ids, and the attention mask, int64, 1 for the tokens that stayed: (batch, tokens) each.
    """
    order = (~keep).long().argsort(dim=1, stable=True)
    there = keep.gather(1, order)
    return input_ids.gather(1, order).masked_fill(~there, pad_token_id), there.long()
