"""dBOT: an MAE that predicts a teacher's features: first those of an untrained one, then those of the last student.
Or, in the symmetric form, a BEiT with mask tokens that predicts CLIP's.

Xingbin Liu, Jinghao Zhou et al., "Exploring Target Representations for Masked Autoencoders", ICLR 2024,
arXiv 2209.03917. Reference implementation: https://github.com/liuxingbin/dbot (`models_mae.py`, `main_pretrain.py`; of
the symmetric form its branch `beit`: `modeling_pretrain.py`, `engine_for_pretraining.py`).
"""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, CLIPVisionConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.utils.output_capturing import capture_outputs

from hf_masked.modeling.masked_image import mae
from hf_masked.modeling.masked_image.mae import MAEForImageClassification, MAEModel, MAEPreTrainedModel
from hf_masked.modeling.masked_patches import MaskedPatchesConfig
from hf_masked.modeling.outputs import MaskedPreTrainingOutput
from hf_masked.modeling.parts.backbones import (
    VISIBLE_TOKEN_BACKBONES,
    backbone_grid,
    check_visible_token_backbone,
    copy_weights,
    encode_visible,
    encode_with_mask_tokens,
    load_backbone,
    make_layers_identity,
    num_prefix_tokens,
    set_drop_path,
)
from hf_masked.modeling.parts.beit import (
    BEIT_RENAMING,
    beit_vit,
    check_beit,
    init_beit,
    init_linear,
    official_beit_config,
    with_final_norm,
)
from hf_masked.modeling.parts.decoders import MaskTokenDecoder
from hf_masked.modeling.parts.losses import masked_mean
from hf_masked.modeling.parts.momentum import MomentumTwin
from hf_masked.modeling.parts.patches import pair, patchify, unpatchify
from hf_masked.modeling.parts.state_dicts import rename_weights
from hf_masked.modeling.parts.targets import normalize_patches
from hf_masked.modeling.parts.teachers import FrozenTeacher, check_teacher, teacher_form
from hf_masked.modeling.registry import register_variant

ARCHITECTURES = ("asymmetric", "symmetric")
LOSSES = ("smooth_l1", "cosine")

# The reference's settings of the symmetric form, whose teacher is CLIP (branch `beit`, PRETRAIN.md and run.sh).
SYMMETRIC = {
    "architecture": "symmetric",
    "mask_ratio": 78 / 196,
    "mask_kind": "block",
    "num_stages": 1,
    "teacher_final_norm": True,
    "teacher_projection": True,
    "normalize_target": False,
    "loss": "cosine",
    "loss_on_class_token": False,
    "drop_path_rate": 0.1,
}

# What stage k is drawn from is this and k: the same in every process and in a run that is resumed.
STAGE_SEED = 220903917


