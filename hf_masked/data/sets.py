"""Samples of several pictures: which pictures of a source belong together.

A source counts single pictures. A data set that is given one of these counts sets of them, each a function of (seed,
epoch, index of the set), and hands its processor sets of pictures.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from hf_masked.data.sources import ImageSource
from hf_masked.randomness import keyed_draw, sample_keys

# Separates what is drawn here from the draws of processors, whose purposes count from 0.
SETS = -2


class PictureSets(ABC):
    """Attributes:
    size: pictures in a set.
    """

    size: int

    @abstractmethod
    def __len__(self) -> int:
        """Sets in an epoch."""

    @abstractmethod
    def pictures(self, indices: torch.Tensor, seed: int, epochs: int | torch.Tensor) -> torch.Tensor:
        """Numbers of the pictures of some sets.

        Args:
            indices: int64 (batch,) of the sets.
            seed: the run's.
            epochs: the pass, from 0; or int64 (batch,), one for each set.

        Returns:
            int64 (batch, size).
        """


class Rows(PictureSets):
    """The pictures that stand in one row of a table, in the order of their columns: the two of a pair, for example.

    Raises:
        ValueError: for a source of single pictures.
    """

    def __init__(self, source: ImageSource):
        self.size = source.pictures_per_row
        if self.size < 2:
            raise ValueError(
                f"{source.name} has one picture in a row, and this method learns from several that belong together: "
                "name their columns, for example --image_column left,right."
            )
        self._rows = len(source) // self.size

    def __len__(self) -> int:
        return self._rows

    def pictures(self, indices, seed, epochs):
        return indices[:, None] * self.size + torch.arange(self.size)


class SetsByClass(PictureSets):
    """Sets drawn by class: a class with two pictures at least, each as often as any other, and what goes with one of
    its pictures. An epoch has as many sets as there are pictures with a label.

    Raises:
        ValueError: without labels, or when no class has two pictures, or all have the same class.
    """

    _name: ClassVar[str]

    def __init__(self, source: ImageSource):
        labels = source.labels()
        if labels is None:
            raise ValueError(f"{source.name} has no labels to make {self._name} of: set label_column.")
        known = (labels >= 0).nonzero().flatten()
        _, counts = labels[known].unique(return_counts=True)
        self._by_class = known[labels[known].argsort(stable=True)]
        self._counts, self._starts = counts, counts.cumsum(0) - counts
        self._with_pairs = (counts > 1).nonzero().flatten()
        if len(counts) < 2 or len(self._with_pairs) == 0:
            raise ValueError(
                f"{source.name} has {len(counts)} classes, {len(self._with_pairs)} of them with two pictures or more: "
                f"{self._name} need two classes, one of them with two pictures."
            )

    def __len__(self) -> int:
        return len(self._by_class)

    def _triplets(self, numbers: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Numbers of an anchor, another picture of its class, and one of another class, of five uniform numbers."""
        same = self._with_pairs[_one_of(len(self._with_pairs), numbers[0])]
        anchor = _one_of(self._counts[same], numbers[1])
        # Steps away from the anchor, and from its class, that never come back to it.
        positive = (anchor + 1 + _one_of(self._counts[same] - 1, numbers[2])) % self._counts[same]
        other = (same + 1 + _one_of(len(self._counts) - 1, numbers[3])) % len(self._counts)
        negative = _one_of(self._counts[other], numbers[4])
        places = [(same, anchor), (same, positive), (other, negative)]
        return [self._by_class[self._starts[group] + place] for group, place in places]


class Triplets(SetsByClass):
    """Anchor, positive and negative, drawn by class: a class, two different pictures of it, and one of another class
    (eladhoffer/TripletNet, `Data.lua`). Rare classes come as often as others. See `SetsByClass`."""

    size: ClassVar[int] = 3
    _name: ClassVar[str] = "triplets"

    def pictures(self, indices, seed, epochs):
        numbers = keyed_draw(sample_keys(seed, epochs, indices, purpose=SETS))(5).unbind(dim=1)
        return torch.stack(self._triplets(numbers), dim=1)


