"""CAPI: a momentum teacher's patches are clustered as training goes on; from one block of the picture a student
predicts, by cross-attention alone, the clusters of a few masked patches.

Timothée Darcet et al., "Cluster and Predict Latents Patches for Improved Masked Image Modeling", TMLR 2025,
arXiv 2502.08769.
Reference implementation: https://github.com/facebookresearch/capi (`model.py`, `train_capi.py`, `data.py`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import distributed, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from hf_masked.modeling.masked_latent.capi_encoder import (
    CAPIEncoderConfig,
    CAPILayer,
    everything,
    init_capi,
    rope_angles,
    rotation_of,
)
from hf_masked.modeling.masked_patches import MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.patches import (
    check_mask,
    pair,
    patchify,
    predicted_indices,
    take,
    unpatchify,
)
from hf_masked.modeling.parts.rotary import check_rotary_heads
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import make_mask, num_predicted_units, partial_mask
from hf_masked.randomness import model_draw


class CAPIConfig(MaskedPatchesConfig):
    """Config of CAPI.

    Args:
        backbone_config: a `CAPIEncoderConfig`; ViT-L/14 by default.
        mask_ratio: share of the patches that the encoder does not see; the paper's 65 % is, as it counts, 166 of 256.
        mask_kind: a name in `hf_masked.processing.masks.MASKS`; "inverse_block", the default, leaves one rectangle.
        mask_options: further arguments of the mask function.
        prediction_ratio: share of all patches that are predicted, a random part of the masked ones; the paper's 5 % of
            the masked ones is 8 of 256. None predicts all that is masked.
        predictor_hidden_size, predictor_num_hidden_layers, predictor_num_attention_heads, predictor_intermediate_size:
            of the predictor.
        num_clusters: prototypes.
        student_temperature: of the student's and of the clustering's own softmax.
        target_temperature: of the assignments.
        sinkhorn_iterations: of balancing the assignments.
        positionwise_sinkhorn: balance the clusters over the pictures at each position, not over everything: a cluster
            then cannot stand for a position. It needs large batches: with one picture all assignments are uniform.
        momentum_base: of the teacher once `momentum_warmup` is over; the momentum falls linearly to it from 1, then
            rises towards 1 along four fifths of half a cosine.
        momentum_warmup: share of training.
        clustering_learning_rate_factor: of the clustering's learning rate over that of the rest.
        patch_learning_rate_factor: of the patch embedding's.
    """

    model_type = "hf_masked_capi"
    paper_title: ClassVar[str] = "Cluster and Predict Latents Patches for Improved Masked Image Modeling"
    paper_year: ClassVar[int] = 2025
    arxiv_id: ClassVar[str] = "2502.08769"
    reference_repository: ClassVar[str] = "https://github.com/facebookresearch/capi"
    weights_licence: ClassVar[str] = "Apache-2.0"
    masks: ClassVar[str] = "all but one block, which wraps around the edges, dropped before the encoder"
    predicts: ClassVar[str] = "clusters of a momentum teacher's patches, for a few of the masked ones"
    backbones: ClassVar[tuple[str, ...]] = (CAPIEncoderConfig.model_type,)

    mask_ratio: float = 166 / 256
    mask_kind: str = "inverse_block"
    prediction_ratio: float | None = 8 / 256
    predictor_hidden_size: int = 1024
    predictor_num_hidden_layers: int = 12
    predictor_num_attention_heads: int = 16
    predictor_intermediate_size: int = 4096
    num_clusters: int = 16384
    student_temperature: float = 0.12
    target_temperature: float = 0.06
    sinkhorn_iterations: int = 3
    positionwise_sinkhorn: bool = True
    momentum_base: float = 0.999
    momentum_warmup: float = 0.1
    clustering_learning_rate_factor: float = 0.5
    patch_learning_rate_factor: float = 0.2

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = CAPIEncoderConfig()
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if self.prediction_ratio is not None and not 0.0 < self.prediction_ratio <= self.mask_ratio:
            raise ValueError(
                f"prediction_ratio is {self.prediction_ratio}; it must lie in (0, mask_ratio], mask_ratio being "
                f"{self.mask_ratio}. None predicts all that is masked."
            )
        check_rotary_heads("predictor_", self.predictor_hidden_size, self.predictor_num_attention_heads)
        for name in ("student_temperature", "target_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, for example 0.1.")
        for name in ("num_clusters", "sinkhorn_iterations", "predictor_num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("momentum_base", "momentum_warmup"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"prediction_ratio": self.prediction_ratio}


@dataclass
class CAPIModelOutput(BaseModelOutputWithPooling):
    """Output of `CAPIModel`.

    Args:
        last_hidden_state: (batch, registers + visible, hidden), normalised.
        pooler_output: (batch, predictor hidden), the vector of a picture in the paper's evaluation: the mean over all
            positions of what the predictor's first block says of them.
        feature_map: (batch, hidden, rows, columns), the patches of `last_hidden_state`; None with a mask.
    """

    feature_map: torch.Tensor | None = None


@dataclass
class CAPIOutput(MaskedPreTrainingOutput):
    """Output of `CAPIForPreTraining`.

    Args:
        logits: (batch, predicted, clusters), in the order of `predicted_ids`.
        predicted_ids: int64 (batch, predicted), the raster positions of the predicted patches, ascending.
        targets: float32 (batch, predicted, clusters), the balanced assignments, which sum to 1.
        target_entropy: float32 scalar, their mean entropy: 0 for hard assignments, ln(clusters) for none at all.
        clusters: int64 (batch, units), the cluster that each patch of the teacher scores highest, without balancing.
    """

    predicted_ids: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_entropy: torch.Tensor | None = None
    clusters: torch.Tensor | None = None


class CAPIPredictor(nn.Module):
    """One mask token at each position, and layers in which each of them attends to the encoder's tokens.

    They do not attend to each other, so that what is said of a patch does not depend on which others are asked for.
    """

    def __init__(self, config: CAPIConfig):
        super().__init__()
        self.encoder_config = config.backbone_config
        self.head_size = config.predictor_hidden_size // config.predictor_num_attention_heads
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.predictor_hidden_size))
        self.layers = nn.ModuleList(
            CAPILayer(
                config,
                config.backbone_config,
                config.predictor_hidden_size,
                config.predictor_num_attention_heads,
                config.predictor_intermediate_size,
                memory_size=config.hidden_size,
            )
            for _ in range(config.predictor_num_hidden_layers)
        )
        self.norm = nn.RMSNorm(
            config.predictor_hidden_size, eps=config.backbone_config.rms_norm_eps, elementwise_affine=False
        )

    def forward(
        self,
        encoded: torch.Tensor,
        visible: torch.Tensor,
        predicted_ids: torch.Tensor,
        grid: tuple[int, int],
        depth: int | None = None,
    ) -> torch.Tensor:
        """Predicts some patches.

        Args:
            encoded: (batch, registers + visible, encoder hidden), normalised.
            visible: int64 (batch, visible), raster positions.
            predicted_ids: int64 (batch, predicted), raster positions.
            grid: (rows, columns) of patches.
            depth: how many layers to run; by default all.

        Returns:
            (batch, predicted, predictor hidden), normalised.
        """
        # Copied: counting operations trips over a view of a parameter.
        hidden_states = self.mask_token.to(encoded.dtype).repeat(*predicted_ids.shape, 1)
        rotation_for = partial(rotation_of, self.encoder_config, grid, dtype=encoded.dtype, head_size=self.head_size)
        rotation, memory_rotation = rotation_for(predicted_ids, registers=False), rotation_for(visible)
        if predicted_ids.shape[1] > 0:  # stock SDPA cannot attend from no place at all
            for layer in self.layers[:depth]:
                hidden_states = layer(hidden_states, rotation, encoded, memory_rotation)
        return self.norm(hidden_states)


class PrototypeHead(nn.Module):
    """Scores of vectors of length 1 for clusters: a linear layer whose rows have learned lengths (weight norm)."""

    def __init__(self, hidden_size: int, num_clusters: int):
        super().__init__()
        self.directions = nn.Parameter(torch.zeros(num_clusters, hidden_size))
        self.lengths = nn.Parameter(torch.ones(num_clusters, 1))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, n, hidden) -> (batch, n, clusters)."""
        norms = torch.linalg.vector_norm(self.directions, dim=1, keepdim=True)
        weight = self.directions * (self.lengths / (norms + 1e-8))
        return F.linear(F.normalize(hidden_states.float(), dim=-1).to(weight.dtype), weight)

    @torch.no_grad()
    def init_weights(self) -> None:
        init.trunc_normal_(self.directions, std=0.02)
        init.ones_(self.lengths)


