"""Image processors: pictures in, `pixel_values` and masks out.

A processor works in two halves. `prepare` runs in data-loading workers: convert, crop and resize in one call, uint8.
`finish` runs per batch on the training device: flip, augment, normalise, mask. `processor(images)` does both. Both
halves take the samples' keys (see `hf_masked.randomness`); without keys nothing is drawn for the view: the centre of
the picture, no augmentation.
"""

import math
import os
from collections.abc import Sequence
from typing import ClassVar

import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from hf_masked.normalization import mean_and_std
from hf_masked.processing import masks, views
from hf_masked.processing.decoding import open_image, to_channels
from hf_masked.processing.photometric import Photometric
from hf_masked.randomness import keyed_draw, sample_keys

# Purposes of the draws, see `sample_keys`.
CROP, AUGMENT, MASK = range(3)

BICUBIC = int(Image.Resampling.BICUBIC)


class PretrainingImageProcessor(BaseImageProcessor):
    """What all processors here share: crop, flip, photometric changes, normalisation.

    Args:
        size: {"height", "width"} of `pixel_values` in pixels, or one number for a square.
        num_channels: channels of `pixel_values`. Pictures come as 1 (gray), 3 (RGB) or 4 (RGBA); other counts take
            arrays or tensors with that many channels.
        crop_scale: smallest and largest share of the area of the random crop in training.
        crop_ratio: smallest and largest width / height of the random crop.
        flip_probability: probability of a horizontal flip in training.
        photometric: settings of `Photometric`, or None.
        crop_fraction: side of the central crop without training, as a share of the largest one that fits.
        resample: Pillow's number of the filter; 3 is bicubic. Arrays and tensors are always resized bicubically.
        image_mean, image_std: one number per channel, or one for all, for values in [0, 1]; by default ImageNet's for
            three channels and 0.5 for others.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' own declaration)
    # Name, in the batches of data sets, of what `prepare` makes.
    raw_name: ClassVar[str] = "pixels"

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = 224,
        num_channels: int = 3,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip_probability: float = 0.5,
        photometric: dict | None = None,
        crop_fraction: float = 0.875,
        resample: int = BICUBIC,
        image_mean: list[float] | float | None = None,
        image_std: list[float] | float | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.size = _size(size)
        self.num_channels = num_channels
        self.crop_scale = _range("crop_scale", crop_scale, 0.0, 1.0)
        self.crop_ratio = _range("crop_ratio", crop_ratio, 0.0, float("inf"))
        if not 0.0 <= flip_probability <= 1.0:
            raise ValueError(f"flip_probability is {flip_probability}; a probability lies in [0, 1].")
        self.flip_probability = flip_probability
        self.photometric = Photometric(**photometric).to_dict() if photometric else None
        if not 0.0 < crop_fraction <= 1.0:
            raise ValueError(f"crop_fraction is {crop_fraction}; it must lie in (0, 1], for example 0.875.")
        self.crop_fraction = crop_fraction
        self.resample = int(resample)
        self.image_mean, self.image_std = mean_and_std(image_mean, image_std, num_channels)

    def keys_for(
        self, indices: torch.Tensor | Sequence[int], seed: int, epochs: int | torch.Tensor, purpose: int
    ) -> torch.Tensor:
        """int64 (batch,) keys of the samples `indices`, see `sample_keys`."""
        return sample_keys(seed, epochs, indices, purpose=purpose)

    def shrink(self, width: int, height: int) -> float:
        """How many times smaller a picture may be decoded so that no crop, random or central, has to be enlarged."""
        area = self.crop_scale[0] * min(self.crop_ratio[0], 1 / self.crop_ratio[1]) * width * height
        smallest = min(area**0.5, self.crop_fraction * min(width, height))
        return smallest / max(self._target_size)

    def prepare(self, images: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """First half: pictures to equally sized uint8.

        Args:
            images: Pillow pictures, or uint8 arrays or tensors, (height, width), (height, width, channels) or
                (channels, height, width).
            keys: int64 (batch,) of `keys_for(..., CROP)` for random crops; None for the central crop.

        Returns:
            uint8 (batch, channels, height, width) on the CPU.
        """
        images = [to_channels(image, self.num_channels) for image in images]
        heights, widths = torch.tensor([_height_and_width(image) for image in images]).unbind(dim=1)
        boxes = self._boxes(heights, widths, keys)
        pixels = torch.empty((len(images), self.num_channels, *self._target_size), dtype=torch.uint8)
        for crop, image, box in zip(pixels, images, boxes.tolist(), strict=True):
            crop.copy_(views.crop_and_resize(image, box, self._target_size, self.resample))
        return pixels

    def prepare_resident(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """The first half for a batch that is on the device already.

        Args:
            images: uint8 (batch, channels, height, width).
            keys: as for `prepare`.

        Returns:
            uint8 (batch, channels, height, width) on the images' device.
        """
        batch, _, height, width = images.shape
        sizes = torch.tensor([height, width], device=images.device).expand(batch, 2)
        boxes = self._boxes(sizes[:, 0], sizes[:, 1], None if keys is None else keys.to(images.device))
        return views.crop_and_resize_batch(images, boxes, self._target_size)

    def prepare_training(
        self, images: list | torch.Tensor, indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> torch.Tensor:
        """The first half with random crops for the samples `indices`, int64 (batch,), in an epoch of a seeded run.

        A list is treated as by `prepare`, a tensor as by `prepare_resident`.
        """
        prepare = self.prepare_resident if isinstance(images, torch.Tensor) else self.prepare
        return prepare(images, self.keys_for(indices, seed, epochs, CROP))

    def finish(self, pixels: torch.Tensor, augment_keys: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Second half: uint8 to the model's inputs, on the device of `pixels`.

        Args:
            pixels: uint8 (batch, channels, height, width), from `prepare`.
            augment_keys: int64 (batch,) for flips and photometric changes; None for none.

        Returns:
            pixel_values: float32 (batch, channels, height, width), normalised.
        """
        values = pixels.float().div_(255) if augment_keys is None else self._augment(pixels, augment_keys)
        mean = torch.tensor(self.image_mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.image_std, device=pixels.device).view(-1, 1, 1)
        # In place, for on a CPU new memory takes longer than the arithmetic.
        return {"pixel_values": values.sub_(mean).div_(std)}

    def finish_training(
        self, pixels: torch.Tensor, indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`finish` with everything drawn for the samples `indices`, int64 (batch,), in an epoch of a seeded run."""
        return self.finish(pixels, **self._finish_keys(indices, seed, epochs, training=True))

    def picture_inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """The `pixel_values` that a model's `pictures` draws, of uint8 pictures from `prepare` without keys."""
        return self.finish(pixels)["pixel_values"]

    def preprocess(
        self,
        images,
        training: bool = False,
        seed: int | None = None,
        return_boxes: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Both halves.

        Args:
            images: one picture or a list of them, see `prepare`; file names and URLs are opened.
            training: random crops and augmentation, instead of the central crop.
            seed: makes everything that is drawn a function of this number and the picture's place in the list; by
                default torch's generator picks it.
            return_boxes: also say what part of its picture each view shows.
            return_tensors: "pt", or "np".

        Returns:
            What `finish` returns, and where asked for:
            boxes: int64 (batch, 4), with views (batch, views, 4): top, left, height, width in pixels of the picture.
            flipped: bool (batch,) or (batch, views): mirrored, left to right, after the crop.
        """
        if kwargs:
            raise TypeError(f"{type(self).__name__} does not know {', '.join(sorted(kwargs))}: set it when making it.")
        images = self._listed(images)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        indices = range(len(images))
        pixels = self.prepare_training(images, indices, seed, 0) if training else self.prepare(images)
        inputs = self.finish(pixels, **self._finish_keys(indices, seed, 0, training))
        if return_boxes:
            inputs |= self._geometry(images, indices, seed, training)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _geometry(self, images: list, indices, seed: int, training: bool) -> dict[str, torch.Tensor]:
        """Box and flip of each view that `preprocess` makes of `images`."""
        sizes = torch.tensor(self._sizes(images))  # (batch, 2), of sets (batch, pictures, 2)
        if not training:
            boxes = self._boxes(*sizes.flatten(0, -2).unbind(dim=1), None).unflatten(0, sizes.shape[:-1])
            return {"boxes": boxes, "flipped": torch.zeros(boxes.shape[:-1], dtype=torch.bool)}
        keys = self.keys_for(indices, seed, 0, CROP)
        if sizes.ndim == keys.ndim:  # several views of one picture
            sizes = sizes[:, None].expand(*keys.shape, 2)
        boxes = self._boxes(*sizes.flatten(0, -2).unbind(dim=1), keys.flatten()).unflatten(0, keys.shape)
        flips = keyed_draw(self.keys_for(indices, seed, 0, AUGMENT).flatten())(1)[:, 0] < self.flip_probability
        return {"boxes": boxes, "flipped": flips.unflatten(0, keys.shape)}

    def _sizes(self, images) -> list | tuple[int, int]:
        """(height, width) of each picture, nested as the pictures are."""
        if isinstance(images, list | tuple):
            return [self._sizes(image) for image in images]
        return _height_and_width(to_channels(images, self.num_channels))

    def denormalize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Normalised values back to [0, 1]: float (..., channels, height, width)."""
        mean = torch.tensor(self.image_mean, device=pixel_values.device).view(-1, 1, 1)
        std = torch.tensor(self.image_std, device=pixel_values.device).view(-1, 1, 1)
        return (pixel_values * std + mean).clamp(0, 1)

    def _finish_keys(self, indices, seed: int, epochs, training: bool) -> dict[str, torch.Tensor]:
        """The keys that `finish` takes; without training nothing is augmented."""
        return {"augment_keys": self.keys_for(indices, seed, epochs, AUGMENT)} if training else {}

    @property
    def _target_size(self) -> tuple[int, int]:
        return self.size["height"], self.size["width"]

    def _boxes(self, heights, widths, keys):
        if keys is not None:
            return views.random_resized_crop_boxes(keyed_draw(keys), heights, widths, self.crop_scale, self.crop_ratio)
        height, width = self._target_size
        return views.center_crop_boxes(heights, widths, width / height, self.crop_fraction)

    def _augment(self, pixels, keys):
        return self._flip_and_change(pixels, keys.to(pixels.device), self.photometric)

    def _flip_and_change(self, pixels, keys, photometric: dict | None):
        """uint8 to new floats in [0, 1]."""
        draw = keyed_draw(keys)
        flip = draw(1)[:, 0] < self.flip_probability
        # Chosen as bytes and by whole pictures, which is many times faster than `where` on floats.
        both = torch.stack([pixels, pixels.flip(-1)])
        values = both[flip.long(), torch.arange(len(flip), device=flip.device)].float().div_(255)
        return Photometric(**photometric)(values, draw) if photometric else values

    def _listed(self, images) -> list:
        """One picture, a batch or a list, as a list."""
        if isinstance(images, str | os.PathLike | Image.Image) or getattr(images, "ndim", None) in (2, 3):
            images = [images]
        return [self._opened(image) for image in images]

    def _opened(self, image):
        if isinstance(image, str) and not os.path.isfile(image):
            return self.fetch_images(image)  # a URL
        if isinstance(image, str | os.PathLike | Image.Image):
            return open_image(image, "a picture" if isinstance(image, Image.Image) else str(image))
        return image


class MaskedImageProcessor(PretrainingImageProcessor):
    """Makes the inputs of masked image modelling.

    Args:
        mask_kind: a name in `hf_masked.processing.masks.MASKS`; "model" for models that choose their masks themselves,
            which get `noise`, one number per mask unit, for the random part; or None for no mask.
        mask_unit: side of a mask unit in pixels, or (height, width): the model's patch size, for most methods.
        mask_ratio: share of masked units.
        mask_options: further arguments of the mask function.
        prediction_ratio: share of the units to predict, a random part of the masked ones; None for all of them.
        kwargs: of `PretrainingImageProcessor`.
    """

    model_input_names = ["pixel_values", "bool_masked_pos", "bool_predicted_pos", "noise"]  # noqa: RUF012
    # Without a default on the class, transformers would leave None out when saving, and "random" would come back.
    mask_kind: str | None = "random"

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = 224,
        mask_kind: str | None = "random",
        mask_unit: int | tuple[int, int] = 16,
        mask_ratio: float = 0.75,
        mask_options: dict | None = None,
        prediction_ratio: float | None = None,
        **kwargs,
    ):
        super().__init__(size, **kwargs)
        self.mask_kind = mask_kind
        self.mask_unit = [mask_unit, mask_unit] if isinstance(mask_unit, int) else list(mask_unit)
        self.mask_ratio = mask_ratio
        self.mask_options = dict(mask_options or {})
        self.prediction_ratio = prediction_ratio
        if mask_kind is not None:
            self._check_mask()

    def _check_mask(self) -> None:
        size = self._masked_size
        if min(self.mask_unit) < 1:
            raise ValueError(f"mask_unit is {self.mask_unit}; it must be at least 1 pixel, for example 16.")
        if len(size) != len(self.mask_unit) or any(s % u for s, u in zip(size, self.mask_unit, strict=True)):
            raise ValueError(
                f"A mask unit of {' x '.join(map(str, self.mask_unit))} pixels does not divide the size "
                f"{' x '.join(map(str, size))}: choose a size that is a multiple of it."
            )
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must lie in [0, 1), for example 0.75.")
        if self.prediction_ratio is not None and not 0.0 < self.prediction_ratio <= self.mask_ratio:
            raise ValueError(
                f"prediction_ratio is {self.prediction_ratio}; it must lie in (0, mask_ratio], mask_ratio being "
                f"{self.mask_ratio}. None predicts all that is masked."
            )
        if self.mask_kind == "model":
            return
        if self.mask_kind not in masks.MASKS:
            known = ", ".join(sorted([*masks.MASKS, "model"]))
            raise ValueError(f"Unknown mask_kind {self.mask_kind!r}; known are {known}.")
        # A mask now finds unfit options before a run does.
        masks.make_mask(
            self.mask_kind,
            keyed_draw(torch.zeros(1, dtype=torch.int64, device="cpu")),
            self.mask_grid,
            self.mask_ratio,
            **self.mask_options,
        )

    @property
    def _masked_size(self) -> tuple[int, ...]:
        """Of what mask units tile: (height, width)."""
        return self._target_size

    @property
    def mask_grid(self) -> tuple[int, ...]:
        """(rows, columns) of mask units."""
        return tuple(size // unit for size, unit in zip(self._masked_size, self.mask_unit, strict=True))

    def finish(
        self, pixels: torch.Tensor, augment_keys: torch.Tensor | None = None, mask_keys: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Second half: uint8 to the model's inputs, on the device of `pixels`.

        Args:
            pixels, augment_keys: see `PretrainingImageProcessor.finish`.
            mask_keys: int64 (batch,) for the masks; None for no mask.

        Returns:
            pixel_values: float32 (batch, channels, height, width), normalised.
            bool_masked_pos: bool (batch, units), True = masked, raster order, where a mask was asked for.
            bool_predicted_pos: bool (batch, units), True = masked and to predict, with a `prediction_ratio`.
            noise: float32 (batch, units) in [0, 1), in place of masks with `mask_kind="model"`.
        """
        inputs = super().finish(pixels, augment_keys)
        if mask_keys is None or self.mask_kind is None:
            return inputs
        draw = keyed_draw(mask_keys.to(pixels.device))
        if self.mask_kind == "model":
            return inputs | {"noise": draw(math.prod(self.mask_grid))}
        mask = masks.make_mask(self.mask_kind, draw, self.mask_grid, self.mask_ratio, **self.mask_options)
        inputs["bool_masked_pos"] = mask
        if self.prediction_ratio is not None:
            inputs["bool_predicted_pos"] = masks.partial_mask(draw, mask, self.mask_ratio, self.prediction_ratio)
        return inputs

    def _finish_keys(self, indices, seed, epochs, training):
        # Masks are drawn without training too.
        mask_keys = self.keys_for(indices, seed, epochs, MASK)
        return super()._finish_keys(indices, seed, epochs, training) | {"mask_keys": mask_keys}


def _height_and_width(image: Image.Image | torch.Tensor) -> tuple[int, int]:
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])


def _size(size) -> dict[str, int]:
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, dict):
        size = dict(zip(("height", "width"), size, strict=True))
    if set(size) != {"height", "width"}:
        raise ValueError(f"size is {size}; give a number, (height, width), or a dict of 'height' and 'width'.")
    if min(size.values()) < 1:
        raise ValueError(f"size is {size}; both must be at least 1 pixel, for example 224.")
    return {"height": int(size["height"]), "width": int(size["width"])}


def _range(name: str, values, low: float, high: float) -> list[float]:
    first, last = values
    if not low < first <= last <= high:
        raise ValueError(f"{name} is {tuple(values)}; it must be (smallest, largest) in ({low}, {high}].")
    return [float(first), float(last)]


__all__ = ["AUGMENT", "CROP", "MASK", "MaskedImageProcessor", "PretrainingImageProcessor"]
