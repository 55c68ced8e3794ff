"""Masked modelling that predicts features, tokens or clusters."""

from hf_masked.modeling.masked_latent.capi import (
    CAPIConfig,
    CAPIEncoder,
    CAPIEncoderConfig,
    CAPIForImageClassification,
    CAPIForPreTraining,
    CAPIModel,
)

__all__ = [
    "CAPIConfig",
    "CAPIEncoder",
    "CAPIEncoderConfig",
    "CAPIForImageClassification",
    "CAPIForPreTraining",
    "CAPIModel",
]
