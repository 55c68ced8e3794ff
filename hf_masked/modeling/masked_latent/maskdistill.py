"""MaskDistill: predict a frozen teacher's normalised features of the masked patches.

Zhiliang Peng et al., "A Unified View of Masked Image Modeling", TMLR 2023, arXiv 2210.10615.
The authors have published no code. The student is BEiT's, as in https://github.com/microsoft/unilm (`beit2`); an
unofficial implementation is https://github.com/bwconrad/masked-distillation.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_patches import MaskedFeatures, MaskedPatchesConfig, MaskedPatchesModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    encode_visible,
    encode_with_mask_tokens,
    init_vit_as_mae,
    num_prefix_tokens,
)
from hf_masked.modeling.parts.beit import (
    beit_vit,
    check_beit,
    init_beit,
    init_linear,
    with_final_norm,
)
from hf_masked.modeling.parts.decoders import MaskTokenDecoder
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.patches import pair, patchify, unpatchify
from hf_masked.modeling.parts.teachers import FrozenTeacher, check_teacher, teacher_form
from hf_masked.modeling.registry import register_variant

PAPERS_TEACHER = "openai/clip-vit-base-patch16"
# Not a model: the target is the picture itself.
PIXELS = "pixels"
TARGET_NORMALIZATIONS = ("layer_norm", "l2", "none")
LOSSES = ("smooth_l1", "l1", "l2", "cosine")


class MaskDistillConfig(MaskedPatchesConfig):
    """Config of MaskDistill.

    The backbone decides on the student. A BEiT is "dense": it sees mask tokens in place of masked patches, and the
    head is one linear layer. A ViT, DeiT or DINOv2 is "sparse": it sees visible patches only, and the head is MAE's
    decoder; the paper's has mask_ratio=0.75 and mask_kind="random".

    Args:
        backbone_config: the student's; BEiT v2's ViT-B/16 by default.
        mask_ratio: share of the patches that are masked, in [0, 1).
        mask_kind: a name in `hf_masked.processing.masks.MASKS`; the dense student's is BEiT's blocks.
        mask_options: further arguments of the mask function.
        teacher: folder or Hub id of any vision Transformer (of CLIP the vision tower, of models of this package the
            encoder), None for untrained weights of `teacher_config`, or "pixels": the target is the picture.
        teacher_config: the stock config of the teacher's encoder; by default what its checkpoint says.
        teacher_layer: number of the teacher's block whose output is the target, from 0; negative ones count from the
            last.
        teacher_final_norm: apply the teacher's last norm to it.
        image_mean, image_std: how the pictures are normalised, if the teacher wants them otherwise; by default as the
            image processor does by default.
        target_normalization: of the teacher's features over their channels: "layer_norm" (without scale and shift; the
            paper's), "l2" or "none".
        loss: "smooth_l1" (the paper's), "l1", "l2", mean over channels, or "cosine", one minus the cosine.
        smooth_l1_beta: difference below which "smooth_l1" is quadratic.
        loss_on: "masked" patches or "all".
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            sparse student's decoder.
    """

    model_type = "hf_masked_maskdistill"
    paper_title: ClassVar[str] = "A Unified View of Masked Image Modeling"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2210.10615"
    masks: ClassVar[str] = "blocks of patches, as mask tokens; or random ones, dropped before the encoder"
    predicts: ClassVar[str] = "a frozen teacher's normalised features of the masked patches"
    backbones: ClassVar[tuple[str, ...]] = ("beit", *VISIBLE_TOKEN_BACKBONES)
    sub_configs: ClassVar[dict] = MaskedPatchesConfig.sub_configs | {"teacher_config": AutoConfig}

    mask_ratio: float = 0.4
    mask_kind: str = "block"
    teacher: str | None = PAPERS_TEACHER
    teacher_config: dict | PreTrainedConfig | None = None
    teacher_layer: int = -1
    teacher_final_norm: bool = False
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None
    target_normalization: str = "layer_norm"
    loss: str = "smooth_l1"
    smooth_l1_beta: float = 1.0
    loss_on: str = "masked"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048

    def __post_init__(self, **kwargs):
        if self.backbone_config is None:
            self.backbone_config = beit_vit()
        if self.teacher == PAPERS_TEACHER and self.teacher_config is None:
            self.teacher_config = CLIPVisionConfig(patch_size=16)  # known, so that nobody has to ask the Hub for it
        if self.teacher != PIXELS:
            self.teacher_config = teacher_form(self.teacher, self.teacher_config)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        backbone_grid(self.backbone_config)
        if self.backbone_config.model_type == "beit":
            check_beit(self.backbone_config)
        if self.teacher != PIXELS:
            check_teacher(self, self.teacher_layer)
        for name, known in (
            ("target_normalization", TARGET_NORMALIZATIONS),
            ("loss", LOSSES),
            ("loss_on", ("masked", "all")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")
        if self.smooth_l1_beta <= 0:
            raise ValueError(f"smooth_l1_beta is {self.smooth_l1_beta}; it must be above 0. The paper's family has 1.")
        if self.is_sparse and self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={self.decoder_hidden_size} is no multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}."
            )

    @property
    def is_sparse(self) -> bool:
        """Whether the student sees visible patches only."""
        return self.backbone_config.model_type in VISIBLE_TOKEN_BACKBONES

    @property
    def target_size(self) -> int:
        """Channels of the target."""
        rows, columns = pair(self.backbone_config.patch_size)
        return rows * columns * self.num_channels if self.teacher == PIXELS else self.teacher_config.hidden_size

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "MaskDistillConfig":
        return cls(backbone_config=with_final_norm(backbone_config), **arguments)

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"image_mean": self.image_mean, "image_std": self.image_std}


class MaskDistillPreTrainedModel(MaskedPatchesModel):
    """Initialisation, freezing and the masked encoder that all classes of MaskDistill share."""

    config: MaskDistillConfig
    uses_mask_token = True
    _no_split_modules: ClassVar[list[str]] = [*MaskedPatchesModel._no_split_modules, "BeitLayer", "TransformerBlock"]
    # The dense student's attention has a bias table.
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As BEiT or, of the sparse student, as MAE."""
        if module is self:
            if self.config.is_sparse:
                init_vit_as_mae(self.backbone, fixed_positions=True)
            else:
                init_beit(self.backbone)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MaskTokenDecoder):
            module.init_weights()
        elif isinstance(module, nn.Linear) and self.config.is_sparse:
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            init_linear(module)

    def frozen_parameters(self):
        if self.config.is_sparse:
            embeddings = self.backbone.embeddings
            yield embeddings.position_embeddings
            if embeddings.mask_token is not None:
                yield embeddings.mask_token

    def no_weight_decay(self) -> set[str]:
        return set() if self.config.is_sparse else {"cls_token", "position_embeddings"}

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """(batch, prefix + units, hidden); of the sparse student with a mask (batch, prefix + visible, hidden)."""
        if self.config.is_sparse:
            visible = None if bool_masked_pos is None else self._visible(bool_masked_pos, grid)
            return encode_visible(self.backbone, pixel_values, visible, **kwargs)
        return encode_with_mask_tokens(self.backbone, pixel_values, bool_masked_pos, **kwargs)


