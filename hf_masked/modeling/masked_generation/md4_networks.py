"""MD4's networks: a U-Net of one resolution and a U-ViT for pictures, a Transformer for texts.

Jiaxin Shi et al., "Simplified and Generalized Masked Diffusion for Discrete Data", NeurIPS 2024, arXiv 2406.04329.
Reference implementation: https://github.com/google-deepmind/md4 (`md4/models/backward.py`, `md4/networks/`).
"""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.parts.blocks import eager_attention
from hf_masked.modeling.parts.patches import check_pixel_values, pair, patch_grid, unpatchify
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d

# What gates the Transformer's feed-forward layers (`activation_map`); flax's GELU is the one with tanh.
GATES = {"glu": torch.sigmoid, "swiglu": F.silu, "geglu": lambda x: F.gelu(x, approximate="tanh")}

TIME_FEATURES = ("t", "none")

# The U-ViT's DiT sees 2 x 2 positions of the coarsest map as one token (`uvit.py`).
DIT_PATCH = 2


class MD4NetworkConfig(PreTrainedConfig):
    """What both kinds of network have. A token is one of `vocab_size` values, or the mask, whose id is `vocab_size`.

    Args:
        vocab_size: number of values of a token.
        conditioning_size: width of the embedded time and class.
        time_features: "t", or "none" for a network that does not know the time.
        num_classes: of class-conditional models; 0 for none.
        dropout: in training, of residual branches.
        zero_init: heads, gates and the ends of branches start at zero, as in the reference: the untrained model
            predicts all values alike. Without it gradients reach everything from the first step.
    """

    vocab_size: int = 256
    conditioning_size: int = 128
    time_features: str = "t"
    num_classes: int = 0
    dropout: float = 0.0
    zero_init: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.vocab_size < 2:
            raise ValueError(f"vocab_size is {self.vocab_size}; a token needs at least 2 values.")
        if self.time_features not in TIME_FEATURES:
            raise ValueError(f"time_features is {self.time_features!r}; it must be one of {', '.join(TIME_FEATURES)}.")
        if self.conditioning_size < 4 or self.conditioning_size % 2:
            raise ValueError(
                f"conditioning_size is {self.conditioning_size}; it must be an even number of at least 4: sines and "
                "cosines of two frequencies."
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 0, for no classes, or positive.")

    @property
    def is_conditioned(self) -> bool:
        """Whether anything but the tokens enters the network."""
        return self.time_features == "t" or self.num_classes > 0


class MD4TransformerConfig(MD4NetworkConfig):
    """Config of the network for texts, by default text8's.

    Args:
        max_length: tokens of a text.
        hidden_size, num_hidden_layers, num_attention_heads: of the Transformer.
        intermediate_size: of the feed-forward layers; by default two thirds of four times the width, rounded up to a
            multiple of 32.
        embedding_size: width of the table of tokens before the layer that widens it (`outside_embed`); None for a
            table of the full width.
        gate: of the feed-forward layers, "glu", "swiglu" or "geglu"; it also stands before the modulation.
        depth_scaled_init: feed-forward weights start smaller by sqrt(2 / layers).
    """

    model_type = "hf_masked_md4_transformer"

    vocab_size: int = 27
    conditioning_size: int = 64
    max_length: int = 256
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    embedding_size: int | None = 64
    gate: str = "glu"
    depth_scaled_init: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of 2 * num_attention_heads="
                f"{2 * self.num_attention_heads}: rotary positions turn pairs of channels of a head."
            )
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}; it must be one of {', '.join(GATES)}.")
        if self.intermediate_size is None:
            self.intermediate_size = 32 * math.ceil(int(8 * self.hidden_size / 3) / 32)

    @property
    def data_shape(self) -> tuple[int]:
        return (self.max_length,)


