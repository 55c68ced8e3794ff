"""CrossMAE: an MAE whose mask tokens look at visible patches only, each by itself, so that a part of them will do.

Letian Fu, Long Lian et al., "Rethinking Patch Dependence for Masked Autoencoders", TMLR 2025, arXiv 2401.14391.
Reference implementation: https://github.com/TonyLianLong/CrossMAE (`models_cross.py`, `transformer_utils.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageClassification
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import backbone_grid, visible_feature_maps
from hf_masked.modeling.parts.blocks import CrossAttentionBlock
from hf_masked.modeling.parts.patches import check_mask, patchify, predicted_indices, take
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.parts.state_dicts import official_depth, official_vit_config, rename_weights
from hf_masked.modeling.parts.targets import normalize_patches
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import make_mask, num_predicted_units, partial_mask
from hf_masked.randomness import model_draw


class CrossMAEConfig(MAEConfig):
    """Config of CrossMAE: MAE's, and

    Args:
        prediction_ratio: share of all patches that are predicted, in (0, mask_ratio]: a random part of the masked
            ones, the paper's p (section 3.3); None for all of them.
        decoder_num_hidden_layers: blocks of cross-attention (the paper's recipe has 12).
        weight_feature_maps: each block of the decoder reads a learned mixture of the encoder's layers (section 3.4);
            else all read the last one.
        feature_map_indices: the layers that are mixed, from 0, or from -1 backwards; None for all.
        use_input_feature: mix the embedded patches in too.
        decoder_self_attention: self-attention among the mask tokens before the cross-attention (the paper's ablation).
        scale_lr_by_prediction: `base_learning_rate` counts times prediction_ratio / mask_ratio (`main_pretrain.py`).
    """

    model_type = "hf_masked_crossmae"
    paper_title: ClassVar[str] = "Rethinking Patch Dependence for Masked Autoencoders"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2401.14391"
    reference_repository: ClassVar[str] = "https://github.com/TonyLianLong/CrossMAE"
    predicts: ClassVar[str] = "pixels of some of the masked patches, each by itself"

    prediction_ratio: float | None = None
    decoder_num_hidden_layers: int = 12
    weight_feature_maps: bool = True
    feature_map_indices: list[int] | None = None
    use_input_feature: bool = True
    decoder_self_attention: bool = False
    scale_lr_by_prediction: bool = True

    def check(self) -> None:
        super().check()
        if self.prediction_ratio is not None and not 0.0 < self.prediction_ratio <= self.mask_ratio:
            raise ValueError(
                f"prediction_ratio is {self.prediction_ratio}; it must lie in (0, mask_ratio], mask_ratio being "
                f"{self.mask_ratio}. None predicts all that is masked."
            )
        depth = self.backbone_config.num_hidden_layers
        if any(not -depth <= index < depth for index in self.feature_map_indices or ()):
            raise ValueError(
                f"feature_map_indices is {self.feature_map_indices}; the encoder's layers are 0 to {depth - 1}."
            )
        if self.weight_feature_maps and not self.mixed_maps:
            raise ValueError("feature_map_indices is empty: name layers, or None for all, or set use_input_feature.")

    @property
    def mixed_maps(self) -> list[int]:
        """Which of `visible_feature_maps` the decoder mixes, ascending: 0 is the input, i + 1 layer i."""
        depth = self.backbone_config.num_hidden_layers
        layers = range(depth) if self.feature_map_indices is None else {i % depth for i in self.feature_map_indices}
        return [0] * self.use_input_feature + sorted(layer + 1 for layer in layers)

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"prediction_ratio": self.prediction_ratio}


@dataclass
class CrossMAEOutput(MaskedPreTrainingOutput):
    """Output of `CrossMAEForPreTraining`.

    Args:
        logits: (batch, predicted, values), in the order of `predicted_ids`.
        predicted_ids: int64 (batch, predicted), the raster positions of the predicted patches, ascending.
    """

    predicted_ids: torch.Tensor | None = None


class CrossMAEDecoder(nn.Module):
    """Mask tokens at the predicted positions, and blocks in which each attends to the encoder's tokens.

    Args:
        config: of the model.
        output_size: values predicted per patch.
    """

    def __init__(self, config: CrossMAEConfig, output_size: int):
        super().__init__()
        self.grid = backbone_grid(config.backbone_config)
        hidden_size, layers = config.decoder_hidden_size, config.decoder_num_hidden_layers
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        # A persistent buffer: fixed, in the checkpoint, and never a parameter that initialisation could zero.
        self.register_buffer("position_embeddings", self._positions(hidden_size))
        if config.weight_feature_maps:
            self.mixing = nn.Linear(len(config.mixed_maps), layers, bias=False)
            self.memory_norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=1e-6) for _ in range(layers))
        self.layers = nn.ModuleList(
            CrossAttentionBlock(
                config,
                hidden_size=hidden_size,
                memory_size=config.hidden_size,
                num_attention_heads=config.decoder_num_attention_heads,
                intermediate_size=config.decoder_intermediate_size,
                self_attention=config.decoder_self_attention,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.head = nn.Linear(hidden_size, output_size)

    def _positions(self, hidden_size: int) -> torch.Tensor:
        return sincos_positions_2d(hidden_size, self.grid).unsqueeze(0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Token and fixed table; transformers calls the linear layers' and norms' initialisation itself."""
        init.normal_(self.mask_token, std=0.02)
        init.copy_(self.position_embeddings, self._positions(self.mask_token.shape[-1]))

    def mix(self, feature_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each block attends to: mixtures of the maps, all (batch, tokens, encoder hidden), normalised."""
        mixtures = torch.tensordot(self.mixing.weight, torch.stack(feature_maps), dims=1)
        return [norm(mixture) for norm, mixture in zip(self.memory_norms, mixtures, strict=True)]

    def forward(
        self, memories: list[torch.Tensor], predicted_ids: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Predicts some patches.

        Args:
            memories: (batch, tokens, encoder hidden), normalised, one for each block.
            predicted_ids: int64 (batch, predicted), raster positions.
            grid: (rows, columns) of the patches of this input.

        Returns:
            (batch, predicted, output).
        """
        positions = interpolate_positions(self.position_embeddings, self.grid, grid)
        hidden_states = self.mask_token + positions[0][predicted_ids]  # (batch, predicted, hidden)
        if predicted_ids.shape[1] > 0:  # stock SDPA cannot attend from no place at all
            for layer, memory in zip(self.layers, memories, strict=True):
                hidden_states = layer(hidden_states, memory)
        return self.head(self.norm(hidden_states))


class CrossMAEModel(MAEModel):
    """MAE's encoder. CrossMAE trains it without a final norm; the one it has here is as it was initialised."""

    config: CrossMAEConfig


class CrossMAEForPreTraining(MAEForPreTraining):
    """Encoder, decoder of cross-attention and the loss on the predicted patches."""

    config: CrossMAEConfig
    _no_split_modules: ClassVar[list[str]] = [*MAEForPreTraining._no_split_modules, "CrossAttentionBlock"]

    def make_decoder(self, output_size: int) -> CrossMAEDecoder:
        return CrossMAEDecoder(self.config, output_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossMAEDecoder):
            module.init_weights()

    def frozen_parameters(self):
        yield from super().frozen_parameters()
        # The decoder's norms stand in for it.
        if self.config.weight_feature_maps:
            yield from self.backbone.layernorm.parameters()

    def learning_rate_factor(self) -> float:
        """p / r of the reference's `main_pretrain.py`."""
        config = self.config
        partial = config.scale_lr_by_prediction and config.prediction_ratio is not None
        return config.prediction_ratio / config.mask_ratio if partial else 1.0

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        bool_predicted_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> CrossMAEOutput:
        """One step of masked autoencoding.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            bool_predicted_pos: bool (batch, units), True = predicted, a part of the masked units, the same count in
                each row; drawn here by default.
            noise: float (batch, n), numbers to draw from what is not given: for random masks one per unit, of which
                the smallest stay visible, and, with a `prediction_ratio`, one more per unit, of which the smallest
                among the masked are not predicted.
            generator: to draw from.
            return_loss: whether to compute the loss.

        Returns:
            `CrossMAEOutput`; `logits` are (batch, predicted, patch height * patch width * channels) in `patchify`
            order, of normalised pixels with `norm_pix_loss`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None or bool_predicted_pos is None:
            draw = model_draw(pixel_values.shape[0], pixel_values.device, self.training, generator, noise)
        config = self.config
        if bool_masked_pos is None:
            bool_masked_pos = make_mask(config.mask_kind, draw, grid, config.mask_ratio, **config.mask_arguments())
        if bool_predicted_pos is None:
            bool_predicted_pos = self.choose(draw, bool_masked_pos)
        predicted_ids = self._predicted(bool_predicted_pos, bool_masked_pos, grid)  # (batch, predicted)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        feature_maps = visible_feature_maps(self.backbone, pixel_values, visible, **kwargs)
        encoded = self.backbone.layernorm(feature_maps[-1])  # (batch, prefix + visible, hidden)
        if self.config.weight_feature_maps:
            memories = self.decoder.mix([feature_maps[index] for index in self.config.mixed_maps])
        else:
            memories = [encoded] * self.config.decoder_num_hidden_layers
        logits = self.decoder(memories, predicted_ids, grid)  # (batch, predicted, values)
        loss = self.loss(pixel_values, logits, predicted_ids) if return_loss else None
        return CrossMAEOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
            predicted_ids=predicted_ids,
        )

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

    def loss(self, pixel_values: torch.Tensor, logits: torch.Tensor, predicted_ids: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the pixels of the predicted patches (paper, section 3.3; `forward_loss`)."""
        target = take(patchify(pixel_values.float(), self.patch_size), predicted_ids)  # (batch, predicted, values)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        # 0 where nothing is masked.
        return (logits.float() - target).square().sum() / max(target.numel(), 1)

    def reconstruct(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions of all masked patches, (batch, units, values), 0 at visible ones, and the mask."""
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        mask = self.draw_mask(pixel_values, grid) if bool_masked_pos is None else bool_masked_pos
        output = self(pixel_values, mask, bool_predicted_pos=mask, return_loss=False)
        places = output.predicted_ids.unsqueeze(-1).expand_as(output.logits)
        empty = output.logits.new_zeros(*mask.shape, output.logits.shape[-1])
        return empty.scatter(1, places, output.logits), mask


class CrossMAEForImageClassification(MAEForImageClassification):
    """The fine-tuning encoder, which is MAE's (`models_vit.py`)."""

    config: CrossMAEConfig


# The heads of the released models, by width: their checkpoints do not say.
OFFICIAL_HEADS = {384: 6, **mae.OFFICIAL_HEADS}
# The same width of each head of the decoder in all of them.
OFFICIAL_DECODER_HEAD = 32


def official_config(state_dict: dict[str, torch.Tensor]) -> CrossMAEConfig:
    """The config of an official checkpoint of pretraining, read from its shapes.

    Raises:
        ValueError: if the number of heads cannot be known, because the width is none of the released ones, or if the
            checkpoint holds no decoder of CrossMAE.
    """
    backbone_config = official_vit_config(state_dict, OFFICIAL_HEADS)
    if "decoder_blocks.0.cross_attn.q.weight" not in state_dict:
        raise ValueError(
            "The checkpoint holds no decoder of CrossMAE (decoder_blocks.0.cross_attn.q.weight): a fine-tuned one is "
            "MAE's, see `hf-masked convert mae`."
        )
    hidden_size = state_dict["mask_token"].shape[-1]
    weights = state_dict.get("wfm.linear.weight")
    return CrossMAEConfig(
        backbone_config=backbone_config,
        decoder_hidden_size=hidden_size,
        decoder_num_hidden_layers=official_depth(state_dict, "decoder_blocks"),
        decoder_num_attention_heads=hidden_size // OFFICIAL_DECODER_HEAD,
        decoder_intermediate_size=state_dict["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        weight_feature_maps=weights is not None,
        use_input_feature=weights is None or weights.shape[1] > backbone_config.num_hidden_layers,
        decoder_self_attention="decoder_blocks.0.norm0.weight" in state_dict,
    )


# Official name -> ours, where it is not MAE's.
_RENAMING = (
    (r"^wfm\.linear\.", "decoder.mixing."),
    (r"^dec_norms\.", "decoder.memory_norms."),
    (r"^decoder_blocks\.(\d+)\.norm0\.", r"decoder.layers.\1.self_attention_norm."),
    (r"^decoder_blocks\.(\d+)\.self_attn\.qkv\.", r"decoder.layers.\1.self_attention.qkv."),
    (r"^decoder_blocks\.(\d+)\.self_attn\.proj\.", r"decoder.layers.\1.self_attention.projection."),
    (r"^decoder_blocks\.(\d+)\.norm1\.", r"decoder.layers.\1.cross_attention_norm."),
    (r"^decoder_blocks\.(\d+)\.cross_attn\.q\.", r"decoder.layers.\1.cross_attention.query."),
    (r"^decoder_blocks\.(\d+)\.cross_attn\.kv\.", r"decoder.layers.\1.cross_attention.key_value."),
    (r"^decoder_blocks\.(\d+)\.cross_attn\.proj\.", r"decoder.layers.\1.cross_attention.projection."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: CrossMAEConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    The reference has no final norm of the encoder where it mixes feature maps; ours then begins as a new one. Its
    decoder's table has a first row for a class token that is never there.
    """
    weights = mae.convert_official_weights(rename_weights(state_dict, _RENAMING), config)
    if "decoder.position_embeddings" in weights:
        weights["decoder.position_embeddings"] = weights["decoder.position_embeddings"][:, 1:].clone()
    if config.weight_feature_maps:
        weights.setdefault("backbone.layernorm.weight", torch.ones(config.hidden_size))
        weights.setdefault("backbone.layernorm.bias", torch.zeros(config.hidden_size))
    return weights


def tiny_config() -> CrossMAEConfig:
    settings = mae.tiny_config().to_diff_dict() | {"decoder_num_hidden_layers": 2, "prediction_ratio": 0.25}
    settings.pop("model_type")
    return CrossMAEConfig(**settings)


register_variant(
    config=CrossMAEConfig,
    pretraining=CrossMAEForPreTraining,
    model=CrossMAEModel,
    heads={AutoModelForImageClassification: CrossMAEForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
