"""Samples that are asked for as (epoch, index): what every data set for training here has in common.

What is drawn for a sample is then a function of (seed, epoch, index), whatever the workers, the processes and the
order of the batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from hf_masked.randomness import sample_keys

# Separates the order of an epoch from the draws of processors, whose purposes count from 0.
ORDER = -1


class KeyedDataset(Dataset, ABC):
    """Base of the data sets, for `DataLoader(..., sampler=KeyedSampler(...), collate_fn=collate_samples)`.

    A batch is a dict. Under the processor's `raw_name` stands what its `prepare_training` made of the samples, a
    tensor or a dict of tensors, which `PreTrainer` hands to its `finish_training` on the device. Beside it:
    `indices`, int64 (batch,), of the samples that were used; `epoch`, int64 (), of the first; `bad`, names and faults
    of the samples that were asked for and cannot be used; `labels`, int64 (batch,), where the source has classes;
    `targets`, what a supervised method predicts.
    """

    # Whether everything is on the device already: such a set takes no workers and no pinned memory.
    resident: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int:
        """Samples in an epoch."""

    @abstractmethod
    def name(self, index: int, epoch: int = 0) -> str:
        """What the source calls a sample, for messages."""

    @abstractmethod
    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """The batch of some samples, (epoch, index) each."""


class KeyedSampler(Sampler):
    """The order of an epoch as (epoch, index): a function of the seed and the epoch.

    Args:
        n: length of the data set.
        seed: the run's seed.
        shuffle: a random order, instead of 0, 1, 2, ...
    """

    def __init__(self, n: int, seed: int = 0, shuffle: bool = True):
        self.n = n
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, range(self.n)
        if self.shuffle:
            generator = torch.Generator().manual_seed(int(sample_keys(self.seed, epoch, [0], purpose=ORDER)))
            order = torch.randperm(self.n, generator=generator).tolist()
        return ((epoch, index) for index in order)


def collate_samples(batch: dict | list[dict]) -> dict:
    """`DataLoader(collate_fn=...)` of all data sets here: stacks what comes as single samples."""
    if isinstance(batch, dict):
        return batch
    bad = [name for sample in batch for name in sample["bad"]]
    stacked = default_collate([{key: value for key, value in sample.items() if key != "bad"} for sample in batch])
    return {**stacked, "epoch": stacked["epoch"][0], "bad": bad}
