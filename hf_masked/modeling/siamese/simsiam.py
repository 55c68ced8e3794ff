"""SimSiam: two views, one encoder, a predictor on one side and a stop-gradient on the other; no negatives, no twin.

Xinlei Chen and Kaiming He, "Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv 2011.10566.
Reference implementation: https://github.com/facebookresearch/simsiam (`simsiam/builder.py`, `main_simsiam.py`).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig
from transformers.utils import can_return_tuple

from hf_masked.modeling.hallucinated_views import HallucinatedViewsConfig, HallucinatedViewsModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.heads import MLPHead
from hf_masked.modeling.parts.losses import negative_cosine, normalized_std, softmax_cross_entropy
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.state_dicts import TIMM_RESNET_RENAMING, official_resnet_config, rename_weights
from hf_masked.modeling.projected_views import example_views, project
from hf_masked.modeling.registry import register_variant

SIMILARITIES = {"cosine": negative_cosine, "cross_entropy": softmax_cross_entropy}


class SimSiamConfig(HallucinatedViewsConfig):
    """Config of SimSiam.

    Args:
        backbone_config: a config of a convolutional net or Transformer whose output can be pooled to one vector;
            ResNet-50 by default.
        projection_dim: width of the projector's output and of the predictor's.
        projection_hidden_dim: of the projector; by default the encoder's width.
        projection_layers: linear layers of the projector (paper, section 3: 3, for CIFAR 2).
        predictor_hidden_dim: the predictor's bottleneck.
        similarity: "cosine" (equation 1) or "cross_entropy" of softmaxes (section 4.5).
        symmetric: predict each view from the other; False predicts the second from the first only (section 4.6).
        use_predictor: False leaves the predictor out, which collapses (section 4.2).
        stop_gradient: False lets the gradient through to the target too, which collapses (section 4.1).
        heads_batch_norm: False leaves batch norm out of projector and predictor (table 3a).
        projector_last_affine: give the projector's last batch norm a scale and a shift.
        zero_init_residual: start each residual block of a ResNet as the identity (section 3, "baseline settings").
        fix_predictor_lr: keep the predictor's learning rate constant under `PreTrainer` (section 4.2; the released
            checkpoints' `--fix-pred-lr`).
        hallucinator_config: a `HallucinatorConfig` or its dict, {} for its defaults; None for SimSiam alone.
    """

    model_type = "hf_masked_simsiam"
    paper_title: ClassVar[str] = "Exploring Simple Siamese Representation Learning"
    paper_year: ClassVar[int] = 2020
    arxiv_id: ClassVar[str] = "2011.10566"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/simsiam"
    weights_licence: ClassVar[str] = "CC BY-NC 4.0"
    masks: ClassVar[str] = "nothing: two augmented crops of a picture"
    predicts: ClassVar[str] = "one view's projection from the other's"

    projection_dim: int = 2048
    projection_layers: int = 3
    predictor_hidden_dim: int = 512
    similarity: str = "cosine"
    symmetric: bool = True
    use_predictor: bool = True
    stop_gradient: bool = True
    heads_batch_norm: bool = True
    projector_last_affine: bool = False
    zero_init_residual: bool = True
    fix_predictor_lr: bool = True

    def check(self) -> None:
        super().check()
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"similarity is {self.similarity!r}; it must be one of {', '.join(SIMILARITIES)}.")
        self._check_positive("predictor_hidden_dim")


@dataclass
class SimSiamOutput(PreTrainingOutput):
    """Output of `SimSiamForPreTraining`; the fields of the encoder are those of the first view.

    Args:
        p1, p2: (batch, projection_dim) predictions from the first and the second view.
        z1, z2: (batch, projection_dim) projections, detached.
        z_std: scalar, deviation of the normalised projections: near 1 / sqrt(projection_dim) in health, 0 when
            collapsed (section 4.1). The loss alone does not tell.
    """

    p1: torch.Tensor | None = None
    p2: torch.Tensor | None = None
    z1: torch.Tensor | None = None
    z2: torch.Tensor | None = None
    z_std: torch.Tensor | None = None


class SimSiamPreTrainedModel(HallucinatedViewsModel):
    """Encoder and projector, with their initialisation and freezing."""

    config: SimSiamConfig
    decay_everything: ClassVar[bool] = True  # `main_simsiam.py`: SGD's weight decay on norms and biases too
    logged_outputs: ClassVar[tuple[str, ...]] = ("z_std",)

    def __init__(self, config: SimSiamConfig):
        super().__init__(config)
        last_norm = ("affine" if config.projector_last_affine else "plain") if config.heads_batch_norm else None
        self.projector = MLPHead(config.projector_sizes, config.heads_batch_norm, last_norm)


class SimSiamModel(SimSiamPreTrainedModel):
    """Encoder and projector on single pictures."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(predictor|hallucinator)\..*"]

    def __init__(self, config: SimSiamConfig):
        super().__init__(config)
        self.post_init()


