"""MAE: drop three quarters of the patches, encode the rest, and let a small decoder regress the missing pixels.

Kaiming He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv 2111.06377.
Reference implementation: https://github.com/facebookresearch/mae (`models_mae.py`).
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_patches import MaskedFeatures, MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    check_visible_token_backbone,
    encode_visible,
    init_vit_as_mae,
    num_prefix_tokens,
    tiny_vit,
)
from hf_masked.modeling.parts.decoders import MaskTokenDecoder
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patchify, unpatchify
from hf_masked.modeling.parts.state_dicts import (
    TIMM_VIT_RENAMING,
    official_depth,
    official_vit_config,
    rename_weights,
    timm_block_renaming,
)
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches
from hf_masked.modeling.registry import register_variant


class MAEConfig(MaskedPatchesConfig):
    """Config of MAE.

    Args:
        backbone_config: a ViT, DeiT or DINOv2 config; ViT-B/16 by default.
        mask_ratio: share of the patches that the encoder does not see, in [0, 1).
        mask_kind: a name in `hf_masked.processing.masks.MASKS`.
        mask_options: further arguments of the mask function.
        norm_pix_loss: predict each patch less its mean and over its standard deviation (the paper's recipe).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder, whatever the encoder (paper, table 1).
        fixed_positions: the backbone's position table is the fixed sine-cosine one; False keeps a learned table.
        classifier_pooling: what `MAEForImageClassification` reads: "mean" of the patch tokens, or "cls".
    """

    model_type = "hf_masked_mae"
    paper_title: ClassVar[str] = "Masked Autoencoders Are Scalable Vision Learners"
    paper_year: ClassVar[int] = 2021
    arxiv_id: ClassVar[str] = "2111.06377"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/mae"
    weights_licence: ClassVar[str] = "CC BY-NC 4.0"
    masks: ClassVar[str] = "random patches, dropped before the encoder"
    predicts: ClassVar[str] = "pixels of the masked patches"
    backbones: ClassVar[tuple[str, ...]] = tuple(VISIBLE_TOKEN_BACKBONES)

    norm_pix_loss: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    fixed_positions: bool = True
    classifier_pooling: str = "mean"

    def check(self) -> None:
        super().check()
        self.check_backbone()
        check_decoder_and_pooling(self)

    def check_backbone(self) -> None:
        """Raises a ValueError for a backbone that cannot encode visible patches alone."""
        check_visible_token_backbone(self.backbone_config)

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "MAEConfig":
        # A pretrained encoder brings its own positions.
        return cls(backbone_config=backbone_config, **{"fixed_positions": False, **arguments})


def settings_of(config: MAEConfig, *without: str) -> dict:
    """The settings of a config of MAE, for the config of a method that builds on it, less those named."""
    left_out = {"model_type", *without}
    return {name: value for name, value in config.to_diff_dict().items() if name not in left_out}


def check_decoder_and_pooling(config: PreTrainedConfig) -> None:
    """Raises a ValueError for a decoder whose heads do not divide it, or an unknown pooling of the classifier."""
    if config.decoder_hidden_size % config.decoder_num_attention_heads:
        raise ValueError(
            f"decoder_hidden_size={config.decoder_hidden_size} is no multiple of "
            f"decoder_num_attention_heads={config.decoder_num_attention_heads}."
        )
    if config.classifier_pooling not in ("mean", "cls"):
        raise ValueError(f"classifier_pooling is {config.classifier_pooling!r}; it must be 'mean' or 'cls'.")


class MAEPreTrainedModel(MaskedPatchesModel):
    """Initialisation and freezing that all classes of MAE share."""

    config: MAEConfig
    _no_split_modules: ClassVar[list[str]] = [*MaskedPatchesModel._no_split_modules, "TransformerBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init_vit_as_mae(self.backbone, self.config.fixed_positions)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MaskTokenDecoder):
            module.init_weights()

    def frozen_parameters(self):
        embeddings = self.backbone.embeddings
        if self.config.fixed_positions:
            yield embeddings.position_embeddings
        # DINOv2's mask token: MAE's encoder never sees one.
        if getattr(embeddings, "mask_token", None) is not None:
            yield embeddings.mask_token

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """(batch, prefix + visible, hidden)."""
        visible = None if bool_masked_pos is None else self._visible(bool_masked_pos, grid)
        return encode_visible(self.backbone, pixel_values, visible, **kwargs)


class MAEModel(MaskedFeatures, MAEPreTrainedModel):
    """The encoder: without a mask it is the plain backbone, with one it sees the visible patches only."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]


class MAEForPreTraining(MAEPreTrainedModel):
    """Encoder, decoder and the loss on masked patches."""

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.patch_size = pair(config.backbone_config.patch_size)
        self.decoder = self.make_decoder(self.patch_size[0] * self.patch_size[1] * config.num_channels)
        self.post_init()

    def make_decoder(self, output_size: int) -> nn.Module:
        """The decoder, which predicts `output_size` values per patch."""
        config = self.config
        return MaskTokenDecoder(
            config,
            encoder_size=config.hidden_size,
            hidden_size=config.decoder_hidden_size,
            num_hidden_layers=config.decoder_num_hidden_layers,
            num_attention_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            grid=backbone_grid(config.backbone_config),
            output_size=output_size,
            num_prefix_tokens=num_prefix_tokens(config.backbone_config),
        )

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
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, patch height * patch width * channels) in
            `patchify` order, of normalised pixels with `norm_pix_loss`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        encoded = encode_visible(self.backbone, pixel_values, visible, **kwargs)  # (batch, prefix + visible, hidden)
        logits = self.decode(encoded, visible, grid)  # (batch, units, values)
        loss = self.loss(pixel_values, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
        )

    def decode(self, encoded: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, prefix + visible, hidden) and int64 (batch, visible) -> predictions (batch, units, values)."""
        return self.decoder(encoded, visible, grid)

    def loss(self, pixel_values: torch.Tensor, logits: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the pixels of masked patches (paper, section 3; `forward_loss`)."""
        return masked_mean(self.loss_per_unit(pixel_values, logits), bool_masked_pos)

    def loss_per_unit(self, pixel_values: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the values of each patch, float32 (batch, units)."""
        target = patchify(pixel_values.float(), self.patch_size)  # (batch, units, values)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        return (logits.float() - target).square().mean(dim=-1)

    def reconstruct(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of at least all masked patches, (batch, units, values), and the mask, bool (batch, units)."""
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        return output.logits, output.mask

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        With `norm_pix_loss` the predictions are drawn with the mean and deviation of the TRUE patches, which the
        model does not know; the panel's name says so.
        """
        predicted, mask = self.reconstruct(pixel_values, bool_masked_pos)
        return {"picture": pixel_values.float(), **self.drawn(pixel_values, predicted, mask, "reconstruction")}

    def drawn(self, pixel_values, predicted, mask, name: str) -> dict[str, torch.Tensor]:
        """The panels "masked" and `name` of pictures, their predictions (batch, units, values) and masks."""
        grid = self._check_inputs(pixel_values, None)
        patches = patchify(pixel_values.float(), self.patch_size)
        predicted = predicted.float()
        if self.config.norm_pix_loss:
            predicted = denormalize_patches(predicted, patches)
            name += " (true patch statistics)"
        hidden = mask.unsqueeze(-1)
        panels = {"masked": patches.masked_fill(hidden, 0.0), name: torch.where(hidden, predicted, patches)}
        return {name: unpatchify(panel, grid, self.patch_size) for name, panel in panels.items()}


class MAEForImageClassification(MAEPreTrainedModel):
    """The fine-tuning encoder: mean of the patch tokens, a norm of its own and a linear layer (`models_vit.py`)."""

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        if config.classifier_pooling == "mean":
            # As in the reference: the encoder's final norm gives way to one after the pooling.
            self.backbone.layernorm = nn.Identity()
            self.fc_norm = nn.LayerNorm(config.hidden_size, eps=1e-6)
        else:
            self.fc_norm = nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    # The encoder's norm, which mean pooling leaves out, and the decoder.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"backbone\.layernorm\..*", r"decoder\..*"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            # The reference's `main_finetune.py` starts the head near zero.
            init.trunc_normal_(self.classifier.weight, std=2e-5)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classifies pictures.

        Args:
            pixel_values: float (batch, channels, height, width).
            labels: int64 (batch,), for the cross-entropy.

        Returns:
            logits: (batch, num_labels).
        """
        self._check_inputs(pixel_values, None)
        tokens = encode_visible(self.backbone, pixel_values, **kwargs)  # (batch, prefix + units, hidden)
        prefix = num_prefix_tokens(self.config.backbone_config)
        pooled = tokens[:, prefix:].mean(dim=1) if self.config.classifier_pooling == "mean" else tokens[:, 0]
        logits = self.classifier(self.fc_norm(pooled))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


# The heads of the released models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {768: 12, 1024: 16, 1280: 16}


def official_config(state_dict: dict[str, torch.Tensor]) -> MAEConfig:
    """The config of an official checkpoint, read from its shapes.

    Raises:
        ValueError: if the number of heads cannot be known, because the width is none of the released ones.
    """
    backbone_config = official_vit_config(state_dict, OFFICIAL_HEADS)
    if "decoder_embed.weight" not in state_dict:
        return MAEConfig(backbone_config=backbone_config)
    return MAEConfig(
        backbone_config=backbone_config,
        decoder_hidden_size=state_dict["decoder_embed.weight"].shape[0],
        decoder_num_hidden_layers=official_depth(state_dict, "decoder_blocks"),
        decoder_intermediate_size=state_dict["decoder_blocks.0.mlp.fc1.weight"].shape[0],
    )


# Official name -> ours.
_RENAMING = (
    *TIMM_VIT_RENAMING,
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^norm\.", "backbone.layernorm."),
    (r"^head\.", "classifier."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_pos_embed$", "decoder.position_embeddings"),
    (r"^decoder_embed\.", "decoder.embedding."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
    *timm_block_renaming("decoder_blocks", "decoder.layers"),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MAEConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `models_mae.py`, with or without the decoder, or of `models_vit.py`.
        config: unused here; other variants' conversions need it.
    """
    return rename_weights(state_dict, _RENAMING)


def tiny_config() -> MAEConfig:
    return MAEConfig(
        backbone_config=tiny_vit(),
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )


register_variant(
    config=MAEConfig,
    pretraining=MAEForPreTraining,
    model=MAEModel,
    heads={AutoModelForImageClassification: MAEForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
