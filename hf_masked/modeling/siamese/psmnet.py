"""PSMNet: stereo matching. One encoder reads both pictures of a rectified pair, a volume pairs their features at every
disparity, stacked 3-D hourglasses regularise it, and the expected disparity of each pixel comes out.

Jia-Ren Chang and Yong-Sheng Chen, "Pyramid Stereo Matching Network", CVPR 2018, arXiv 1803.08669. Reference
implementation: https://github.com/JiaRenChang/PSMNet (`models/submodule.py`, `models/stackhourglass.py`,
`models/basic.py`, `main.py`, `finetune.py`).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from transformers.utils import ModelOutput, can_return_tuple

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import check_pixel_values
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights
from hf_masked.modeling.parts.stereo import concat_cost_volume, soft_argmin, warp_to_left
from hf_masked.modeling.registry import register_variant

AGGREGATIONS = ("stackhourglass", "basic")

# Features have a quarter of the picture's side, and an hourglass halves them twice.
FEATURE_STRIDE = 4
SIZE_MULTIPLE = 16


class ConvLayer(nn.Module):
    """A convolution, batch norm, and ReLU unless it is switched off.

    Args:
        convolution: of 2 or 3 dimensions, transposed or not.
        activation: ReLU at the end.
    """

    def __init__(self, convolution: nn.Module, activation: bool = True):
        super().__init__()
        norm = nn.BatchNorm2d if convolution.weight.ndim == 4 else nn.BatchNorm3d
        self.convolution = convolution
        self.normalization = norm(convolution.out_channels)
        self.activation = activation

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.normalization(self.convolution(hidden))
        return hidden.relu() if self.activation else hidden


def conv2d(before: int, after: int, kernel: int = 3, stride: int = 1, dilation: int = 1, activation: bool = True):
    """A 2-D layer that keeps the size, but for its stride."""
    padding = dilation * (kernel // 2)
    return ConvLayer(nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False), activation)


def conv3d(before: int, after: int, stride: int = 1, activation: bool = True) -> ConvLayer:
    """A 3-D layer of kernels of 3."""
    return ConvLayer(nn.Conv3d(before, after, 3, stride, padding=1, bias=False), activation)


def double3d(before: int, after: int) -> ConvLayer:
    """A transposed 3-D layer that doubles each side, without ReLU."""
    convolution = nn.ConvTranspose3d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False)
    return ConvLayer(convolution, activation=False)


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Convolutions are normal with deviation sqrt(2 / (kernel volume * output channels)); transposed ones, which the
    reference does not mention, and norms as in torch."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        outputs = math.prod(module.kernel_size) * module.out_channels
        init.normal_(module.weight, std=math.sqrt(2 / outputs))
    else:
        init_as_torch(module)


class PSMNetFeaturesConfig(PreTrainedConfig):
    """Config of the paper's encoder (table 1): a residual net with a pyramid of pooled maps.

    Args:
        num_channels: of the pictures.
        image_size: (height, width) of the crops in training.
        feature_channels: of the stem and of the four stages.
        num_blocks: residual blocks in each stage.
        pool_sizes: sides of the pools, in pixels of the map, the largest first.
        spp_channels: of each pooled map.
        fusion_channels: of the layer between what is joined and the output.
        hidden_size: channels of the output.
        align_corners: of the upsampling of pooled maps. The released weights were trained with True.
    """

    model_type = "hf_masked_psmnet_features"

    num_channels: int = 3
    image_size: tuple[int, int] | list[int] | int = (256, 512)
    feature_channels: tuple[int, ...] | list[int] = (32, 32, 64, 128, 128)
    num_blocks: tuple[int, ...] | list[int] = (3, 16, 3, 3)
    pool_sizes: tuple[int, ...] | list[int] = (64, 32, 16, 8)
    spp_channels: int = 32
    fusion_channels: int = 128
    hidden_size: int = 32
    align_corners: bool = True


class PSMNetResidualBlock(nn.Module):
    """Two layers and a shortcut; no ReLU after the addition."""

    def __init__(self, before: int, after: int, stride: int, dilation: int):
        super().__init__()
        self.layers = nn.Sequential(
            conv2d(before, after, stride=stride, dilation=dilation),
            conv2d(after, after, dilation=dilation, activation=False),
        )
        same = stride == 1 and before == after
        self.shortcut = nn.Identity() if same else conv2d(before, after, kernel=1, stride=stride, activation=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layers(hidden) + self.shortcut(hidden)


class PSMNetFeatures(PreTrainedModel):
    """The encoder of single pictures."""

    config: PSMNetFeaturesConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = ["PSMNetResidualBlock"]

    def __init__(self, config: PSMNetFeaturesConfig):
        super().__init__(config)
        first, *channels = config.feature_channels
        self.stem = nn.Sequential(
            conv2d(config.num_channels, first, stride=2), conv2d(first, first), conv2d(first, first)
        )
        self.stages = nn.ModuleList()
        shapes = zip(pairwise(config.feature_channels), config.num_blocks, (1, 2, 1, 1), (1, 1, 1, 2), strict=True)
        for (before, after), blocks, stride, dilation in shapes:
            stage = [PSMNetResidualBlock(before, after, stride, dilation)]
            stage += [PSMNetResidualBlock(after, after, 1, dilation) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(*stage))
        self.pyramid = nn.ModuleList(conv2d(channels[3], config.spp_channels, kernel=1) for _ in config.pool_sizes)
        joined = channels[1] + channels[3] + len(config.pool_sizes) * config.spp_channels
        self.fusion = conv2d(joined, config.fusion_channels)
        self.projection = nn.Conv2d(config.fusion_channels, config.hidden_size, 1, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs
    ) -> BaseModelOutputWithNoAttention:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width).
            output_hidden_states: also return the output of the stem and of each stage.

        Returns:
            last_hidden_state: (batch, hidden_size, height / 4, width / 4).

        Raises:
            ValueError: for another rank or other channels.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        states = [self.stem(pixel_values.to(self.projection.weight.dtype))]
        for stage in self.stages:
            states.append(stage(states[-1]))
        context = states[4]
        pooled = [self._pooled(context, size, layer) for size, layer in self._pools()]
        hidden = torch.cat([states[2], context, *pooled], dim=1)
        return BaseModelOutputWithNoAttention(
            last_hidden_state=self.projection(self.fusion(hidden)),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _pools(self):
        """Sizes and layers, the smallest pool first, as their maps are joined."""
        return reversed(list(zip(self.config.pool_sizes, self.pyramid, strict=True)))

    def _pooled(self, context: torch.Tensor, size: int, layer: nn.Module) -> torch.Tensor:
        """The map pooled, changed and brought back to its size; a pool is no larger than the map."""
        sides = context.shape[-2:]
        pooled = layer(F.avg_pool2d(context, [min(size, side) for side in sides]))
        return F.interpolate(pooled, size=sides, mode="bilinear", align_corners=self.config.align_corners)


class PSMNetConfig(VariantConfig):
    """Config of PSMNet.

    Args:
        backbone_config: of the encoder, `PSMNetFeaturesConfig`.
        max_disparity: disparities are 0 to this, exclusive, in pixels; a multiple of 16.
        aggregation: what regularises the cost volume: "stackhourglass", or the ablation's residual blocks, "basic".
        volume_channels: of the 3-D layers.
        num_hourglasses: of "stackhourglass"; each gives a prediction.
        num_residual_blocks: of "basic", beyond the first layers.
        loss_weights: of the predictions of the hourglasses, the last one's last (section 3.5, table 4); "basic" has
            the last weight alone.
        mask_zero_disparity: the disparity 0 says "unknown", as KITTI's does; otherwise it is a value as any other.
        align_corners: of all upsampling; by default the encoder's. True fits the released weights, whose code left it
            to the torch of its time.
    """

    model_type = "hf_masked_psmnet"
    paper_title: ClassVar[str] = "Pyramid Stereo Matching Network"
    paper_year: ClassVar[int] = 2018
    arxiv_id: ClassVar[str] = "1803.08669"
    reference_repository: ClassVar[str] = "https://github.com/JiaRenChang/PSMNet"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "nothing: the two pictures of a stereo pair"
    predicts: ClassVar[str] = "the disparity of each pixel (supervised)"
    backbones: ClassVar[tuple[str, ...]] = (PSMNetFeaturesConfig.model_type,)
    processor: ClassVar[str] = "StereoImageProcessor"
    sample: ClassVar[str] = "stereo"

    max_disparity: int = 192
    aggregation: str = "stackhourglass"
    volume_channels: int = 32
    num_hourglasses: int = 3
    num_residual_blocks: int = 4
    loss_weights: tuple[float, ...] | list[float] = (0.5, 0.7, 1.0)
    mask_zero_disparity: bool = True
    align_corners: bool | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = PSMNetFeaturesConfig()
        super().__post_init__(**kwargs)
        if self.align_corners is None:
            self.align_corners = self.backbone_config.align_corners
        self.backbone_config.align_corners = self.align_corners

    def check(self) -> None:
        super().check()
        if self.max_disparity < SIZE_MULTIPLE or self.max_disparity % SIZE_MULTIPLE:
            raise ValueError(
                f"max_disparity is {self.max_disparity}; it must be a multiple of {SIZE_MULTIPLE}, for example 192."
            )
        if self.aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation is {self.aggregation!r}; it must be one of {', '.join(AGGREGATIONS)}.")
        if self.aggregation == "stackhourglass" and len(self.loss_weights) != self.num_hourglasses:
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} weights and there are {self.num_hourglasses} hourglasses: "
                "give one for each."
            )


@dataclass
class PSMNetModelOutput(ModelOutput):
    """Output of `PSMNetModel`.

    Args:
        last_hidden_state: (batch, 2, channels, height / 4, width / 4), of the left and of the right picture.
        cost_volume: (batch, 2 * channels, max_disparity / 4, height / 4, width / 4).
    """

    last_hidden_state: torch.Tensor | None = None
    cost_volume: torch.Tensor | None = None


@dataclass
class StereoMatchingOutput(PreTrainingOutput):
    """Output of `PSMNetForStereoMatching`; `last_hidden_state` is that of the left pictures.

    Args:
        predicted_disparity: float32 (batch, height, width) of the left view, in pixels.
        intermediate_disparities: those of the hourglasses before the last, in training and with labels.
        end_point_error: scalar, the mean error of `predicted_disparity` over the valid pixels, with labels.
    """

    predicted_disparity: torch.Tensor | None = None
    intermediate_disparities: tuple[torch.Tensor, ...] | None = None
    end_point_error: torch.Tensor | None = None


class PSMNetHourglass(nn.Module):
    """Down to a quarter of each side and back, with joins to the hourglass before (table 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.down1 = conv3d(channels, 2 * channels, stride=2)
        self.keep1 = conv3d(2 * channels, 2 * channels, activation=False)
        self.down2 = conv3d(2 * channels, 2 * channels, stride=2)
        self.keep2 = conv3d(2 * channels, 2 * channels)
        self.up1 = double3d(2 * channels, 2 * channels)
        self.up2 = double3d(2 * channels, channels)

    def forward(
        self, hidden: torch.Tensor, skip: torch.Tensor | None = None, previous: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, channels, disparities, height, width) to the same, and what later hourglasses take.

        Args:
            hidden: the volume.
            skip: added at half size on the way up, `before` of the first hourglass; by default its own `before`.
            previous: added at half size on the way down, `after` of the hourglass before.

        Returns:
            (output, before, after), the last two at half size, before and after the lowest point.
        """
        half = self.keep1(self.down1(hidden))
        before = (half if previous is None else half + previous).relu()
        lowest = self.keep2(self.down2(before))
        after = (self.up1(lowest) + (before if skip is None else skip)).relu()
        return self.up2(after), before, after


class PSMNetClassifier(nn.Sequential):
    """A volume to one score for each place."""

    def __init__(self, channels: int):
        super().__init__(conv3d(channels, channels), nn.Conv3d(channels, 1, 3, padding=1, bias=False))


class StackedHourglasses(nn.Module):
    """The cost volume to one volume of scores per hourglass, each the sum of those so far."""

    def __init__(self, in_channels: int, channels: int, num_hourglasses: int):
        super().__init__()
        self.entry = nn.Sequential(conv3d(in_channels, channels), conv3d(channels, channels))
        self.residual = nn.Sequential(conv3d(channels, channels), conv3d(channels, channels, activation=False))
        self.hourglasses = nn.ModuleList(PSMNetHourglass(channels) for _ in range(num_hourglasses))
        self.classifiers = nn.ModuleList(PSMNetClassifier(channels) for _ in range(num_hourglasses))

    def forward(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(batch, in_channels, disparities, height, width) to (batch, 1, disparities, height, width) each."""
        entry = self.entry(volume)
        entry = self.residual(entry) + entry
        hidden, skip, previous, scores = entry, None, None, []
        for hourglass, classifier in zip(self.hourglasses, self.classifiers, strict=True):
            hidden, before, previous = hourglass(hidden, skip, previous)
            skip = before if skip is None else skip  # the first one's, for all that follow
            hidden = hidden + entry
            score = classifier(hidden)
            scores.append(score + scores[-1] if scores else score)
        return scores


class ResidualAggregation(nn.Module):
    """The ablation without hourglasses (`basic.py`): residual blocks and one volume of scores."""

    def __init__(self, in_channels: int, channels: int, num_blocks: int):
        super().__init__()
        self.entry = nn.Sequential(conv3d(in_channels, channels), conv3d(channels, channels))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv3d(channels, channels), conv3d(channels, channels, activation=False))
            for _ in range(num_blocks)
        )
        self.classifier = PSMNetClassifier(channels)

    def forward(self, volume: torch.Tensor) -> list[torch.Tensor]:
        """(batch, in_channels, disparities, height, width) to one (batch, 1, disparities, height, width)."""
        hidden = self.entry(volume)
        for block in self.blocks:
            hidden = block(hidden) + hidden
        return [self.classifier(hidden)]


