"""Masked modelling that predicts features, tokens or clusters."""

from hf_masked.modeling.masked_latent.beitv2 import BEiTv2Config, BEiTv2ForPreTraining, BEiTv2Model
from hf_masked.modeling.masked_latent.capi import CAPIConfig, CAPIForPreTraining, CAPIModel
from hf_masked.modeling.masked_latent.capi_encoder import CAPIEncoder, CAPIEncoderConfig, CAPIForImageClassification
from hf_masked.modeling.masked_latent.dbot import DBOTConfig, DBOTForImageClassification, DBOTForPreTraining, DBOTModel
from hf_masked.modeling.masked_latent.dmae import DMAEConfig, DMAEForImageClassification, DMAEForPreTraining, DMAEModel
from hf_masked.modeling.masked_latent.maskdistill import MaskDistillConfig, MaskDistillForPreTraining, MaskDistillModel
from hf_masked.modeling.masked_latent.vqkd import VQKDConfig, VQKDForPreTraining, VQKDModel

__all__ = [
    "BEiTv2Config",
    "BEiTv2ForPreTraining",
    "BEiTv2Model",
    "CAPIConfig",
    "CAPIEncoder",
    "CAPIEncoderConfig",
    "CAPIForImageClassification",
    "CAPIForPreTraining",
    "CAPIModel",
    "DBOTConfig",
    "DBOTForImageClassification",
    "DBOTForPreTraining",
    "DBOTModel",
    "DMAEConfig",
    "DMAEForImageClassification",
    "DMAEForPreTraining",
    "DMAEModel",
    "MaskDistillConfig",
    "MaskDistillForPreTraining",
    "MaskDistillModel",
    "VQKDConfig",
    "VQKDForPreTraining",
    "VQKDModel",
]
