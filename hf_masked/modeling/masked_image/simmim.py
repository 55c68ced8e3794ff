"""SimMIM: put mask tokens in place of random large squares, encode all of it, and let one linear layer regress pixels.

Zhenda Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022, arXiv 2111.09886.
Reference implementation: https://github.com/microsoft/SimMIM (`models/simmim.py`).
"""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedImageModeling, BeitConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from hf_masked.modeling.masked_patches import MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedImageModelingOutput
from hf_masked.modeling.parts.backbones import check_window, feature_map, output_stride
from hf_masked.modeling.parts.beit import beit_vit, check_beit, init_beit, with_final_norm
from hf_masked.modeling.parts.heads import PixelShuffleHead, init_as_torch
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import check_mask, check_pixel_values, pair, patch_grid
from hf_masked.modeling.parts.relative_positions import TABLE
from hf_masked.modeling.parts.state_dicts import (
    SWIN_BUFFERS,
    SWIN_RENAMING,
    official_depth,
    official_swin_config,
    rename_weights,
    window_of_table,
)
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import num_masked_units


class SimMIMConfig(MaskedPatchesConfig):
    """Config of SimMIM.

    Args:
        backbone_config: a BEiT config (the paper's ViT: relative positions that all blocks share, LayerScale), or one
            of Swin or Swin V2; the paper's ViT-B/16 by default.
        mask_ratio: share of the squares that are masked, in [0, 1).
        mask_kind: "coarse", the paper's squares, or another name in `hf_masked.processing.masks.MASKS`.
        mask_options: further arguments of the mask function.
        mask_patch_size: side of a square of "coarse" masks in pixels; by default the encoder's stride and at least two
            patches, which is the paper's 32 for ViT/16 and Swin.
    """

    model_type = "hf_masked_simmim"
    paper_title: ClassVar[str] = "SimMIM: A Simple Framework for Masked Image Modeling"
    paper_year: ClassVar[int] = 2021
    arxiv_id: ClassVar[str] = "2111.09886"
    reference_repository: ClassVar[str] = "https://github.com/microsoft/SimMIM"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "random large squares, as mask tokens"
    predicts: ClassVar[str] = "pixels of the masked squares"
    backbones: ClassVar[tuple[str, ...]] = ("beit", "swin", "swinv2")

    mask_ratio: float = 0.6
    mask_kind: str = "coarse"
    mask_patch_size: int | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = beit_vit()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        output_stride(self.backbone_config)
        patch, unit = pair(self.backbone_config.patch_size)[0], self.square_size
        if unit % patch:
            raise ValueError(f"mask_patch_size={unit} is no multiple of the backbone's patch of {patch} pixels.")
        if unit % self.encoder_stride and self.encoder_stride % unit:
            raise ValueError(
                f"Squares of mask_patch_size={unit} pixels cut through the cells of {self.encoder_stride} pixels that "
                f"the backbone predicts: choose a multiple or a divisor of {self.encoder_stride}."
            )
        squares = patch_grid(*pair(self.image_size), (unit, unit))
        masked = num_masked_units(squares, self.mask_ratio) if self.mask_kind == "coarse" else 0
        if masked == math.prod(squares):
            raise ValueError(
                f"mask_ratio={self.mask_ratio} masks all of the {squares[0]} x {squares[1]} squares of {unit} pixels: "
                "choose a smaller mask_patch_size or larger pictures."
            )
        if self.backbone_config.model_type == "beit":
            check_beit(self.backbone_config)
        check_window(self.backbone_config, pair(self.image_size), self.encoder_stride)

    @property
    def encoder_stride(self) -> int:
        """Side of a cell of the encoder's output in pixels: the patch, or 8 patches of 4 stages."""
        return output_stride(self.backbone_config)

    @property
    def square_size(self) -> int:
        """Side of a masked square in pixels."""
        return self.mask_patch_size or max(self.encoder_stride, 2 * pair(self.backbone_config.patch_size)[0])

    def mask_arguments(self) -> dict:
        squares = {"unit": self.square_size // pair(self.backbone_config.patch_size)[0]}
        return (squares if self.mask_kind == "coarse" else {}) | super().mask_arguments()

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "SimMIMConfig":
        return cls(backbone_config=with_final_norm(backbone_config), **arguments)


class SimMIMPreTrainedModel(MaskedPatchesModel):
    """Initialisation, weight decay and the masked encoder that all classes of SimMIM share."""

    config: SimMIMConfig
    uses_mask_token = True
    _no_split_modules: ClassVar[list[str]] = ["BeitLayer", "SwinStage", "Swinv2Stage"]
    # Attention with a bias table.
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            initialize = init_beit if self.config.backbone_config.model_type == "beit" else init_swin
            initialize(self.backbone)
        elif isinstance(module, nn.Conv2d):
            init_as_torch(module)

    def no_weight_decay(self) -> set[str]:
        # As the reference has it: the table that a ViT's blocks share does decay.
        names = {"mask_token", "cls_token", "position_embeddings"}
        return names if self.config.backbone_config.model_type == "beit" else names | {TABLE}

    def _check_inputs(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None) -> tuple[int, int]:
        """The grid of patches; raises a ValueError for inputs that do not fit."""
        config, stride = self.config.backbone_config, self.config.encoder_stride
        cells = check_pixel_values(pixel_values, config.num_channels, (stride, stride))
        check_window(config, pixel_values.shape[-2:], stride)
        per_cell = stride // pair(config.patch_size)[0]
        grid = (cells[0] * per_cell, cells[1] * per_cell)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, pixel_values.shape[0], grid)
        return grid

    def encode(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, **kwargs):
        """The stock backbone's output; absolute positions, where there are any, follow the size of the picture."""
        other_size = tuple(pixel_values.shape[-2:]) != pair(self.config.image_size)
        # Stock BEiT and Swin leave the cast to the caller.
        pixel_values = pixel_values.to(self.backbone.embeddings.patch_embeddings.projection.weight.dtype)
        return self.backbone(
            pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=other_size, **kwargs
        )


