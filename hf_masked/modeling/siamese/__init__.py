"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.byol import BYOLConfig, BYOLForPreTraining, BYOLModel
from hf_masked.modeling.siamese.hallucinator import (
    HallucinatedMoCoConfig,
    HallucinatedMoCoForPreTraining,
    HallucinatedMoCoModel,
    HallucinatorConfig,
)
from hf_masked.modeling.siamese.jnn_detection import (
    JNNDetectionConfig,
    JNNDetectionModel,
    JNNForOneShotObjectDetection,
)
from hf_masked.modeling.siamese.jnn_recognition import (
    JNNForPairClassification,
    JNNRecognitionConfig,
    JNNRecognitionModel,
)
from hf_masked.modeling.siamese.moco import MoCoConfig, MoCoForPreTraining, MoCoModel
from hf_masked.modeling.siamese.siamese_attribution import (
    ReferenceShiftedConfig,
    ReferenceShiftedEncoder,
    ReferenceShiftedForSimilarity,
)
from hf_masked.modeling.siamese.simclr import SimCLRConfig, SimCLRForPreTraining, SimCLRModel
from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel
from hf_masked.modeling.siamese.tribyol import TriBYOLConfig, TriBYOLForPreTraining, TriBYOLModel
from hf_masked.modeling.siamese.triplet import TripletConfig, TripletForPreTraining, TripletModel

__all__ = [
    "BYOLConfig",
    "BYOLForPreTraining",
    "BYOLModel",
    "HallucinatedMoCoConfig",
    "HallucinatedMoCoForPreTraining",
    "HallucinatedMoCoModel",
    "HallucinatorConfig",
    "JNNDetectionConfig",
    "JNNDetectionModel",
    "JNNForOneShotObjectDetection",
    "JNNForPairClassification",
    "JNNRecognitionConfig",
    "JNNRecognitionModel",
    "MoCoConfig",
    "MoCoForPreTraining",
    "MoCoModel",
    "ReferenceShiftedConfig",
    "ReferenceShiftedEncoder",
    "ReferenceShiftedForSimilarity",
    "SimCLRConfig",
    "SimCLRForPreTraining",
    "SimCLRModel",
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
