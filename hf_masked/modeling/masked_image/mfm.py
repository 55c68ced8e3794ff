"""MFM: take the low or the high frequencies out of a picture, encode the rest, and regress the missing coefficients.

Jiahao Xie et al., "Masked Frequency Modeling for Self-Supervised Visual Pre-Training", ICLR 2023, arXiv 2206.07706.
Reference implementation: https://github.com/Jiahao000/MFM (`models/mfm.py`, `models/frequency_loss.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import MaskedImageModelingOutput
from hf_masked.modeling.parts.backbones import (
    check_window,
    feature_map,
    last_scales_of_residual_blocks,
    output_stride,
    tiny_vit,
)
from hf_masked.modeling.parts.beit import init_beit
from hf_masked.modeling.parts.heads import PixelShuffleHead, init_as_torch
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import check_mask, check_pixel_values, pair
from hf_masked.modeling.parts.pooling import interpolation_argument
from hf_masked.modeling.parts.state_dicts import (
    TIMM_RESNET_RENAMING,
    TIMM_VIT_RENAMING,
    official_resnet_config,
    official_vit_config,
    rename_weights,
)
from hf_masked.modeling.registry import register_variant
from hf_masked.normalization import mean_and_std
from hf_masked.randomness import model_draw

# How far beyond [0, 1] rounding may take pixels whose normalisation is undone.
TOLERANCE = 0.05

# Decades of magnitude between black and white in drawings of spectra.
DECADES = 4


class MFMConfig(VariantConfig):
    """Config of MFM.

    Args:
        backbone_config: of a transformer or a convolutional net that returns tokens on a grid or a map; ViT-B/16 by
            default.
        mask_radius: radius of the disc of low frequencies, in cycles per picture (paper, section 3.2).
        mask_radius_outer: the low-pass filter keeps what lies at this radius and beyond, too, so that it removes a
            band; None for no such bound.
        low_pass_probability: of pictures whose high frequencies are taken out; the others lose the low ones. The
            paper's is 0.5 for ViTs and 0.3 for ResNet-50.
        loss_gamma: exponent of the distance between coefficients.
        image_mean, image_std: with which `pixel_values` are normalised, one number per channel or one for all: the
            filter works on pixels in [0, 1]. By default ImageNet's for three channels and 0.5 for others, as the
            processor's; the processor takes them over.
    """

    model_type = "hf_masked_mfm"
    paper_title: ClassVar[str] = "Masked Frequency Modeling for Self-Supervised Visual Pre-Training"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2206.07706"
    reference_repository: ClassVar[str] = "https://github.com/Jiahao000/MFM"
    weights_licence: ClassVar[str] = "S-Lab License 1.0 (non-commercial)"
    masks: ClassVar[str] = "low or high frequencies of the whole picture"
    predicts: ClassVar[str] = "the missing frequencies"
    backbones: ClassVar[tuple[str, ...]] = ("vit", "deit", "swin", "swinv2", "resnet", "convnext", "convnextv2")

    mask_radius: float = 16.0
    mask_radius_outer: float | None = None
    low_pass_probability: float = 0.5
    loss_gamma: float = 1.0
    image_mean: list[float] | float | None = None
    image_std: list[float] | float | None = None

    def check(self) -> None:
        super().check()
        height, width = pair(self.image_size)
        if not 0 < self.mask_radius <= min(height, width) / 2:
            raise ValueError(
                f"mask_radius is {self.mask_radius}; for pictures of {height} x {width} pixels it must lie in "
                f"(0, {min(height, width) / 2}]. The paper's is 16 at 224 pixels."
            )
        if self.mask_radius_outer is not None and self.mask_radius_outer <= self.mask_radius:
            raise ValueError(
                f"mask_radius_outer is {self.mask_radius_outer}; it must exceed mask_radius={self.mask_radius}."
            )
        if not 0.0 <= self.low_pass_probability <= 1.0:
            raise ValueError(f"low_pass_probability is {self.low_pass_probability}; a probability lies in [0, 1].")
        if self.loss_gamma <= 0:
            raise ValueError(f"loss_gamma is {self.loss_gamma}; it must be positive. The paper's is 1.")
        mean_and_std(self.image_mean, self.image_std, self.num_channels)  # which raises
        check_window(self.backbone_config, (height, width), self.encoder_stride)

    @property
    def encoder_stride(self) -> int:
        """Side in pixels of a cell of the encoder's output."""
        return output_stride(self.backbone_config)

    @property
    def normalization(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of each channel."""
        return mean_and_std(self.image_mean, self.image_std, self.num_channels)

    def processor_settings(self) -> dict:
        # The whole picture is one mask unit: one number per sample decides which frequencies it loses.
        mean, std = self.normalization
        whole = {"mask_kind": "model", "mask_unit": pair(self.image_size)}
        return super().processor_settings() | whole | {"image_mean": mean, "image_std": std}


@dataclass
class MFMOutput(MaskedImageModelingOutput):
    """Output of `MFMForPreTraining`.

    Args:
        reconstruction: (batch, channels, height, width), normalised as the input. Only its missing frequencies count.
        mask: bool (batch, height * width), True = a missing coefficient, raster order with frequency zero in the
            middle (at height // 2, width // 2).
        corrupted: float32 (batch, channels, height, width), what the encoder saw, normalised as the input.
    """

    corrupted: torch.Tensor | None = None


def missing_in_low_pass(
    size: tuple[int, int], radius: float, outer_radius: float | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """What a low-pass filter removes: bool (height, width), frequency zero in the middle (section 3.2)."""
    row, column = (torch.arange(side, device=device) - side // 2 for side in size)
    distance = row[:, None] ** 2 + column[None, :] ** 2
    missing = distance >= radius**2
    return missing if outer_radius is None else missing & (distance < outer_radius**2)


def frequency_filter(pictures: torch.Tensor, missing: torch.Tensor) -> torch.Tensor:
    """Pictures without some of their frequencies (section 3.2).

    Args:
        pictures: float32 (batch, channels, height, width).
        missing: bool (batch, height * width), True = removed, frequency zero in the middle; symmetric about it.

    Returns:
        float32 of the shape of `pictures`; of numbers in [0, 1] some may leave that range.
    """
    missing = torch.fft.ifftshift(missing.unflatten(1, (1, *pictures.shape[-2:])), dim=(-2, -1))
    return torch.fft.ifft2(torch.fft.fft2(pictures).masked_fill(missing, 0.0)).real


def frequency_distance(prediction: torch.Tensor, target: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """Distance between the coefficients of two batches of pictures, to the power of `gamma` (section 3.4).

    Args:
        prediction, target: (batch, channels, height, width).

    Returns:
        float32 of that shape, frequency zero in the middle; of the orthonormal transform.
    """
    # In float32: half precision has the transform for few sizes. It is linear, so that one will do.
    difference = torch.fft.fft2(prediction.float() - target.float(), norm="ortho")
    difference = torch.fft.fftshift(difference, dim=(-2, -1))
    # The reference's 1e-12 keeps the gradient finite where both agree.
    return (difference.real.square() + difference.imag.square() + 1e-12).sqrt() ** gamma


class MFMPreTrainedModel(VariantModel):
    """Initialisation, weight decay and the encoder that all classes of MFM share."""

    config: MFMConfig
    _no_split_modules: ClassVar[list[str]] = [
        *("ViTLayer", "DeiTLayer", "SwinStage", "Swinv2Stage"),
        *("ResNetConvLayer", "ResNetShortCut", "ConvNextLayer", "ConvNextV2Layer"),
    ]
    _supports_flash_attn = False
    # What the reference's loss is: a ratio of sums over the batch, whose pictures miss unequal numbers of frequencies.
    declined_checks: ClassVar[dict[str, str]] = dict.fromkeys(
        ("ddp", "accumulation"),
        "the loss is a mean over all missing frequencies of a batch, of which low-pass pictures have many times as "
        "many, and so no mean over its halves",
    )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PixelShuffleHead):
            init_as_torch(module[0])
        elif module is self and self.config.backbone_config.model_type in ("vit", "deit"):
            init_beit(self.backbone)
        elif module is self:
            # As timm begins a ResNet; other backbones begin as transformers has them.
            for scale in last_scales_of_residual_blocks(self.backbone):
                init.zeros_(scale)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "distillation_token", "position_embeddings"}

    def _check_inputs(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> None:
        """Raises a ValueError for inputs that do not fit."""
        config, stride = self.config, self.config.encoder_stride
        check_pixel_values(pixel_values, config.num_channels, (stride, stride))
        check_window(config.backbone_config, pixel_values.shape[-2:], stride)
        if bool_masked_pos is not None:
            check_mask(bool_masked_pos, pixel_values.shape[0], pixel_values.shape[-2:])

    def encode(self, pictures: torch.Tensor, **kwargs):
        """The stock backbone's output for pictures of any size."""
        size = interpolation_argument(self.backbone, tuple(pictures.shape[-2:]))
        # Some stock models leave the cast to the caller.
        return self.backbone(pictures.to(self.backbone.dtype), **size, **kwargs)


class MFMModel(MFMPreTrainedModel):
    """The encoder on whole pictures: the plain backbone."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: MFMConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; `encoder_stride` must divide both sizes.
            kwargs: of the backbone's `forward`.

        Returns:
            last_hidden_state: (batch, prefix + patches, hidden) of ViTs, (batch, cells, hidden) of Swin, a map
                (batch, hidden, rows, columns) of convolutional nets.

        Raises:
            ValueError: for other channels or sizes.
        """
        self._check_inputs(pixel_values)
        outputs = self.encode(pixel_values, **kwargs)
        return BaseModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
        )


class MFMForPreTraining(MFMPreTrainedModel):
    """Filter, encoder, one linear layer from each of its cells to that cell's pixels, and the loss on frequencies."""

    def __init__(self, config: MFMConfig):
        super().__init__(config)
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
    ) -> MFMOutput:
        """One step of masked frequency modelling.

        Args:
            pixel_values: float (batch, channels, height, width), normalised with the config's `image_mean` and
                `image_std`; `encoder_stride` must divide both sizes.
            bool_masked_pos: bool (batch, height * width), True = a coefficient to remove, frequency zero in the
                middle, symmetric about it; drawn here by default.
            noise: float (batch, 1), numbers in [0, 1): below `low_pass_probability` the high frequencies go, else the
                low ones.
            generator: to draw these numbers from.
            return_loss: whether to compute the loss.
            kwargs: of the backbone's `forward`.

        Returns:
            `MFMOutput`.

        Raises:
            ValueError: for other channels, sizes or mask shapes, and for pixels outside of [0, 1].
        """
        self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, noise, generator)
        corrupted = self.corrupt(pixel_values, bool_masked_pos)
        outputs = self.encode(corrupted, **kwargs)
        cells = feature_map(outputs.last_hidden_state, pixel_values.shape[-2:], self.config.encoder_stride)
        reconstruction = self.decoder(cells)
        loss = self.loss(pixel_values, reconstruction, bool_masked_pos) if return_loss else None
        return MFMOutput(
            loss=loss,
            losses=None if loss is None else {"frequencies": loss.detach()},
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            reconstruction=reconstruction,
            mask=bool_masked_pos,
            corrupted=corrupted,
        )

    def draw_mask(self, pixel_values, noise=None, generator=None) -> torch.Tensor:
        """bool (batch, height * width): from `noise`, from `generator`, or as `model_draw` says."""
        config = self.config
        draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        low_pass = draw(1) < config.low_pass_probability  # (batch, 1)
        missing = missing_in_low_pass(
            pixel_values.shape[-2:], config.mask_radius, config.mask_radius_outer, pixel_values.device
        ).flatten()  # (height * width)
        return torch.where(low_pass, missing, ~missing)

    def corrupt(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Removes frequencies from the pixels in [0, 1], clamps to that range and normalises (`frequency_transform`).

        Returns:
            float32 (batch, channels, height, width).
        """
        mean, std = self._normalization(pixel_values)
        pixels = pixel_values.float() * std + mean
        if not torch.compiler.is_compiling():
            self._check_range(pixels)
        return (frequency_filter(pixels, bool_masked_pos).clamp(0, 1) - mean) / std

    def _normalization(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """Mean and deviation, float32 (channels, 1, 1)."""
        return [torch.tensor(v, device=pixel_values.device).view(-1, 1, 1) for v in self.config.normalization]

    def _check_range(self, pixels: torch.Tensor) -> None:
        low, high = (extreme.item() for extreme in pixels.aminmax())
        if low < -TOLERANCE or high > 1 + TOLERANCE:
            mean, std = self.config.normalization
            raise ValueError(
                f"With mean {mean} and deviation {std} `pixel_values` stand for pixels from {low:.2f} to {high:.2f}; "
                "they must lie in [0, 1]: set the config's image_mean and image_std to the processor's (in a recipe "
                "under `model:`, from where the processor takes them)."
            )

    def loss(self, pixel_values, reconstruction, bool_masked_pos) -> torch.Tensor:
        """Mean distance over the missing coefficients of the batch and their channels (equation 6; `MFM.forward`)."""
        distance = frequency_distance(reconstruction, pixel_values, self.config.loss_gamma)
        return masked_mean(distance.mean(dim=1).flatten(1), bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        The reconstruction has the true frequencies where the encoder was given them. Spectra are drawn by the
        logarithm of the magnitude, frequency zero in the middle, white at the largest of the picture's own.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        pictures = pixel_values.float()
        given = frequency_filter(pictures, output.mask)
        predicted = frequency_filter(output.reconstruction.float(), ~output.mask)
        return {
            "picture": pixel_values,
            "corrupted": output.corrupted,
            "given spectrum": self._drawn_spectrum(given, pictures),
            "reconstruction (given + predicted)": given + predicted,
            "predicted spectrum": self._drawn_spectrum(predicted, pictures),
            "missing spectrum": self._drawn_spectrum(pictures - given, pictures),
        }

    def _drawn_spectrum(self, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """A part of a picture's spectrum, on the scale of the whole."""
        magnitude, largest = (torch.fft.fft2(pictures).abs() for pictures in (part, whole))
        relative = magnitude / largest.amax(dim=(1, 2, 3), keepdim=True)
        shade = (1 + relative.log10() / DECADES).clamp(0, 1)
        mean, std = self._normalization(part)
        return (torch.fft.fftshift(shade, dim=(-2, -1)) - mean) / std


# The heads of the released models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {384: 6, 768: 12}

# Official name -> ours.
_RENAMING = (
    (r"^encoder\.", ""),
    *TIMM_VIT_RENAMING,
    *TIMM_RESNET_RENAMING,
    (r"^blocks\.(\d+)\.attn\.([qv])_bias$", r"backbone.layers.\1.attention.\2_proj.bias"),
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^norm\.", "backbone.layernorm."),
)


def official_config(state_dict: dict[str, torch.Tensor]) -> MFMConfig:
    """The config of an official pretraining checkpoint of a ViT or ResNet, read from its shapes.

    Raises:
        ValueError: if it holds neither, or a ViT of an unknown width, because of its number of heads.
    """
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in state_dict.items() if name[:8] == "encoder."}
    if "pos_embed" in encoder:
        return MFMConfig(backbone_config=official_vit_config(encoder, OFFICIAL_HEADS))
    if "layer1.0.conv1.weight" in encoder:
        return MFMConfig(backbone_config=official_resnet_config(encoder), low_pass_probability=0.3)
    raise ValueError(
        "The checkpoint holds no pretraining of a ViT or ResNet: neither encoder.pos_embed nor encoder.layer1. "
        "Fine-tuned checkpoints are not converted."
    )


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: MFMConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    The reference's ViT has no bias of the keys, which softmax would cancel: ours is zero.

    Args:
        state_dict: of the reference's `MFM`, encoder and decoder.
        config: unused here; other variants' conversions need it.
    """
    converted = rename_weights(state_dict, _RENAMING)
    queries = [name for name in converted if name.endswith(".q_proj.bias")]
    return converted | {name.replace("q_proj", "k_proj"): torch.zeros_like(converted[name]) for name in queries}


def tiny_config() -> MFMConfig:
    return MFMConfig(backbone_config=tiny_vit(), mask_radius=4.0)


def example_inputs(config: MFMConfig, batch: int) -> dict[str, torch.Tensor]:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in config.normalization)
    return {"pixel_values": (torch.rand(batch, config.num_channels, *pair(config.image_size)) - mean) / std}


register_variant(
    config=MFMConfig,
    pretraining=MFMForPreTraining,
    model=MFMModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