class MD4UNetConfig(MD4NetworkConfig):
    """Config of the network for pictures, by default CIFAR-10's U-Net; with `num_dit_layers` it is a U-ViT.

    Args:
        image_size: in pixels, or (height, width).
        num_channels: of the pictures; each channel of each pixel is a token.
        num_layers: residual blocks per resolution on the way down; one more on the way up.
        channel_multipliers: of `conditioning_size`, the channels of each resolution, each half the one before.
            Several need a U-ViT.
        num_dit_layers: Transformer blocks on the coarsest map; 0 for the U-Net, which has an attention there.
        dit_hidden_size, dit_num_attention_heads: of these blocks.
        num_groups: of the group norms, 32 in the reference; it must divide the channels.
    """

    model_type = "hf_masked_md4_unet"

    image_size: int | list[int] | tuple[int, int] = 32
    num_channels: int = 3
    num_layers: int = 32
    channel_multipliers: list[int] | tuple[int, ...] = (1,)
    num_dit_layers: int = 0
    dit_hidden_size: int = 768
    dit_num_attention_heads: int = 12
    num_groups: int = 32
    dropout: float = 0.1

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if len(self.channel_multipliers) > 1 and not self.num_dit_layers:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers} with num_dit_layers=0: the U-Net has one resolution. "
                "Give the U-ViT's num_dit_layers, or one multiplier."
            )
        if any(channels % self.num_groups for channels in self.channels):
            raise ValueError(
                f"num_groups={self.num_groups} does not divide all of the channels {self.channels}: choose another "
                "conditioning_size or num_groups."
            )
        if self.num_dit_layers and self.dit_hidden_size % (4 * self.dit_num_attention_heads):
            raise ValueError(
                f"dit_hidden_size={self.dit_hidden_size} is no multiple of 4 * dit_num_attention_heads="
                f"{4 * self.dit_num_attention_heads}."
            )
        patch_grid(*pair(self.image_size), pair(self.stride))

    @property
    def channels(self) -> list[int]:
        """Of each resolution, the finest first."""
        return [self.conditioning_size * multiplier for multiplier in self.channel_multipliers]

    @property
    def hidden_size(self) -> int:
        return self.channels[0]

    @property
    def stride(self) -> int:
        """What must divide the pictures' sides."""
        return DIT_PATCH * 2 ** (len(self.channel_multipliers) - 1) if self.num_dit_layers else 1

    @property
    def data_shape(self) -> tuple[int, int, int]:
        return (self.num_channels, *pair(self.image_size))


class Conditioning(nn.Module):
    """Time and class to one vector (`CondEmbedding`): sines and cosines of 1000 t, beside the class's vector, through
    two layers."""

    def __init__(self, config: MD4NetworkConfig):
        super().__init__()
        self.size = config.conditioning_size
        self.knows_time = config.time_features == "t"
        self.num_classes = config.num_classes
        if self.num_classes:
            self.class_embeddings = nn.Embedding(self.num_classes, self.size)
        if self.knows_time:
            self.hidden = nn.Linear(self.size * (1 + bool(self.num_classes)), 4 * self.size)
            self.output = nn.Linear(4 * self.size, self.size)

    def forward(self, times: torch.Tensor | None, classes: torch.Tensor | None) -> torch.Tensor | None:
        """Times in [0, 1], float (batch,), and classes, int64 (batch,), to (batch, conditioning_size)."""
        embedded = self.class_embeddings(classes) if self.num_classes else None
        if not self.knows_time:
            return embedded
        half = self.size // 2
        steps = torch.arange(half, device=times.device, dtype=torch.float32)
        frequencies = torch.exp(steps * (-math.log(10_000) / (half - 1)))
        angles = 1000 * times.float()[:, None] * frequencies
        time = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.hidden.weight.dtype)
        vectors = time if embedded is None else torch.cat([time, embedded], dim=1)
        return self.output(F.silu(self.hidden(vectors)))


def shared_dropout(hidden_states: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Dropout whose choice all positions share (`Dropout1d`): (batch, tokens, hidden) -> the same shape."""
    if rate == 0.0 or not training:
        return hidden_states
    return hidden_states * F.dropout(hidden_states.new_ones(len(hidden_states), 1, hidden_states.shape[2]), rate)


def rotate(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of channels of (batch, heads, tokens, head width) by rotary positions, theta 10000."""
    width = states.shape[-1]
    exponents = torch.arange(0, width, 2, device=states.device, dtype=torch.float32) / width
    angles = positions.float()[:, None] * 10_000.0**-exponents  # (tokens, head width / 2)
    cosines, sines = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cosines - second * sines, first * sines + second * cosines], dim=-1).flatten(-2)


