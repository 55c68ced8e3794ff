"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.byol import BYOLConfig, BYOLForPreTraining, BYOLModel
from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel
from hf_masked.modeling.siamese.tribyol import TriBYOLConfig, TriBYOLForPreTraining, TriBYOLModel
from hf_masked.modeling.siamese.triplet import TripletConfig, TripletForPreTraining, TripletModel

__all__ = [
    "BYOLConfig",
    "BYOLForPreTraining",
    "BYOLModel",
    "SimSiamConfig",
    "SimSiamForPreTraining",
    "SimSiamModel",
    "TriBYOLConfig",
    "TriBYOLForPreTraining",
    "TriBYOLModel",
    "TripletConfig",
    "TripletForPreTraining",
    "TripletModel",
]
