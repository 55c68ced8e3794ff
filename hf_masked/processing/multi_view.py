"""Several views of one picture: the inputs of Siamese methods."""

from collections.abc import Sequence

import torch

from hf_masked.processing.image_processing import AUGMENT, CROP, PretrainingImageProcessor
from hf_masked.processing.photometric import MOCO_V2, Photometric
from hf_masked.randomness import sample_keys


class MultiViewImageProcessor(PretrainingImageProcessor):
    """Makes the views of a sample: crop, flip, photometric changes, each view with its own draws.

    A sample of one picture gives `num_views` independent random views of it; a sample of as many pictures (a pair, a
    triplet) gives one view of each. Keys are int64 (batch, views) here, and what is made with keys has the views
    outermost after the batch: uint8 or float32 (batch, views, channels, height, width). Without keys, as for the
    encoder alone, single pictures come out as of any other processor, the centre of each: (batch, channels, height,
    width); sets of pictures keep their axis.

    Args:
        num_views: views per picture, or pictures per sample.
        photometric: settings of `Photometric` for all views, or a list of one per view, or None; MoCo v2's by default.
        kwargs: of `PretrainingImageProcessor`.
    """

    # Without a default on the class, transformers would leave None out when saving, and MoCo v2's would come back.
    photometric: dict | list[dict | None] | None = MOCO_V2

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = 224,
        num_views: int = 2,
        photometric: dict | list[dict | None] | None = MOCO_V2,
        **kwargs,
    ):
        super().__init__(size, **kwargs)
        if num_views < 1:
            raise ValueError(f"num_views is {num_views}; it must be at least 1, for example 2.")
        if isinstance(photometric, list) and len(photometric) != num_views:
            raise ValueError(
                f"photometric has settings for {len(photometric)} views and num_views is {num_views}: give one dict "
                "for all views, or one per view."
            )
        self.num_views = num_views
        self.photometric = (
            [_checked(settings) for settings in photometric]
            if isinstance(photometric, list)
            else _checked(photometric)
        )

    def keys_for(
        self, indices: torch.Tensor | Sequence[int], seed: int, epochs: int | torch.Tensor, purpose: int
    ) -> torch.Tensor:
        """int64 (batch, views) keys of the samples `indices`, see `sample_keys`."""
        indices = torch.as_tensor(indices, dtype=torch.int64)[:, None]
        epochs = epochs.unsqueeze(-1) if isinstance(epochs, torch.Tensor) else epochs
        return sample_keys(seed, epochs, indices, torch.arange(self.num_views, device=indices.device), purpose)

    def prepare(self, images: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `PretrainingImageProcessor.prepare`; a sample may also be a list of pictures. With keys, uint8 (batch,
        views, channels, height, width)."""
        if images and isinstance(images[0], list | tuple):
            self._check_pictures({len(sample) for sample in images})
            pictures = super().prepare([image for sample in images for image in sample], _flattened(keys))
            return pictures.unflatten(0, (len(images), self.num_views))
        if keys is None:
            return super().prepare(images)
        prepare = super().prepare
        return torch.stack([prepare(images, view_keys) for view_keys in keys.unbind(dim=1)], dim=1)

    def prepare_resident(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `PretrainingImageProcessor.prepare_resident`; sets are (batch, pictures, channels, height, width). With
        keys there are views."""
        if images.ndim == 5:
            self._check_pictures({images.shape[1]})
            return super().prepare_resident(images.flatten(0, 1), _flattened(keys)).unflatten(0, images.shape[:2])
        if keys is None:
            return super().prepare_resident(images)
        # All views in one pass: with small pictures the number of operations is what takes the time.
        views = super().prepare_resident(images.repeat_interleave(self.num_views, dim=0), keys.flatten())
        return views.unflatten(0, keys.shape)

    def picture_inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Views of the prepared pictures (batch, channels, height, width), the same at each call; or the prepared sets
        (batch, pictures, channels, height, width), normalised."""
        if pixels.ndim == 5:
            return self.finish(pixels)["pixel_values"]
        indices = range(len(pixels))
        views = self.prepare_resident(pixels, self.keys_for(indices, 0, 0, CROP))
        return self.finish(views, self.keys_for(indices, 0, 0, AUGMENT))["pixel_values"]

    def _listed(self, images) -> list:
        if isinstance(images, list | tuple) and images and isinstance(images[0], list | tuple):
            return [super(MultiViewImageProcessor, self)._listed(list(sample)) for sample in images]
        return super()._listed(images)

    def _check_pictures(self, found: set[int]) -> None:
        if found != {self.num_views}:
            raise ValueError(
                f"Samples have {', '.join(map(str, sorted(found)))} pictures and num_views is {self.num_views}: each "
                "picture of a sample gives one view."
            )

    def _augment(self, pixels, keys):
        settings = self.photometric if isinstance(self.photometric, list) else [self.photometric] * self.num_views
        views = zip(pixels.unbind(dim=1), keys.to(pixels.device).unbind(dim=1), settings, strict=True)
        return torch.stack([self._flip_and_change(*view) for view in views], dim=1)


def _flattened(keys: torch.Tensor | None) -> torch.Tensor | None:
    return None if keys is None else keys.flatten()


def _checked(photometric: dict | None) -> dict | None:
    return Photometric(**photometric).to_dict() if photometric else None


__all__ = ["MultiViewImageProcessor"]
