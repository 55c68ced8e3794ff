"""Pairs of views of which one is masked: the inputs of CropMAE, SiamMAE and CroCo."""

from collections.abc import Sequence

import torch

from hf_masked.processing import views
from hf_masked.processing.image_processing import CROP, MaskedImageProcessor, _range
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.randomness import keyed_draw

# Strategies whose local view is cut out of the global one: the places of both among the views.
NESTED = {"global_to_local": (0, 1), "local_to_global": (1, 0)}
# Strategies of one crop and one flip for both views.
SHARED = ("same_views", "frames")
# Strategies that take samples of two pictures.
OF_TWO = ("random_views", "frames")
STRATEGIES = (*NESTED, "random_views", *SHARED)


class CropPairImageProcessor(MultiViewImageProcessor, MaskedImageProcessor):
    """Makes pairs of views, and a mask for one of them (CropMAE, `data/util/CropMAEStrategies.py`).

    The strategies:
        "global_to_local": view 1 is a random resized crop, view 2 a crop of view 1 as it is after resizing, before
            its flip, resized in its turn;
        "local_to_global": the same crops the other way round;
        "random_views": two crops of the picture that know nothing of each other; of samples of two pictures, as of one
            scene, a crop of each (CroCo);
        "same_views": one view twice;
        "frames": samples are two pictures, frames of a clip, and one crop and one flip are made of both (SiamMAE).
    Except where one is made for both, views are flipped independently, and photometric settings change each with its
    own draws. With `return_boxes`, the box of a local view is in pixels of the global view before its flip.

    What is made in training has the views outermost after the batch: (batch, 2, channels, height, width). Without it
    single pictures come out alone and unmasked, (batch, channels, height, width), as the encoder takes them; pairs of
    frames stay pairs.

    Args:
        strategy: see above.
        crop_scale: smallest and largest share of the picture's area of global crops, and of those of frames. Sides
            that are too long are cut to the picture's.
        local_crop_scale: the share of the global view's area of local crops.
        num_views: 2.
        kwargs: of `MultiViewImageProcessor` and `MaskedImageProcessor`; photometric settings are None by default.
    """

    photometric: dict | list[dict | None] | None = None

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = 224,
        strategy: str = "global_to_local",
        crop_scale: tuple[float, float] = (0.1, 1.0),
        local_crop_scale: tuple[float, float] = (0.3, 0.6),
        mask_ratio: float = 0.985,
        photometric: dict | list[dict | None] | None = None,
        num_views: int = 2,
        **kwargs,
    ):
        super().__init__(size, num_views, photometric, crop_scale=crop_scale, mask_ratio=mask_ratio, **kwargs)
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy is {strategy!r}; it must be one of {', '.join(STRATEGIES)}.")
        if num_views != 2:
            raise ValueError(f"num_views is {num_views}; this processor makes pairs: leave it at 2.")
        self.strategy = strategy
        self.local_crop_scale = _range("local_crop_scale", local_crop_scale, 0.0, 1.0)

    def keys_for(
        self, indices: torch.Tensor | Sequence[int], seed: int, epochs: int | torch.Tensor, purpose: int
    ) -> torch.Tensor:
        """int64 (batch, 2), see `sample_keys`; a key for both views where they are cropped and flipped alike."""
        keys = super().keys_for(indices, seed, epochs, purpose)
        return keys[:, :1].expand(-1, 2) if self.strategy in SHARED else keys

    def prepare(self, images: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `MultiViewImageProcessor.prepare`; with keys, uint8 (batch, 2, channels, height, width)."""
        self._check_samples(bool(images) and isinstance(images[0], list | tuple), keys)
        if keys is None or self.strategy not in NESTED:
            return super().prepare(images, keys)
        whole = super(MultiViewImageProcessor, self).prepare(images, keys[:, 0])
        part = torch.empty_like(whole)
        for crop, view, box in zip(part, whole, self._local_boxes(keys).tolist(), strict=True):
            crop.copy_(views.crop_and_resize(view, box, self._target_size, self.resample))
        return self._in_order(whole, part)

    def prepare_resident(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `MultiViewImageProcessor.prepare_resident`."""
        self._check_samples(images.ndim == 5, keys)
        if keys is None or self.strategy not in NESTED:
            return super().prepare_resident(images, keys)
        whole = super(MultiViewImageProcessor, self).prepare_resident(images, keys[:, 0])
        return self._in_order(whole, views.crop_and_resize_batch(whole, self._local_boxes(keys), self._target_size))

    def finish(
        self, pixels: torch.Tensor, augment_keys: torch.Tensor | None = None, mask_keys: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """See `MaskedImageProcessor.finish`: `bool_masked_pos` (batch, units) is of one view,
        CroCo's first, other methods' second. Single pictures, (batch,
        channels, height, width), are not masked."""
        return super().finish(pixels, augment_keys, mask_keys if pixels.ndim == 5 else None)

    def _finish_keys(self, indices, seed, epochs, training):
        keys = super()._finish_keys(indices, seed, epochs, training)
        return keys | {"mask_keys": keys["mask_keys"][:, 1]}

    def _boxes(self, heights, widths, keys):
        if keys is None:
            return super()._boxes(heights, widths, keys)
        return views.clamped_crop_boxes(keyed_draw(keys), heights, widths, self.crop_scale, self.crop_ratio)

    def _local_boxes(self, keys: torch.Tensor) -> torch.Tensor:
        """int64 (batch, 4) in pixels of the resized global view, of keys (batch, 2)."""
        height, width = torch.tensor(self._target_size).expand(len(keys), 2).unbind(dim=1)
        draw = keyed_draw(keys[:, 1].cpu())
        return views.clamped_crop_boxes(draw, height, width, self.local_crop_scale, self.crop_ratio)

    def _in_order(self, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        """What belongs to the global and to the local view, (batch, ...), as the views stand: (batch, 2, ...)."""
        return torch.stack([(whole, part)[place] for place in NESTED[self.strategy]], dim=1)

    def _geometry(self, images, indices, seed, training):
        geometry = super()._geometry(images, indices, seed, training)
        if training and self.strategy in NESTED:
            local = self._local_boxes(self.keys_for(indices, seed, 0, CROP))
            geometry["boxes"] = self._in_order(geometry["boxes"][:, 0], local)
        return geometry

    def _check_samples(self, are_sets: bool, keys: torch.Tensor | None) -> None:
        """Raises a ValueError for single pictures where frames are needed, and the other way round."""
        if are_sets and self.strategy not in OF_TWO:
            raise ValueError(
                f"Samples are several pictures, and strategy={self.strategy!r} crops both views out of one: set "
                f"strategy to one of {', '.join(OF_TWO)}."
            )
        if not are_sets and self.strategy == "frames" and keys is not None:
            raise ValueError(
                "strategy='frames' takes pairs of pictures, [first, second] per sample: give pairs, or set another "
                f"of {', '.join(STRATEGIES)}."
            )


__all__ = ["CropPairImageProcessor"]