class MD4Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        config: the model's, whose `_attn_implementation` chooses the kernel.
        hidden_size: a multiple of `num_attention_heads`.
        qkv_bias, output_bias: of the linear layers.
        rotary: positions turn queries and keys.
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        qkv_bias: bool = False,
        output_bias: bool = False,
        rotary: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.scaling = (hidden_size // num_attention_heads) ** -0.5
        self.rotary = rotary
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=output_bias)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) -> the same shape, and the weights where the kernel tells them."""
        query, key, value = (
            projection(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (batch, heads, tokens, head width) each
        if self.rotary:
            positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            query, key = rotate(query, positions), rotate(key, positions)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        context, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return shared_dropout(self.o_proj(context.flatten(2)), self.dropout, self.training), weights


class GatedFeedForward(nn.Module):
    """down(gate(gate_proj(x)) * up_proj(x)), without biases."""

    def __init__(self, config: MD4TransformerConfig):
        super().__init__()
        self.gate = config.gate
        self.dropout = config.dropout
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        output = self.down_proj(GATES[self.gate](self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
        return shared_dropout(output, self.dropout, self.training)


class ModulatedNorm(nn.Module):
    """A norm whose shift and scale follow from the conditioning, or without one an RMS norm with weights."""

    def __init__(self, hidden_size: int, conditioned: bool, eps: float):
        super().__init__()
        if conditioned:
            self.norm = nn.LayerNorm(hidden_size, eps=eps, elementwise_affine=False)
        else:
            self.norm = nn.RMSNorm(hidden_size, eps=eps)

    def forward(self, hidden_states, shift=None, scale=None) -> torch.Tensor:
        """(batch, tokens, hidden), and (batch, 1, hidden) each, to the first's shape."""
        normed = self.norm(hidden_states)
        return normed if scale is None else normed * (1 + scale) + shift


class ModulatedLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each with a residual; the conditioning shifts and scales what enters them and gates
    what they add (adaLN).

    Args:
        attention, feed_forward: modules.
        hidden_size: of the tokens.
        conditioning_size: of the conditioning, or None for a plain layer with RMS norms.
        activation: of the conditioning, before the linear layer that makes the modulation.
        eps: of the norms.
    """

    def __init__(self, attention, feed_forward, hidden_size, conditioning_size, activation, eps):
        super().__init__()
        self.activation = activation
        self.attention_norm = ModulatedNorm(hidden_size, conditioning_size is not None, eps)
        self.attention = attention
        self.feed_forward_norm = ModulatedNorm(hidden_size, conditioning_size is not None, eps)
        self.feed_forward = feed_forward
        self.modulation = None if conditioning_size is None else nn.Linear(conditioning_size, 6 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, hidden) and (batch, conditioning_size) -> the first's shape."""
        if self.modulation is None:
            hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))[0]
            return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))
        parts = self.modulation(self.activation(condition)).unsqueeze(1).chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        hidden_states = hidden_states + gate * self.attention(self.attention_norm(hidden_states, shift, scale))[0]
        shift, scale, gate = parts[3:]
        return hidden_states + gate * self.feed_forward(self.feed_forward_norm(hidden_states, shift, scale))


class ModulatedHead(nn.Module):
    """A modulated norm and a linear layer, the end of both Transformers."""

    def __init__(self, hidden_size, output_size, conditioning_size, activation, eps, bias):
        super().__init__()
        self.activation = activation
        self.norm = ModulatedNorm(hidden_size, conditioning_size is not None, eps)
        self.modulation = None if conditioning_size is None else nn.Linear(conditioning_size, 2 * hidden_size)
        self.linear = nn.Linear(hidden_size, output_size, bias=bias)

    def forward(self, hidden_states: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, tokens, hidden) -> (batch, tokens, output_size)."""
        if self.modulation is None:
            return self.linear(self.norm(hidden_states))
        shift, scale = self.modulation(self.activation(condition)).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm(hidden_states, shift, scale))


class ConditionedGroupNorm(nn.Module):
    """A group norm whose scale and shift follow from the conditioning, where there is one (`CondGroupNorm`)."""

    def __init__(self, config: MD4UNetConfig, channels: int, conditioned: bool):
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=1e-6, affine=not conditioned)
        self.modulation = nn.Linear(config.conditioning_size, 2 * channels) if conditioned else None

    def forward(self, maps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, channels, rows, columns) -> the same shape."""
        if self.modulation is None:
            return self.norm(maps)
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        return self.norm(maps) * (1 + scale) + shift


