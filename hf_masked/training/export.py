"""Leaving the package: a plain transformers checkpoint of the encoder, with a stock image processor beside it."""

import copy
import logging
from pathlib import Path

from hf_masked.modeling.base import VariantModel
from hf_masked.modeling.parts.gray import fold_gray_to_rgb
from hf_masked.processing.stock import save_stock_processor
from hf_masked.training.saving import whole_files

logger = logging.getLogger(__name__)


def export_encoder(model: VariantModel, processor, output: str | Path, rgb: bool = False) -> Path:
    """Writes the encoder as a checkpoint that loads where `hf_masked` is not installed, and a stock processor, where
    transformers has one.

    Args:
        model: of the catalogue.
        processor: the one it was trained with, whose settings the stock one takes over.
        output: a folder.
        rgb: turn an encoder of gray pictures into one of RGB pictures that gives the same features for gray ones;
            transformers' pipelines convert every picture to RGB.

    Returns:
        The folder.

    Raises:
        ValueError: if `rgb` is asked for and the encoder has more than one channel, or takes no pictures.
        SavingError: if the files cannot be written; a model that stood there before is then as it was.
    """
    model.sync_backbone()
    backbone = model.plain_backbone()
    if hasattr(processor, "save_plain"):
        if rgb:
            raise ValueError(f"rgb turns gray pictures into colour, and {model.config.model_type} learns from none.")
        with whole_files(output) as folder:
            backbone.save_pretrained(folder)
            processor.save_plain(folder)
        return Path(output)
    mean, std = processor.image_mean, processor.image_std
    if rgb:
        backbone, mean, std = fold_gray_to_rgb(copy.deepcopy(backbone)), mean * 3, std * 3
    elif backbone.config.num_channels != 3:
        logger.warning(
            "The encoder takes %d channels; transformers' pipelines give RGB.%s",
            backbone.config.num_channels,
            " Export with rgb=True (--rgb) to use it in them." if backbone.config.num_channels == 1 else "",
        )
    with whole_files(output) as folder:
        backbone.save_pretrained(folder)
        save_stock_processor(processor, folder, image_mean=mean, image_std=std, do_convert_rgb=len(mean) == 3)
    return Path(output)
