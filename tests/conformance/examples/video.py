"""Random videos for the conformance suite."""

import torch

from hf_masked.data.video import ArrayVideos, VideoDataset
from hf_masked.modeling.registry import Variant


def videos(processor, count: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 videos, a little longer and larger than clips."""
    generator = torch.Generator().manual_seed(seed)
    height, width = processor.size.values()
    size = (count, 2 * processor.num_frames, processor.num_channels, height + 2, width + 3)
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> VideoDataset:
    """A data set of so many random videos of four classes."""
    source = ArrayVideos("random videos", videos(processor, count, seed), labels=torch.arange(count) % 4)
    return VideoDataset(source, processor, seed)


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor."""
    return {"videos": [video.numpy() for video in videos(processor, count)]}


def encoder_inputs(processor) -> dict[str, torch.Tensor]:
    """Inputs of the plain encoder, from torch's generator."""
    return {"pixel_values": torch.randn(2, processor.num_frames, processor.num_channels, *processor.size.values())}
