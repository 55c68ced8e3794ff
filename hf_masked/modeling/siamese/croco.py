"""CroCo: of two pictures of one scene the first is masked by 90 % and completed from what is left of it and from the
second, which takes an understanding of the geometry between the two.

Philippe Weinzaepfel et al., "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion",
NeurIPS 2022, arXiv 2210.10716. Rotary positions, larger models, stereo matching and optical flow: "CroCo v2", ICCV
2023, arXiv 2211.10408.
Reference implementation: https://github.com/naver/croco (`models/`, `pretrain.py`, `stereoflow/`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForDepthEstimation, DPTConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, DepthEstimatorOutput
from transformers.utils import ModelOutput, can_return_tuple

from hf_masked.modeling.masked_patches import MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import init_layers_as_mae
from hf_masked.modeling.parts.blocks import FeedForward
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patchify, unpatchify
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.rotary import RotaryAttention, Rotation
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights
from hf_masked.modeling.parts.targets import denormalize_patches, normalize_patches
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant
from hf_masked.modeling.siamese.croco_encoder import (
    CroCoEncoderConfig,
    CroCoPositions,
    init_croco,
    rotation_of,
)

# What a binocular head predicts for each pixel: name -> channels.
TASKS = {"stereo": 1, "flow": 2}
LOSSES = ("laplacian_stereo", "laplacian_flow", "laplacian", "l1")

# Of the maps that a DPT head makes of four layers' tokens: the side, relative to the grid of patches.
REASSEMBLE_FACTORS = (4, 2, 1, 0.5)


class CroCoConfig(MaskedPatchesConfig):
    """Config of CroCo.

    Args:
        backbone_config: a `CroCoEncoderConfig`, which also says which positions the decoder has; ViT-B/16 by default.
        mask_ratio: share of view 1's patches that the encoder does not see; the paper's 90 % is, as it counts, 176 of
            196.
        mask_kind, mask_options: see `MaskedPatchesConfig`.
        norm_pix_loss: predict each patch less its mean and over its standard deviation (the paper's recipe).
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder; CroCo v2's larger one is 768, 12, 12 and 3072.
        norm_memory: each block of the decoder normalises the second view's tokens, with a norm of its own.
        head_layers: of a dense head, the four blocks whose outputs it reads, from 0, the decoder's counted on after
            the encoder's; by default those of the paper.
        head_layer_sizes, head_hidden_size, head_output_size: channels of the maps made of these, of the fused maps,
            and before the last layer of the head.
        binocular_task: what `CroCoForBinocularPrediction` predicts: "stereo", the disparity of each pixel of the left
            view, or "flow", its motion (x, y) to the second view, in pixels.
        dense_loss: its loss: "l1", or the likelihood of a Laplace distribution whose scale is predicted too, bounded
            as in CroCo-Stereo ("laplacian_stereo") or CroCo-Flow ("laplacian_flow"), or not ("laplacian"). By default
            the task's.
        max_label_norm: labels of this length and more carry no loss.
        mask_zero_labels: a disparity or depth of 0 says "unknown".
    """

    model_type = "hf_masked_croco"
    paper_title: ClassVar[str] = "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2210.10716"
    reference_repository: ClassVar[str] = "https://github.com/naver/croco"
    weights_licence: ClassVar[str] = "CC BY-NC-SA 4.0"
    masks: ClassVar[str] = "90 % of the first of two pictures of a scene, dropped before the encoder"
    predicts: ClassVar[str] = "pixels of the masked patches, from the second picture"
    backbones: ClassVar[tuple[str, ...]] = (CroCoEncoderConfig.model_type,)
    processor: ClassVar[str] = "CropPairImageProcessor"
    sample: ClassVar[str] = "scene"
    num_views: ClassVar[int] = 2

    mask_ratio: float = 176 / 196
    norm_pix_loss: bool = True
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    norm_memory: bool = True
    head_layers: tuple[int, ...] | list[int] | None = None
    head_layer_sizes: tuple[int, ...] | list[int] = (96, 192, 384, 768)
    head_hidden_size: int = 256
    head_output_size: int = 32
    binocular_task: str = "stereo"
    dense_loss: str | None = None
    max_label_norm: float | None = None
    mask_zero_labels: bool = True

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = CroCoEncoderConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        self.backbone_config.check_heads("decoder_", self.decoder_hidden_size, self.decoder_num_attention_heads)
        if self.binocular_task not in TASKS:
            raise ValueError(f"binocular_task is {self.binocular_task!r}; it must be one of {', '.join(TASKS)}.")
        if self.binocular_loss not in LOSSES:
            raise ValueError(f"dense_loss is {self.dense_loss!r}; it must be one of {', '.join(LOSSES)}.")
        sizes = {"head_layer_sizes": self.head_layer_sizes, "head_layers": self.head_layers}
        for name, values in sizes.items():
            if values is not None and len(values) != len(REASSEMBLE_FACTORS):
                raise ValueError(f"{name} has {len(values)} values; a dense head reads {len(REASSEMBLE_FACTORS)}.")

    @property
    def binocular_loss(self) -> str:
        """`dense_loss`, or the task's own."""
        return self.dense_loss or f"laplacian_{self.binocular_task}"

    def processor_settings(self) -> dict:
        # `crop224+acolor` of the reference's `datasets/transforms.py`, from pictures of 256 pixels: crops of a fixed
        # size and, each picture for itself, factors of brightness, contrast and saturation in (0.6, 1.4).
        height, width = pair(self.image_size)
        return super().processor_settings() | {
            "strategy": "random_views",
            "crop_scale": ((224 / 256) ** 2, (224 / 256) ** 2),
            "crop_ratio": (width / height, width / height),
            "flip_probability": 0.0,
            "photometric": {"jitter_probability": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
        }

    def dense_layers(self, binocular: bool) -> list[int]:
        """Which blocks' outputs a dense head reads (`PixelwiseTaskWithDPT`); shallow networks give one repeatedly."""
        encoder, decoder = self.backbone_config.num_hidden_layers, self.decoder_num_hidden_layers
        last = encoder + decoder - 1 if binocular else encoder - 1
        if self.head_layers is not None:
            if not all(0 <= layer <= last for layer in self.head_layers):
                raise ValueError(f"head_layers is {list(self.head_layers)}; the blocks are 0 to {last}.")
            return list(self.head_layers)
        step = math.ceil(decoder / 3) if binocular else encoder // 4
        return [max(last - step * number, 0) for number in (3, 2, 1, 0)]


@dataclass
class CroCoBinocularOutput(ModelOutput):
    """Output of `CroCoForBinocularPrediction`.

    Args:
        loss: float32 scalar, with labels.
        losses: its named part, detached, for the log.
        predicted_disparity: float32 (batch, height, width) of view 1, in pixels, of stereo matching.
        predicted_flow: float32 (batch, 2, height, width), the motion (x, y) of view 1's pixels, of optical flow.
        uncertainty: float32 (batch, height, width), c in the paper's equations, without bounds: the higher the less
            sure; None with the loss "l1".
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    predicted_disparity: torch.Tensor | None = None
    predicted_flow: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None


class CroCoDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm self-attention, cross-attention to the second view and feed-forward, each with a residual."""

    def __init__(self, config: CroCoConfig):
        super().__init__()
        size, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        eps = config.backbone_config.layer_norm_eps
        self.self_attention_norm = nn.LayerNorm(size, eps=eps)
        self.self_attention = RotaryAttention(config, size, heads, size)
        self.cross_attention_norm = nn.LayerNorm(size, eps=eps)
        self.memory_norm = nn.LayerNorm(size, eps=eps) if config.norm_memory else nn.Identity()
        self.cross_attention = RotaryAttention(config, size, heads, size)
        self.feed_forward_norm = nn.LayerNorm(size, eps=eps)
        self.feed_forward = FeedForward(size, config.decoder_intermediate_size)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
        """(batch, units, hidden) twice -> (batch, units, hidden); both views stand on one grid."""
        hidden_states = hidden_states + self.self_attention(self.self_attention_norm(hidden_states), rotation)[0]
        query, memory = self.cross_attention_norm(hidden_states), self.memory_norm(memory)
        hidden_states = hidden_states + self.cross_attention(query, rotation, memory, rotation)[0]
        return hidden_states + self.feed_forward(self.feed_forward_norm(hidden_states))


class CroCoDecoder(nn.Module):
    """View 1's tokens, which attend to each other and to view 2's. Those of view 2 stay as they are embedded.

    Args:
        config: of the model.
        mask_token: for masked patches of view 1; False for a decoder that is given all of them.
    """

    def __init__(self, config: CroCoConfig, mask_token: bool = True):
        super().__init__()
        size = config.decoder_hidden_size
        self.backbone_config = config.backbone_config
        self.head_size = size // config.decoder_num_attention_heads
        self.embedding = nn.Linear(config.hidden_size, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size)) if mask_token else None
        self.positions = CroCoPositions(config.backbone_config, size)
        self.layers = nn.ModuleList(CroCoDecoderLayer(config) for _ in range(config.decoder_num_hidden_layers))
        self.norm = nn.LayerNorm(size, eps=config.backbone_config.layer_norm_eps)

    def forward(
        self, tokens: torch.Tensor, visible: torch.Tensor | None, other: torch.Tensor, grid: tuple[int, int]
    ) -> list[torch.Tensor]:
        """Decodes view 1.

        Args:
            tokens: (batch, visible, encoder hidden), of view 1.
            visible: int64 (batch, visible), their raster positions; None for all.
            other: (batch, units, encoder hidden), of view 2.
            grid: (rows, columns) of patches.

        Returns:
            The output of each block, (batch, units, hidden), the last one normalised.
        """
        states = self.embedding(tokens)  # (batch, visible, hidden)
        if visible is not None:
            filled = self.mask_token.to(states.dtype).expand(states.shape[0], grid[0] * grid[1], -1)
            states = filled.scatter(1, visible.unsqueeze(-1).expand_as(states), states)  # (batch, units, hidden)
        states = self.positions(states, grid)
        memory = self.positions(self.embedding(other), grid)  # (batch, units, hidden)
        rotation = rotation_of(self.backbone_config, grid, None, self.head_size, states)
        outputs = []
        for layer in self.layers:
            states = layer(states, memory, rotation)
            outputs.append(states)
        return [*outputs[:-1], self.norm(states)]


class CroCoDenseHead(nn.Module):
    """DPT's head (Ranftl et al., arXiv 2103.13413), without readout tokens and norms, on the tokens of four blocks.

    Args:
        config: of the model.
        token_sizes: widths of the four blocks' tokens.
        num_outputs: values predicted for each pixel.
    """

    def __init__(self, config: CroCoConfig, token_sizes: list[int], num_outputs: int):
        # Here, for pretraining has no use for what takes a good part of the package's time to import.
        from transformers.models.dpt.modeling_dpt import DPTFeatureFusionStage, DPTReassembleLayer

        super().__init__()
        hidden, last = config.head_hidden_size, config.head_output_size
        sizes = list(config.head_layer_sizes)
        self.reassemble = nn.ModuleList(
            DPTReassembleLayer(DPTConfig(hidden_size=tokens), channels, factor)
            for tokens, channels, factor in zip(token_sizes, sizes, REASSEMBLE_FACTORS, strict=True)
        )
        self.convs = nn.ModuleList(nn.Conv2d(channels, hidden, 3, padding=1, bias=False) for channels in sizes)
        self.fusion = DPTFeatureFusionStage(DPTConfig(neck_hidden_sizes=sizes, fusion_hidden_size=hidden))
        self.output = nn.Sequential(
            nn.Conv2d(hidden, hidden // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(hidden // 2, last, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(last, num_outputs, 1),
        )

    def forward(self, states: list[torch.Tensor], grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
        """Four blocks' tokens, (batch, units, hidden), to float32 (batch, outputs, height, width).

        The head makes 16 x 16 pixels of a patch; with patches of another size, and on grids of odd sides, its map is
        resized to the picture's `size`.
        """
        maps = [tokens.transpose(1, 2).unflatten(2, grid) for tokens in states]  # (batch, hidden, rows, columns)
        maps = [conv(layer(m)) for conv, layer, m in zip(self.convs, self.reassemble, maps, strict=True)]
        output = self.output(self.fusion(maps)[-1]).float()
        if output.shape[-2:] != torch.Size(size):
            output = F.interpolate(output, size=size, mode="bilinear", align_corners=False)
        return output


class CroCoPreTrainedModel(MaskedPatchesModel):
    """Initialisation that all classes of CroCo share."""

    config: CroCoConfig
    _no_split_modules: ClassVar[list[str]] = ["CroCoLayer", "CroCoDecoderLayer"]
    declined_checks: ClassVar[dict[str, str]] = {
        "export": "the encoder is the paper's own, so what is exported needs hf_masked",
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CroCoDecoder) and module.mask_token is not None:
            init.normal_(module.mask_token, std=0.02)
        elif isinstance(module, CroCoDecoderLayer):
            init_layers_as_mae(module.self_attention)
        elif isinstance(module, CroCoDenseHead):
            for part in module.modules():
                init_as_torch(part)
        else:
            init_croco(module)


class CroCoModel(CroCoPreTrainedModel):
    """The encoder, on single pictures."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|prediction_head|head)\..*"]

    def __init__(self, config: CroCoConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            last_hidden_state: (batch, visible, hidden), normalised; there is no class token.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        visible = None if bool_masked_pos is None else self._visible(bool_masked_pos, grid)
        return self.backbone(pixel_values, visible, **kwargs)


class CroCoForPreTraining(CroCoPreTrainedModel):
    """The encoder on both views, the decoder and the loss on masked patches of view 1."""

    # Of a binocular model, whose encoder and decoder can go on with pretraining.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"head\..*"]

    def __init__(self, config: CroCoConfig):
        super().__init__(config)
        self.patch_size = pair(config.backbone_config.patch_size)
        self.decoder = CroCoDecoder(config)
        values = self.patch_size[0] * self.patch_size[1] * config.num_channels
        self.prediction_head = nn.Linear(config.decoder_hidden_size, values)
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
    ) -> MaskedPreTrainingOutput:
        """One step of completing view 1 from view 2.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units) of view 1, True = masked, the same count in each row; drawn here by
                default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.
            kwargs: of the encoder on view 1, for example `output_hidden_states`.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, patch height * patch width * channels) in
            `patchify` order, of view 1 (of its normalised pixels with `norm_pix_loss`); the fields of the encoder are
            those of view 1's visible patches.

        Raises:
            ValueError: for other channels, sizes, views or mask shapes.
        """
        check_views(pixel_values, self.config.num_views)
        view_1, view_2 = pixel_values.unbind(dim=1)
        grid = self._check_inputs(view_1, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(view_1, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        outputs = self.backbone(view_1, visible, **kwargs)
        encoded = outputs.last_hidden_state  # (batch, visible, hidden)
        other = self.backbone(view_2).last_hidden_state  # (batch, units, hidden)
        logits = self.prediction_head(self.decoder(encoded, visible, other, grid)[-1])  # (batch, units, values)
        loss = self.loss(view_1, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            logits=logits,
            mask=bool_masked_pos,
        )

    def loss(self, view_1: torch.Tensor, logits: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the pixels of masked patches (paper, section 3; `MaskedMSE`)."""
        target = patchify(view_1.float(), self.patch_size)  # (batch, units, values)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        return masked_mean((logits.float() - target).square().mean(dim=-1), bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see of pairs (batch, 2, channels, height, width): name of the panel -> (batch, channels,
        height, width), normalised as the input.

        With `norm_pix_loss` the predictions are drawn with the mean and deviation of the TRUE patches, which the
        model does not know; the panel's name says so.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        view_1, view_2 = pixel_values.float().unbind(dim=1)
        grid = self._check_inputs(view_1, None)
        patches, predicted, hidden = (
            patchify(view_1, self.patch_size),
            output.logits.float(),
            output.mask.unsqueeze(-1),
        )
        name = "completed"
        if self.config.norm_pix_loss:
            predicted, name = denormalize_patches(predicted, patches), "completed (true patch statistics)"
        masked, completed = patches.masked_fill(hidden, 0.0), torch.where(hidden, predicted, patches)
        return {
            "view 2": view_2,
            "masked view 1": unpatchify(masked, grid, self.patch_size),
            name: unpatchify(completed, grid, self.patch_size),
            "view 1": view_1,
        }


