"""Triplet network: anchor, positive and negative through one encoder; the distance to the negative shall be larger.

Elad Hoffer and Nir Ailon, "Deep metric learning using Triplet network", SIMBAD 2015, arXiv 1412.6622.
Reference implementation: https://github.com/eladhoffer/TripletNet (`TripletNet.lua`, `DistanceRatioCriterion.lua`,
`Models/Model.lua`, `Data.lua`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import WHOLE_PICTURE, ByBackbone, VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import tiny_vit
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import check_pixel_values
from hf_masked.modeling.parts.pooling import POOLED_BACKBONES, check_text_pooling, encode_pooled
from hf_masked.modeling.parts.text import TEXT_BACKBONES
from hf_masked.modeling.parts.views import Inputs, inputs_of, joined, split_views
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant

DISTANCES = ("euclidean", "squared", "cosine")
LOSSES = ("distance_ratio", "margin", "soft_margin", "contrastive")
MINING = ("none", "hardest", "semi_hard")


class TripletNetConfig(PreTrainedConfig):
    """Config of the paper's convolutional net: four convolutions without padding, 32 x 32 pixels to one vector.

    Args:
        num_channels: of the pictures.
        hidden_sizes: channels of the convolutions; the last is the embedding's width.
        dropout: after the first three.
        image_size: 32; larger pictures give a map, which is averaged.
    """

    model_type = "hf_masked_triplet_net"

    num_channels: int = 3
    hidden_sizes: list[int] | tuple[int, ...] = (64, 128, 256, 128)
    dropout: float = 0.25
    image_size: int = 32


class TripletNetModel(PreTrainedModel):
    """The paper's encoder (`Models/Model.lua`); what it gives is not negative."""

    config: TripletNetConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TripletNetConfig):
        super().__init__(config)
        channels = [config.num_channels, *config.hidden_sizes]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel)
            for before, after, kernel in zip(channels[:-1], channels[1:], (5, 3, 3, 2), strict=True)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """(batch, channels, height, width), at least 32 x 32, to `last_hidden_state` (batch, width, rows, columns) and
        its mean, `pooler_output` (batch, width, 1, 1).

        Raises:
            ValueError: for other channels, another rank, or smaller pictures.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        if min(pixel_values.shape[-2:]) < 32:
            raise ValueError(
                f"The pictures have {pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels; the net needs 32 x 32 "
                "at least: set the processor's size to 32."
            )
        hidden = pixel_values
        for convolution in self.convolutions[:-1]:
            hidden = F.max_pool2d(convolution(hidden).relu(), 2)
            hidden = F.dropout(hidden, self.config.dropout, self.training)
        hidden = self.convolutions[-1](hidden).relu()
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=hidden.mean(dim=(2, 3), keepdim=True)
        )


class TripletConfig(VariantConfig):
    """Config of the triplet network.

    Args:
        backbone_config: the paper's convolutional net by default, or a config of a stock encoder.
        embedding_dim: width of the embedding, a linear layer on the encoder's vector; None takes that vector as it is
            (the paper's choice for its net).
        loss_type: "distance_ratio", the squared softmax of the distances (the paper's); "margin", a hinge; or
            "soft_margin", its smooth form (Hermans et al., arXiv 1703.07737); "contrastive", the paper's baseline:
            pairs, of which those of one class are drawn together and the others pushed beyond the margin (Hadsell et
            al., CVPR 2006).
        distance: "euclidean" (the paper's), "squared" or "cosine" (1 - cosine).
        margin: of "margin" and "contrastive".
        temperature: divides the distances in "distance_ratio".
        normalize: embeddings of length 1. The distance ratio then needs a small temperature: distances end at 2.
        mining: which negative the loss takes, where the classes are given: "none", the one drawn (the paper's);
            "hardest", the nearest picture of another class in the batch (arXiv 1703.07737); "semi_hard", the nearest
            of those that are farther away than the positive (Schroff et al., arXiv 1503.03832), else the farthest.
        eps: under the root of the Euclidean distance, whose gradient at 0 is infinite.
        text_pooling: of encoders of texts: "mean" of the tokens, or "cls", the first one's.
    """

    model_type = "hf_masked_triplet"
    paper_title: ClassVar[str] = "Deep metric learning using Triplet network"
    paper_year: ClassVar[int] = 2014
    arxiv_id: ClassVar[str] = "1412.6622"
    reference_repository: ClassVar[str] = "https://github.com/eladhoffer/TripletNet"
    masks: ClassVar[str] = "nothing: two pictures of a class and one of another"
    predicts: ClassVar[str] = "which of two pictures is of the anchor's class"
    modality: ClassVar[str] = ByBackbone("image", "text")
    backbones: ClassVar[tuple[str, ...]] = (TripletNetConfig.model_type, *POOLED_BACKBONES, *TEXT_BACKBONES)
    processor: ClassVar[str] = ByBackbone("MultiViewImageProcessor", "TextProcessor")
    sample: ClassVar[str] = "triplet"
    num_views: ClassVar[int] = 3

    embedding_dim: int | None = None
    loss_type: str = "distance_ratio"
    distance: str = "euclidean"
    margin: float = 0.5
    temperature: float = 1.0
    normalize: bool = False
    mining: str = "none"
    eps: float = 1e-12
    text_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = TripletNetConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        for name, known in (("loss_type", LOSSES), ("distance", DISTANCES), ("mining", MINING)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0.")
        if self.embedding_dim is not None and self.embedding_dim < 1:
            raise ValueError(f"embedding_dim is {self.embedding_dim}; it must be at least 1, or None.")
        check_text_pooling(self.text_pooling)

    def processor_settings(self) -> dict:
        settings = super().processor_settings() | {"num_views": self.num_views}
        # No augmentation (`Data.lua` has it switched off): the whole picture, as it is.
        return settings if self.modality == "text" else settings | {"photometric": None} | WHOLE_PICTURE


@dataclass
class TripletModelOutput(BaseModelOutputWithPooling):
    """Output of `TripletModel`.

    Args:
        last_hidden_state: the encoder's map or tokens.
        pooler_output: (batch, width), the encoder's vector.
        embedding: (batch, embedding_dim), what distances are taken of.
        hidden_states, attentions: of the encoder, when asked for.
    """

    embedding: torch.Tensor | None = None


@dataclass
class TripletOutput(PreTrainingOutput):
    """Output of `TripletForPreTraining`; the fields of the encoder are of all anchors, then all positives,
    then all negatives.

    Args:
        embeddings: (batch, 3, embedding_dim) of anchor, positive and negative.
        positive_distance, negative_distance: (batch,) from the anchor; with mining to the mined negative.
        triplet_accuracy: scalar, the share of triplets whose drawn negative is farther away than the positive.
    """

    embeddings: torch.Tensor | None = None
    positive_distance: torch.Tensor | None = None
    negative_distance: torch.Tensor | None = None
    triplet_accuracy: torch.Tensor | None = None


class TripletPreTrainedModel(VariantModel):
    """Encoder and embedding."""

    config: TripletConfig
    logged_outputs: ClassVar[tuple[str, ...]] = ("triplet_accuracy",)
    uses_classes: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {"draws": "the data set draws the triplets, the model nothing"}

    def __init__(self, config: TripletConfig):
        super().__init__(config)
        self.embedding = nn.Linear(config.hidden_size, config.embedding_dim) if config.embedding_dim else nn.Identity()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_as_torch(module)

    def frozen_parameters(self):
        # A mask token of BEiT's or DINOv2's: no token is masked here.
        mask_token = getattr(getattr(self.backbone, "embeddings", None), "mask_token", None)
        if mask_token is not None:
            yield mask_token

    def _embed(self, inputs: Inputs, **kwargs):
        outputs, features = encode_pooled(self.backbone, inputs, self.config.text_pooling, **kwargs)
        embedding = self.embedding(features)
        return outputs, features, F.normalize(embedding, dim=1) if self.config.normalize else embedding


class TripletModel(TripletPreTrainedModel):
    """The embedding of single pictures or texts: all that retrieval needs."""

    def __init__(self, config: TripletConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> TripletModelOutput:
        """Embeds pictures, or texts.

        Args:
            pixel_values: float (batch, channels, height, width), normalised.
            input_ids: int64 (batch, tokens), where the encoder takes texts.
            attention_mask: int64 (batch, tokens), 0 for padding.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `TripletModelOutput`.

        Raises:
            ValueError: for other channels or another rank, or tokens outside of the vocabulary.
        """
        inputs = inputs_of(self.config.modality == "text", pixel_values, input_ids, attention_mask)
        outputs, features, embedding = self._embed(inputs, **kwargs)
        return TripletModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            embedding=embedding,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class TripletForPreTraining(TripletPreTrainedModel):
    """The embedding and the loss on triplets."""

    def __init__(self, config: TripletConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        classes: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> TripletOutput:
        """One step on triplets.

        Args:
            pixel_values: float (batch, 3, channels, height, width), normalised: anchor, positive, negative.
            input_ids: int64 (batch, 3, tokens), where the encoder takes texts.
            attention_mask: int64 (batch, 3, tokens), 0 for padding.
            classes: int64 (batch, 3) of the pictures; mining needs them.
            return_loss: whether to compute the loss.
            kwargs: of the encoder.

        Returns:
            `TripletOutput`; the distance ratio's loss lies in (0, 1) and is 0.25 where the distances are equal.

        Raises:
            ValueError: for other channels, sets or another rank, or tokens outside of the vocabulary; with mining for
                missing classes.
        """
        inputs = inputs_of(self.config.modality == "text", pixel_values, input_ids, attention_mask)
        inputs = joined(split_views(inputs, self.config.num_views))
        outputs, _, embeddings = self._embed(inputs, **kwargs)
        embeddings = torch.stack(embeddings.float().chunk(self.config.num_views), dim=1)  # (batch, 3, embedding_dim)
        anchor, positive, negative = embeddings.unbind(dim=1)
        near, far = self.distance(anchor, positive), self.distance(anchor, negative)  # (batch,)
        accuracy = (far > near).float().mean()
        if self.config.mining != "none":
            far = self.mined_distance(embeddings, near, classes)
        loss = self.loss(near, far) if return_loss else None
        return TripletOutput(
            loss=loss,
            losses=None if loss is None else {self.config.loss_type: loss.detach()},
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            embeddings=embeddings,
            positive_distance=near,
            negative_distance=far,
            triplet_accuracy=accuracy,
        )

    def distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Between the last axes of (..., width) and (..., width), which broadcast."""
        if self.config.distance == "cosine":
            return 1 - F.cosine_similarity(first, second, dim=-1)
        squared = (first - second).square().sum(dim=-1)
        return squared if self.config.distance == "squared" else (squared + self.config.eps).sqrt()

    def mined_distance(self, embeddings: torch.Tensor, near: torch.Tensor, classes: torch.Tensor | None):
        """Distance of each anchor to the negative that `mining` takes among all pictures of the batch, (batch,)."""
        if classes is None:
            raise ValueError(
                f"mining={self.config.mining!r} needs `classes`, those of the pictures, of shape "
                f"{tuple(embeddings.shape[:2])}; mining='none' does without."
            )
        distances = self.distance(embeddings[:, None, 0], embeddings.flatten(0, 1)[None])  # (batch, 3 * batch)
        other = classes[:, :1] != classes.flatten()[None]
        nearest = distances.masked_fill(~other, torch.inf).amin(dim=1)
        if self.config.mining == "hardest":
            return nearest
        beyond = distances.masked_fill(~other | (distances <= near[:, None]), torch.inf).amin(dim=1)
        farthest = distances.masked_fill(~other, -torch.inf).amax(dim=1)
        return torch.where(beyond.isinf(), farthest, beyond)

    def loss(self, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        """The mean over triplets of what `loss_type` makes of the distances to the positive and to the negative."""
        config = self.config
        if config.loss_type == "distance_ratio":
            # The mean squared error of softmax([far, near]) against [1, 0], whose two errors are equal.
            return torch.sigmoid((near - far) / config.temperature).square().mean()
        if config.loss_type == "margin":
            return (near - far + config.margin).clamp(min=0).mean()
        if config.loss_type == "soft_margin":
            return F.softplus(near - far).mean()
        return (near.square() + (config.margin - far).clamp(min=0).square()).mean() / 2

    def pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see, the triplets: name of the panel -> (batch, channels, height, width)."""
        return dict(zip(("anchor", "positive", "negative"), pixel_values.unbind(dim=1), strict=True))


def tiny_config() -> TripletConfig:
    return TripletConfig(backbone_config=tiny_vit(), embedding_dim=16)


AutoConfig.register(TripletNetConfig.model_type, TripletNetConfig)
AutoModel.register(TripletNetConfig, TripletNetModel)

register_variant(
    config=TripletConfig,
    pretraining=TripletForPreTraining,
    model=TripletModel,
    tiny_config=tiny_config,
    example_inputs=example_views,
)
