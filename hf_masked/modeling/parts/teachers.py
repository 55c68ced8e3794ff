"""Frozen teachers: pretrained encoders whose features a method predicts (MaskDistill, DMAE, BEiT v2, ...).

A config with a teacher has the fields `teacher` (a Hub id or a folder, or None for untrained weights from a fixed
seed), `teacher_config` (the stock config of the teacher's encoder, which `teacher_form` fills in), `image_mean` and
`image_std` (how the student's pictures are normalised). Its model holds a `FrozenTeacher`.
"""

import copy
import inspect
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging as transformers_logging

from hf_masked.modeling.parts.backbones import build_backbone
from hf_masked.modeling.parts.patches import pair
from hf_masked.normalization import mean_and_std

# Mean and deviation, one number per channel each.
Normalization = tuple[Sequence[float], Sequence[float]]

# The norm after the last block, in stock vision models.
FINAL_NORMS = ("layernorm", "post_layernorm", "norm")
# What a teacher does without.
UNUSED = ("pooler.", "head.", "embeddings.mask_token")


def teacher_form(teacher: str | None, teacher_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """The stock config of a teacher's encoder: what is given, or what the checkpoint says.

    Args:
        teacher: a folder or a Hub id, of a stock model (of CLIP and its like the vision tower, of ViT-MAE the ViT) or
            of a model of this package, whose backbone is the teacher.
        teacher_config: the config or its dict.

    Raises:
        ValueError: without either, or if there is no such checkpoint.
    """
    if isinstance(teacher_config, dict):
        return AutoConfig.for_model(**teacher_config)
    if teacher_config is not None:
        return teacher_config
    if teacher is None:
        raise ValueError("There is no teacher: give `teacher`, a folder or a Hub id of a vision model.")
    return _encoder_part(read_config(teacher))


def check_teacher(config: PreTrainedConfig, layer: int = -1, projection: bool = False) -> None:
    """Checks what a config says of its teacher.

    Args:
        config: with `teacher_config`.
        layer: the 0-based number of the block that is wanted; negative ones count from the last.
        projection: CLIP's projection is wanted.

    Raises:
        ValueError: for a teacher without patch tokens, a layer or projection that it has not, or channels that cannot
            be adapted.
    """
    form = config.teacher_config
    needed = ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "num_channels")
    if not all(hasattr(form, name) for name in needed) or hasattr(form, "depths"):
        raise ValueError(
            f"A teacher of type {form.model_type!r} has no patch tokens of one width on one grid; take a checkpoint "
            "of a vision Transformer, such as vit, deit, beit, dinov2, dinov2_with_registers, clip or siglip."
        )
    if not -form.num_hidden_layers <= layer < form.num_hidden_layers:
        raise ValueError(
            f"The teacher has {form.num_hidden_layers} blocks, numbered from 0, and no block {layer}: choose another."
        )
    if projection and form.model_type != "clip_vision_model":
        raise ValueError(
            f"The teacher is a {form.model_type}, which has no projection of its features, as CLIP has: leave "
            "teacher_projection out."
        )
    check_channels("teacher", form.num_channels, config.num_channels)


