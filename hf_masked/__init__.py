"""Masked modelling and Siamese learning for transformers.

Importing this package registers every variant with transformers' Auto classes. Masks on weights
(`hf_masked.modeling.weight_masking`) need PEFT and are imported when one of their names is asked for.
"""

from importlib import import_module

from transformers import AutoFeatureExtractor, AutoImageProcessor, FeatureExtractionMixin
from transformers.image_processing_base import ImageProcessingMixin

from hf_masked.modeling.masked_generation import *  # noqa: F403
from hf_masked.modeling.masked_generation import __all__ as _masked_generation
from hf_masked.modeling.masked_graph import *  # noqa: F403
from hf_masked.modeling.masked_graph import __all__ as _masked_graph
from hf_masked.modeling.masked_image import *  # noqa: F403
from hf_masked.modeling.masked_image import __all__ as _masked_image
from hf_masked.modeling.masked_language import *  # noqa: F403
from hf_masked.modeling.masked_language import __all__ as _masked_language
from hf_masked.modeling.masked_latent import *  # noqa: F403
from hf_masked.modeling.masked_latent import __all__ as _masked_latent
from hf_masked.modeling.masked_points import *  # noqa: F403
from hf_masked.modeling.masked_points import __all__ as _masked_points
from hf_masked.modeling.masked_supervision import *  # noqa: F403
from hf_masked.modeling.masked_supervision import __all__ as _masked_supervision
from hf_masked.modeling.masked_video import *  # noqa: F403
from hf_masked.modeling.masked_video import __all__ as _masked_video
from hf_masked.modeling.registry import CATALOGUE, get_variant
from hf_masked.modeling.siamese import *  # noqa: F403
from hf_masked.modeling.siamese import __all__ as _siamese
from hf_masked.processing.crop_pairs import CropPairImageProcessor
from hf_masked.processing.graph_processing import GraphProcessor
from hf_masked.processing.image_processing import MaskedImageProcessor
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.processing.one_shot_detection import OneShotDetectionProcessor
from hf_masked.processing.pixel_tokens import PixelTokenProcessor
from hf_masked.processing.point_processing import PointCloudProcessor
from hf_masked.processing.stereo import StereoImageProcessor
from hf_masked.processing.text_processing import TextProcessor
from hf_masked.processing.video_processing import MaskedVideoProcessor

__version__ = "0.1.0"

for _variant in CATALOGUE.values():
    if _variant.kind != "model":
        continue
    _processor = globals()[_variant.config.processor]
    if issubclass(_processor, FeatureExtractionMixin):
        AutoFeatureExtractor.register(_variant.config, _processor)
    # Without torchvision AutoImageProcessor of transformers 5.17 is a stand-in that raises when it is touched.
    elif issubclass(_processor, ImageProcessingMixin) and not getattr(AutoImageProcessor, "is_dummy", False):
        AutoImageProcessor.register(_variant.config, image_processor_classes={"pil": _processor})

__all__ = [
    "CATALOGUE",
    "CropPairImageProcessor",
    "GraphProcessor",
    "MaskedImageProcessor",
    "MaskedVideoProcessor",
    "MultiViewImageProcessor",
    "PixelTokenProcessor",
    "PointCloudProcessor",
    "StereoImageProcessor",
    "OneShotDetectionProcessor",
    "TextProcessor",
    "get_variant",
    *_masked_graph,
    *_masked_generation,
    *_masked_image,
    *_masked_language,
    *_masked_latent,
    *_masked_points,
    *_masked_supervision,
    *_masked_video,
    *_siamese,
]

# Names of `hf_masked.modeling.weight_masking`. Not in `__all__`, which `import *` would import PEFT for.
_WEIGHT_MASKING = (
    "FishMaskConfig",
    "FishMaskTuner",
    "MaskLLMConfig",
    "MaskLLMTuner",
    "MaskingLMConfig",
    "MaskingLMTuner",
    "compute_fisher",
    "deal_topk",
    "harden_masks",
    "initialize_fish_mask",
    "initialize_prior",
    "load_npz_masks",
    "read_masks",
    "select_topk",
    "sparsity",
)


def __getattr__(name: str):
    if name in _WEIGHT_MASKING:
        return getattr(import_module("hf_masked.modeling.weight_masking"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