class ResidualBlock(GradientCheckpointingLayer):
    """Two convolutions with a residual. The conditioning is added between them in the U-Net (`unet.py`), and scales
    and shifts both norms in the U-ViT (`uvit.py`).

    Args:
        resample: "down" or "up" by two, or None.
    """

    def __init__(self, config: MD4UNetConfig, in_channels: int, out_channels: int, resample: str | None = None):
        super().__init__()
        modulated = bool(config.num_dit_layers) and config.is_conditioned
        self.resample = resample
        self.dropout = config.dropout
        self.norm_1 = ConditionedGroupNorm(config, in_channels, modulated)
        self.convolution_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        adds = config.is_conditioned and not config.num_dit_layers
        self.condition = nn.Linear(config.conditioning_size, out_channels, bias=False) if adds else None
        self.norm_2 = ConditionedGroupNorm(config, out_channels, modulated)
        self.convolution_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, maps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, in_channels, rows, columns) -> (batch, out_channels, rows, columns), resampled."""
        branch = F.silu(self.norm_1(maps, condition))
        if self.resample is not None:
            branch, maps = self._resampled(branch), self._resampled(maps)
        branch = self.convolution_1(branch)
        if self.condition is not None:
            branch = branch + self.condition(condition)[:, :, None, None]
        branch = F.dropout(F.silu(self.norm_2(branch, condition)), self.dropout, self.training)
        return self.convolution_2(branch) + (maps if self.shortcut is None else self.shortcut(maps))

    def _resampled(self, maps: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(maps, 2) if self.resample == "down" else F.interpolate(maps, scale_factor=2)


class MapAttention(nn.Module):
    """The U-Net's middle: attention of one head between all positions, with a residual (`unet.py`)."""

    def __init__(self, config: MD4UNetConfig, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, channels, eps=1e-6)
        self.attention = MD4Attention(config, channels, 1, qkv_bias=True, output_bias=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(batch, channels, rows, columns) -> the same shape."""
        tokens = self.norm(maps).flatten(2).transpose(1, 2)  # (batch, rows * columns, channels)
        return maps + self.attention(tokens)[0].transpose(1, 2).unflatten(2, maps.shape[2:])


class UNetMiddle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, config: MD4UNetConfig):
        super().__init__()
        channels = config.channels[-1]
        self.block_1 = ResidualBlock(config, channels, channels)
        self.attention = MapAttention(config, channels)
        self.block_2 = ResidualBlock(config, channels, channels)

    def forward(self, maps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, channels, rows, columns) -> the same shape."""
        return self.block_2(self.attention(self.block_1(maps, condition)), condition)


class DiTFeedForward(nn.Module):
    """Linear, GELU, Linear, with dropout after both."""

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = dropout

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        hidden_states = F.gelu(self.fc1(hidden_states), approximate="tanh")
        hidden_states = self.fc2(F.dropout(hidden_states, self.dropout, self.training))
        return F.dropout(hidden_states, self.dropout, self.training)


class DiTMiddle(nn.Module):
    """The U-ViT's middle: a Transformer on patches of the coarsest map (`dit.py`; arXiv 2212.09748)."""

    def __init__(self, config: MD4UNetConfig):
        super().__init__()
        size, channels = config.dit_hidden_size, config.channels[-1]
        condition = config.conditioning_size if config.is_conditioned else None
        self.grid = patch_grid(*pair(config.image_size), pair(config.stride))
        self.embedding = nn.Conv2d(channels, size, DIT_PATCH, DIT_PATCH)
        # Sines and cosines at the start, but trained, as in the reference.
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], size))
        self.layers = nn.ModuleList(
            ModulatedLayer(
                MD4Attention(config, size, config.dit_num_attention_heads, qkv_bias=True, dropout=config.dropout),
                DiTFeedForward(size, config.dropout),
                size,
                condition,
                F.silu,
                eps=1e-6,
            )
            for _ in range(config.num_dit_layers)
        )
        self.head = ModulatedHead(size, DIT_PATCH**2 * channels, condition, F.silu, eps=1e-6, bias=True)

    def forward(self, maps: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """(batch, channels, rows, columns) -> the same shape."""
        tokens = self.embedding(maps)  # (batch, dit_hidden_size, rows / 2, columns / 2)
        grid = tuple(tokens.shape[2:])
        positions = interpolate_positions(self.position_embeddings, self.grid, grid)
        tokens = tokens.flatten(2).transpose(1, 2) + positions
        for layer in self.layers:
            tokens = layer(tokens, condition)
        return unpatchify(self.head(tokens, condition), grid, (DIT_PATCH, DIT_PATCH))


class MD4Network(PreTrainedModel):
    """Base of the networks: tokens with masks in, features and predictions out."""

    config: MD4NetworkConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["ModulatedLayer", "ResidualBlock"]
    _can_record_outputs: ClassVar[dict] = {"hidden_states": ModulatedLayer, "attentions": MD4Attention}

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `VariantModel`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d):
            _init_matrix(module)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.RMSNorm | nn.GroupNorm) and module.weight is not None:
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, DiTMiddle):
            size = module.position_embeddings.shape[2]
            init.copy_(module.position_embeddings, sincos_positions_2d(size, module.grid).unsqueeze(0))
        elif isinstance(module, GatedFeedForward) and self.config.depth_scaled_init:
            for linear in module.children():
                _init_matrix(linear, scale=2.0 / self.config.num_hidden_layers)
        if self.config.zero_init:
            for linear in self._zero_modules(module):
                init.zeros_(linear.weight)
                if linear.bias is not None:
                    init.zeros_(linear.bias)

    def _zero_modules(self, module: nn.Module) -> list[nn.Module]:
        """Children of a module that start at zero."""
        if isinstance(module, ModulatedLayer | ModulatedHead | ConditionedGroupNorm):
            zero = [module.modulation, module.linear if isinstance(module, ModulatedHead) else None]
        elif isinstance(module, ResidualBlock):
            zero = [module.condition, module.convolution_2]
        else:
            zero = [module.head] if isinstance(module, MD4UNet) else []
        return [child for child in zero if child is not None]

    def get_input_embeddings(self) -> nn.Module:
        return self.token_embeddings