class FrozenTeacher:
    """A pretrained encoder in eval mode, without gradient, in float32, outside the module tree of its student.

    So it is neither in the student's parameters nor its optimizer, wrapper or checkpoint, and every process holds it
    whole. Its weights are loaded when they are first needed: by `VariantModel.train`, or by the first call outside of
    what is compiled. Blocks above the wanted one are not kept.

    Args:
        config: the student's, see above.
        layer: the 0-based number of the block whose output the features are; negative ones count from the last.
        final_norm: apply the encoder's last norm to them.
        projection: apply CLIP's projection to them, last.
    """

    def __init__(self, config: PreTrainedConfig, layer: int = -1, final_norm: bool = False, projection: bool = False):
        self.config = config
        self.projection = projection
        self.depth = layer % config.teacher_config.num_hidden_layers + 1
        self.final_norm = final_norm
        self._model: PreTrainedModel | None = None
        self._norm: nn.Module = nn.Identity()
        # (mean, std) of the teacher's own pictures; None where nothing is known, and the student's are taken as right.
        self._normalization: Normalization | None = None

    def prepare(self, device: torch.device) -> PreTrainedModel:
        """Loads the encoder, if that has not happened yet, and moves it to a device.

        Raises:
            ValueError: if there is no such checkpoint, or if it is of another form than `teacher_config`.
        """
        if self._model is None:
            self._load()
        if self._model.device != device:
            self._model.to(device)
            self._norm.to(device)
        return self._model

    def encoder(self, device: torch.device) -> PreTrainedModel:
        """The stock encoder of `depth` blocks, whose `last_hidden_state` is the last block's output, without a norm.

        Raises:
            RuntimeError: where the caller is being compiled before the weights have been loaded.
        """
        if not torch.compiler.is_compiling():
            return self.prepare(device)
        if self._model is None:
            raise RuntimeError("The teacher is not loaded yet: call the model's `train()` before compiling it.")
        return self._model

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, grid: tuple[int, int], class_token: bool = False) -> torch.Tensor:
        """What the teacher makes of whole pictures.

        Args:
            pixel_values: float (batch, channels, height, width), normalised as the student's config says.
            grid: (rows, columns) of the student's patches; the pictures are resized so that the teacher has as many.
            class_token: with the class token, before the patches.

        Returns:
            float32 (batch, rows * columns, teacher's hidden, or its projection's width): patch tokens in raster order,
            without those before them; with `class_token` (batch, 1 + rows * columns, ...).

        Raises:
            ValueError: if the teacher cannot have that grid, or has no class token.
        """
        encoder = self.encoder(pixel_values.device)
        pixel_values = self.pictures(pixel_values, grid)
        tokens = encoder(pixel_values, **self._interpolation(encoder, pixel_values)).last_hidden_state
        # Class, distillation and register tokens come first; how many there are, the length says.
        num_prefix = tokens.shape[1] - grid[0] * grid[1] if tokens.ndim == 3 else -1
        if num_prefix < 0:
            raise ValueError(
                f"The teacher, a {encoder.config.model_type}, makes a tensor {tuple(tokens.shape)} of pictures "
                f"{tuple(pixel_values.shape)}; it must have at least {grid[0]} x {grid[1]} tokens: choose a teacher "
                "that keeps one token per patch."
            )
        if class_token and num_prefix == 0:
            raise ValueError(f"The teacher, a {encoder.config.model_type}, has no class token to be predicted.")
        patches = tokens[:, num_prefix:]
        tokens = torch.cat([tokens[:, :1], patches], dim=1) if class_token else patches
        if self.final_norm:
            tokens = self._norm(tokens)
        return (encoder.visual_projection(tokens) if self.projection else tokens).float()

    def pictures(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """The student's pictures in the size, channels and normalisation that the teacher wants, float32."""
        form, own = self.config.teacher_config, normalization_of(self.config)
        theirs = self._normalization
        if theirs is None:
            theirs = own if form.num_channels != 1 else tuple([sum(values) / len(values)] for values in own)
        return adapt_pictures(pixel_values, grid, pair(form.patch_size), form.num_channels, own, theirs)

    def _interpolation(self, encoder: PreTrainedModel, pixel_values: torch.Tensor) -> dict:
        """The argument with which a stock model takes pictures of another size than its config's."""
        own_size, size = pair(encoder.config.image_size), tuple(pixel_values.shape[-2:])
        if size == own_size:
            return {}
        rotary = hasattr(encoder, "rope_embeddings")
        by_argument = "interpolate_pos_encoding" in inspect.signature(encoder.forward).parameters
        by_itself = rotary or hasattr(_core(encoder).embeddings, "interpolate_pos_encoding")
        # Stock models take a table of positions for that of a square.
        if not (by_argument or by_itself) or (own_size[0] != own_size[1] and not rotary):
            patch = pair(encoder.config.patch_size)
            raise ValueError(
                f"The student's grid asks for pictures of {size[0]} x {size[1]} pixels, but the positions of the "
                f"teacher, a {encoder.config.model_type} for {own_size[0]} x {own_size[1]}, cannot be interpolated: "
                f"give the student {own_size[0] // patch[0]} x {own_size[1] // patch[1]} patches, or choose another "
                "teacher."
            )
        return {"interpolate_pos_encoding": True} if by_argument else {}

    def _load(self) -> None:
        # A copy: whoever makes another config around the same one sets its attention implementation anew.
        name, form = self.config.teacher, copy.deepcopy(self.config.teacher_config)
        if name is None:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                model = _clip_with_projection()(form) if self.projection else build_backbone(form)
        else:
            model = _load_encoder(name, form, _clip_with_projection() if self.projection else AutoModel)
            self._normalization = _normalization_of_checkpoint(name)
        blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == form.num_hidden_layers]
        del blocks[0][self.depth :]
        self._norm = _take_final_norm(model)
        if self.final_norm and isinstance(self._norm, nn.Identity):
            raise ValueError(f"The teacher, a {form.model_type}, has no norm after its last block: leave it out.")
        self._model = model.eval().requires_grad_(False).float()
        self._norm.eval().requires_grad_(False).float()


