"""MaskFeat: put mask tokens in place of blocks of patches, encode all of it, and let one linear layer regress HOG.

Chen Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022, arXiv 2112.09133.
Reference implementation: https://github.com/facebookresearch/SlowFast (`slowfast/models/masked.py`, `operators.py`).
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_patches import MaskedFeatures, MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    encode_with_mask_tokens,
    num_prefix_tokens,
    tiny_vit,
)
from hf_masked.modeling.parts.hog import cells_to_units, hog, hog_glyphs, units_to_cells
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patchify, unpatchify
from hf_masked.modeling.parts.state_dicts import TIMM_VIT_RENAMING, official_vit_config, rename_weights
from hf_masked.modeling.registry import register_variant


class MaskFeatConfig(MaskedPatchesConfig):
    """Config of MaskFeat for pictures.

    Args:
        backbone_config: a ViT, DeiT or DINOv2 config; ViT-B/16 by default.
        mask_ratio: share of the patches that the encoder sees as mask tokens, in [0, 1).
        mask_kind: a name in `hf_masked.processing.masks.MASKS`; the paper's is BEiT's blocks.
        mask_options: further arguments of the mask function.
        hog_bins: directions in half a turn.
        hog_cell_size: side of a HOG cell in pixels; divides the patch.
    """

    model_type = "hf_masked_maskfeat"
    paper_title: ClassVar[str] = "Masked Feature Prediction for Self-Supervised Visual Pre-Training"
    paper_year: ClassVar[int] = 2021
    arxiv_id: ClassVar[str] = "2112.09133"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/SlowFast"
    weights_licence: ClassVar[str] = "Apache 2.0"
    masks: ClassVar[str] = "blocks of patches, as mask tokens"
    predicts: ClassVar[str] = "histograms of oriented gradients (HOG) of the masked patches"
    backbones: ClassVar[tuple[str, ...]] = tuple(VISIBLE_TOKEN_BACKBONES)

    mask_ratio: float = 0.4
    mask_kind: str = "block"
    hog_bins: int = 9
    hog_cell_size: int = 8

    def check(self) -> None:
        super().check()
        backbone_grid(self.backbone_config)
        if self.hog_bins < 1:
            raise ValueError(f"hog_bins is {self.hog_bins}; it must be at least 1. The paper's is 9.")
        patch = pair(self.backbone_config.patch_size)
        if self.hog_cell_size < 1 or any(side % self.hog_cell_size for side in patch):
            raise ValueError(
                f"hog_cell_size={self.hog_cell_size} does not divide the backbone's patch of {patch[0]} x {patch[1]} "
                "pixels: choose a divisor, for example half a patch."
            )

    @property
    def cells_per_patch(self) -> tuple[int, int]:
        """(rows, columns) of HOG cells in a patch."""
        height, width = pair(self.backbone_config.patch_size)
        return height // self.hog_cell_size, width // self.hog_cell_size


class MaskFeatPreTrainedModel(MaskedPatchesModel):
    """Initialisation and checks that all classes of MaskFeat share."""

    config: MaskFeatConfig
    uses_mask_token = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with deviation 0.02 for matrices, kernels, tokens and positions, zero for biases."""
        if module is self:
            for part in self.backbone.modules():
                _init_linear(part)
            embeddings = self.backbone.embeddings
            for name in ("cls_token", "distillation_token", "mask_token", "position_embeddings"):
                token = getattr(embeddings, name, None)
                if token is not None:
                    init.trunc_normal_(token, std=0.02)
        else:
            _init_linear(module)

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """(batch, prefix + units, hidden)."""
        return encode_with_mask_tokens(self.backbone, pixel_values, bool_masked_pos, **kwargs)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            init.zeros_(module.bias)


