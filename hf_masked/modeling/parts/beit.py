"""Stock BEiT as an encoder that is pretrained: what its config must have, and how its papers initialise it."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init


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


@torch.no_grad()
def init_beit(backbone: nn.Module) -> None:
    """The initialisation of BEiT, BEiT v2 and SimMIM's ViT, of what has not been loaded.

    Normal with deviation 0.02, truncated at one deviation; the last linear layers of both halves of block l, counted
    from 1, divided by sqrt(2 l) (BEiT, `modeling_pretrain.py`; SimMIM, `models/vision_transformer.py`).
    """
    for module in backbone.modules():
        init_linear(module)
    rescale_blocks(backbone.layers)
    embeddings = backbone.embeddings
    for token in (embeddings.cls_token, embeddings.mask_token, embeddings.position_embeddings):
        if token is not None:
            _trunc_normal(token, 0.02)


def init_linear(module: nn.Module) -> None:
    """That of a linear layer or convolution; other modules stay as they are."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        _trunc_normal(module.weight, 0.02)
        if module.bias is not None:
            init.zeros_(module.bias)


def rescale_blocks(layers: Iterable[nn.Module], first: int = 1) -> None:
    """That of the last linear layers of both halves of stock BEiT blocks, which are numbered from `first` on."""
    for number, layer in enumerate(layers, start=first):
        for linear in (layer.attention.o_proj, layer.mlp.fc2):
            _trunc_normal(linear.weight, 0.02 / math.sqrt(2 * number))


def _trunc_normal(tensor: torch.Tensor, std: float) -> None:
    init.trunc_normal_(tensor, std=std, a=-std, b=std)
