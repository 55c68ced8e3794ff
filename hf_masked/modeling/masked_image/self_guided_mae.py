"""Self-guided MAE: once the encoder's own features tell the main object from the rest, mask that object.

Jeongwoo Shin et al., "Self-Guided Masked Autoencoder", NeurIPS 2024, arXiv 2507.19773. No reference implementation is
public: what is marked "our choice" below could not be checked against one.
"""

import math
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers import initialization as init

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import encode_visible, num_prefix_tokens, visible_feature_maps
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import patchify, unpatchify
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import random_mask
from hf_masked.randomness import Draw, given_draw, model_draw

AFFINITIES = ("relu", "binary")
HINT_STRATEGIES = ("random", "similarity")

# Below this second eigenvalue the affinities of a picture are those of one single cluster (our choice).
SINGLE_CLUSTER = 1e-4

# A detected start takes effect at the next full thousandth of training, so that the device need not be asked at each
# step; this thousandth is never trained at.
NEVER = 1000


class SelfGuidedMAEConfig(MAEConfig):
    """Config of Self-guided MAE: MAE's, and the following.

    Args:
        guide_start: share of training with MAE's random masks; the paper's 50 of 400 epochs. None: until the decoder
            exploits mask tokens more than visible patches (see `exploitation_rate`), which may be never.
        guide_earliest: share of training before which no start is detected (our choice; as the warm-up): at first,
            before there are any clusters, both rates are about 1 and mask tokens may be ahead.
        guide_patience: how many steps in a row mask tokens must be ahead for a start to be detected (our choice).
        guide_layer: index of the encoder's block whose output is clustered; the last by default.
        affinity: of two patches: the cosine of their features where it is positive ("relu", our choice), or whether
            it exceeds `affinity_threshold` ("binary", as in TokenCut, arXiv 2202.11539).
        affinity_threshold: of "binary".
        max_target_share: a cluster with a larger share of the patches is taken for background (our choice).
        hint_ratio_start, hint_ratio_end: share of the main cluster that stays visible, at `guide_start` and at the end
            of training, linear in between (our choice).
        hint_strategy: which patches of the cluster stay visible: "random" ones, or those most similar to its mean.
    """

    model_type = "hf_masked_self_guided_mae"
    paper_title: ClassVar[str] = "Self-Guided Masked Autoencoder"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2507.19773"
    reference_repository: ClassVar[None] = None
    weights_licence: ClassVar[None] = None
    masks: ClassVar[str] = "random patches at first, then those of the main cluster of the encoder's features"

    guide_start: float | None = 0.125
    guide_earliest: float = 0.1
    guide_patience: int = 20
    guide_layer: int = -1
    affinity: str = "relu"
    affinity_threshold: float = 0.2
    max_target_share: float = 0.75
    hint_ratio_start: float = 0.10
    hint_ratio_end: float = 0.05
    hint_strategy: str = "random"

    def check(self) -> None:
        super().check()
        if self.mask_kind != "random":
            raise ValueError(
                f"mask_kind is {self.mask_kind!r}: Self-guided MAE chooses its masks itself, from random ones. For "
                "masks of another kind set the processor's `mask_kind`."
            )
        if self.guide_start is not None and not 0.0 <= self.guide_start < 1.0:
            raise ValueError(
                f"guide_start is {self.guide_start}; it must lie in [0, 1), for example 0.125, or be None, for a "
                "start that is detected."
            )
        if not 0.0 <= self.guide_earliest < 1.0:
            raise ValueError(f"guide_earliest is {self.guide_earliest}; it must lie in [0, 1), for example 0.1.")
        if self.guide_patience < 1:
            raise ValueError(f"guide_patience is {self.guide_patience}; it must be at least 1 step, for example 20.")
        for name in ("max_target_share", "hint_ratio_start", "hint_ratio_end"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")
        layers = self.backbone_config.num_hidden_layers
        if not -layers <= self.guide_layer < layers:
            raise ValueError(f"guide_layer is {self.guide_layer}; the backbone has {layers} blocks.")
        if self.affinity not in AFFINITIES:
            raise ValueError(f"affinity is {self.affinity!r}; it must be one of {', '.join(AFFINITIES)}.")
        if self.hint_strategy not in HINT_STRATEGIES:
            raise ValueError(
                f"hint_strategy is {self.hint_strategy!r}; it must be one of {', '.join(HINT_STRATEGIES)}."
            )

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"mask_kind": "model"}