class CAPIPreTrainedModel(MaskedPatchesModel):
    """Encoder and predictor, with their initialisation."""

    config: CAPIConfig
    _no_split_modules: ClassVar[list[str]] = ["CAPILayer"]
    logged_outputs: ClassVar[tuple[str, ...]] = ("target_entropy",)
    declined_checks: ClassVar[dict[str, str]] = {
        "accumulation": "Sinkhorn balances the clusters over each batch, and two halves are not the whole",
        "export": "the encoder is the paper's own, so what is exported needs hf_masked",
    }

    def __init__(self, config: CAPIConfig):
        super().__init__(config)
        self.predictor = CAPIPredictor(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, CAPIPredictor):
            init.normal_(module.mask_token, std=0.02)
        elif isinstance(module, PrototypeHead):
            module.init_weights()
        else:
            init_capi(module)


class CAPIModel(CAPIPreTrainedModel):
    """Features: of the encoder, per patch, and of the predictor's first block, per picture."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(head|clustering|twin)\..*"]

    def __init__(self, config: CAPIConfig):
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None, **kwargs
    ) -> CAPIModelOutput:
        """Encodes pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `CAPIModelOutput`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        units = everything(pixel_values, grid)
        visible = units if bool_masked_pos is None else self._visible(bool_masked_pos, grid)
        outputs = self.backbone(pixel_values, visible, **kwargs)
        encoded = outputs.last_hidden_state
        patches = encoded[:, self.config.backbone_config.num_register_tokens :]
        return CAPIModelOutput(
            last_hidden_state=encoded,
            pooler_output=self.predictor(encoded, visible, units, grid, depth=1).mean(dim=1),
            feature_map=patches.transpose(1, 2).unflatten(2, grid) if bool_masked_pos is None else None,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class CAPIForPreTraining(CAPIPreTrainedModel):
    """Student, teacher, online clustering and the two losses, whose gradients do not meet."""

    def __init__(self, config: CAPIConfig):
        super().__init__(config)
        self.head = PrototypeHead(config.predictor_hidden_size, config.num_clusters)
        self.clustering = nn.Linear(config.hidden_size, config.num_clusters)
        momentum = partial(capi_momentum, config.momentum_base, config.momentum_warmup)
        self.twin = MomentumTwin(self, ("backbone",), momentum, eval_mode=True)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.clustering.weight, std=1.0)

    def parameter_factors(self) -> dict[str, tuple[float, float]]:
        """Of `default_pretrain_config.yaml`: learning rates, and weight decays relative to 0.1."""
        config = self.config
        return {
            "clustering.*": (config.clustering_learning_rate_factor, 0.1),
            "*.patch_embeddings.weight": (config.patch_learning_rate_factor, 1.0),
            "*.patch_embeddings.bias": (config.patch_learning_rate_factor, 0.0),
            "*norm.weight": (1.0, 0.1),
        }

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        bool_predicted_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> CAPIOutput:
        """One step of clustering and of predicting clusters.

        With several processes the assignments are balanced over the pictures of all of them, so that all must call
        this together, unless without a loss.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            bool_predicted_pos: bool (batch, units), True = predicted, a part of the masked units, the same count in
                each row; drawn here by default.
            noise: float (batch, n), numbers to draw from what is not given: five for an inverse block, and, with a
                `prediction_ratio`, one per unit, of which the smallest among the masked are not predicted.
            generator: to draw from.
            return_loss: whether to compute the loss.
            kwargs: of the encoder, for example `output_hidden_states`.

        Returns:
            `CAPIOutput`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        config = self.config
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None or bool_predicted_pos is None:
            draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        if bool_masked_pos is None:
            bool_masked_pos = make_mask(config.mask_kind, draw, grid, config.mask_ratio, **config.mask_arguments())
        if bool_predicted_pos is None:
            bool_predicted_pos = self.choose(draw, bool_masked_pos)
        predicted_ids = self._predicted(bool_predicted_pos, bool_masked_pos, grid)  # (batch, predicted)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        outputs = self.backbone(pixel_values, visible, **kwargs)
        encoded = outputs.last_hidden_state  # (batch, registers + visible, hidden)
        logits = self.head(self.predictor(encoded, visible, predicted_ids, grid))  # (batch, predicted, clusters)
        scores = self.cluster_scores(pixel_values)  # (batch, units, clusters)
        return CAPIOutput(
            **self.objectives(logits, scores, predicted_ids) if return_loss else {},
            last_hidden_state=encoded,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            logits=logits,
            mask=bool_masked_pos,
            predicted_ids=predicted_ids,
            clusters=scores.argmax(dim=-1),
        )

    def objectives(self, logits: torch.Tensor, scores: torch.Tensor, predicted_ids: torch.Tensor) -> dict:
        """The loss, its parts, the targets and their entropy, as `CAPIOutput` has them.

        Args:
            logits: (batch, predicted, clusters) of the student, at `predicted_ids`.
            scores: (batch, units, clusters) of the teacher, see `cluster_scores`.
        """
        assignments = self.assign(scores)  # (batch, units, clusters)
        targets = take(assignments, predicted_ids)  # (batch, predicted, clusters)
        temperature = self.config.student_temperature
        losses = {
            "prediction": soft_cross_entropy(logits, targets, temperature),
            "clustering": soft_cross_entropy(scores, assignments, temperature),
        }
        return {
            "loss": losses["prediction"] + losses["clustering"],
            "losses": {name: part.detach() for name, part in losses.items()},
            "targets": targets,
            "target_entropy": -torch.xlogy(targets, targets).sum(dim=-1).mean(),
        }

    def choose(self, draw, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Which masked patches are predicted: bool (batch, units)."""
        ratio = self.config.prediction_ratio
        return bool_masked_pos if ratio is None else partial_mask(draw, bool_masked_pos, self.config.mask_ratio, ratio)

    def _predicted(self, bool_predicted_pos, bool_masked_pos, grid) -> torch.Tensor:
        """Raster positions of the predicted patches; a compiled forward takes their count from the config."""
        check_mask(bool_predicted_pos, bool_masked_pos.shape[0], grid, "bool_predicted_pos")
        config, compiling = self.config, torch.compiler.is_compiling()
        num_predicted = num_predicted_units(grid, config.mask_ratio, config.prediction_ratio) if compiling else None
        return predicted_indices(bool_predicted_pos, bool_masked_pos, num_predicted)

    def cluster_scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """How well each patch of the teacher, who sees the whole picture, fits each cluster.

        Returns:
            float32 (batch, units, clusters), with a gradient to the clustering alone.
        """
        with torch.no_grad():
            tokens = self.twin.backbone(pixel_values).last_hidden_state
            patches = tokens[:, self.config.backbone_config.num_register_tokens :].float()
            patches = F.normalize(patches, dim=-1, eps=1e-7).to(self.clustering.weight.dtype)
        return self.clustering(patches).float()

    def assign(self, scores: torch.Tensor) -> torch.Tensor:
        """Balanced assignments of patches to clusters, without gradient: float32 (batch, units, clusters)."""
        config = self.config
        scores = scores.detach() / config.target_temperature
        if config.positionwise_sinkhorn:
            return sinkhorn(scores, config.sinkhorn_iterations)
        return sinkhorn(scores.flatten(0, 1), config.sinkhorn_iterations).view_as(scores)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        Each cluster has a colour of its own (a shade of gray, for pictures of one channel), the same in both maps.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid)
        output = self(pixel_values, bool_masked_pos, bool_predicted_pos=bool_masked_pos, return_loss=False)
        predicted = output.clusters.scatter(1, output.predicted_ids, output.logits.argmax(dim=-1))
        patch_size = pair(self.config.backbone_config.patch_size)
        patches = patchify(pixel_values.float(), patch_size)
        colors = self._cluster_colors(pixel_values)
        maps = {
            name: colors[clusters].repeat(1, 1, patch_size[0] * patch_size[1])
            for name, clusters in (("teacher", output.clusters), ("predicted", predicted))
        }
        hidden = bool_masked_pos.unsqueeze(-1)
        panels = {
            "picture": patches,
            "masked": patches.masked_fill(hidden, 0.0),
            "teacher clusters": maps["teacher"],
            "predicted clusters": maps["predicted"].masked_fill(~hidden, 0.0),
        }
        return {name: unpatchify(panel, grid, patch_size) for name, panel in panels.items()}

    def _cluster_colors(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(clusters, channels) between the smallest and the largest value of the pictures, spread evenly."""
        channels, device = pixel_values.shape[1], pixel_values.device
        # Multiples of powers of the generalised golden ratio: a sequence without clumps in any dimension.
        ratio = 2.0
        for _ in range(30):
            ratio = (1 + ratio) ** (1 / (channels + 1))
        steps = torch.tensor([ratio ** -(channel + 1) for channel in range(channels)], device=device)
        numbers = (torch.arange(1, self.config.num_clusters + 1, device=device)[:, None] * steps) % 1
        low, high = pixel_values.float().amin(), pixel_values.float().amax()
        return low + (high - low) * numbers


@torch.no_grad()
def sinkhorn(scores: torch.Tensor, iterations: int, eps: float = 1e-8) -> torch.Tensor:
    """Assignments that use all clusters alike, over the samples of all processes (`sinkhorn_knopp`).

    exp(scores), then by turns: for each cluster, over the sum of the samples; for each sample, over the sum of the
    clusters. A cluster's largest score becomes 50 beforehand, which the first step takes back: it keeps the
    exponential in the range of float32.

    Args:
        scores: float32 (batch, ..., clusters), over the temperature.
        iterations: of both steps.
        eps: added to the sums.

    Returns:
        float32, the same shape; sums to 1 over the clusters.
    """
    highest = _over_processes(scores.amax(dim=0, keepdim=True), "max")
    weights = (scores - highest + 50).exp()
    for _ in range(iterations):
        weights = weights / (_over_processes(weights.sum(dim=0, keepdim=True), "sum") + eps)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + eps)
    return weights


def _over_processes(value: torch.Tensor, reduction: str) -> torch.Tensor:
    """The sum or the largest of each element over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        operation = distributed.ReduceOp.MAX if reduction == "max" else distributed.ReduceOp.SUM
        distributed.all_reduce(value, operation)
    return value


def soft_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """Mean of -sum(targets * log softmax(logits / temperature)) over all rows, in float32; 0 where there are none.

    Args:
        logits, targets: (batch, n, clusters); targets sum to 1.
    """
    losses = -(targets * F.log_softmax(logits.float() / temperature, dim=-1)).sum(dim=-1)
    return losses.sum() / max(losses.numel(), 1)


def capi_momentum(base: float, warmup: float, progress: float, truncation: float = 0.8) -> float:
    """From 1, a teacher that stands still, linearly to `base` over the share `warmup` of training; then towards 1
    along the first `truncation` of half a cosine (`momentum_schedule` of the reference)."""
    if progress < warmup:
        return 1 - (1 - base) * progress / warmup
    done = (progress - warmup) / max(1 - warmup, 1e-12)
    return 1 - (1 - base) * (1 + math.cos(math.pi * truncation * done)) / 2


# Official name -> ours, within a `backbone`, a student's `head` and the teacher's.
_BACKBONE_RENAMING = (
    (r"^registers$", "backbone.embeddings.register_tokens"),
    (r"^patch_embed\.", "backbone.embeddings.patch_embeddings."),
    (r"^mask_token$", "predictor.mask_token"),
    (r"^encoder\.blocks\.", "backbone.layers."),
    (r"^decoder\.blocks\.", "predictor.layers."),
    (r"\.residual1\.norm\.", ".attention_norm."),
    (r"\.residual2\.norm\.", ".feed_forward_norm."),
    (r"\.residual1\.fn\.proj\.", ".attention.o_proj."),
    (r"\.residual1\.fn\.", ".attention."),
    (r"\.residual2\.fn\.fc1\.", ".feed_forward.0."),
    (r"\.residual2\.fn\.fc2\.", ".feed_forward.2."),
)
_HEAD_RENAMING = (
    (r"^last_layer\.weight_v$", "head.directions"),
    (r"^last_layer\.weight_g$", "head.lengths"),
    (r"^layer\.", "clustering."),
)
_FREQUENCIES = "encoder.blocks.0.residual1.fn.rope.freqs"


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: CAPIConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    The released files hold encoder, predictor and head under `backbone.` and `head.`, which make a `CAPIModel`; the
    head, of no use without the clustering, is left out. Checkpoints of training, with `student.`, `student_ema.` and
    `teacher.`, make a `CAPIForPreTraining`.

    Args:
        state_dict: official.
        config: whose frequencies those in the file must be.

    Raises:
        ValueError: for other frequencies of the rotary positions.
    """
    if "student.backbone.registers" not in state_dict:
        return _convert_backbone(_under("backbone.", state_dict), config) | {
            name: tensor for name, tensor in state_dict.items() if not name.startswith(("backbone.", "head."))
        }
    # The teacher's encoder is the average of the student's and bears both names; of the average no more is needed.
    average = _convert_backbone(_under("student_ema.backbone.", state_dict), config)
    twin = {f"twin.{name}": tensor for name, tensor in average.items() if name.startswith("backbone.")}
    heads = _under("student.head.", state_dict) | _under("teacher.head.", state_dict)
    known = ("student.backbone.", "student.head.", "student_ema.", "teacher.backbone.", "teacher.head.")
    left_over = {name: tensor for name, tensor in state_dict.items() if not name.startswith(known)}
    student = _convert_backbone(_under("student.backbone.", state_dict), config)
    return student | twin | rename_weights(heads, _HEAD_RENAMING) | left_over


def _under(prefix: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


def _convert_backbone(weights: dict[str, torch.Tensor], config: CAPIConfig) -> dict[str, torch.Tensor]:
    """Encoder and predictor; the frequencies, parameters there that are never trained, are compared and dropped."""
    converted = {}
    for name, tensor in rename_weights(weights, _BACKBONE_RENAMING).items():
        if not name.endswith(".rope.freqs"):
            converted[name] = tensor.unsqueeze(0) if name == "predictor.mask_token" else tensor
            continue
        axes = torch.eye(2).unsqueeze(0)  # (1, 2, 2): one turn of the row, one of the column
        encoder = config.backbone_config
        expected = rope_angles(axes, tensor.shape[1], encoder.rope_max_frequency, encoder.rope_min_frequency)[0]
        if not torch.allclose(tensor.float(), expected, rtol=1e-2, atol=1e-6):
            raise ValueError(
                f"{name} is not what rope_max_frequency={encoder.rope_max_frequency} and rope_min_frequency="
                f"{encoder.rope_min_frequency} make: leave the config to be read from the file, or set them there."
            )
    return converted


def official_config(state_dict: dict[str, torch.Tensor]) -> CAPIConfig:
    """The config of an official checkpoint, read from its shapes and from the frequencies of its rotary positions.

    The picture's size, on which no shape depends, is the released models' 16 x 16 patches.

    Raises:
        ValueError: if the file holds no backbone of CAPI.
    """
    weights = _under("student.backbone.", state_dict) or _under("backbone.", state_dict)
    if _FREQUENCIES not in weights:
        raise ValueError(
            f"The checkpoint holds no backbone of CAPI (backbone.{_FREQUENCIES}, or with student. before it)."
        )
    frequencies = weights[_FREQUENCIES].float() / (2 * math.pi)  # (2, head width)
    hidden_size, num_channels, patch_size, _ = weights["patch_embed.weight"].shape
    predictor_size = weights["mask_token"].shape[-1]
    decoder_frequencies = weights[_FREQUENCIES.replace("encoder", "decoder")]
    clusters = state_dict.get("student.head.last_layer.weight_g", state_dict.get("head.last_layer.weight_g"))
    return CAPIConfig(
        backbone_config=CAPIEncoderConfig(
            hidden_size=hidden_size,
            num_hidden_layers=official_depth(weights, "encoder.blocks"),
            num_attention_heads=hidden_size // frequencies.shape[1],
            intermediate_size=weights["encoder.blocks.0.residual2.fn.fc1.weight"].shape[0],
            image_size=16 * patch_size,
            patch_size=patch_size,
            num_channels=num_channels,
            num_register_tokens=weights["registers"].shape[1],
            rope_max_frequency=frequencies[0, 0].item(),
            rope_min_frequency=frequencies[0, frequencies.shape[1] // 4 - 1].item(),
        ),
        predictor_hidden_size=predictor_size,
        predictor_num_hidden_layers=official_depth(weights, "decoder.blocks"),
        predictor_num_attention_heads=predictor_size // decoder_frequencies.shape[1],
        predictor_intermediate_size=weights["decoder.blocks.0.residual2.fn.fc1.weight"].shape[0],
        num_clusters=CAPIConfig.num_clusters if clusters is None else len(clusters),
    )


def tiny_config() -> CAPIConfig:
    return CAPIConfig(
        backbone_config=CAPIEncoderConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            num_register_tokens=4,
            drop_path_rate=0.0,
        ),
        prediction_ratio=0.25,
        predictor_hidden_size=16,
        predictor_num_hidden_layers=1,
        predictor_num_attention_heads=2,
        predictor_intermediate_size=32,
        num_clusters=16,
    )


register_variant(
    config=CAPIConfig,
    pretraining=CAPIForPreTraining,
    model=CAPIModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