class MaskDistillModel(MaskedFeatures, MaskDistillPreTrainedModel):
    """The encoder: without a mask the plain backbone, with one what the student makes of the masked picture."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"head\..*"]


class MaskDistillForPreTraining(MaskDistillPreTrainedModel):
    """Encoder, head and the loss against a frozen teacher's features."""

    def __init__(self, config: MaskDistillConfig):
        super().__init__(config)
        self.patch_size = pair(config.backbone_config.patch_size)
        self.head = _decoder(config) if config.is_sparse else nn.Linear(config.hidden_size, config.target_size)
        if config.teacher != PIXELS:
            self.teacher = FrozenTeacher(config, config.teacher_layer, config.teacher_final_norm)
        self.post_init()

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
        """One step of masked distillation.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked; drawn here by default.
            noise: float (batch, n), the numbers that the mask function draws.
            generator: to draw the mask from.
            return_loss: whether to compute the loss, for which the teacher runs.

        Returns:
            `MaskedPreTrainingOutput`; `logits` are (batch, units, target channels), of visible patches too.

        Raises:
            ValueError: for other channels, sizes or mask shapes, or if the teacher is not to be had.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        encoded = self.encode(pixel_values, bool_masked_pos, grid, **kwargs)
        logits = self.predict(encoded, bool_masked_pos, grid)  # (batch, units, channels)
        loss = self.loss(logits, self.target(pixel_values, grid), bool_masked_pos) if return_loss else None
        return MaskedPreTrainingOutput(
            loss=loss,
            losses=None if loss is None else {"distillation": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
        )

    def predict(self, encoded: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The head's prediction for every patch, (batch, units, target channels)."""
        if self.config.is_sparse:
            return self.head(encoded, self._visible(bool_masked_pos, grid), grid)
        return self.head(encoded[:, -grid[0] * grid[1] :])

    @torch.no_grad()
    def target(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the teacher makes of the whole picture, normalised over channels: float32 (batch, units, channels)."""
        if self.config.teacher == PIXELS:
            features = patchify(pixel_values.float(), self.patch_size)
        else:
            features = self.teacher.features(pixel_values, grid)
        if self.config.target_normalization == "layer_norm":
            return F.layer_norm(features, features.shape[-1:], eps=1e-6)
        return F.normalize(features, dim=-1) if self.config.target_normalization == "l2" else features

    def loss(self, logits: torch.Tensor, target: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean over the masked patches, or over all (paper, equation 1)."""
        loss_per_unit = self.loss_per_unit(logits.float(), target)
        return masked_mean(loss_per_unit, bool_masked_pos) if self.config.loss_on == "masked" else loss_per_unit.mean()

    def loss_per_unit(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean over channels, float32 (batch, units)."""
        if self.config.loss == "cosine":
            return 1.0 - F.cosine_similarity(logits, target, dim=-1)
        if self.config.loss == "smooth_l1":
            loss = F.smooth_l1_loss(logits, target, beta=self.config.smooth_l1_beta, reduction="none")
        else:
            loss = (logits - target).abs() if self.config.loss == "l1" else (logits - target).square()
        return loss.mean(dim=-1)

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        A teacher's features are drawn as colours, their principal components over the batch; in the panel of
        predictions the patches that are not masked keep their true ones.
        """
        output = self(pixel_values, bool_masked_pos, return_loss=False)
        grid = self._check_inputs(pixel_values, None)
        patches = patchify(pixel_values.float(), self.patch_size)
        hidden = output.mask.unsqueeze(-1)
        target = self.target(pixel_values, grid)
        predicted = torch.where(hidden, output.logits.float(), target)
        if self.config.teacher != PIXELS:
            predicted, target = self._colors(predicted, target, patches)
        panels = {
            "picture": patches,
            "masked": patches.masked_fill(hidden, 0.0),
            "prediction": predicted,
            "target": target,
        }
        return {name: unpatchify(panel, grid, self.patch_size) for name, panel in panels.items()}

    def _colors(
        self, predicted: torch.Tensor, target: torch.Tensor, patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As many principal components of the target as pictures have channels, between the pictures' darkest and
        brightest value: (batch, units, patch height * patch width * channels) each."""
        mean = target.mean(dim=(0, 1))
        _, directions = torch.linalg.eigh((target - mean).flatten(0, 1).T.cov())  # ascending
        directions = directions[:, -self.config.num_channels :].flip(1)
        predicted, target = (predicted - mean) @ directions, (target - mean) @ directions
        low, high = target.amin(dim=(0, 1)), target.amax(dim=(0, 1))
        darkest, brightest = patches.amin(), patches.amax()
        area = self.patch_size[0] * self.patch_size[1]
        return tuple(
            (darkest + (brightest - darkest) * ((part - low) / (high - low)).clamp(0, 1)).repeat(1, 1, area)
            for part in (predicted, target)
        )


def _decoder(config: MaskDistillConfig) -> MaskTokenDecoder:
    return MaskTokenDecoder(
        config,
        encoder_size=config.hidden_size,
        hidden_size=config.decoder_hidden_size,
        num_hidden_layers=config.decoder_num_hidden_layers,
        num_attention_heads=config.decoder_num_attention_heads,
        intermediate_size=config.decoder_intermediate_size,
        grid=backbone_grid(config.backbone_config),
        output_size=config.target_size,
        num_prefix_tokens=num_prefix_tokens(config.backbone_config),
    )


def tiny_config() -> MaskDistillConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    teacher_config = CLIPVisionConfig(**sizes | {"hidden_size": 48, "num_hidden_layers": 3})
    return MaskDistillConfig(
        backbone_config=beit_vit(**sizes, drop_path_rate=0.0), teacher=None, teacher_config=teacher_config
    )


register_variant(
    config=MaskDistillConfig,
    pretraining=MaskDistillForPreTraining,
    model=MaskDistillModel,
    tiny_config=tiny_config,
)
