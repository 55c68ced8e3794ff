"""Clips whose every frame has a mask of its objects, in the layout of DAVIS (Pont-Tuset et al., arXiv 1704.00675)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_masked.data.folders import image_suffixes
from hf_masked.processing.decoding import open_image, to_channels, to_uint8_tensor


@dataclass
class AnnotatedClip:
    """A clip.

    Args:
        name: of its folder.
        frames: uint8 (frames, channels, height, width).
        masks: int64 (frames, height, width); 0 is the background, each other number an object.
    """

    name: str
    frames: torch.Tensor
    masks: torch.Tensor


def annotated_clips(folder: str | Path, num_channels: int = 3) -> Iterator[AnnotatedClip]:
    """The clips of a folder: `JPEGImages/<clip>/` with the frames and `Annotations/<clip>/` with their masks, one file
    of the same name each, both perhaps in a folder of their resolution (`480p`). Masks are palette or gray pictures
    whose values tell the objects apart, 0 being the background.

    Raises:
        ValueError: for another layout, or a frame without a mask of its size.
    """
    frames_of, masks_of = (_clips(Path(folder) / name) for name in ("JPEGImages", "Annotations"))
    for name, place in frames_of.items():
        if name not in masks_of:
            raise ValueError(f"The clip {name} has no folder of masks in {Path(folder) / 'Annotations'}.")
        masks = {path.stem: path for path in _pictures(masks_of[name])}
        files = [path for path in _pictures(place) if path.stem in masks]
        if not files:
            raise ValueError(f"No frame in {place} has a mask of its name in {masks_of[name]}.")
        frames = [to_uint8_tensor(to_channels(open_image(str(path), str(path)), num_channels)) for path in files]
        found = [torch.from_numpy(np.array(Image.open(masks[path.stem]))).long() for path in files]
        for frame, mask, path in zip(frames, found, files, strict=True):
            if mask.shape != frame.shape[-2:]:
                raise ValueError(f"{path} is {tuple(frame.shape[-2:])} pixels large and its mask {tuple(mask.shape)}.")
        yield AnnotatedClip(name, torch.stack(frames), _consecutive(torch.stack(found)))


def _consecutive(masks: torch.Tensor) -> torch.Tensor:
    """Objects' numbers as 1, 2, ..., for masks of 0 and 255 are common."""
    values = torch.cat([masks.new_zeros(1), masks.unique()]).unique()
    return torch.searchsorted(values, masks)


def _clips(folder: Path) -> dict[str, Path]:
    """Name of a clip -> its folder; a folder of a resolution is passed through."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: expected DAVIS's layout, JPEGImages/ and Annotations/.")
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(inner) == 1 and not _pictures(inner[0]):
        inner = sorted(path for path in inner[0].iterdir() if path.is_dir())
    return {path.name: path for path in inner}


def _pictures(folder: Path) -> list[Path]:
    suffixes = image_suffixes()
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)


__all__ = ["AnnotatedClip", "annotated_clips"]
