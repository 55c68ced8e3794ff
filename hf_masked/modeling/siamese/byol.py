"""BYOL: predict a slowly moving twin's projection of one view from the encoder's of the other; no negatives.

Jean-Bastien Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020,
arXiv 2006.07733. Reference implementation, in JAX: https://github.com/google-deepmind/deepmind-research (`byol/`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import ResNetConfig
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import ByBackbone
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.heads import MLPHead
from hf_masked.modeling.parts.losses import negative_cosine, normalized_std
from hf_masked.modeling.parts.momentum import MomentumTwin, cosine_momentum
from hf_masked.modeling.parts.pooling import POOLED_BACKBONES
from hf_masked.modeling.parts.text import TEXT_BACKBONES
from hf_masked.modeling.parts.views import split_views
from hf_masked.modeling.projected_views import ProjectedViewsConfig, ProjectedViewsModel, example_views, project
from hf_masked.modeling.registry import register_variant

TAU_SCHEDULES = ("cosine", "constant")
LOSS_REDUCTIONS = ("sum", "mean")

# The paper's two distributions of augmentations (appendix B, table 6; `utils/augmentations.py`).
T = {
    "jitter_probability": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grayscale_probability": 0.2,
    "blur_probability": 1.0,
    "blur_sigma": (0.1, 2.0),
}
T_PRIME = T | {"blur_probability": 0.1, "solarize_probability": 0.2}


class BYOLConfig(ProjectedViewsConfig):
    """Config of BYOL.

    Args:
        backbone_config: a config of a convolutional net or Transformer whose output can be pooled to one vector;
            ResNet-50 by default; or of an encoder of texts.
        text_pooling: of texts: "mean" of the tokens, or "cls", the first one's.
        projection_dim: width of the projector's output and of the predictor's.
        projection_hidden_dim, predictor_hidden_dim: of the two heads, each with one hidden layer in the paper.
        projection_layers: linear layers of the projector.
        base_tau: tau in `target <- tau * target + (1 - tau) * online`, at the start (paper, section 3.2).
        tau_schedule: "cosine", up to 1 at the end of training, or "constant".
        loss_reduction: over the two directions: "sum" (equation 2 and the text after it) or "mean".
        use_predictor: False leaves the predictor out, which collapses (table 5b).
        stop_gradient: False takes the online network's own projections as targets, with their gradient, which
            collapses.
        zero_init_residual: start each residual block of a ResNet as the identity. The paper's results are without, the
            released code's with it (README of the reference).
    """

    model_type = "hf_masked_byol"
    paper_title: ClassVar[str] = "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning"
    paper_year: ClassVar[int] = 2020
    arxiv_id: ClassVar[str] = "2006.07733"
    reference_repository: ClassVar[str | None] = "https://github.com/google-deepmind/deepmind-research"
    masks: ClassVar[str] = "nothing: two augmented crops of a picture"
    predicts: ClassVar[str] = "a momentum twin's projection of one view from the other"
    modality: ClassVar[str] = ByBackbone("image", "text")
    backbones: ClassVar[tuple[str, ...]] = (*POOLED_BACKBONES, *TEXT_BACKBONES)
    processor: ClassVar[str] = ByBackbone("MultiViewImageProcessor", "TextProcessor")

    projection_dim: int = 256
    projection_hidden_dim: int | None = 4096
    predictor_hidden_dim: int = 4096
    base_tau: float = 0.996
    tau_schedule: str = "cosine"
    loss_reduction: str = "sum"
    use_predictor: bool = True
    stop_gradient: bool = True

    def check(self) -> None:
        super().check()
        self._check_positive("predictor_hidden_dim")
        if not 0.0 <= self.base_tau <= 1.0:
            raise ValueError(f"base_tau is {self.base_tau}; it must lie in [0, 1], for example 0.996.")
        if self.tau_schedule not in TAU_SCHEDULES:
            raise ValueError(f"tau_schedule is {self.tau_schedule!r}; it must be one of {', '.join(TAU_SCHEDULES)}.")
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(
                f"loss_reduction is {self.loss_reduction!r}; it must be one of {', '.join(LOSS_REDUCTIONS)}."
            )

    @property
    def predictor_sizes(self) -> list[int]:
        return [self.projection_dim, self.predictor_hidden_dim, self.projection_dim]

    def processor_settings(self) -> dict:
        if self.modality == "text":
            return super().processor_settings()
        photometric = [T] + [T_PRIME] * (self.num_views - 1)
        return super().processor_settings() | {"crop_scale": (0.08, 1.0), "photometric": photometric}


@dataclass
class BYOLOutput(PreTrainingOutput):
    """Output of `BYOLForPreTraining`; the fields of the encoder are those of the first view.

    Args:
        online_predictions: (batch, views, projection_dim), the online network's, of each view.
        target_projections: (batch, 2 * target networks, projection_dim), what is predicted, without gradient: of each
            target network the two views of its pair.
        z_std: scalar, deviation of the normalised online projections over the batch, 0 when collapsed. The loss alone
            does not tell.
    """

    online_predictions: torch.Tensor | None = None
    target_projections: torch.Tensor | None = None
    z_std: torch.Tensor | None = None


class BYOLPreTrainedModel(ProjectedViewsModel):
    """Encoder and projector, with their initialisation and freezing."""

    config: BYOLConfig
    logged_outputs: ClassVar[tuple[str, ...]] = ("z_std",)

    def __init__(self, config: BYOLConfig):
        super().__init__(config)
        self.projector = MLPHead(config.projector_sizes, last_bias=False)


class BYOLModel(BYOLPreTrainedModel):
    """Encoder and projector on single pictures: the online network's."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(predictor|target)\..*"]

    def __init__(self, config: BYOLConfig):
        super().__init__(config)
        self.post_init()


