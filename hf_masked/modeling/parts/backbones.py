"""Stock transformers backbones: building them without a pooler, with a mask token where a method puts one in place of
masked patches, and running ViTs on visible tokens only."""

import copy
import inspect
import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from hf_masked.modeling.parts.beit import beit_feature_maps
from hf_masked.modeling.parts.blocks import DropPath, drop_path_rates
from hf_masked.modeling.parts.patches import pair, patch_grid, patchify, take
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d

# Backbones whose tokens are patches of one grid after some prefix tokens, and whose layers do not care which of the
# patches they see: model_type -> number of prefix tokens (class token, DeiT's distillation token).
VISIBLE_TOKEN_BACKBONES = {"vit": 1, "deit": 2, "dinov2": 1}

# The same of encoders of this package, which their own method takes alone.
OWN_BACKBONES = {"hf_masked_decayed_vit": 1}

# The name of the mask token in every stock vision model that has one.
MASK_TOKEN = "embeddings.mask_token"


def build_backbone(config: PreTrainedConfig, mask_token: bool = False) -> PreTrainedModel:
    """The stock model of a config with new weights, without the pooler that no pretraining loss would reach.

    Args:
        config: of the stock model; it is left as it is.
        mask_token: with the stock model's own mask token, which its `forward` puts where `bool_masked_pos` is True.

    Raises:
        ValueError: for a mask token in a stock model that knows none.
    """
    config, arguments = _form(config, mask_token)
    return AutoModel.from_config(config, **arguments)


def load_backbone(name_or_path: str, mask_token: bool = False, **kwargs) -> PreTrainedModel:
    """The stock model of a checkpoint (a folder or a Hub id), without its pooler.

    Args:
        name_or_path: of the checkpoint, with or without a task head.
        mask_token: load the mask token too; without one in the checkpoint, `embeddings.mask_token` is None.
        kwargs: of `from_pretrained`.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except OSError as error:
        raise ValueError(
            f"{name_or_path} is neither a folder with a transformers checkpoint nor a Hub id that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error
    config, arguments = _form(config, mask_token)
    backbone, report = AutoModel.from_pretrained(
        name_or_path, config=config, output_loading_info=True, **arguments, **kwargs
    )
    if MASK_TOKEN in report["missing_keys"]:
        backbone.embeddings.mask_token = None
    return backbone


def _form(config: PreTrainedConfig, mask_token: bool) -> tuple[PreTrainedConfig, dict]:
    """The config and the arguments of the stock model's constructor."""
    parameters = inspect.signature(MODEL_MAPPING[type(config)].__init__).parameters
    arguments = {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}
    if not mask_token:
        return config, arguments
    if "use_mask_token" in parameters:  # ViT, DeiT, Swin
        return config, arguments | {"use_mask_token": True}
    if not hasattr(config, "use_mask_token"):  # BEiT, data2vec, DINOv2 have it
        raise ValueError(f"A backbone of type {config.model_type!r} has no mask token.")
    config = copy.deepcopy(config)
    config.use_mask_token = True
    return config, arguments


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copies an encoder's weights into a backbone of this package.

    A pooler is left out, as is a mask token that the target has no place for. A mask token that the source lacks stays
    the target's own, as does the final norm, which BEiT has only without mean pooling.

    Raises:
        RuntimeError: where anything else does not fit.
    """
    own = {name: tensor for name, tensor in target.state_dict().items() if name.startswith((MASK_TOKEN, "layernorm."))}
    weights = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if not name.startswith("pooler.") and (name != MASK_TOKEN or name in own)
    }
    target.load_state_dict(own | weights)


def without_mask_token(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone as others use it: itself, or a copy that has lost its mask token."""
    if getattr(getattr(backbone, "embeddings", None), "mask_token", None) is None:
        return backbone
    backbone = copy.deepcopy(backbone)
    backbone.embeddings.mask_token = None
    if hasattr(backbone.config, "use_mask_token"):
        backbone.config.use_mask_token = False
    return backbone


def tiny_vit(**settings) -> ViTConfig:
    """A ViT of 4 x 4 patches that costs nothing: of the tiny configs of the catalogue."""
    form = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTConfig(**form | {"layer_norm_eps": 1e-6, "image_size": 32, "patch_size": 8} | settings)


