"""From whatever holds a picture to a Pillow picture or a uint8 tensor with the right number of channels."""

import io
import math
import os
from collections.abc import Callable

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Pillow's mode for a number of channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# Pillow's own limit only warns; a picture of more pixels than this is refused before it is decoded.
MAX_PIXELS = 178_956_970


# Of the width and height of a picture, how many times smaller it may be decoded.
Shrink = Callable[[int, int], float]


class BadImageError(ValueError):
    """A picture that cannot be used. The message names the picture and the reason."""


def open_image(
    content: bytes | str | os.PathLike | Image.Image, name: str, shrink: Shrink | None = None
) -> Image.Image:
    """Opens and fully decodes a picture, and turns it upright where its EXIF data say how.

    Args:
        content: the encoded bytes, a path, or a Pillow picture.
        name: what to call the picture in an error.
        shrink: of (width, height) how many times smaller the picture may be. A JPEG is then decoded at 1/2, 1/4 or
            1/8 of its size, where that is enough: this takes a fraction of the time.

    Raises:
        BadImageError: for what is no picture, is cut short, or has more than `MAX_PIXELS` pixels.
    """
    try:
        image = content
        if not isinstance(content, Image.Image):
            image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        if image.width * image.height > MAX_PIXELS:
            raise BadImageError(f"{name}: {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        if shrink is not None:
            times = max(1.0, shrink(*image.size))
            image.draft(image.mode, (math.ceil(image.width / times), math.ceil(image.height / times)))
        image.load()
        # Pillow's function copies pictures that stand upright, too.
        upright = image.getexif().get(ExifTags.Base.Orientation, 1) == 1
        return image if upright else ImageOps.exif_transpose(image)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"{name}: " + ("empty" if content == b"" else "no picture that Pillow knows")) from error
    # Pillow's plug-ins raise many kinds of errors on damaged files (OSError, SyntaxError, struct.error, ...).
    except Exception as error:
        raise BadImageError(f"{name}: {type(error).__name__}: {error}") from error


def to_channels(image, num_channels: int) -> Image.Image | torch.Tensor:
    """A picture as Pillow's mode for `num_channels`, or an array as a uint8 tensor (channels, height, width).

    16-bit pictures are scaled to 8 bits; palettes, CMYK and transparency are converted as Pillow does.

    Raises:
        BadImageError: for an array of another type or with other channels, and for a mode that Pillow cannot convert.
    """
    if not isinstance(image, Image.Image):
        return _array_to_channels(torch.as_tensor(np.asarray(image)), num_channels)
    if num_channels not in MODES:
        raise BadImageError(f"a picture of mode {image.mode} has no {num_channels} channels: give arrays instead")
    try:
        if image.mode.startswith("I") or image.mode == "F":
            image = _to_8_bits(image)
        return image if image.mode == MODES[num_channels] else image.convert(MODES[num_channels])
    # A mode without such a conversion, or a picture not yet decoded whose file is damaged.
    except Exception as error:
        raise BadImageError(f"a picture of mode {image.mode}: {type(error).__name__}: {error}") from error


def to_uint8_tensor(image: Image.Image) -> torch.Tensor:
    """Pillow picture to uint8 (channels, height, width)."""
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy())


def _array_to_channels(array: torch.Tensor, num_channels: int) -> torch.Tensor:
    if array.dtype != torch.uint8:
        raise BadImageError(f"an array of {array.dtype}; pictures as arrays must be uint8, 0 to 255")
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and _channels_are_last(array.shape, num_channels):
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, num_channels) or not array.numel():
        raise BadImageError(
            f"an array of shape {tuple(array.shape)}; expected (height, width), (height, width, {num_channels}) or "
            f"({num_channels}, height, width)"
        )
    return array.expand(num_channels, -1, -1)


def _channels_are_last(shape: torch.Size, num_channels: int) -> bool:
    if shape[0] == num_channels:
        return False
    return shape[2] == num_channels or (shape[2] == 1 and shape[0] != 1)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Integer and float pictures to 8 bits: 16 bits by their full range, floats in [0, 1] by 255; NaN becomes 0."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=np.inf, neginf=-np.inf)
    if image.mode == "F":
        values = values * 255 if values.max(initial=0) <= 1 else values
    elif image.mode.startswith("I;16") or values.max(initial=0) > 255:
        values = values / 257
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
