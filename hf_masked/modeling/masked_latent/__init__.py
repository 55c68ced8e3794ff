"""Masked modelling that predicts features, tokens or clusters."""

from hf_masked.modeling.masked_latent.dmae import (
    DMAEConfig,
    DMAEForImageClassification,
    DMAEForPreTraining,
    DMAEModel,
)

__all__ = ["DMAEConfig", "DMAEForImageClassification", "DMAEForPreTraining", "DMAEModel"]
