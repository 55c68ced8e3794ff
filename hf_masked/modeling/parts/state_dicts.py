"""Official state dicts into the names of transformers."""

import re

import torch
from transformers import ResNetConfig, ViTConfig

# In a replacement, stands for each of q, k and v: the tensor is a stack of queries, keys and values.
QKV = "{qkv}"

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


def rename_weights(state_dict: dict[str, torch.Tensor], renaming: tuple[tuple[str, str], ...]) -> dict:
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


def official_depth(state_dict: dict[str, torch.Tensor], blocks: str) -> int:
    """How many blocks `<blocks>.0`, `<blocks>.1`, ... a checkpoint holds."""
    prefix = f"{blocks}."
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in state_dict if name.startswith(prefix))
