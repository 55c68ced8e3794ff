"""One vector per picture or text from what a stock transformers encoder returns."""

import inspect

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_masked.modeling.parts.patches import check_pixel_values, pair

POOLINGS = ("auto", "mean", "cls", "pooler")

# Of texts.
TOKEN_POOLINGS = ("mean", "cls")

# Stock encoders of pictures that `pool` has been tried with: their output is a vector whichever way "auto" goes.
POOLED_BACKBONES = ("resnet", "regnet", "convnext", "convnextv2", "vit", "deit", "beit", "dinov2", "swin")


def pool(outputs: ModelOutput, config: PreTrainedConfig, size: tuple[int, int], pooling: str = "auto") -> torch.Tensor:
    """One vector per picture.

    Args:
        outputs: of an encoder of tokens (batch, tokens, width) or maps (batch, width, rows, columns).
        config: the encoder's.
        size: (height, width) of the pictures in pixels.
        pooling: "mean" of the patch tokens (or of the map), without class, distillation and register tokens; "cls",
            the first token; "pooler", the model's own `pooler_output`; "auto", what the architecture's classifiers
            take where that is free of trained weights of the head (the pooler of convolutional nets), else "mean".

    Returns:
        (batch, width).

    Raises:
        ValueError: where the encoder has no such output.
    """
    hidden = outputs.last_hidden_state
    pooled = getattr(outputs, "pooler_output", None)
    if pooling == "pooler" or (pooling == "auto" and hidden.ndim == 4 and pooled is not None):
        if pooled is None:
            raise ValueError("The encoder has no pooler, or its checkpoint held none: use pooling='mean'.")
        return pooled.flatten(1)
    prefix = _num_prefix_tokens(hidden, config, size)
    if pooling == "cls":
        if prefix == 0:
            raise ValueError("The encoder has no class token: use pooling='mean'.")
        return hidden[:, 0]
    return hidden.mean(dim=(2, 3)) if hidden.ndim == 4 else hidden[:, prefix:].mean(dim=1)


def _num_prefix_tokens(hidden: torch.Tensor, config: PreTrainedConfig, size: tuple[int, int]) -> int:
    """Tokens before the patches. Encoders that merge patches (Swin, Hiera) have fewer tokens than patches and none."""
    patch_size = getattr(config, "patch_size", None)
    if hidden.ndim == 4 or patch_size is None:
        return 0
    rows, columns = (side // patch for side, patch in zip(size, pair(patch_size), strict=True))
    return max(hidden.shape[1] - rows * columns, 0)


def patch_tokens(hidden: torch.Tensor, config: PreTrainedConfig, size: tuple[int, int]) -> torch.Tensor:
    """(batch, rows, columns, width) of what an encoder makes of pictures of `size`: tokens (batch, tokens, width), or
    maps (batch, width, rows, columns).

    Raises:
        ValueError: for an encoder that merges patches and returns tokens.
    """
    if hidden.ndim == 4:
        return hidden.permute(0, 2, 3, 1)
    rows, columns = (side // patch for side, patch in zip(size, pair(config.patch_size), strict=True))
    if hidden.shape[1] < rows * columns:
        raise ValueError(
            f"{config.model_type} merges patches: its tokens are not those of the {rows} x {columns} grid."
        )
    return hidden[:, hidden.shape[1] - rows * columns :].unflatten(1, (rows, columns))


def pool_tokens(hidden: torch.Tensor, attention_mask: torch.Tensor, pooling: str = "mean") -> torch.Tensor:
    """One vector per text.

    Args:
        hidden: (batch, tokens, width).
        attention_mask: (batch or 1, tokens), 1 for the tokens of the text.
        pooling: "mean" of the text's tokens, special ones included; "cls", the first of them.

    Returns:
        (batch, width).
    """
    mask = attention_mask.to(hidden.dtype)
    if pooling == "cls":
        mask = mask * (mask.cumsum(dim=1) == 1)
    return (hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def encode_pooled(backbone: PreTrainedModel, pixel_values: torch.Tensor, **kwargs) -> tuple[ModelOutput, torch.Tensor]:
    """Runs a stock encoder on pictures of any size.

    Args:
        backbone: a stock transformers encoder.
        pixel_values: float (batch, channels, height, width).
        kwargs: of the encoder's `forward`.

    Returns:
        The encoder's output, and one vector per picture, (batch, width), as `pool` says for "auto".

    Raises:
        ValueError: for other channels or another rank.
    """
    check_pixel_values(pixel_values, backbone.config.num_channels)
    size = tuple(pixel_values.shape[-2:])
    outputs = backbone(pixel_values.to(backbone.dtype), **interpolation_argument(backbone, size), **kwargs)
    return outputs, pool(outputs, backbone.config, size)


def interpolation_argument(backbone: PreTrainedModel, size: tuple[int, int]) -> dict[str, bool]:
    """The `forward` argument that ViTs need for pictures of another size than their config's, where they take it."""
    takes_it = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    expected = getattr(backbone.config, "image_size", None)
    return {"interpolate_pos_encoding": True} if takes_it and expected and pair(expected) != size else {}


def check_views(pixel_values: torch.Tensor, num_views: int) -> None:
    """Raises a ValueError unless the pictures are (batch, num_views, channels, height, width)."""
    if pixel_values.ndim != 5 or pixel_values.shape[1] != num_views:
        raise ValueError(
            f"`pixel_values` has shape {tuple(pixel_values.shape)}; expected (batch, {num_views}, channels, height, "
            f"width): {num_views} views of each picture, as MultiViewImageProcessor(num_views={num_views}) makes them "
            "in training."
        )
