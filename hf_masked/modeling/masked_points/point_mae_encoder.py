"""Point-MAE's encoder, a Transformer on patches of a point cloud, and a classifier on it: what is exported.

Yatian Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022, arXiv 2203.06604.
Reference implementation: https://github.com/Pang-Yatian/Point-MAE (`models/Point_MAE.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.parts.blocks import DropPath, FeedForward, SelfAttention, drop_path_rates, eager_attention
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import take
from hf_masked.modeling.parts.points import AXES, group_points

# Of the CUDA kernel of the reference, which does not choose points with |p|^2 <= 1e-3.
REFERENCE_RADIUS = 1e-3**0.5


class PointMAEEncoderConfig(PreTrainedConfig):
    """Config of Point-MAE's encoder; by default the paper's, of 22 million parameters.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, layer_norm_eps: as of a ViT.
        qkv_bias: of queries, keys and values.
        drop_path_rate: of stochastic depth in the last layer; it rises evenly from 0 in the first.
        num_groups: patches of a cloud.
        group_size: points of a patch.
        embedding_size: width of the first layer of the network that embeds patches; the next ones have twice and four
            times as much.
        position_hidden_size: width inside the network that embeds centres.
        fps_exclude_radius: points this near to the origin are no centres, as in the kernel of the reference; 0 = all
            may be.
        classifier_hidden_size, classifier_dropout: of `PointMAEForPointCloudClassification`'s head.
    """

    model_type = "hf_masked_point_mae_encoder"

    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    intermediate_size: int = 1536
    qkv_bias: bool = False
    layer_norm_eps: float = 1e-5
    drop_path_rate: float = 0.1
    num_groups: int = 64
    group_size: int = 32
    embedding_size: int = 128
    position_hidden_size: int = 128
    fps_exclude_radius: float = REFERENCE_RADIUS
    classifier_hidden_size: int = 256
    classifier_dropout: float = 0.5

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_attention_heads={self.num_attention_heads}."
            )
        for name in ("num_groups", "group_size", "num_hidden_layers", "embedding_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("drop_path_rate", "classifier_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1).")
        if self.fps_exclude_radius < 0:
            raise ValueError(f"fps_exclude_radius is {self.fps_exclude_radius}; it must be 0 (off) or positive.")


@dataclass
class PointCloudClassifierOutput(ModelOutput):
    """Output of `PointMAEForPointCloudClassification`.

    Args:
        loss: float32 scalar, cross-entropy, with labels.
        logits: (batch, num_labels).
        hidden_states, attentions: of the encoder, when asked for.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class PointPatchEmbedding(nn.Module):
    """A small PointNet: one token for the points of a patch, whatever their order.

    Args:
        width: of the first layer.
        output_size: of the tokens.
    """

    def __init__(self, width: int, output_size: int):
        super().__init__()
        self.point = nn.Sequential(
            nn.Linear(AXES, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 2 * width)
        )
        self.patch = nn.Sequential(
            nn.Linear(4 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, output_size)
        )

    def forward(self, neighborhood: torch.Tensor) -> torch.Tensor:
        """(batch, groups, points, 3), relative to the centres -> (batch, groups, output_size)."""
        batch, groups, size, _ = neighborhood.shape
        points = neighborhood.to(self.point[0].weight.dtype)
        features = self.point(points.flatten(0, 2)).view(batch * groups, size, -1)
        # In every layer but the first a point also sees what is largest in its patch.
        largest = features.amax(dim=1, keepdim=True).expand_as(features)
        features = self.patch(torch.cat([largest, features], dim=-1).flatten(0, 1))
        return features.view(batch, groups, size, -1).amax(dim=2)


class CenterEmbedding(nn.Sequential):
    """Positions from centres: Linear, GELU, Linear."""

    def __init__(self, width: int, output_size: int):
        super().__init__(nn.Linear(AXES, width), nn.GELU(), nn.Linear(width, output_size))

    def forward(self, center: torch.Tensor) -> torch.Tensor:
        """(batch, groups, 3) -> (batch, groups, output_size)."""
        return super().forward(center.to(self[0].weight.dtype))