class PSMNetPreTrainedModel(VariantModel):
    """The encoder, and what it makes of pairs."""

    config: PSMNetConfig
    supports_gradient_checkpointing = False
    _no_split_modules: ClassVar[list[str]] = [*PSMNetFeatures._no_split_modules, "PSMNetHourglass"]
    sync_batch_norm: ClassVar[bool] = True
    declined_checks: ClassVar[dict[str, str]] = {
        "ddp": "DDP equals one process only with SyncBatchNorm, which torch has not for CPU, and with as many valid "
        "pixels in each process",
        "accumulation": "batch norm takes its statistics over each batch, and two halves are not the whole",
        "single_samples": "the largest pool leaves one value of a small picture, and batch norm needs two in training",
        "draws": "nothing is drawn in the model",
        "attentions": "the encoder is convolutional",
        "gradient_checkpointing": "recomputing would update the statistics of batch norm twice",
        "export": "the encoder is the paper's own, so what is exported needs hf_masked",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module)

    def _match(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features of the left and right pictures, and the cost volume. Each view is a batch of its own for batch
        norm, as in the reference."""
        check_pair(pixel_values)
        left, right = (self.backbone(view).last_hidden_state for view in pixel_values.unbind(dim=1))
        return left, right, concat_cost_volume(left, right, self.config.max_disparity // FEATURE_STRIDE)


def check_pair(pixel_values: torch.Tensor) -> None:
    """Raises a ValueError unless the pictures are (batch, 2, channels, height, width), multiples of 16."""
    check_views(pixel_values, 2)
    height, width = pixel_values.shape[-2:]
    if height % SIZE_MULTIPLE or width % SIZE_MULTIPLE:
        raise ValueError(
            f"The pictures have {height} x {width} pixels; both sides must be multiples of {SIZE_MULTIPLE}: "
            "StereoImageProcessor pads them, and post_process_stereo_matching takes the padding off."
        )


class PSMNetModel(PSMNetPreTrainedModel):
    """Features of both pictures of a pair and their cost volume."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"aggregation\..*"]

    def __init__(self, config: PSMNetConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> PSMNetModelOutput:
        """Encodes pairs.

        Args:
            pixel_values: float (batch, 2, channels, height, width), the left picture first, sides multiples of 16.

        Raises:
            ValueError: for anything else.
        """
        left, right, volume = self._match(pixel_values)
        return PSMNetModelOutput(last_hidden_state=torch.stack([left, right], dim=1), cost_volume=volume)


class PSMNetForStereoMatching(PSMNetPreTrainedModel):
    """Pairs of pictures to the disparity of each pixel of the left one."""

    logged_outputs: ClassVar[tuple[str, ...]] = ("end_point_error",)

    def __init__(self, config: PSMNetConfig):
        super().__init__(config)
        volume = 2 * config.backbone_config.hidden_size, config.volume_channels
        self.aggregation = (
            StackedHourglasses(*volume, config.num_hourglasses)
            if config.aggregation == "stackhourglass"
            else ResidualAggregation(*volume, config.num_residual_blocks)
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> StereoMatchingOutput:
        """Predicts disparities.

        Args:
            pixel_values: float (batch, 2, channels, height, width), the left picture first, sides multiples of 16.
            labels: float (batch, height, width), the disparity of the left view: its pixel x is the right one's
                x - disparity. Pixels of max_disparity and more carry no loss, nor do those of 0 by default
                (`mask_zero_disparity`), nor what is no number.
            return_loss: whether to compute the loss, where there are labels.

        Returns:
            `StereoMatchingOutput`. In evaluation without labels the last prediction only is made.

        Raises:
            ValueError: for pictures or labels of another shape.
        """
        left, _, volume = self._match(pixel_values)
        if labels is not None and labels.shape != pixel_values[:, 0, 0].shape:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)}; expected {tuple(pixel_values[:, 0, 0].shape)}, one "
                "disparity for each pixel of the left picture."
            )
        scores = self.aggregation(volume)
        scores = scores if self.training or labels is not None else scores[-1:]
        disparities = [self._disparity(score, pixel_values.shape[-2:]) for score in scores]
        losses, error = None, None
        if labels is not None and return_loss:
            losses, error = self._losses(disparities, labels)
        return StereoMatchingOutput(
            loss=losses and sum(weight * losses[name] for name, weight in self._loss_weights(losses)),
            losses=losses and {name: part.detach() for name, part in losses.items()},
            last_hidden_state=left,
            predicted_disparity=disparities[-1],
            intermediate_disparities=tuple(disparities[:-1]),
            end_point_error=error,
        )

    def _disparity(self, scores: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """(batch, 1, disparities / 4, height / 4, width / 4) to float32 (batch, height, width)."""
        size = (self.config.max_disparity, *size)
        scores = F.interpolate(scores.float(), size=size, mode="trilinear", align_corners=self.config.align_corners)
        return soft_argmin(scores[:, 0])

    def _losses(self, disparities: list[torch.Tensor], labels: torch.Tensor) -> tuple[dict, torch.Tensor]:
        """Smooth L1 of each prediction (equations 2 and 3) and the last one's mean error, over the valid pixels of the
        whole batch; 0 where there is none."""
        valid = labels < self.config.max_disparity
        if self.config.mask_zero_disparity:
            valid = valid & (labels > 0)
        labels = torch.where(valid, labels, 0).float()
        count = valid.sum().clamp(min=1)
        losses = {
            f"prediction_{number}": (F.smooth_l1_loss(disparity, labels, reduction="none") * valid).sum() / count
            for number, disparity in enumerate(disparities, start=1)
        }
        error = ((disparities[-1].detach() - labels).abs() * valid).sum() / count
        return losses, error

    def _loss_weights(self, losses: dict) -> list[tuple[str, float]]:
        return list(zip(losses, self.config.loss_weights[-len(losses) :], strict=True))

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see: name of the panel -> (batch, channels, height, width).

        The disparity is drawn from black, 0, to white, the largest of its picture. Where it is right, the right
        picture moved by it looks like the left one, but for what the right camera does not see.
        """
        left, right = pixel_values.unbind(dim=1)
        disparity = self(pixel_values).predicted_disparity
        largest = disparity.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        # Normalised values span about -2 to 2.
        shown = (4 * disparity / largest - 2)[:, None].expand_as(left).to(left.dtype)
        return {
            "left": left,
            "right": right,
            "disparity": shown,
            "right (moved by it)": warp_to_left(right, disparity),
        }


# A layer's convolution and its norm. The last convolutions of the encoder and of the classifiers stand alone.
LAYER_RENAMING = (
    (r"\.0\.(weight)$", r".convolution.\1"),
    (r"\.1\.(weight|bias|running_mean|running_var|num_batches_tracked)$", r".normalization.\1"),
)
# Of the official names to ours, but for the aggregation, which has two forms.
FEATURES_RENAMING = (
    (r"^module\.", ""),  # of DataParallel, in which the released weights were saved
    (r"^feature_extraction\.firstconv\.(0|2|4)\.", lambda m: f"backbone.stem.{int(m[1]) // 2}."),
    (r"^feature_extraction\.layer(\d)\.", lambda m: f"backbone.stages.{int(m[1]) - 1}."),
    (r"^(backbone\.stages.*)\.conv1\.0\.", r"\1.layers.0."),
    (r"^(backbone\.stages.*)\.conv2\.", r"\1.layers.1."),
    (r"\.downsample\.", ".shortcut."),
    (r"^feature_extraction\.branch(\d)\.1\.", lambda m: f"backbone.pyramid.{int(m[1]) - 1}."),
    (r"^feature_extraction\.lastconv\.0\.", "backbone.fusion."),
    (r"^feature_extraction\.lastconv\.2\.", "backbone.projection."),
    (r"^dres0\.(0|2)\.", lambda m: f"aggregation.entry.{int(m[1]) // 2}."),
)
HOURGLASS_RENAMING = (
    (r"^dres1\.(0|2)\.", lambda m: f"aggregation.residual.{int(m[1]) // 2}."),
    (r"^dres(\d+)\.", lambda m: f"aggregation.hourglasses.{int(m[1]) - 2}."),
    (r"^classif(\d+)\.0\.", lambda m: f"aggregation.classifiers.{int(m[1]) - 1}.0."),
    (r"^classif(\d+)\.2\.", lambda m: f"aggregation.classifiers.{int(m[1]) - 1}.1."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv1\.0\.", r"\1.down1."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv2\.", r"\1.keep1."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv3\.0\.", r"\1.down2."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv4\.0\.", r"\1.keep2."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv5\.", r"\1.up1."),
    (r"^(aggregation\.hourglasses\.\d+)\.conv6\.", r"\1.up2."),
)
BASIC_RENAMING = (
    (r"^dres(\d+)\.(0|2)\.", lambda m: f"aggregation.blocks.{int(m[1]) - 1}.{int(m[2]) // 2}."),
    (r"^classify\.0\.", "aggregation.classifier.0."),
    (r"^classify\.2\.", "aggregation.classifier.1."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: PSMNetConfig) -> dict[str, torch.Tensor]:
    """The official layout (JiaRenChang/PSMNet) to that of `PSMNetForStereoMatching`.

    Counts of batches, which weights saved with torch 0.4 have not, are set to 0.
    """
    form = HOURGLASS_RENAMING if config.aggregation == "stackhourglass" else BASIC_RENAMING
    weights = rename_weights(state_dict, LAYER_RENAMING + FEATURES_RENAMING + form)
    counts = {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(0)
        for name in weights
        if name.endswith("running_mean")
    }
    return counts | weights


def official_config(state_dict: dict[str, torch.Tensor]) -> PSMNetConfig:
    """The config of an official checkpoint, whose largest disparity its weights do not tell: 192, as released."""
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    features = "feature_extraction"
    stages = [f"{features}.layer{stage}" for stage in range(1, 5)]
    stem = weights[f"{features}.firstconv.0.0.weight"]
    fusion = weights[f"{features}.lastconv.2.weight"]
    backbone_config = PSMNetFeaturesConfig(
        num_channels=stem.shape[1],
        feature_channels=[stem.shape[0], *(weights[f"{stage}.0.conv2.0.weight"].shape[0] for stage in stages)],
        num_blocks=[official_depth(weights, stage) for stage in stages],
        spp_channels=weights[f"{features}.branch1.1.0.weight"].shape[0],
        fusion_channels=fusion.shape[1],
        hidden_size=fusion.shape[0],
    )
    return PSMNetConfig(
        backbone_config=backbone_config,
        aggregation="basic" if "classify.2.weight" in weights else "stackhourglass",
        volume_channels=weights["dres0.0.0.weight"].shape[0],
        align_corners=True,
    )


def tiny_config() -> PSMNetConfig:
    backbone_config = PSMNetFeaturesConfig(
        image_size=(32, 32),
        feature_channels=(4, 4, 8, 8, 8),
        num_blocks=(1, 1, 1, 1),
        pool_sizes=(4, 2),
        spp_channels=4,
        fusion_channels=8,
        hidden_size=4,
    )
    return PSMNetConfig(backbone_config=backbone_config, max_disparity=16, volume_channels=4)


def example_inputs(config: PSMNetConfig, batch: int) -> dict[str, torch.Tensor]:
    """Random pairs with random disparities."""
    height, width = config.image_size
    return {
        "pixel_values": torch.randn(batch, 2, config.num_channels, height, width),
        "labels": config.max_disparity * torch.rand(batch, height, width),
    }


AutoConfig.register(PSMNetFeaturesConfig.model_type, PSMNetFeaturesConfig)
AutoModel.register(PSMNetFeaturesConfig, PSMNetFeatures)

register_variant(
    config=PSMNetConfig,
    pretraining=PSMNetForStereoMatching,
    model=PSMNetModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_inputs,
)
