"""Decayed identity shortcuts: an MAE whose residual streams are damped the deeper they are, and a U-shaped decoder.

Xiao Zhang et al., "Residual Connections Harm Generative Representation Learning", CVPR 2026, arXiv 2404.10947.
Reference implementation: https://github.com/xiao7199/decayed_Identity_shortcuts (`MAE/models_mae.py`).
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import backbone_grid, num_prefix_tokens, visible_feature_maps
from hf_masked.modeling.parts.blocks import TransformerBlock
from hf_masked.modeling.parts.position_embeddings import interpolate_positions, sincos_positions_2d
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.registry import register_variant

# The decoder gets the output of every second block of the encoder, the last included (`models_mae.py`, `skip_id`).
SKIP_EVERY = 2


class DecayedViTConfig(ViTConfig):
    """Config of a ViT with decayed shortcuts.

    Args:
        alpha_min: factor of the last shortcut, in (0, 1]; from 1 at the first it falls linearly with depth. What
            counts is the product of all, which should stay between about 1e-3 and 2e-2: 0.7 for 12 layers.
    """

    model_type = "hf_masked_decayed_vit"

    alpha_min: float = 0.7

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not 0.0 < self.alpha_min <= 1.0:
            raise ValueError(f"alpha_min is {self.alpha_min}; it must lie in (0, 1], where 1 is the plain ViT.")

    @property
    def shortcut_factors(self) -> list[tuple[float, float]]:
        """For each layer the factors of the shortcuts around attention and around the feed-forward part."""
        last = 2 * self.num_hidden_layers - 1
        factors = [1 - (1 - self.alpha_min) * index / last for index in range(last + 1)]
        return list(zip(factors[::2], factors[1::2], strict=True))


class DecayedViTLayer(ViTLayer):
    """`alpha * x + f(x)` in place of `x + f(x)`, for attention and for the feed-forward part (paper, section 3)."""

    def __init__(self, config: DecayedViTConfig, factors: tuple[float, float]):
        super().__init__(config)
        self.factors = factors

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """(batch, tokens, hidden) -> the same shape."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        hidden_states = self.factors[0] * hidden_states + self.dropout(attended)
        fed_forward = self.mlp(self.layernorm_after(hidden_states))
        return self.factors[1] * hidden_states + self.dropout(fed_forward)


