"""Masked image modelling that predicts pixels or fixed functions of them."""

from hf_masked.modeling.masked_image.colormae import (
    ColorMAEConfig,
    ColorMAEForImageClassification,
    ColorMAEForPreTraining,
    ColorMAEModel,
)
from hf_masked.modeling.masked_image.crossmae import (
    CrossMAEConfig,
    CrossMAEForImageClassification,
    CrossMAEForPreTraining,
    CrossMAEModel,
)
from hf_masked.modeling.masked_image.decayed_shortcuts import (
    DecayedShortcutsConfig,
    DecayedShortcutsForImageClassification,
    DecayedShortcutsForPreTraining,
    DecayedShortcutsModel,
)
from hf_masked.modeling.masked_image.hpm import HPMConfig, HPMForImageClassification, HPMForPreTraining, HPMModel
from hf_masked.modeling.masked_image.localmim import (
    LocalMIMConfig,
    LocalMIMForImageClassification,
    LocalMIMForPreTraining,
    LocalMIMModel,
)
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.masked_image.maskfeat import MaskFeatConfig, MaskFeatForPreTraining, MaskFeatModel
from hf_masked.modeling.masked_image.mfm import MFMConfig, MFMForPreTraining, MFMModel
from hf_masked.modeling.masked_image.self_guided_mae import (
    SelfGuidedMAEConfig,
    SelfGuidedMAEForImageClassification,
    SelfGuidedMAEForPreTraining,
    SelfGuidedMAEModel,
)
from hf_masked.modeling.masked_image.simmim import SimMIMConfig, SimMIMForPreTraining, SimMIMModel
from hf_masked.modeling.masked_image.spark import SparKConfig, SparKForPreTraining, SparKModel

__all__ = [
    "ColorMAEConfig",
    "ColorMAEForImageClassification",
    "ColorMAEForPreTraining",
    "ColorMAEModel",
    "CrossMAEConfig",
    "CrossMAEForImageClassification",
    "CrossMAEForPreTraining",
    "CrossMAEModel",
    "DecayedShortcutsConfig",
    "DecayedShortcutsForImageClassification",
    "DecayedShortcutsForPreTraining",
    "DecayedShortcutsModel",
    "HPMConfig",
    "HPMForImageClassification",
    "HPMForPreTraining",
    "HPMModel",
    "LocalMIMConfig",
    "LocalMIMForImageClassification",
    "LocalMIMForPreTraining",
    "LocalMIMModel",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEModel",
    "MFMConfig",
    "MFMForPreTraining",
    "MFMModel",
    "MaskFeatConfig",
    "MaskFeatForPreTraining",
    "MaskFeatModel",
    "SelfGuidedMAEConfig",
    "SelfGuidedMAEForImageClassification",
    "SelfGuidedMAEForPreTraining",
    "SelfGuidedMAEModel",
    "SimMIMConfig",
    "SimMIMForPreTraining",
    "SimMIMModel",
    "SparKConfig",
    "SparKForPreTraining",
    "SparKModel",
]