def _init_matrix(module: nn.Linear | nn.Conv2d, scale: float = 1.0) -> None:
    """flax's default: a normal truncated at two deviations, of variance scale / fan-in; biases zero."""
    # What truncation leaves of a standard normal has this deviation.
    std = math.sqrt(scale / module.weight[0].numel()) / 0.87962566103423978
    init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        init.zeros_(module.bias)


class MD4Transformer(MD4Network):
    """The bidirectional Transformer for texts: rotary positions, gated feed-forward layers, adaLN."""

    config: MD4TransformerConfig
    main_input_name = "input_ids"
    input_modalities = ("text",)

    def __init__(self, config: MD4TransformerConfig):
        super().__init__(config)
        size, gate = config.hidden_size, GATES[config.gate]
        condition = config.conditioning_size if config.is_conditioned else None
        self.conditioning = Conditioning(config)
        self.token_embeddings = nn.Embedding(config.vocab_size + 1, config.embedding_size or size)
        self.embedding_projection = nn.Linear(config.embedding_size, size) if config.embedding_size else None
        self.layers = nn.ModuleList(
            ModulatedLayer(
                MD4Attention(config, size, config.num_attention_heads, rotary=True, dropout=config.dropout),
                GatedFeedForward(config),
                size,
                condition,
                gate,
                eps=1e-5,
            )
            for _ in range(config.num_hidden_layers)
        )
        self.head = ModulatedHead(size, config.vocab_size, condition, gate, eps=1e-5, bias=False)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor,
        times: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes texts.

        Args:
            input_ids: int64 (batch, tokens), `vocab_size` where masked.
            times: float (batch,) in [0, 1]; 0 by default, that of whole texts.
            classes: int64 (batch,), of class-conditional models.

        Returns:
            last_hidden_state: (batch, tokens, hidden), before the head.
        """
        return BaseModelOutput(last_hidden_state=self.features(input_ids, times, classes)[0])

    def features(self, ids, times, classes):
        """(batch, tokens, hidden), and the conditioning."""
        condition = condition_of(self, ids, times, classes)
        hidden_states = self.token_embeddings(ids)
        if self.embedding_projection is not None:
            hidden_states = self.embedding_projection(hidden_states)
        else:
            hidden_states = F.dropout(hidden_states, self.config.dropout, self.training)
        for layer in self.layers:
            hidden_states = layer(hidden_states, condition)
        return hidden_states, condition

    def predict(self, features: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Logits (batch, tokens, vocab_size)."""
        return self.head(features, condition)


