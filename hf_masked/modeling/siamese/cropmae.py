"""CropMAE: of two crops of a picture one is seen whole, of the other two patches; a decoder that attends to the first
completes the second.

Alexandre Eymaël et al., "Efficient Image Pre-Training with Siamese Cropped Masked Autoencoders", ECCV 2024, arXiv
2403.17823.
Reference implementation: https://github.com/alexandre-eymael/CropMAE (`models/SiamMAE.py`,
`models/components/DecoderBlock.py`); the views are `hf_masked.processing.crop_pairs`.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageClassification, ViTConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedConfig
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image.mae import (
    MAEConfig,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEModel,
    MAEPreTrainedModel,
)
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import backbone_grid, encode_visible, num_prefix_tokens, tiny_vit
from hf_masked.modeling.parts.blocks import CrossAttention, SelfAttention
from hf_masked.modeling.parts.decoders import MaskTokenDecoder
from hf_masked.modeling.parts.pooling import check_views
from hf_masked.modeling.parts.state_dicts import TIMM_VIT_RENAMING, official_depth, official_vit_config, rename_weights
from hf_masked.modeling.projected_views import example_views
from hf_masked.modeling.registry import register_variant


class CropMAEConfig(MAEConfig):
    """Config of CropMAE: MAE's, with other sizes and a decoder that reads another view.

    Args:
        backbone_config: a ViT, DeiT or DINOv2 config; ViT-S/16 by default.
        mask_ratio: share of view 2's patches that the encoder does not see; 0.985 leaves 2 of 196.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            decoder; the reference's feed-forward is 2048 wide whatever the decoder.
        decoder_dropout: in training, of the decoder's attention weights, inside its feed-forwards and of its residual
            branches.
        norm_pix_loss, fixed_positions, mask_kind, mask_options, classifier_pooling: see `MAEConfig`.
    """

    model_type = "hf_masked_cropmae"
    paper_title: ClassVar[str] = "Efficient Image Pre-Training with Siamese Cropped Masked Autoencoders"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2403.17823"
    reference_repository: ClassVar[str] = "https://github.com/alexandre-eymael/CropMAE"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "all but two patches of one of two crops, dropped before the encoder"
    predicts: ClassVar[str] = "pixels of the masked patches, from the other crop"
    processor: ClassVar[str] = "CropPairImageProcessor"
    num_views: ClassVar[int] = 2

    mask_ratio: float = 0.985
    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 8
    decoder_intermediate_size: int = 2048
    decoder_dropout: float = 0.1

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = ViTConfig(
                hidden_size=384, num_attention_heads=6, intermediate_size=1536, layer_norm_eps=1e-6
            )
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if not 0.0 <= self.decoder_dropout < 1.0:
            raise ValueError(f"decoder_dropout is {self.decoder_dropout}; it must lie in [0, 1), for example 0.1.")


class CompletionBlock(GradientCheckpointingLayer):
    """Cross-attention to the other view, feed-forward and self-attention, in this order, each with dropout, a residual
    and a norm after it (`DecoderBlock.py`)."""

    def __init__(self, config: CropMAEConfig, layer_norm_eps: float = 1e-6):
        super().__init__()
        size, heads, dropout = config.decoder_hidden_size, config.decoder_num_attention_heads, config.decoder_dropout
        self.cross_attention = CrossAttention(config, size, size, heads, dropout)
        self.cross_attention_norm = nn.LayerNorm(size, eps=layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(size, config.decoder_intermediate_size),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(config.decoder_intermediate_size, size),
        )
        self.feed_forward_norm = nn.LayerNorm(size, eps=layer_norm_eps)
        self.self_attention = SelfAttention(config, size, heads, dropout=dropout)
        self.self_attention_norm = nn.LayerNorm(size, eps=layer_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """(batch, queries, hidden) and (batch, tokens, hidden) -> (batch, queries, hidden)."""
        attended = self.dropout(self.cross_attention(hidden_states, memory))
        hidden_states = self.cross_attention_norm(hidden_states + attended)
        hidden_states = self.feed_forward_norm(hidden_states + self.dropout(self.feed_forward(hidden_states)))
        return self.self_attention_norm(hidden_states + self.dropout(self.self_attention(hidden_states)))


class CompletionDecoder(MaskTokenDecoder):
    """MAE's decoder with blocks that also read the other view's tokens.

    One linear layer embeds the tokens of both views. Those of the masked view get the decoder's positions, those of
    the other one keep the encoder's (`forward_decoder`).
    """

    def __init__(self, config: CropMAEConfig, output_size: int):
        super().__init__(
            config,
            encoder_size=config.hidden_size,
            hidden_size=config.decoder_hidden_size,
            num_hidden_layers=0,
            num_attention_heads=config.decoder_num_attention_heads,
            intermediate_size=config.decoder_intermediate_size,
            grid=backbone_grid(config.backbone_config),
            output_size=output_size,
            num_prefix_tokens=num_prefix_tokens(config.backbone_config),
        )
        self.layers.extend(CompletionBlock(config) for _ in range(config.decoder_num_hidden_layers))

    def forward(
        self, tokens: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int], other: torch.Tensor
    ) -> torch.Tensor:
        """Predicts every unit of the masked view.

        Args:
            tokens, visible, grid: of the masked view, see `MaskTokenDecoder.forward`.
            other: (batch, prefix + units, encoder hidden), the tokens of the other view.

        Returns:
            (batch, units, output), raster order.
        """
        memory = self.embedding(other)
        sequence = self.embed(tokens, visible, grid)  # (batch, prefix + units, hidden)
        for layer in self.layers:
            sequence = layer(sequence, memory)
        return self.head(self.norm(sequence[:, self.num_prefix_tokens :]))


class CropMAEModel(MAEModel):
    """MAE's encoder under CropMAE's config, on single pictures."""

    config: CropMAEConfig


class CropMAEForPreTraining(MAEForPreTraining):
    """The encoder on both views, the decoder and the loss on masked patches of view 2."""

    config: CropMAEConfig
    _no_split_modules: ClassVar[list[str]] = [*MAEPreTrainedModel._no_split_modules, "CompletionBlock"]

    def make_decoder(self, output_size: int) -> CompletionDecoder:
        return CompletionDecoder(self.config, output_size)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossAttention):
            # The reference's queries, keys and values are one (3 hidden, hidden) matrix, with the bound that follows.
            init.xavier_uniform_(module.query.weight, gain=(1 / 2) ** 0.5)
            init.xavier_uniform_(module.key_value.weight, gain=(3 / 4) ** 0.5)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> MaskedPreTrainingOutput:
        """One step of completing view 2 from view 1.

        Args:
            pixel_values: float (batch, 2, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units) of view 2, True = masked, the same count in each row; drawn here by
                default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, patch height * patch width * channels) in
            `patchify` order, of view 2 (of its normalised pixels with `norm_pix_loss`); the fields of the encoder are
            those of view 1.

        Raises:
            ValueError: for other channels, sizes, views or mask shapes.
        """
        check_views(pixel_values, self.config.num_views)
        view_1, view_2 = pixel_values.unbind(dim=1)
        grid = self._check_inputs(view_2, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(view_2, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        # Out here, so that hidden states and attentions that are asked for are those of view 1 alone.
        encoded = encode_visible(self.backbone, view_2, visible)  # (batch, prefix + visible, hidden)
        return self._complete(view_1, view_2, encoded, visible, bool_masked_pos, grid, return_loss, **kwargs)

    @capture_outputs(tie_last_hidden_states=False)
    def _complete(
        self, view_1, view_2, encoded, visible, bool_masked_pos, grid, return_loss, **kwargs
    ) -> MaskedPreTrainingOutput:
        other = encode_visible(self.backbone, view_1, **kwargs)  # (batch, prefix + units, hidden)
        logits = self.decoder(encoded, visible, grid, other)  # (batch, units, values)
        loss = self.loss(view_2, logits, bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"reconstruction": loss.detach()},
            last_hidden_state=other,
            logits=logits,
            mask=bool_masked_pos,
        )

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see of pairs (batch, 2, channels, height, width): name of the panel -> (batch, channels,
        height, width), normalised as the input.

        With `norm_pix_loss` the predictions are drawn with the mean and deviation of the TRUE patches, which the
        model does not know; the panel's name says so.
        """
        predicted, mask = self.reconstruct(pixel_values, bool_masked_pos)
        view_1, view_2 = pixel_values.unbind(dim=1)
        return {"view 1": view_1, "view 2": view_2, **self.drawn(view_2, predicted, mask, "completed")}


class CropMAEForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head under CropMAE's config."""

    config: CropMAEConfig


# The heads of the reference's sizes, by width: its checkpoints do not say.
OFFICIAL_HEADS = {384: 6, 768: 12, 1024: 16}
OFFICIAL_DECODER_HEADS = {256: 8, 512: 16, 1024: 16}


def official_settings(state_dict: dict[str, torch.Tensor]) -> dict:
    """What the shapes of an official checkpoint say of the config, as its arguments.

    Raises:
        ValueError: if the number of heads cannot be known, because a width is none of the reference's.
    """
    settings = {"backbone_config": official_vit_config(state_dict, OFFICIAL_HEADS)}
    if "decoder_embed.weight" not in state_dict:
        return settings
    width = state_dict["decoder_embed.weight"].shape[0]
    if width not in OFFICIAL_DECODER_HEADS:
        raise ValueError(
            f"The checkpoint's decoder is {width} wide and does not say how many heads it has, which is known for the "
            f"reference's widths only ({', '.join(map(str, OFFICIAL_DECODER_HEADS))}): pass a config."
        )
    return settings | {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": official_depth(state_dict, "decoder_blocks"),
        "decoder_num_attention_heads": OFFICIAL_DECODER_HEADS[width],
        "decoder_intermediate_size": state_dict["decoder_blocks.0.linear1.weight"].shape[0],
    }


