"""ColorMAE: MAE whose random mask gives way to one cut from filtered noise, which says how clumped the patches lie.

Carlos Hinojosa et al., "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders", ECCV 2024,
arXiv 2407.13036.
Reference implementation: https://github.com/carlosh93/ColorMAE (`models/utils/masking_generator.py`), on mmpretrain.
The mask is `hf_masked.processing.masks.color_mask`, which every method takes as `mask_kind="color"`.
"""

from typing import ClassVar

import torch
from transformers import AutoModelForImageClassification

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.registry import register_variant


class ColorMAEConfig(MAEConfig):
    """Config of ColorMAE: MAE's, with another mask.

    Args:
        mask_kind: "color".
        mask_options: arguments of `color_mask`, {"color": "green"} by default; green is the paper's best.
    """

    model_type = "hf_masked_colormae"
    paper_title: ClassVar[str] = "ColorMAE: Exploring data-independent masking strategies in Masked AutoEncoders"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2407.13036"
    reference_repository: ClassVar[str] = "https://github.com/carlosh93/ColorMAE"
    weights_licence: ClassVar[str] = "Apache-2.0"
    masks: ClassVar[str] = "patches where filtered noise is low, dropped before the encoder"

    mask_kind: str = "color"


class ColorMAEModel(MAEModel):
    """MAE's encoder under ColorMAE's config."""

    config: ColorMAEConfig


class ColorMAEForPreTraining(MAEForPreTraining):
    """MAE's encoder, decoder and loss, with masks of coloured noise."""

    config: ColorMAEConfig

    def no_weight_decay(self) -> set[str]:
        # mmpretrain's recipe of MAE, unlike MAE's own.
        return {"cls_token", "mask_token", "position_embeddings"}


class ColorMAEForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head under ColorMAE's config."""

    config: ColorMAEConfig


# mmpretrain's names -> MAE's official ones.
_RENAMING = (
    (r"^backbone\.(cls_token|pos_embed)$", r"\1"),
    (r"^backbone\.patch_embed\.projection\.", "patch_embed.proj."),
    (r"^backbone\.ln1\.", "norm."),
    (r"^backbone\.layers\.", "blocks."),
    (r"^neck\.(mask_token|decoder_pos_embed)$", r"\1"),
    (r"^neck\.(decoder_embed|decoder_pred|decoder_blocks)\.", r"\1."),
    (r"^neck\.ln1\.", "decoder_norm."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


def official_config(state_dict: dict[str, torch.Tensor]) -> ColorMAEConfig:
    """The config of an official checkpoint; raises as MAE's."""
    return ColorMAEConfig(**mae.settings_of(mae.official_config(rename_weights(state_dict, _RENAMING)), "mask_kind"))


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: ColorMAEConfig) -> dict[str, torch.Tensor]:
    """mmpretrain's names to ours; names that are not known stay as they are, for strict loading to report.

    mmpretrain's position tables have rows and columns the other way round than MAE's, and come along.
    """
    return mae.convert_official_weights(rename_weights(state_dict, _RENAMING), config)


def tiny_config() -> ColorMAEConfig:
    return ColorMAEConfig(**mae.settings_of(mae.tiny_config(), "mask_kind"))


register_variant(
    config=ColorMAEConfig,
    pretraining=ColorMAEForPreTraining,
    model=ColorMAEModel,
    heads={AutoModelForImageClassification: ColorMAEForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
