"""HPM: predict for every patch how badly it will be reconstructed, and mask more and more of the worst ones.

Haochen Wang et al., "Hard Patches Mining for Masked Image Modeling", CVPR 2023, arXiv 2304.05919; with video,
"Bootstrap Masked Visual Modeling via Hard Patches Mining", TPAMI, arXiv 2312.13714.
Reference implementation: https://github.com/Haochen-Wang409/HPM (`models_mae_learn_loss.py`, `engine_pretrain.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import (
    MAEConfig,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEModel,
)
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import encode_visible, num_prefix_tokens
from hf_masked.modeling.parts.blocks import TransformerBlock
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.patches import unpatchify, visible_indices
from hf_masked.modeling.parts.state_dicts import rename_weights, timm_block_renaming
from hf_masked.modeling.parts.targets import normalize_patches
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import num_masked_units, random_mask
from hf_masked.randomness import given_draw, model_draw

LOSS_PREDICTIONS = ("relative", "absolute", "none")


class HPMConfig(MAEConfig):
    """Config of HPM: MAE's, with raw pixels as targets, and the following.

    Args:
        predictor_num_hidden_layers: blocks of the loss predictor, which is as wide as the decoder.
        loss_prediction: what the predictor learns: of any two patches the "relative" order of their losses (the
            paper's choice), their "absolute" standardised losses, or "none", which is MAE.
        prediction_weight: of that objective beside the reconstruction loss.
        hard_ratio_start, hard_ratio_end: share of the masked patches that are those with the largest predicted losses,
            at the begin and at the end of training, linear in between; the others are random.
        momentum_start, momentum_end: of the twin that predicts the losses, at the begin and from `momentum_warmup` on,
            linear in between.
        momentum_warmup: share of training; the paper's 100 of 800 epochs.
    """

    model_type = "hf_masked_hpm"
    paper_title: ClassVar[str] = "Hard Patches Mining for Masked Image Modeling"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2304.05919"
    reference_repository: ClassVar[str] = "https://github.com/Haochen-Wang409/HPM"
    weights_licence: ClassVar[str] = "Apache-2.0"
    masks: ClassVar[str] = "patches with large predicted losses, more of them as training goes on, and random ones"
    predicts: ClassVar[str] = "pixels of the masked patches, and the order of their losses"

    norm_pix_loss: bool = False
    predictor_num_hidden_layers: int = 8
    loss_prediction: str = "relative"
    prediction_weight: float = 1.0
    hard_ratio_start: float = 0.0
    hard_ratio_end: float = 0.5
    momentum_start: float = 0.999
    momentum_end: float = 0.9999
    momentum_warmup: float = 0.125

    def check(self) -> None:
        super().check()
        if self.mask_kind != "random" or self.mask_ratio == 0:
            raise ValueError(
                f"mask_kind={self.mask_kind!r} with mask_ratio={self.mask_ratio}: HPM chooses its masks itself, from "
                "random ones, and masks at least one patch. For masks of another kind set the processor's `mask_kind`."
            )
        if self.loss_prediction not in LOSS_PREDICTIONS:
            raise ValueError(
                f"loss_prediction is {self.loss_prediction!r}; it must be one of {', '.join(LOSS_PREDICTIONS)}."
            )
        for name in ("hard_ratio_start", "hard_ratio_end", "momentum_start", "momentum_end", "momentum_warmup"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"mask_kind": "model"}


@dataclass
class HPMOutput(MaskedPreTrainingOutput):
    """Output of `HPMForPreTraining`.

    Args:
        loss_map: float32 (batch, units), the predicted losses in raster order: large where reconstruction is hard.
            Their order tells, their scale does not. None with `loss_prediction="none"`.
    """

    loss_map: torch.Tensor | None = None


class LossPredictor(nn.Module):
    """Transformer blocks on what the decoder is given: one predicted loss per unit.

    As in the reference the last layer is as wide as a patch and its outputs are averaged.
    """

    def __init__(self, config: HPMConfig, output_size: int):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens(config.backbone_config)
        width = config.decoder_hidden_size
        self.layers = nn.ModuleList(
            TransformerBlock(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.predictor_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, output_size)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + units, hidden) of `MaskTokenDecoder.embed` -> float32 (batch, units)."""
        for layer in self.layers:
            sequence = layer(sequence)
        return self.head(self.norm(sequence[:, self.num_prefix_tokens :])).float().mean(dim=-1)


class HPMModel(MAEModel):
    """The encoder, MAE's: without a mask the plain backbone, with one it sees the visible patches only."""

    config: HPMConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|loss_predictor|twin)\..*"]


