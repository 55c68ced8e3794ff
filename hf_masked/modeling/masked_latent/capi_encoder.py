"""CAPI's encoder, a ViT with registers, RMS norms and rotary positions, and a classifier on it: what is exported.

Timothée Darcet et al., "Cluster and Predict Latents Patches for Improved Masked Image Modeling", TMLR 2025,
arXiv 2502.08769.
Reference implementation: https://github.com/facebookresearch/capi (`model.py`, `eval_classification.py`).
"""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.own_encoder import OwnEncoderClassifier, OwnEncoderModel
from hf_masked.modeling.parts.backbones import backbone_grid, embed_patches, init_patch_projection
from hf_masked.modeling.parts.patches import check_pixel_values, pair
from hf_masked.modeling.parts.rotary import RotaryAttention, Rotation, check_rotary_heads

ROPES = ("reference", "axial")


class CAPIEncoderConfig(PreTrainedConfig):
    """Config of CAPI's encoder, a ViT that no stock class covers; ViT-L/14 by default.

    It has registers, RMS norms and rotary positions, no class token, no position table and, but for the patch
    embedding, no biases.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: as of a ViT.
        image_size: in pixels, or (height, width); pictures of other sizes work too.
        patch_size: in pixels, or (height, width).
        num_channels: of the pictures.
        num_register_tokens: learned tokens around the border of what is seen; divisible by 4.
        drop_path_rate: share of the samples of a batch that skip a branch in training, in every layer.
        rope: how positions turn queries and keys: "reference", as the released weights need it, which is no rotation,
            because channels that are turned together have the angles of different axes; or "axial", a rotation.
        rope_max_frequency, rope_min_frequency: turns over the side of the picture.
        rms_norm_eps: of all norms.
    """

    model_type = "hf_masked_capi_encoder"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 14
    num_channels: int = 3
    num_register_tokens: int = 16
    drop_path_rate: float = 0.2
    rope: str = "reference"
    rope_max_frequency: float = 7.0
    rope_min_frequency: float = 7e-4
    rms_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_rotary_heads("", self.hidden_size, self.num_attention_heads)
        if self.num_register_tokens % 4:
            raise ValueError(f"num_register_tokens is {self.num_register_tokens}; it must be a multiple of 4 sides.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; it must lie in [0, 1).")
        if self.rope not in ROPES:
            raise ValueError(f"rope is {self.rope!r}; it must be one of {', '.join(ROPES)}.")
        backbone_grid(self)


