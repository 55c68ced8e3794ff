"""DMAE: MAE whose encoder is also pulled, half-way up, towards a large pretrained MAE that sees the same patches.

Yutong Bai et al., "Masked Autoencoders Enable Efficient Knowledge Distillers", CVPR 2023, arXiv 2208.12256.
Reference implementation: https://github.com/UCSC-VLAA/DMAE (`models_mae_distill.py`, `engine_distill.py`).
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, ViTConfig
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    check_visible_token_backbone,
    num_prefix_tokens,
    tiny_vit,
    visible_feature_maps,
)
from hf_masked.modeling.parts.heads import init_as_torch
from hf_masked.modeling.parts.patches import unpatchify, visible_indices
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.parts.teachers import FrozenTeacher, check_teacher, teacher_form
from hf_masked.modeling.registry import register_variant

PAPERS_TEACHER = "facebook/vit-mae-large"
PROJECTIONS = ("linear", "mlp", "none")
DISTILLATION_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class DMAEConfig(MAEConfig):
    """Config of DMAE: MAE's, with raw pixels as targets, and the following.

    Args:
        teacher: folder or Hub id of the teacher, a ViT, DeiT or DINOv2 (of ViT-MAE and of models of this package the
            encoder); None for untrained weights of `teacher_config`.
        teacher_config: the stock config of the teacher's encoder; by default what its checkpoint says.
        image_mean, image_std: how the pictures are normalised, if the teacher wants them otherwise; by default as the
            image processor does by default.
        align_layers: pairs (block of the student, block of the teacher), numbered from 0, whose outputs are compared;
            by default one pair at three quarters of both depths, which for ViT-B and ViT-L is the paper's (8, 17).
        projection: between the student's states and the teacher's: a "linear" layer, an "mlp" of one hidden layer, or
            "none", which needs equal widths and compares the states as they are.
        distillation_loss: "l1" (the paper's) or "l2", mean over tokens and channels.
        distillation_weight: of each pair's loss beside the reconstruction.
    """

    model_type = "hf_masked_dmae"
    paper_title: ClassVar[str] = "Masked Autoencoders Enable Efficient Knowledge Distillers"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2208.12256"
    reference_repository: ClassVar[str] = "https://github.com/UCSC-VLAA/DMAE"
    weights_licence: ClassVar[str] = "CC BY-NC 4.0"
    predicts: ClassVar[str] = "pixels of the masked patches, and a teacher's states of the visible ones"
    sub_configs: ClassVar[dict] = MAEConfig.sub_configs | {"teacher_config": AutoConfig}

    norm_pix_loss: bool = False
    teacher: str | None = PAPERS_TEACHER
    teacher_config: dict | PreTrainedConfig | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None
    align_layers: list | tuple | None = None
    projection: str = "linear"
    distillation_loss: str = "l1"
    distillation_weight: float = 1.0

    def __post_init__(self, **kwargs):
        if self.teacher == PAPERS_TEACHER and self.teacher_config is None:
            self.teacher_config = vit_large()  # known, so that nobody has to ask the Hub for it
        self.teacher_config = teacher_form(self.teacher, self.teacher_config)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        check_visible_token_backbone(self.teacher_config)
        for student, teacher in self.aligned_pairs:
            check_teacher(self, teacher)
            if not (0 <= student < self.backbone_config.num_hidden_layers and teacher >= 0):
                raise ValueError(
                    f"align_layers holds ({student}, {teacher}); the student's blocks are 0 to "
                    f"{self.backbone_config.num_hidden_layers - 1}, the teacher's 0 to "
                    f"{self.teacher_config.num_hidden_layers - 1}."
                )
        prefixes = num_prefix_tokens(self.backbone_config), num_prefix_tokens(self.teacher_config)
        if prefixes[0] != prefixes[1]:
            raise ValueError(
                f"The student has {prefixes[0]} tokens before its patches and the teacher {prefixes[1]}; they are "
                "compared too: choose encoders that agree, for example two ViTs."
            )
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection is {self.projection!r}; it must be one of {', '.join(PROJECTIONS)}.")
        if self.projection == "none" and self.hidden_size != self.teacher_config.hidden_size:
            raise ValueError(
                f"The student is {self.hidden_size} wide and the teacher {self.teacher_config.hidden_size}: states of "
                "different widths need projection='linear' or 'mlp'."
            )
        if self.distillation_loss not in DISTILLATION_LOSSES:
            raise ValueError(
                f"distillation_loss is {self.distillation_loss!r}; it must be one of {', '.join(DISTILLATION_LOSSES)}."
            )

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"image_mean": self.image_mean, "image_std": self.image_std}

    @property
    def aligned_pairs(self) -> list[tuple[int, int]]:
        """(block of the student, block of the teacher) pairs."""
        if self.align_layers is not None:
            return [(student, teacher) for student, teacher in self.align_layers]
        depths = self.backbone_config.num_hidden_layers, self.teacher_config.num_hidden_layers
        return [tuple(max(0, int(0.75 * depth + 0.5) - 1) for depth in depths)]


def vit_large() -> ViTConfig:
    """MAE's ViT-L/16."""
    return ViTConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, layer_norm_eps=1e-6
    )