class DBOTConfig(MaskedPatchesConfig):
    """Config of dBOT. The defaults are those of the asymmetric form; of the symmetric one `SYMMETRIC` holds them.

    Args:
        architecture: "asymmetric", an MAE: a ViT sees the visible patches, and a decoder predicts; or "symmetric": a
            BEiT sees mask tokens in place of the masked patches, and a linear layer predicts.
        backbone_config: a ViT, DeiT or DINOv2 config, of the symmetric form a BEiT's; ViT-B/16 by default.
        mask_ratio: share of the patches that are masked, in [0, 1).
        mask_kind: a name in `hf_masked.processing.masks.MASKS`.
        mask_options: further arguments of the mask function.
        num_stages: equal parts of the training. At the start of each but the first the student becomes the teacher,
            and a new student begins from scratch.
        initial_teacher: the first one: the student's own initial weights ("student_init", the paper's for ViT-B),
            others ("random"), the patch embedding alone, with positions ("patch_embedding", for ViT-L and ViT-H), or
            those of a folder or Hub id with an encoder of the student's form.
        teacher: folder or Hub id of any vision Transformer (of CLIP and its like the vision tower), which teaches the
            masked patches in one stage, in place of the above.
        teacher_config: the stock config of its encoder; by default what its checkpoint says.
        image_mean, image_std: how the pictures are normalised, if that teacher wants them otherwise; by default as the
            image processor does by default.
        teacher_final_norm: take the teacher's tokens after its final norm; else as its last block leaves them.
        teacher_projection: project them, last, as CLIP does its class token; of a `teacher`.
        normalize_target: each token of the target less its mean and over its standard deviation.
        loss: "smooth_l1" or "cosine".
        smooth_l1_beta: of the smooth L1 loss, where it turns from quadratic to linear.
        loss_on_class_token: the class token (with DeiT the distillation token too) is predicted besides the masked
            patches.
        reset_optimizer_state: forget the optimizer's averages when a stage starts; the reference keeps them.
        drop_path_rate: of the student's last block, in the encoder and in the decoder; rising evenly from 0.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: of the
            asymmetric form's decoder, whatever the encoder.
        fixed_positions: the ViT's position table is the fixed sine-cosine one; False keeps a learned table.
        classifier_pooling: what `DBOTForImageClassification` reads: "mean" of the patch tokens, or "cls".
    """

    model_type = "hf_masked_dbot"
    paper_title: ClassVar[str] = "Exploring Target Representations for Masked Autoencoders"
    paper_year: ClassVar[int] = 2022
    arxiv_id: ClassVar[str] = "2209.03917"
    reference_repository: ClassVar[str] = "https://github.com/liuxingbin/dbot"
    weights_licence: ClassVar[str] = "Apache-2.0"
    masks: ClassVar[str] = "random patches, dropped before the encoder; or blocks of patches, as mask tokens"
    predicts: ClassVar[str] = "features of the masked patches by a teacher, at first an untrained one"
    backbones: ClassVar[tuple[str, ...]] = (*VISIBLE_TOKEN_BACKBONES, "beit")
    sub_configs: ClassVar[dict] = MaskedPatchesConfig.sub_configs | {"teacher_config": AutoConfig}

    architecture: str = "asymmetric"
    num_stages: int = 2
    initial_teacher: str = "student_init"
    teacher: str | None = None
    teacher_config: dict | PreTrainedConfig | None = None
    image_mean: float | list[float] | None = None
    image_std: float | list[float] | None = None
    teacher_final_norm: bool = False
    teacher_projection: bool = False
    normalize_target: bool = True
    loss: str = "smooth_l1"
    smooth_l1_beta: float = 2.0
    loss_on_class_token: bool = True
    reset_optimizer_state: bool = False
    drop_path_rate: float = 0.2
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    fixed_positions: bool = True
    classifier_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        if self.backbone_config is None and self.is_symmetric:
            self.backbone_config = beit_vit(drop_path_rate=0.0)
        if self.teacher is not None or self.teacher_config is not None:
            self.teacher_config = teacher_form(self.teacher, self.teacher_config)
        super().__post_init__(**kwargs)

    def check(self) -> None:
        super().check()
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture is {self.architecture!r}; it must be one of {', '.join(ARCHITECTURES)}.")
        if self.is_symmetric != (self.backbone_config.model_type == "beit"):
            raise ValueError(
                f"architecture={self.architecture!r} with a {self.backbone_config.model_type}: the symmetric form's "
                f"student is a BEiT, the asymmetric form's {', '.join(VISIBLE_TOKEN_BACKBONES)}."
            )
        if self.is_symmetric:
            backbone_grid(self.backbone_config)
            check_beit(self.backbone_config)
        else:
            check_visible_token_backbone(self.backbone_config)
            mae.check_decoder_and_pooling(self)
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}; it must be at least 1. The paper's is 2.")
        if self.teacher_config is not None:
            check_teacher(self, projection=self.teacher_projection)
            if self.num_stages > 1:
                raise ValueError(
                    f"num_stages={self.num_stages} with a teacher of its own form, which teaches in one stage: set "
                    "num_stages=1, or name an encoder like the student's as initial_teacher instead."
                )
        elif self.teacher_projection:
            raise ValueError(
                "teacher_projection=True without a `teacher`: name CLIP, which has such a projection, or leave it out."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}.")
        if self.smooth_l1_beta <= 0:
            raise ValueError(f"smooth_l1_beta is {self.smooth_l1_beta}; it must be positive. The paper's is 2.")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}; it must lie in [0, 1). The paper's is 0.2.")

    @property
    def is_symmetric(self) -> bool:
        return self.architecture == "symmetric"

    @property
    def teacher_size(self) -> int:
        """Width of the teacher's features."""
        if self.teacher_config is None:
            return self.hidden_size
        return self.teacher_config.projection_dim if self.teacher_projection else self.teacher_config.hidden_size

    @classmethod
    def of_backbone(cls, backbone_config: PreTrainedConfig, **arguments) -> "DBOTConfig":
        architecture = "symmetric" if backbone_config.model_type == "beit" else "asymmetric"
        # A pretrained encoder brings its own positions.
        own = {"architecture": architecture, "fixed_positions": False}
        return cls(backbone_config=with_final_norm(backbone_config), **own | arguments)

    def processor_settings(self) -> dict:
        return super().processor_settings() | {"image_mean": self.image_mean, "image_std": self.image_std}


