"""MAE-ST: MAE on clips. Nine tenths of the space-time patches are dropped at random, without regard to space or time;
a plain ViT encodes the rest with joint attention and a small decoder regresses the missing pixels. The only thing that
knows of time is the position table, a spatial one plus a temporal one.

Christoph Feichtenhofer, Haoqi Fan, Yanghao Li, Kaiming He, "Masked Autoencoders As Spatiotemporal Learners",
NeurIPS 2022, arXiv 2205.09113.
Reference implementation: https://github.com/facebookresearch/mae_st (`models_mae.py`, `models_vit.py`).
"""

import math
import re
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForVideoClassification, PreTrainedConfig, VivitConfig
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_patches import MaskedFeatures, MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import set_drop_path, xavier_uniform_as_matrix
from hf_masked.modeling.parts.blocks import TransformerBlock
from hf_masked.modeling.parts.clips import (
    Grid,
    JointPositions,
    SeparablePositions,
    check_clips,
    clip_grid_of,
    encode_visible_clip,
    fit_clip_positions,
    joint_positions,
    patchify_clip,
    unpatchify_clip,
)
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import check_mask, pair
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights, timm_block_renaming
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import PLANE_MASKS, num_masked_of_kind

# The backbone's own table of positions.
TABLE = "backbone.embeddings.position_embeddings"


