"""The Hallucinator: one more positive for each pair of views, made in feature space.

Jing Wu et al., "Hallucination Improves the Performance of Unsupervised Visual Representation Learning", ICCV 2023,
arXiv 2307.12168. No reference implementation is public. From the paper are the two steps, an asymmetric extrapolation
and a non-linear map that is trained by the method's own loss; their formulas here are our choice, after the positive
extrapolation of arXiv 2108.02982.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_masked.modeling.parts.heads import MLPHead

MODES = ("uniform", "beta")


class HallucinatorConfig(PreTrainedConfig):
    """Config of the Hallucinator, the `hallucinator_config` of the methods that take one.

    Args:
        mode: how far features are extrapolated: "uniform" over [0, lam_max], or "beta", Beta(beta_alpha, beta_alpha).
        lam_max: of "uniform".
        beta_alpha: of "beta".
        hidden_dim: of the non-linear map; by default the features' width.
        residual: add the map to what it is given; False lets it replace that.
        weight: of the hallucinated loss beside the method's own.
        start: share of the training after which that weight holds; it is 0 before.
    """

    model_type = "hf_masked_hallucinator_part"

    mode: str = "uniform"
    lam_max: float = 1.0
    beta_alpha: float = 2.0
    hidden_dim: int | None = None
    residual: bool = True
    weight: float = 1.0
    start: float = 0.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.mode not in MODES:
            raise ValueError(f"The Hallucinator's mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        for name in ("lam_max", "weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"The Hallucinator's {name} is {getattr(self, name)}; it must be at least 0.")
        if self.beta_alpha <= 0:
            raise ValueError(f"The Hallucinator's beta_alpha is {self.beta_alpha}; it must be positive.")
        if self.hidden_dim is not None and self.hidden_dim < 1:
            raise ValueError(f"The Hallucinator's hidden_dim is {self.hidden_dim}; it must be at least 1.")
        if not 0.0 <= self.start <= 1.0:
            raise ValueError(f"The Hallucinator's start is {self.start}; a share of the training lies in [0, 1].")


def extrapolate(features: torch.Tensor, partners: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """`features` moved away from `partners`, which stay: `a + lam * (a - b)`.

    Args:
        features, partners: (batch, dim), of unit length.
        lam: (batch, 1), at least 0.

    Returns:
        (batch, dim), not of unit length.
    """
    return features + lam * (features - partners)


class Hallucinator(nn.Module):
    """Turns features and their partners into one more positive of the partners.

    Its parameters are trained by the method's loss and left behind after pretraining.

    Args:
        config: `HallucinatorConfig`.
        dim: of the features.
    """

    def __init__(self, config: HallucinatorConfig, dim: int):
        super().__init__()
        self.config = config
        self.smoothing = MLPHead([dim, config.hidden_dim or dim, dim])
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Says how far training has come, from 0 to 1: the weight is 0 before the start."""
        self.weight = self.config.weight if progress >= self.config.start else 0.0

    def draw_lam(self, features: torch.Tensor) -> torch.Tensor:
        """How far each sample goes, float32 (batch, 1), from torch's generator."""
        size, device = (len(features), 1), features.device
        if self.config.mode == "uniform":
            return self.config.lam_max * torch.rand(size, device=device)
        alpha = torch.tensor(float(self.config.beta_alpha), device=device)
        return torch.distributions.Beta(alpha, alpha, validate_args=False).sample(size)

    def forward(self, features: torch.Tensor, partners: torch.Tensor, lam: torch.Tensor | None = None) -> torch.Tensor:
        """Hallucinates.

        Args:
            features, partners: (batch, dim), of unit length; partners without gradient where the method gives its
                targets none, or the extrapolation would push them.
            lam: (batch, 1) in place of drawn ones.

        Returns:
            (batch, dim), not of unit length.
        """
        lam = self.draw_lam(features) if lam is None else lam
        extrapolated = extrapolate(features, partners, lam).to(self.smoothing[0].weight.dtype)
        smoothed = self.smoothing(extrapolated)
        return extrapolated + smoothed if self.config.residual else smoothed
