"""Views of pictures: where to crop, and cropping and resizing in one step.

Boxes are `(top, left, height, width)` in pixels of the source. A box is a function of uniform numbers, so one
sample's view is the same whether a worker crops a photograph with Pillow or the device crops a resident batch.
"""

import math

import numpy as np
import torch
from PIL import Image

from hf_masked.randomness import Draw

# torchvision's RandomResizedCrop proposes ten boxes and falls back to a central one.
PROPOSALS = 10

# Pillow's filters that torch has for bytes.
TORCH_FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}


def random_resized_crop_boxes(
    draw: Draw,
    heights: torch.Tensor,
    widths: torch.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Boxes of a random area and aspect ratio, distributed as torchvision's RandomResizedCrop draws them.

    Args:
        draw: source of uniform numbers.
        heights, widths: int64 (batch,) sizes of the pictures in pixels.
        scale: smallest and largest share of the picture's area.
        ratio: smallest and largest width over height.

    Returns:
        int64 (batch, 4): top, left, height, width.
    """
    numbers = draw(2 * PROPOSALS + 2)
    full_height, full_width = heights.float()[:, None], widths.float()[:, None]
    area = full_height * full_width * _between(numbers[:, :PROPOSALS], *scale)
    log_ratio = _between(numbers[:, PROPOSALS : 2 * PROPOSALS], math.log(ratio[0]), math.log(ratio[1]))
    aspect = log_ratio.exp()  # (batch, proposals)
    width = (area * aspect).sqrt().round()
    height = (area / aspect).sqrt().round()
    fits = (width >= 1) & (height >= 1) & (width <= full_width) & (height <= full_height)
    found, first = fits.any(dim=1, keepdim=True), fits.float().argmax(dim=1, keepdim=True)
    fallback_height, fallback_width = _largest_box(full_height, full_width, ratio)
    height = torch.where(found, height.gather(1, first), fallback_height)
    width = torch.where(found, width.gather(1, first), fallback_width)
    top = torch.where(found, numbers[:, -2:-1] * (full_height - height + 1), (full_height - height) / 2).floor()
    left = torch.where(found, numbers[:, -1:] * (full_width - width + 1), (full_width - width) / 2).floor()
    return torch.cat([top, left, height, width], dim=1).long()


def clamped_crop_boxes(
    draw: Draw,
    heights: torch.Tensor,
    widths: torch.Tensor,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> torch.Tensor:
    """Like `random_resized_crop_boxes`, but a side that is too long is cut to the picture's instead of being drawn
    anew (BYOL's `dataset.py`; alexandre-eymael/CropMAE, `data/util/image_utils.py`)."""
    numbers = draw(4)
    area = heights.float() * widths.float() * _between(numbers[:, 0], *scale)
    aspect = _between(numbers[:, 1], math.log(ratio[0]), math.log(ratio[1])).exp()
    height = torch.minimum((area / aspect).sqrt().round().clamp(min=1), heights)
    width = torch.minimum((area * aspect).sqrt().round().clamp(min=1), widths)
    top = (numbers[:, 2] * (heights - height + 1)).floor()
    left = (numbers[:, 3] * (widths - width + 1)).floor()
    return torch.stack([top, left, height, width], dim=1).long()


def center_crop_boxes(heights: torch.Tensor, widths: torch.Tensor, aspect: float, fraction: float) -> torch.Tensor:
    """The central box of width / height `aspect` that covers `fraction` of the largest such box's side.

    Resizing this box is the usual "resize the short side, crop the centre" in one step.

    Returns:
        int64 (batch, 4): top, left, height, width.
    """
    height, width = _largest_box(heights.float(), widths.float(), (aspect, aspect))
    height, width = (height * fraction).round().clamp(min=1), (width * fraction).round().clamp(min=1)
    top, left = ((heights - height) / 2).round(), ((widths - width) / 2).round()
    return torch.stack([top, left, height, width], dim=-1).long()


def crop_and_resize(
    image: Image.Image | torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int], resample: int
) -> torch.Tensor:
    """Crops a picture to `box` and resizes the crop, as torchvision's RandomResizedCrop does.

    torch's filters for bytes are Pillow's, at a third of the time and less. They differ by one step here and there,
    and by more where the bicubic filter overshoots the range.

    Args:
        image: a Pillow picture, or uint8 (channels, height, width).
        box: top, left, height, width.
        size: (height, width) of the result.
        resample: Pillow's number of the filter; what torch has not got, Pillow does, and bicubic takes its place for
            tensors.

    Returns:
        uint8 (channels, *size).
    """
    top, left, height, width = box
    if isinstance(image, Image.Image):
        image = image.crop((left, top, left + width, top + height))
        if resample not in TORCH_FILTERS:
            image = image.resize((size[1], size[0]), resample=resample)
        pixels = np.array(image)
        crop = torch.from_numpy(pixels[:, :, None] if pixels.ndim == 2 else pixels).permute(2, 0, 1)
    else:
        crop = image[:, top : top + height, left : left + width]
    if crop.shape[1:] == torch.Size(size):
        return crop
    mode = TORCH_FILTERS.get(resample, "bicubic")
    return torch.nn.functional.interpolate(crop[None], size=size, mode=mode, antialias=True)[0]


def crop_and_resize_batch(images: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crops and resizes a batch of equally sized pictures on their device, each to its own box.

    The filter is Pillow's antialiased bicubic one, written as two small matrix products per picture, so that the
    result agrees with `crop_and_resize` up to rounding.

    Args:
        images: uint8 (batch, channels, height, width).
        boxes: int64 (batch, 4), see `random_resized_crop_boxes`.
        size: (height, width) of the result.

    Returns:
        uint8 (batch, channels, *size).
    """
    boxes = boxes.to(images.device)
    start, length, source = boxes[:, :2], boxes[:, 2:], images.shape[2:]
    if source[0] == source[1] and size[0] == size[1]:  # both axes at once: half as many operations
        rows, columns = _bicubic_matrices(start, length, source[0], size[0]).unbind(dim=1)
    else:
        rows = _bicubic_matrices(start[:, 0], length[:, 0], source[0], size[0])  # (batch, out height, height)
        columns = _bicubic_matrices(start[:, 1], length[:, 1], source[1], size[1])  # (batch, out width, width)
    pixels = images.float().transpose(2, 3)  # (batch, channels, width, height): rows are resized first there, too
    pixels = (columns[:, None] @ pixels).round_().clamp_(0, 255)  # (batch, channels, out width, height)
    pixels = rows[:, None] @ pixels.transpose(2, 3)  # (batch, channels, out height, out width)
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _bicubic_matrices(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Resampling weights (*batch, target, source) along an axis, for the source's parts [start, start + length)."""
    step = length.float()[..., None] / target
    widening = step.clamp(min=1.0)  # the kernel grows with the reduction: antialiasing
    centre = torch.arange(target, device=start.device).add(0.5) * step + start[..., None]  # (*batch, target)
    # The kernel spans two (widened) pixels each way and is cut at the edges of the box: only these pixels are weighed.
    taps = math.ceil(4 * max(1.0, source / target)) + 1
    first = (centre - 2 * widening).add_(0.5).floor_()
    pixel = first[..., None] + torch.arange(taps, device=start.device)  # (*batch, target, taps)
    inside = (pixel >= start[..., None, None]).logical_and_(pixel < (start + length)[..., None, None])
    distance = (pixel + (0.5 - centre)[..., None]).abs_().div_(widening[..., None])
    # Pillow's two cubic pieces (a = -0.5), on [0, 1) and [1, 2), in powers of what is left to their ends: half as many
    # passes over the memory as choosing between them.
    outer = distance.neg_().add_(2).clamp_(min=0)
    inner = (outer - 1).clamp_(min=0)
    weights = (outer - 1).mul_(0.5).mul_(outer).mul_(outer)
    weights.addcmul_(inner.square(), inner.mul_(-2).add_(1)).mul_(inside)
    weights.div_(weights.sum(dim=-1, keepdim=True))
    matrices = weights.new_zeros(*start.shape, target, source)
    return matrices.scatter_add_(-1, pixel.clamp_(0, source - 1).long(), weights)


def _between(numbers: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * numbers


def _largest_box(full_height: torch.Tensor, full_width: torch.Tensor, ratio: tuple[float, float]):
    """Height and width of the largest box whose width / height lies in `ratio`."""
    width = torch.minimum(full_width, (full_height * ratio[1]).round().clamp(min=1))
    height = torch.minimum(full_height, (full_width / ratio[0]).round().clamp(min=1))
    return height, width