@dataclass
class DBOTOutput(MaskedPreTrainingOutput):
    """Output of `DBOTForPreTraining`.

    Args:
        logits: (batch, prefix + units, teacher's hidden), the class token's prediction first.
        target: float32, likewise, what they should be; None with `return_loss=False`. Zero in the row of the class
            token where the teacher is of its own form and that row does not count.
    """

    target: torch.Tensor | None = None


class Teacher(MomentumTwin):
    """The frozen teacher: a twin of the backbone that stays as it is, until it is given the student's weights.

    Args:
        online: the model.
    """

    def __init__(self, online: "DBOTForPreTraining"):
        super().__init__(online, ("backbone",), momentum=1.0, eval_mode=True)
        if online.config.num_stages == 1:  # which needs nobody who starts the next
            self._watch.stop()

    def update(self, online: nn.Module, progress: float) -> None:
        self._watch.stop()

    @torch.no_grad()
    def reset(self, online: "DBOTForPreTraining") -> None:
        """Makes it the first teacher.

        Raises:
            ValueError: for an encoder that cannot be found or is not of the student's form.
        """
        self.succeed(online)
        first = online.config.initial_teacher
        if first == "student_init" or next(self.parameters()).is_meta:  # before a checkpoint is loaded
            return
        if first == "patch_embedding":
            make_layers_identity(self.backbone)
        elif first == "random":
            copy_weights(new_student(online.config, 0).backbone, self.backbone)
        else:
            self._copy_encoder(first)

    def _copy_encoder(self, name: str) -> None:
        encoder = load_backbone(name)
        try:
            copy_weights(encoder, self.backbone)
        except RuntimeError as error:
            raise ValueError(
                f"initial_teacher={name!r} is an encoder of another form than the student's, a "
                f"{self.backbone.config.model_type}: give one with the same settings; or name it as `teacher`, with "
                "num_stages=1."
            ) from error

    def succeed(self, online: nn.Module) -> None:
        """Makes it the copy of the student's encoder."""
        super().reset(online)


