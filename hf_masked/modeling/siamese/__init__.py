"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.siamese_attribution import (
    ReferenceShiftedConfig,
    ReferenceShiftedEncoder,
    ReferenceShiftedForSimilarity,
)
from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel

__all__ = [
    "ReferenceShiftedConfig",
    "ReferenceShiftedEncoder",
    "ReferenceShiftedForSimilarity",
    "SimSiamConfig",
    "SimSiamForPreTraining",
    "SimSiamModel",
]
