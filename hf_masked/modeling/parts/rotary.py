"""Attention whose queries and keys are turned by the angles of their positions (RoPE; Su et al., arXiv 2104.09864)."""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedConfig

from hf_masked.modeling.parts.blocks import eager_attention

# (cosines, sines), float (batch or 1, 1, tokens, head width) each: what a token's position does to queries and keys.
Rotation = tuple[torch.Tensor, torch.Tensor]


def rotate(states: torch.Tensor, rotation: Rotation, parts: int = 2) -> torch.Tensor:
    """Turns queries or keys, (batch, heads, tokens, head width), by the angles of their positions.

    Args:
        states: the queries or keys.
        rotation: of their positions.
        parts: of equal width that a head consists of, one for each axis; within a part of width w, channel i goes with
            channel i + w / 2.
    """
    cosines, sines = rotation
    first, second = states.unflatten(-1, (parts, -1)).chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1).flatten(-2)
    return states * cosines + turned * sines


def check_rotary_heads(prefix: str, hidden_size: int, heads: int) -> None:
    """Raises a ValueError for heads that do not divide the width into what rotary positions need."""
    if hidden_size % (4 * heads):
        raise ValueError(
            f"{prefix}hidden_size={hidden_size} is no multiple of 4 * {prefix}num_attention_heads={4 * heads}: a head "
            "holds two axes of two channels per frequency."
        )


class RotaryAttention(nn.Module):
    """Attention with rotary positions; of queries to a memory where there is one.

    Args:
        config: the model's, whose `_attn_implementation` chooses the kernel.
        hidden_size, num_attention_heads: of the queries.
        memory_size: width of what is attended to.
        bias: of the linear layers.
        rotary_parts: see `rotate`.
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        memory_size: int,
        bias: bool = True,
        rotary_parts: int = 2,
    ):
        super().__init__()
        self.config = config
        self.rotary_parts = rotary_parts
        self.num_attention_heads = num_attention_heads
        self.scaling = (hidden_size // num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(memory_size, hidden_size, bias=bias)
        self.v_proj = nn.Linear(memory_size, hidden_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotation: Rotation | None,
        memory: torch.Tensor | None = None,
        memory_rotation: Rotation | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, queries, hidden) -> the same shape, and the weights where the kernel tells them.

        Args:
            hidden_states: the queries' tokens.
            rotation: of their positions; None turns neither queries nor keys.
            memory: (batch, tokens, memory), what is attended to; by default the queries' own tokens.
            memory_rotation: of the positions of the memory.
        """
        if memory is None:
            memory, memory_rotation = hidden_states, rotation
        query, key, value = (
            projection(states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, hidden_states), (self.k_proj, memory), (self.v_proj, memory))
        )  # (batch, heads, tokens, head width) each
        if rotation is not None:
            query = rotate(query, rotation, self.rotary_parts).to(value.dtype)
            key = rotate(key, memory_rotation, self.rotary_parts).to(value.dtype)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.o_proj(context.flatten(2)), weights