class HPMForPreTraining(MAEForPreTraining):
    """MAE with a loss predictor, and a momentum twin whose predictions choose the masks."""

    config: HPMConfig

    def __init__(self, config: HPMConfig):
        super().__init__(config)
        if config.loss_prediction != "none":
            self.loss_predictor = LossPredictor(config, self.decoder.head.out_features)
            momentum = partial(rising_momentum, config.momentum_start, config.momentum_end, config.momentum_warmup)
            self.twin = MomentumTwin(self, ("backbone", "decoder", "loss_predictor"), momentum, eval_mode=True)
            # MAE's constructor has prepared what was there before.
            self.post_init()

    def frozen_parameters(self):
        yield from super().frozen_parameters()
        if self.config.loss_prediction == "relative" and hasattr(self, "loss_predictor"):
            # They shift all predictions alike, of which only differences count; the reference moves them by rounding.
            yield self.loss_predictor.norm.bias
            yield self.loss_predictor.head.bias

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> HPMOutput:
        """One step of masked autoencoding and of predicting the losses.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; by default the model
                chooses, as far into training as `self.training_progress` says.
            noise: float (batch, units), distinct numbers for the random part of the mask: the smallest stay visible.
            generator: to draw that part from.
            return_loss: whether to compute the loss.

        Returns:
            `HPMOutput`; `logits` are (batch, units, patch height * patch width * channels) in `patchify` order.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        # Out here, so that hidden states and attentions that are asked for are not the twin's.
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        return self._reconstruct(pixel_values, bool_masked_pos, grid, return_loss, **kwargs)

    @capture_outputs(tie_last_hidden_states=False)
    def _reconstruct(self, pixel_values, bool_masked_pos, grid, return_loss, **kwargs) -> HPMOutput:
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        encoded = encode_visible(self.backbone, pixel_values, visible, **kwargs)  # (batch, prefix + visible, hidden)
        sequence = self.decoder.embed(encoded, visible, grid)  # (batch, prefix + units, decoder hidden)
        logits = self.decoder.predict(sequence)  # (batch, units, values)
        predicts_losses = self.config.loss_prediction != "none"
        loss_map = self.loss_predictor(sequence) if predicts_losses else None  # (batch, units)
        losses = None
        if return_loss:
            loss_per_unit = self.loss_per_unit(pixel_values, logits)
            losses = {"reconstruction": masked_mean(loss_per_unit, bool_masked_pos)}
        if return_loss and predicts_losses:
            masked = visible_indices(~bool_masked_pos, num_masked=visible.shape[1])  # (batch, masked)
            losses["prediction"] = self.config.prediction_weight * self.prediction_loss(
                loss_map.gather(1, masked), loss_per_unit.detach().gather(1, masked)
            )
        return HPMOutput(
            loss=sum(losses.values()) if losses else None,
            losses={name: part.detach() for name, part in losses.items()} if losses else None,
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
            loss_map=loss_map,
        )

    def prediction_loss(self, predicted: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
        """The objective of the loss predictor on masked patches, (batch, masked) each."""
        if self.config.loss_prediction == "relative":
            return relative_order_loss(predicted, losses)
        return F.mse_loss(predicted, normalize_patches(losses))

    def draw_mask(self, pixel_values, grid, noise=None, generator=None, progress: float | None = None) -> torch.Tensor:
        """bool (batch, units): the patches that the twin finds hardest, and random ones.

        Args:
            noise, generator: of the random part; see `model_draw`.
            progress: of training, by default `self.training_progress`.
        """
        config = self.config
        progress = self.training_progress if progress is None else progress
        draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        share = config.hard_ratio_start + (config.hard_ratio_end - config.hard_ratio_start) * progress
        num_hard = int(num_masked_units(grid, config.mask_ratio) * share)
        if config.loss_prediction == "none" or num_hard == 0:
            return random_mask(draw, grid, config.mask_ratio)
        loss_map = self.predict_difficulty(pixel_values).flatten(1)
        return hard_patch_mask(loss_map, draw(loss_map.shape[1]), grid, config.mask_ratio, num_hard)

    @torch.no_grad()
    def predict_difficulty(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """How hard each patch would be to reconstruct, as the twin sees the whole picture: (batch, rows, columns).

        Only the order within a picture has a meaning.
        """
        grid = self._check_inputs(pixel_values, None)
        tokens = encode_visible(self.twin.backbone, pixel_values)  # (batch, prefix + units, hidden)
        everything = torch.arange(grid[0] * grid[1], device=tokens.device).expand(tokens.shape[0], -1)
        return self.twin.loss_predictor(self.twin.decoder.embed(tokens, everything, grid)).unflatten(1, grid)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """MAE's panels, with a mask as at the end of training, and the twin's predicted losses: large is bright."""
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, progress=1.0)
        panels = super().pictures(pixel_values, bool_masked_pos)
        if self.config.loss_prediction == "none":
            return panels
        ranks = self.predict_difficulty(pixel_values).flatten(1).argsort(dim=1).argsort(dim=1)  # (batch, units)
        values = panels["picture"].float()
        low, high = values.amin(), values.amax()
        bright = low + (high - low) * ranks.unsqueeze(-1) / (ranks.shape[1] - 1)  # (batch, units, 1)
        size = self.patch_size[0] * self.patch_size[1] * pixel_values.shape[1]
        return panels | {"predicted loss": unpatchify(bright.expand(-1, -1, size), grid, self.patch_size)}


class HPMForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head on HPM's encoder."""

    config: HPMConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"backbone\.layernorm\..*",
        r"(decoder|loss_predictor|twin)\..*",
    ]