class BYOLForPreTraining(BYOLPreTrainedModel):
    """Online network (encoder, projector, predictor), target network (their momentum twin, without a predictor), and
    the loss between two views."""

    # Name of a target network -> the two views that predict each other through it.
    pairs: ClassVar[dict[str, tuple[int, int]]] = {"target": (0, 1)}

    def __init__(self, config: BYOLConfig):
        super().__init__(config)
        # The last layers have no bias in the reference; the projector's would get no gradient through the batch norm
        # of the predictor.
        self.predictor = MLPHead(config.predictor_sizes, last_bias=False) if config.use_predictor else nn.Identity()
        tau = cosine_momentum(config.base_tau) if config.tau_schedule == "cosine" else config.base_tau
        for name in self.pairs:
            self.add_module(name, MomentumTwin(self, ("backbone", "projector"), tau))
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> BYOLOutput:
        """One step on the views of pictures, or texts.

        The views pass through each network one after the other, so that batch norm has its statistics per view.

        Args:
            pixel_values: float (batch, views, channels, height, width), normalised.
            input_ids: int64 (batch, views, tokens), where the encoder takes texts.
            attention_mask: int64 (batch, views, tokens), 0 for padding.
            return_loss: whether to compute the loss.
            kwargs: of the online encoder.

        Returns:
            `BYOLOutput`; each part of the loss lies in [0, 4].

        Raises:
            ValueError: for other channels, views or another rank, or tokens outside of the vocabulary.
        """
        views = split_views(self.inputs_of(pixel_values, input_ids, attention_mask), self.config.num_views)
        pooling = self.config.text_pooling
        outputs, projections = zip(*(project(self, view, pooling, **kwargs) for view in views), strict=True)
        predictions = [self.predictor(projection) for projection in projections]  # (batch, projection_dim) each
        targets = self.targets(views, projections)
        loss, losses = self.loss(predictions, targets) if return_loss else (None, None)
        return BYOLOutput(
            loss=loss,
            losses=losses,
            last_hidden_state=outputs[0].last_hidden_state,
            hidden_states=outputs[0].get("hidden_states"),
            attentions=outputs[0].get("attentions"),
            online_predictions=torch.stack(predictions, dim=1),
            target_projections=torch.stack([z.detach() for pair in targets.values() for z in pair], dim=1),
            z_std=sum(normalized_std(projection) for projection in projections) / len(projections),
        )

    def targets(self, views, projections) -> dict[str, list[torch.Tensor]]:
        """Name of a target network -> its projections of the two views of its pair, (batch, projection_dim) each.

        Args:
            views: (batch, channels, height, width) each, or texts.
            projections: of the online network, (batch, projection_dim) each.
        """
        if not self.config.stop_gradient:
            return {name: [projections[number] for number in pair] for name, pair in self.pairs.items()}
        with torch.no_grad():
            return {
                name: [
                    project(self.get_submodule(name), views[number], self.config.text_pooling)[1] for number in pair
                ]
                for name, pair in self.pairs.items()
            }

    def loss_terms(self, predictions, targets) -> dict[str, torch.Tensor]:
        """What predicts what, as "1_to_2" -> scalar in [0, 4]: both directions of each pair."""
        terms = {}
        for name, (i, j) in self.pairs.items():
            terms[f"{i + 1}_to_{j + 1}"] = regression_loss(predictions[i], targets[name][1])
            terms[f"{j + 1}_to_{i + 1}"] = regression_loss(predictions[j], targets[name][0])
        return terms

    def loss(self, predictions, targets) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum or mean of the directions (section 3.1), averaged over pairs of views; and its parts."""
        terms = self.loss_terms(predictions, targets)
        directions = 2 if self.config.loss_reduction == "sum" else 1
        loss = directions * sum(terms.values()) / len(terms)
        return loss, {name: term.detach() for name, term in terms.items()}


def regression_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared distance of the vectors at length 1, `2 - 2 cos` (equation 2), averaged over the batch, in float32.

    Args:
        prediction, target: (batch, width).
    """
    return 2.0 + 2.0 * negative_cosine(prediction, target)


def tiny_config() -> BYOLConfig:
    return BYOLConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32
        ),
        projection_dim=16,
        projection_hidden_dim=32,
        predictor_hidden_dim=32,
    )


register_variant(
    config=BYOLConfig,
    pretraining=BYOLForPreTraining,
    model=BYOLModel,
    tiny_config=tiny_config,
    example_inputs=example_views,
)