class SimSiamForPreTraining(SimSiamPreTrainedModel):
    """Encoder, projector, predictor and the loss between two views."""

    def __init__(self, config: SimSiamConfig):
        super().__init__(config)
        sizes = [config.projection_dim, config.predictor_hidden_dim, config.projection_dim]
        self.predictor = MLPHead(sizes, config.heads_batch_norm) if config.use_predictor else nn.Identity()
        self.add_hallucinator()
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = True, **kwargs) -> SimSiamOutput:
        """One step on pairs of views.

        The views pass through the encoder one after the other, so that batch norm has its statistics per view.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `SimSiamOutput`; with the cosine similarity the loss lies in [-1, 1].

        Raises:
            ValueError: for other channels, views or another rank.
        """
        check_views(pixel_values, num_views=2)
        first, second = pixel_values.unbind(dim=1)
        outputs, z1 = project(self, first, **kwargs)  # (batch, projection_dim)
        _, z2 = project(self, second, **kwargs)
        p1, p2 = self.predictor(z1), self.predictor(z2)  # (batch, projection_dim)
        loss, losses = self.loss(p1, p2, z1, z2) if return_loss else (None, None)
        return SimSiamOutput(
            loss=loss,
            losses=losses,
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            p1=p1,
            p2=p2,
            z1=z1.detach(),
            z2=z2.detach(),
            z_std=(normalized_std(z1) + normalized_std(z2)) / 2,
        )

    def loss(self, p1, p2, z1, z2) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """L = D(p1, stopgrad(z2)) / 2 + D(p2, stopgrad(z1)) / 2 (equation 4), or its first term; and its parts."""
        distance = SIMILARITIES[self.config.similarity]
        if self.config.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()
        pairs = {"from_first": (p1, z2)} | ({"from_second": (p2, z1)} if self.config.symmetric else {})
        losses = {name: distance(*pair) for name, pair in pairs.items()}

        def hallucinated_loss() -> torch.Tensor:
            unit = {name: [F.normalize(each.float(), dim=1) for each in pair] for name, pair in pairs.items()}
            return sum(distance(self.hallucinator(*unit[name]), z) for name, (_, z) in pairs.items()) / len(pairs)

        loss, hallucination = self.with_hallucination(sum(losses.values()) / len(losses), hallucinated_loss)
        return loss, {name: part.detach() for name, part in losses.items()} | hallucination

    def constant_learning_rate(self) -> set[str]:
        return {"predictor.*"} if self.config.fix_predictor_lr else set()


# Official name -> ours. The encoder's `fc` is the projector, and its layers count as ours do.
_RENAMING = ((r"^module\.", ""), (r"^encoder\.fc\.", "projector."), (r"^encoder\.", ""), *TIMM_RESNET_RENAMING)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: SimSiamConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `main_simsiam.py`, with or without DDP's "module.".
        config: unused here; other variants' conversions need it.
    """
    return rename_weights(state_dict, _RENAMING)


def official_config(state_dict: dict[str, torch.Tensor]) -> SimSiamConfig:
    """The config of an official checkpoint, read from its names and shapes."""
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    linear = sorted(int(name.split(".")[2]) for name in weights if _is_linear_weight(name, weights[name]))
    return SimSiamConfig(
        backbone_config=official_resnet_config({name.removeprefix("encoder."): weights[name] for name in weights}),
        projection_dim=weights[f"encoder.fc.{linear[-1]}.weight"].shape[0],
        projection_hidden_dim=weights["encoder.fc.0.weight"].shape[0],
        projection_layers=len(linear),
        predictor_hidden_dim=weights["predictor.0.weight"].shape[0],
    )


def _is_linear_weight(name: str, tensor: torch.Tensor) -> bool:
    return bool(re.fullmatch(r"encoder\.fc\.\d+\.weight", name)) and tensor.ndim == 2


def tiny_config() -> SimSiamConfig:
    return SimSiamConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32
        ),
        projection_dim=32,
        predictor_hidden_dim=8,
        # Identity blocks have no gradient inside.
        zero_init_residual=False,
    )


register_variant(
    config=SimSiamConfig,
    pretraining=SimSiamForPreTraining,
    model=SimSiamModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_views,
)
