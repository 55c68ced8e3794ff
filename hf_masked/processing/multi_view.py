"""Several views of one picture: the inputs of Siamese methods."""

from collections.abc import Sequence

import torch

from hf_masked.processing.image_processing import AUGMENT, CROP, PretrainingImageProcessor
from hf_masked.processing.photometric import MOCO_V2, Photometric
from hf_masked.randomness import sample_keys


class MultiViewImageProcessor(PretrainingImageProcessor):
    """Makes independent random views of each picture: crop, flip, photometric changes, each view with its own draws.

    Keys are int64 (batch, views) here, and what is made with keys has the views outermost after the batch: uint8 or
    float32 (batch, views, channels, height, width). Without keys, as for the encoder alone, it is one view as of any
    other processor, the centre of the picture: (batch, channels, height, width).

    Args:
        num_views: views per picture.
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
        """See `PretrainingImageProcessor.prepare`; with keys, uint8 (batch, views, channels, height, width)."""
        if keys is None:
            return super().prepare(images)
        prepare = super().prepare
        return torch.stack([prepare(images, view_keys) for view_keys in keys.unbind(dim=1)], dim=1)

    def prepare_resident(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `PretrainingImageProcessor.prepare_resident`; with keys there are views."""
        if keys is None:
            return super().prepare_resident(images)
        # All views in one pass: with small pictures the number of operations is what takes the time.
        views = super().prepare_resident(images.repeat_interleave(self.num_views, dim=0), keys.flatten())
        return views.unflatten(0, keys.shape)

    def picture_inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Views of the prepared pictures (batch, channels, height, width), the same at each call."""
        indices = range(len(pixels))
        views = self.prepare_resident(pixels, self.keys_for(indices, 0, 0, CROP))
        return self.finish(views, self.keys_for(indices, 0, 0, AUGMENT))["pixel_values"]

    def _augment(self, pixels, keys):
        settings = self.photometric if isinstance(self.photometric, list) else [self.photometric] * self.num_views
        views = zip(pixels.unbind(dim=1), keys.to(pixels.device).unbind(dim=1), settings, strict=True)
        return torch.stack([self._flip_and_change(*view) for view in views], dim=1)


def _checked(photometric: dict | None) -> dict | None:
    return Photometric(**photometric).to_dict() if photometric else None


__all__ = ["MultiViewImageProcessor"]
