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
        dropout: of the attention's weights, in training.
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        bias: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.num_attention_heads = num_attention_heads
        self.scaling = (hidden_size // num_attention_heads) ** -0.5
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=bias)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) -> the same shape."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_attention_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head width) each
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        context, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.projection(context.flatten(2))

    @torch.no_grad()
    def weights(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the fast kernels keep to themselves, float32 (batch, heads, tokens, tokens): each row sums to 1."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_attention_heads, -1))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head width) each
        return (query @ key.transpose(-1, -2) * self.scaling).float().softmax(dim=-1)


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a memory of another width, with one matrix for keys and values.

    Args:
        config: the model's config, whose `_attn_implementation` chooses the kernel.
        hidden_size: width of the queries, a multiple of `num_attention_heads`.
        memory_size: width of the memory.
        dropout: of the attention's weights, in training.
    """

    is_causal = False

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        memory_size: int,
        num_attention_heads: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.num_attention_heads = num_attention_heads
        self.scaling = (hidden_size // num_attention_heads) ** -0.5
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key_value = nn.Linear(memory_size, 2 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """(batch, queries, hidden) and (batch, tokens, memory) -> (batch, queries, hidden)."""
        query = self.query(hidden_states).unflatten(2, (self.num_attention_heads, -1)).transpose(1, 2)
        key_value = self.key_value(memory).unflatten(2, (2, self.num_attention_heads, -1))
        key, value = key_value.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head width) each
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.dropout if self.training else 0.0
        context, _ = attention(self, query, key, value, None, scaling=self.scaling, dropout=dropout)
        return self.projection(context.flatten(2))


class FeedForward(nn.Sequential):
    """Linear, GELU, Linear."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__(
            nn.Linear(hidden_size, intermediate_size), nn.GELU(), nn.Linear(intermediate_size, hidden_size)
        )


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is left out for some samples of a training batch, and scaled for the others.

    Args:
        rate: share of the samples (Huang et al., arXiv 1603.09382).
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """(batch, ...) -> the same shape."""
        if self.rate == 0.0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * (keep / (1.0 - self.rate)).to(branch.dtype)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Of each of `depth` blocks: rising evenly from 0 to `rate`."""
    return torch.linspace(0, rate, depth, device="cpu").tolist()


class TransformerBlock(GradientCheckpointingLayer):
    """Pre-norm self-attention and feed-forward, each with a residual (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        layer_norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.attention = SelfAttention(config, hidden_size, num_attention_heads)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, return_weights: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(batch, tokens, hidden) -> the same shape.

        Args:
            return_weights: hand out the attention's weights too, float32 (batch, heads, tokens, tokens), without
                gradient. They are asked for here because a sharded block has its parameters only while it is called.
        """
        normed = self.attention_norm(hidden_states)
        hidden_states = hidden_states + self.drop_path(self.attention(normed))
        hidden_states = hidden_states + self.drop_path(self.feed_forward(self.feed_forward_norm(hidden_states)))
        return (hidden_states, self.attention.weights(normed)) if return_weights else hidden_states


class CrossAttentionBlock(GradientCheckpointingLayer):
    """Pre-norm cross-attention and feed-forward, each with a residual; self-attention before them if asked for.

    Args:
        memory_size: width of what is attended to, which comes normalised.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        hidden_size: int,
        memory_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        self_attention: bool = False,
        layer_norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.self_attention = SelfAttention(config, hidden_size, num_attention_heads) if self_attention else None
        self.self_attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps) if self_attention else None
        self.cross_attention_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.cross_attention = CrossAttention(config, hidden_size, memory_size, num_attention_heads)
        self.feed_forward_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.feed_forward = FeedForward(hidden_size, intermediate_size)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """(batch, queries, hidden) and (batch, tokens, memory) -> (batch, queries, hidden)."""
        if self.self_attention is not None:
            hidden_states = hidden_states + self.self_attention(self.self_attention_norm(hidden_states))
        hidden_states = hidden_states + self.cross_attention(self.cross_attention_norm(hidden_states), memory)
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))
