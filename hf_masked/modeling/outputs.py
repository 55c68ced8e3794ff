"""What models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class PreTrainingOutput(ModelOutput):
    """Output of every `...ForPreTraining`.

    Args:
        loss: float32 scalar, what is minimised; None with `return_loss=False`.
        losses: the named parts of the loss, detached float32 scalars, for the log.
        last_hidden_state: the encoder's tokens or feature map.
        hidden_states, attentions: of the encoder, when asked for.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class MaskedPreTrainingOutput(PreTrainingOutput):
    """Output of a method that predicts masked units.

    Args:
        logits: (batch, units, values) predictions in raster order, visible units included.
        mask: bool (batch, units), True = masked.
    """

    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass
class MaskedImageModelingOutput(PreTrainingOutput):
    """Output of a method that reconstructs whole pictures.

    Args:
        reconstruction: (batch, channels, height, width), normalised as the input, visible pixels included.
        mask: bool (batch, units), True = masked.
    """

    reconstruction: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass
class GenerationOutput(ModelOutput):
    """What a method that generates has drawn.

    Args:
        token_ids: int64, of pictures' values (batch, channels, height, width), of a tokenizer's or of a text
            (batch, tokens).
        pixel_values: float32 (batch, channels, height, width) in [0, 1], of pictures.
    """

    token_ids: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
