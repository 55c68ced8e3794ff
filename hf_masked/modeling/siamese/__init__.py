"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.moco import MoCoConfig, MoCoForPreTraining, MoCoModel
from hf_masked.modeling.siamese.simclr import SimCLRConfig, SimCLRForPreTraining, SimCLRModel
from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel

__all__ = [
    "MoCoConfig",
    "MoCoForPreTraining",
    "MoCoModel",
    "SimCLRConfig",
    "SimCLRForPreTraining",
    "SimCLRModel",
    "SimSiamConfig",
    "SimSiamForPreTraining",
    "SimSiamModel",
]