class MAESTConfig(MaskedPatchesConfig):
    """Config of MAE-ST.

    Args:
        backbone_config: a ViViT config; by default ViT-B with tubelets of 2 x 16 x 16 on 16 frames. `hidden_act`
            should be "gelu"; ViViT's own default is an approximation of it.
        mask_ratio: share of the tubelets that the encoder does not see, in [0, 1).
        mask_kind: "random", "tube" (the same places at all times) or "frame" (whole times).
        mask_options: further arguments of the mask function.
        repeated_samples: clips that each video gives; `pixel_values` of pretraining then are (batch, repeated_samples,
            frames, channels, height, width). The paper takes 4, which saves decoding and changes nothing else.
        separable_position_embeddings: a spatial and a temporal table, added; False learns one table for all tubelets,
            the backbone's own.
        num_target_frames: frames of a clip whose pixels are predicted, evenly spread; by default one for each tubelet,
            the paper's 8 of 16.
        target_frame_rule: which: "linspace", from the first to the last (mae_st), or "stride", every so many
            (SlowFast, which trained the released weights); of 16 frames the last of 8 is 15 or 14.
        norm_pix_loss: predict each tubelet less its mean and over its standard deviation, of all channels together.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder, whatever the encoder.
        classifier_dropout: before the linear layer of `MAESTForVideoClassification`.
        drop_path_rate: of the last layer of `MAESTForVideoClassification`; it rises evenly from 0 at the first.
    """

    model_type = "hf_masked_mae_st"
    paper_title: ClassVar[str] = "Masked Autoencoders As Spatiotemporal Learners"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2205.09113"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/mae_st"
    weights_licence: ClassVar[str] = "CC BY-NC 4.0"
    modality: ClassVar[str] = "video"
    masks: ClassVar[str] = "random space-time patches, dropped before the encoder"
    predicts: ClassVar[str] = "pixels of the masked patches, one frame of each"
    backbones: ClassVar[tuple[str, ...]] = ("vivit",)
    processor: ClassVar[str] = "MaskedVideoProcessor"
    sample: ClassVar[str] = "clip"

    mask_ratio: float = 0.9
    repeated_samples: int = 1
    separable_position_embeddings: bool = True
    num_target_frames: int | None = None
    target_frame_rule: str = "linspace"
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    classifier_dropout: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = VivitConfig(num_frames=16, hidden_act="gelu", layer_norm_eps=1e-6)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        grid = clip_grid_of(self.backbone_config)
        if self.mask_kind in PLANE_MASKS:
            raise ValueError(
                f"mask_kind is {self.mask_kind!r}, a mask of pictures; of clips take 'random', 'tube' or 'frame'."
            )
        if num_masked_of_kind(self.mask_kind, grid, self.mask_ratio) == math.prod(grid):
            raise ValueError(
                f"With mask_ratio={self.mask_ratio} and mask_kind={self.mask_kind!r} nothing is left to see of "
                f"{' x '.join(map(str, grid))} tubelets: lower mask_ratio."
            )
        if self.repeated_samples < 1:
            raise ValueError(f"repeated_samples is {self.repeated_samples}; it must be at least 1.")
        self._check_targets()
        if self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={self.decoder_hidden_size} is no multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}."
            )

    def _check_targets(self) -> None:
        frames, targets, depth = self.backbone_config.num_frames, self.num_target_frames, self.mask_unit[0]
        targets = frames // depth if targets is None else targets
        if not 1 <= targets <= frames or targets * depth % frames:
            raise ValueError(
                f"num_target_frames is {targets}; the {frames // depth} tubelets of {depth} frames each must share "
                f"them evenly: take {frames // depth}, one for each, or {frames}, all of them."
            )
        if self.target_frame_rule not in ("linspace", "stride"):
            raise ValueError(f"target_frame_rule is {self.target_frame_rule!r}; it must be 'linspace' or 'stride'.")
        if self.target_frame_rule == "stride" and frames % targets:
            raise ValueError(
                f"num_target_frames is {targets}, which does not divide the {frames} frames: choose another number, "
                "or target_frame_rule='linspace'."
            )

    @property
    def mask_unit(self) -> Grid:
        return tuple(self.backbone_config.tubelet_size)

    @property
    def target_size(self) -> Grid:
        """(frames, height, width) of what is predicted of a tubelet."""
        depth, height, width = self.mask_unit
        targets = self.num_target_frames
        return 1 if targets is None else depth * targets // self.backbone_config.num_frames, height, width

    def target_frames(self, num_frames: int) -> list[int]:
        """Numbers of the frames of a clip that are predicted."""
        count = num_frames * self.target_size[0] // self.mask_unit[0]
        if self.target_frame_rule == "stride":
            return list(range(0, num_frames, num_frames // count))
        return [number * (num_frames - 1) // max(count - 1, 1) for number in range(count)]

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "MAESTConfig":
        # A pretrained encoder brings its own positions, which need not be separable.
        return cls(backbone_config=backbone_config, **{"separable_position_embeddings": False, **arguments})

    def processor_settings(self) -> dict:
        clip = {"num_frames": self.backbone_config.num_frames, "repeated_samples": self.repeated_samples}
        return super().processor_settings() | clip


class MAESTPreTrainedModel(MaskedPatchesModel):
    """Positions, initialisation and freezing that all classes of MAE-ST share."""

    config: MAESTConfig
    input_modalities = ("video",)
    _no_split_modules: ClassVar[list[str]] = ["VivitLayer", "TransformerBlock"]

    def __init__(self, config: MAESTConfig):
        super().__init__(config)
        if config.separable_position_embeddings:
            self.position_embeddings = SeparablePositions(config.hidden_size, clip_grid_of(config.backbone_config))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SeparablePositions | JointPositions | ClipDecoder):
            module.init_weights()
        elif module is self:
            self._init_backbone()

    def _init_backbone(self) -> None:
        for module in self.backbone.layers.modules():
            if isinstance(module, nn.Linear):
                self._init_weights(module)
        embeddings = self.backbone.embeddings
        projection = embeddings.patch_embeddings.projection
        xavier_uniform_as_matrix(projection.weight)
        # torch's own for a convolution, which the reference leaves alone.
        bound = 1 / math.sqrt(projection.weight[0].numel())
        init.uniform_(projection.bias, -bound, bound)
        init.trunc_normal_(embeddings.cls_token, std=0.02)
        if self.config.separable_position_embeddings:
            init.copy_(embeddings.position_embeddings, self.position_embeddings())
        else:
            init.trunc_normal_(embeddings.position_embeddings, std=0.02)

    def frozen_parameters(self):
        if self.config.separable_position_embeddings:
            yield self.backbone.embeddings.position_embeddings

    @torch.no_grad()
    def sync_backbone(self) -> None:
        """Fills the backbone's table from the spatial and the temporal one, which are trained in its place."""
        if self.config.separable_position_embeddings:
            self.backbone.embeddings.position_embeddings.copy_(self.position_embeddings())

    def save_pretrained(self, *args, state_dict: dict | None = None, **kwargs):
        if state_dict and self.config.separable_position_embeddings:
            state_dict = state_dict | {TABLE: _joint_table(state_dict, "position_embeddings.")}
        return super().save_pretrained(*args, state_dict=state_dict, **kwargs)

    def _check_inputs(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> Grid:
        grid = check_clips(pixel_values, self.config.num_channels, self.config.mask_unit)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, pixel_values.shape[0], grid)
        return grid

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: Grid, **kwargs
    ) -> torch.Tensor:
        """(batch, 1 + visible, hidden), the class token first."""
        visible = None if bool_masked_pos is None else self._visible(bool_masked_pos, grid)
        return self.encode_visible(pixel_values, visible, **kwargs)

    def encode_visible(
        self, pixel_values: torch.Tensor, visible: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """As `encode`, of int64 (batch, visible) positions of the tubelets to see."""
        positions = self.position_embeddings() if self.config.separable_position_embeddings else None
        return encode_visible_clip(self.backbone, pixel_values, visible, positions, **kwargs)


class ClipDecoder(nn.Module):
    """Encoded visible tubelets in their places, one shared mask token elsewhere, a class token of its own, Transformer
    blocks, all on learned positions.

    Args:
        config: of the model.
        grid: of tubelets at which the positions are learned; others interpolate them.
        output_size: values predicted per tubelet.
    """

    def __init__(self, config: MAESTConfig, grid: Grid, output_size: int):
        super().__init__()
        width = config.decoder_hidden_size
        self.grid = grid
        self.embedding = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = SeparablePositions if config.separable_position_embeddings else JointPositions
        self.position_embeddings = positions(width, grid)
        self.layers = nn.ModuleList(
            TransformerBlock(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, output_size)

    @torch.no_grad()
    def init_weights(self) -> None:
        init.normal_(self.mask_token, std=0.02)
        init.zeros_(self.class_token)
        for layer in self.layers:
            # Three square matrices in one: a third has the bound sqrt(6 / 2 width), not sqrt(6 / 4 width).
            init.xavier_uniform_(layer.attention.qkv.weight, gain=math.sqrt(2))

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(batch, visible, hidden) and int64 (batch, visible) -> predictions (batch, tubelets, values)."""
        tokens = self.embedding(tokens)  # (batch, visible, width)
        positions = fit_clip_positions(self.position_embeddings(), self.grid, grid)
        units = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], positions.shape[1] - 1, -1)
        units = units.scatter(1, visible.unsqueeze(-1).expand_as(tokens), tokens)
        class_token = self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        sequence = torch.cat([class_token, units], dim=1) + positions  # (batch, 1 + tubelets, width)
        for layer in self.layers:
            sequence = layer(sequence)
        return self.head(self.norm(sequence[:, 1:]))


class MAESTModel(MaskedFeatures, MAESTPreTrainedModel):
    """The encoder: without a mask it is the plain backbone, with one it sees the visible tubelets only. It takes
    single clips, float (batch, frames, channels, height, width)."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]


class MAESTForPreTraining(MAESTPreTrainedModel):
    """Encoder, decoder and the loss on masked tubelets."""

    def __init__(self, config: MAESTConfig):
        super().__init__(config)
        output_size = math.prod(config.target_size) * config.num_channels
        self.decoder = ClipDecoder(config, clip_grid_of(config.backbone_config), output_size)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MaskedPreTrainingOutput:
        """One step of masked autoencoding.

        Args:
            pixel_values: float (batch, frames, channels, height, width), normalised; the tubelet must divide clips.
                With `config.repeated_samples` above 1 (batch, repeated samples, frames, ...), and so is all below.
            bool_masked_pos: bool (batch, tubelets), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, tubelets), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, tubelets, frames * height * width * channels of
            `config.target_size`) in `patchify_clip` order, of normalised pixels with `norm_pix_loss`; hidden states
            are those of the batch * repeated samples clips.

        Raises:
            ValueError: for other channels, sizes, repeats or mask shapes.
        """
        repeats = self.config.repeated_samples
        grid = check_clips(pixel_values, self.config.num_channels, self.config.mask_unit, repeats)
        clips = pixel_values if repeats == 1 else pixel_values.flatten(0, 1)  # (clips, frames, channels, h, w)
        mask, noise = (x if x is None or repeats == 1 else x.flatten(0, 1) for x in (bool_masked_pos, noise))
        if mask is None:
            mask = self.draw_mask(clips, grid, noise, generator)
        check_mask(mask, clips.shape[0], grid)
        visible = self._visible(mask, grid)  # (clips, visible)
        encoded = self.encode_visible(clips, visible, **kwargs)  # (clips, 1 + visible, hidden)
        # The encoder's class token is not handed on; the decoder has its own.
        logits = self.decoder(encoded[:, 1:], visible, grid)  # (clips, tubelets, values)
        loss = masked_mean(self.loss_per_unit(clips, logits), mask) if return_loss else None
        if repeats > 1:
            logits, mask = (x.unflatten(0, (-1, repeats)) for x in (logits, mask))
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=mask,
        )

    def loss_per_unit(self, clips: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the values of each tubelet, float32 (clips, tubelets) (`forward_loss`)."""
        target = self.targets(clips)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        return (logits.float() - target).square().mean(dim=-1)

    def targets(self, clips: torch.Tensor) -> torch.Tensor:
        """float32 (clips, tubelets, values): the pixels of the target frames."""
        frames = self.config.target_frames(clips.shape[1])
        return patchify_clip(clips[:, frames].float(), self.config.target_size)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see in the target frames: name of the panel -> (batch, frames, channels, height, width),
        normalised as the input.

        With `norm_pix_loss` the predictions are drawn with the mean and deviation of the TRUE tubelets, which the
        model does not know; the panel's name says so.

        Args:
            pixel_values: single clips, (batch, frames, channels, height, width).
            bool_masked_pos: bool (batch, tubelets); drawn here by default.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        mask = self.draw_mask(pixel_values, grid) if bool_masked_pos is None else bool_masked_pos
        visible = self._visible(mask, grid)
        predicted = self.decoder(self.encode_visible(pixel_values, visible)[:, 1:], visible, grid).float()
        true, name = self.targets(pixel_values), "reconstruction"
        if self.config.norm_pix_loss:
            predicted, name = denormalize_patches(predicted, true), "reconstruction (true patch statistics)"
        hidden = mask.unsqueeze(-1)
        panels = {"clip": true, "masked": true.masked_fill(hidden, 0.0), name: torch.where(hidden, predicted, true)}
        return {name: unpatchify_clip(panel, grid, self.config.target_size) for name, panel in panels.items()}


class MAESTForVideoClassification(MAESTPreTrainedModel):
    """The fine-tuning encoder: mean of the tubelets' tokens without the class token, then the encoder's own final
    norm, dropout and a linear layer (`models_vit.py`). It takes single clips."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: MAESTConfig):
        super().__init__(config)
        set_drop_path(self.backbone, config.drop_path_rate)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # The reference's `main_finetune.py` starts the head near zero.
            init.trunc_normal_(self.classifier.weight, std=2e-5)

    def no_weight_decay(self) -> set[str]:
        # In pretraining the reference lets them decay.
        return {"position_embeddings*", "backbone.embeddings.position_embeddings", "backbone.embeddings.cls_token"}

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classifies clips.

        Args:
            pixel_values: float (batch, frames, channels, height, width).
            labels: int64 (batch,), for the cross-entropy.

        Returns:
            logits: (batch, num_labels).
        """
        self._check_inputs(pixel_values, None)
        tokens = self.encode_visible(pixel_values, final_norm=False, **kwargs)  # (batch, 1 + tubelets, hidden)
        pooled = self.backbone.layernorm(tokens[:, 1:].mean(dim=1))
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def _joint_table(weights: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    return joint_positions(*(weights[prefix + name] for name in ("class_token", "temporal", "spatial")))


# The heads of the released models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {768: 12, 1024: 16, 1280: 16}


def official_config(state_dict: dict[str, torch.Tensor]) -> MAESTConfig:
    """The config of an official checkpoint with separable positions, read from its shapes.

    Raises:
        ValueError: if the number of heads cannot be known, because the width is none of the released ones.
    """
    hidden_size, num_channels, *tubelet_size = state_dict["patch_embed.proj.weight"].shape
    if hidden_size not in OFFICIAL_HEADS:
        raise ValueError(
            f"The checkpoint's encoder is {hidden_size} wide and does not say how many heads it has, which is known "
            f"for the released widths only ({', '.join(map(str, OFFICIAL_HEADS))}): pass a config."
        )
    times, places = (state_dict[f"pos_embed_{axis}"].shape[1] for axis in ("temporal", "spatial"))
    backbone_config = VivitConfig(
        hidden_size=hidden_size,
        num_hidden_layers=official_depth(state_dict, "blocks"),
        num_attention_heads=OFFICIAL_HEADS[hidden_size],
        intermediate_size=state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_channels=num_channels,
        num_frames=times * tubelet_size[0],
        tubelet_size=tubelet_size,
        image_size=math.isqrt(places) * tubelet_size[1],
    )
    if "decoder_embed.weight" not in state_dict:
        return MAESTConfig(backbone_config=backbone_config)
    values = state_dict["decoder_pred.weight"].shape[0]
    return MAESTConfig(
        backbone_config=backbone_config,
        num_target_frames=times * values // (math.prod(tubelet_size[1:]) * num_channels),
        decoder_hidden_size=state_dict["decoder_embed.weight"].shape[0],
        decoder_num_hidden_layers=official_depth(state_dict, "decoder_blocks"),
        decoder_intermediate_size=state_dict["decoder_blocks.0.mlp.fc1.weight"].shape[0],
    )


# Official name -> ours.
_RENAMING = (
    (r"^patch_embed\.proj\.", "backbone.embeddings.patch_embeddings.projection."),
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^pos_embed$", TABLE),
    (r"^(decoder_)?pos_embed_(spatial|temporal)$", r"\1position_embeddings.\2"),
    (r"^(decoder_)?pos_embed_class$", r"\1position_embeddings.class_token"),
    (r"^decoder_position_embeddings\.", "decoder.position_embeddings."),
    (r"^decoder_pos_embed$", "decoder.position_embeddings.table"),
    (r"^blocks\.(\d+)\.norm1\.", r"backbone.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"backbone.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.([qkv])\.", r"backbone.layers.\1.attention.\2_proj."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"backbone.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"backbone.layers.\1.mlp."),
    (r"^norm\.", "backbone.layernorm."),
    (r"^head\.", "classifier."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_cls_token$", "decoder.class_token"),
    (r"^decoder_embed\.", "decoder.embedding."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
    *timm_block_renaming("decoder_blocks", "decoder.layers"),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MAESTConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `models_mae.py`, with or without the decoder, or of `models_vit.py`.
        config: of the model; with separable positions the backbone's table is filled from them.
    """
    weights = rename_weights(_with_joint_qkv(state_dict), _RENAMING)
    if config.separable_position_embeddings and "position_embeddings.spatial" in weights:
        weights[TABLE] = _joint_table(weights, "position_embeddings.")
    return weights


def _with_joint_qkv(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The decoder's queries, keys and values, three layers in the reference, as the one that they are here."""
    joint = {}
    for name, tensor in state_dict.items():
        parts = re.fullmatch(r"(decoder_blocks\.\d+\.attn\.)([qkv])\.(weight|bias)", name)
        if parts is None:
            joint[name] = tensor
        elif parts[2] == "q":
            block, kind = parts[1], parts[3]
            joint[f"{block}qkv.{kind}"] = torch.cat([state_dict[f"{block}{part}.{kind}"] for part in "qkv"])
    return joint


def tiny_config() -> MAESTConfig:
    backbone_config = VivitConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        image_size=16,
        num_frames=8,
        tubelet_size=[2, 8, 8],
    )
    return MAESTConfig(
        backbone_config=backbone_config,
        mask_ratio=0.75,
        repeated_samples=2,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )


def example_inputs(config: MAESTConfig, batch: int) -> dict[str, torch.Tensor]:
    """Inputs of pretraining, from torch's generator."""
    backbone, leading = config.backbone_config, (batch,)
    if config.repeated_samples > 1:
        leading = (batch, config.repeated_samples)
    clip = (backbone.num_frames, config.num_channels, *pair(backbone.image_size))
    return {"pixel_values": torch.randn(*leading, *clip)}


register_variant(
    config=MAESTConfig,
    pretraining=MAESTForPreTraining,
    model=MAESTModel,
    heads={AutoModelForVideoClassification: MAESTForVideoClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