class ClassPairs(SetsByClass):
    """Two different pictures, of one class or of two with probability 1/2 (cjvargasc/JNN_recog, `datasetBatch.py`).
    Rare classes come as often as others. See `SetsByClass`."""

    size: ClassVar[int] = 2
    _name: ClassVar[str] = "pairs"

    def pictures(self, indices, seed, epochs):
        numbers = keyed_draw(sample_keys(seed, epochs, indices, purpose=SETS))(6).unbind(dim=1)
        query, same, different = self._triplets(numbers[:5])
        return torch.stack([query, torch.where(numbers[5] < 0.5, same, different)], dim=1)


class FramePairs(PictureSets):
    """Two frames of a clip, the earlier one first, with a gap drawn uniformly (SiamMAE; alexandre-eymael/
    CropMAE, `data/util/video_utils.py`). An epoch has one pair of each clip of two frames or more.

    Args:
        source: says where its clips begin.
        gap_range: smallest gap, and one more than the largest, in frames; of short clips what there is.

    Raises:
        ValueError: for gaps that are none, a source without clips, or clips of single frames alone.
    """

    size: ClassVar[int] = 2

    def __init__(self, source: ImageSource, gap_range: tuple[int, int] = (4, 48)):
        if not 1 <= gap_range[0] < gap_range[1]:
            raise ValueError(
                f"The range of gaps is {tuple(gap_range)}; it must be (smallest, one more than the largest), from 1 "
                "on, for example (4, 48)."
            )
        bounds = source.clips()
        if bounds is None:
            raise ValueError(
                f"{source.name} holds pictures that stand alone, and this method learns from frames of clips: give a "
                "folder with the frames of each clip in a folder of its own, or name the columns of the frames, for "
                "example --image_column frame0,frame1."
            )
        lengths = bounds.diff()
        if (lengths < 2).all():
            raise ValueError(f"{source.name} has no clip of two frames or more: there is nothing to pair.")
        self._starts, self._lengths = bounds[:-1][lengths > 1], lengths[lengths > 1]
        self._smallest = (self._lengths - 1).clamp(max=gap_range[0])
        self._gaps = self._lengths.clamp(max=gap_range[1]) - self._smallest

    def __len__(self) -> int:
        return len(self._starts)

    def pictures(self, indices, seed, epochs):
        which_gap, which_frame = keyed_draw(sample_keys(seed, epochs, indices, purpose=SETS))(2).unbind(dim=1)
        gap = self._smallest[indices] + _one_of(self._gaps[indices], which_gap)
        first = self._starts[indices] + _one_of(self._lengths[indices] - gap, which_frame)
        return torch.stack([first, first + gap], dim=1)


def _one_of(n: int | torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """int64 in [0, n), of uniform numbers in [0, 1)."""
    return (number.double() * n).long()


# What a sample of a method consists of, see `VariantConfig.sample`.
SAMPLES = {"row": Rows, "scene": Rows, "triplet": Triplets, "class_pair": ClassPairs, "frames": FramePairs}


def make_sets(
    sample: str, source: ImageSource, frame_gap: tuple[int, int] | list[int] | None = None
) -> PictureSets | None:
    """The sets that samples of this kind are, None for single pictures.

    A "scene" is shown by the pictures of a row; where rows have one picture, the processor makes its views of that.

    Args:
        sample: "picture", or a name in `SAMPLES`.
        source: of the pictures.
        frame_gap: `FramePairs`' range of gaps, where it is not its own.

    Raises:
        ValueError: where the source cannot make such samples, or for gaps between what are no frames.
    """
    if frame_gap is None:
        if sample == "scene" and source.pictures_per_row == 1:
            return None
        return SAMPLES[sample](source) if sample in SAMPLES else None
    if sample != "frames":
        raise ValueError("frame_gap is for methods that learn from frames of clips: leave it out.")
    return FramePairs(source, tuple(frame_gap))