class PointAttention(SelfAttention):
    """Self-attention that hands out its weights, where the kernel tells them."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, tokens, hidden) -> the same shape, and (batch, heads, tokens, tokens) or None."""
        qkv = self.qkv(hidden_states).unflatten(2, (3, self.num_attention_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, heads, tokens, head width) each
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.projection(context.flatten(2)), weights


class PointMAELayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, each with a residual; the positions are added anew before each layer.

    Args:
        config: the model's, whose `_attn_implementation` chooses the kernel.
        encoder: the encoder's, for what the decoder shares with it.
        num_attention_heads, drop_path_rate: of this layer.
    """

    def __init__(
        self, config: PreTrainedConfig, encoder: PointMAEEncoderConfig, num_attention_heads: int, drop_path_rate: float
    ):
        super().__init__()
        size, eps = encoder.hidden_size, encoder.layer_norm_eps
        self.attention_norm = nn.LayerNorm(size, eps=eps)
        self.attention = PointAttention(config, size, num_attention_heads, bias=encoder.qkv_bias)
        self.feed_forward_norm = nn.LayerNorm(size, eps=eps)
        self.feed_forward = FeedForward(size, encoder.intermediate_size)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, hidden) twice -> the same shape."""
        hidden_states = hidden_states + positions
        hidden_states = hidden_states + self.drop_path(self.attention(self.attention_norm(hidden_states))[0])
        return hidden_states + self.drop_path(self.feed_forward(self.feed_forward_norm(hidden_states)))


def point_layers(
    config: PreTrainedConfig, encoder: PointMAEEncoderConfig, count: int, num_attention_heads: int
) -> nn.ModuleList:
    """So many layers as wide as the encoder, with stochastic depth that rises from 0."""
    rates = drop_path_rates(encoder.drop_path_rate, count)
    return nn.ModuleList(PointMAELayer(config, encoder, num_attention_heads, rate) for rate in rates)


def check_points(points: torch.Tensor, config: PointMAEEncoderConfig) -> None:
    """Raises a ValueError for anything but (batch, points, 3) with enough points for the groups."""
    if points.ndim != 3 or points.shape[2] != AXES:
        raise ValueError(
            f"points are {tuple(points.shape)}; expected (batch, points, {AXES}): leave colours and normals out."
        )
    needed = max(config.num_groups, config.group_size)
    if points.shape[1] < needed:
        raise ValueError(
            f"There are {points.shape[1]} points per cloud; {config.num_groups} groups of {config.group_size} need at "
            f"least {needed}: sample more, or lower num_groups or group_size."
        )


class PointMAEEncoderPreTrainedModel(PreTrainedModel):
    """Initialisation of the encoder, alone or under a classifier."""

    config: PointMAEEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "points"
    input_modalities = ("points",)
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["PointMAELayer"]
    _can_record_outputs: ClassVar[dict] = {"hidden_states": PointMAELayer, "attentions": PointAttention}

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # see `VariantModel`

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            init_as_torch(module)


class PointMAEEncoder(PointMAEEncoderPreTrainedModel):
    """Point-MAE's encoder on all patches of a cloud, or on those that are visible."""

    def __init__(self, config: PointMAEEncoderConfig):
        super().__init__(config)
        self.patch_embedding = PointPatchEmbedding(config.embedding_size, config.hidden_size)
        self.center_embedding = CenterEmbedding(config.position_hidden_size, config.hidden_size)
        self.layers = point_layers(config, config, config.num_hidden_layers, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def group(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres (batch, groups, 3) and patches (batch, groups, group_size, 3) of a cloud, see `group_points`.

        Raises:
            ValueError: for another shape, or too few points.
        """
        config = self.config
        check_points(points, config)
        return group_points(points, config.num_groups, config.group_size, config.fps_exclude_radius)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        points: torch.Tensor | None = None,
        center: torch.Tensor | None = None,
        neighborhood: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes clouds.

        Args:
            points: float (batch, points, 3).
            center, neighborhood: of `group`, in place of `points`.
            visible: int64 (batch, visible), the groups to see, or None for all. In training all are embedded, because
                batch norm takes its statistics over all of them (as in the reference).
            prefix: a token before the patches and its position, (1, 1, hidden) each.

        Returns:
            last_hidden_state: (batch, prefix + visible, hidden), normalised.

        Raises:
            ValueError: for another shape, or too few points.
        """
        if center is None or neighborhood is None:
            center, neighborhood = self.group(points)
        if visible is not None:
            center = take(center, visible)
        hidden_states = self._embed(neighborhood, visible)  # (batch, visible, hidden)
        positions = self.center_embedding(center)
        if prefix is not None:
            token, position = (part.to(hidden_states.dtype).expand(len(hidden_states), -1, -1) for part in prefix)
            hidden_states, positions = torch.cat([token, hidden_states], 1), torch.cat([position, positions], 1)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions)
        return BaseModelOutput(last_hidden_state=self.norm(hidden_states))

    def _embed(self, neighborhood: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        if visible is None:
            return self.patch_embedding(neighborhood)
        if self.training:
            return take(self.patch_embedding(neighborhood), visible)
        return self.patch_embedding(take(neighborhood.flatten(2), visible).unflatten(2, neighborhood.shape[2:]))


class PointMAEForPointCloudClassification(PointMAEEncoderPreTrainedModel):
    """An exported encoder with a class token, and a head on it and on the largest of the patches' features."""

    def __init__(self, config: PointMAEEncoderConfig):
        super().__init__(config)
        self.encoder = PointMAEEncoder(config)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.class_position = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        width, dropout = config.classifier_hidden_size, config.classifier_dropout
        self.classifier = nn.Sequential(
            *(nn.Linear(2 * config.hidden_size, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)),
            nn.Linear(width, config.num_labels),
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.trunc_normal_(self.class_token, std=0.02)
            init.trunc_normal_(self.class_position, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"class_token"}

    @can_return_tuple
    def forward(
        self, points: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> PointCloudClassifierOutput:
        """Classifies clouds.

        Args:
            points: float (batch, points, 3).
            labels: int64 (batch,), for the cross-entropy.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `PointCloudClassifierOutput`.
        """
        outputs = self.encoder(points, prefix=(self.class_token, self.class_position), **kwargs)
        tokens = outputs.last_hidden_state  # (batch, 1 + groups, hidden)
        logits = self.classifier(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1)], dim=-1))
        return PointCloudClassifierOutput(
            loss=None if labels is None else F.cross_entropy(logits.float(), labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


AutoConfig.register(PointMAEEncoderConfig.model_type, PointMAEEncoderConfig)
AutoModel.register(PointMAEEncoderConfig, PointMAEEncoder)
