"""Masked image modelling that predicts pixels or fixed functions of them."""

from hf_masked.modeling.masked_image.hpm import HPMConfig, HPMForImageClassification, HPMForPreTraining, HPMModel
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.masked_image.self_guided_mae import (
    SelfGuidedMAEConfig,
    SelfGuidedMAEForImageClassification,
    SelfGuidedMAEForPreTraining,
    SelfGuidedMAEModel,
)
from hf_masked.modeling.masked_image.simmim import SimMIMConfig, SimMIMForPreTraining, SimMIMModel

__all__ = [
    "HPMConfig",
    "HPMForImageClassification",
    "HPMForPreTraining",
    "HPMModel",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEModel",
    "SelfGuidedMAEConfig",
    "SelfGuidedMAEForImageClassification",
    "SelfGuidedMAEForPreTraining",
    "SelfGuidedMAEModel",
    "SimMIMConfig",
    "SimMIMForPreTraining",
    "SimMIMModel",
]
