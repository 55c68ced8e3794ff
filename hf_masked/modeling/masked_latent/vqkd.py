"""VQ-KD: the tokenizer of BEiT v2, an autoencoder with a codebook that reconstructs a frozen teacher's features.

Zhiliang Peng et al., "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", 2022, arXiv 2208.06366.
Reference implementation: https://github.com/microsoft/unilm (`beit2/modeling_vqkd.py`, `norm_ema_quantizer.py`).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, PreTrainedConfig, ViTConfig
from transformers import initialization as init
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.outputs import PreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    check_visible_token_backbone,
    encode_visible,
    num_prefix_tokens,
)
from hf_masked.modeling.parts.blocks import TransformerBlock
from hf_masked.modeling.parts.codebooks import EMACodebook, code_colors
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import check_pixel_values, pair, unpatchify
from hf_masked.modeling.parts.position_embeddings import interpolate_positions
from hf_masked.modeling.parts.state_dicts import TIMM_VIT_RENAMING, official_depth, official_vit_config, rename_weights
from hf_masked.modeling.parts.teachers import (
    FrozenTeacher,
    adapt_pictures,
    check_teacher,
    normalization_of,
    read_config,
    teacher_form,
)
from hf_masked.modeling.registry import register_variant


class VQKDConfig(VariantConfig):
    """Config of VQ-KD, BEiT v2's tokenizer.

    Args:
        backbone_config: a ViT, DeiT or DINOv2 config, of the encoder; ViT-B/16 by default.
        codebook_size: number of codes.
        code_dim: width of a code.
        codebook_decay: m of the codes' moving averages, in [0, 1).
        kmeans_init: begin with the cluster means of the first batch.
        commitment_weight: of the term that draws the encoder's vectors to their codes.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            Transformer that predicts the teacher's features.
        teacher: Hub id or folder of a vision model; None for untrained weights from a fixed seed.
        teacher_config: the stock config of the teacher's encoder; by default what the checkpoint says.
        teacher_projection: project the teacher's patch features as CLIP does its class token.
        image_mean, image_std: how the pictures are normalised: the encoder sees [-1, 1], and the teacher its own.
    """

    model_type = "hf_masked_vqkd"
    paper_title: ClassVar[str] = "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2208.06366"
    reference_repository: ClassVar[str] = "https://github.com/microsoft/unilm"
    weights_licence: ClassVar[str] = "MIT"
    masks: ClassVar[str] = "nothing: every patch becomes a token"
    predicts: ClassVar[str] = "a frozen teacher's features, from the tokens"
    backbones: ClassVar[tuple[str, ...]] = tuple(VISIBLE_TOKEN_BACKBONES)
    sub_configs: ClassVar[dict] = {"backbone_config": AutoConfig, "teacher_config": AutoConfig}

    codebook_size: int = 8192
    code_dim: int = 32
    codebook_decay: float = 0.99
    kmeans_init: bool = True
    commitment_weight: float = 1.0
    decoder_hidden_size: int = 768
    decoder_num_hidden_layers: int = 3
    decoder_num_attention_heads: int = 12
    decoder_intermediate_size: int = 3072
    teacher: str | None = None
    teacher_config: dict | PreTrainedConfig | None = None
    teacher_projection: bool = False
    image_mean: list[float] | float | None = 0.5
    image_std: list[float] | float | None = 0.5

    def __post_init__(self, **kwargs):
        self.teacher_config = teacher_form(self.teacher, self.teacher_config)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        check_visible_token_backbone(self.backbone_config)
        check_teacher(self, projection=self.teacher_projection)
        if min(self.codebook_size, self.code_dim) < 2:
            raise ValueError(
                f"codebook_size={self.codebook_size} and code_dim={self.code_dim}; both must be at least 2. The "
                "paper's are 8192 and 32."
            )
        if not 0.0 <= self.codebook_decay < 1.0:
            raise ValueError(f"codebook_decay is {self.codebook_decay}; it must lie in [0, 1). The paper's is 0.99.")
        if self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={self.decoder_hidden_size} is no multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}."
            )

    @property
    def target_size(self) -> int:
        """Width of the teacher's features."""
        return self.teacher_config.projection_dim if self.teacher_projection else self.teacher_config.hidden_size

    def processor_settings(self) -> dict:
        return super().processor_settings() | {
            "mask_kind": None,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }


