"""What methods that compare projections of views share: the settings of the projector, encoding and projecting."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import ResNetConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.parts.backbones import last_scales_of_residual_blocks
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.pooling import POOLED_BACKBONES, check_text_pooling, encode_pooled
from hf_masked.modeling.parts.text import example_texts
from hf_masked.modeling.parts.views import Inputs, inputs_of


class ProjectedViewsConfig(VariantConfig):
    """Base of the configs of methods that compare projections of views.

    Args:
        backbone_config: a config of a convolutional net or Transformer whose output can be pooled to one vector;
            ResNet-50 by default.
        projection_dim: width of the projector's output.
        projection_hidden_dim: of the projector; by default the encoder's width.
        projection_layers: linear layers of the projector.
        zero_init_residual: start each residual block of a ResNet as the identity.
        text_pooling: of encoders of texts, where a method takes them: "mean" of the tokens, or "cls", the first.
    """

    backbones: ClassVar[tuple[str, ...]] = POOLED_BACKBONES
    processor: ClassVar[str] = "MultiViewImageProcessor"
    num_views: ClassVar[int] = 2

    projection_dim: int = 128
    projection_hidden_dim: int | None = None
    projection_layers: int = 2
    zero_init_residual: bool = False
    text_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = ResNetConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        self._check_positive("projection_dim", "projection_hidden_dim", "projection_layers")
        check_text_pooling(self.text_pooling)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")

    @property
    def projector_sizes(self) -> list[int]:
        hidden = self.projection_hidden_dim or self.hidden_size
        return [self.hidden_size, *[hidden] * (self.projection_layers - 1), self.projection_dim]

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"num_views": self.num_views}


@dataclass
class ProjectionOutput(BaseModelOutputWithPooling):
    """Output of the models that return features.

    Args:
        last_hidden_state: the encoder's map or tokens.
        pooler_output: (batch, width) features: the encoder's pooled output, what downstream tasks use.
        projection: (batch, projection_dim), what the method compares.
        hidden_states, attentions: of the encoder, when asked for.
    """

    projection: torch.Tensor | None = None


class ProjectedViewsModel(VariantModel):
    """Base of the models: an encoder and, made by the subclass as `self.projector`, an `MLPHead` on its pooled output.

    Its own `forward` is that of the models that return features, on single pictures.
    """

    config: ProjectedViewsConfig
    sync_batch_norm: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "DDP equals one process only with SyncBatchNorm, which torch has not for CPU",
        "accumulation": "batch norm takes its statistics over each batch, and two halves are not the whole",
        "single_samples": "batch norm over the samples needs at least two in training",
        "draws": "the processor draws the views, the model nothing",
        "attentions": "transformers' ResNet has none",
        "gradient_checkpointing": "transformers' ResNet has none",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            init_as_torch(module)
        elif self.config.zero_init_residual:
            for scale in last_scales_of_residual_blocks(self.backbone):
                init.zeros_(scale)

    def frozen_parameters(self):
        if self.projector.redundant_bias is not None:
            yield self.projector.redundant_bias
        # A mask token of BEiT's or DINOv2's: no token is masked here.
        mask_token = getattr(getattr(self.backbone, "embeddings", None), "mask_token", None)
        if mask_token is not None:
            yield mask_token

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> ProjectionOutput:
        """Encodes pictures, or texts.

        Args:
            pixel_values: float (batch, channels, height, width), normalised.
            input_ids: int64 (batch, tokens), where the encoder takes texts.
            attention_mask: int64 (batch, tokens), 0 for padding.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `ProjectionOutput`.

        Raises:
            ValueError: for other channels or another rank, or tokens outside of the vocabulary.
        """
        inputs = self.inputs_of(pixel_values, input_ids, attention_mask)
        outputs, features = encode_pooled(self.backbone, inputs, self.config.text_pooling, **kwargs)
        return ProjectionOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            projection=self.projector(features),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )

    def inputs_of(self, pixel_values, input_ids, attention_mask) -> Inputs:
        """See `hf_masked.modeling.parts.views.inputs_of`."""
        return inputs_of(self.config.modality == "text", pixel_values, input_ids, attention_mask)

    def pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see, the views: name of the panel -> (batch, channels, height, width)."""
        return {f"view {number}": view for number, view in enumerate(pixel_values.unbind(dim=1), start=1)}


def project(networks: nn.Module, view: Inputs, text_pooling: str = "mean", **kwargs):
    """Encodes and projects one view, which so has batch statistics of its own.

    Args:
        networks: holds `backbone` and `projector`: a model or its momentum twin.
        view: float (batch, channels, height, width), or texts, see `parts/views.py`.
        text_pooling: of the config.
        kwargs: of the encoder.

    Returns:
        The encoder's output, and the projection, (batch, projection_dim).
    """
    outputs, features = encode_pooled(networks.backbone, view, text_pooling, **kwargs)
    return outputs, networks.projector(features)


def example_views(config: VariantConfig, batch: int) -> dict[str, torch.Tensor]:
    """Example inputs of `forward`, from torch's generator."""
    if config.modality == "text":
        return example_texts(config.backbone_config, batch, config.num_views)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(batch, config.num_views, config.num_channels, height, width)}
