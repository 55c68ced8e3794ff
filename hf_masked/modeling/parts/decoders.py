"""Decoders: from what the encoder saw to predictions for every unit."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedConfig

from hf_masked.modeling.parts.blocks import TransformerBlock, drop_path_rates
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d


class MaskTokenDecoder(nn.Module):
    """MAE's decoder: encoded visible tokens in their places, one shared mask token elsewhere, Transformer blocks.

    Args:
        config: the model's config (it chooses the attention kernel).
        encoder_size: width of the encoder's tokens.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: of the decoder.
        grid: (rows, columns) of units the position table is made for; other grids interpolate it.
        output_size: values predicted per unit; None for a decoder without a head, which returns its own tokens.
        num_prefix_tokens: class and other tokens that stand before the units; their position is zero.
        drop_path_rate: of the last block; it rises evenly from 0 at the first.
        predicts_prefix: predict the prefix tokens too, before the units.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        encoder_size: int,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        intermediate_size: int,
        grid: tuple[int, int],
        output_size: int | None,
        num_prefix_tokens: int = 1,
        layer_norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        predicts_prefix: bool = False,
    ):
        super().__init__()
        self.grid = grid
        self.num_prefix_tokens = num_prefix_tokens
        self.predicts_prefix = predicts_prefix
        self.embedding = nn.Linear(encoder_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        # A persistent buffer: fixed, in the checkpoint, and never a parameter that initialisation could zero.
        self.register_buffer("position_embeddings", self._positions(hidden_size))
        self.layers = nn.ModuleList(
            TransformerBlock(config, hidden_size, num_attention_heads, intermediate_size, layer_norm_eps, rate)
            for rate in drop_path_rates(drop_path_rate, num_hidden_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.head = nn.Identity() if output_size is None else nn.Linear(hidden_size, output_size)

    def _positions(self, hidden_size: int) -> torch.Tensor:
        table = sincos_positions_2d(hidden_size, self.grid)
        return torch.cat([torch.zeros(self.num_prefix_tokens, hidden_size, device="cpu"), table]).unsqueeze(0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Tokens and the fixed table; transformers calls the linear layers' and norms' initialisation itself."""
        init.normal_(self.mask_token, std=0.02)
        init.copy_(self.position_embeddings, self._positions(self.mask_token.shape[-1]))

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predicts every unit.

        Args:
            tokens: (batch, prefix + visible, encoder hidden), the prefix tokens first.
            visible: int64 (batch, visible), the raster position of each visible token.
            grid: (rows, columns) of the units of this input.

        Returns:
            (batch, units, output), raster order; with `predicts_prefix` (batch, prefix + units, output).
        """
        return self.predict(self.embed(tokens, visible, grid))

    def embed(self, tokens: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the blocks are given, (batch, prefix + units, hidden); arguments as of `forward`."""
        tokens = self.embedding(tokens)  # (batch, prefix + visible, hidden)
        positions = interpolate_positions(self.position_embeddings, self.grid, grid)
        # Row 0 of the sequence is the first prefix token, so unit i stands at prefix + i.
        prefix = torch.arange(self.num_prefix_tokens, device=tokens.device).expand(tokens.shape[0], -1)
        places = torch.cat([prefix, visible + self.num_prefix_tokens], dim=1).unsqueeze(-1).expand_as(tokens)
        sequence = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], positions.shape[1], -1)
        return sequence.scatter(1, places, tokens) + positions  # (batch, prefix + units, hidden)

    def predict(self, sequence: torch.Tensor, attentions: list[torch.Tensor] | None = None) -> torch.Tensor:
        """What `forward` returns.

        Args:
            sequence: (batch, prefix + units, hidden) of `embed`.
            attentions: receives the attention's weights in each block, means over the heads without gradient: float32
                (batch, 1, prefix + units, prefix + units).
        """
        for layer in self.layers:
            if attentions is None:
                sequence = layer(sequence)
            else:
                sequence, weights = layer(sequence, return_weights=True)
                attentions.append(weights.mean(dim=1, keepdim=True))
        if not self.predicts_prefix:
            sequence = sequence[:, self.num_prefix_tokens :]
        return self.head(self.norm(sequence))
