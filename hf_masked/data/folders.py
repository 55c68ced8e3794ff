"""Listing a folder of images: names only, so that a million files take seconds; and opening what a user names."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from hf_masked.processing.decoding import BadImageError, open_image

logger = logging.getLogger(__name__)

# Names of sub-folders that mean splits, not classes.
SPLITS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("val", "valid", "validation", "dev"),
}
SPLIT_FOLDERS = {name: split for split, names in SPLITS.items() for name in names}


def image_suffixes() -> set[str]:
    """Lower-case endings, with the dot, of the files that Pillow can open."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def files_below(folder: Path) -> Iterator[str]:
    """Paths relative to `folder`, in a fixed order. Links are followed, except back to where they are; what is hidden
    (".", "__") is left out."""
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if _is_visible(name) and not _leads_back(place, name))
        prefix = os.path.relpath(place, folder)
        for name in sorted(filter(_is_visible, files)):
            yield name if prefix == "." else os.path.join(prefix, name)


def has_splits(folder: Path) -> bool:
    """Whether the sub-folders are splits: all of them have such names, or "train" and another one have."""
    names = {child.name.lower() for child in folder.iterdir() if child.is_dir() and _is_visible(child.name)}
    known = names & SPLIT_FOLDERS.keys()
    return bool(names) and (names == known or ("train" in known and len(known) > 1))


def readable_pictures(paths: list[Path], limit: int | None = None) -> dict[Path, Image.Image]:
    """The pictures among files and folders that can be read, at most so many; the others are named in the log.

    Raises:
        ValueError: for a path that is not there, or if there is no readable picture.
    """
    pictures: dict[Path, Image.Image] = {}
    for path in _files_of(paths):
        try:
            pictures[path] = open_image(str(path), str(path))
        except BadImageError as error:
            logger.warning("left out: %s", error)
        if len(pictures) == limit:
            break
    if not pictures:
        raise ValueError(f"There is no readable picture in {', '.join(map(str, paths))}.")
    return pictures


def _files_of(paths: list[Path]) -> Iterator[Path]:
    suffixes = image_suffixes()
    for path in paths:
        if not path.exists():
            raise ValueError(f"There is no file or folder {path}.")
        names = files_below(path) if path.is_dir() else ()
        yield from (path / name for name in names if Path(name).suffix.lower() in suffixes)
        if not path.is_dir():
            yield path


def _is_visible(name: str) -> bool:
    return not name.startswith((".", "__"))


def _leads_back(place: str, name: str) -> bool:
    path = os.path.join(place, name)
    return os.path.islink(path) and Path(os.path.realpath(place)).is_relative_to(os.path.realpath(path))
