"""SiamMAE: of two frames of a clip the earlier one is seen whole, the later one masked by 95 % and completed.

Agrim Gupta et al., "Siamese Masked Autoencoders", NeurIPS 2023, arXiv 2305.14344.
Reference implementation: https://github.com/alexandre-eymael/CropMAE (`train_siammae_k400.py`), which reproduces it;
the authors' code is not public. The network stands with CropMAE; the pairs are `hf_masked.data.sets.FramePairs`.
"""

from typing import ClassVar

import torch
from transformers import AutoModelForImageClassification

from hf_masked.modeling.masked_image.mae import settings_of
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant
from hf_masked.modeling.siamese import cropmae
from hf_masked.modeling.siamese.cropmae import (
    CropMAEConfig,
    CropMAEForImageClassification,
    CropMAEForPreTraining,
    CropMAEModel,
)


class SiamMAEConfig(CropMAEConfig):
    """Config of SiamMAE: CropMAE's, with frames of clips for views.

    Args:
        mask_ratio: share of the later frame's patches that the encoder does not see.
    """

    model_type = "hf_masked_siammae"
    paper_title: ClassVar[str] = "Siamese Masked Autoencoders"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2305.14344"
    reference_repository: ClassVar[str] = "https://github.com/alexandre-eymael/CropMAE"
    masks: ClassVar[str] = "95 % of the later of two frames, dropped before the encoder"
    predicts: ClassVar[str] = "pixels of the masked patches, from the earlier frame"
    sample: ClassVar[str] = "frames"

    mask_ratio: float = 0.95

    def processor_settings(self) -> dict:
        # Same crop and same flip for both frames (`data/SiamMAE_PIPE.py`).
        return super().processor_settings() | {"strategy": "frames", "crop_scale": (0.5, 1.0)}


class SiamMAEModel(CropMAEModel):
    """MAE's encoder under SiamMAE's config, on single pictures."""

    config: SiamMAEConfig


class SiamMAEForPreTraining(CropMAEForPreTraining):
    """CropMAE's network and loss, on frames."""

    config: SiamMAEConfig


class SiamMAEForImageClassification(CropMAEForImageClassification):
    """MAE's fine-tuning head under SiamMAE's config."""

    config: SiamMAEConfig


def official_config(state_dict: dict[str, torch.Tensor]) -> SiamMAEConfig:
    """The config of a checkpoint of `train_siammae_k400.py`; raises as CropMAE's."""
    return SiamMAEConfig(**cropmae.official_settings(state_dict))


def tiny_config() -> SiamMAEConfig:
    return SiamMAEConfig(**settings_of(cropmae.tiny_config()))


register_variant(
    config=SiamMAEConfig,
    pretraining=SiamMAEForPreTraining,
    model=SiamMAEModel,
    heads={AutoModelForImageClassification: SiamMAEForImageClassification},
    tiny_config=tiny_config,
    convert=cropmae.convert_official_weights,
    official_config=official_config,
    example_inputs=example_views,
)
