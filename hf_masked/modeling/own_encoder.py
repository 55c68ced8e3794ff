"""What encoders share that a paper invented, for which transformers has no stock class, and classifiers on them."""

from abc import abstractmethod

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import can_return_tuple


class OwnEncoderModel(PreTrainedModel):
    """Base of such an encoder's classes. The encoder itself, or a head's `encoder`, is what is exported."""

    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `VariantModel`


class OwnEncoderClassifier:
    """Makes an encoder's base class a classifier, which holds `encoder`:

    class CAPIForImageClassification(OwnEncoderClassifier, CAPIEncoderPreTrainedModel)
    """

    @abstractmethod
    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        """The encoder's output, (batch, tokens, hidden), to (batch, num_labels)."""

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: float (batch, channels, height, width).
            labels: int64 (batch,), for the cross-entropy.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            logits: (batch, num_labels).
        """
        outputs = self.encoder(pixel_values, **kwargs)
        logits = self.classify(outputs.last_hidden_state)
        return ImageClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