class CroCoForDepthEstimation(CroCoPreTrainedModel):
    """The encoder and a dense head: the depth of each pixel of single pictures."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|prediction_head)\..*"]

    def __init__(self, config: CroCoConfig):
        super().__init__(config)
        self.layers_read = config.dense_layers(binocular=False)
        self.head = CroCoDenseHead(config, [config.hidden_size] * len(self.layers_read), num_outputs=1)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> DepthEstimatorOutput:
        """Estimates depths.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            labels: float (batch, height, width), in any unit; what is no finite number carries no loss, nor does 0 by
                default (`mask_zero_labels`).
            kwargs: of the encoder, for example `output_attentions`.

        Returns:
            loss: float32 scalar, the mean absolute error over the valid pixels.
            predicted_depth: float32 (batch, height, width), in the unit of the labels.

        Raises:
            ValueError: for other channels or sizes, or labels of another shape.
        """
        grid = self._check_inputs(pixel_values, None)
        outputs = self.backbone(pixel_values, **kwargs | {"output_hidden_states": True})
        states = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
        depth = self.head([states[layer] for layer in self.layers_read], grid, pixel_values.shape[-2:])
        loss = None
        if labels is not None:
            labels = check_labels(labels, depth)
            loss = masked_mean((depth - labels.nan_to_num(0.0, 0.0, 0.0)).abs()[:, 0], self._valid(labels))
        return DepthEstimatorOutput(
            loss=loss,
            predicted_depth=depth[:, 0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _valid(self, labels: torch.Tensor) -> torch.Tensor:
        return valid_labels(labels, self.config.max_label_norm, self.config.mask_zero_labels)


class CroCoForBinocularPrediction(CroCoPreTrainedModel):
    """Encoder, decoder and a dense head, with nothing masked: stereo matching or optical flow (CroCo v2)."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"prediction_head\..*", r"decoder\.mask_token"]

    def __init__(self, config: CroCoConfig):
        super().__init__(config)
        self.layers_read = config.dense_layers(binocular=True)
        self.decoder = CroCoDecoder(config, mask_token=False)
        encoder = config.backbone_config.num_hidden_layers
        sizes = [config.hidden_size if layer < encoder else config.decoder_hidden_size for layer in self.layers_read]
        num_outputs = TASKS[config.binocular_task] + (config.binocular_loss != "l1")
        self.head = CroCoDenseHead(config, sizes, num_outputs)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_loss: bool = True, **kwargs
    ) -> CroCoBinocularOutput:
        """Predicts the disparity or the motion of each pixel of view 1.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised, the left or first picture first; the
                patch must divide both sizes.
            labels: for stereo float (batch, height, width), the disparity of view 1, whose pixel x is view 2's
                x - disparity; for flow (batch, 2, height, width), the motion (x, y). In pixels; what is no finite
                number carries no loss, nor does a disparity of 0 by default (`mask_zero_labels`).
            return_loss: whether to compute the loss, where there are labels.

        Returns:
            `CroCoBinocularOutput`.

        Raises:
            ValueError: for other channels, sizes or views, or labels of another shape.
        """
        check_views(pixel_values, self.config.num_views)
        grid = self._check_inputs(pixel_values[:, 0], None)
        prediction, uncertainty = self._predict(pixel_values, grid)
        loss = None
        if labels is not None and return_loss:
            loss = self.loss(prediction, uncertainty, check_labels(labels, prediction))
        return self._output(prediction, uncertainty, loss)

    def _predict(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float32 (batch, 1 or 2, height, width), and c, (batch, height, width)."""
        batch = len(pixel_values)
        views = pixel_values.transpose(0, 1).flatten(0, 1)  # (2 * batch, channels, height, width)
        outputs = self.backbone(views, output_hidden_states=True)
        states = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
        first, second = outputs.last_hidden_state.split(batch)  # (batch, units, hidden) each
        states = [tokens[:batch] for tokens in states] + self.decoder(first, None, second, grid)
        output = self.head([states[layer] for layer in self.layers_read], grid, pixel_values.shape[-2:])
        channels = TASKS[self.config.binocular_task]
        return output[:, :channels], output[:, channels] if output.shape[1] > channels else None

    def _output(self, prediction, uncertainty, loss=None) -> CroCoBinocularOutput:
        stereo = self.config.binocular_task == "stereo"
        return CroCoBinocularOutput(
            loss=loss,
            losses=None if loss is None else {self.config.binocular_loss: loss.detach()},
            predicted_disparity=prediction[:, 0] if stereo else None,
            predicted_flow=None if stereo else prediction,
            uncertainty=uncertainty,
        )

    def loss(self, prediction: torch.Tensor, uncertainty: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        """Mean over the valid pixels of the whole batch of |error| / s + log s, s being the scale of a Laplace
        distribution, less a constant (CroCo v2, section 4; `stereoflow/criterion.py`); of |error| with "l1".

        Args:
            prediction, labels: float32 (batch, 1 or 2, height, width).
            uncertainty: float32 (batch, height, width).
        """
        stereo = self.config.binocular_task == "stereo"
        valid = valid_labels(labels, self.config.max_label_norm, stereo and self.config.mask_zero_labels)
        error = (prediction - labels.nan_to_num(0.0, 0.0, 0.0)).abs()
        if uncertainty is None:
            return masked_mean(error.mean(dim=1), valid)
        log_scale = log_scale_of(self.config.binocular_loss, uncertainty)
        return masked_mean(error.sum(dim=1) * torch.exp(-log_scale) + log_scale, valid)

    @torch.no_grad()
    def predict_tiled(self, pixel_values: torch.Tensor, overlap: float = 0.9) -> CroCoBinocularOutput:
        """Predicts pictures of any size from overlapping tiles of the config's `image_size`, the surer ones weighing
        more (CroCo v2, section 4; `tiled_pred` of `stereoflow/engine.py`): the paper's way of testing.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised; smaller ones than a tile are enlarged.
            overlap: share of a tile's sides that the next tile covers too, in [0, 1); at least that.

        Returns:
            `CroCoBinocularOutput`, without loss, in pixels of `pixel_values`.

        Raises:
            ValueError: for another overlap, other channels or views.
        """
        if not 0.0 <= overlap < 1.0:
            raise ValueError(f"overlap is {overlap}; it must lie in [0, 1), for example 0.9.")
        check_views(pixel_values, self.config.num_views)
        size, tile = pixel_values.shape[-2:], pair(self.config.image_size)
        factor = max(*(wanted / side for wanted, side in zip(tile, size, strict=True)), 1.0)
        if factor > 1.0:
            larger = [round(side * factor) for side in size]
            pixel_values = F.interpolate(pixel_values.flatten(0, 1), size=larger, mode="bicubic")
            pixel_values = pixel_values.unflatten(0, (-1, self.config.num_views))
        prediction, uncertainty = self._predict_tiles(pixel_values, tile, overlap)
        if factor > 1.0:
            shrinkage = [before / after for before, after in zip(size, pixel_values.shape[-2:], strict=True)]
            # The x of a motion first, which is measured along the second side.
            scale = prediction.new_tensor(shrinkage).flip(0)[: prediction.shape[1]].view(-1, 1, 1)
            prediction = F.interpolate(prediction, size=size, mode="bicubic") * scale
            if uncertainty is not None:
                uncertainty = F.interpolate(uncertainty[:, None], size=size, mode="bicubic")[:, 0]
        return self._output(prediction, uncertainty)

    def _predict_tiles(self, pixel_values, tile, overlap) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_predict`, of the weighted mean of tiles."""
        grid = self._check_inputs(pixel_values[:1, 0, :, : tile[0], : tile[1]], None)
        size = pixel_values.shape[-2:]
        sums = pixel_values.new_zeros(len(pixel_values), TASKS[self.config.binocular_task] + 2, *size).float()
        for top in tile_starts(size[0], tile[0], overlap):
            for left in tile_starts(size[1], tile[1], overlap):
                part = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
                prediction, uncertainty = self._predict(pixel_values[part], grid)
                known = torch.zeros_like(prediction[:, 0]) if uncertainty is None else uncertainty
                weight = tile_weight(self.config.binocular_loss, known)
                values = [*prediction.unbind(dim=1), known, torch.ones_like(known)]
                sums[part] += torch.stack(values, dim=1) * weight.unsqueeze(1)
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1e-16)
        return means[:, :-1], None if self.config.binocular_loss == "l1" else means[:, -1]

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What there is to see: name of the panel -> (batch, channels, height, width): both views, and how far each
        pixel moves, from black, not at all, to white, the largest of its picture."""
        output = self(pixel_values)
        view_1, view_2 = pixel_values.unbind(dim=1)
        flow = output.predicted_flow
        motion = output.predicted_disparity.abs() if flow is None else torch.linalg.vector_norm(flow, dim=1)
        largest = motion.amax(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        # Normalised values span about -2 to 2.
        shown = (4 * motion / largest - 2)[:, None].expand_as(view_1).to(view_1.dtype)
        return {"view 1": view_1, "view 2": view_2, self.config.binocular_task: shown}


def check_labels(labels: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """float32 labels of the prediction's shape, (batch, channels, height, width); those of one channel may come
    without it. Raises a ValueError for other shapes."""
    given = labels.unsqueeze(1) if labels.ndim == 3 else labels
    if given.shape != prediction.shape:
        expected = tuple(prediction.squeeze(1).shape)
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}; expected {expected}, values for each pixel.")
    return given.float()


def valid_labels(labels: torch.Tensor, max_norm: float | None, mask_zero: bool) -> torch.Tensor:
    """bool (batch, height, width): which labels, (batch, channels, height, width), carry a loss."""
    norm = torch.linalg.vector_norm(labels, dim=1)
    valid = norm.isfinite()
    if mask_zero:
        valid = valid & (norm > 0)
    return valid if max_norm is None else valid & (norm < max_norm)


def log_scale_of(kind: str, uncertainty: torch.Tensor) -> torch.Tensor:
    """Of what the head predicts, the logarithm of the Laplace distribution's scale. It lies between -3 and 3 with
    "laplacian_stereo", the scale between 1/4 and 4 with "laplacian_flow"."""
    if kind == "laplacian_stereo":
        return 6.0 * (torch.sigmoid(uncertainty / 3.0) - 0.5)
    if kind == "laplacian_flow":
        return torch.log(3.75 * torch.sigmoid(uncertainty) + 0.25)
    return uncertainty


def tile_weight(kind: str, uncertainty: torch.Tensor) -> torch.Tensor:
    """How much a tile's pixels weigh (`--tile_conf_mode` of the reference's commands)."""
    if kind == "laplacian_stereo":
        return torch.exp(-30.0 * (torch.sigmoid(uncertainty / 3.0) - 0.5))
    if kind == "laplacian_flow":
        return torch.exp(-20.0 * (torch.sigmoid(uncertainty / 5.0) - 0.5))
    return torch.exp(-3.0 * uncertainty)


def tile_starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin, spread evenly over a side, the first at 0 and the last at its end."""
    count = 1 + math.ceil((side - tile) / ((1 - overlap) * tile))
    return torch.linspace(0, side - tile, count, dtype=torch.float64).round().long().tolist()


