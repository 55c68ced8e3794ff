"""Stereo pairs: the inputs of stereo matching, files of disparities, and predictions back at the pictures' size."""

import io
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature

from hf_masked.processing.decoding import BadImageError, to_channels, to_uint8_tensor
from hf_masked.processing.image_processing import CROP, PretrainingImageProcessor
from hf_masked.randomness import keyed_draw


class StereoImageProcessor(PretrainingImageProcessor):
    """Makes the inputs of stereo matching from rectified pairs of pictures.

    In training both pictures of a pair and the disparity are cut at the same random place. Otherwise they are padded
    at the top and on the right, to the next multiple of `pad_multiple`, with the mean colour, which normalisation
    makes zero but for rounding. Nothing is resized, mirrored or recoloured: a disparity is a number of pixels, and a
    mirrored pair has its views swapped.

    Args:
        size: {"height", "width"} of the crops in training.
        pad_multiple: of both sides without training.
        num_channels, image_mean, image_std: see `PretrainingImageProcessor`.
        kwargs: of transformers' own base class.
    """

    model_input_names = ["pixel_values", "labels"]  # noqa: RUF012 (transformers' own declaration)
    num_views = 2

    def __init__(
        self,
        size: dict[str, int] | int | tuple[int, int] = (256, 512),
        num_channels: int = 3,
        pad_multiple: int = 16,
        image_mean: list[float] | float | None = None,
        image_std: list[float] | float | None = None,
        **kwargs,
    ):
        unused = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0, "crop_fraction": 1.0}
        refused = {name: kwargs[name] for name in unused if kwargs.get(name, unused[name]) not in both(unused[name])}
        if refused or kwargs.get("photometric"):
            raise ValueError(
                f"StereoImageProcessor cuts and normalises, it neither resizes, mirrors nor recolours: leave out "
                f"{', '.join(refused or ['photometric'])}."
            )
        super().__init__(size, num_channels, image_mean=image_mean, image_std=image_std, **(unused | kwargs))
        self.pad_multiple = pad_multiple

    def prepare(self, images: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """First half: pairs to equally sized uint8.

        Args:
            images: (left, right) each; see `PretrainingImageProcessor.prepare` for what a picture may be.
            keys: int64 (batch,) of `keys_for(..., CROP)` for random crops; None pads all to one size.

        Returns:
            uint8 (batch, 2, channels, height, width) on the CPU.

        Raises:
            ValueError: for anything but pairs of equal size.
        """
        pairs = [self._pair(pair) for pair in images]
        mean = (255 * torch.tensor(self.image_mean)).round().to(torch.uint8).view(-1, 1, 1)
        boxes = self._pair_boxes(pairs, keys)
        return torch.stack([cut(pair, box, mean) for pair, box in zip(pairs, boxes, strict=True)])

    def prepare_resident(self, images: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """See `prepare`, of uint8 (batch, 2, channels, height, width)."""
        return self.prepare(list(images), keys)

    def prepare_disparities(self, disparities: list, keys: torch.Tensor | None = None) -> torch.Tensor:
        """The disparities of pairs, cut or padded as `prepare` does with the same keys; the padding is 0.

        Args:
            disparities: arrays or tensors (height, width) in pixels, of the left picture.
            keys: see `prepare`.

        Returns:
            float32 (batch, height, width).
        """
        maps = [torch.as_tensor(np.asarray(disparity), dtype=torch.float32) for disparity in disparities]
        boxes = self._pair_boxes(maps, keys)
        return torch.stack([cut(disparity, box, torch.zeros(())) for disparity, box in zip(maps, boxes, strict=True)])

    def preprocess(
        self,
        images,
        disparities: list | None = None,
        training: bool = False,
        seed: int | None = None,
        return_boxes: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Both halves.

        Args:
            images: a pair (left, right) or a list of pairs; file names and URLs are opened.
            disparities: one for each pair, float (height, width) of the left picture in pixels, 0 = unknown; or files,
                which `read_disparity` opens.
            training: random crops, instead of padding.
            seed: of the crops; by default torch's generator picks it.
            return_boxes: also say what part of its picture each view shows.
            return_tensors: "pt", or "np".

        Returns:
            pixel_values: float32 (batch, 2, channels, height, width), normalised.
            labels: float32 (batch, height, width), with disparities.
            boxes: int64 (batch, 4), where asked for: top, left, height, width in pixels of the picture. A top below 0
                is padding.
        """
        if kwargs:
            raise TypeError(f"{type(self).__name__} does not know {', '.join(sorted(kwargs))}: set it when making it.")
        pairs = self._listed(images)
        seed = int(torch.randint(2**31, ())) if seed is None else seed
        keys = self.keys_for(range(len(pairs)), seed, 0, CROP) if training else None
        inputs = self.finish(self.prepare(pairs, keys))
        if disparities is not None:
            maps = [read_disparity(d) if isinstance(d, str | os.PathLike) else d for d in disparities]
            inputs["labels"] = self.prepare_disparities(maps, keys)
        if return_boxes:
            inputs["boxes"] = self._pair_boxes([self._pair(pair) for pair in pairs], keys)
        return BatchFeature(inputs, tensor_type=return_tensors)

    def post_process_stereo_matching(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | torch.Tensor | None = None,
        focal_length: float | None = None,
        baseline: float | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """Predictions at the pictures' own size.

        Args:
            outputs: of a stereo matching model, with `predicted_disparity` (batch, height, width).
            target_sizes: (height, width) of each pair before padding; by default nothing is taken off.
            focal_length: of the cameras, in pixels; with `baseline`, the distance between them, depth comes too.

        Returns:
            For each pair `predicted_disparity`, float (height, width), in pixels, and with both camera values
            `predicted_depth`, focal_length * baseline / disparity in the unit of the baseline.

        Raises:
            ValueError: for another number of sizes, a size beyond the prediction's, or one camera value alone.
        """
        disparities = outputs.predicted_disparity
        if (focal_length is None) != (baseline is None):
            raise ValueError("Depth needs both focal_length (in pixels) and baseline: give both or neither.")
        sizes = [tuple(disparities.shape[-2:])] * len(disparities) if target_sizes is None else target_sizes
        if len(sizes) != len(disparities):
            raise ValueError(f"There are {len(sizes)} target sizes and {len(disparities)} predictions: give one each.")
        found = []
        for disparity, (height, width) in zip(disparities, sizes, strict=True):
            height, width = int(height), int(width)
            if height > disparity.shape[0] or width > disparity.shape[1]:
                raise ValueError(
                    f"A target size is {height} x {width} and the prediction {tuple(disparity.shape)}: give the size "
                    "of the picture before padding."
                )
            result = {"predicted_disparity": disparity[disparity.shape[0] - height :, :width]}
            if focal_length is not None:
                result["predicted_depth"] = focal_length * baseline / result["predicted_disparity"]
            found.append(result)
        return found

    def picture_size(self, picture) -> tuple[int, int]:
        """(height, width) of a picture or file, the target size of its pair."""
        return self._sizes(self._opened(picture))

    def _finish_keys(self, indices, seed, epochs, training):
        return {}  # nothing is augmented

    def _pair_boxes(self, samples: list[torch.Tensor], keys: torch.Tensor | None) -> torch.Tensor:
        """int64 (batch, 4): top, left, height, width of what is kept of (..., height, width) each."""
        sizes = torch.tensor([sample.shape[-2:] for sample in samples])
        if keys is None:
            multiple = self.pad_multiple
            target = (sizes.amax(dim=0) + multiple - 1) // multiple * multiple
            room = sizes - target
            corners = torch.stack([room[:, 0], torch.zeros_like(room[:, 1])], dim=1)
        else:
            target = torch.tensor(self._target_size)
            room = sizes - target
            corners = (keyed_draw(keys.cpu())(2) * (room.clamp(min=0) + 1)).long()
            corners[:, 0] += room[:, 0].clamp(max=0)  # what is too small is padded at the top and on the right
        return torch.cat([corners, target.expand(len(sizes), 2)], dim=1)

    def _pair(self, pair) -> torch.Tensor:
        """uint8 (2, channels, height, width) of a left and a right picture."""
        if not isinstance(pair, list | tuple | torch.Tensor) or len(pair) != 2:
            raise ValueError(
                f"A sample of stereo matching is a pair, (left, right), not {type(pair).__name__}: give a list of "
                "pairs, or one pair."
            )
        views = [to_channels(picture, self.num_channels) for picture in pair]
        views = [to_uint8_tensor(view) if isinstance(view, Image.Image) else view for view in views]
        if views[0].shape != views[1].shape:
            raise ValueError(
                f"The left picture has {views[0].shape[1]} x {views[0].shape[2]} pixels and the right one "
                f"{views[1].shape[1]} x {views[1].shape[2]}: rectified pairs have one size."
            )
        return torch.stack(views)

    def _listed(self, images) -> list:
        if isinstance(images[0], list | tuple):
            return [[self._opened(picture) for picture in pair] for pair in images]
        if getattr(images[0], "ndim", None) == 4:
            return list(images)
        return [[self._opened(picture) for picture in images]]


def both(values):
    """A setting as it is given and as JSON gives it back."""
    return (values, list(values)) if isinstance(values, tuple) else (values,)


def cut(sample: torch.Tensor, box: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """(..., height, width) of a box (top, left, height, width); what lies outside gets `fill`."""
    top, left, height, width = box.tolist()
    result = fill.expand(*sample.shape[:-2], height, width).clone()
    inside = sample[..., max(top, 0) : top + height, left : left + width]
    result[..., height - inside.shape[-2] :, : inside.shape[-1]] = inside
    return result


def read_disparity(file: str | os.PathLike | bytes, scale: float = 256.0) -> torch.Tensor:
    """Disparities from a file.

    Args:
        file: a path, or the content: a PNG of 16 or 8 bits (KITTI, Middlebury), or a PFM (Scene Flow).
        scale: a PNG's value / scale is the disparity in pixels: 256 for KITTI, 4 for Middlebury's quarter pixels. A
            PFM holds pixels already.

    Returns:
        float32 (height, width), 0 = unknown.

    Raises:
        BadImageError: for another kind of file.
    """
    content = file if isinstance(file, bytes) else Path(file).read_bytes()
    name = "a disparity" if isinstance(file, bytes) else str(file)
    if content[:2] == b"Pf":
        return _read_pfm(content, name)
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow's plug-ins raise many kinds of errors on damaged files
        raise BadImageError(f"{name}: {type(error).__name__}: {error}") from error
    if image.mode not in ("L", "I") and not image.mode.startswith("I;16"):
        raise BadImageError(f"{name}: a picture of mode {image.mode}; disparities have one channel of 8 or 16 bits")
    return torch.from_numpy(np.asarray(image).astype(np.float32) / np.float32(scale))


def _read_pfm(content: bytes, name: str) -> torch.Tensor:
    """A PFM of one channel, whose rows go from the bottom to the top; a negative scale says little-endian."""
    header = re.match(rb"Pf\s+(\d+)\s+(\d+)\s+(-?[\d.]+(?:e[+-]?\d+)?)\s", content)
    if header is None:
        raise BadImageError(f"{name}: no whole header of a PFM")
    width, height, scale = int(header[1]), int(header[2]), float(header[3])
    values = np.frombuffer(content[header.end() :], dtype="<f4" if scale < 0 else ">f4")
    if values.size != width * height:
        raise BadImageError(f"{name}: {values.size} values for {height} x {width} pixels")
    values = values.reshape(height, width)[::-1].astype(np.float32)
    return torch.from_numpy(np.where(np.isfinite(values), np.abs(values), np.float32(0)))


__all__ = ["StereoImageProcessor", "read_disparity"]
