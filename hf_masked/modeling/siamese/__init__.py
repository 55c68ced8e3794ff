"""Siamese learning: encoders that agree on views of the same thing."""

from hf_masked.modeling.siamese.byol import BYOLConfig, BYOLForPreTraining, BYOLModel
from hf_masked.modeling.siamese.croco import (
    CroCoConfig,
    CroCoForBinocularPrediction,
    CroCoForDepthEstimation,
    CroCoForPreTraining,
    CroCoModel,
)
from hf_masked.modeling.siamese.croco_encoder import CroCoEncoder, CroCoEncoderConfig, CroCoForImageClassification
from hf_masked.modeling.siamese.cropmae import (
    CropMAEConfig,
    CropMAEForImageClassification,
    CropMAEForPreTraining,
    CropMAEModel,
)
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
from hf_masked.modeling.siamese.psmnet import (
    PSMNetConfig,
    PSMNetFeatures,
    PSMNetFeaturesConfig,
    PSMNetForStereoMatching,
    PSMNetModel,
)
from hf_masked.modeling.siamese.siamese_attribution import (
    ReferenceShiftedConfig,
    ReferenceShiftedEncoder,
    ReferenceShiftedForSimilarity,
)
from hf_masked.modeling.siamese.siammae import (
    SiamMAEConfig,
    SiamMAEForImageClassification,
    SiamMAEForPreTraining,
    SiamMAEModel,
)
from hf_masked.modeling.siamese.simclr import SimCLRConfig, SimCLRForPreTraining, SimCLRModel
from hf_masked.modeling.siamese.simsiam import SimSiamConfig, SimSiamForPreTraining, SimSiamModel
from hf_masked.modeling.siamese.tribyol import TriBYOLConfig, TriBYOLForPreTraining, TriBYOLModel
from hf_masked.modeling.siamese.triplet import TripletConfig, TripletForPreTraining, TripletModel

__all__ = [
    "BYOLConfig",
    "BYOLForPreTraining",
    "BYOLModel",
    "CroCoConfig",
    "CroCoEncoder",
    "CroCoEncoderConfig",
    "CroCoForBinocularPrediction",
    "CroCoForDepthEstimation",
    "CroCoForImageClassification",
    "CroCoForPreTraining",
    "CroCoModel",
    "CropMAEConfig",
    "CropMAEForImageClassification",
    "CropMAEForPreTraining",
    "CropMAEModel",
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
    "PSMNetConfig",
    "PSMNetFeatures",
    "PSMNetFeaturesConfig",
    "PSMNetForStereoMatching",
    "PSMNetModel",
    "ReferenceShiftedConfig",
    "ReferenceShiftedEncoder",
    "ReferenceShiftedForSimilarity",
    "SiamMAEConfig",
    "SiamMAEForImageClassification",
    "SiamMAEForPreTraining",
    "SiamMAEModel",
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