class DecayedViTModel(ViTModel):
    """A ViT with decayed shortcuts; all else is the stock model's, names of weights included."""

    config: DecayedViTConfig
    config_class = DecayedViTConfig
    _no_split_modules: ClassVar[list[str]] = ["ViTEmbeddings", "DecayedViTLayer"]
    _can_record_outputs: ClassVar[dict] = {
        **ViTModel._can_record_outputs,
        "hidden_states": OutputRecorder(DecayedViTLayer),
    }

    def __init__(self, config: DecayedViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(DecayedViTLayer(config, factors) for factors in config.shortcut_factors)
        self.post_init()

    @torch.no_grad()
    def plain(self) -> ViTModel:
        """The stock ViT that gives the same, without the pooler.

        The stream of a plain ViT is this one's over the product of the factors so far. Layer norms do not see a
        common factor, up to their epsilon; what the branches add is divided by the product, in their last weights.
        """
        # What names this class and its own settings stays behind.
        own = {"alpha_min", "model_type", "architectures", "transformers_version"}
        settings = {name: value for name, value in self.config.to_dict().items() if name not in own}
        plain = ViTModel(ViTConfig(**settings), add_pooling_layer=False).to(self.device, self.dtype)
        plain.load_state_dict({n: t for n, t in self.state_dict().items() if n.split(".")[0] != "pooler"})
        product = 1.0
        for layer, factors in zip(plain.layers, self.config.shortcut_factors, strict=True):
            for factor, linear in zip(factors, (layer.attention.o_proj, layer.mlp.fc2), strict=True):
                product *= factor
                linear.weight.div_(product)
                linear.bias.div_(product)
        return plain.train(self.training)


class DecayedViTForImageClassification(ViTForImageClassification):
    """The stock classifier on a ViT with decayed shortcuts."""

    config: DecayedViTConfig
    config_class = DecayedViTConfig
    _no_split_modules: ClassVar[list[str]] = DecayedViTModel._no_split_modules
    _can_record_outputs: ClassVar[dict] = DecayedViTModel._can_record_outputs

    def __init__(self, config: DecayedViTConfig):
        super().__init__(config)
        self.vit = DecayedViTModel(config, add_pooling_layer=False)
        self.post_init()


class DecayedShortcutsConfig(MAEConfig):
    """Config of an MAE with decayed shortcuts.

    Args:
        backbone_config: a `DecayedViTConfig`, which holds `alpha_min`; of ViT-B/16 by default.
        unet_skips: the decoder reads the encoder through skips from every second layer and has no other input; False
            for MAE's decoder on the last layer.
        zero_init: start with branches, skips and predictions of zero, without which small `alpha_min` do not train.
        mask_ratio, mask_kind, mask_options, norm_pix_loss, decoder_hidden_size, decoder_num_hidden_layers,
            decoder_num_attention_heads, decoder_intermediate_size, fixed_positions, classifier_pooling: as of
            `MAEConfig`.
    """

    model_type = "hf_masked_decayed_shortcuts"
    paper_title: ClassVar[str] = "Residual Connections Harm Generative Representation Learning"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2404.10947"
    reference_repository: ClassVar[str] = "https://github.com/xiao7199/decayed_Identity_shortcuts"
    weights_licence: ClassVar[str | None] = None
    backbones: ClassVar[tuple[str, ...]] = ("hf_masked_decayed_vit",)

    unet_skips: bool = True
    zero_init: bool = True

    @property
    def plain_model_type(self) -> str:
        return "vit"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = DecayedViTConfig(layer_norm_eps=1e-6)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        layers = self.backbone_config.num_hidden_layers
        if self.unet_skips and layers % SKIP_EVERY:
            raise ValueError(
                f"The backbone has {layers} layers; with unet_skips, one from every second layer, the number must be "
                "even."
            )

    @property
    def skipped_layers(self) -> list[int]:
        """Places in the list of feature maps, the embedding at 0, that skips leave from, in the order of the decoder:
        the deepest first. A decoder with fewer blocks than there are skips has no place for the shallowest."""
        layers = self.backbone_config.num_hidden_layers
        return list(range(layers, 0, -SKIP_EVERY))[: self.decoder_num_hidden_layers]


class SkipLayer(nn.Module):
    """Adds to the decoder's tokens what a layer of the encoder knows of the visible ones (`SkipLayer`)."""

    def __init__(self, hidden_size: int, encoder_size: int):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder_size))
        self.layers = nn.Sequential(
            nn.Linear(encoder_size + hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, hidden_states: torch.Tensor, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """(batch, prefix + units, hidden) -> the same shape.

        Args:
            tokens: (batch, prefix + visible, encoder hidden), of the encoder.
            places: int64 (batch, prefix + visible), their places among the decoder's tokens.
        """
        sequence = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], hidden_states.shape[1], -1)
        sequence = sequence.scatter(1, places.unsqueeze(-1).expand_as(tokens), tokens)
        return hidden_states + self.layers(torch.cat([sequence, hidden_states], dim=-1))


