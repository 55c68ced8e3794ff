"""How much of their space features use: figures that fall when a representation collapses. They need no labels."""

import torch
from torch.nn import functional as F


@torch.inference_mode()
def effective_rank(features: torch.Tensor, eps: float = 1e-7) -> float:
    """exp of the entropy of the singular values, normalised to the sum 1: from 1 (one direction) to the full rank.

    RankMe (Garrido et al., arXiv 2210.02885), equations 1 and 2; the features are not centred.

    Args:
        features: float (n, width).
        eps: added to each normalised singular value.
    """
    values = torch.linalg.svdvals(features.float())  # (min(n, width),)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + eps
    return float((-shares * shares.log()).sum().exp())


@torch.inference_mode()
def feature_spread(features: torch.Tensor) -> float:
    """Mean over channels of the standard deviation of L2-normalised features, times sqrt(width).

    1 for features that point everywhere alike, 0 for features that are all the same (SimSiam, arXiv 2011.10566,
    section 4.1 and figure 2, without the factor).

    Args:
        features: float (n, width), n at least 2.
    """
    normalised = F.normalize(features.float(), dim=1)
    return float(normalised.std(dim=0).mean() * features.shape[1] ** 0.5)
