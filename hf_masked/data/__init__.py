"""Data for pretraining: where pictures come from, and torch data sets whose every draw is keyed by epoch and index."""

from hf_masked.data.bad_images import BadImageLog
from hf_masked.data.images import (
    ImageDataset,
    ResidentImageDataset,
    StreamingImageDataset,
    StreamPosition,
)
from hf_masked.data.keyed import KeyedDataset, KeyedSampler, collate_samples
from hf_masked.data.labelled import labelled_tensors
from hf_masked.data.sources import ImageSource, StreamingImageSource, load_images
from hf_masked.data.stereo import StereoDataset, SyntheticStereo

__all__ = [
    "BadImageLog",
    "ImageDataset",
    "ImageSource",
    "KeyedDataset",
    "KeyedSampler",
    "ResidentImageDataset",
    "StereoDataset",
    "StreamPosition",
    "StreamingImageDataset",
    "StreamingImageSource",
    "SyntheticStereo",
    "collate_samples",
    "labelled_tensors",
    "load_images",
]