def token_coordinates(grid: tuple[int, int], num_registers: int, visible: torch.Tensor) -> torch.Tensor:
    """Where tokens are, as (row, column) in [0, 1], both ends included.

    Registers stand along the border of the smallest rectangle that holds what is visible, a quarter of them on each
    side (`prepare_tokens_and_drop`).

    Args:
        grid: (rows, columns) of patches.
        num_registers: before the patches; 0 for the patches alone.
        visible: int64 (batch, visible), raster positions.

    Returns:
        float32 (batch, registers + visible, 2).
    """
    axes = [torch.linspace(0, 1, side, device=visible.device) for side in grid]
    patches = torch.cartesian_prod(*axes)[visible]  # (batch, visible, 2)
    if num_registers == 0:
        return patches
    side = torch.arange(num_registers // 4, device=visible.device) / (num_registers // 4)
    start, end = torch.zeros_like(side), torch.ones_like(side)
    row = torch.cat([side, end, 1 - side, start])
    column = torch.cat([start, side, end, 1 - side])
    border = torch.stack([row, column], dim=1)  # (registers, 2)
    low, high = patches.amin(dim=1, keepdim=True), patches.amax(dim=1, keepdim=True)
    return torch.cat([low + border * (high - low), patches], dim=1)


def rope_angles(coordinates: torch.Tensor, head_size: int, max_frequency: float, min_frequency: float) -> torch.Tensor:
    """Angles of the channels of a head: the row's in its first half, the column's in its second, each twice.

    Args:
        coordinates: float32 (batch, tokens, 2).
        head_size: divisible by 4.
        max_frequency, min_frequency: turns from 0 to 1.

    Returns:
        float32 (batch, tokens, head_size).
    """
    exponents = torch.linspace(0, -1, head_size // 4, device=coordinates.device)
    frequencies = max_frequency * (max_frequency / min_frequency) ** exponents
    angles = coordinates.unsqueeze(-1) * (2 * math.pi * torch.cat([frequencies, frequencies]))
    return angles.flatten(2)


def rotary_parts(rope: str) -> int:
    """Into how many parts `rope` cuts a head, see `rotate`: with "axial" the channels that are turned together have
    the same angle and lengths are kept; with "reference" channel i goes with channel i + width / 2, whose angle is
    that of the other axis."""
    return 2 if rope == "axial" else 1


class CAPILayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a residual, of the encoder or, with a memory, of the predictor.

    Args:
        config: the model's, whose `_attn_implementation` chooses the kernel.
        encoder: the encoder's, for what the predictor shares with it.
        hidden_size, num_attention_heads, intermediate_size: of the layer.
        memory_size: width of what is attended to.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        encoder: CAPIEncoderConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        memory_size: int,
    ):
        super().__init__()
        self.drop_path_rate = encoder.drop_path_rate
        self.attention_norm = nn.RMSNorm(hidden_size, eps=encoder.rms_norm_eps)
        self.attention = RotaryAttention(
            config,
            hidden_size,
            num_attention_heads,
            memory_size,
            bias=False,
            rotary_parts=rotary_parts(encoder.rope),
        )
        self.feed_forward_norm = nn.RMSNorm(hidden_size, eps=encoder.rms_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, intermediate_size, bias=False),
            nn.GELU(),
            nn.Linear(intermediate_size, hidden_size, bias=False),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation,
        memory: torch.Tensor | None = None,
        memory_rotation: Rotation | None = None,
    ) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        hidden_states = self._add(hidden_states, self._attend, rotation, memory, memory_rotation)
        return self._add(hidden_states, self._feed_forward)

    def _attend(self, hidden_states, rotation, memory, memory_rotation):
        return self.attention(self.attention_norm(hidden_states), rotation, memory, memory_rotation)[0]

    def _feed_forward(self, hidden_states):
        return self.feed_forward(self.feed_forward_norm(hidden_states))

    def _add(self, hidden_states: torch.Tensor, branch, *others) -> torch.Tensor:
        """The residual sum. In training only a random part of the batch goes through the branch (stochastic depth,
        arXiv 1603.09382), in the form of the reference's `EfficientResidual`, which does not compute the rest."""
        if not self.training or self.drop_path_rate == 0.0:
            return hidden_states + branch(hidden_states, *others)
        batch = hidden_states.shape[0]
        kept = max(int(batch * (1 - self.drop_path_rate)), 1)
        chosen = torch.randperm(batch, device=hidden_states.device)[:kept]
        update = branch(hidden_states[chosen], *(_rows(other, chosen) for other in others))
        return hidden_states.index_add(0, chosen, update.to(hidden_states.dtype), alpha=batch / kept)


def _rows(value: torch.Tensor | tuple | None, chosen: torch.Tensor):
    if isinstance(value, tuple):
        return tuple(part[chosen] for part in value)
    return None if value is None else value[chosen]