@dataclass
class VQKDOutput(ModelOutput):
    """Output of the tokenizer.

    Args:
        last_hidden_state: (batch, prefix + units, hidden), the encoder's tokens, the class token first.
        token_ids: int64 (batch, units), raster order.
        hidden_states, attentions: of the encoder, when asked for.
    """

    last_hidden_state: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class VQKDPreTrainingOutput(PreTrainingOutput):
    """Output of the tokenizer's training.

    Args:
        token_ids: int64 (batch, units), raster order.
        reconstruction: (batch, units, teacher's width), of any length.
        codebook_perplexity: float32 scalar, how many codes are in use.
    """

    token_ids: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    codebook_perplexity: torch.Tensor | None = None


class FeatureDecoder(nn.Module):
    """A ViT on the grid of codes, and a small network from each of its patch tokens to the teacher's features.

    Args:
        config: of VQ-KD.
    """

    def __init__(self, config: VQKDConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.grid = backbone_grid(config.backbone_config)
        self.embedding = nn.Linear(config.code_dim, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], width))
        self.layers = nn.ModuleList(
            TransformerBlock(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = _two_layers(width, config.target_size)

    def forward(self, codes: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """(batch, units, code_dim), units in raster order -> (batch, units, teacher's width)."""
        tokens = self.embedding(codes.to(self.embedding.weight.dtype))
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        tokens = tokens + interpolate_positions(self.position_embeddings, self.grid, grid)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens[:, 1:]))


def _two_layers(input_size: int, output_size: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(input_size, input_size), nn.Tanh(), nn.Linear(input_size, output_size))


class VQKDPreTrainedModel(VariantModel):
    """The encoder, the codebook and their initialisation, which all classes of VQ-KD share."""

    config: VQKDConfig
    _no_split_modules: ClassVar[list[str]] = ["ViTLayer", "DeiTLayer", "Dinov2Layer", "TransformerBlock"]
    # Recorded inside the backbone, with the backbone's own classes.
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": OutputRecorder(target_class=None),
        "attentions": OutputRecorder(target_class=None, index=1),
    }
    _ddp_params_and_buffers_to_ignore: ClassVar[list[str]] = [f"codebook.{name}" for name in EMACodebook.noted_buffers]

    def __init__(self, config: VQKDConfig):
        super().__init__(config)
        self.code_head = _two_layers(config.hidden_size, config.code_dim)
        self.codebook = EMACodebook(config.codebook_size, config.code_dim, config.codebook_decay, config.kmeans_init)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with deviation 0.02; the last linear layers of both halves of block l divided by sqrt(2 l); patch
        and code embeddings as torch has them (`modeling_finetune.py`)."""
        if module is self:
            _init_encoder(self.backbone)
        elif isinstance(module, nn.Linear):
            _init_linear(module)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, EMACodebook):
            module.init_weights()
        elif isinstance(module, FeatureDecoder):
            init_as_torch(module.embedding)
            init.trunc_normal_(module.cls_token, std=0.02)
            init.trunc_normal_(module.position_embeddings, std=0.02)
            for number, layer in enumerate(module.layers, start=1):
                for linear in (layer.attention.projection, layer.feed_forward[2]):
                    init.trunc_normal_(linear.weight, std=0.02 / math.sqrt(2 * number))

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "position_embeddings", "distillation_token"}

    def _check_inputs(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """The grid of patches; raises a ValueError for inputs that do not fit."""
        config = self.config.backbone_config
        return check_pixel_values(pixel_values, config.num_channels, pair(config.patch_size))

    def unit_vectors(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is quantised of the encoder's (batch, prefix + units, hidden): float32 (batch, units, code_dim)."""
        tokens = tokens[:, num_prefix_tokens(self.config.backbone_config) :]
        # Half precision would flip nearest codes.
        with torch.autocast(tokens.device.type, enabled=False):
            return F.normalize(self.code_head(tokens.to(self.code_head[0].weight.dtype)).float(), dim=-1)


def _init_linear(module: nn.Module) -> None:
    init.trunc_normal_(module.weight, std=0.02)
    if module.bias is not None:
        init.zeros_(module.bias)


