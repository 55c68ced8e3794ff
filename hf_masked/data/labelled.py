"""Small labelled sets as tensors, for evaluation."""

import logging

import torch

from hf_masked.data.bad_images import decode_picture
from hf_masked.data.sources import ImageSource, check_channels
from hf_masked.processing.decoding import BadImageError

logger = logging.getLogger(__name__)

# Pictures decoded at the same time.
CHUNK = 64


def labelled_tensors(
    source: ImageSource, processor, limit: int | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures with labels, prepared for evaluation: central crop, no augmentation; bad ones are left out.

    Args:
        source: the pictures; those with label -1 are left out.
        processor: see `ImageDataset`.
        limit: at most so many, as evenly over the classes as they allow.
        seed: of the choice.

    Returns:
        uint8 (n, channels, height, width) and int64 (n,), on the CPU.

    Raises:
        ValueError: if the source has no labels, or no good picture.
    """
    labels = source.labels()
    if labels is None:
        raise ValueError(f"{source.name} has no labels: set label_column to the column that holds them.")
    order = torch.arange(len(labels)) if limit is None else balanced_order(labels, seed)
    order = order[labels[order] >= 0]
    images = source.as_tensor()
    if images is not None:
        order = order[:limit]
        images = check_channels(images, processor.num_channels, source.name)
        chunks = (images[part].expand(-1, processor.num_channels, -1, -1) for part in order.split(CHUNK))
        return torch.cat([processor.prepare_resident(chunk) for chunk in chunks]), labels[order]
    return _labelled_files(source, processor, order, labels, limit)


def _labelled_files(source: ImageSource, processor, order, labels, limit: int | None):
    pixels, used, images = [], [], []
    for index in order.tolist():
        try:
            images.append(decode_picture(*source.picture(index), processor.num_channels, processor.shrink))
        except BadImageError as error:
            logger.warning("Bad picture, left out: %s", error)
            continue
        used.append(index)
        if len(images) == CHUNK:
            pixels.append(processor.prepare(images))
            images = []
        if len(used) == limit:
            break
    if images:
        pixels.append(processor.prepare(images))
    if not pixels:
        raise ValueError(f"{source.name} has no good picture with a label.")
    return torch.cat(pixels), labels[torch.tensor(used)]


def balanced_order(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """A random order in which each class has come k times before any comes k + 1 times, as long as it lasts."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    _, counts = labels.unique(return_counts=True)  # in the order of `by_class`
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    turn = torch.arange(len(labels)) - starts
    return by_class[turn.argsort(stable=True)]
