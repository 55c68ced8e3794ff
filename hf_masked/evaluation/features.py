"""Frozen features of pictures, from any transformers encoder or any model of this package."""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from hf_masked.modeling.parts.patches import pair
from hf_masked.modeling.parts.pooling import POOLINGS, interpolation_argument, pool
from hf_masked.normalization import mean_and_std
from hf_masked.processing.views import center_crop_boxes, crop_and_resize_batch
from hf_masked.training.checkpoints import load_with_report


@dataclass(frozen=True)
class ImageSettings:
    """How an encoder wants its pictures.

    Args:
        mean, std: one number per channel, for values in [0, 1].
        size: (height, width) in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    @property
    def num_channels(self) -> int:
        return len(self.mean)

    @classmethod
    def of_processor(cls, processor) -> "ImageSettings":
        """The settings of a `MaskedImageProcessor` or a stock image processor."""
        return _settings_of(processor.to_dict(), None)


def load_encoder(path: str) -> tuple[PreTrainedModel, ImageSettings]:
    """The encoder of a checkpoint and how it wants its pictures.

    Args:
        path: a folder or a Hub id: of this package (the backbone is returned), or of any transformers encoder, with
            or without a task head.

    Returns:
        The encoder, in eval mode; a pooler that the checkpoint does not hold is None. The settings, from
        `preprocessor_config.json`; without one, ImageNet's mean and standard deviation (0.5 unless there are three
        channels) and the config's size, with a warning.

    Raises:
        ValueError: when the checkpoint does not hold the whole encoder.
    """
    model, report = load_with_report(AutoModel, path)
    missing = {name for name in report["missing_keys"] if not _is_pooler(name)} | report["mismatched_keys"]
    if missing:
        raise ValueError(
            f"{path} does not hold the whole {type(model).__name__}: {len(missing)} tensors are missing or of another "
            f"shape, for example {min(map(str, missing))}."
        )
    if any(_is_pooler(name) for name in report["missing_keys"]):
        model.pooler = None
    encoder = getattr(model, "backbone", model)
    if encoder.config.model_type == "vit_mae":
        # ViTMAEModel masks in eval mode too; features are of the whole picture.
        encoder.config.mask_ratio = 0.0
    return encoder.eval(), _load_settings(path, encoder.config)


def extract_features(
    model: nn.Module,
    images: torch.Tensor,
    *,
    mean,
    std,
    size: tuple[int, int] | None = None,
    pooling: str = "auto",
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """One vector per picture, without gradient and in eval mode; the mode is restored afterwards.

    Args:
        model: a transformers encoder, or a model that holds one as `backbone` (the methods of this package).
        images: uint8 (n, channels, height, width); one channel is repeated for an encoder of three.
        mean, std: one number per channel, or one for all, for values in [0, 1].
        size: (height, width) to which the largest central box of that aspect is resized; by default as they are.
        pooling: "mean", "cls", "pooler" or "auto", see `hf_masked.modeling.parts.pooling.pool`.
        batch_size: pictures per forward pass.
        device: where to run; the model is moved there. By default where it is.

    Returns:
        float32 (n, width) on the CPU.

    Raises:
        ValueError: for another pooling, other types or shapes of pictures, or what the model has no output for.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}.")
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} of shape {tuple(images.shape)}; expected uint8 (n, channels, height, width)."
        )
    encoder = getattr(model, "backbone", model)
    if device is not None:
        encoder.to(device)
    # What FSDP gathers in inference mode no later backward pass could use.
    with evaluation_mode(encoder), torch.no_grad(), gathered(model):
        chunks = [_features(encoder, batch, mean, std, size, pooling) for batch in images.split(batch_size)]
    return torch.cat(chunks)


def raw_pixels(images: torch.Tensor) -> torch.Tensor:
    """The baseline without an encoder: uint8 (n, channels, height, width) to float32 (n, values) in [0, 1]."""
    return images.flatten(1).float() / 255


@contextmanager
def evaluation_mode(module: nn.Module):
    """Eval mode inside the block; afterwards each submodule has the mode that it had."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode


@contextmanager
def gathered(model: nn.Module):
    """Inside the block a part of a model can be called alone, even where FSDP has sharded the model: what a forward
    pass of the whole would gather is there. All processes enter the block together."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def to_model_input(images: torch.Tensor, mean, std, size: tuple[int, int] | None, num_channels: int) -> torch.Tensor:
    """uint8 (batch, channels, height, width) to float32 (batch, num_channels, *size), normalised, on its device.

    Raises:
        ValueError: for pictures with other channels.
    """
    if images.shape[1] not in (1, num_channels):
        raise ValueError(f"The images have {images.shape[1]} channels, the encoder takes {num_channels}.")
    images = images.expand(-1, num_channels, -1, -1)
    if size is not None and tuple(size) != tuple(images.shape[-2:]):
        shape = torch.tensor(images.shape[-2:], device=images.device).expand(len(images), 2)
        boxes = center_crop_boxes(shape[:, 0], shape[:, 1], size[1] / size[0], fraction=1.0)
        images = crop_and_resize_batch(images, boxes, size)
    mean, std = (torch.as_tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


def _features(encoder, images, mean, std, size, pooling):
    parameter = next(encoder.parameters())
    num_channels = getattr(encoder.config, "num_channels", images.shape[1])
    pixel_values = to_model_input(images.to(parameter.device), mean, std, size, num_channels)
    size = tuple(pixel_values.shape[-2:])
    outputs = encoder(pixel_values.to(parameter.dtype), **interpolation_argument(encoder, size))
    return pool(outputs, encoder.config, size, pooling).float().cpu()


def _load_settings(path: str, config) -> ImageSettings:
    try:
        return _settings_of(ImageProcessingMixin.get_image_processor_dict(path)[0], config)
    except OSError:
        num_channels = getattr(config, "num_channels", 3)
        mean, std = mean_and_std(None, None, num_channels)
        settings = ImageSettings(tuple(mean), tuple(std), size=pair(getattr(config, "image_size", None) or 224))
        warnings.warn(f"{path} has no preprocessor_config.json; going on with {settings}.", stacklevel=3)
        return settings


def _settings_of(processor: dict, config=None) -> ImageSettings:
    """From the dict of a processor of this package or of transformers."""
    num_channels = processor.get("num_channels") or getattr(config, "num_channels", 3)
    normalizes = processor.get("do_normalize", True)
    mean, std = (processor["image_mean"], processor["image_std"]) if normalizes else (0.0, 1.0)
    size = processor["crop_size"] if processor.get("do_center_crop") else processor["size"]
    if isinstance(size, dict):
        size = (size["height"], size["width"]) if "height" in size else size["shortest_edge"]
    return ImageSettings(_per_channel(mean, num_channels), _per_channel(std, num_channels), pair(size))


def _per_channel(values, num_channels: int) -> tuple[float, ...]:
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    return values * num_channels if len(values) == 1 else values


def _is_pooler(name: str) -> bool:
    return name.split(".")[0] == "pooler"
