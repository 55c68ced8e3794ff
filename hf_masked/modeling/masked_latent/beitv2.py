"""BEiT v2: put mask tokens in place of blocks of patches and classify the token that a frozen tokenizer gave each.

Zhiliang Peng et al., "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", 2022, arXiv 2208.06366.
Reference implementation: https://github.com/microsoft/unilm (`beit2/modeling_pretrain.py`).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_latent.vqkd import FrozenTokenizer, patches_of_color, tokenizer_form
from hf_masked.modeling.masked_latent.vqkd import tiny_config as tiny_tokenizer
from hf_masked.modeling.masked_patches import MaskedFeatures, MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import encode_with_mask_tokens
from hf_masked.modeling.parts.beit import (
    BEIT_RENAMING,
    beit_feature_maps,
    beit_position_bias,
    beit_vit,
    check_beit,
    init_beit,
    init_linear,
    official_beit_config,
    rescale_blocks,
    with_final_norm,
)
from hf_masked.modeling.parts.codebooks import code_colors
from hf_masked.modeling.parts.patches import pair, patchify, take, unpatchify, visible_indices
from hf_masked.modeling.parts.state_dicts import official_depth, rename_weights
from hf_masked.modeling.parts.teachers import check_channels
from hf_masked.modeling.registry import register_variant
from hf_masked.processing.masks import num_masked_units


class BEiTv2Config(MaskedPatchesConfig):
    """Config of BEiT v2.

    Args:
        backbone_config: a BEiT config with the norm after its last block; the paper's ViT-B/16 by default.
        mask_ratio: share of the patches that the encoder sees as mask tokens, in [0, 1); 75 of 196 by default.
        mask_kind: a name in `hf_masked.processing.masks.MASKS`; the paper's is BEiT's blocks.
        mask_options: further arguments of the mask function.
        vocab_size: number of the tokenizer's codes; by default what the tokenizer says, else 8192.
        early_layers: the block, counted from 1, whose patch tokens the aggregation blocks see; by default the third
            before the last, 9 of 12 and 21 of 24.
        aggregation_layers: blocks of the patch aggregation; thrown away after pretraining.
        shared_head: the aggregation blocks' output goes through the encoder's own norm and head.
        tokenizer: Hub id or folder of a VQ-KD checkpoint; without one `token_ids` have to be given.
        tokenizer_config: its config, read from the checkpoint by default; alone it stands for an untrained tokenizer.
        image_mean, image_std: how the pictures are normalised, from which the tokenizer's are made; by default
            ImageNet's for three channels and 0.5 for others.
    """

    model_type = "hf_masked_beitv2"
    paper_title: ClassVar[str] = "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2208.06366"
    reference_repository: ClassVar[str] = "https://github.com/microsoft/unilm"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "blocks of patches, as mask tokens"
    predicts: ClassVar[str] = "tokens (VQ-KD's) of the masked patches"
    backbones: ClassVar[tuple[str, ...]] = ("beit",)
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig, "tokenizer_config": AutoConfig}

    # 75 of the 196 patches: all but int(196 * 0.62).
    mask_ratio: float = 0.38
    mask_kind: str = "block"
    vocab_size: int | None = None
    early_layers: int | None = None
    aggregation_layers: int = 2
    shared_head: bool = True
    tokenizer: str | None = None
    tokenizer_config: dict | PreTrainedConfig | None = None
    image_mean: list[float] | float | None = None
    image_std: list[float] | float | None = None

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = beit_vit(drop_path_rate=0.0)
        elif isinstance(self.backbone_config, dict):
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        self.tokenizer_config = tokenizer_form(self.tokenizer, self.tokenizer_config)
        if self.vocab_size is None:
            self.vocab_size = getattr(self.tokenizer_config, "codebook_size", 8192)
        if self.early_layers is None:
            self.early_layers = max(1, getattr(self.backbone_config, "num_hidden_layers", 12) - 3)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        check_beit(self.backbone_config)
        layers = self.backbone_config.num_hidden_layers
        if not 1 <= self.early_layers <= layers:
            raise ValueError(
                f"early_layers is {self.early_layers}; it must be one of the encoder's {layers} blocks, counted from "
                "1. The paper's is 9 of 12, 21 of 24."
            )
        if self.aggregation_layers < 0:
            raise ValueError(f"aggregation_layers is {self.aggregation_layers}; it must be at least 0.")
        if self.tokenizer_config is None:
            return
        if self.tokenizer_config.codebook_size != self.vocab_size:
            raise ValueError(
                f"The tokenizer has {self.tokenizer_config.codebook_size} codes and vocab_size is {self.vocab_size}: "
                "leave vocab_size out."
            )
        check_channels("tokenizer", self.tokenizer_config.num_channels, self.num_channels)

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "BEiTv2Config":
        return cls(backbone_config=with_final_norm(backbone_config), **arguments)

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"image_mean": self.image_mean, "image_std": self.image_std}


@dataclass
class BEiTv2Output(MaskedPreTrainingOutput):
    """Output of BEiT v2.

    Args:
        logits: (masked patches of the batch, codes), row by row in raster order, of the masked patches alone.
        logits_aggregation: likewise, of the patch aggregation.
        token_ids: int64 (batch, units), the target; None without a loss.
        accuracy: float32 scalar, the share of masked patches whose token has the largest logit; None without a loss.
    """

    logits_aggregation: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class BEiTv2PreTrainedModel(MaskedPatchesModel):
    """Initialisation, weight decay and the masked encoder that all classes of BEiT v2 share."""

    config: BEiTv2Config
    uses_mask_token = True
    _no_split_modules: ClassVar[list[str]] = ["BeitLayer"]
    # Attention with a bias table.
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init_beit(self.backbone)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        else:
            init_linear(module)

    def no_weight_decay(self) -> set[str]:
        # As the reference has it: the mask token and the table that the blocks share do decay.
        return {"cls_token", "position_embeddings"}

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """(batch, 1 + units, hidden)."""
        return encode_with_mask_tokens(self.backbone, pixel_values, bool_masked_pos, **kwargs)


class BEiTv2Model(MaskedFeatures, BEiTv2PreTrainedModel):
    """The encoder: without a mask the plain backbone, with one it sees mask tokens in place of masked patches."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(head|aggregation.*)\..*"]


