"""Pictures for the conformance suite, in the samples that the variant learns from."""

import torch

from hf_masked.data import ResidentImageDataset, StereoDataset, SyntheticStereo
from hf_masked.data.sets import make_sets
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.registry import Variant


def pictures(processor, count: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 pictures of the processor's size."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, processor.num_channels, processor.size["height"], processor.size["width"])
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> ResidentImageDataset | StereoDataset:
    """A data set of so many random pictures of four classes, in the samples that the variant learns from."""
    if variant.config.sample == "stereo":
        return StereoDataset(stereo_pairs(variant, processor, count, seed), processor, seed)
    # Rows of as many pictures as the method takes, clips of more frames than it takes.
    per_row = {"row": getattr(processor, "num_views", 1), "frames": 4}.get(variant.config.sample, 1)
    labels = torch.arange(per_row * count) % 4
    images = pictures(processor, per_row * count, seed)
    source = ArraySource("random pictures", images.numpy(), labels.numpy(), pictures_per_row=per_row)
    return ResidentImageDataset(source, processor, seed, sets=make_sets(variant.config.sample, source))


def stereo_pairs(variant: Variant, processor, count: int, seed: int = 0) -> SyntheticStereo:
    size = (processor.size["height"], processor.size["width"])
    largest = variant.tiny_config().max_disparity
    return SyntheticStereo(count, size, largest, seed=seed, num_channels=processor.num_channels)


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor: pictures; pairs of frames; for stereo matching pairs and their disparities."""
    if variant.config.sample == "frames":  # whose processor makes nothing of one picture
        pairs = pictures(processor, 2 * count).unflatten(0, (count, 2))
        return {"images": [list(pair.numpy()) for pair in pairs]}
    if variant.config.sample != "stereo":
        return {"images": [picture.numpy() for picture in pictures(processor, count)]}
    pairs = stereo_pairs(variant, processor, count)
    samples = [pairs.sample(index) for index in range(count)]
    return {
        "images": [[sample.left, sample.right] for sample in samples],
        "disparities": [sample.disparity for sample in samples],
    }


def encoder_inputs(processor) -> dict[str, torch.Tensor]:
    """Inputs of the plain encoder, from torch's generator."""
    return {"pixel_values": torch.randn(2, processor.num_channels, *processor.size.values())}