def official_config(state_dict: dict[str, torch.Tensor]) -> CropMAEConfig:
    """The config of an official checkpoint; raises as `official_settings`."""
    return CropMAEConfig(**official_settings(state_dict))


# Official name -> ours.
_RENAMING = (
    *TIMM_VIT_RENAMING,
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^norm\.", "backbone.layernorm."),
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_pos_embed$", "decoder.position_embeddings"),
    (r"^decoder_embed\.", "decoder.embedding."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "decoder.head."),
    (r"^decoder_blocks\.", "decoder.layers."),
    (r"\.multihead_attn\.out_proj\.", ".cross_attention.projection."),
    (r"\.multihead_attn\.in_proj_", ".cross_attention.in_proj."),
    (r"\.self_attn\.out_proj\.", ".self_attention.projection."),
    (r"\.self_attn\.in_proj_", ".self_attention.qkv."),
    (r"\.linear1\.", ".feed_forward.0."),
    (r"\.linear2\.", ".feed_forward.3."),
    (r"^(decoder\..*)\.norm1\.", r"\1.self_attention_norm."),
    (r"^(decoder\..*)\.norm2\.", r"\1.cross_attention_norm."),
    (r"^(decoder\..*)\.norm3\.", r"\1.feed_forward_norm."),
)


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of `models/SiamMAE.py`, with or without the decoder.
        config: unused here; other variants' conversions need it.
    """
    converted = {}
    for name, tensor in rename_weights(state_dict, _RENAMING).items():
        if ".cross_attention.in_proj." in name:  # queries, keys and values in a stack; our queries stand alone
            rows = len(tensor) // 3
            for part, stacked in zip(("query", "key_value"), tensor.split([rows, 2 * rows]), strict=True):
                converted[name.replace("in_proj", part)] = stacked.clone()
        else:
            converted[name] = tensor
    return converted


def tiny_config() -> CropMAEConfig:
    return CropMAEConfig(
        backbone_config=tiny_vit(),
        mask_ratio=0.9,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        # Two processes, and two halves of a batch, would not draw what one draws.
        decoder_dropout=0.0,
    )


register_variant(
    config=CropMAEConfig,
    pretraining=CropMAEForPreTraining,
    model=CropMAEModel,
    heads={AutoModelForImageClassification: CropMAEForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
    example_inputs=example_views,
)
