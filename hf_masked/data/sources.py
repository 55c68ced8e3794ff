"""Where pictures come from: the Hub, local folders and files, small built-in sets. Nothing is decoded here."""

import glob
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from hf_masked.data import small_sets
from hf_masked.data.columns import find_image_column, find_image_columns, find_label_column, read_cell
from hf_masked.data.folders import SPLIT_FOLDERS, files_below, has_splits, image_suffixes
from hf_masked.processing.decoding import BadImageError

SMALL_SETS = {"fashion_mnist": small_sets.fashion_mnist, "digits": small_sets.digits}
FILE_BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}

# A file of this name in a folder of images holds their labels; `datasets` reads it.
METADATA = "metadata"

# Describes a folder that `hf_masked.data.cached` wrote.
CACHE_FILE = "cache.json"

Content = bytes | str | Image.Image | np.ndarray


class ImageSource:
    """A collection of pictures, not decoded, that are asked for by number.

    Attributes:
        name: what it turned out to be.
        class_names: the classes' names, or None.
        pictures_per_row: how many pictures in turn belong together, the row of a table.
    """

    name: str
    class_names: list[str] | None = None
    pictures_per_row: int = 1

    def __len__(self) -> int:
        raise NotImplementedError

    def picture(self, index: int) -> tuple[Content, str]:
        """A picture's content (encoded bytes, a path, a Pillow picture or an array) and its name for messages.

        Raises:
            BadImageError: where there is nothing to decode.
        """
        raise NotImplementedError

    def labels(self) -> torch.Tensor | None:
        """int64 (n,), with -1 where a picture has none; None without labels."""
        return None

    def clips(self) -> torch.Tensor | None:
        """int64 (clips + 1,): the number of each clip's first frame, and the end, where the pictures are the frames of
        clips one after the other; None where they are not. The pictures of a row count as a clip."""
        if self.pictures_per_row == 1:
            return None
        return torch.arange(0, len(self) + 1, self.pictures_per_row)

    def as_tensor(self) -> torch.Tensor | None:
        """uint8 (n, channels, height, width), if the pictures are equally sized arrays in memory already."""
        return None

    def samples(
        self,
        shuffle_seed: int | None = None,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> Iterator[tuple[Content | BadImageError, str, int | None]]:
        """See `StreamingImageSource.samples`; the whole order is shuffled, without a buffer, and what is left out is
        not read."""
        order = np.arange(len(self))
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        labels = self.labels()
        for index in order[rank::world_size][start:].tolist():
            try:
                content, name = self.picture(index)
            except BadImageError as error:
                content, name = error, f"picture {index} of {self.name}"
            yield content, name, None if labels is None else int(labels[index])


class ArraySource(ImageSource):
    """Equally sized pictures in memory.

    Args:
        name: what they are.
        images: uint8 (n, height, width) or (n, channels, height, width).
        labels: int64 (n,), or None.
        class_names: the classes' names, or None.
        pictures_per_row: how many pictures in turn belong together; of clips (n, frames, height, width) that were made
            (n * frames, height, width), the frames.
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None = None,
        class_names: list[str] | None = None,
        pictures_per_row: int = 1,
    ):
        self.name = name
        self.pictures_per_row = pictures_per_row
        self.class_names = class_names
        images = torch.from_numpy(np.array(images))
        self._images = images[:, None] if images.ndim == 3 else images
        self._labels = None if labels is None else torch.from_numpy(np.array(labels))

    def __len__(self) -> int:
        return len(self._images)

    def picture(self, index: int) -> tuple[np.ndarray, str]:
        return self._images[index].numpy(), f"picture {index} of {self.name}"

    def labels(self) -> torch.Tensor | None:
        return self._labels

    def as_tensor(self) -> torch.Tensor:
        return self._images


class FolderSource(ImageSource):
    """Images in a folder. Their classes are the names of the folders that hold them, where there are several at the
    same depth. For methods that learn from clips, the pictures of each folder are the frames of one, in the order of
    their names.

    Args:
        folder: where they are.
        files: their paths, relative to `folder`.
        split: "train", "test" or "validation", see `folders.SPLITS`.

    Raises:
        ValueError: if there is no such split.
    """

    def __init__(self, folder: Path, files: list[str], split: str):
        self.name = f"{folder} ({split})"
        self._folder = os.fsencode(folder)
        splits, parents = ["train"] * len(files), [os.path.dirname(file) for file in files]
        if has_splits(folder):
            first, parents = zip(*(parent.partition(os.sep)[::2] for parent in parents), strict=True)
            splits = [SPLIT_FOLDERS.get(name.lower()) for name in first]
        chosen = [number for number, name in enumerate(splits) if name == split]
        if not chosen:
            known = " and ".join(sorted({name for name in splits if name}))
            raise ValueError(
                f"'{folder}' has no split {split!r}, but {known}: choose one, or make splits with sub-folders such as "
                "train and test."
            )
        # One array of bytes: of a list of strings each forked worker would come to hold a copy.
        self._files = np.array([os.fsencode(files[number]) for number in chosen])
        folders = [parents[number] for number in chosen]
        first = [place for place, name in enumerate(folders) if place == 0 or name != folders[place - 1]]
        self._clips = torch.tensor([*first, len(chosen)])
        self._labels = None
        names = sorted({os.path.basename(parent) for parent in parents})
        if len(names) > 1 and "" not in names and len({parent.count(os.sep) for parent in parents}) == 1:
            self.class_names = names
            number_of = {name: number for number, name in enumerate(names)}
            self._labels = torch.tensor([number_of[os.path.basename(parents[number])] for number in chosen])

    def __len__(self) -> int:
        return len(self._files)

    def picture(self, index: int) -> tuple[str, str]:
        path = os.fsdecode(os.path.join(self._folder, self._files[index]))
        return path, path

    def labels(self) -> torch.Tensor | None:
        return self._labels

    def clips(self) -> torch.Tensor:
        return self._clips


class TableSource(ImageSource):
    """A `datasets.Dataset`.

    Args:
        dataset: the rows.
        name: what they are.
        image_column, label_column: see `load_images`. The pictures of several columns are counted row by row.
    """

    def __init__(self, dataset, name: str, image_column: str | None = None, label_column: str | None = None):
        self._columns = find_image_columns(dataset.features, image_column)
        label_column = find_label_column(dataset.features, label_column)
        self.name = name
        self.pictures_per_row = len(self._columns)
        self._cells = _undecoded(dataset, self._columns).select_columns(self._columns).with_format("arrow")
        self._labels = None
        if label_column is not None:
            labels, self.class_names = class_indices(dataset, label_column)
            self._labels = labels.repeat_interleave(self.pictures_per_row)

    def __len__(self) -> int:
        return len(self._cells) * self.pictures_per_row

    def picture(self, index: int) -> tuple[Content, str]:
        row, place = divmod(index, self.pictures_per_row)
        column = self._columns[place]
        where = f"{column} in row {row}" if self.pictures_per_row > 1 else f"row {row}"
        return read_cell(self._cells[row].column(column)[0], f"{where} of {self.name}")

    def labels(self) -> torch.Tensor | None:
        return self._labels


class StreamingImageSource:
    """A `datasets.IterableDataset`: pictures that come one after the other.

    Args:
        stream: the rows.
        name: what they are.
        image_column, label_column: see `load_images`.
    """

    def __init__(self, stream, name: str, image_column: str | None = None, label_column: str | None = None):
        from datasets import ClassLabel

        if stream.features is None:
            raise ValueError(f"{name} does not say what its columns hold, which streaming needs: use streaming=False.")
        self.name = name
        self._image_column = find_image_column(stream.features, image_column)
        self._label_column = find_label_column(stream.features, label_column)
        feature = stream.features.get(self._label_column)
        self.class_names = feature.names if isinstance(feature, ClassLabel) else None
        if "string" in str(getattr(feature, "dtype", "")):
            if label_column is not None:
                raise ValueError(
                    f"label_column={label_column!r} holds strings, which become class indices only once all are "
                    "known: use streaming=False."
                )
            self._label_column = None
        columns = [self._image_column] + [self._label_column] * (self._label_column is not None)
        self._rows = _undecoded(stream, [self._image_column]).select_columns(columns).with_format("arrow")

    def samples(
        self,
        shuffle_seed: int | None = None,
        buffer_size: int = 1000,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> Iterator[tuple[Content | BadImageError, str, int | None]]:
        """One pass over this rank's part of the stream.

        Args:
            shuffle_seed: orders files and buffer; None for the stream's own order. The same on all ranks.
            buffer_size: pictures in the shuffle buffer.
            rank, world_size: which of how many parts. Ranks share out whole files where there are enough of them,
                else pictures.
            start: so many pictures at the beginning of this part are left out; they are read, but nothing is made of
                them.

        Yields:
            Content (or the error that stands in its place), its name for messages, and its label: -1 for an empty
            cell, None where the stream has no labels.
        """
        import fsspec
        from datasets.distributed import split_dataset_by_node

        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # a lock that was taken when the worker was forked would never be freed
        rows = self._rows if shuffle_seed is None else self._rows.shuffle(seed=shuffle_seed, buffer_size=buffer_size)
        if world_size > 1:
            strategy = "shards" if rows.num_shards >= world_size else "examples"
            rows = split_dataset_by_node(rows, rank=rank, world_size=world_size, strategy=strategy)
        # Not `iter(rows)`: in a DataLoader's worker that would split by worker once more, and leave all but one worker
        # idle where there is only one file.
        for place, row in islice(enumerate(rows.iter(batch_size=1)), start, None):
            where = f"picture {place} of part {rank} of {self.name}"
            try:
                content, name = read_cell(row.column(self._image_column)[0], where)
            except BadImageError as error:
                content, name = error, where
            yield content, name, self._label(row)

    def _label(self, row) -> int | None:
        if self._label_column is None:
            return None
        label = row.column(self._label_column)[0].as_py()
        return -1 if label is None else int(label)


def load_images(
    dataset_name: str,
    split: str = "train",
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> ImageSource | StreamingImageSource:
    """Finds pictures.

    Args:
        dataset_name: an id on the Hub; a local folder of images (its sub-folders are classes, or splits with classes
            in them), Parquet or WebDataset tar files; a cache, see `hf-masked cache`; a local file or pattern, or a
            URL, of Parquet or tar files; "fashion_mnist" or "digits".
        split: "train", "test", ...; for all but the small sets also a slice such as "train[:10%]".
        config_name: the configuration, where a data set on the Hub has several.
        image_column: the column of pictures: encoded, or uint8 arrays with any number of channels. By default the one
            that is declared as images, else the only one that could hold pictures. Several, "left,right", where a row
            holds pictures that belong together; they are not streamed.
        label_column: the column of labels, integers or strings. By default the declared classes, else a column with a
            usual name, else none.
        streaming: read the rows in passing, without a local copy.
        cache_dir: where `datasets` keeps its copies.

    Raises:
        ValueError: if there is no such data set, split or column, or no picture in the folder.
    """
    if dataset_name in SMALL_SETS:
        if streaming:
            raise ValueError(f"{dataset_name} is held in memory and cannot be streamed: use streaming=False.")
        return ArraySource(*SMALL_SETS[dataset_name](split))
    folder = Path(dataset_name).expanduser()
    if (folder / CACHE_FILE).is_file():
        from hf_masked.data.cached import CachedSource

        return CachedSource(folder, split)
    if folder.is_dir() and split in SPLIT_FOLDERS.values():  # `datasets` knows slices of splits
        files = _images_in(folder.resolve())
        if files is not None:
            _check_columns(dataset_name, image_column, label_column)
            return FolderSource(folder.resolve(), files, split)
    rows = _load_rows(dataset_name, split, config_name, streaming, cache_dir)
    kind = StreamingImageSource if streaming else TableSource
    try:
        return kind(rows, f"{dataset_name} ({split})", image_column, label_column)
    except ValueError as error:
        raise ValueError(f"{dataset_name}: {error}") from error


def check_channels(images: torch.Tensor, num_channels: int, name: str) -> torch.Tensor:
    """The pictures (n, channels, height, width), or a ValueError if they cannot have `num_channels` channels."""
    if images.shape[1] not in (1, num_channels):
        raise ValueError(
            f"The pictures of {name} have {images.shape[1]} channels, the processor {num_channels}: set num_channels "
            f"to {images.shape[1]}."
        )
    return images


def _load_rows(dataset_name, split, config_name, streaming, cache_dir):
    path, options = _locate(dataset_name)
    return read_rows(dataset_name, path, split, config_name, streaming, cache_dir, **options)


def read_rows(
    dataset_name: str, path: str, split: str, config_name=None, streaming: bool = False, cache_dir=None, **options
):
    """`datasets.load_dataset(path, ...)`; whatever goes wrong is a ValueError that says what to do."""
    import datasets

    try:
        return datasets.load_dataset(
            path, config_name, split=split, streaming=streaming, cache_dir=cache_dir, **options
        )
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        in_file = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        reason = " ".join(str(in_file or error).split()).rstrip(".")
        raise ValueError(
            f"{dataset_name!r}, split {split!r}, cannot be loaded: {reason}. Give a folder or file that exists or the "
            "id of a data set on the Hub, and one of its splits."
        ) from error


def _locate(dataset_name: str) -> tuple[str, dict]:
    """First argument and further ones of `datasets.load_dataset`."""
    path = Path(dataset_name).expanduser()
    if path.is_dir():
        return _locate_in_folder(path.resolve())
    if "://" in dataset_name:
        return _builder_of(dataset_name.partition("?")[0], dataset_name), {"data_files": dataset_name}
    files = [str(path)] if path.exists() else sorted(glob.glob(str(path)))
    if files:
        return _builder_of(files[0], dataset_name), {"data_files": files}
    if dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1:
        raise ValueError(f"There is no folder or file {dataset_name!r}: check the path, seen from {os.getcwd()}.")
    return dataset_name, {}


def _builder_of(file: str, dataset_name: str) -> str:
    builder = FILE_BUILDERS.get(Path(file).suffix.lower())
    if builder is None:
        raise ValueError(f"{dataset_name!r} is no Parquet or tar file: give one, or a folder of images.")
    return builder


def _images_in(folder: Path) -> list[str] | None:
    """The images below a folder, or None where they are a matter for `datasets`: in Parquet or tar files, or described
    by a metadata file.

    Raises:
        ValueError: if there is nothing of all that.
    """
    suffixes = image_suffixes()
    images = []
    for file in files_below(folder):
        stem, suffix = os.path.splitext(os.path.basename(file))
        if suffix.lower() in FILE_BUILDERS or stem.lower() == METADATA:
            return None
        if suffix.lower() in suffixes:
            images.append(file)
    if not images:
        raise ValueError(
            f"The folder '{folder}' holds no pictures: put image files there (.jpg, .png, ...; sub-folders are "
            "classes), or Parquet or tar files."
        )
    return images


def _check_columns(dataset_name: str, image_column: str | None, label_column: str | None) -> None:
    """A folder of images has the columns that `datasets` would make of it."""
    for argument, name, column in (("image_column", image_column, "image"), ("label_column", label_column, "label")):
        if name not in (None, column):
            raise ValueError(f"{dataset_name}: {argument}={name!r} is no column: a folder of images has image, label.")


def _locate_in_folder(folder: Path) -> tuple[str, dict]:
    """Parquet or tar files, a folder with a metadata file, or slices of splits of any folder.

    Left to itself, `datasets` would take a class called "train", or a file called "test 1.jpg", for a split, and leave
    out all others.
    """
    suffixes = {os.path.splitext(file)[1].lower() for file in files_below(folder)}
    if suffixes & FILE_BUILDERS.keys():
        return str(folder), {}
    return "imagefolder", {"data_dir": str(folder)} | ({} if has_splits(folder) else {"data_files": {"train": "**"}})


def _undecoded(rows, image_columns: list[str]):
    from datasets import Image

    for column in image_columns:
        if isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def class_indices(dataset, label_column: str) -> tuple[torch.Tensor, list[str] | None]:
    """int64 (n,), -1 for empty cells, and the classes' names, if they have any."""
    from datasets import ClassLabel

    feature = dataset.features[label_column]
    cells = dataset.select_columns([label_column]).with_format("arrow")[:].column(0).to_pylist()
    names = feature.names if isinstance(feature, ClassLabel) else None
    if "string" in feature.dtype:
        names = sorted({cell for cell in cells if cell is not None})
        index = {name: number for number, name in enumerate(names)}
        cells = [index.get(cell, -1) for cell in cells]
    return torch.tensor([-1 if cell is None else int(cell) for cell in cells]), names
