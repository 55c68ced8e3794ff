"""Point-MAE: cut a cloud into overlapping patches, encode four in ten of them, and predict the points of the others.

Yatian Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", ECCV 2022, arXiv 2203.06604.
Reference implementation: https://github.com/Pang-Yatian/Point-MAE (`models/Point_MAE.py`).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.masked_points.point_mae_encoder import CenterEmbedding, PointMAEEncoderConfig, point_layers
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import check_mask, take, visible_indices
from hf_masked.modeling.parts.points import AXES, chamfer_distance
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks.groups import block_group_mask, num_masked_groups, random_group_mask
from hf_masked.randomness import model_draw

MASK_KINDS = ("random", "block")
LOSSES = ("cdl2", "cdl1")


class PointMAEConfig(VariantConfig):
    """Config of Point-MAE.

    Args:
        backbone_config: a `PointMAEEncoderConfig`; the paper's by default.
        num_points: of a cloud in training, for the processor.
        mask_ratio: share of the patches that the encoder does not see; at least one patch is masked and one is not.
        mask_kind: "random", or "block": a random patch and those nearest to it.
        decoder_num_hidden_layers, decoder_num_attention_heads: of the decoder, which is as wide as the encoder.
        loss_type: Chamfer distance of squared distances ("cdl2", the paper's) or of distances ("cdl1").
    """

    model_type = "hf_masked_point_mae"
    paper_title: ClassVar[str] = "Masked Autoencoders for Point Cloud Self-supervised Learning"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2203.06604"
    reference_repository: ClassVar[str] = "https://github.com/Pang-Yatian/Point-MAE"
    weights_licence: ClassVar[str] = "MIT"
    modality: ClassVar[str] = "points"
    masks: ClassVar[str] = "random patches of a point cloud, dropped before the encoder"
    predicts: ClassVar[str] = "the points of the masked patches"
    backbones: ClassVar[tuple[str, ...]] = (PointMAEEncoderConfig.model_type,)
    processor: ClassVar[str] = "PointCloudProcessor"

    num_points: int = 1024
    mask_ratio: float = 0.6
    mask_kind: str = "random"
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 6
    loss_type: str = "cdl2"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = PointMAEEncoderConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        encoder = self.backbone_config
        if not 1 <= num_masked_groups(encoder.num_groups, self.mask_ratio) < encoder.num_groups:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}; of {encoder.num_groups} patches at least one must be masked and "
                "one visible, for example 0.6."
            )
        for name, known in (("mask_kind", MASK_KINDS), ("loss_type", LOSSES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if encoder.hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"hidden_size={encoder.hidden_size} is no multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}."
            )
        if self.num_points < max(encoder.num_groups, encoder.group_size):
            raise ValueError(
                f"num_points is {self.num_points}; {encoder.num_groups} patches of {encoder.group_size} points need "
                f"at least {max(encoder.num_groups, encoder.group_size)}."
            )

    def processor_settings(self) -> dict:
        # A block needs the centres, which the model finds.
        return {
            "num_points": self.num_points,
            "num_groups": self.backbone_config.num_groups,
            "mask_kind": "random" if self.mask_kind == "random" else "model",
            "mask_ratio": self.mask_ratio,
        }


@dataclass
class MaskedPointsOutput(PreTrainingOutput):
    """Output of a method that predicts masked patches of point clouds.

    Args:
        last_hidden_state: (batch, visible, hidden), the encoder's tokens, normalised.
        logits: (batch, masked, group_size, 3), predicted points relative to their centres, in the order of the groups.
        mask: bool (batch, groups), True = masked.
        center: float32 (batch, groups, 3).
        neighborhood: float32 (batch, groups, group_size, 3), the patches' points relative to their centres.
    """

    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    center: torch.Tensor | None = None
    neighborhood: torch.Tensor | None = None


class PointMAEDecoder(nn.Module):
    """Layers like the encoder's on its tokens and one mask token at each masked centre, whose outputs they return."""

    def __init__(self, config: PointMAEConfig):
        super().__init__()
        encoder = config.backbone_config
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.hidden_size))
        self.center_embedding = CenterEmbedding(encoder.position_hidden_size, encoder.hidden_size)
        self.layers = point_layers(
            config, encoder, config.decoder_num_hidden_layers, config.decoder_num_attention_heads
        )
        self.norm = nn.LayerNorm(encoder.hidden_size, eps=encoder.layer_norm_eps)

    def forward(
        self, encoded: torch.Tensor, visible_center: torch.Tensor, masked_center: torch.Tensor
    ) -> torch.Tensor:
        """Decodes the masked patches.

        Args:
            encoded: (batch, visible, hidden).
            visible_center, masked_center: (batch, visible, 3) and (batch, masked, 3).

        Returns:
            (batch, masked, hidden), normalised.
        """
        masked = masked_center.shape[1]
        positions = self.center_embedding(torch.cat([visible_center, masked_center], dim=1))
        mask_tokens = self.mask_token.to(encoded.dtype).expand(len(encoded), masked, -1)
        hidden_states = torch.cat([encoded, mask_tokens], dim=1)  # (batch, visible + masked, hidden)
        for layer in self.layers:
            hidden_states = layer(hidden_states, positions)
        return self.norm(hidden_states[:, -masked:])

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier-uniform layers (the reference's `TransformerDecoder`), of what has not been loaded."""
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    init.zeros_(module.bias)
        init.trunc_normal_(self.mask_token, std=0.02)


class PointMAEPreTrainedModel(VariantModel):
    """Grouping, masks and initialisation that methods on Point-MAE's encoder share."""

    config: PointMAEConfig
    main_input_name = "points"
    input_modalities = ("points",)
    sync_batch_norm = True
    _no_split_modules: ClassVar[list[str]] = ["PointMAELayer"]
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "DDP equals one process only with SyncBatchNorm, which torch has not for CPU",
        "accumulation": "batch norm takes its statistics over each batch, and two halves are not the whole",
        "export": "the encoder is the paper's own, so what is exported needs hf_masked",
    }

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init_as_torch(module)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, PointMAEDecoder):
            module.init_weights()

    def group(
        self, points: torch.Tensor | None, center: torch.Tensor | None, neighborhood: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Centres and patches: those that are given, or those of the points."""
        if (center is None) != (neighborhood is None):
            raise ValueError("Patches come as both `center` and `neighborhood`: give both, or `points` alone.")
        if center is None:
            return self.backbone.group(points)
        return center.float(), neighborhood.float()

    def draw_mask(
        self, center: torch.Tensor, noise: torch.Tensor | None = None, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """bool (batch, groups): the mask that the config describes."""
        draw = model_draw(len(center), center.device, self.training, generator, noise)
        if self.config.mask_kind == "block":
            return block_group_mask(draw, center, self.config.mask_ratio)
        return random_group_mask(draw, center.shape[1], self.config.mask_ratio)

    def split(self, bool_masked_pos: torch.Tensor, center: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 (batch, visible) and (batch, masked), ascending; compiled, their counts are the config's.

        Raises:
            ValueError: for another shape or type of mask, or rows that differ in their count.
        """
        batch, groups = center.shape[:2]
        check_mask(bool_masked_pos, batch, (groups,))
        compiling = torch.compiler.is_compiling()
        num_masked = num_masked_groups(groups, self.config.mask_ratio) if compiling else None
        visible = visible_indices(bool_masked_pos, num_masked)
        return visible, visible_indices(~bool_masked_pos, visible.shape[1])


class PointMAEModel(PointMAEPreTrainedModel):
    """The encoder: of all patches, or with a mask of the visible ones."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|head)\..*"]

    def __init__(self, config: PointMAEConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        center: torch.Tensor | None = None,
        neighborhood: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes clouds.

        Args:
            points: float (batch, points, 3), centred, in the unit sphere.
            bool_masked_pos: bool (batch, groups), True = masked, the same count in each row.
            center, neighborhood: of `group_points`, in place of `points`.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            last_hidden_state: (batch, visible, hidden), normalised.

        Raises:
            ValueError: for other shapes.
        """
        center, neighborhood = self.group(points, center, neighborhood)
        visible = None if bool_masked_pos is None else self.split(bool_masked_pos, center)[0]
        return self.backbone(center=center, neighborhood=neighborhood, visible=visible, **kwargs)


class PointMAEForPreTraining(PointMAEPreTrainedModel):
    """Encoder, decoder and the Chamfer distance of the masked patches."""

    def __init__(self, config: PointMAEConfig):
        super().__init__(config)
        self.decoder = PointMAEDecoder(config)
        self.head = nn.Linear(config.hidden_size, AXES * config.backbone_config.group_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        points: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        center: torch.Tensor | None = None,
        neighborhood: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MaskedPointsOutput:
        """One step of masked autoencoding.

        Args:
            points: float (batch, points, 3), centred, in the unit sphere but for augmentation.
            bool_masked_pos: bool (batch, groups), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, groups), distinct numbers from which to draw the mask: the groups with the smallest
                stay visible; of a block, the smallest is the middle.
            generator: to draw the mask from.
            center, neighborhood: of `group_points`, in place of `points`.
            return_loss: whether to compute the loss.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `MaskedPointsOutput`.

        Raises:
            ValueError: for other shapes.
        """
        center, neighborhood = self.group(points, center, neighborhood)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(center, noise, generator)
        visible, masked = self.split(bool_masked_pos, center)
        outputs = self.backbone(center=center, neighborhood=neighborhood, visible=visible, **kwargs)
        encoded = outputs.last_hidden_state  # (batch, visible, hidden)
        logits = self.predict_points(self.decoder(encoded, take(center, visible), take(center, masked)))
        loss = self.loss(logits, neighborhood, masked) if return_loss else None
        return MaskedPointsOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            logits=logits,
            mask=bool_masked_pos,
            center=center,
            neighborhood=neighborhood,
        )

    def predict_points(self, decoded: torch.Tensor) -> torch.Tensor:
        """(batch, masked, hidden) -> (batch, masked, group_size, 3)."""
        return self.head(decoded).unflatten(2, (-1, AXES))

    def loss(self, logits: torch.Tensor, neighborhood: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Mean Chamfer distance of the masked patches (paper, equation 3).

        Args:
            logits: (batch, masked, group_size, 3).
            neighborhood: float32 (batch, groups, group_size, 3).
            masked: int64 (batch, masked).
        """
        target = take(neighborhood.flatten(2), masked).unflatten(2, neighborhood.shape[2:])
        return chamfer_distance(logits.float(), target, squared=self.config.loss_type == "cdl2").mean()

    @torch.no_grad()
    def clouds(
        self, points: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        """What there is to see: name of the panel -> layers of points, (batch, points, 3) each, to be drawn on each
        other: what is given first, what is predicted on top."""
        output = self(points, bool_masked_pos, return_loss=False)
        visible, masked = self.split(output.mask, output.center)
        patches = output.neighborhood + output.center.unsqueeze(2)
        seen = take(patches.flatten(2), visible).unflatten(2, patches.shape[2:]).flatten(1, 2)
        predicted = (output.logits.float() + take(output.center, masked).unsqueeze(2)).flatten(1, 2)
        return {"cloud": (points.float(),), "visible": (seen,), "prediction": (seen, predicted)}


# The reference's name -> ours: what encoder and decoder share, and the rest.
_LAYER_RENAMING = (
    (r"\.norm1\.", ".attention_norm."),
    (r"\.norm2\.", ".feed_forward_norm."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.projection."),
    (r"\.mlp\.fc1\.", ".feed_forward.0."),
    (r"\.mlp\.fc2\.", ".feed_forward.2."),
)
_ENCODER_RENAMING = (
    (r"^encoder\.first_conv\.", "{encoder}.patch_embedding.point."),
    (r"^encoder\.second_conv\.", "{encoder}.patch_embedding.patch."),
    (r"^pos_embed\.", "{encoder}.center_embedding."),
    (r"^blocks\.blocks\.", "{encoder}.layers."),
    (r"^norm\.", "{encoder}.norm."),
)
_RENAMING = (
    *_LAYER_RENAMING,
    *((old.replace("^", r"^MAE_encoder\."), new.format(encoder="backbone")) for old, new in _ENCODER_RENAMING),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_pos_embed\.", "decoder.center_embedding."),
    (r"^MAE_decoder\.blocks\.", "decoder.layers."),
    (r"^MAE_decoder\.norm\.", "decoder.norm."),
    (r"^increase_dim\.0\.", "head."),
)
_CLASSIFIER_RENAMING = (
    *_LAYER_RENAMING,
    *((old, new.format(encoder="encoder")) for old, new in _ENCODER_RENAMING),
    (r"^cls_token$", "class_token"),
    (r"^cls_pos$", "class_position"),
    (r"^cls_head_finetune\.", "classifier."),
)

# Weights of shape (out, in, 1).
_CONVOLUTIONS = re.compile(r"(_conv\.[03]|increase_dim\.0)\.weight$")


def _plain(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without DDP's prefix, and convolutions of size 1 as the linear layers that they are."""
    return {
        re.sub(r"^module\.", "", name): value.squeeze(-1) if _CONVOLUTIONS.search(name) else value
        for name, value in state_dict.items()
    }


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: PointMAEConfig) -> dict[str, torch.Tensor]:
    """The reference's names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `Point_MAE`, "base_model" of an official file.
        config: unused here.
    """
    return rename_weights(_plain(state_dict), _RENAMING)


def convert_official_classifier(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of the reference's `PointTransformer` for `PointMAEForPointCloudClassification`."""
    return rename_weights(_plain(state_dict), _CLASSIFIER_RENAMING)


def official_config(state_dict: dict[str, torch.Tensor]) -> PointMAEConfig:
    """The config of an official checkpoint of `Point_MAE`, read from its shapes; heads are 64 wide, as the released
    ones are, and the number of patches, of which the weights know nothing, is the paper's."""
    plain = _plain(state_dict)
    hidden_size = plain["MAE_encoder.norm.weight"].shape[0]
    return PointMAEConfig(
        backbone_config=PointMAEEncoderConfig(
            hidden_size=hidden_size,
            num_hidden_layers=official_depth(plain, "MAE_encoder.blocks.blocks"),
            num_attention_heads=max(hidden_size // 64, 1),
            intermediate_size=plain["MAE_encoder.blocks.blocks.0.mlp.fc1.weight"].shape[0],
            qkv_bias="MAE_encoder.blocks.blocks.0.attn.qkv.bias" in plain,
            group_size=plain["increase_dim.0.weight"].shape[0] // AXES,
        ),
        decoder_num_hidden_layers=official_depth(plain, "MAE_decoder.blocks"),
        decoder_num_attention_heads=max(hidden_size // 64, 1),
    )


def tiny_encoder() -> PointMAEEncoderConfig:
    return PointMAEEncoderConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        drop_path_rate=0.0,
        num_groups=8,
        group_size=6,
        embedding_size=12,
        position_hidden_size=12,
    )


def tiny_config() -> PointMAEConfig:
    return PointMAEConfig(
        backbone_config=tiny_encoder(),
        num_points=48,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )


def example_inputs(config: PointMAEConfig, batch: int) -> dict[str, torch.Tensor]:
    """Clouds from torch's generator."""
    return {"points": torch.randn(batch, config.num_points, AXES) / 2}


register_variant(
    config=PointMAEConfig,
    pretraining=PointMAEForPreTraining,
    model=PointMAEModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
