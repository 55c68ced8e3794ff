"""Masked language models: tokens of texts are hidden and predicted."""

from hf_masked.modeling.masked_language.mae_lm import (
    MAELMConfig,
    MAELMForMaskedLM,
    MAELMForPreTraining,
    MAELMModel,
)

__all__ = ["MAELMConfig", "MAELMForMaskedLM", "MAELMForPreTraining", "MAELMModel"]