def num_prefix_tokens(backbone_config: PreTrainedConfig) -> int:
    """Tokens before the patches."""
    return (VISIBLE_TOKEN_BACKBONES | OWN_BACKBONES | {"beit": 1})[backbone_config.model_type]


def backbone_grid(backbone_config: PreTrainedConfig) -> tuple[int, int]:
    """(rows, columns) of patches at the config's own picture size."""
    return patch_grid(*pair(backbone_config.image_size), pair(backbone_config.patch_size))


def check_visible_token_backbone(config: PreTrainedConfig) -> None:
    """Raises a ValueError for a backbone that cannot run on visible tokens, or whose patch does not divide."""
    if config.model_type not in VISIBLE_TOKEN_BACKBONES | OWN_BACKBONES:
        raise ValueError(
            f"A backbone of type {config.model_type!r} cannot encode visible patches alone; use one of "
            f"{', '.join(VISIBLE_TOKEN_BACKBONES)}."
        )
    backbone_grid(config)


def encode_visible(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    visible: torch.Tensor | None = None,
    final_norm: bool = True,
    **kwargs,
) -> torch.Tensor:
    """Runs a ViT, DeiT or DINOv2 on some of a picture's patches; on all of them it is the plain backbone.

    Pictures of another size than the config's get a position table that is interpolated in two dimensions.

    Args:
        pixel_values: float (batch, channels, height, width).
        visible: int64 (batch, visible) raster positions of the patches to see, or None for all.
        final_norm: return the tokens after the final norm, as the plain backbone does; else the last layer's output.
        kwargs: passed to the layers.

    Returns:
        (batch, prefix + visible, hidden).
    """
    tokens = run_layers(backbone, _embed(backbone, pixel_values, visible), **kwargs)
    return backbone.layernorm(tokens) if final_norm else tokens


def visible_feature_maps(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    visible: torch.Tensor | None = None,
    depth: int | None = None,
    **kwargs,
) -> list[torch.Tensor]:
    """As `encode_visible`, but the embedded tokens and the output of each layer, without the final norm.

    Args:
        depth: how many layers to run; by default all.

    Returns:
        1 + depth tensors (batch, prefix + visible, hidden).
    """
    feature_maps = [_embed(backbone, pixel_values, visible)]
    for layer in _layers(backbone)[:depth]:
        feature_maps.append(layer(feature_maps[-1], **kwargs))
    return feature_maps


def encode_with_mask_tokens(
    backbone: PreTrainedModel,
    pixel_values: torch.Tensor,
    bool_masked_pos: torch.Tensor | None = None,
    final_norm: bool = True,
    **kwargs,
) -> torch.Tensor:
    """Runs a ViT, DeiT, DINOv2 or BEiT on all patches, with its mask token in place of the masked ones.

    The same as the stock model's `forward`, except that rectangles of any size get their positions.

    Args:
        pixel_values: float (batch, channels, height, width).
        bool_masked_pos: bool (batch, units), True = masked; None for the plain backbone.
        final_norm: return the tokens after the final norm, as the plain backbone does; else the last layer's output.
        kwargs: passed to the layers.

    Returns:
        (batch, prefix + units, hidden).
    """
    if backbone.config.model_type == "beit":
        tokens = beit_feature_maps(backbone, pixel_values, bool_masked_pos, **kwargs)[-1]
    else:
        tokens = run_layers(backbone, _embed(backbone, pixel_values, bool_masked_pos=bool_masked_pos), **kwargs)
    return backbone.layernorm(tokens) if final_norm else tokens


def output_stride(config: PreTrainedConfig) -> int:
    """Side in pixels of a cell of what a stock backbone returns: the patch, or of stages that halve the map, the last.

    Raises:
        ValueError: for patches that are not square.
    """
    if config.model_type == "resnet":
        return 4 * 2 ** (len(config.depths) - 1 + config.downsample_in_first_stage)
    height, width = pair(config.patch_size)
    if height != width:
        raise ValueError(f"The backbone's patch is {height} x {width} pixels; the head needs squares.")
    return height * 2 ** (len(getattr(config, "depths", (1,))) - 1)