def read_config(name: str, role: str = "teacher") -> PreTrainedConfig:
    """The config of a checkpoint that plays a role; raises a ValueError that names it if there is none."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The {role} {name} is neither a folder with a checkpoint nor a Hub id that can be reached: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _is_ours(config: PreTrainedConfig) -> bool:
    return config.model_type.startswith("hf_masked_")


def _encoder_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Of a model with several parts the config of the vision encoder."""
    if _is_ours(config):
        return config.backbone_config
    if config.model_type == "vit_mae":
        # The same encoder, which as ViT-MAE would mask its input.
        settings = {name: value for name, value in config.to_dict().items() if name in ViTConfig().to_dict()}
        return ViTConfig(**settings | {"model_type": "vit", "architectures": None})
    return getattr(config, "vision_config", config)


def _load_encoder(name: str, form: PreTrainedConfig, auto_class: type = AutoModel) -> PreTrainedModel:
    """The encoder of a checkpoint; raises a ValueError where it does not hold all of it."""
    ours = _is_ours(read_config(name))
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # of text towers, decoders and heads, which are left out
    try:
        with torch.random.fork_rng(devices=[]):
            arguments = {} if ours else {"config": form}
            model, report = auto_class.from_pretrained(name, output_loading_info=True, **arguments)
    finally:
        transformers_logging.set_verbosity(verbosity)
    encoder = model.backbone if ours else model
    prefix = "backbone." if ours else ""
    missing = [key for key in report["missing_keys"] if not key.removeprefix(prefix).startswith(UNUSED)]
    if missing:
        raise ValueError(f"{name} does not hold all of a {form.model_type}: {', '.join(sorted(missing)[:5])} lack.")
    if encoder.config.hidden_size != form.hidden_size or pair(encoder.config.patch_size) != pair(form.patch_size):
        raise ValueError(
            f"The teacher {name} is {encoder.config.hidden_size} wide with patches of {encoder.config.patch_size} "
            f"pixels; the student was made for one of {form.hidden_size} and {form.patch_size}. Give it that one."
        )
    return encoder


def _clip_with_projection() -> type[PreTrainedModel]:
    # Imported when it is needed, as it brings CLIP's code.
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection


def _core(model: PreTrainedModel) -> nn.Module:
    """What holds embeddings, blocks and the last norm; some versions of transformers wrap that of CLIP and SigLIP."""
    return getattr(model, "vision_model", model)


def _take_final_norm(model: PreTrainedModel) -> nn.Module:
    """Takes the norm after the last block out of a stock model and returns it."""
    for name in FINAL_NORMS:
        if isinstance(norm := getattr(_core(model), name, None), nn.Module):
            setattr(_core(model), name, nn.Identity())
            return norm
    raise ValueError(
        f"{type(model).__name__} has no norm named {', '.join(FINAL_NORMS)} after its last block, so it is not "
        "known whether its output is normed: choose a teacher of another type."
    )


def _normalization_of_checkpoint(name: str) -> Normalization | None:
    """Mean and deviation in a checkpoint's image processor."""
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return None
    if not settings.get("do_normalize", True) or "image_mean" not in settings:
        return None
    return list(settings["image_mean"]), list(settings["image_std"])


def normalization_of(config: PreTrainedConfig) -> Normalization:
    """Mean and deviation of the pictures of a config with `image_mean`, `image_std` and `num_channels`."""
    return mean_and_std(config.image_mean, config.image_std, config.num_channels)


def adapt_pictures(
    pixel_values: torch.Tensor,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    num_channels: int,
    own: Normalization,
    theirs: Normalization,
) -> torch.Tensor:
    """Pictures as another model wants them, float32.

    Args:
        pixel_values: float (batch, channels, height, width), normalised with `own`, a mean and a deviation.
        grid: (rows, columns) of the other model's patches, of `patch_size` pixels.
        num_channels: of the other model; 1, or as many, or any where the pictures have one.
        theirs: the other model's mean and deviation.
    """
    size = (grid[0] * patch_size[0], grid[1] * patch_size[1])
    pixel_values = pixel_values.float()
    if tuple(pixel_values.shape[-2:]) != size:
        pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True, align_corners=False)
    if own == theirs and num_channels == pixel_values.shape[1]:
        return pixel_values
    pixel_values = pixel_values * _per_channel(own[1], pixel_values) + _per_channel(own[0], pixel_values)
    if num_channels == 1:
        pixel_values = pixel_values.mean(dim=1, keepdim=True)
    pixel_values = pixel_values.expand(-1, num_channels, -1, -1)
    return (pixel_values - _per_channel(theirs[0], pixel_values)) / _per_channel(theirs[1], pixel_values)


def check_channels(role: str, theirs: int, own: int) -> None:
    """Raises a ValueError for channels that `adapt_pictures` cannot adapt."""
    if theirs != own and 1 not in (theirs, own):
        raise ValueError(
            f"The {role} takes {theirs} channels and the student {own}; only one channel can be repeated or averaged "
            f"to. Choose a {role} of as many channels."
        )


def _per_channel(values: Sequence[float], pixel_values: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=pixel_values.device).view(-1, 1, 1)