class DMAEModel(MAEModel):
    """MAE's encoder under DMAE's config."""

    config: DMAEConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|projections)\..*"]


class DMAEForPreTraining(MAEForPreTraining):
    """MAE's encoder, decoder and loss, and the distance of some of the encoder's states from a frozen teacher's."""

    config: DMAEConfig

    def __init__(self, config: DMAEConfig):
        super().__init__(config)
        self.projections = nn.ModuleList(_projection(config) for _ in config.aligned_pairs)
        # Blocks above the highest aligned one never run (paper, section 3).
        self.teacher = FrozenTeacher(config, layer=max(teacher for _, teacher in config.aligned_pairs))
        # MAE's constructor has prepared what was there before.
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "projections"):
            # The reference adds them after MAE's initialisation, so that they keep torch's.
            for part in self.projections.modules():
                init_as_torch(part)

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
        """One step of masked autoencoding with a teacher; arguments and outputs as of MAE.

        `losses` are "reconstruction" and, for each aligned pair, "distillation_" and the number of the student's
        block. Without the loss the teacher does not run.

        Raises:
            ValueError: for other channels, sizes or mask shapes, or if the teacher is not to be had.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        states = visible_feature_maps(self.backbone, pixel_values, visible, **kwargs)
        encoded = self.backbone.layernorm(states[-1])  # (batch, prefix + visible, hidden)
        logits = self.decoder(encoded, visible, grid)  # (batch, units, values)
        loss, losses = None, None
        if return_loss:
            reconstruction = self.loss(pixel_values, logits, bool_masked_pos)
            distances = self.distances(self.aligned_states(pixel_values, visible, grid, states))
            loss = reconstruction + self.config.distillation_weight * sum(distances)
            losses = {"reconstruction": reconstruction.detach()} | {
                f"distillation_{student}": distance.detach()
                for (student, _), distance in zip(self.config.aligned_pairs, distances, strict=True)
            }
        return MaskedPreTrainingOutput(
            loss=loss, losses=losses, last_hidden_state=encoded, logits=logits, mask=bool_masked_pos
        )

    def aligned_states(
        self, pixel_values: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int], states: list[torch.Tensor]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each pair the student's states, projected, and the teacher's: (batch, prefix + visible, teacher hidden).

        Outputs of blocks, without a norm. With a projection both are scaled to length 1, after it; without one they
        stay as they are (`forward_distillation_loss_embedding`).

        Args:
            pixel_values: float (batch, channels, height, width).
            visible: int64 (batch, visible) raster positions that student and teacher see.
            grid: (rows, columns) of patches.
            states: the student's embedded tokens and the output of each of its blocks.
        """
        theirs = self.teacher_states(pixel_values, visible, grid)
        pairs = []
        for (student, teacher), projection in zip(self.config.aligned_pairs, self.projections, strict=True):
            mine, target = projection(states[student + 1]).float(), theirs[teacher + 1].float()
            if self.config.projection != "none":
                mine, target = F.normalize(mine, dim=-1), F.normalize(target, dim=-1)
            pairs.append((mine, target))
        return pairs

    @torch.no_grad()
    def teacher_states(
        self, pixel_values: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]
    ) -> list[torch.Tensor]:
        """The teacher's embedded visible tokens and the outputs of its blocks, up to the highest aligned one."""
        encoder = self.teacher.encoder(pixel_values.device)
        return visible_feature_maps(encoder, self.teacher.pictures(pixel_values, grid), visible)

    def distances(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """For each pair the mean over tokens and channels of the difference (`distillation_criterion`), float32."""
        return [DISTILLATION_LOSSES[self.config.distillation_loss](mine, target) for mine, target in pairs]

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """MAE's panels, and the cosine of student's and teacher's states at visible patches: 0 is dark, 1 bright."""
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid)
        panels = super().pictures(pixel_values, bool_masked_pos)
        visible = visible_indices(bool_masked_pos)
        states = visible_feature_maps(self.backbone, pixel_values, visible)
        mine, target = self.aligned_states(pixel_values, visible, grid, states)[-1]
        cosine = F.cosine_similarity(mine, target, dim=-1)[:, -visible.shape[1] :].clamp(min=0.0)  # (batch, visible)
        values = panels["picture"].float()
        low, high = values.amin(), values.amax()
        bright = values.new_zeros(bool_masked_pos.shape).scatter(1, visible, cosine)  # (batch, units)
        bright = (low + (high - low) * bright).unsqueeze(-1)
        size = self.patch_size[0] * self.patch_size[1] * pixel_values.shape[1]
        return panels | {
            "agreement (with the teacher)": unpatchify(bright.expand(-1, -1, size), grid, self.patch_size)
        }


class DMAEForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head on DMAE's encoder."""

    config: DMAEConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"backbone\.layernorm\..*",
        r"(decoder|projections)\..*",
    ]


def _projection(config: DMAEConfig) -> nn.Module:
    """From the student's width to the teacher's."""
    width = config.teacher_config.hidden_size
    if config.projection == "none":
        return nn.Identity()
    if config.projection == "linear":
        return nn.Linear(config.hidden_size, width)
    return nn.Sequential(nn.Linear(config.hidden_size, width), nn.GELU(), nn.Linear(width, width))


# Official name -> ours, of what DMAE adds to MAE.
_RENAMING = (
    (r"^aligned_feature_projection_heads\.(\d+)\.fc1\.", r"projections.\1.0."),
    (r"^aligned_feature_projection_heads\.(\d+)\.fc2\.", r"projections.\1.2."),
    (r"^aligned_feature_projection_heads\.(\d+)\.", r"projections.\1."),
)


def official_config(state_dict: dict[str, torch.Tensor]) -> DMAEConfig:
    """The config of an official checkpoint, distilled from MAE's ViT-L; raises as MAE's."""
    return DMAEConfig(**mae.settings_of(mae.official_config(state_dict), "norm_pix_loss"))


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: DMAEConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    Args:
        state_dict: of the student in `models_mae_distill.py`.
        config: unused here; other variants' conversions need it.
    """
    return mae.convert_official_weights(rename_weights(state_dict, _RENAMING), config)


def tiny_config() -> DMAEConfig:
    return DMAEConfig(
        teacher=None,
        teacher_config=tiny_vit(hidden_size=48, num_hidden_layers=4, intermediate_size=96),
        **mae.settings_of(mae.tiny_config(), "norm_pix_loss"),
    )


register_variant(
    config=DMAEConfig,
    pretraining=DMAEForPreTraining,
    model=DMAEModel,
    heads={AutoModelForImageClassification: DMAEForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
