"""CroCo's encoder, a ViT without class token, with sine-cosine or rotary positions, and a classifier on it: what is
exported.

Philippe Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion",
NeurIPS 2022, arXiv 2210.10716; rotary positions: "CroCo v2", ICCV 2023, arXiv 2211.10408.
Reference implementation: https://github.com/naver/croco (`models/croco.py`, `models/blocks.py`,
`models/pos_embed.py`).
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.own_encoder import OwnEncoderClassifier, OwnEncoderModel
from hf_masked.modeling.parts.backbones import (
    backbone_grid,
    embed_patches,
    init_layers_as_mae,
    init_patch_projection,
)
from hf_masked.modeling.parts.blocks import FeedForward
from hf_masked.modeling.parts.patches import check_pixel_values, pair
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.parts.rotary import RotaryAttention, Rotation, check_rotary_heads

POSITIONS = ("sincos", "rope")


class CroCoEncoderConfig(PreTrainedConfig):
    """Config of CroCo's encoder; ViT-B/16 by default.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as of a ViT.
        image_size: in pixels, or (height, width); pictures of other sizes work too.
        patch_size: in pixels, or (height, width).
        num_channels: of the pictures.
        position_embedding_type: "sincos" (CroCo), a fixed table that is added to the patches, or "rope" (CroCo v2),
            which turns queries and keys in each attention, of the decoder too.
        rope_theta: base of the frequencies of "rope".
        layer_norm_eps: of all norms.
    """

    model_type = "hf_masked_croco_encoder"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    position_embedding_type: str = "sincos"
    rope_theta: float = 100.0
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.position_embedding_type not in POSITIONS:
            raise ValueError(
                f"position_embedding_type is {self.position_embedding_type!r}; it must be one of "
                f"{', '.join(POSITIONS)}."
            )
        self.check_heads("", self.hidden_size, self.num_attention_heads)
        backbone_grid(self)

    def check_heads(self, prefix: str, hidden_size: int, heads: int) -> None:
        """Raises a ValueError for heads that do not divide the width into what the positions need."""
        if self.position_embedding_type == "rope":
            check_rotary_heads(prefix, hidden_size, heads)
        elif hidden_size % heads or hidden_size % 4:
            raise ValueError(
                f"{prefix}hidden_size={hidden_size} must be a multiple of {prefix}num_attention_heads={heads}, and of "
                "4, for sine and cosine of two axes."
            )


def rope_angles(positions: torch.Tensor, grid: tuple[int, int], head_size: int, theta: float) -> torch.Tensor:
    """Angles of a head's channels: the row's in its first half, the column's in its second, each twice (`RoPE2D`).

    Args:
        positions: int64 (batch, tokens), raster positions.
        grid: (rows, columns) of patches.
        head_size: divisible by 4.
        theta: base of the frequencies `theta ** (-k / (head_size / 4))`, in radians per patch.

    Returns:
        float32 (batch, tokens, head_size).
    """
    columns = grid[1]
    coordinates = torch.stack([positions // columns, positions % columns], dim=-1)  # (batch, tokens, 2)
    exponents = torch.arange(head_size // 4, device=positions.device) / (head_size // 4)
    frequencies = theta**-exponents
    return (coordinates.unsqueeze(-1) * torch.cat([frequencies, frequencies])).flatten(2)


def rotation_of(
    config: CroCoEncoderConfig,
    grid: tuple[int, int],
    positions: torch.Tensor | None,
    head_size: int,
    like: torch.Tensor,
) -> Rotation | None:
    """Cosines and sines of patches' angles; None for sine-cosine positions.

    Args:
        config: the encoder's.
        grid: (rows, columns) of patches.
        positions: int64 (batch, n), raster positions; None for all.
        head_size: width of the heads.
        like: has the result's dtype and device; angles are float32 in any case.
    """
    if config.position_embedding_type != "rope":
        return None
    if positions is None:
        positions = torch.arange(grid[0] * grid[1], device=like.device).unsqueeze(0)
    angles = rope_angles(positions, grid, head_size, config.rope_theta).unsqueeze(1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class CroCoLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention and feed-forward, each with a residual."""

    def __init__(self, config: CroCoEncoderConfig):
        super().__init__()
        size, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.attention = RotaryAttention(config, size, config.num_attention_heads, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=eps)
        self.feed_forward = FeedForward(size, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), rotation)[0]
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class CroCoPositions(nn.Module):
    """A fixed sine-cosine table, added to the tokens of a grid; nothing with rotary positions.

    Args:
        config: the encoder's.
        hidden_size: width of the tokens.
    """

    def __init__(self, config: CroCoEncoderConfig, hidden_size: int):
        super().__init__()
        self.grid = backbone_grid(config)
        self.hidden_size = hidden_size
        # A persistent buffer: fixed, in the checkpoint, and never a parameter that initialisation could zero.
        self.register_buffer("table", self._made() if config.position_embedding_type == "sincos" else None)

    def _made(self) -> torch.Tensor:
        return sincos_positions_2d(self.hidden_size, self.grid).unsqueeze(0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fills the table, unless it has been loaded."""
        if self.table is not None:
            init.copy_(self.table, self._made())

    def forward(
        self, tokens: torch.Tensor, grid: tuple[int, int], positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds the positions; on another grid than the config's they are interpolated bicubically.

        Args:
            tokens: (batch, n, hidden).
            grid: (rows, columns) of patches.
            positions: int64 (batch, n), raster positions of the tokens; None for all.
        """
        if self.table is None:
            return tokens
        table = interpolate_positions(self.table, self.grid, grid)
        return tokens + (table if positions is None else table[0][positions])


class CroCoEmbeddings(nn.Module):
    """Patches embedded by a convolution, with their positions."""

    def __init__(self, config: CroCoEncoderConfig):
        super().__init__()
        patch_size = pair(config.patch_size)
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size)
        self.positions = CroCoPositions(config, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, grid: tuple[int, int], visible: torch.Tensor | None) -> torch.Tensor:
        """Pictures and int64 (batch, visible), or None for all, -> (batch, visible, hidden)."""
        tokens = embed_patches(self.patch_embeddings, pixel_values, visible)
        # The residual stream is not in half precision under autocast.
        return self.positions(tokens.to(self.patch_embeddings.weight.dtype), grid, visible)