class MD4UNet(MD4Network):
    """The network for pictures: residual blocks with skips, around an attention or a Transformer."""

    config: MD4UNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MD4UNetConfig):
        super().__init__(config)
        channels = config.channels
        self.conditioning = Conditioning(config)
        self.token_embeddings = nn.Embedding(config.vocab_size + 1, config.conditioning_size)
        self.stem = nn.Conv2d(config.num_channels * config.conditioning_size, config.conditioning_size, 3, padding=1)
        down, skips = [], [config.conditioning_size]
        for level, width in enumerate(channels):
            for _ in range(config.num_layers):
                down.append(ResidualBlock(config, skips[-1], width))
                skips.append(width)
            if level + 1 < len(channels):
                down.append(ResidualBlock(config, width, width, "down"))
                skips.append(width)
        self.down = nn.ModuleList(down)
        self.middle = (DiTMiddle if config.num_dit_layers else UNetMiddle)(config)
        up, width_now = [], channels[-1]
        for level, width in reversed(list(enumerate(channels))):
            for _ in range(config.num_layers + 1):
                up.append(ResidualBlock(config, width_now + skips.pop(), width))
                width_now = width
            if level:
                up.append(ResidualBlock(config, width, width, "up"))
        self.up = nn.ModuleList(up)
        modulated = bool(config.num_dit_layers) and config.is_conditioned
        self.norm = ConditionedGroupNorm(config, channels[0], modulated)
        self.head = nn.Conv2d(channels[0], config.num_channels * config.vocab_size, 3, padding=1)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        times: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width) in [0, 1].
            input_ids: int64 (batch, channels, height, width), their tokens, `vocab_size` where masked; instead.
            times: float (batch,) in [0, 1]; 0 by default, that of whole pictures.
            classes: int64 (batch,), of class-conditional models.

        Returns:
            last_hidden_state: (batch, hidden, height, width), the map before the head.

        Raises:
            ValueError: for other channels or sizes.
        """
        if input_ids is None:
            input_ids = tokens_of_pixels(pixel_values, self.config.vocab_size)
        check_pixel_values(input_ids, self.config.num_channels, pair(self.config.stride))
        return BaseModelOutput(last_hidden_state=self.features(input_ids, times, classes)[0])

    def features(self, ids, times, classes):
        """(batch, hidden, height, width), and the conditioning."""
        condition = condition_of(self, ids, times, classes)
        maps = self.stem(self.token_embeddings(ids).permute(0, 1, 4, 2, 3).flatten(1, 2))
        skips = [maps]
        for block in self.down:
            maps = block(maps, condition)
            skips.append(maps)
        maps = self.middle(maps, condition)
        for block in self.up:
            joined = maps if block.resample else torch.cat([maps, skips.pop()], dim=1)
            maps = block(joined, condition)
        return maps, condition

    def predict(self, features: torch.Tensor, condition: torch.Tensor | None) -> torch.Tensor:
        """Logits (batch, channels * height * width, vocab_size), in the order of `pixel_values`."""
        logits = self.head(F.silu(self.norm(features, condition)))  # (batch, channels * vocab_size, height, width)
        logits = logits.unflatten(1, (self.config.num_channels, self.config.vocab_size))
        return logits.permute(0, 1, 3, 4, 2).flatten(1, 3)


def condition_of(network: MD4Network, ids: torch.Tensor, times, classes) -> torch.Tensor | None:
    """(batch, conditioning_size), or None where the network knows neither time nor class.

    Raises:
        ValueError: for a model of classes without any, and for classes given to another.
    """
    if network.config.num_classes and classes is None:
        raise ValueError(
            f"The model was made for {network.config.num_classes} classes: give `classes`, int64 ({len(ids)},), in "
            "training and in sampling."
        )
    if classes is not None and not network.config.num_classes:
        raise ValueError(
            "The model knows no classes: leave `classes` out, or set num_classes in the network's config."
        )
    if times is None:
        times = torch.zeros(len(ids), device=ids.device)
    return network.conditioning(times, classes)


def tokens_of_pixels(pixel_values: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Values in [0, 1] to tokens: the byte, or with fewer than 256 values the part of the scale that it lies in.

    Returns:
        int64, the same shape.
    """
    steps = (pixel_values.float() * 255).round().long()
    return steps if vocab_size == 256 else steps.clamp(0, 255) * vocab_size // 256


def pixels_of_tokens(ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Tokens to values that span [0, 1], float32, the same shape."""
    return ids.float() / (vocab_size - 1)


for _config, _network in ((MD4TransformerConfig, MD4Transformer), (MD4UNetConfig, MD4UNet)):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _network)