class CAPIEmbeddings(nn.Module):
    """Registers, and patches embedded by a convolution."""

    def __init__(self, config: CAPIEncoderConfig):
        super().__init__()
        patch_size = pair(config.patch_size)
        self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        self.patch_embeddings = nn.Conv2d(config.num_channels, config.hidden_size, patch_size, patch_size)

    def forward(self, pixel_values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Pictures and int64 (batch, visible) -> (batch, registers + visible, hidden)."""
        tokens = embed_patches(self.patch_embeddings, pixel_values, visible)
        registers = self.register_tokens.expand(tokens.shape[0], -1, -1)
        # The residual stream is not in half precision under autocast.
        return torch.cat([registers, tokens.to(registers.dtype)], dim=1)


class CAPIEncoderPreTrainedModel(OwnEncoderModel):
    """Initialisation of the encoder, alone or under a classifier."""

    config: CAPIEncoderConfig
    _no_split_modules: ClassVar[list[str]] = ["CAPILayer"]
    _can_record_outputs: ClassVar[dict] = {"hidden_states": CAPILayer, "attentions": RotaryAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_capi(module)


class CAPIEncoder(CAPIEncoderPreTrainedModel):
    """CAPI's encoder on all patches of a picture, or on those that are visible."""

    def __init__(self, config: CAPIEncoderConfig):
        super().__init__(config)
        self.embeddings = CAPIEmbeddings(config)
        self.layers = nn.ModuleList(
            CAPILayer(
                config,
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                memory_size=config.hidden_size,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, elementwise_affine=False)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, visible: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            visible: int64 (batch, visible), raster positions of the patches to see, or None for all.

        Returns:
            last_hidden_state: (batch, registers + visible, hidden), normalised to a root mean square of 1.

        Raises:
            ValueError: for other channels or sizes.
        """
        config = self.config
        grid = check_pixel_values(pixel_values, config.num_channels, pair(config.patch_size))
        visible = everything(pixel_values, grid) if visible is None else visible
        hidden_states = self.embeddings(pixel_values, visible)
        rotation = rotation_of(config, grid, visible, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states, rotation)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))


def everything(pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """int64 (batch, units): all raster positions."""
    return torch.arange(grid[0] * grid[1], device=pixel_values.device).expand(pixel_values.shape[0], -1)


def rotation_of(
    config: CAPIEncoderConfig,
    grid: tuple[int, int],
    positions: torch.Tensor,
    dtype: torch.dtype,
    head_size: int | None = None,
    registers: bool = True,
) -> Rotation:
    """Cosines and sines of tokens' angles.

    Args:
        config: the encoder's.
        grid: (rows, columns) of patches.
        positions: int64 (batch, n), raster positions of patches.
        dtype: of the result; angles are float32 in any case.
        head_size: width of the heads, by default of the encoder's.
        registers: put those of the registers first.
    """
    coordinates = token_coordinates(grid, config.num_register_tokens if registers else 0, positions)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    angles = rope_angles(coordinates, head_size, config.rope_max_frequency, config.rope_min_frequency).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@torch.no_grad()
def init_capi(module: nn.Module) -> None:
    """The reference's initialisation: Xavier-uniform for linear layers and for the patch convolution as one, registers
    normal(0, 0.02), of what has not been loaded from a checkpoint."""
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm) and module.elementwise_affine:
        init.ones_(module.weight)
    elif isinstance(module, CAPIEmbeddings):
        init_patch_projection(module.patch_embeddings)
        init.normal_(module.register_tokens, std=0.02)


class AttentivePooler(nn.Module):
    """One learned query that attends to the patches (`eval_classification.py`, `AttnPoolClassifier`)."""

    def __init__(self, hidden_size: int, num_attention_heads: int):
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, hidden)."""
        heads = self.num_attention_heads
        query = self.query.to(tokens.dtype).view(1, heads, 1, -1).expand(tokens.shape[0], -1, -1, -1)
        key_value = self.key_value(tokens).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        key, value = key_value.unbind(0)  # (batch, heads, tokens, head width) each
        return F.scaled_dot_product_attention(query.to(value.dtype), key, value).flatten(1)


class CAPIForImageClassification(OwnEncoderClassifier, CAPIEncoderPreTrainedModel):
    """An exported encoder with attentive pooling of its patches and a linear layer."""

    def __init__(self, config: CAPIEncoderConfig):
        super().__init__(config)
        self.encoder = CAPIEncoder(config)
        self.pooler = AttentivePooler(config.hidden_size, config.num_attention_heads)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            for weight in (self.pooler.query, self.pooler.key_value.weight, self.classifier.weight):
                init.trunc_normal_(weight, std=0.02)

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pooler(tokens[:, self.config.num_register_tokens :]))


AutoConfig.register(CAPIEncoderConfig.model_type, CAPIEncoderConfig)
AutoModel.register(CAPIEncoderConfig, CAPIEncoder)
AutoModelForImageClassification.register(CAPIEncoderConfig, CAPIForImageClassification)
