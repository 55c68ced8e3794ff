"""Transformer blocks for what a method adds to its backbone: decoders, predictors, heads."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedConfig


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out; the weights are the second result. Shapes as in transformers' attention interface."""
    weights = (query @ key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Args:
        config: the model's config, whose `_attn_implementation` chooses the kernel.
        hidden_size: width, a multiple of `num_attention_heads`.
    """

    is_causal = False

    def __init__(self, config: PreTrainedConfig, hidden_size: int, num_attention_heads: int, bias: bool = True):
        super().__init__()
        self.config = config
        self.num_attention_heads = num_attention_heads
        self.scaling = (hidden_size // num_attention_heads) ** -0.5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_attention_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head width) each
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.projection(context.flatten(2))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm self-attention and feed-forward, each with a residual (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = SelfAttention(config, hidden_size, num_attention_heads)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states))
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))
