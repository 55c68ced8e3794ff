"""Masked modelling that predicts features, tokens or clusters."""

from hf_masked.modeling.masked_latent.dbot import DBOTConfig, DBOTForImageClassification, DBOTForPreTraining, DBOTModel

__all__ = ["DBOTConfig", "DBOTForImageClassification", "DBOTForPreTraining", "DBOTModel"]