# The heads of the released models, by width: their checkpoints hold no more than shapes.
OFFICIAL_HEADS = {768: 12, 1024: 16}
OFFICIAL_DECODER_HEADS = {512: 16, 768: 12}
# The tiles of the released stereo and flow models, by the number of the head's outputs.
OFFICIAL_TASKS = {2: ("stereo", [352, 704]), 3: ("flow", [320, 384])}


def official_config(state_dict: dict[str, torch.Tensor]) -> CroCoConfig:
    """The config of an official checkpoint of CroCo, CroCo v2, CroCo-Stereo or CroCo-Flow, read from its shapes.

    Rotary positions leave no trace of the picture's size, which is then 224, or the size of the main models' tiles.

    Raises:
        ValueError: if the number of heads cannot be known, because a width is none of the released ones.
    """
    hidden_size, num_channels, patch_size, _ = state_dict["patch_embed.proj.weight"].shape
    settings = {}
    image_size = 224
    if "head.dpt.head.4.bias" in state_dict:
        settings["binocular_task"], image_size = OFFICIAL_TASKS[state_dict["head.dpt.head.4.bias"].shape[0]]
    if "enc_pos_embed" in state_dict:
        image_size = math.isqrt(state_dict["enc_pos_embed"].shape[0]) * patch_size
    backbone_config = CroCoEncoderConfig(
        hidden_size=hidden_size,
        num_hidden_layers=official_depth(state_dict, "enc_blocks"),
        num_attention_heads=_official_heads("encoder", hidden_size, OFFICIAL_HEADS),
        intermediate_size=state_dict["enc_blocks.0.mlp.fc1.weight"].shape[0],
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
        position_embedding_type="sincos" if "enc_pos_embed" in state_dict else "rope",
    )
    if "decoder_embed.weight" in state_dict:
        width = state_dict["decoder_embed.weight"].shape[0]
        settings |= {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": official_depth(state_dict, "dec_blocks"),
            "decoder_num_attention_heads": _official_heads("decoder", width, OFFICIAL_DECODER_HEADS),
            "decoder_intermediate_size": state_dict["dec_blocks.0.mlp.fc1.weight"].shape[0],
            "norm_memory": "dec_blocks.0.norm_y.weight" in state_dict,
        }
    return CroCoConfig(backbone_config=backbone_config, **settings)