class DBOTPreTrainedModel(MAEPreTrainedModel):
    """Initialisation, freezing and the masked encoder of both forms: MAE's, and BEiT's."""

    config: DBOTConfig
    _no_split_modules: ClassVar[list[str]] = [*MAEPreTrainedModel._no_split_modules, "BeitLayer"]
    uses_mask_token = True

    def __init__(self, config: DBOTConfig):
        # Known before the backbone is built: an encoder that sees visible patches only has no mask token.
        self.uses_mask_token = config.is_symmetric
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not self.config.is_symmetric:
            super()._init_weights(module)
        elif module is self:
            init_beit(self.backbone)
        else:
            init_linear(module)

    def frozen_parameters(self):
        return () if self.config.is_symmetric else super().frozen_parameters()

    def no_weight_decay(self) -> set[str]:
        # As the references have it: the mask token and the table that a BEiT's blocks share do decay.
        return {"cls_token", "position_embeddings"} if self.config.is_symmetric else set()

    def encode(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """(batch, prefix + units, hidden); of the asymmetric form with a mask (batch, prefix + visible, hidden)."""
        if self.config.is_symmetric:
            return encode_with_mask_tokens(self.backbone, pixel_values, bool_masked_pos, **kwargs)
        return super().encode(pixel_values, bool_masked_pos, grid, **kwargs)


class DBOTModel(DBOTPreTrainedModel, MAEModel):
    """The encoder: without a mask the plain backbone, with one it sees visible patches only, or mask tokens."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"(decoder|teacher)\..*", r"^stage$"]


class DBOTStudent(DBOTPreTrainedModel):
    """Encoder and decoder; what a stage starts anew."""

    def __init__(self, config: DBOTConfig):
        super().__init__(config)
        set_drop_path(self.backbone, config.drop_path_rate)
        self.decoder = (
            nn.Linear(config.hidden_size, config.teacher_size) if config.is_symmetric else make_decoder(config)
        )
        self.post_init()

    def predict(
        self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int], **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the encoder returns, and the predictions (batch, prefix + units, teacher's hidden)."""
        if self.config.is_symmetric:
            encoded = self.encode(pixel_values, bool_masked_pos, grid, **kwargs)
            return encoded, self.decoder(encoded)
        visible = self._visible(bool_masked_pos, grid)  # (batch, visible)
        encoded = encode_visible(self.backbone, pixel_values, visible, **kwargs)
        return encoded, self.decoder(encoded, visible, grid)


def make_decoder(config: DBOTConfig) -> MaskTokenDecoder:
    return MaskTokenDecoder(
        config,
        encoder_size=config.hidden_size,
        hidden_size=config.decoder_hidden_size,
        num_hidden_layers=config.decoder_num_hidden_layers,
        num_attention_heads=config.decoder_num_attention_heads,
        intermediate_size=config.decoder_intermediate_size,
        grid=backbone_grid(config.backbone_config),
        output_size=config.teacher_size,
        num_prefix_tokens=num_prefix_tokens(config.backbone_config),
        drop_path_rate=config.drop_path_rate,
        predicts_prefix=True,
    )


def new_student(config: DBOTConfig, stage: int) -> DBOTStudent:
    """An untrained student on the CPU, a function of the config and the stage alone; leaves the generators alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(STAGE_SEED + stage)
        return DBOTStudent(copy.deepcopy(config))


def sharded_as(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What all processes have drawn alike, as the parameter holds it: of a sharded one each process takes its part."""
    if not hasattr(parameter, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


class DBOTForPreTraining(DBOTStudent):
    """The student, its frozen teacher, and the loss on the masked patches and the class token.

    `stage` is the number of the current stage, from 0: an int64 scalar that is saved with the weights.
    """

    config: DBOTConfig

    def __init__(self, config: DBOTConfig):
        super().__init__(config)
        self.register_buffer("stage", torch.zeros((), dtype=torch.int64))
        self._known_stage: int | None = None
        if config.teacher_config is None:
            self.teacher = Teacher(self)
        else:
            settings = {"final_norm": config.teacher_final_norm, "projection": config.teacher_projection}
            self.teacher = FrozenTeacher(config, **settings)
        # The student's constructor has prepared what was there before.
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "stage"):
            init.zeros_(self.stage)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        **kwargs,
    ) -> DBOTOutput:
        """One step of masked feature prediction.

        Args:
            pixel_values: float (batch, channels, height, width), normalised; the patch must divide both sizes.
            bool_masked_pos: bool (batch, units), True = masked, the same count in each row; drawn here by default.
            noise: float (batch, units), distinct numbers from which to draw the mask: the smallest stay visible.
            generator: to draw the mask from.
            return_loss: whether to compute target and loss.

        Returns:
            `DBOTOutput`.

        Raises:
            ValueError: for other channels, sizes or mask shapes.
        """
        grid = self._check_inputs(pixel_values, bool_masked_pos)
        if bool_masked_pos is None:
            bool_masked_pos = self.draw_mask(pixel_values, grid, noise, generator)
        # Out here, so that hidden states and attentions that are asked for are not the teacher's.
        target = self.target(pixel_values, grid) if return_loss else None
        return self._predict(pixel_values, bool_masked_pos, grid, target, **kwargs)

    @capture_outputs(tie_last_hidden_states=False)
    def _predict(self, pixel_values, bool_masked_pos, grid, target, **kwargs) -> DBOTOutput:
        encoded, logits = self.predict(pixel_values, bool_masked_pos, grid, **kwargs)
        loss = None if target is None else self.loss(logits, target, bool_masked_pos)
        return DBOTOutput(
            loss=loss,
            losses=None if loss is None else {"features": loss.detach()},
            last_hidden_state=encoded,
            logits=logits,
            mask=bool_masked_pos,
            target=target,
        )

    @torch.no_grad()
    def target(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the teacher makes of whole pictures: float32 (batch, prefix + units, teacher's hidden)."""
        config, num_prefix = self.config, num_prefix_tokens(self.config.backbone_config)
        if not isinstance(self.teacher, FrozenTeacher):
            final_norm = config.teacher_final_norm
            tokens = encode_with_mask_tokens(self.teacher.backbone, pixel_values, final_norm=final_norm).float()
        elif config.loss_on_class_token:
            tokens = self.teacher.features(pixel_values, grid, class_token=True)
            tokens = torch.cat([tokens[:, :1].repeat(1, num_prefix, 1), tokens[:, 1:]], dim=1)
        else:
            tokens = F.pad(self.teacher.features(pixel_values, grid), (0, 0, num_prefix, 0))
        return normalize_patches(tokens) if config.normalize_target else tokens

    def loss(self, logits: torch.Tensor, target: torch.Tensor, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """Mean over the rows of masked patches and of the class token (`forward_loss`).

        Args:
            logits, target: (batch, prefix + units, teacher's hidden).
        """
        num_prefix = logits.shape[1] - bool_masked_pos.shape[1]
        counted = F.pad(bool_masked_pos, (num_prefix, 0), value=self.config.loss_on_class_token)
        return masked_mean(self.loss_per_row(logits, target), counted)

    def loss_per_row(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Float32 (batch, prefix + units): the mean over channels of the smooth L1 loss, or 1 minus the cosine."""
        if self.config.loss == "cosine":
            return 1.0 - F.cosine_similarity(logits.float(), target, dim=-1)
        beta = self.config.smooth_l1_beta
        return F.smooth_l1_loss(logits.float(), target, beta=beta, reduction="none").mean(dim=-1)

    def on_progress(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Starts the stage that is due."""
        if self.training_progress == 0.0:
            # A new run, perhaps from the weights of a complete one.
            self.stage.zero_()
            self._known_stage = 0
        # The product of a whole number of steps may fall short of the whole number that it should be.
        due = min(math.floor(self.training_progress * self.config.num_stages + 1e-9), self.config.num_stages - 1)
        # `stage` is read from the device only when another one is due, and at the begin of a run that is resumed.
        if due == self._known_stage:
            return
        if self.stage.item() < due:
            self.start_stage(due, optimizer)
        self._known_stage = due

    @torch.no_grad()
    def start_stage(self, stage: int | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Makes the student's encoder the teacher, and begins with a new student (`main_pretrain.py`).

        Args:
            stage: its number; by default the one after the current.
            optimizer: forgets its averages with `reset_optimizer_state`.

        Raises:
            ValueError: with a teacher of its own form, which the student cannot succeed.
        """
        if isinstance(self.teacher, FrozenTeacher):
            raise ValueError(f"The student cannot succeed {self.config.teacher} as the teacher: there is one stage.")
        stage = self.stage.item() + 1 if stage is None else stage
        self.teacher.succeed(self)
        for name, drawn in new_student(self.config, stage).named_parameters():
            parameter = self.get_parameter(name)
            parameter.copy_(sharded_as(parameter, drawn))
        self.stage.fill_(stage)
        if self.config.reset_optimizer_state and optimizer is not None:
            optimizer.state.clear()

    def learning_rate_cycles(self) -> int:
        """The learning rate begins anew in each stage."""
        return self.config.num_stages

    @torch.no_grad()
    def pictures(self, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> dict:
        """What there is to see: name of the panel -> (batch, channels, height, width), normalised as the input.

        Features are drawn as their principal components over all patches of the target, the first in the first
        channel; in the panel of predictions the patches that the model saw keep their true ones. The cosine of
        prediction and target is dark at 0 and below, bright at 1, and black in visible patches.
        """
        output = self(pixel_values, bool_masked_pos)
        grid, patch_size = self._check_inputs(pixel_values, None), pair(self.config.backbone_config.patch_size)
        hidden = output.mask.unsqueeze(-1)
        units = output.mask.shape[1]
        predicted, target = output.logits[:, -units:].float(), output.target[:, -units:]
        predicted = torch.where(hidden, predicted, target)
        colours = principal_colours(target, pixel_values.shape[1])
        cosine = F.cosine_similarity(predicted, target, dim=-1).clamp(min=0.0).unsqueeze(-1).masked_fill(~hidden, 0.0)

        def draw(shares: torch.Tensor) -> torch.Tensor:
            """(batch, units, channels or 1) in [0, 1] -> flat patches between the picture's darkest and brightest."""
            low = pixel_values.float().amin(dim=(2, 3)).unsqueeze(1)  # (batch, 1, channels)
            high = pixel_values.float().amax(dim=(2, 3)).unsqueeze(1)
            patches = (low + (high - low) * shares).repeat(1, 1, patch_size[0] * patch_size[1])
            return unpatchify(patches, grid, patch_size)

        masked = patchify(pixel_values, patch_size).masked_fill(hidden, 0.0)
        return {
            "picture": pixel_values,
            "masked": unpatchify(masked, grid, patch_size),
            "predicted features (components)": draw(colours(predicted)),
            "teacher's features (components)": draw(colours(target)),
            "their cosine (masked patches)": draw(cosine),
        }


class DBOTForImageClassification(MAEForImageClassification):
    """MAE's fine-tuning head on the asymmetric form's encoder.

    Raises:
        ValueError: for the symmetric form, whose encoder is fine-tuned as the plain BEiT that it is.
    """

    config: DBOTConfig
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        r"backbone\.layernorm\..*",
        r"(decoder|teacher)\..*",
        r"^stage$",
    ]

    def __init__(self, config: DBOTConfig):
        if config.is_symmetric:
            raise ValueError(
                "DBOTForImageClassification has the asymmetric form's head: export the BEiT (`save_pretrained` of "
                "`plain_backbone()`) and fine-tune that, `hf-masked finetune` or BeitForImageClassification."
            )
        super().__init__(config)


def principal_colours(features: torch.Tensor, num_channels: int):
    """A function that gives features of the same kind colours in [0, 1]: their first principal components.

    Args:
        features: float32 (batch, units, dim), over all of which the components are taken; 2 % at each end are clipped.
        num_channels: of a colour; where the features have fewer dimensions, components come again.
    """
    flat = features.flatten(0, 1)
    mean = flat.mean(dim=0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))  # ascending
    vectors = vectors.flip(1)[:, torch.arange(num_channels, device=flat.device) % flat.shape[1]]
    low, high = ((flat - mean) @ vectors).quantile(torch.tensor([0.02, 0.98], device=flat.device), dim=0)
    return lambda other: (((other - mean) @ vectors - low) / (high - low).clamp(min=1e-6)).clamp(0.0, 1.0)


# What the released models of the symmetric form were taught by, by the width of its projected features.
OFFICIAL_TEACHERS = {
    512: ("openai/clip-vit-base-patch16", {"patch_size": 16}),
    768: (
        "openai/clip-vit-large-patch14",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
            "projection_dim": 768,
        },
    ),
}


def official_config(state_dict: dict[str, torch.Tensor]) -> DBOTConfig:
    """The config of an official checkpoint of pretraining, read from its shapes.

    Raises:
        ValueError: if the number of a ViT's heads cannot be known, because the width is none of the released ones; for
            an unknown teacher of the symmetric form, and for its fine-tuned checkpoints.
    """
    if "pos_embed" not in state_dict:
        return _official_symmetric_config(state_dict)
    config = mae.official_config(state_dict)
    names = ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_intermediate_size")
    return DBOTConfig(backbone_config=config.backbone_config, **{name: getattr(config, name) for name in names})


def _official_symmetric_config(state_dict: dict[str, torch.Tensor]) -> DBOTConfig:
    backbone_config = official_beit_config(state_dict, drop_path_rate=0.0)
    width = len(state_dict["lm_head.weight"])
    if width not in OFFICIAL_TEACHERS:
        raise ValueError(f"The target is {width} wide; known are {', '.join(map(str, OFFICIAL_TEACHERS))}, CLIP's.")
    teacher, form = OFFICIAL_TEACHERS[width]
    return DBOTConfig(
        backbone_config=backbone_config, teacher=teacher, teacher_config=CLIPVisionConfig(**form), **SYMMETRIC
    )


def convert_official_weights(state_dict: dict[str, torch.Tensor], config: DBOTConfig) -> dict[str, torch.Tensor]:
    """Official names to ours; names that are not known stay as they are, for strict loading to report.

    The teacher becomes the copy of the encoder, as at the start of another stage: official checkpoints keep theirs in
    a file of its own.

    Args:
        state_dict: a student of `models_mae.py`, with or without the decoder, or of `models_vit.py`; for the symmetric
            form of `modeling_pretrain.py` in the branch `beit`.
        config: whose form it is.
    """
    stage = {"stage": torch.zeros((), dtype=torch.int64)}
    if config.is_symmetric:
        # Buffers that follow from the picture's size.
        weights = {name: value for name, value in state_dict.items() if not name.endswith("relative_position_index")}
        return rename_weights(weights, ((r"^lm_head\.", "decoder."), *BEIT_RENAMING)) | stage
    renaming = ((r"^decoder_predp\.", "decoder_pred."),)
    weights = mae.convert_official_weights(rename_weights(state_dict, renaming), config)
    if "decoder.head.weight" not in weights:
        return weights
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    weights |= {f"teacher.{name}": tensor.clone() for name, tensor in encoder.items()}
    return weights | stage


def tiny_config() -> DBOTConfig:
    config = mae.tiny_config()
    return DBOTConfig(
        backbone_config=config.backbone_config,
        drop_path_rate=0.0,
        decoder_hidden_size=config.decoder_hidden_size,
        decoder_num_hidden_layers=config.decoder_num_hidden_layers,
        decoder_num_attention_heads=config.decoder_num_attention_heads,
        decoder_intermediate_size=config.decoder_intermediate_size,
    )


register_variant(
    config=DBOTConfig,
    pretraining=DBOTForPreTraining,
    model=DBOTModel,
    heads={AutoModelForImageClassification: DBOTForImageClassification},
    tiny_config=tiny_config,
    convert=convert_official_weights,
    official_config=official_config,
)
