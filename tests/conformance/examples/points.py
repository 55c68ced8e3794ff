"""Point clouds for the conformance suite."""

import torch

from hf_masked.data.points import PointCloudDataset, SyntheticShapes
from hf_masked.modeling.registry import Variant


def shapes(count: int, seed: int = 0) -> SyntheticShapes:
    return SyntheticShapes(count, seed, num_points=64)


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> PointCloudDataset:
    """A data set of so many shapes, each of 64 points."""
    return PointCloudDataset(shapes(count, seed), processor, seed)


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor: arrays of points."""
    source = shapes(count)
    return {"points": [source.cloud(index) for index in range(count)]}


def encoder_inputs(processor) -> dict[str, torch.Tensor]:
    """Inputs of the plain encoder, from torch's generator."""
    return {"points": torch.randn(2, processor.num_points, 3)}
