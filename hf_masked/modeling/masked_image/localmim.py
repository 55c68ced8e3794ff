"""LocalMIM: MAE whose reconstruction is asked of several layers, of the lower ones finely, of the upper ones coarsely.

Haoqing Wang et al., "Masked Image Modeling with Local Multi-Scale Reconstruction", CVPR 2023, arXiv 2303.05251.
Reference implementation: https://github.com/Haoqing-Wang/LocalMIM (`ViT/models_mim.py`, `Swin/models_mim.py`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image.mae import (
    MAEConfig,
    MAEForImageClassification,
    MAEModel,
    MAEPreTrainedModel,
)
from hf_masked.modeling.masked_image.mae import convert_official_weights as convert_mae_weights
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    check_window,
    num_prefix_tokens,
    output_stride,
    tiny_vit,
    visible_feature_maps,
)
from hf_masked.modeling.parts.decoders import MaskTokenDecoder
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.hog import (
    cells_to_units,
    gradient_histograms,
    hog_glyphs,
    pooled_histograms,
    units_to_cells,
)
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patch_grid, patchify, unpatchify
from hf_masked.modeling.parts.pooling import interpolation_argument
from hf_masked.modeling.parts.relative_positions import TABLE
from hf_masked.modeling.parts.state_dicts import (
    SWIN_BUFFERS,
    SWIN_RENAMING,
    official_depth,
    official_swin_config,
    official_vit_config,
    rename_weights,
)
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches
from hf_masked.modeling.parts.visible_swin import init_swin_as_mae, visible_swin_stages
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import num_masked_units

# Cells per patch and axis that there is a head for; the first are the paper's, of ViTs.
SCALES = (4, 2, 1, 0.5)
TARGETS = ("hog", "pixel")


class LocalMIMConfig(MAEConfig):
    """Config of LocalMIM: MAE's, with smaller decoders, and what each of them reads and predicts.

    Args:
        backbone_config: a ViT, DeiT or DINOv2 config, ViT-B/16 by default, or one of Swin. Swin's stages stand for
            layers; each predicts after its patch merging. What is masked are units of the last stage's stride, 32
            pixels.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of
            each decoder. With Swin that of the first stage, which has the most tokens, is half as wide; the
            reference's Swin-B has 128, 1, 4 and 512.
        tap_indices: the layers that predict, from 0, ascending, negative ones counted from the end; the last layer is
            one of them. By default the paper's 1, 3, -3 and -1, or 0, 1, -2 and -1 of fewer than seven layers; all
            stages of Swin.
        tap_scales: of each of them, cells per patch and axis: 4, 2, 1 or 0.5; by default these four. Swin predicts one
            cell per token, and takes none.
        target: "hog", or "pixel" (normalised per cell with `norm_pix_loss`).
        hog_bins: directions in half a turn (the reference's README: 9 for ViT-B, 18 for ViT-L and Swin).
        hog_random_bias: adds fixed random numbers to the gradients, as the reference does for ViT-L and Swin.
    """

    model_type = "hf_masked_localmim"
    paper_title: ClassVar[str] = "Masked Image Modeling with Local Multi-Scale Reconstruction"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2303.05251"
    reference_repository: ClassVar[str] = "https://github.com/Haoqing-Wang/LocalMIM"
    masks: ClassVar[str] = "random patches, dropped before the encoder"
    predicts: ClassVar[str] = "HOG or pixels of the masked patches at several scales, from several layers"
    backbones: ClassVar[tuple[str, ...]] = (*VISIBLE_TOKEN_BACKBONES, "swin")

    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 1
    decoder_num_attention_heads: int = 8
    decoder_intermediate_size: int = 1024
    tap_indices: list[int] | tuple[int, ...] | None = None
    tap_scales: list[int | float] | tuple[int | float, ...] | None = None
    target: str = "hog"
    hog_bins: int = 9
    hog_random_bias: bool = False

    def __post_init__(self, **kwargs):
        # As JSON gives them back.
        self.tap_indices = None if self.tap_indices is None else list(self.tap_indices)
        self.tap_scales = None if self.tap_scales is None else list(self.tap_scales)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        layers = self.backbone_config.num_hidden_layers
        taps = self.taps
        if not taps or taps != sorted(set(taps)) or taps[0] < 0 or taps[-1] != layers - 1:
            raise ValueError(
                f"tap_indices={self.tap_indices} are the layers {taps} of {layers}; give ascending ones, of which the "
                f"last is {layers - 1}, and as many tap_scales."
            )
        if not self.is_swin and (len(self.scales) != len(taps) or not set(self.scales) <= set(SCALES)):
            raise ValueError(
                f"tap_scales is {self.scales}; give one of {', '.join(map(str, SCALES))} for each of the {len(taps)} "
                "layers that predict."
            )
        if any(side % max(self.scales) for side in self.mask_unit):
            raise ValueError(
                f"Patches of {self.mask_unit[0]} x {self.mask_unit[1]} pixels cannot be cut into {max(self.scales)} "
                "cells per axis: choose smaller tap_scales."
            )
        self.check_grid(patch_grid(*pair(self.image_size), self.mask_unit))
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; it must be one of {', '.join(TARGETS)}.")
        if self.hog_bins < 1:
            raise ValueError(f"hog_bins is {self.hog_bins}; it must be at least 1. The paper's is 9.")

    def check_backbone(self) -> None:
        if not self.is_swin:
            return super().check_backbone()
        (stride, _), size = self.mask_unit, pair(self.image_size)
        grid = patch_grid(*size, self.mask_unit)
        check_window(self.backbone_config, size, stride)
        if num_masked_units(grid, self.mask_ratio) == math.prod(grid):
            raise ValueError(
                f"mask_ratio={self.mask_ratio} masks all of the {grid[0]} x {grid[1]} units of {stride} pixels: "
                "choose a smaller ratio, larger pictures, or a Swin with fewer stages."
            )
        if self.tap_scales is not None:
            raise ValueError(
                f"tap_scales is {self.tap_scales}, and Swin predicts one cell per token of each stage: leave it out."
            )
        if self.classifier_pooling != "mean":
            raise ValueError(f"classifier_pooling is {self.classifier_pooling!r}; Swin has no class token, so 'mean'.")
        if self.decoder_hidden_size % (2 * self.decoder_num_attention_heads):
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; the decoder of Swin's first stage is half as "
                f"wide, so it must be a multiple of {2 * self.decoder_num_attention_heads}, twice "
                "decoder_num_attention_heads."
            )

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises a ValueError for a grid of patches that cells of two by two patches do not tile."""
        if min(self.scales) < 1 and (grid[0] % 2 or grid[1] % 2):
            raise ValueError(
                f"tap_scales={self.scales} has cells of 2 x 2 patches, which do not tile a grid of {grid[0]} x "
                f"{grid[1]} patches: resize the pictures to an even number of patches, or use 1 in place of 0.5."
            )

    @property
    def is_swin(self) -> bool:
        return self.backbone_config.model_type == "swin"

    @property
    def mask_unit(self) -> tuple[int, int]:
        # Not the base's property: torch.compile cannot follow `super()` to one.
        return pair(output_stride(self.backbone_config) if self.is_swin else self.backbone_config.patch_size)

    @property
    def taps(self) -> list[int]:
        """The layers that predict, counted from the first."""
        layers = self.backbone_config.num_hidden_layers
        indices = self.tap_indices
        if indices is None and self.is_swin:
            indices = range(layers)
        elif indices is None:
            indices = (1, 3, -3, -1) if layers >= 7 else (0, 1, -2, -1)
        return [index + layers if index < 0 else index for index in indices]

    @property
    def scales(self) -> list[int | float]:
        """Of each of these layers, cells per masked unit and axis."""
        if not self.is_swin:
            return list(SCALES) if self.tap_scales is None else self.tap_scales
        # Every stage but the last ends with patch merging.
        return [2 ** max(0, self.backbone_config.num_hidden_layers - 2 - stage) for stage in self.taps]

    def tap_width(self, layer: int) -> int:
        """Width of a layer's output."""
        if not self.is_swin:
            return self.hidden_size
        return self.backbone_config.embed_dim * 2 ** min(layer + 1, self.backbone_config.num_hidden_layers - 1)

    def cell_size(self, scale: float) -> tuple[int, int]:
        """(height, width) of a cell in pixels."""
        height, width = self.mask_unit
        return int(height / scale), int(width / scale)

    def values_per_cell(self, scale: float) -> int:
        height, width = self.cell_size(scale)
        return self.num_channels * (self.hog_bins if self.target == "hog" else height * width)


@dataclass
class LocalMIMOutput(PreTrainingOutput):
    """Output of LocalMIM.

    Args:
        logits: of each layer that predicts, (batch, cells, values) in raster order, visible cells included.
        mask: bool (batch, units), True = masked.
    """

    logits: tuple[torch.Tensor, ...] | None = None
    mask: torch.Tensor | None = None


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (batch, channels, height, width)."""

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        return super().forward(feature_map.movedim(1, -1)).movedim(-1, 1)


def scale_head(scale: float, hidden_size: int, output_size: int) -> nn.Sequential:
    """From a map of patches to one of `scale` times as many cells per axis (`MAE_Decoder`)."""
    layers, width = [], hidden_size
    if scale > 1:
        width = hidden_size // 2
        layers += [nn.ConvTranspose2d(hidden_size, width, kernel_size=2, stride=2)]
    if scale == 4:
        layers += [
            ChannelNorm(width, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2),
        ]
        width = width // 2
    if scale == 0.5:
        layers += [nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(width, output_size, kernel_size=1))


class LocalDecoder(nn.Module):
    """MAE's decoder in small, with a head that predicts cells of one scale."""

    def __init__(self, config: LocalMIMConfig, scale: float):
        super().__init__()
        self.transformer = MaskTokenDecoder(
            config,
            encoder_size=config.hidden_size,
            hidden_size=config.decoder_hidden_size,
            num_hidden_layers=config.decoder_num_hidden_layers,
            num_attention_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            grid=backbone_grid(config.backbone_config),
            output_size=None,
            num_prefix_tokens=num_prefix_tokens(config.backbone_config),
        )
        self.head = scale_head(scale, config.decoder_hidden_size, config.values_per_cell(scale))

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, prefix + visible, encoder hidden) to (batch, cells, values), see `MaskTokenDecoder.forward`."""
        tokens = self.transformer(tokens, visible, grid)  # (batch, units, hidden)
        cells = self.head(tokens.transpose(1, 2).unflatten(2, grid))  # (batch, values, rows, columns)
        return cells.flatten(2).transpose(1, 2)


def swin_decoder(config: LocalMIMConfig, stage: int, scale: int) -> MaskTokenDecoder:
    """MAE's decoder in small for a stage of Swin; what it predicts are the cells that the stage's tokens stand for."""
    narrowing = 2 if stage == 0 else 1
    return MaskTokenDecoder(
        config,
        encoder_size=config.tap_width(stage),
        hidden_size=config.decoder_hidden_size // narrowing,
        num_hidden_layers=config.decoder_num_hidden_layers,
        num_attention_heads=config.decoder_num_attention_heads,
        intermediate_size=config.decoder_intermediate_size // narrowing,
        grid=patch_grid(*pair(config.image_size), config.cell_size(scale)),
        output_size=config.values_per_cell(scale),
        num_prefix_tokens=0,
    )


# What only pretraining has.
PRETRAINING_WEIGHTS = [r"decoders\..*", r"tap_norms\..*", "hog_bias"]


class LocalMIMPreTrainedModel(MAEPreTrainedModel):
    """What all classes of LocalMIM share: MAE's part for ViTs, and the same for Swin."""

    config: LocalMIMConfig

    def post_init(self):
        super().post_init()
        # The masked encoder calls the layers inside of stages, so those are no units of FSDP.
        self._no_split_modules.discard("SwinStage")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self and self.config.is_swin:
            init_swin_as_mae(self.backbone)
        else:
            super()._init_weights(module)

    def frozen_parameters(self):
        return () if self.config.is_swin else super().frozen_parameters()

    def no_weight_decay(self) -> set[str]:
        # `run_pretrain.py`, which differs between ViT and Swin.
        return {TABLE, "mask_token"} if self.config.is_swin else super().no_weight_decay()

    def _check_inputs(self, pixel_values, bool_masked_pos):
        grid = super()._check_inputs(pixel_values, bool_masked_pos)
        check_window(self.config.backbone_config, pixel_values.shape[-2:], self.config.mask_unit[0])
        return grid

    def encode_whole(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Stock Swin on whole pictures."""
        self._check_inputs(pixel_values, None)
        size = interpolation_argument(self.backbone, tuple(pixel_values.shape[-2:]))
        # Stock Swin leaves the cast to the caller.
        outputs = self.backbone(pixel_values.to(self.backbone.dtype), **size, **kwargs)
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _visible_stages(self, pixel_values, visible, grid, **kwargs):
        """`visible_swin_stages`; raises a ValueError for what these cannot do."""
        if visible.shape[1] == 0:
            raise ValueError(
                "`bool_masked_pos` masks everything: leave Swin, which has no class token, a unit to see."
            )
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError(
                "Swin records hidden states and attentions of whole pictures only: ask LocalMIMModel, without a mask."
            )
        return visible_swin_stages(self.backbone, pixel_values, visible, grid)


class LocalMIMModel(LocalMIMPreTrainedModel, MAEModel):
    """The encoder, as MAE's: without a mask the plain backbone, with one it sees the visible patches only."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = PRETRAINING_WEIGHTS

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch (Swin: the last stage's stride)
                must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row.

        Returns:
            last_hidden_state: (batch, prefix + visible, hidden), the class token first; Swin has none.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        if not self.config.is_swin:
            return super().forward(pixel_values, bool_masked_pos, **kwargs)
        if bool_masked_pos is None:
            return self.encode_whole(pixel_values, **kwargs)
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        stages = self._visible_stages(pixel_values, self._visible(bool_masked_pos, grid), grid, **kwargs)
        return BaseModelOutput(last_hidden_state=self.backbone.layernorm(stages[-1][0]))


class LocalMIMForPreTraining(LocalMIMPreTrainedModel):
    """Encoder, a decoder for each layer that predicts, and the sum of their losses on masked patches."""

    def __init__(self, config: LocalMIMConfig):
        super().__init__(config)
        # Each layer that predicts has a norm of its own; the last layer's is the backbone's.
        self.tap_norms = nn.ModuleList(
            nn.LayerNorm(config.tap_width(layer), eps=config.backbone_config.layer_norm_eps)
            for layer in config.taps[:-1]
        )
        self.decoders = nn.ModuleList(
            swin_decoder(config, layer, scale) if config.is_swin else LocalDecoder(config, scale)
            for layer, scale in zip(config.taps, config.scales, strict=True)
        )
        self.register_buffer("hog_bias", torch.zeros(len(config.taps), 2) if config.hog_random_bias else None)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.hog_bias is not None:
            # torch's own initialisation of the bias of a 3 x 3 kernel.
            init.uniform_(self.hog_bias, -1 / 3, 1 / 3)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init_as_torch(module)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> LocalMIMOutput:
        """One step of local multi-scale reconstruction.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes, two
                patches where there are cells of 2 x 2 patches, and of Swin the last stage's stride.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `LocalMIMOutput`; `losses` names the parts by the layers, counted from 0.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        taps = self.encode_taps(pixel_values, visible, grid, **kwargs)
        logits = tuple(decoder(*tap) for decoder, tap in zip(self.decoders, taps, strict=True))
        losses = self.tap_losses(pixel_values, logits, bool_masked_pos, grid) if return_loss else None
        return LocalMIMOutput(
            loss=None if losses is None else sum(losses.values()),
            losses=None if losses is None else {name: part.detach() for name, part in losses.items()},
            last_hidden_state=taps[-1][0],
            logits=logits,
            mask=bool_masked_pos,
        )

    def _check_inputs(self, pixel_values, bool_masked_pos):
        grid = super()._check_inputs(pixel_values, bool_masked_pos)
        self.config.check_grid(grid)
        return grid

    def encode_taps(
        self, pixel_values: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int], **kwargs
    ) -> list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]:
        """Of each layer that predicts: its normalised tokens, the raster positions of those of patches, and the grid.

        Returns:
            (batch, prefix + visible, hidden), int64 (batch, visible) and (rows, columns), by the layer. A visible unit
            has several tokens in Swin's lower stages.
        """
        if self.config.is_swin:
            layers = self._visible_stages(pixel_values, visible, grid, **kwargs)
        else:
            feature_maps = visible_feature_maps(self.backbone, pixel_values, visible, **kwargs)
            layers = [(tokens, visible, grid) for tokens in feature_maps[1:]]
        norms = [*self.tap_norms, self.backbone.layernorm]
        return [
            (norm(layers[index][0]), *layers[index][1:]) for norm, index in zip(norms, self.config.taps, strict=True)
        ]

    def targets(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """What each layer should predict: float32 (batch, cells, values)."""
        config = self.config
        sizes = [config.cell_size(scale) for scale in config.scales]
        if config.target == "pixel":
            cells = [patchify(pixel_values.float(), size) for size in sizes]
            return [normalize_patches(values) for values in cells] if config.norm_pix_loss else cells
        if self.hog_bias is not None:
            histograms = [
                gradient_histograms(pixel_values, size, config.hog_bins, bias)
                for size, bias in zip(sizes, self.hog_bias.float(), strict=True)
            ]
        else:
            # The larger cells are made from the smallest ones.
            finest = max(config.scales)
            smallest = gradient_histograms(pixel_values, config.cell_size(finest), config.hog_bins)
            histograms = [pooled_histograms(smallest, int(finest / scale)) for scale in config.scales]
        return [cells_to_units(F.normalize(values, dim=2)) for values in histograms]

    def tap_losses(self, pixel_values, logits, bool_masked_pos, grid) -> dict[str, torch.Tensor]:
        """Mean squared error over masked cells, of each layer (`forward_loss`).

        A cell of 2 x 2 patches counts with the share of them that is masked.
        """
        losses = {}
        for layer, scale, predicted, target in zip(
            self.config.taps, self.config.scales, logits, self.targets(pixel_values), strict=True
        ):
            error = (predicted.float() - target).square().mean(dim=-1)  # (batch, cells)
            losses[f"layer_{layer}"] = masked_mean(error, mask_of_cells(bool_masked_pos, grid, scale))
        return losses

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        For each layer that predicts what it should and what it does, in cells that are masked, in part or in whole.
        HOG is drawn as glyphs, see `hog_glyphs`; normalised pixels with the statistics of the true cells.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        grid = self._check_inputs(pixel_values, None)
        masked = patchify(pixel_values, self.config.mask_unit).masked_fill(output.mask.unsqueeze(-1), 0.0)
        panels = {"picture": pixel_values, "masked": unpatchify(masked, grid, self.config.mask_unit)}
        for layer, scale, predicted, target in zip(
            self.config.taps, self.config.scales, output.logits, self.targets(pixel_values), strict=True
        ):
            hidden = mask_of_cells(output.mask, grid, scale).unsqueeze(-1) > 0
            predicted = torch.where(hidden, predicted.float(), target)
            height, width = self.config.cell_size(scale)
            panels[f"layer {layer} (cells of {height} x {width})"] = self._drawn(predicted, scale, pixel_values)
            panels[f"true (cells of {height} x {width})"] = self._drawn(target, scale, pixel_values)
        return panels

    def _drawn(self, values: torch.Tensor, scale: float, pixel_values: torch.Tensor) -> torch.Tensor:
        height, width = size = self.config.cell_size(scale)
        cells = (pixel_values.shape[-2] // height, pixel_values.shape[-1] // width)
        if self.config.target == "hog":
            return hog_glyphs(units_to_cells(values, cells, self.config.num_channels), size, pixel_values)
        if self.config.norm_pix_loss:
            values = denormalize_patches(values, patchify(pixel_values.float(), size))
        return unpatchify(values, cells, size)


def mask_of_cells(bool_masked_pos: torch.Tensor, grid: tuple[int, int], scale: float) -> torch.Tensor:
    """The share of each cell that is masked: float (batch, cells), for `scale` cells per unit and axis."""
    mask = bool_masked_pos.float().unflatten(1, grid)
    if scale < 1:
        mask = F.avg_pool2d(mask, int(1 / scale))
    else:
        mask = mask.repeat_interleave(int(scale), 1).repeat_interleave(int(scale), 2)
    return mask.flatten(1)


class LocalMIMForImageClassification(LocalMIMPreTrainedModel, MAEForImageClassification):
    """The fine-tuning encoder, as MAE's (`models_vit.py`); Swin's likewise (`models_swin.py`)."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"backbone\.layernorm\..*", *PRETRAINING_WEIGHTS]

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Classifies pictures; see `MAEForImageClassification.forward`."""
        if not self.config.is_swin:
            return super().forward(pixel_values, labels, **kwargs)
        outputs = self.encode_whole(pixel_values, **kwargs)
        logits = self.classifier(self.fc_norm(outputs.last_hidden_state.mean(dim=1)))
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# The heads of the reference's models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {384: 6, 768: 12, 1024: 16}


def official_config(state_dict: dict[str, torch.Tensor]) -> LocalMIMConfig:
    """The config of an official pretraining checkpoint, read from its shapes.

    Raises:
        ValueError: for other checkpoints, for a ViT of an unknown width, because of its number of heads, and for Swin
            with windows of 14, which stock Swin cannot have at 224 pixels.
    """
    if "decoder.3.pred.weight" in state_dict and "encoder.norm.3.weight" in state_dict:
        return _official_swin_config(state_dict)
    if "blocks.0.attn.qkv.weight" not in state_dict or "decoder.3.pred.1.weight" not in state_dict:
        raise ValueError("The checkpoint holds no LocalMIM pretraining, neither of a ViT nor of a Swin.")
    backbone_config = official_vit_config(state_dict, OFFICIAL_HEADS)
    return LocalMIMConfig(
        backbone_config=backbone_config,
        decoder_hidden_size=state_dict["decoder.0.embed.weight"].shape[0],
        decoder_num_hidden_layers=official_depth(state_dict, "decoder.0.blocks"),
        decoder_intermediate_size=state_dict["decoder.0.blocks.0.mlp.fc1.weight"].shape[0],
        hog_bins=state_dict["decoder.3.pred.1.weight"].shape[0] // backbone_config.num_channels,
        hog_random_bias="hog_enc.0.conv.bias" in state_dict,
    )


def _official_swin_config(state_dict: dict[str, torch.Tensor]) -> LocalMIMConfig:
    # A token of the last stage is as many pixels wide as its patch convolution and three mergings make it.
    side = math.isqrt(state_dict["decoder.3.pos_embed"].shape[1])
    image_size = side * 8 * state_dict["encoder.patch_embed.proj.weight"].shape[-1]
    backbone_config = official_swin_config(state_dict, image_size, layer_norm_eps=1e-6)
    settings: dict = {"target": "pixel"}
    if "hog_enc.0.conv.weight" in state_dict:
        settings = {
            "hog_bins": state_dict["decoder.3.pred.weight"].shape[0] // backbone_config.num_channels,
            "hog_random_bias": "hog_enc.0.conv.bias" in state_dict,
        }
    return LocalMIMConfig(
        backbone_config=backbone_config,
        decoder_hidden_size=state_dict["decoder.3.embed.weight"].shape[0],
        decoder_num_hidden_layers=official_depth(state_dict, "decoder.3.blocks"),
        decoder_num_attention_heads=4,  # of all of the reference's Swins; checkpoints do not say
        decoder_intermediate_size=state_dict["decoder.3.blocks.0.mlp.fc1.weight"].shape[0],
        **settings,
    )


# Official name -> ours, of what MAE does not have.
_RENAMING = (
    (r"^(encoder\.)?norm\.3\.", "backbone.layernorm."),
    (r"^(encoder\.)?norm\.([012])\.", r"tap_norms.\2."),
    (r"^decoder\.(\d+)\.pred\.", r"decoders.\1.head."),
    (r"^decoder\.(\d+)\.", r"decoders.\1.transformer."),
    (r"^(decoders\.\d+\.transformer)\.embed\.", r"\1.embedding."),
    (r"^(decoders\.\d+\.transformer)\.pos_embed$", r"\1.position_embeddings"),
    (r"^(decoders\.\d+\.transformer)\.blocks\.", r"\1.layers."),
    (r"^(decoders\..*)\.norm1\.", r"\1.attention_norm."),
    (r"^(decoders\..*)\.norm2\.", r"\1.feed_forward_norm."),
    (r"^(decoders\..*)\.attn\.qkv\.", r"\1.attention.qkv."),
    (r"^(decoders\..*)\.attn\.proj\.", r"\1.attention.projection."),
    (r"^(decoders\..*)\.mlp\.fc1\.", r"\1.feed_forward.0."),
    (r"^(decoders\..*)\.mlp\.fc2\.", r"\1.feed_forward.2."),
)
# Swin's decoders have no head of their own behind the Transformer's.
_SWIN_RENAMING = (*_RENAMING, (r"^(decoders\.\d+)\.transformer\.", r"\1."), *SWIN_RENAMING)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: LocalMIMConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `MaskedAutoencoderViT` or `MaskedAutoencoderSwin`.
        config: of the model, which says which of the two it is.
    """
    # The Sobel kernels of the target, one per scale, and their biases.
    ours = {name: value for name, value in state_dict.items() if not name.startswith("hog_enc.")}
    if config.is_swin:
        ours = {name: value for name, value in ours.items() if not name.endswith(SWIN_BUFFERS)}
        ours |= {name: _merging_by_columns(value) for name, value in ours.items() if ".downsample." in name}
        ours = rename_weights(ours, _SWIN_RENAMING)
    else:
        ours = convert_mae_weights(rename_weights(ours, _RENAMING), config)
    biases = [name for name in state_dict if name.startswith("hog_enc.") and name.endswith(".bias")]
    return ours | ({"hog_bias": torch.stack([state_dict[name] for name in sorted(biases)])} if biases else {})


def _merging_by_columns(weight: torch.Tensor) -> torch.Tensor:
    """Weights of patch merging, (..., 4 * width): the reference's pretraining has four tokens in raster order, while
    Swin, the reference's fine-tuning included, has them column by column."""
    upper_left, upper_right, lower_left, lower_right = weight.chunk(4, dim=-1)
    return torch.cat([upper_left, lower_left, upper_right, lower_right], dim=-1)


def tiny_config() -> LocalMIMConfig:
    return LocalMIMConfig(
        backbone_config=tiny_vit(num_hidden_layers=4),
        decoder_hidden_size=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )


register_variant(
    config=LocalMIMConfig,
    pretraining=LocalMIMForPreTraining,
    model=LocalMIMModel,
    heads={AutoModelForImageClassification: LocalMIMForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