def feature_map(hidden_state: torch.Tensor, size: tuple[int, int], stride: int) -> torch.Tensor:
    """A stock backbone's output as a map, without class and distillation tokens.

    Args:
        hidden_state: (batch, prefix + cells, hidden), or a map already.
        size: (height, width) of the pictures in pixels.
        stride: side of a cell in pixels, see `output_stride`.

    Returns:
        (batch, hidden, rows, columns).
    """
    if hidden_state.ndim == 4:
        return hidden_state
    rows, columns = size[0] // stride, size[1] // stride
    return hidden_state[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def check_window(config: PreTrainedConfig, size: tuple[int, int], stride: int) -> None:
    """Raises a ValueError where stock Swin's last map would be smaller than the window; its bias cannot shrink."""
    if config.model_type == "swin" and min(size) // stride < config.window_size:
        raise ValueError(
            f"At {size[0]} x {size[1]} pixels Swin's last map is {size[0] // stride} x {size[1] // stride}, smaller "
            f"than window_size={config.window_size}: choose a smaller window, or pictures of at least "
            f"{stride * config.window_size} pixels."
        )


def run_layers(backbone: PreTrainedModel, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    """What the layers of a ViT, DeiT, DINOv2, BEiT or ViViT make of (batch, tokens, hidden), before the final norm."""
    for layer in _layers(backbone):
        hidden_states = layer(hidden_states, **kwargs)
    return hidden_states


def _embed(backbone, pixel_values, visible=None, bool_masked_pos=None):
    """Prefix tokens and embedded patches with their positions: (batch, prefix + visible, hidden)."""
    embeddings = backbone.embeddings
    projection = embeddings.patch_embeddings.projection
    patch_size = pair(backbone.config.patch_size)
    grid = patch_grid(*pixel_values.shape[-2:], patch_size)
    positions = interpolate_positions(embeddings.position_embeddings, backbone_grid(backbone.config), grid)
    prefix = _prefix_tokens(embeddings)  # (1, prefix, hidden)
    prefix = prefix + positions[:, : prefix.shape[1]]
    positions = positions[:, prefix.shape[1] :]  # (1, units, hidden)
    if visible is not None:
        positions = positions[0][visible]
    tokens = embed_patches(projection, pixel_values, visible)
    if bool_masked_pos is not None:
        tokens = torch.where(bool_masked_pos.unsqueeze(-1), embeddings.mask_token.to(tokens.dtype), tokens)
    tokens = tokens + positions
    return embeddings.dropout(torch.cat([prefix.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1))


def embed_patches(
    projection: nn.Conv2d, pixel_values: torch.Tensor, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """A ViT's patch convolution on visible patches only.

    A convolution whose stride is its kernel is a linear layer on patches, and as such runs on some of them.

    Args:
        projection: the convolution.
        pixel_values: float (batch, channels, height, width).
        visible: int64 (batch, visible), raster positions; None for all patches.

    Returns:
        (batch, visible, hidden).
    """
    patches = patchify(pixel_values, projection.kernel_size)
    if visible is not None:
        patches = take(patches, visible)
    # The kernel's order is (channel, row, column). The patches follow it and not the other way round: a permuted
    # weight would get a permuted gradient, which DDP copies.
    patches = patches.unflatten(2, (*projection.kernel_size, -1)).permute(0, 1, 4, 2, 3).flatten(2)
    weight = projection.weight.flatten(1)
    return F.linear(patches.to(weight.dtype), weight, projection.bias)


def _prefix_tokens(embeddings: nn.Module) -> torch.Tensor:
    if hasattr(embeddings, "distillation_token"):
        return torch.cat([embeddings.cls_token, embeddings.distillation_token], dim=1)
    return embeddings.cls_token


def _layers(backbone: PreTrainedModel) -> nn.ModuleList:
    return backbone.encoder.layer if hasattr(backbone, "encoder") else backbone.layers


def set_drop_path(backbone: PreTrainedModel, rate: float) -> None:
    """Gives the layers of a ViT, DeiT, DINOv2 or BEiT drop path, rising evenly from 0 to `rate`.

    What is saved or exported stays the plain backbone: drop path has no weights, and ViTs and DeiTs no setting for it.
    """
    layers = _layers(backbone)
    for layer, layer_rate in zip(layers, drop_path_rates(rate, len(layers)), strict=True):
        if hasattr(layer, "drop_path"):  # DINOv2, whose own has the same rate in all layers, and BEiT
            layer.drop_path = DropPath(layer_rate)
        else:  # the end of both residual branches
            layer.dropout = nn.Sequential(layer.dropout, DropPath(layer_rate))


@torch.no_grad()
def make_layers_identity(backbone: PreTrainedModel) -> None:
    """Zeroes the last weights of both residual branches of each layer of a ViT, DeiT, DINOv2 or BEiT.

    Its output without the final norm is then that of its patch embedding, with positions and class token.
    """
    for layer in _layers(backbone):
        if hasattr(layer, "layer_scale1"):  # DINOv2
            ends = (layer.layer_scale1, layer.layer_scale2)
        else:
            ends = (layer.attention.o_proj, layer.mlp.fc2)
        for parameter in (parameter for end in ends for parameter in end.parameters()):
            parameter.zero_()


@torch.no_grad()
def init_vit_as_mae(backbone: PreTrainedModel, fixed_positions: bool) -> None:
    """MAE's initialisation of a stock ViT, DeiT or DINOv2, of what has not been loaded from a checkpoint.

    Xavier-uniform for every linear layer, with queries, keys and values counted as one matrix; the patch convolution
    likewise as a linear layer; tokens normal(0, 0.02); with `fixed_positions`, the sine-cosine table with zeros for
    the prefix tokens (MAE, appendix A.1 and `models_mae.py`).
    """
    embeddings = backbone.embeddings
    xavier_uniform_as_matrix(embeddings.patch_embeddings.projection.weight)
    for token in (embeddings.cls_token, getattr(embeddings, "distillation_token", None)):
        if token is not None:
            init.normal_(token, std=0.02)
    init_layers_as_mae(_layers(backbone))
    if fixed_positions:
        init.copy_(embeddings.position_embeddings, sincos_table_of(backbone.config))


@torch.no_grad()
def init_layers_as_mae(layers: nn.Module) -> None:
    """Xavier-uniform for the linear layers of stock blocks, with queries, keys and values counted as one matrix."""
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            is_qkv = name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
            # One third of a (3 hidden, hidden) matrix has the bound sqrt(6 / 4 hidden), not sqrt(6 / 2 hidden).
            init.xavier_uniform_(module.weight, gain=math.sqrt(0.5) if is_qkv else 1.0)
            if module.bias is not None:
                init.zeros_(module.bias)


def last_scales_of_residual_blocks(backbone: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The last batch norm's scale in each block of a ResNet or RegNet: with zeros the block begins as the identity."""
    for stage in getattr(getattr(backbone, "encoder", None), "stages", ()):
        for block in stage.layers:
            # ConvNeXt has stages too, but neither batch norm nor `layer` in its blocks.
            last = block.layer[-1] if hasattr(block, "layer") else None
            if isinstance(getattr(last, "normalization", None), nn.BatchNorm2d):
                yield last.normalization.weight


def sincos_table_of(backbone_config: PreTrainedConfig) -> torch.Tensor:
    """MAE's position table for a backbone: (1, prefix + units, hidden), zeros for the prefix."""
    table = sincos_positions_2d(backbone_config.hidden_size, backbone_grid(backbone_config))
    zeros = torch.zeros(num_prefix_tokens(backbone_config), backbone_config.hidden_size, device="cpu")
    return torch.cat([zeros, table]).unsqueeze(0)


def xavier_uniform_as_matrix(weight: torch.Tensor) -> None:
    """Initialises a convolution's kernel, unless it has been loaded, like the linear layer on patches that it is."""
    # `init` functions look at a mark on the tensor, which a view would lose.
    if not getattr(weight, "_is_hf_initialized", False):
        nn.init.xavier_uniform_(weight.flatten(1))


def init_patch_projection(projection: nn.Conv2d) -> None:
    """`xavier_uniform_as_matrix` for the kernel, torch's own initialisation for the bias."""
    xavier_uniform_as_matrix(projection.weight)
    bound = 1 / math.sqrt(projection.weight[0].numel())
    init.uniform_(projection.bias, -bound, bound)
