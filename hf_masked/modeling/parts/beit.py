"""Stock BEiT as an encoder that is pretrained: what its config must have, its blocks' outputs, its initialisation."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import BeitConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_masked.modeling.parts.patches import pair


def beit_vit(**settings) -> BeitConfig:
    """ViT-B/16 in the form that SimMIM, BEiT v2 and MaskDistill pretrain, as a BEiT config (`modeling_pretrain.py` of
    BEiT v2; `models/vision_transformer.py` and `configs/vit_base__800ep` of SimMIM)."""
    return BeitConfig(
        **{
            "use_shared_relative_position_bias": True,
            "use_mean_pooling": False,
            "layer_scale_init_value": 0.1,
            "layer_norm_eps": 1e-6,
            "drop_path_rate": 0.1,
        }
        | settings
    )


def with_final_norm(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, of a BEiT with the norm after its last block that a BEiT with mean pooling lacks."""
    return BeitConfig(**config.to_dict() | {"use_mean_pooling": False}) if config.model_type == "beit" else config


def check_beit(config: PreTrainedConfig) -> None:
    """Raises a ValueError for a BEiT without positions, or without the norm after its last block."""
    positions = ("use_shared_relative_position_bias", "use_relative_position_bias", "use_absolute_position_embeddings")
    if not any(getattr(config, name) for name in positions):
        raise ValueError(
            "The BEiT config has no positions, so that all masked patches would look alike: set "
            "use_shared_relative_position_bias=True, the paper's."
        )
    if config.use_mean_pooling:
        raise ValueError(
            "With use_mean_pooling=True stock BEiT has no norm after its last block, which the head reads: set "
            "use_mean_pooling=False."
        )


def beit_feature_maps(
    backbone: PreTrainedModel, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
) -> list[torch.Tensor]:
    """The embedded tokens and the output of each block, without the final norm; the same as the stock `forward`.

    Args:
        backbone: a stock BEiT.
        pixel_values: float (batch, channels, height, width).
        bool_masked_pos: bool (batch, units), True = masked; None for the plain backbone.
        kwargs: passed to the blocks.

    Returns:
        1 + blocks tensors (batch, 1 + units, hidden), the class token first.
    """
    # Stock BEiT leaves the cast to the caller.
    pixel_values = pixel_values.to(backbone.embeddings.patch_embeddings.projection.weight.dtype)
    size = pixel_values.shape[-2:]
    bias = beit_position_bias(backbone, size)
    feature_maps = [backbone.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)]
    for layer in backbone.layers:
        feature_maps.append(layer(feature_maps[-1], attention_mask=bias, resolution=size, **kwargs))
    return feature_maps


def beit_position_bias(backbone: PreTrainedModel, size: tuple[int, int]) -> torch.Tensor | None:
    """What the table that all blocks share adds to their attention, for pictures of (height, width) pixels."""
    rows, columns = pair(backbone.config.patch_size)
    shared = backbone.shared_position_bias
    return None if shared is None else shared((size[0] // rows, size[1] // columns))


@torch.no_grad()
def init_beit(backbone: nn.Module) -> None:
    """What BEiT, BEiT v2, SimMIM and MFM give a stock BEiT, ViT or DeiT, of what has not been loaded.

    Normal with deviation 0.02, truncated at one deviation; the last linear layers of both halves of block l, counted
    from 1, divided by sqrt(2 l) (BEiT, `modeling_pretrain.py`; SimMIM, `models/vision_transformer.py`).
    """
    for module in backbone.modules():
        init_linear(module)
    rescale_blocks(backbone.layers)
    for name in ("cls_token", "distillation_token", "mask_token", "position_embeddings"):
        token = getattr(backbone.embeddings, name, None)
        if token is not None:
            _trunc_normal(token, 0.02)


def init_linear(module: nn.Module) -> None:
    """That of a linear layer or convolution; other modules stay as they are."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        _trunc_normal(module.weight, 0.02)
        if module.bias is not None:
            init.zeros_(module.bias)


def rescale_blocks(layers: Iterable[nn.Module], first: int = 1) -> None:
    """That of the last linear layers of both halves of stock blocks, which are numbered from `first` on."""
    for number, layer in enumerate(layers, start=first):
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            _trunc_normal(linear.weight, 0.02 / math.sqrt(2 * number))


def _trunc_normal(tensor: torch.Tensor, std: float) -> None:
    init.trunc_normal_(tensor, std=std, a=-std, b=std)