class BEiTv2ForPreTraining(BEiTv2PreTrainedModel):
    """Encoder, patch aggregation, the head that both share and the loss against a frozen tokenizer's tokens."""

    logged_outputs: ClassVar[tuple[str, ...]] = ("accuracy",)

    def __init__(self, config: BEiTv2Config):
        super().__init__(config)
        block, form, first = type(self.backbone.layers[0]), self.backbone.config, config.early_layers
        # The rates go on from where the encoder's early blocks end.
        steps = max(form.num_hidden_layers, first + config.aggregation_layers) - 1
        self.aggregation_layers = nn.ModuleList(
            block(form, drop_path_rate=form.drop_path_rate * number / max(steps, 1))
            for number in range(first, first + config.aggregation_layers)
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        if not config.shared_head:
            self.aggregation_norm = nn.LayerNorm(config.hidden_size, eps=form.layer_norm_eps)
            self.aggregation_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.tokenizer = None if config.tokenizer_config is None else FrozenTokenizer(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            rescale_blocks(self.aggregation_layers, first=self.config.early_layers + 1)
            for layer in self.aggregation_layers:
                for scale in (layer.lambda_1, layer.lambda_2):
                    if isinstance(scale, nn.Parameter):
                        init.constant_(scale, self.config.backbone_config.layer_scale_init_value)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> BEiTv2Output:
        """One step of masked token prediction.

        Args:
            pixel_values: float (batch, channels, height, width), normalised as the config says.
            bool_masked_pos: bool (batch, units), True = masked; drawn here by default. A compiled forward takes the
                count of masked patches from the config.
            token_ids: int64 (batch, units), the patches' tokens; by default the config's tokenizer is asked.
            noise: float (batch, n), the numbers that the mask function draws.
            generator: to draw the mask from.
            return_loss: whether to compute the loss.

        Raises:
            ValueError: for other channels, sizes, or shapes of masks or tokens, or if there are no tokens.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        feature_maps = beit_feature_maps(self.backbone, pixel_values, bool_masked_pos, **kwargs)
        encoded = self.backbone.layernorm(feature_maps[-1])  # (batch, 1 + units, hidden)
        aggregated = self.aggregate(feature_maps, pixel_values.shape[-2:])  # likewise
        head = self.head if self.config.shared_head else self.aggregation_head
        logits = self.head(self._masked(encoded, bool_masked_pos, grid))  # (masked, codes)
        logits_aggregation = head(self._masked(aggregated, bool_masked_pos, grid))
        losses = accuracy = None
        if return_loss:
            token_ids = self.tokens(pixel_values, grid) if token_ids is None else token_ids
            target = self._masked(self._checked(token_ids, bool_masked_pos).unsqueeze(-1), bool_masked_pos, grid)
            target = target.squeeze(-1)  # (masked,)
            losses = {
                "tokens": F.cross_entropy(logits.float(), target),
                "aggregation": F.cross_entropy(logits_aggregation.float(), target),
            }
            accuracy = (logits.detach().argmax(dim=-1) == target).float().mean()
        return BEiTv2Output(
            loss=sum(losses.values()) if losses else None,
            losses={name: part.detach() for name, part in losses.items()} if losses else None,
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
            logits_aggregation=logits_aggregation,
            token_ids=token_ids,
            accuracy=accuracy,
        )

    def aggregate(self, feature_maps: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Patch aggregation (paper, section 2.3): the last class token, before the norm, with early patch tokens.

        Args:
            feature_maps: of `beit_feature_maps`.
            size: (height, width) of the pictures.

        Returns:
            (batch, 1 + units, hidden), after the norm.
        """
        tokens = torch.cat([feature_maps[-1][:, :1], feature_maps[self.config.early_layers][:, 1:]], dim=1)
        bias = beit_position_bias(self.backbone, size)
        for layer in self.aggregation_layers:
            tokens = layer(tokens, attention_mask=bias, resolution=size)
        return (self.backbone.layernorm if self.config.shared_head else self.aggregation_norm)(tokens)

    def tokens(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """int64 (batch, units): the tokenizer's tokens of the same pictures, whole.

        Raises:
            ValueError: without a tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "There is no tokenizer to ask for the masked patches' tokens: set `tokenizer` in the config, a folder "
                "or Hub id of a VQ-KD checkpoint, or pass `token_ids`."
            )
        return self.tokenizer.token_ids(pixel_values, grid)

    def _masked(self, units: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The masked ones of (batch, units or 1 + units, dim): (masked of the batch, dim)."""
        units = units[:, units.shape[1] - bool_masked_pos.shape[1] :]
        if not torch.compiler.is_compiling():
            return units[bool_masked_pos]
        visible = bool_masked_pos.shape[1] - num_masked_units(grid, self.config.mask_ratio)
        return take(units, visible_indices(~bool_masked_pos, visible)).flatten(0, 1)

    def _checked(self, token_ids: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        if token_ids.shape != bool_masked_pos.shape or token_ids.dtype != torch.int64:
            raise ValueError(
                f"`token_ids` is {token_ids.dtype} {tuple(token_ids.shape)}; expected torch.int64 "
                f"{tuple(bool_masked_pos.shape)}, one token for each patch, in raster order."
            )
        return token_ids

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        Tokens have a colour each, near codes near ones. Among the predicted ones the visible patches show their true
        token, as they do in the last panel gray; there masked patches are white where the prediction is right.

        Raises:
            ValueError: without a tokenizer.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        true = self.tokens(pixel_values, grid)
        output = self(pixel_values, bool_masked_pos, token_ids=true)
        mask = output.mask
        predicted = true.masked_scatter(mask, output.logits.argmax(dim=-1))
        right = (predicted == true).float().masked_fill(~mask, 0.5)
        patch = pair(self.config.backbone_config.patch_size)
        palette = code_colors(self.tokenizer.encoder(pixel_values.device).codebook.vectors, pixel_values.shape[1])
        masked = patchify(pixel_values, patch).masked_fill(mask.unsqueeze(-1), 0.0)
        return {
            "picture": pixel_values,
            "masked": unpatchify(masked, grid, patch),
            "predicted tokens": patches_of_color(palette[predicted], grid, patch, pixel_values),
            "true tokens": patches_of_color(palette[true], grid, patch, pixel_values),
            "agreement": patches_of_color(right.unsqueeze(-1), grid, patch, pixel_values),
        }


# Official name -> ours.
_RENAMING = (
    (r"^lm_head\.", "head."),
    (r"^cls_pt_layers\.", "aggregation_layers."),
    (r"^cls_pt_norm\.", "aggregation_norm."),
    (r"^cls_pt_lm_head\.", "aggregation_head."),
    *BEIT_RENAMING,
)


def official_config(state_dict: dict[str, torch.Tensor]) -> BEiTv2Config:
    """The config of an official pretraining checkpoint, read from its shapes.

    The number of the early block, which no shape tells, is the config's default, that of the released models.

    Raises:
        ValueError: if it holds no shared relative positions, as fine-tuned checkpoints do not.
    """
    backbone_config = official_beit_config(state_dict, drop_path_rate=0.0)
    if backbone_config.layer_scale_init_value and backbone_config.num_hidden_layers >= 24:
        backbone_config.layer_scale_init_value = 1e-5  # "--layer_scale_init_value" of ViT-L
    aggregates = any(name.startswith("cls_pt_layers.") for name in state_dict)
    return BEiTv2Config(
        backbone_config=backbone_config,
        vocab_size=state_dict["lm_head.weight"].shape[0],
        aggregation_layers=official_depth(state_dict, "cls_pt_layers") if aggregates else 0,
        shared_head="cls_pt_lm_head.weight" not in state_dict,
    )


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: BEiTv2Config) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `VisionTransformerForMaskedImageModelingCLS`.
        config: unused here; other variants' conversions need it.
    """
    # A buffer that follows from the picture's size.
    weights = {name: value for name, value in state_dict.items() if not name.endswith("relative_position_index")}
    return rename_weights(weights, _RENAMING)


def tiny_config() -> BEiTv2Config:
    backbone_config = beit_vit(
        drop_path_rate=0.0,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return BEiTv2Config(
        backbone_config=backbone_config, early_layers=1, aggregation_layers=1, tokenizer_config=tiny_tokenizer()
    )


register_variant(
    config=BEiTv2Config,
    pretraining=BEiTv2ForPreTraining,
    model=BEiTv2Model,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
