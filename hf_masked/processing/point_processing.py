"""The processor of point clouds: points of any number in, so many points in the unit sphere and masks out.

It works in two halves, as those of pictures do. `prepare` runs in data-loading workers: choose points, centre, scale.
`finish` runs per batch on the training device: turn, stretch, shift, mask. Both take the samples' keys (see
`hf_masked.randomness`).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

from hf_masked.processing.masks.groups import num_masked_groups, random_group_mask
from hf_masked.randomness import keyed_draw, sample_keys

# Purposes of the draws, see `sample_keys`.
SAMPLE, AUGMENT, MASK = range(3)

# Axis of a rotation -> the two coordinates that it turns.
PLANES = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}

MASK_KINDS = ("random", "model", None)


class PointCloudProcessor(FeatureExtractionMixin):
    """Makes the inputs of masked modelling of point clouds.

    Args:
        num_points: of each cloud; chosen at random, without replacement where there are enough.
        scale: smallest and largest factor by which each axis is stretched in training, each by its own.
        translation: largest shift along each axis in training; the cloud has the radius 1.
        rotation: axis ("x", "y" or "z") about which the cloud is turned in training, by any angle; None for none.
        normalize: centre the chosen points on their mean and scale them so that the farthest lies at 1.
        mask_kind: "random"; "model" for models that choose their masks themselves, which get `noise`, one number per
            group; or None for no mask.
        num_groups: patches of a cloud, the units of the mask.
        mask_ratio: share of masked groups.
    """

    model_input_names = ["points", "bool_masked_pos", "noise"]  # noqa: RUF012 (transformers' own declaration)
    # Name, in the batches of data sets, of what `prepare_training` makes.
    raw_name: ClassVar[str] = "raw_points"

    def __init__(
        self,
        num_points: int = 1024,
        scale: tuple[float, float] = (2 / 3, 3 / 2),
        translation: float = 0.2,
        rotation: str | None = None,
        normalize: bool = True,
        mask_kind: str | None = "random",
        num_groups: int = 64,
        mask_ratio: float = 0.6,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if num_points < 1:
            raise ValueError(f"num_points is {num_points}; it must be at least 1, for example 1024.")
        if not 0.0 < scale[0] <= scale[1]:
            raise ValueError(f"scale is {tuple(scale)}; it must be (smallest, largest), both positive.")
        if translation < 0:
            raise ValueError(f"translation is {translation}; it must be 0 or positive, for example 0.2.")
        if rotation is not None and rotation not in PLANES:
            raise ValueError(f"rotation is {rotation!r}; it must be one of {', '.join(PLANES)}, or None.")
        if mask_kind not in MASK_KINDS:
            raise ValueError(f"mask_kind is {mask_kind!r}; it must be 'random', 'model' or None.")
        num_masked_groups(num_groups, mask_ratio)
        self.num_points = num_points
        self.scale = [float(value) for value in scale]
        self.translation = float(translation)
        self.rotation = rotation
        self.normalize = normalize
        self.mask_kind = mask_kind
        self.num_groups = num_groups
        self.mask_ratio = mask_ratio

    def prepare(self, clouds: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """First half: clouds to equally many points.

        Args:
            clouds: float arrays or tensors (points, 3 or more); of the columns the first three are x, y, z.
            keys: int64 (batch,) of `keys_for(..., SAMPLE)`; None for a choice that is always the same.

        Returns:
            float32 (batch, num_points, 3) on the CPU.

        Raises:
            ValueError: for another shape, no points, or coordinates that are not finite.
        """
        if keys is None:
            keys = sample_keys(0, 0, torch.zeros(len(clouds), dtype=torch.int64), purpose=SAMPLE)
        chosen = [self._choose(cloud, key) for cloud, key in zip(clouds, keys.cpu(), strict=True)]
        points = torch.stack(chosen)
        return unit_sphere(points) if self.normalize else points

    def _choose(self, cloud, key: torch.Tensor) -> torch.Tensor:
        points = check_cloud(cloud)
        order = keyed_draw(key.view(1))(len(points))[0].argsort(stable=True)
        # Where there are too few, each comes equally often, but for the remainder.
        return points[order[torch.arange(self.num_points) % len(points)]]

    def prepare_training(
        self, clouds: list, indices: torch.Tensor | Sequence[int], seed: int, epochs: int | torch.Tensor
    ) -> torch.Tensor:
        """`prepare` with points drawn for the samples `indices`, int64 (batch,), in an epoch of a seeded run."""
        return self.prepare(clouds, self.keys_for(indices, seed, epochs, SAMPLE))

    def keys_for(self, indices, seed: int, epochs: int | torch.Tensor, purpose: int) -> torch.Tensor:
        """int64 (batch,) keys of the samples `indices`, see `sample_keys`."""
        return sample_keys(seed, epochs, indices, purpose=purpose)

    def finish(
        self, points: torch.Tensor, augment_keys: torch.Tensor | None = None, mask_keys: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Second half, on the device of `points`.

        Args:
            points: float32 (batch, num_points, 3), from `prepare`.
            augment_keys: int64 (batch,); None for no augmentation.
            mask_keys: int64 (batch,); None for no mask.

        Returns:
            points: float32 (batch, num_points, 3).
            bool_masked_pos: bool (batch, groups), True = masked, where a mask was asked for.
            noise: float32 (batch, groups) in [0, 1), in its place with `mask_kind="model"`.
        """
        if augment_keys is not None:
            points = self._augment(points, keyed_draw(augment_keys.to(points.device)))
        inputs = {"points": points}
        if mask_keys is not None and self.mask_kind is not None:
            draw = keyed_draw(mask_keys.to(points.device))
            if self.mask_kind == "model":
                inputs["noise"] = draw(self.num_groups)
            else:
                inputs["bool_masked_pos"] = random_group_mask(draw, self.num_groups, self.mask_ratio)
        return inputs

    def finish_training(
        self, points: torch.Tensor, indices: torch.Tensor, seed: int, epochs: int | torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`finish` with everything drawn for the samples `indices`, int64 (batch,), in an epoch of a seeded run."""
        keys = [self.keys_for(indices, seed, epochs, purpose) for purpose in (AUGMENT, MASK)]
        return self.finish(points, *keys)

    def _augment(self, points: torch.Tensor, draw) -> torch.Tensor:
        """Turned, stretched along each axis, then shifted, which moves the cloud off the unit sphere."""
        low, high = self.scale
        factors = low + (high - low) * draw(3).unsqueeze(1)  # (batch, 1, 3)
        shifts = self.translation * (2 * draw(3).unsqueeze(1) - 1)
        if self.rotation is not None:
            points = rotate(points, 2 * math.pi * draw(1), self.rotation)
        return points * factors + shifts

    def __call__(
        self, points, training: bool = False, seed: int | None = None, return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Both halves.

        Args:
            points: one cloud or a list of them, see `prepare`; or a batch (batch, points, 3).
            training: with augmentation and points drawn anew.
            seed: makes everything that is drawn a function of this number and the cloud's place in the list; by
                default torch's generator picks it.
            return_tensors: "pt", or "np".

        Returns:
            What `finish` returns; masks are drawn without training too.
        """
        clouds = [points] if getattr(points, "ndim", None) == 2 else list(points)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        indices = torch.arange(len(clouds))
        if training:
            inputs = self.finish_training(self.prepare_training(clouds, indices, seed, 0), indices, seed, 0)
        else:
            inputs = self.finish(self.prepare(clouds), mask_keys=self.keys_for(indices, seed, 0, MASK))
        return BatchFeature(inputs, tensor_type=return_tensors)

    def save_plain(self, folder: str | Path) -> None:
        """transformers has no processor of points: beside an exported encoder stands this one."""
        self.save_pretrained(folder)


def check_cloud(cloud) -> torch.Tensor:
    """float32 (points, 3) of a cloud.

    Raises:
        ValueError: for another shape, no points, or coordinates that are not finite.
    """
    points = torch.as_tensor(np.asarray(cloud)) if not isinstance(cloud, torch.Tensor) else cloud
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise ValueError(
            f"A cloud is {tuple(points.shape)}; expected (points, 3), x, y, z first, with a point or more."
        )
    points = points[:, :3].float()
    if not points.isfinite().all():
        raise ValueError("A cloud has coordinates that are not finite: leave such points out.")
    return points


def unit_sphere(points: torch.Tensor) -> torch.Tensor:
    """float32 (batch, points, 3), centred on its mean, the farthest point of each cloud at 1."""
    points = points - points.mean(dim=1, keepdim=True)
    radius = points.norm(dim=-1).amax(dim=1).view(-1, 1, 1)
    # A cloud of one place has no size.
    return points / torch.where(radius > 0, radius, 1.0)


def rotate(points: torch.Tensor, angles: torch.Tensor, axis: str) -> torch.Tensor:
    """(batch, points, 3) turned about an axis by `angles`, (batch, 1), in radians."""
    first, second = PLANES[axis]
    cosine, sine = angles.cos(), angles.sin()
    columns = list(points.unbind(dim=-1))
    columns[first], columns[second] = (
        cosine * columns[first] - sine * columns[second],
        sine * columns[first] + cosine * columns[second],
    )
    return torch.stack(columns, dim=-1)


__all__ = ["PointCloudProcessor"]
