"""SparK: a convolutional net on the visible units alone, and a U-shaped decoder that fills in the masked ones from all
of its scales.

Keyu Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023,
arXiv 2301.03580.
Reference implementation: https://github.com/keyu-tian/SparK (`pretrain/spark.py`, `encoder.py`, `decoder.py`).
"""

import math
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from transformers import ConvNextConfig, PreTrainedConfig, ResNetConfig
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from hf_masked.modeling.masked_patches import MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import last_scales_of_residual_blocks
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patch_grid, patchify, unpatchify
from hf_masked.modeling.parts.state_dicts import (
    TIMM_RESNET_RENAMING,
    official_depth,
    official_resnet_config,
    rename_weights,
)
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches
from hf_masked.modeling.parts.visible_units import STAGES, VisibleUnits, visible_stages
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import num_masked_units

NORMS = ("batch_norm", "layer_norm")


class SparKConfig(MaskedPatchesConfig):
    """Config of SparK.

    Args:
        backbone_config: a ResNet, ConvNeXt or ConvNeXt V2 config; ResNet-50 by default.
        mask_ratio: share of the units that the encoder does not see, in [0, 1). A unit is what one position of the
            encoder's last map stands for, 32 x 32 pixels. The paper's 0.6 leaves 20 of 49 visible, because its
            reference rounds; with the one rule of all masks here that takes 0.59.
        mask_kind: a name in `hf_masked.processing.masks.MASKS`.
        mask_options: further arguments of the mask function.
        norm_pix_loss: predict each unit less its mean and over its standard deviation (the paper's recipe).
        decoder_hidden_size: width at the smallest map; each block of the decoder halves it.
        densify_norm: norm of the encoder's maps before the decoder, "batch_norm" or "layer_norm"; by default the
            encoder's own kind.
        zero_init_residual: start each residual block of a ResNet as the identity (timm's default).
    """

    model_type = "hf_masked_spark"
    paper_title: ClassVar[str] = "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2301.03580"
    reference_repository: ClassVar[str] = "https://github.com/keyu-tian/SparK"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "random units, left out of every convolution and norm"
    predicts: ClassVar[str] = "pixels of the masked units"
    backbones: ClassVar[tuple[str, ...]] = tuple(STAGES)

    mask_ratio: float = 0.59
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 768
    densify_norm: str | None = None
    zero_init_residual: bool = True

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = ResNetConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        stride = self.encoder_stride
        patch = pair(getattr(self.backbone_config, "patch_size", 2))
        if patch[0] != patch[1] or patch[0] < 2 or stride & (stride - 1):
            raise ValueError(
                f"The backbone's patch_size is {patch[0]} x {patch[1]}; the decoder doubles the side of its maps "
                "until they are the picture's, which takes 2 x 2, 4 x 4 or another power of two."
            )
        if self.decoder_hidden_size % stride:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; each of the decoder's {self.num_doublings} "
                f"blocks halves it, so it must be a multiple of {stride}. The paper's is "
                f"{type(self).decoder_hidden_size}."
            )
        if self.densify_norm not in (None, *NORMS):
            raise ValueError(f"densify_norm is {self.densify_norm!r}; it must be one of {', '.join(NORMS)}, or None.")
        grid = patch_grid(*pair(self.image_size), self.mask_unit)
        if num_masked_units(grid, self.mask_ratio) == math.prod(grid):
            raise ValueError(
                f"mask_ratio={self.mask_ratio} masks all of the {grid[0]} x {grid[1]} units of {stride} pixels: "
                "choose a smaller ratio, larger pictures, or a backbone with fewer stages."
            )

    @property
    def encoder_stride(self) -> int:
        """Side in pixels of what one position of the encoder's last map stands for."""
        config = self.backbone_config
        doublings = len(config.depths) - 1
        if config.model_type == "resnet":  # whose stem takes a quarter of the side
            return 4 * 2 ** (doublings + config.downsample_in_first_stage)
        return pair(config.patch_size)[0] * 2**doublings

    @property
    def num_doublings(self) -> int:
        """Blocks of the decoder."""
        return int(math.log2(self.encoder_stride))

    @property
    def mask_unit(self) -> tuple[int, int]:
        return pair(self.encoder_stride)

    @property
    def batch_norm_of_densifiers(self) -> bool:
        own_kind = NORMS[0] if self.backbone_config.model_type == "resnet" else NORMS[1]
        return (self.densify_norm or own_kind) == NORMS[0]


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels at each position of (batch, channels, height, width)."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Densifier(nn.Module):
    """One of the encoder's maps for the decoder: normalised, with a token at masked positions, and projected.

    Args:
        input_size, output_size: widths.
        batch_norm: rather than layer norm.
        kernel_size: of the projection; None for none, where the widths agree.
    """

    def __init__(self, input_size: int, output_size: int, batch_norm: bool, kernel_size: int | None):
        super().__init__()
        self.norm = nn.BatchNorm2d(input_size) if batch_norm else ChannelLayerNorm(input_size, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, input_size, 1, 1))
        self.projection = (
            nn.Identity()
            if kernel_size is None
            else nn.Conv2d(input_size, output_size, kernel_size, padding=kernel_size // 2)
        )

    def forward(self, features: torch.Tensor, units: VisibleUnits) -> torch.Tensor:
        """(batch, input_size, n, 1) at visible positions -> (batch, output_size, height, width)."""
        return self.projection(units.spread(self.norm(features), fill=self.mask_token.flatten()))


class UpsamplingBlock(nn.Module):
    """A block of the decoder: doubles the side of a map."""

    def __init__(self, input_size: int, output_size: int):
        super().__init__()
        self.upsampling = nn.ConvTranspose2d(input_size, input_size, kernel_size=4, stride=2, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(input_size, input_size, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(input_size),
            nn.ReLU6(),
            nn.Conv2d(input_size, output_size, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(output_size),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.layers(self.upsampling(maps))


class HierarchicalDecoder(nn.Module):
    """From the encoder's maps to pixels: each block doubles the side, halves the width and meets the next larger map.

    Args:
        encoder_sizes: widths of the encoder's stages, from the largest map to the smallest.
        hidden_size: width at the smallest map.
        num_blocks: at least as many as there are stages.
        batch_norm: in the densifiers.
        num_channels: of the pictures.
    """

    def __init__(
        self, encoder_sizes: list[int], hidden_size: int, num_blocks: int, batch_norm: bool, num_channels: int
    ):
        super().__init__()
        widths = [hidden_size // 2**block for block in range(num_blocks + 1)]
        self.densifiers = nn.ModuleList()
        for number, (size, width) in enumerate(zip(reversed(encoder_sizes), widths, strict=False)):
            kernel_size = 3 if number > 0 else None if size == width else 1
            self.densifiers.append(Densifier(size, width, batch_norm, kernel_size))
        self.blocks = nn.ModuleList(UpsamplingBlock(width, half) for width, half in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], num_channels, kernel_size=1)

    def forward(self, stages: list[torch.Tensor], units: VisibleUnits) -> torch.Tensor:
        """Reconstructs pictures.

        Args:
            stages: of the encoder at visible positions, from the largest map to the smallest.

        Returns:
            (batch, channels, height, width).
        """
        maps = 0
        for number, block in enumerate(self.blocks):
            if number < len(stages):
                maps = maps + self.densifiers[number](stages[-1 - number], units)
            maps = block(maps)
        return self.head(maps)

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the reference; the projections start as torch's, norms as the identity."""
        for densifier in self.densifiers:
            init.trunc_normal_(densifier.mask_token, std=0.02, a=-0.02, b=0.02)
        for module in [*self.blocks.modules(), self.head]:
            if isinstance(module, nn.Conv2d):
                init.trunc_normal_(module.weight, std=0.02)
            elif isinstance(module, nn.ConvTranspose2d):
                init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            else:
                continue
            if module.bias is not None:
                init.zeros_(module.bias)


class SparKPreTrainedModel(MaskedPatchesModel):
    """Initialisation, freezing and the masked encoder that all classes of SparK share."""

    config: SparKConfig
    sync_batch_norm: ClassVar[bool] = True
    _no_split_modules: ClassVar[list[str]] = ["UpsamplingBlock"]
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "DDP equals one process only with SyncBatchNorm, which torch has not for CPU",
        "accumulation": "batch norm takes its statistics over each batch, and two halves are not the whole",
        "attentions": "transformers' ResNet and ConvNeXt have none",
        "gradient_checkpointing": "transformers' ResNet and ConvNeXt have none",
    }

    def post_init(self):
        super().post_init()
        # The masked encoder calls the layers inside the backbone's blocks, so those are no units of FSDP.
        self._no_split_modules &= set(type(self)._no_split_modules)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            if self.config.zero_init_residual:
                for scale in last_scales_of_residual_blocks(self.backbone):
                    init.zeros_(scale)
        elif isinstance(module, HierarchicalDecoder):
            module.init_weights()
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            init_as_torch(module)

    def frozen_parameters(self):
        # ConvNeXt's last norm belongs to its pooler, which pretraining does not use.
        if hasattr(self.backbone, "layernorm"):
            yield from self.backbone.layernorm.parameters()

    def no_weight_decay(self) -> set[str]:
        return {"mask_token"}

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[list[torch.Tensor], VisibleUnits]:
        """The features of stem and stages at visible positions, see `visible_stages`, and where those are."""
        units = VisibleUnits(self._visible(bool_masked_pos, grid), grid)
        return visible_stages(self.backbone, pixel_values, units), units


class SparKModel(SparKPreTrainedModel):
    """The encoder: without a mask the plain backbone, with one it sees the visible units only."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: SparKConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; `encoder_stride` must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row.
            output_hidden_states: return the maps of stem and stages too.

        Returns:
            last_hidden_state: (batch, hidden, rows, columns), zero at masked positions.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            outputs = self.backbone(
                pixel_values.to(self.backbone.dtype), output_hidden_states=output_hidden_states, **kwargs
            )
            return BaseModelOutput(last_hidden_state=outputs.last_hidden_state, hidden_states=outputs.hidden_states)
        stages, units = self.encode(pixel_values, bool_masked_pos, grid)
        return BaseModelOutput(
            last_hidden_state=units.spread(stages[-1]),
            hidden_states=tuple(map(units.spread, stages)) if output_hidden_states else None,
        )


class SparKForPreTraining(SparKPreTrainedModel):
    """Encoder, decoder and the loss on masked units."""

    def __init__(self, config: SparKConfig):
        super().__init__(config)
        self.decoder = HierarchicalDecoder(
            encoder_sizes=list(config.backbone_config.hidden_sizes),
            hidden_size=config.decoder_hidden_size,
            num_blocks=config.num_doublings,
            batch_norm=config.batch_norm_of_densifiers,
            num_channels=config.num_channels,
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> MaskedPreTrainingOutput:
        """One step of sparse masked modelling.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; `encoder_stride` must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.
            output_hidden_states: return the maps of stem and stages too.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, unit height * unit width * channels) in `patchify`
            order, of normalised pixels with `norm_pix_loss`; `last_hidden_state` as in `SparKModel`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        stages, units = self.encode(pixel_values, bool_masked_pos, grid)
        reconstruction = self.decoder(stages[1:], units)  # (batch, channels, height, width)
        logits = patchify(reconstruction, self.config.mask_unit)  # (batch, units, values)
        loss = self.loss(pixel_values, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=units.spread(stages[-1]),
            hidden_states=tuple(map(units.spread, stages)) if output_hidden_states else None,
            logits=logits,
            mask=bool_masked_pos,
        )

    def loss(self, pixel_values: torch.Tensor, logits: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the pixels of masked units (paper, section 3.3; `SparK.forward`)."""
        target = patchify(pixel_values.float(), self.config.mask_unit)  # (batch, units, values)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        return masked_mean((logits.float() - target).square().mean(dim=-1), bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        With `norm_pix_loss` the predictions are drawn with the mean and deviation of the TRUE units, which the model
        does not know; the panel's name says so.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        grid, unit = self._check_inputs(pixel_values, None), self.config.mask_unit
        units, predicted = patchify(pixel_values.float(), unit), output.logits.float()
        if self.config.norm_pix_loss:
            predicted = denormalize_patches(predicted, units)
        hidden = output.mask.unsqueeze(-1)
        panels = {
            "picture": units,
            "masked": units.masked_fill(hidden, 0.0),
            "reconstruction" + (" (true unit statistics)" if self.config.norm_pix_loss else ""): torch.where(
                hidden, predicted, units
            ),
        }
        return {name: unpatchify(panel, grid, unit) for name, panel in panels.items()}


# Official name -> ours.
_RENAMING = (
    (r"^sparse_encoder\.sp_cnn\.", ""),
    *TIMM_RESNET_RENAMING,
    (r"^downsample_layers\.0\.0\.", "backbone.embeddings.patch_embeddings."),
    (r"^downsample_layers\.0\.1\.", "backbone.embeddings.layernorm."),
    (r"^downsample_layers\.(\d+)\.(\d+)\.", r"backbone.encoder.stages.\1.downsampling_layer.\2."),
    (r"^stages\.(\d+)\.(\d+)\.norm\.", r"stages.\1.\2.layernorm."),
    (r"^stages\.(\d+)\.(\d+)\.gamma$", r"stages.\1.\2.layer_scale_parameter"),
    (r"^stages\.(\d+)\.(\d+)\.", r"backbone.encoder.stages.\1.layers.\2."),
    (r"^densify_norms\.(\d+)\.", r"decoder.densifiers.\1.norm."),
    (r"^densify_projs\.(\d+)\.", r"decoder.densifiers.\1.projection."),
    (r"^mask_tokens\.(\d+)$", r"decoder.densifiers.\1.mask_token"),
    (r"^dense_decoder\.dec\.(\d+)\.up_sample\.", r"decoder.blocks.\1.upsampling."),
    (r"^dense_decoder\.dec\.(\d+)\.conv\.", r"decoder.blocks.\1.layers."),
    (r"^dense_decoder\.proj\.", "decoder.head."),
)
# Buffers of the reference that nothing reads.
_UNUSED = ("imn_m", "imn_s", "norm_black")


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: SparKConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `SparK`, or of its encoder alone, a ResNet of timm or the official ConvNeXt.
        config: of the model, for the width of ConvNeXt's last norm, which checkpoints lack and which starts as the
            identity.
    """
    weights = rename_weights({name: value for name, value in state_dict.items() if name not in _UNUSED}, _RENAMING)
    if config.backbone_config.model_type != "resnet":
        width = config.backbone_config.hidden_sizes[-1]
        weights |= {"backbone.layernorm.weight": torch.ones(width), "backbone.layernorm.bias": torch.zeros(width)}
    return weights


def official_config(state_dict: dict[str, torch.Tensor]) -> SparKConfig:
    """The config of an official checkpoint, read from its names and shapes."""
    encoder = {name.removeprefix("sparse_encoder.sp_cnn."): value for name, value in state_dict.items()}
    make = official_resnet_config if "conv1.weight" in encoder else _official_convnext_config
    settings: dict = {"backbone_config": make(encoder)}
    if "mask_tokens.0" in state_dict:
        upsampling = state_dict["dense_decoder.dec.0.up_sample.weight"]
        norm = "batch_norm" if "densify_norms.0.running_mean" in state_dict else "layer_norm"
        settings |= {"decoder_hidden_size": upsampling.shape[0], "densify_norm": norm}
    return SparKConfig(**settings)


def _official_convnext_config(encoder: dict[str, torch.Tensor]) -> PreTrainedConfig:
    stages = range(official_depth(encoder, "stages"))
    kernel = encoder["downsample_layers.0.0.weight"]
    return ConvNextConfig(
        num_channels=kernel.shape[1],
        patch_size=kernel.shape[2],
        num_stages=len(stages),
        hidden_sizes=[encoder[f"stages.{stage}.0.dwconv.weight"].shape[0] for stage in stages],
        depths=[official_depth(encoder, f"stages.{stage}") for stage in stages],
    )


def tiny_config() -> SparKConfig:
    return SparKConfig(
        backbone_config=ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=32
        ),
        decoder_hidden_size=16,
        # Identity blocks have no gradient inside.
        zero_init_residual=False,
    )


register_variant(
    config=SparKConfig,
    pretraining=SparKForPreTraining,
    model=SparKModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
