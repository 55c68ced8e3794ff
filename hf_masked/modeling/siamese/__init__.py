"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel

__all__ = ["SimSiamConfig", "SimSiamForPreTraining", "SimSiamModel"]