def _init_encoder(backbone: nn.Module) -> None:
    embeddings = backbone.embeddings
    for module in backbone.modules():
        if isinstance(module, nn.Linear):
            _init_linear(module)
    init_as_torch(embeddings.patch_embeddings.projection)
    for name in ("cls_token", "distillation_token", "position_embeddings"):
        if getattr(embeddings, name, None) is not None:
            init.trunc_normal_(getattr(embeddings, name), std=0.02)
    blocks = backbone.encoder.layer if hasattr(backbone, "encoder") else backbone.layers
    for number, block in enumerate(blocks, start=1):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("o_proj", "fc2", "attention.output.dense")):
                init.trunc_normal_(module.weight, std=0.02 / math.sqrt(2 * number))


class VQKDModel(VQKDPreTrainedModel):
    """The tokenizer: pictures in, one token per patch out. In training mode, too, its codebook stands still."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"decoder\..*"]

    def __init__(self, config: VQKDConfig):
        super().__init__(config)
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> VQKDOutput:
        """Encodes and tokenises pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.

        Raises:
            ValueError: for other channels or sizes.
        """
        self._check_inputs(pixel_values)
        tokens = encode_visible(self.backbone, pixel_values, **kwargs)
        vectors = self.unit_vectors(tokens)
        ids = self.codebook.nearest(vectors.flatten(0, 1)).view(vectors.shape[:2])
        return VQKDOutput(last_hidden_state=tokens, token_ids=ids)


class FrozenTokenizer(FrozenTeacher):
    """A VQ-KD tokenizer that names patches, held and loaded as a `FrozenTeacher` is: outside the module tree.

    Args:
        config: with the fields `tokenizer` (a Hub id or a folder, or None for untrained weights from a fixed seed),
            `tokenizer_config`, `image_mean` and `image_std`.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config = config
        self._model: VQKDModel | None = None
        self._norm = nn.Identity()

    @torch.no_grad()
    def token_ids(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The token of each patch of whole pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised as the student's config says.
            grid: (rows, columns) of the student's patches; the pictures are resized so that the tokenizer has as many.

        Returns:
            int64 (batch, rows * columns), raster order.
        """
        tokenizer = self.encoder(pixel_values.device)
        form = tokenizer.config.backbone_config
        pixel_values = adapt_pictures(
            pixel_values,
            grid,
            pair(form.patch_size),
            form.num_channels,
            own=normalization_of(self.config),
            theirs=normalization_of(tokenizer.config),
        )
        return tokenizer(pixel_values).token_ids

    def _load(self) -> None:
        name, form = self.config.tokenizer, self.config.tokenizer_config
        with torch.random.fork_rng(devices=[]):
            if name is None:
                torch.default_generator.manual_seed(0)
                model = VQKDModel(form)
            else:
                model = VQKDModel.from_pretrained(name)
        if model.config.codebook_size != form.codebook_size:
            raise ValueError(
                f"The tokenizer {name} has {model.config.codebook_size} codes; the student was made for one of "
                f"{form.codebook_size}. Give it that one."
            )
        self._model = model.eval().requires_grad_(False).float()


def tokenizer_form(tokenizer: str | None, tokenizer_config: dict | PreTrainedConfig | None) -> VQKDConfig | None:
    """The config of a tokenizer: what is given, what the checkpoint says, or None where there is neither.

    Raises:
        ValueError: if there is no such checkpoint, or for one of another method.
    """
    if isinstance(tokenizer_config, dict):
        tokenizer_config = AutoConfig.for_model(**tokenizer_config)
    elif tokenizer_config is None and tokenizer is not None:
        tokenizer_config = read_config(tokenizer, "tokenizer")
    if tokenizer_config is not None and not isinstance(tokenizer_config, VQKDConfig):
        raise ValueError(
            f"The tokenizer is a {tokenizer_config.model_type}; it must be a checkpoint of VQ-KD (`hf-masked info "
            "vqkd`)."
        )
    return tokenizer_config


class VQKDForPreTraining(VQKDPreTrainedModel):
    """Encoder, codebook and decoder, and the loss against a frozen teacher."""

    logged_outputs: ClassVar[tuple[str, ...]] = ("codebook_perplexity",)
    declined_checks: ClassVar[dict[str, str]] = {
        "draws": "nothing is drawn",
        "accumulation": "the codebook begins with the first batch, which accumulation makes smaller",
    }

    def __init__(self, config: VQKDConfig):
        super().__init__(config)
        self.decoder = FeatureDecoder(config)
        self.teacher = FrozenTeacher(config, final_norm=True, projection=config.teacher_projection)
        self.post_init()

    def update_twins(self) -> None:
        super().update_twins()
        self.codebook.update()

    def train(self, mode: bool = True):
        if mode:
            self.codebook.watch(self.code_head[0].weight)
        return super().train(mode)

    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = True, **kwargs) -> VQKDPreTrainingOutput:
        """One step of vector-quantised distillation.

        Args:
            pixel_values: float (batch, channels, height, width), normalised as the config says.
            return_loss: whether to compute the loss, which asks the teacher.

        Raises:
            ValueError: for other channels or sizes.
        """
        grid = self._check_inputs(pixel_values)
        tokens = encode_visible(self.backbone, pixel_values, **kwargs)
        vectors = self.unit_vectors(tokens)  # (batch, units, code_dim)
        codes, ids = self.codebook(vectors)
        # Straight through: the codes' values, the gradient as if they were the encoder's vectors.
        reconstruction = self.decoder(vectors + (codes - vectors).detach(), grid)
        losses = None
        if return_loss:
            target = self.teacher.features(pixel_values, grid)  # (batch, units, teacher's width)
            losses = {
                "distillation": (1 - F.cosine_similarity(reconstruction.float(), target, dim=-1)).mean(),
                "commitment": self.config.commitment_weight * F.mse_loss(vectors, codes),
            }
        return VQKDPreTrainingOutput(
            loss=sum(losses.values()) if losses else None,
            losses={name: part.detach() for name, part in losses.items()} if losses else None,
            last_hidden_state=tokens,
            token_ids=ids,
            reconstruction=reconstruction,
            codebook_perplexity=self.codebook.perplexity(),
        )

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        Tokens have a colour each, near codes near ones; the last panel is bright where the reconstruction points
        where the teacher's features do: black is a cosine of 0.
        """
        output = self(pixel_values, return_loss=False)
        grid = self._check_inputs(pixel_values)
        target = self.teacher.features(pixel_values, grid)
        cosine = F.cosine_similarity(output.reconstruction.float(), target, dim=-1).clamp(min=0)
        patch = pair(self.config.backbone_config.patch_size)
        colors = code_colors(self.codebook.vectors, pixel_values.shape[1])[output.token_ids]
        return {
            "picture": pixel_values,
            "tokens": patches_of_color(colors, grid, patch, pixel_values),
            "cosine with the teacher": patches_of_color(cosine.unsqueeze(-1), grid, patch, pixel_values),
        }


def patches_of_color(
    colors: torch.Tensor, grid: tuple[int, int], patch_size: tuple[int, int], pixel_values: torch.Tensor
) -> torch.Tensor:
    """Patches of one colour each, between the darkest and the brightest value of pictures, in the pictures' shape.

    Args:
        colors: float (batch, units, channels or 1) in [0, 1].
    """
    low, high = pixel_values.float().amin(), pixel_values.float().amax()
    values = (low + (high - low) * colors).expand(-1, -1, pixel_values.shape[1])
    return unpatchify(values.repeat(1, 1, patch_size[0] * patch_size[1]), grid, patch_size)


# The heads of the released tokenizers, by width: their checkpoints do not say.
OFFICIAL_HEADS = {768: 12}
# What the released tokenizers were taught by, by the width of its features: the form and whether it is projected.
OFFICIAL_TEACHERS = {512: "clip_vision_model", 768: "vit"}


def official_config(state_dict: dict[str, torch.Tensor]) -> VQKDConfig:
    """The config of an official checkpoint, read from its shapes.

    Raises:
        ValueError: for a width that is none of the released ones, because of its number of heads.
    """
    encoder = {name.removeprefix("encoder."): value for name, value in state_dict.items()}
    width = state_dict["decode_task_layer.2.weight"].shape[0]
    if width not in OFFICIAL_TEACHERS:
        raise ValueError(f"The checkpoint's target is {width} wide; known are 512 (CLIP) and 768 (DINO).")
    clip = OFFICIAL_TEACHERS[width] != "vit"
    size = {"patch_size": 16, "image_size": 224}
    return VQKDConfig(
        backbone_config=official_vit_config(encoder, OFFICIAL_HEADS),
        codebook_size=state_dict["quantize.embedding.weight"].shape[0],
        code_dim=state_dict["quantize.embedding.weight"].shape[1],
        decoder_hidden_size=state_dict["decoder.cls_token"].shape[-1],
        decoder_num_hidden_layers=official_depth(state_dict, "decoder.blocks"),
        decoder_num_attention_heads=OFFICIAL_HEADS[state_dict["decoder.cls_token"].shape[-1]],
        decoder_intermediate_size=state_dict["decoder.blocks.0.mlp.fc1.weight"].shape[0],
        teacher="openai/clip-vit-base-patch16" if clip else "facebook/dino-vitb16",
        teacher_config=AutoConfig.for_model(OFFICIAL_TEACHERS[width], **size),
        teacher_projection=clip,
    )


# Official name -> ours.
_RENAMING = (
    (r"^quantize\.embedding\.weight$", "codebook.vectors"),
    (r"^quantize\.cluster_size$", "codebook.usage"),
    (r"^quantize\.embedding\.initted$", "codebook.begun"),
    (r"^encode_task_layer\.", "code_head."),
    (r"^decode_task_layer\.", "decoder.head."),
    (r"^decoder\.patch_embed\.proj\.", "decoder.embedding."),
    (r"^decoder\.pos_embed$", "decoder.position_embeddings"),
    (r"^decoder\.fc_norm\.", "decoder.norm."),
    (r"^decoder\.blocks\.(\d+)\.norm1\.", r"decoder.layers.\1.attention_norm."),
    (r"^decoder\.blocks\.(\d+)\.norm2\.", r"decoder.layers.\1.feed_forward_norm."),
    (r"^decoder\.blocks\.(\d+)\.attn\.qkv\.", r"decoder.layers.\1.attention.qkv."),
    (r"^decoder\.blocks\.(\d+)\.attn\.proj\.", r"decoder.layers.\1.attention.projection."),
    (r"^decoder\.blocks\.(\d+)\.mlp\.fc1\.", r"decoder.layers.\1.feed_forward.0."),
    (r"^decoder\.blocks\.(\d+)\.mlp\.fc2\.", r"decoder.layers.\1.feed_forward.2."),
    (r"^encoder\.", ""),
    *TIMM_VIT_RENAMING,
    (r"^cls_token$", "backbone.embeddings.cls_token"),
    (r"^fc_norm\.", "backbone.layernorm."),
)
# The teacher, and averages that the reference keeps and never reads.
_LEFT_OUT = ("teacher_model.", "scaling_layer.", "quantize.embedding.cluster_size", "quantize.embedding.embed_avg")


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: VQKDConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the reference's `VQKD`.
        config: unused here; other variants' conversions need it.
    """
    weights = {name: value for name, value in state_dict.items() if not name.startswith(_LEFT_OUT)}
    # The reference has no biases of keys, which change no attention.
    for name in [name for name in weights if name.endswith(".attn.q_bias")]:
        block = name.removesuffix("q_bias")
        query, value = weights.pop(name), weights.pop(f"{block}v_bias")
        weights[f"{block}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    weights = rename_weights(weights, _RENAMING)
    if "codebook.begun" in weights:
        weights["codebook.begun"] = weights["codebook.begun"].bool().squeeze()
    if "decoder.embedding.weight" in weights:
        weights["decoder.embedding.weight"] = weights["decoder.embedding.weight"].flatten(1)
    return weights


def tiny_config() -> VQKDConfig:
    form = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "layer_norm_eps": 1e-6,
        "image_size": 32,
        "patch_size": 8,
    }
    return VQKDConfig(
        backbone_config=ViTConfig(hidden_size=32, **form),
        codebook_size=16,
        code_dim=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        teacher_config=ViTConfig(hidden_size=16, **form),
    )


register_variant(
    config=VQKDConfig,
    pretraining=VQKDForPreTraining,
    model=VQKDModel,
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