class SimMIMModel(SimMIMPreTrainedModel):
    """The encoder: without a mask the plain backbone, with one it sees mask tokens in place of masked patches."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: SimMIMConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; `encoder_stride` must divide both sizes.
            bool_masked_pos: bool (batch, patches), True = masked.

        Returns:
            last_hidden_state: (batch, 1 + patches, hidden) of BEiT, the class token first, or (batch, cells, hidden).

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        self._check_inputs(pixel_values, bool_masked_pos)
        outputs = self.encode(pixel_values, bool_masked_pos, **kwargs)
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class SimMIMForPreTraining(SimMIMPreTrainedModel):
    """Encoder, one linear layer from each of its cells to that cell's pixels, and the loss on masked pixels."""

    def __init__(self, config: SimMIMConfig):
        super().__init__(config)
        self.patch_size = pair(config.backbone_config.patch_size)[0]
        self.decoder = PixelShuffleHead(config.hidden_size, config.encoder_stride, config.num_channels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MaskedImageModelingOutput:
        """Reconstructs masked pixels.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; `encoder_stride` must divide both sizes.
            bool_masked_pos: bool (batch, patches), True = masked, on the grid of the backbone's patches; drawn here,
                in squares of `mask_patch_size`, by default.
            noise: float (batch, squares), distinct numbers to draw the mask from: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedImageModelingOutput`; `last_hidden_state` are the backbone's tokens, as in `SimMIMModel`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        outputs = self.encode(pixel_values, bool_masked_pos, **kwargs)
        reconstruction = self.decoder(self.feature_map(outputs.last_hidden_state, pixel_values.shape[-2:]))
        loss = self.loss(pixel_values, reconstruction, bool_masked_pos) if return_loss else None
        return MaskedImageModelingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reconstruction=reconstruction,
            mask=bool_masked_pos,
        )

    def feature_map(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(batch, prefix + cells, hidden) to (batch, hidden, rows, columns), without the class token."""
        return feature_map(tokens, size, self.config.encoder_stride)

    def loss(self, pixel_values, reconstruction, bool_masked_pos) -> torch.Tensor:
        """Mean absolute error over masked pixels and their channels (paper, equation 1; `SimMIM.forward`)."""
        error = (reconstruction.float() - pixel_values.float()).abs().mean(dim=1)  # (batch, height, width)
        error_per_patch = F.avg_pool2d(error, self.patch_size).flatten(1)  # (batch, patches)
        return masked_mean(error_per_patch, bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input."""
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        grid = self._check_inputs(pixel_values, None)
        hidden = output.mask.unflatten(1, (1, *grid))  # (batch, 1, rows, columns)
        hidden = hidden.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return {
            "picture": pixel_values,
            "masked": pixel_values.masked_fill(hidden, 0.0),
            "reconstruction": torch.where(hidden, output.reconstruction.to(pixel_values.dtype), pixel_values),
        }


@torch.no_grad()
def init_swin(backbone: nn.Module) -> None:
    """The reference's initialisation of Swin, of what has not been loaded (`models/swin_transformer.py`)."""
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init_as_torch(module)  # as the reference leaves it
        elif hasattr(module, TABLE):
            init.trunc_normal_(getattr(module, TABLE), std=0.02)
    embeddings = backbone.embeddings
    for token in (embeddings.mask_token, embeddings.position_embeddings):
        if token is not None:
            init.trunc_normal_(token, std=0.02)


def official_config(state_dict: dict[str, torch.Tensor]) -> SimMIMConfig:
    """The config of an official pretraining checkpoint, read from its shapes.

    Raises:
        ValueError: if it holds neither of the reference's encoders.
    """
    if "encoder.rel_pos_bias.relative_position_bias_table" in state_dict:
        return SimMIMConfig(backbone_config=_official_vit(state_dict))
    if "encoder.layers.0.blocks.0.attn.relative_position_bias_table" in state_dict:
        return SimMIMConfig(backbone_config=official_swin_config(state_dict))
    raise ValueError(
        "The checkpoint holds no SimMIM pretraining: no relative positions under encoder.rel_pos_bias (ViT) or "
        "encoder.layers (Swin). Fine-tuned checkpoints are not converted."
    )


def _official_vit(state_dict: dict[str, torch.Tensor]) -> BeitConfig:
    hidden_size, num_channels, patch_size, _ = state_dict["encoder.patch_embed.proj.weight"].shape
    table = state_dict[f"encoder.rel_pos_bias.{TABLE}"]
    return beit_vit(
        hidden_size=hidden_size,
        num_hidden_layers=official_depth(state_dict, "encoder.blocks"),
        num_attention_heads=table.shape[1],
        intermediate_size=state_dict["encoder.blocks.0.mlp.fc1.weight"].shape[0],
        image_size=window_of_table(table, others=3) * patch_size,
        patch_size=patch_size,
        num_channels=num_channels,
    )


# Official name -> ours, of both encoders.
_RENAMING = (
    (r"^encoder\.(cls_token|mask_token)$", r"backbone.embeddings.\1"),
    (r"^encoder\.pos_embed$", "backbone.embeddings.position_embeddings"),
    (r"^encoder\.rel_pos_bias\.", "backbone.shared_position_bias."),
    (r"^encoder\.blocks\.", "backbone.layers."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    *SWIN_RENAMING,
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: SimMIMConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `SimMIM`, encoder and decoder.
        config: unused here; other variants' conversions need it.
    """
    weights = {name: value for name, value in state_dict.items() if not name.endswith(SWIN_BUFFERS)}
    return rename_weights(weights, _RENAMING)


def tiny_config() -> SimMIMConfig:
    backbone_config = beit_vit(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
        drop_path_rate=0.0,
    )
    return SimMIMConfig(backbone_config=backbone_config)


register_variant(
    config=SimMIMConfig,
    pretraining=SimMIMForPreTraining,
    model=SimMIMModel,
    heads={AutoModelForMaskedImageModeling: SimMIMForPreTraining},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