class SkipDecoder(nn.Module):
    """A decoder that begins with positions alone and learns of the picture through skips, the deepest first."""

    def __init__(self, config: DecayedShortcutsConfig, output_size: int):
        super().__init__()
        width = config.decoder_hidden_size
        self.grid = backbone_grid(config.backbone_config)
        self.num_prefix_tokens = num_prefix_tokens(config.backbone_config)
        self.cls_token = nn.Parameter(torch.zeros(1, self.num_prefix_tokens, width))
        # A persistent buffer: fixed, in the checkpoint, and never a parameter that initialisation could zero.
        self.register_buffer("position_embeddings", self._positions(width))
        self.embedding = nn.Linear(width, width)
        self.skips = nn.ModuleList(SkipLayer(width, config.hidden_size) for _ in config.skipped_layers)
        self.layers = nn.ModuleList(
            TransformerBlock(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, output_size)

    def _positions(self, width: int) -> torch.Tensor:
        table = sincos_positions_2d(width, self.grid)
        return torch.cat([torch.zeros(self.num_prefix_tokens, width, device="cpu"), table]).unsqueeze(0)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Tokens and the fixed table; transformers calls the linear layers' and norms' initialisation itself."""
        init.copy_(self.position_embeddings, self._positions(self.cls_token.shape[-1]))
        for token in (self.cls_token, *(skip.mask_token for skip in self.skips)):
            init.normal_(token, std=0.02)

    def forward(self, feature_maps: list[torch.Tensor], visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predicts every unit.

        Args:
            feature_maps: (batch, prefix + visible, encoder hidden) of each skip, the deepest first.
            visible: int64 (batch, visible), the raster position of each visible token.
            grid: (rows, columns) of the units of this input.

        Returns:
            (batch, units, output), raster order.
        """
        positions = interpolate_positions(self.position_embeddings, self.grid, grid)
        start = torch.cat([self.cls_token, positions[:, self.num_prefix_tokens :]], dim=1)
        hidden_states = self.embedding(start).expand(visible.shape[0], -1, -1)  # (batch, prefix + units, hidden)
        prefix = torch.arange(self.num_prefix_tokens, device=visible.device).expand(visible.shape[0], -1)
        places = torch.cat([prefix, visible + self.num_prefix_tokens], dim=1)
        for number, layer in enumerate(self.layers):
            if number < len(self.skips):
                hidden_states = self.skips[number](hidden_states, feature_maps[number], places)
            hidden_states = layer(hidden_states)
        return self.head(self.norm(hidden_states[:, self.num_prefix_tokens :]))


class DecayedShortcutsModel(MAEModel):
    """The encoder: without a mask the backbone alone, with one it sees the visible patches only.

    With `unet_skips` no loss reaches the norm after the last layer: it stays as it was initialised. The reference has
    none; what its features are is the last of `hidden_states`.
    """

    config: DecayedShortcutsConfig

    def plain_backbone(self) -> ViTModel:
        return self.backbone.plain()


class DecayedShortcutsForPreTraining(MAEForPreTraining):
    """Encoder with decayed shortcuts, decoder with skips, and MAE's loss on masked patches."""

    config: DecayedShortcutsConfig
    _no_split_modules: ClassVar[list[str]] = [*MAEForPreTraining._no_split_modules, "DecayedViTLayer"]

    def make_decoder(self, output_size: int) -> nn.Module:
        return SkipDecoder(self.config, output_size) if self.config.unet_skips else super().make_decoder(output_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SkipDecoder):
            module.init_weights()
        elif module is self and self.config.zero_init:
            for linear in self._zero_at_start():
                init.zeros_(linear.weight)

    def _zero_at_start(self):
        """The last linear layer of every branch and skip, and the head."""
        for layer in self.backbone.layers:
            yield from (layer.attention.o_proj, layer.mlp.fc2)
        for layer in self.decoder.layers:
            yield from (layer.attention.projection, layer.feed_forward[-1])
        yield from (skip.layers[-1] for skip in getattr(self.decoder, "skips", ()))
        yield self.decoder.head

    def frozen_parameters(self):
        yield from super().frozen_parameters()
        if self.config.unet_skips:
            yield from self.backbone.layernorm.parameters()

    def plain_backbone(self) -> ViTModel:
        return self.backbone.plain()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MaskedPreTrainingOutput:
        """One step of masked autoencoding; arguments, result and errors as of `MAEForPreTraining`."""
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        feature_maps = visible_feature_maps(self.backbone, pixel_values, visible, **kwargs)
        encoded = self.backbone.layernorm(feature_maps[-1])  # (batch, prefix + visible, hidden)
        seen = [feature_maps[layer] for layer in self.config.skipped_layers] if self.config.unet_skips else encoded
        logits = self.decoder(seen, visible, grid)  # (batch, units, values)
        loss = self.loss(pixel_values, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
        )


class DecayedShortcutsForImageClassification(MAEForImageClassification):
    """MAE's classifier on the encoder with decayed shortcuts: mean of the patch tokens, a norm, a linear layer."""

    config: DecayedShortcutsConfig


# Of the reference's skips to ours; everything else is named as in MAE.
_RENAMING = (
    (r"^decoder_cls_token$", "decoder.cls_token"),
    (r"^skip\.(\d+)\.mask_token$", r"decoder.skips.\1.mask_token"),
    (r"^skip\.(\d+)\.fc\.", r"decoder.skips.\1.layers."),
)


def convert_reference_weights(
    state_dict: dict[str, torch.Tensor], config: DecayedShortcutsConfig
) -> dict[str, torch.Tensor]:
    """The reference's names to ours; names that are not known stay as they are. Its authors have released no weights.

    Args:
        state_dict: of `models_mae.py`.
        config: unused here; other variants' conversions need it.
    """
    return mae.convert_official_weights(rename_weights(state_dict, _RENAMING), config)


def tiny_config() -> DecayedShortcutsConfig:
    backbone_config = DecayedViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        layer_norm_eps=1e-6,
        image_size=32,
        patch_size=8,
    )
    return DecayedShortcutsConfig(
        backbone_config=backbone_config,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        # A head of zeros lets no gradient through in the first step.
        zero_init=False,
    )


AutoConfig.register(DecayedViTConfig.model_type, DecayedViTConfig)
AutoModel.register(DecayedViTConfig, DecayedViTModel)
AutoModelForImageClassification.register(DecayedViTConfig, DecayedViTForImageClassification)

register_variant(
    config=DecayedShortcutsConfig,
    pretraining=DecayedShortcutsForPreTraining,
    model=DecayedShortcutsModel,
    heads={AutoModelForImageClassification: DecayedShortcutsForImageClassification},
    tiny_config=tiny_config,
)