@dataclass
class SelfGuidedMAEOutput(MaskedPreTrainingOutput):
    """Output of a model that detects when to begin.

    Args:
        exploitation_of_masked, exploitation_of_visible: float32 scalars, the rates in the last step that was measured,
            means over the decoder's blocks; 1 before the first.
    """

    exploitation_of_masked: torch.Tensor | None = None
    exploitation_of_visible: torch.Tensor | None = None


class SelfGuidedMAEModel(MAEModel):
    """The encoder, MAE's: without a mask the plain backbone, with one it sees the visible patches only."""

    config: SelfGuidedMAEConfig


class SelfGuidedMAEForPreTraining(MAEForPreTraining):
    """MAE, whose encoder chooses the masks once it can.

    With `guide_start=None` three buffers are saved with the weights: `exploitation`, float32 (2,), the rates of mask
    tokens and of visible patches in the last step that was measured; `steps_ahead`, int64, in how many steps in a row
    mask tokens have been ahead; `guide_thousandth`, int64, the thousandth of training in which guided masks begin.
    A forward pass only notes the rates, so that a compiled one holds no communication.
    """

    config: SelfGuidedMAEConfig
    # DDP would overwrite the notes of one process with those of another.
    _ddp_params_and_buffers_to_ignore: ClassVar[list[str]] = ["noted"]

    def __init__(self, config: SelfGuidedMAEConfig):
        super().__init__(config)
        self._watching = False
        self._detected_start = 1.0
        self._thousandth: int | None = None
        if config.guide_start is None:
            self.logged_outputs = ("exploitation_of_masked", "exploitation_of_visible")
            self.register_buffer("exploitation", torch.ones(2))
            self.register_buffer("steps_ahead", torch.zeros((), dtype=torch.int64))
            self.register_buffer("guide_thousandth", torch.tensor(NEVER))
            # Since the last step: the sums over pictures of both rates and of 1.
            self.register_buffer("noted", torch.zeros(3), persistent=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "noted"):
            init.ones_(self.exploitation)
            init.zeros_(self.steps_ahead)
            init.constant_(self.guide_thousandth, NEVER)
            init.zeros_(self.noted)

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
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; by default the model
                chooses, as far into training as `self.training_progress` says.
            noise: float (batch, units), distinct numbers for what is random in the mask: the smallest stay visible.
            generator: to draw them from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedPreTrainingOutput`, as MAE's.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        # Out here, so that hidden states and attentions that are asked for are those of the visible patches.
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        output = super().forward(pixel_values, bool_masked_pos, return_loss=return_loss, **kwargs)
        if self.config.guide_start is not None or isinstance(output, tuple):
            return output
        masked, visible = (rate.clone() for rate in self.exploitation)
        return SelfGuidedMAEOutput(**output, exploitation_of_masked=masked, exploitation_of_visible=visible)

    def decode(self, encoded: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """As MAE's; notes the exploitation rates in steps that are measured."""
        if not (self._watching and self.training):
            return super().decode(encoded, visible, grid)
        attentions = []
        logits = self.decoder.predict(self.decoder.embed(encoded, visible, grid), attentions)
        with torch.no_grad():
            is_visible = torch.zeros(logits.shape[:2], dtype=torch.bool, device=logits.device)
            is_visible = is_visible.scatter(1, visible, True)
            rates = [rate.mean() for rate in exploitation_rate(attentions, is_visible, ~is_visible)]
            self.noted += len(logits) * torch.stack([*rates, torch.ones_like(rates[0])])
        return logits

    @property
    def guided_from(self) -> float:
        """Share of training at which guided masks begin; 1 while that has not been detected."""
        return self._detected_start if self.config.guide_start is None else self.config.guide_start

    def on_progress(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Looks whether a start has been detected."""
        if self.config.guide_start is not None:
            return
        if self.training_progress == 0.0:
            # A new run, perhaps from the weights of a complete one.
            self.exploitation.fill_(1.0)
            self.steps_ahead.zero_()
            self.guide_thousandth.fill_(NEVER)
            self.noted.zero_()
            self._thousandth = None
        # The device is asked once in a thousandth of training, and at the begin of a run that is resumed.
        thousandth = full_thousandths(self.training_progress)
        if thousandth != self._thousandth:
            self._thousandth, self._detected_start = thousandth, self.guide_thousandth.item() / NEVER
        self._watching = self.training_progress < self._detected_start

    @torch.no_grad()
    def update_twins(self) -> None:
        """Detects the start, from what all processes have noted in all batches of the step."""
        super().update_twins()
        if not self._watching:
            return
        noted = self.noted.clone().float()
        self.noted.zero_()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(noted)
        masked, visible = rates = noted[:2] / noted[2]
        self.exploitation.copy_(rates)
        if self.training_progress < self.config.guide_earliest:
            return
        self.steps_ahead.copy_(torch.where(masked > visible, self.steps_ahead + 1, 0))
        detected = (self.steps_ahead >= self.config.guide_patience) & (self.guide_thousandth == NEVER)
        self.guide_thousandth.masked_fill_(detected, full_thousandths(self.training_progress) + 1)

    def draw_mask(self, pixel_values, grid, noise=None, generator=None) -> torch.Tensor:
        """bool (batch, units): random before `guided_from`, then the main cluster but for its hints.

        Args:
            noise, generator: of what is random; see `model_draw`.
        """
        config, start = self.config, self.guided_from
        draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        if start == 1.0 or self.training_progress < start:
            return random_mask(draw, grid, config.mask_ratio)
        guided = (self.training_progress - start) / (1.0 - start)
        hint_ratio = config.hint_ratio_start + (config.hint_ratio_end - config.hint_ratio_start) * guided
        return self.guided_mask(pixel_values, grid, draw, hint_ratio)

    def guided_mask(self, pixel_values, grid, draw: Draw, hint_ratio: float) -> torch.Tensor:
        """bool (batch, units): the main cluster but for its hints."""
        config = self.config
        target, relevance = self.main_cluster(pixel_values)
        noise = draw(target.shape[1])
        hints = choose_hints(target, relevance, noise, grid, config.mask_ratio, hint_ratio, config.hint_strategy)
        return relevance_mask(relevance, hints, noise, grid, config.mask_ratio)

    @torch.no_grad()
    def main_cluster(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The main object, as the encoder sees the whole picture.

        Returns:
            target: bool (batch, units), True = of the object; nowhere where there is no second cluster.
            relevance: float32 (batch, units), cosine to the object's mean.
        """
        config = self.config
        self._check_inputs(pixel_values, None)
        depth = config.guide_layer % config.backbone_config.num_hidden_layers + 1
        with in_eval_mode(self.backbone):
            tokens = visible_feature_maps(self.backbone, pixel_values, depth=depth)[
                -1
            ]  # (batch, prefix + units, hidden)
        # Eigenvectors need float32, whatever the autocast.
        with torch.autocast(pixel_values.device.type, enabled=False):
            features = tokens[:, num_prefix_tokens(config.backbone_config) :].float()
            threshold = config.affinity_threshold if config.affinity == "binary" else None
            target, _ = normalized_cut(features, threshold)
            too_large = target.float().mean(dim=1, keepdim=True) > config.max_target_share
            target = target ^ too_large
            return target, relevance_to(features, target)

    def segment(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """bool (batch, rows, columns): True = a patch of the main object."""
        grid = self._check_inputs(pixel_values, None)
        return self.main_cluster(pixel_values)[0].unflatten(1, grid)

    @torch.no_grad()
    def exploitation_rates(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `exploitation_rate` of mask tokens and of visible patches for these pictures, each float32 (blocks,).

        Not for sharded models, whose weights are there in `forward` only.

        Args:
            bool_masked_pos: bool (batch, units), True = masked; random by default.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training)
            bool_masked_pos = random_mask(draw, grid, self.config.mask_ratio)
        visible = self._visible(bool_masked_pos, grid)
        attentions = []
        encoded = encode_visible(self.backbone, pixel_values, visible)
        self.decoder.predict(self.decoder.embed(encoded, visible, grid), attentions)
        return exploitation_rate(attentions, ~bool_masked_pos, bool_masked_pos)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """MAE's panels, with a mask as at the end of training, and the main cluster."""
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training)
            bool_masked_pos = self.guided_mask(pixel_values, grid, draw, self.config.hint_ratio_end)
        patches = patchify(pixel_values.float(), self.patch_size)
        cluster = patches.masked_fill(~self.main_cluster(pixel_values)[0].unsqueeze(-1), 0.0)
        panels = super().pictures(pixel_values, bool_masked_pos)
        return panels | {"main cluster": unpatchify(cluster, grid, self.patch_size)}


class SelfGuidedMAEForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head on the encoder of Self-guided MAE."""

    config: SelfGuidedMAEConfig


def exploitation_rate(
    decoder_attentions: Iterable[torch.Tensor], visible: torch.Tensor, masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention masked positions pay, in each block of the decoder, to a mask token and to a visible patch.

    The paper begins to guide where the rate of mask tokens, which by then carry what the patches share, overtakes that
    of visible ones (figure 4). Its formula could not be checked. Our choice: the attention that ONE token of the kind
    gets on average, over what it would get if all tokens got the same. So both are 1 for uniform attention, whatever
    the mask ratio, whereas of the sums of attention three quarters would go to mask tokens by their number alone. The
    positions that pay it are the masked ones, which the loss is about; each pays attention to itself as well.

    Args:
        decoder_attentions: of each block, float (batch, heads, tokens, tokens), rows that sum to 1; the units come
            last, after prefix tokens, to which neither rate refers.
        visible, masked: bool (batch, units).

    Returns:
        masked, visible: float32 (blocks,), means over heads, pictures and tokens of the kind.
    """
    rates = []
    for weights in decoder_attentions:
        tokens, units = weights.shape[-1], masked.shape[1]
        paid = weights[..., tokens - units :, tokens - units :].float().mean(dim=1)  # (batch, units, units)
        received = (paid * masked.unsqueeze(2)).sum(dim=1) / masked.sum(dim=1, keepdim=True).clamp(min=1)
        rates.append(torch.stack([tokens * masked_mean(received, kind) for kind in (masked, visible)]))
    of_masked, of_visible = torch.stack(rates).unbind(dim=1)
    return of_masked, of_visible


def full_thousandths(progress: float) -> int:
    """Of a share of training; the share of a whole number of steps may fall short of what it should be."""
    return math.floor(progress * NEVER + 1e-9)


@contextmanager
def in_eval_mode(module: nn.Module):
    """Without dropout for a while."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def normalized_cut(features: torch.Tensor, threshold: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Cuts each sample's units in two where they are least alike (Shi and Malik, PAMI 2000).

    The second-smallest generalised eigenvector of (D - W) y = lambda D y, where W holds the affinities and D their
    sums, split at its mean. As in TokenCut the first cluster is the one with the entry furthest from the mean.

    Args:
        features: float32 (batch, units, dim), of any scale.
        threshold: affinities are 1 where the cosine exceeds it; by default they are the cosine where it is positive.

    Returns:
        partition: bool (batch, units), True = of the first cluster; nowhere in samples that are one single cluster.
        vector: float32 (batch, units), the eigenvector with its sign such that the first cluster lies above the mean;
            zero in samples that are one single cluster.
    """
    features = F.normalize(features, dim=-1)
    cosine = features @ features.transpose(1, 2)
    # The small number keeps the graph connected.
    affinity = (cosine.clamp(min=0.0) if threshold is None else (cosine > threshold).float()) + 1e-5
    scale = affinity.sum(dim=2).rsqrt()  # (batch, units)
    values, vectors = torch.linalg.eigh(scale[:, :, None] * affinity * scale[:, None, :])
    clusters = values[:, -2:-1] > SINGLE_CLUSTER  # (batch, 1)
    vector = torch.where(clusters, scale * vectors[:, :, -2], 0.0)
    deviation = vector - vector.mean(dim=1, keepdim=True)
    peak = deviation.gather(1, deviation.abs().argmax(dim=1, keepdim=True))
    return deviation * peak > 0, vector * peak.sign()


def relevance_to(features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cosine of each unit's features and the mean of the target's; 0 where there is no target.

    Args:
        features: float32 (batch, units, dim).
        target: bool (batch, units).
    """
    features = F.normalize(features, dim=-1)
    mean = F.normalize(target.unsqueeze(1).float() @ features, dim=-1)  # (batch, 1, dim)
    return (mean @ features.transpose(1, 2)).squeeze(1)


def choose_hints(
    target: torch.Tensor,
    relevance: torch.Tensor,
    noise: torch.Tensor,
    grid: tuple[int, int],
    ratio: float,
    hint_ratio: float,
    strategy: str = "random",
) -> torch.Tensor:
    """Units of the target that would be masked and shall not be, a share `hint_ratio` of the target.

    Args:
        target: bool (batch, units).
        relevance: float (batch, units).
        noise: float (batch, units), distinct numbers; with the strategy "random" the smallest are chosen.
        grid, ratio: of the mask.
        strategy: "random", or "similarity" for the most relevant.

    Returns:
        bool (batch, units).
    """
    candidates = target & relevance_mask(relevance, torch.zeros_like(target), noise, grid, ratio)
    number = (hint_ratio * target.sum(dim=1, keepdim=True)).round()
    keys = noise if strategy == "random" else -relevance
    ranks = keys.masked_fill(~candidates, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return candidates & (ranks < number)


def relevance_mask(
    relevance: torch.Tensor, hints: torch.Tensor, noise: torch.Tensor, grid: tuple[int, int], ratio: float
) -> torch.Tensor:
    """Masks the most relevant units but for the hints; among equals those with the smallest noise stay visible.

    Args:
        relevance: float (batch, units).
        hints: bool (batch, units), no more than stay visible.
        noise: float (batch, units), distinct numbers.
        grid: (rows, columns) of units.
        ratio: share of masked units.

    Returns:
        bool (batch, units), True = masked.
    """
    by_noise = noise.argsort(dim=1, stable=True)
    order = by_noise.gather(1, relevance.gather(1, by_noise).argsort(dim=1, stable=True))
    ranks = order.argsort(dim=1)  # of the relevance, from 0
    return random_mask(given_draw(ranks.masked_fill(hints, -1)), grid, ratio)


def tiny_config() -> SelfGuidedMAEConfig:
    return SelfGuidedMAEConfig(**mae.settings_of(mae.tiny_config()))


register_variant(
    config=SelfGuidedMAEConfig,
    pretraining=SelfGuidedMAEForPreTraining,
    model=SelfGuidedMAEModel,
    heads={AutoModelForImageClassification: SelfGuidedMAEForImageClassification},
    tiny_config=tiny_config,
)
