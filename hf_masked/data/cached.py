"""A cache: a data set's pictures decoded once, made smaller, and kept as uint8 that is read where it lies.

OUT/cache.json            what it was made from, how large the pictures are, the splits and their classes
OUT/train/pixels.bin      uint8, picture after picture, (height, width, channels) each
OUT/train/index.npz       `offsets` int64 (n + 1,) into pixels.bin, `sizes` int32 (n, 2) as (height, width), and
                          `labels` int64 (n,) where the data set has them
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hf_masked.data.bad_images import BadImageLog, decode_picture, too_many_bad
from hf_masked.data.sources import CACHE_FILE, ImageSource
from hf_masked.processing.decoding import BadImageError
from hf_masked.processing.image_processing import BICUBIC
from hf_masked.processing.views import crop_and_resize


def write_cache(
    sources: dict[str, ImageSource],
    folder: str | Path,
    size: int = 256,
    num_channels: int = 3,
    num_workers: int = 0,
    max_bad_share: float = 0.1,
) -> dict[str, tuple[int, int]]:
    """Decodes all pictures, makes those smaller whose short side is longer than `size`, and writes them.

    The folder appears under its name when all of it is written; until then it is called `<folder>.partial`.

    Args:
        sources: by the names of their splits.
        folder: must not exist.
        size: of the short side, in pixels.
        num_channels: of all pictures.
        num_workers: processes that decode; 0 decodes in this one.
        max_bad_share: see `BadImageLog`.

    Returns:
        For each split how many pictures were written, and how many were bad and left out.

    Raises:
        ValueError: if the folder exists, too many pictures are bad, or several of them belong together.
    """
    for source in sources.values():
        if source.pictures_per_row > 1:
            raise ValueError(
                f"{source.name} has {source.pictures_per_row} pictures in a row; a cache holds single pictures: train "
                "on the data set itself."
            )
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: remove it, or choose another folder for the cache.")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    written = {}
    for split, source in sources.items():
        (partial / split).mkdir(parents=True)
        log = BadImageLog(max_bad_share, len(source))
        pictures = DataLoader(_Resized(source, size, num_channels), batch_size=None, num_workers=num_workers)
        good = _write_split(partial / split, pictures, source.labels(), log)
        if not good:
            raise ValueError(too_many_bad(log.faults, log.bad_seen, log.seen))
        written[split] = good, log.bad_seen
    description = {
        "size": size,
        "num_channels": num_channels,
        "splits": {
            split: {"name": source.name, "class_names": source.class_names} for split, source in sources.items()
        },
    }
    (partial / CACHE_FILE).write_text(json.dumps(description, indent=2) + "\n")
    partial.rename(folder)
    return written


class CachedSource(ImageSource):
    """A split of a cache that `write_cache` made.

    Args:
        folder: of the cache.
        split: name of the split.

    Raises:
        ValueError: if there is no such split, or a file was cut short.
    """

    def __init__(self, folder: Path, split: str):
        description = json.loads((folder / CACHE_FILE).read_text())
        if split not in description["splits"]:
            raise ValueError(f"The cache {folder} has no split {split!r}: choose one of {[*description['splits']]}.")
        self.name = f"{description['splits'][split]['name']}, cached"
        self.class_names = description["splits"][split]["class_names"]
        self._num_channels = description["num_channels"]
        self._place = folder, split
        with np.load(folder / split / "index.npz") as index:
            self._offsets, self._sizes = index["offsets"], index["sizes"]
            self._labels = torch.from_numpy(index["labels"]) if "labels" in index else None
        path = folder / split / "pixels.bin"
        if path.stat().st_size != self._offsets[-1]:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {self._offsets[-1]}: make the cache anew.")
        self._pixels = np.memmap(path, np.uint8, "r")

    def __reduce__(self):
        return CachedSource, self._place  # a worker maps the file, where a pickled map would hold all of it

    def __len__(self) -> int:
        return len(self._sizes)

    def picture(self, index: int) -> tuple[Image.Image | np.ndarray, str]:
        begin, end = self._offsets[index : index + 2]
        pixels = self._pixels[begin:end].reshape(*self._sizes[index], self._num_channels)
        if self._num_channels in (1, 3, 4):
            return Image.fromarray(pixels[..., 0] if self._num_channels == 1 else pixels), self._name_of(index)
        return np.array(pixels), self._name_of(index)

    def labels(self) -> torch.Tensor | None:
        return self._labels

    def _name_of(self, index: int) -> str:
        return f"picture {index} of {self.name}"


class _Resized(Dataset):
    """Pictures as uint8 (height, width, channels), or the message that stands in a bad one's place."""

    def __init__(self, source: ImageSource, size: int, num_channels: int):
        self.source = source
        self.size = size
        self.num_channels = num_channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            image = decode_picture(*self.source.picture(index), self.num_channels, self._shrink)
        except BadImageError as error:
            return str(error)
        height, width = image.shape[1:] if isinstance(image, torch.Tensor) else (image.height, image.width)
        shrink = max(1.0, self._shrink(width, height))
        target = round(height / shrink), round(width / shrink)
        return crop_and_resize(image, (0, 0, height, width), target, BICUBIC).permute(1, 2, 0)

    def _shrink(self, width: int, height: int) -> float:
        return min(width, height) / self.size


def _write_split(folder: Path, pictures: DataLoader, labels: torch.Tensor | None, log: BadImageLog) -> int:
    """Writes the good pictures; returns their number."""
    offsets, sizes, used = [0], [], []
    with open(folder / "pixels.bin", "wb") as file:
        for index, picture in enumerate(pictures):
            is_bad = isinstance(picture, str)
            log.add({"indices": [index], "bad": [picture] if is_bad else []})
            if not is_bad:
                file.write(picture.contiguous().numpy().data)
                offsets.append(file.tell())
                sizes.append(picture.shape[:2])
                used.append(index)
    index = {"offsets": np.array(offsets, np.int64), "sizes": np.array(sizes, np.int32)}
    if labels is not None:
        index["labels"] = labels[torch.tensor(used, dtype=torch.int64)].numpy()
    np.savez(folder / "index.npz", **index)
    return len(used)
