"""Masked modelling and Siamese learning for transformers.

Importing this package registers every variant with transformers' Auto classes.
"""

from transformers import AutoImageProcessor

from hf_masked.modeling.masked_image import *  # noqa: F403
from hf_masked.modeling.masked_image import __all__ as _masked_image
from hf_masked.modeling.masked_latent import *  # noqa: F403
from hf_masked.modeling.masked_latent import __all__ as _masked_latent
from hf_masked.modeling.masked_points import *  # noqa: F403
from hf_masked.modeling.masked_points import __all__ as _masked_points
from hf_masked.modeling.registry import CATALOGUE, get_variant
from hf_masked.modeling.siamese import *  # noqa: F403
from hf_masked.modeling.siamese import __all__ as _siamese
from hf_masked.processing.crop_pairs import CropPairImageProcessor
from hf_masked.processing.image_processing import MaskedImageProcessor
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.processing.one_shot_detection import OneShotDetectionProcessor
from hf_masked.processing.point_processing import PointCloudProcessor
from hf_masked.processing.stereo import StereoImageProcessor

__version__ = "0.1.0"

for _variant in CATALOGUE.values():
    # Without torchvision AutoImageProcessor of transformers 5.17 is a stand-in that raises when it is touched.
    if _variant.config.modality == "image" and not getattr(AutoImageProcessor, "is_dummy", False):
        _processor = globals()[_variant.config.processor]
        AutoImageProcessor.register(_variant.config, image_processor_classes={"pil": _processor})

__all__ = [
    "CATALOGUE",
    "CropPairImageProcessor",
    "MaskedImageProcessor",
    "MultiViewImageProcessor",
    "PointCloudProcessor",
    "StereoImageProcessor",
    "OneShotDetectionProcessor",
    "get_variant",
    *_masked_image,
    *_masked_latent,
    *_masked_points,
    *_siamese,
]
