"""Masked image modelling that predicts pixels or fixed functions of them."""

from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.masked_image.simmim import SimMIMConfig, SimMIMForPreTraining, SimMIMModel

__all__ = [
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEModel",
    "SimMIMConfig",
    "SimMIMForPreTraining",
    "SimMIMModel",
]