class CroCoEncoderPreTrainedModel(OwnEncoderModel):
    """Initialisation of the encoder, alone or under a classifier."""

    config: CroCoEncoderConfig
    _no_split_modules: ClassVar[list[str]] = ["CroCoLayer"]
    _can_record_outputs: ClassVar[dict] = {"hidden_states": CroCoLayer, "attentions": RotaryAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_croco(module)


class CroCoEncoder(CroCoEncoderPreTrainedModel):
    """CroCo's encoder on all patches of a picture, or on those that are visible."""

    def __init__(self, config: CroCoEncoderConfig):
        super().__init__(config)
        self.embeddings = CroCoEmbeddings(config)
        self.layers = nn.ModuleList(CroCoLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, visible: torch.Tensor | None = None, **kwargs) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            visible: int64 (batch, visible), raster positions of the patches to see, or None for all.

        Returns:
            last_hidden_state: (batch, visible, hidden), normalised; there is no class token.

        Raises:
            ValueError: for other channels or sizes.
        """
        config = self.config
        grid = check_pixel_values(pixel_values, config.num_channels, pair(config.patch_size))
        hidden_states = self.embeddings(pixel_values, grid, visible)
        head_size = config.hidden_size // config.num_attention_heads
        rotation = rotation_of(config, grid, visible, head_size, hidden_states)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotation)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


@torch.no_grad()
def init_croco(module: nn.Module) -> None:
    """The reference's initialisation, MAE's: Xavier-uniform for linear layers, for the patch convolution as one, and
    for queries, keys and values of self-attention as one matrix; of what has not been loaded from a checkpoint."""
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, CroCoLayer):
        init_layers_as_mae(module.attention)
    elif isinstance(module, CroCoPositions):
        module.init_weights()
    elif isinstance(module, CroCoEmbeddings):
        init_patch_projection(module.patch_embeddings)


class CroCoForImageClassification(OwnEncoderClassifier, CroCoEncoderPreTrainedModel):
    """An exported encoder, the mean of its patches and a linear layer."""

    def __init__(self, config: CroCoEncoderConfig):
        super().__init__(config)
        self.encoder = CroCoEncoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(tokens.mean(dim=1))


AutoConfig.register(CroCoEncoderConfig.model_type, CroCoEncoderConfig)
AutoModel.register(CroCoEncoderConfig, CroCoEncoder)
AutoModelForImageClassification.register(CroCoEncoderConfig, CroCoForImageClassification)
