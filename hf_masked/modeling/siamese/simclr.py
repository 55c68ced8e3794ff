"""SimCLR: each view of a picture finds the other one among all views of the batch; strong augmentation, large batches.

Ting Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, arXiv 2002.05709.
Reference implementation: https://github.com/google-research/simclr (`objective.py`, `model_util.py`, `run.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import ByBackbone
from hf_masked.modeling.hallucinated_views import HallucinatedViewsConfig, HallucinatedViewsModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import tiny_vit
from hf_masked.modeling.parts.gather import process_rank
from hf_masked.modeling.parts.heads import MLPHead
from hf_masked.modeling.parts.losses import nt_xent
from hf_masked.modeling.parts.pooling import POOLED_BACKBONES
from hf_masked.modeling.parts.text import TEXT_BACKBONES
from hf_masked.modeling.parts.views import joined, split_views
from hf_masked.modeling.projected_views import example_views, project
from hf_masked.modeling.registry import register_variant

REDUCTIONS = {"sum": 1.0, "mean": 0.5}


class SimCLRConfig(HallucinatedViewsConfig):
    """Config of SimCLR.

    Args:
        backbone_config: a config of a convolutional net or Transformer whose output can be pooled to one vector;
            ResNet-50 by default; or of an encoder of texts.
        text_pooling: of texts: "mean" of the tokens, or "cls", the first one's.
        projection_dim: width of what is compared.
        projection_hidden_dim: of the projector; by default the encoder's width.
        projection_layers: linear layers of the projector: 2 in the paper, 3 in SimCLR v2 and by default in the code.
        heads_batch_norm: False leaves batch norm out of the projector.
        projector_last_norm: batch norm after the projector's last layer too, with a scale and without a shift, as
            `model_util.py` has it.
        zero_init_residual: start each residual block of a ResNet as the identity (`resnet.py`).
        temperature: of the softmax: 0.1 for ImageNet, 0.5 for CIFAR-10 (appendix B.9).
        loss_reduction: "sum" of the means over both kinds of views, as `objective.py` has it, or "mean" over all views
            (equation 1), half of it.
        hallucinator_config: a `HallucinatorConfig` or its dict, {} for its defaults; None for SimCLR alone.
    """

    model_type = "hf_masked_simclr"
    paper_title: ClassVar[str] = "A Simple Framework for Contrastive Learning of Visual Representations"
    paper_year: ClassVar[int] = 2020
    arxiv_id: ClassVar[str] = "2002.05709"
    reference_repository: ClassVar[str] = "https://github.com/google-research/simclr"
    masks: ClassVar[str] = "nothing: two augmented crops of a picture"
    predicts: ClassVar[str] = "which view of the batch is the other one of the same picture"
    modality: ClassVar[str] = ByBackbone("image", "text")
    backbones: ClassVar[tuple[str, ...]] = (*POOLED_BACKBONES, *TEXT_BACKBONES)
    processor: ClassVar[str] = ByBackbone("MultiViewImageProcessor", "TextProcessor")

    zero_init_residual: bool = True
    heads_batch_norm: bool = True
    projector_last_norm: bool = True
    temperature: float = 0.1
    loss_reduction: str = "sum"

    def check(self) -> None:
        super().check()
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive, for example 0.1.")
        if self.loss_reduction not in REDUCTIONS:
            raise ValueError(
                f"loss_reduction is {self.loss_reduction!r}; it must be one of {', '.join(map(repr, REDUCTIONS))}."
            )


@dataclass
class SimCLROutput(PreTrainingOutput):
    """Output of `SimCLRForPreTraining`; the fields of the encoder hold the first views, then the second ones.

    Args:
        logits: float32 (batch, batch * processes), the cosines of the first view with all second ones, divided by the
            temperature.
        z1, z2: (batch, projection_dim), the views' projections, of unit length.
        accuracy: scalar, the share of the first views that are nearest, of all second ones, to their own.
    """

    logits: torch.Tensor | None = None
    z1: torch.Tensor | None = None
    z2: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class SimCLRPreTrainedModel(HallucinatedViewsModel):
    """Encoder and projector, with their initialisation and freezing."""

    config: SimCLRConfig
    logged_outputs: ClassVar[tuple[str, ...]] = ("accuracy",)
    declined_checks: ClassVar[dict[str, str]] = {
        "accumulation": "the negatives are the batch's, and two halves have fewer than the whole",
        "draws": "the processor draws the views, the model nothing",
    }

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        last_norm = "scale" if config.heads_batch_norm and config.projector_last_norm else None
        self.projector = MLPHead(
            config.projector_sizes, config.heads_batch_norm, last_norm, last_bias=last_norm is None
        )


class SimCLRModel(SimCLRPreTrainedModel):
    """Encoder and projector on single pictures."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"hallucinator\..*"]

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        self.post_init()


class SimCLRForPreTraining(SimCLRPreTrainedModel):
    """Encoder, projector and the loss over all views of all processes."""

    def __init__(self, config: SimCLRConfig):
        super().__init__(config)
        self.add_hallucinator()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> SimCLROutput:
        """One step on pairs of views, which pass through the encoder together: batch norm sees both.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised.
            input_ids: int64 (batch, 2, tokens), where the encoder takes texts.
            attention_mask: int64 (batch, 2, tokens), 0 for padding.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `SimCLROutput`.

        Raises:
            ValueError: for other channels, views or another rank, or tokens outside of the vocabulary.
        """
        views = split_views(self.inputs_of(pixel_values, input_ids, attention_mask), num_views=2)
        outputs, projections = project(self, joined(views), self.config.text_pooling, **kwargs)
        z1, z2 = F.normalize(projections.float(), dim=1).chunk(2)  # (batch, projection_dim)
        temperature, scale = self.config.temperature, REDUCTIONS[self.config.loss_reduction]
        contrast, logits = nt_xent(z1, z2, temperature)
        contrast = scale * contrast

        def hallucinated_loss() -> torch.Tensor:
            pairs = ((z1, z2), (z2, z1))
            anchors = tuple(F.normalize(self.hallucinator(*pair).float(), dim=1) for pair in pairs)
            return scale * nt_xent(z1, z2, temperature, anchors)[0]

        loss, parts = self.with_hallucination(contrast, hallucinated_loss) if return_loss else (None, None)
        own = process_rank() * len(z1) + torch.arange(len(z1), device=z1.device)
        return SimCLROutput(
            loss=loss,
            losses={"contrast": contrast.detach()} | parts if return_loss else None,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            logits=logits,
            z1=z1,
            z2=z2,
            accuracy=(logits.detach().argmax(dim=1) == own).float().mean(),
        )


def tiny_config() -> SimCLRConfig:
    # Without batch norm several processes equal one, and every check applies.
    return SimCLRConfig(backbone_config=tiny_vit(), projection_dim=16, heads_batch_norm=False)


register_variant(
    config=SimCLRConfig,
    pretraining=SimCLRForPreTraining,
    model=SimCLRModel,
    tiny_config=tiny_config,
    example_inputs=example_views,
)