class MaskFeatModel(MaskedFeatures, MaskFeatPreTrainedModel):
    """The encoder: without a mask the plain backbone, with one it sees mask tokens in place of masked patches."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"head\..*"]


class MaskFeatForPreTraining(MaskFeatPreTrainedModel):
    """Encoder, linear head and the loss on the HOG of masked patches."""

    def __init__(self, config: MaskFeatConfig):
        super().__init__(config)
        rows, columns = config.cells_per_patch
        self.head = nn.Linear(config.hidden_size, config.num_channels * config.hog_bins * rows * columns)
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
        """One step of masked feature prediction.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked; drawn here by default.
            noise: float (batch, n), the numbers that the mask function draws.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, channels * bins * cells per patch), in the order of
            `cells_to_units`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        encoded = self.encode(pixel_values, bool_masked_pos, grid, **kwargs)
        logits = self.head(encoded[:, num_prefix_tokens(self.config.backbone_config) :])  # (batch, units, values)
        loss = self.loss(pixel_values, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"hog": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
        )

    def target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """HOG of the normalised picture, all cells of a patch in one vector: float32 (batch, units, values)."""
        cells = hog(pixel_values, pair(self.config.hog_cell_size), self.config.hog_bins)
        return cells_to_units(cells, self.config.cells_per_patch)

    def loss(self, pixel_values: torch.Tensor, logits: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the HOG of masked patches (`MultipleMSELoss`)."""
        return masked_mean((logits.float() - self.target(pixel_values)).square().mean(dim=-1), bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        HOG is drawn as glyphs, see `hog_glyphs`, between each picture's darkest and brightest value; in the panel of
        predictions the patches that the model saw keep their true one.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        grid = self._check_inputs(pixel_values, None)
        patch_size = pair(self.config.backbone_config.patch_size)
        hidden = output.mask.unsqueeze(-1)
        masked = patchify(pixel_values, patch_size).masked_fill(hidden, 0.0)
        target = self.target(pixel_values)
        predicted = torch.where(hidden, output.logits.float(), target)
        return {
            "picture": pixel_values,
            "masked": unpatchify(masked, grid, patch_size),
            "predicted HOG": self._glyphs(predicted, grid, pixel_values),
            "true HOG": self._glyphs(target, grid, pixel_values),
        }

    def _glyphs(self, units: torch.Tensor, grid: tuple[int, int], pixel_values: torch.Tensor) -> torch.Tensor:
        cells = units_to_cells(units, grid, self.config.num_channels, self.config.cells_per_patch)
        return hog_glyphs(cells, pair(self.config.hog_cell_size), pixel_values)


# The heads of the released models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {768: 12, 1024: 16}


def official_config(state_dict: dict[str, torch.Tensor]) -> MaskFeatConfig:
    """The config of an official checkpoint of a ViT, read from its shapes.

    Raises:
        ValueError: for a checkpoint of a video model, or of an unknown width, because of its number of heads.
    """
    kernel = state_dict["patch_embed.proj.weight"]
    if kernel.ndim != 4:
        raise ValueError("The checkpoint is one of MaskFeat for video, an MViT; only those of ViTs are converted.")
    return MaskFeatConfig(backbone_config=official_vit_config(state_dict, OFFICIAL_HEADS))


# Official name -> ours.
_RENAMING = (
    *TIMM_VIT_RENAMING,
    (r"^(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    # The reference has taken the encoder's norm into the head.
    (r"^pred_head\.transforms\.0\.0\.", "backbone.layernorm."),
    (r"^pred_head\.projections\.0\.", "head."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MaskFeatConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of SlowFast's `MaskMViT` in the form of a ViT.
        config: unused here; other variants' conversions need it.
    """
    # The Sobel kernels of the target.
    return rename_weights({name: value for name, value in state_dict.items() if name[:5] != "hogs."}, _RENAMING)


def tiny_config() -> MaskFeatConfig:
    return MaskFeatConfig(backbone_config=tiny_vit(), hog_cell_size=4)


register_variant(
    config=MaskFeatConfig,
    pretraining=MaskFeatForPreTraining,
    model=MaskFeatModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
