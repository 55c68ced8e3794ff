"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel
from hf_masked.modeling.siamese.triplet import TripletConfig, TripletForPreTraining, TripletModel

__all__ = [
    "SimSiamConfig",
    "SimSiamForPreTraining",
    "SimSiamModel",
    "TripletConfig",
    "TripletForPreTraining",
    "TripletModel",
]