def _official_heads(part: str, width: int, known: dict[int, int]) -> int:
    if width not in known:
        raise ValueError(
            f"The checkpoint's {part} is {width} wide and does not say how many heads it has, which is known for the "
            f"released widths only ({', '.join(map(str, known))}): pass a config."
        )
    return known[width]


# Official name -> ours.
_RENAMING = (
    (r"^patch_embed\.proj\.", "backbone.embeddings.patch_embeddings."),
    (r"^enc_pos_embed$", "backbone.embeddings.positions.table"),
    (r"^dec_pos_embed$", "decoder.positions.table"),
    (r"^enc_norm\.", "backbone.norm."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_embed\.", "decoder.embedding."),
    (r"^dec_norm\.", "decoder.norm."),
    (r"^enc_blocks\.(\d+)\.norm1\.", r"backbone.layers.\1.attention_norm."),
    (r"^enc_blocks\.(\d+)\.norm2\.", r"backbone.layers.\1.feed_forward_norm."),
    (r"^enc_blocks\.(\d+)\.attn\.", r"backbone.layers.\1.attention."),
    (r"^enc_blocks\.", "backbone.layers."),
    (r"^dec_blocks\.(\d+)\.norm1\.", r"decoder.layers.\1.self_attention_norm."),
    (r"^dec_blocks\.(\d+)\.norm2\.", r"decoder.layers.\1.cross_attention_norm."),
    (r"^dec_blocks\.(\d+)\.norm3\.", r"decoder.layers.\1.feed_forward_norm."),
    (r"^dec_blocks\.(\d+)\.norm_y\.", r"decoder.layers.\1.memory_norm."),
    (r"^dec_blocks\.(\d+)\.attn\.", r"decoder.layers.\1.self_attention."),
    (r"^dec_blocks\.(\d+)\.cross_attn\.", r"decoder.layers.\1.cross_attention."),
    (r"^dec_blocks\.", "decoder.layers."),
    (r"attention\.qkv\.", "attention.{qkv}_proj."),
    (r"attention\.proj(q|k|v)\.", r"attention.\1_proj."),
    (r"attention\.proj\.", "attention.o_proj."),
    (r"\.mlp\.fc1\.", ".feed_forward.0."),
    (r"\.mlp\.fc2\.", ".feed_forward.2."),
    (r"^head\.dpt\.act_(\d)_postprocess\.0\.", lambda m: f"head.reassemble.{int(m[1]) - 1}.projection."),
    (r"^head\.dpt\.act_(\d)_postprocess\.1\.", lambda m: f"head.reassemble.{int(m[1]) - 1}.resize."),
    (r"^head\.dpt\.scratch\.layer(\d)_rn\.", lambda m: f"head.convs.{int(m[1]) - 1}."),
    (r"^head\.dpt\.scratch\.refinenet(\d)\.", lambda m: f"head.fusion.layers.{4 - int(m[1])}."),
    (r"\.out_conv\.", ".projection."),
    (r"\.resConfUnit(\d)\.conv(\d)\.", r".residual_layer\1.convolution\2."),
    (r"^head\.dpt\.head\.", "head.output."),
)
# Modules of the official head that stand in a list, too, and so appear twice in a checkpoint.
_TWICE = ("head.dpt.act_postprocess.", "head.dpt.scratch.layer_rn.")


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: CroCoConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `models/croco.py`, or of `models/croco_downstream.py` with a DPT head.
        config: unused here; other variants' conversions need it.
    """
    once = {name: tensor for name, tensor in state_dict.items() if not name.startswith(_TWICE)}
    return {
        name: tensor.unsqueeze(0) if name.endswith("positions.table") else tensor
        for name, tensor in rename_weights(once, _RENAMING).items()
    }


def tiny_config() -> CroCoConfig:
    return CroCoConfig(
        backbone_config=CroCoEncoderConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        mask_ratio=14 / 16,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        head_layer_sizes=(4, 4, 8, 8),
        head_hidden_size=8,
        head_output_size=4,
    )


register_variant(
    config=CroCoConfig,
    pretraining=CroCoForPreTraining,
    model=CroCoModel,
    heads={AutoModelForDepthEstimation: CroCoForDepthEstimation},
    other_heads=(CroCoForBinocularPrediction,),
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_views,
)
