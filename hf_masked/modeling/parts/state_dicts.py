"""Official state dicts into the names of transformers."""

import math
import re
from collections.abc import Callable

import torch
from transformers import ResNetConfig, SwinConfig, ViTConfig

from hf_masked.modeling.parts.relative_positions import TABLE

# In a replacement, stands for each of q, k and v: the tensor is a stack of queries, keys and values.
QKV = "{qkv}"


def timm_block_renaming(official: str, ours: str) -> tuple[tuple[str, str], ...]:
    """Rules of `rename_weights` from a list of timm's blocks to one of `TransformerBlock`s, by the lists' names."""
    parts = {
        r"norm1\.": "attention_norm.",
        r"norm2\.": "feed_forward_norm.",
        r"attn\.qkv\.": "attention.qkv.",
        r"attn\.proj\.": "attention.projection.",
        r"mlp\.fc1\.": "feed_forward.0.",
        r"mlp\.fc2\.": "feed_forward.2.",
    }
    return tuple((rf"^{official}\.(\d+)\.{theirs}", rf"{ours}.\1.{name}") for theirs, name in parts.items())


# Of timm's ViTs to a stock ViT's as our `backbone`: the patches, the positions and the blocks.
TIMM_VIT_RENAMING = (
    (r"^pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"backbone.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"backbone.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"backbone.layers.\1.attention.{qkv}_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"backbone.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"backbone.layers.\1.mlp."),
)

# Of timm's and torchvision's ResNets to a stock ResNet's as our `backbone`, whose layers count from 0.
TIMM_RESNET_RENAMING = (
    (r"^conv1\.", "backbone.embedder.embedder.convolution."),
    (r"^bn1\.", "backbone.embedder.embedder.normalization."),
    *((rf"^layer{stage + 1}\.(\d+)\.", rf"backbone.encoder.stages.{stage}.layers.\1.") for stage in range(4)),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    *((rf"(layers\.\d+)\.conv{layer + 1}\.", rf"\1.layer.{layer}.convolution.") for layer in range(3)),
    *((rf"(layers\.\d+)\.bn{layer + 1}\.", rf"\1.layer.{layer}.normalization.") for layer in range(3)),
)

# Of the official Swin, as a method's `encoder`, to a stock Swin as our `backbone`; what a method adds goes first.
SWIN_RENAMING = (
    (r"^encoder\.absolute_pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^encoder\.patch_embed\.norm\.", "backbone.embeddings.norm."),
    (r"^encoder\.norm\.", "backbone.layernorm."),
    (r"^encoder\.layers\.", "backbone.encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.{qkv}_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (rf"\.attn\.{TABLE}$", rf".attention.relative_position_bias.{TABLE}"),
)
# The ends of its buffers' names, which follow from the window and the picture's size.
SWIN_BUFFERS = ("relative_position_index", "attn_mask")


def rename_weights(state_dict: dict[str, torch.Tensor], renaming: tuple[tuple[str, str | Callable], ...]) -> dict:
    """Applies (pattern, replacement) pairs of `re.sub` in their order to every name.

    Names that no pattern matches stay as they are, for strict loading to report. A name with `QKV` in it becomes
    three, each with a third of the tensor's rows.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in renaming:
            name = re.sub(pattern, replacement, name)
        if QKV not in name:
            renamed[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            renamed[name.replace(QKV, part)] = rows.clone()
    return renamed


def official_vit_config(state_dict: dict[str, torch.Tensor], heads: dict[int, int]) -> ViTConfig:
    """The config of a ViT in timm's names, read from its shapes.

    Args:
        state_dict: with `patch_embed`, `pos_embed` (of a square grid and a class token) and `blocks`.
        heads: of the released models, by width: checkpoints do not say.

    Raises:
        ValueError: if the width is none of them.
    """
    hidden_size, num_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    if hidden_size not in heads:
        raise ValueError(
            f"The checkpoint's encoder is {hidden_size} wide and does not say how many heads it has, which is known "
            f"for the released widths only ({', '.join(map(str, heads))}): pass a config."
        )
    grid = round((state_dict["pos_embed"].shape[1] - 1) ** 0.5)
    return ViTConfig(
        hidden_size=hidden_size,
        num_hidden_layers=official_depth(state_dict, "blocks"),
        num_attention_heads=heads[hidden_size],
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        layer_norm_eps=1e-6,
        image_size=grid * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
    )


def official_resnet_config(state_dict: dict[str, torch.Tensor]) -> ResNetConfig:
    """The config of a ResNet in timm's or torchvision's names, read from its shapes.

    Args:
        state_dict: with `conv1` and `layer1` to `layer4`, or fewer.
    """
    stages = sorted({match[0] for name in state_dict if (match := re.match(r"layer\d+", name))})
    last = "conv3" if "layer1.0.conv3.weight" in state_dict else "conv2"
    embedding_size, num_channels, *_ = state_dict["conv1.weight"].shape
    return ResNetConfig(
        num_channels=num_channels,
        embedding_size=embedding_size,
        hidden_sizes=[state_dict[f"{stage}.0.{last}.weight"].shape[0] for stage in stages],
        depths=[official_depth(state_dict, stage) for stage in stages],
        layer_type="bottleneck" if last == "conv3" else "basic",
    )


def official_swin_config(state_dict: dict[str, torch.Tensor], image_size: int | None = None, **settings) -> SwinConfig:
    """The config of an official Swin, as a method's `encoder`, read from its shapes.

    Args:
        state_dict: with names that begin with "encoder.".
        image_size: by default what the mask of the first stage's shifted windows says.
        settings: of the config, which checkpoints do not say.
    """
    embed_dim, num_channels, patch_size, _ = state_dict["encoder.patch_embed.proj.weight"].shape
    stages = range(official_depth(state_dict, "encoder.layers"))
    tables = [state_dict[f"encoder.layers.{stage}.blocks.0.attn.{TABLE}"] for stage in stages]
    window_size = window_of_table(tables[0])
    if image_size is None:
        windows = state_dict["encoder.layers.0.blocks.1.attn_mask"].shape[0]
        image_size = math.isqrt(windows) * window_size * patch_size
    return SwinConfig(
        embed_dim=embed_dim,
        depths=[official_depth(state_dict, f"encoder.layers.{stage}.blocks") for stage in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=window_size,
        mlp_ratio=state_dict["encoder.layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        drop_path_rate=0.0,
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
        **settings,
    )


def window_of_table(table: torch.Tensor, others: int = 0) -> int:
    """The side of the window of a table of relative positions, ((2 side - 1) squared + others, heads)."""
    return (math.isqrt(table.shape[0] - others) + 1) // 2


def official_depth(state_dict: dict[str, torch.Tensor], blocks: str) -> int:
    """How many blocks `<blocks>.0`, `<blocks>.1`, ... a checkpoint holds."""
    prefix = f"{blocks}."
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state_dict if name.startswith(prefix))
