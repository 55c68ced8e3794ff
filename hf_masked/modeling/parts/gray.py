"""Gray encoders for tools that always give three channels."""

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def fold_gray_to_rgb(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a model of one channel take three, in place; gray pictures converted to RGB give the same outputs.

    `pipeline("image-classification")` converts every picture to RGB. The kernel of the first convolution is spread
    over the channels, a third to each. Mean and standard deviation must be repeated in the image processor.

    Args:
        model: a stock transformers vision model with `config.num_channels` 1.

    Returns:
        The same model, with `config.num_channels` 3.

    Raises:
        ValueError: for a model of more than one channel.
    """
    if model.config.num_channels != 1:
        raise ValueError(f"The model takes {model.config.num_channels} channels; only one of 1 can be folded.")
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d) and module.in_channels == 1)
    stem.weight = nn.Parameter(stem.weight.repeat(1, 3, 1, 1) / 3, requires_grad=stem.weight.requires_grad)
    stem.in_channels = 3
    for module in model.modules():
        if getattr(module, "num_channels", None) == 1:
            module.num_channels = 3
    model.config.num_channels = 3
    return model
