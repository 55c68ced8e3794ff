"""A small method with a momentum twin, for tests: the masked picture's vector predicts the whole picture's (BYOL)."""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from hf_masked.modeling.masked_image.mae import MAEConfig, MAEPreTrainedModel, tiny_config
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import encode_visible
from hf_masked.modeling.parts.momentum import MomentumTwin, cosine_momentum
from hf_masked.modeling.registry import Variant
from hf_masked.processing.masks import make_mask
from hf_masked.randomness import model_draw


class TinyTwinConfig(MAEConfig):
    """MAE's config, of which the decoder is not used.

    Args:
        batch_norm: in the projector.
        eval_mode: of the twin.
        base_momentum: at the start; it rises to 1 along a cosine.
    """

    model_type = "hf_masked_tiny_twin"
    batch_norm: bool = False
    eval_mode: bool = False
    base_momentum: float = 0.9


class TinyBatchNormTwinConfig(TinyTwinConfig):
    model_type = "hf_masked_tiny_batch_norm_twin"
    batch_norm: bool = True


class TinyTwinPreTrainedModel(MAEPreTrainedModel):
    config: TinyTwinConfig


class TinyTwinModel(TinyTwinPreTrainedModel):
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(twin|projector|predictor)\..*"]

    def __init__(self, config: TinyTwinConfig):
        super().__init__(config)
        self.post_init()


class TinyTwinForPreTraining(TinyTwinPreTrainedModel):
    def __init__(self, config: TinyTwinConfig):
        super().__init__(config)
        norm = nn.BatchNorm1d(16) if config.batch_norm else nn.LayerNorm(16)
        self.projector = nn.Sequential(nn.Linear(config.hidden_size, 16), norm, nn.GELU(), nn.Linear(16, 8))
        self.predictor = nn.Linear(8, 8)
        self.twin = MomentumTwin(
            self, ("backbone", "projector"), cosine_momentum(config.base_momentum), config.eval_mode
        )
        self.post_init()

    def forward(self, pixel_values, bool_masked_pos=None, return_loss: bool = True, **kwargs):
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training)
            bool_masked_pos = make_mask(self.config.mask_kind, draw, grid, self.config.mask_ratio)
        tokens = encode_visible(self.backbone, pixel_values, self._visible(bool_masked_pos, grid), **kwargs)
        prediction = self.predictor(self.projector(tokens.mean(dim=1)))  # (batch, 8)
        with torch.no_grad():
            target = self.twin.projector(encode_visible(self.twin.backbone, pixel_values).mean(dim=1))
        loss = None
        if return_loss:
            loss = 2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
        losses = None if loss is None else {"prediction": loss.detach()}
        return PreTrainingOutput(loss=loss, losses=losses, last_hidden_state=tokens)


class TinyBatchNormTwinForPreTraining(TinyTwinForPreTraining):
    config: TinyBatchNormTwinConfig
    declined_checks: ClassVar[dict[str, str]] = {"ddp": "batch norm sees the batch of one process"}


def tiny_twin_config() -> TinyTwinConfig:
    return TinyTwinConfig(backbone_config=tiny_config().backbone_config)


def tiny_batch_norm_twin_config() -> TinyBatchNormTwinConfig:
    return TinyBatchNormTwinConfig(backbone_config=tiny_config().backbone_config)


# As `register_variant` would make them, but in no catalogue.
TINY_TWIN = Variant(
    config=TinyTwinConfig, pretraining=TinyTwinForPreTraining, model=TinyTwinModel, tiny_config=tiny_twin_config
)
TINY_BATCH_NORM_TWIN = Variant(
    config=TinyBatchNormTwinConfig,
    pretraining=TinyBatchNormTwinForPreTraining,
    model=TinyTwinModel,
    tiny_config=tiny_batch_norm_twin_config,
)
