"""Stock BEiT as an encoder that is pretrained: what its config must have, its blocks' outputs, its initialisation, and
BEiT's names for its weights."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import BeitConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hf_masked.modeling.parts.patches import pair
from hf_masked.modeling.parts.state_dicts import official_depth

# BEiT's names for its weights -> those of a stock BEiT as our `backbone` (`modeling_pretrain.py` of BEiT v2, dBOT).
BEIT_RENAMING = (
    (r"^(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^norm\.", "backbone.layernorm."),
    (r"^rel_pos_bias\.", "backbone.shared_position_bias."),
    (r"^blocks\.", "backbone.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.attn\.qkv\.", ".attention.{qkv}_proj."),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.relative_position_bias_table$", ".relative_position_bias.relative_position_bias_table"),
)


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


def official_beit_config(state_dict: dict[str, torch.Tensor], **settings) -> BeitConfig:
    """The config of a pretraining checkpoint in BEiT's names, read from its shapes.

    Args:
        state_dict: with positions that all blocks share.
        settings: what no shape tells, see `beit_vit`.

    Raises:
        ValueError: without such positions, as fine-tuned checkpoints are.
    """
    table = state_dict.get("rel_pos_bias.relative_position_bias_table")
    if table is None:
        raise ValueError(
            "The checkpoint holds no rel_pos_bias.relative_position_bias_table, as a BEiT's pretraining has it. "
            "Fine-tuned checkpoints are not converted."
        )
    hidden_size, num_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    if "blocks.0.gamma_1" not in state_dict:
        settings["layer_scale_init_value"] = 0.0
    return beit_vit(
        hidden_size=hidden_size,
        num_hidden_layers=official_depth(state_dict, "blocks"),
        num_attention_heads=table.shape[1],
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        image_size=(math.isqrt(table.shape[0] - 3) + 1) // 2 * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
        **settings,
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