def hard_patch_mask(
    loss_map: torch.Tensor, noise: torch.Tensor, grid: tuple[int, int], ratio: float, num_hard: int
) -> torch.Tensor:
    """Masks the units with the largest predicted losses, and of the others random ones (`generate_mask`).

    Args:
        loss_map: float (batch, units).
        noise: float (batch, units), distinct numbers; of the other units those with the smallest stay visible.
        grid: (rows, columns) of units.
        ratio: share of masked units.
        num_hard: masked for their predicted loss.

    Returns:
        bool (batch, units), True = masked.
    """
    ranks = loss_map.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return random_mask(given_draw(noise.masked_fill(ranks < num_hard, torch.inf)), grid, ratio)


def relative_order_loss(predicted: torch.Tensor, losses: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of which of two patches has the larger loss, over all pairs that differ (`forward_learning_loss`).

    With s the predictions and l the losses: the mean of -log(sigmoid(s_j - s_i) + 1e-6) over l_j > l_i. The
    reference sums over ordered pairs, which hold each term twice.

    Args:
        predicted: float32 (batch, n).
        losses: (batch, n), without gradient.
    """
    margin = predicted[:, None, :] - predicted[:, :, None]  # (batch, i, j): s_j - s_i
    harder = losses[:, None, :] > losses[:, :, None]
    return masked_mean(-torch.log(torch.sigmoid(margin) + 1e-6), harder)


def rising_momentum(start: float, end: float, warmup: float, progress: float) -> float:
    """Linear from `start` to `end` over the share `warmup` of training, then constant (`engine_pretrain.py`)."""
    return end if progress >= warmup else start + (end - start) * progress / warmup


# Official name -> ours, of what HPM adds to MAE.
_RENAMING = (
    (r"^module\.", ""),
    *timm_block_renaming("decoder_blocks_losspred", "loss_predictor.layers"),
    (r"^decoder_norm_losspred\.", "loss_predictor.norm."),
    (r"^decoder_pred_losspred\.", "loss_predictor.head."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: HPMConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    The twin begins as the copy of the weights.

    Args:
        state_dict: of `models_mae_learn_loss.py`, with or without DDP's "module.", or of `models_vit.py`.
        config: unused here; other variants' conversions need it.
    """
    weights = mae.convert_official_weights(rename_weights(state_dict, _RENAMING), config)
    if "loss_predictor.norm.weight" not in weights:
        return weights
    return weights | {f"twin.{name}": tensor.clone() for name, tensor in weights.items()}


def official_config(state_dict: dict[str, torch.Tensor]) -> HPMConfig:
    """The config of an official checkpoint, read from its shapes.

    Raises:
        ValueError: if the number of heads cannot be known, because the width is none of the released ones.
    """
    weights = rename_weights(state_dict, _RENAMING)
    config = mae.official_config(weights)
    names = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size")
    layers = {name.split(".")[2] for name in weights if name.startswith("loss_predictor.layers.")}
    return HPMConfig(
        backbone_config=config.backbone_config,
        **{name: getattr(config, name) for name in names},
        predictor_num_hidden_layers=len(layers) or HPMConfig.predictor_num_hidden_layers,
    )


def tiny_config() -> HPMConfig:
    return HPMConfig(**mae.settings_of(mae.tiny_config(), "norm_pix_loss"), predictor_num_hidden_layers=1)


register_variant(
    config=HPMConfig,
    pretraining=HPMForPreTraining,
    model=HPMModel,
    heads={AutoModelForImageClassification: HPMForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
