"""Finding good pictures among bad ones, and keeping count of the bad."""

import logging
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image

from hf_masked.data.sets import PictureSets
from hf_masked.data.sources import Content, ImageSource
from hf_masked.processing.decoding import BadImageError, Shrink, open_image, to_channels, to_uint8_tensor

logger = logging.getLogger(__name__)

# From so many pictures on, the share of bad ones says something about the whole set.
MIN_SEEN = 1000

# So many bad pictures, before any good one, raise the suspicion that all are.
SUSPICIOUS = 100


class Pictures:
    """The good pictures of a source, as large as a processor needs them, with a memory for the bad ones."""

    def __init__(self, source: ImageSource, processor, max_bad_share: float):
        self.source = source
        self.processor = processor
        self.max_bad_share = max_bad_share
        self.bad: dict[int, str] = {}
        self.any_good = False

    def __len__(self) -> int:
        return len(self.source)

    def good_one(self, index: int) -> tuple[Image.Image | torch.Tensor, int]:
        """The picture, or the next good one, converted but not cropped, and its index."""
        n = len(self.source)
        for candidate in (number % n for number in range(index, index + n)):
            image = self._good_or_none(candidate)
            if image is not None:
                return image, candidate
            self._check(n)
        raise ValueError(too_many_bad(self.bad.values(), len(self.bad), n))

    def good_set(
        self, index: int, sets: PictureSets, seed: int, epoch: int
    ) -> tuple[list[Image.Image | torch.Tensor], int]:
        """The pictures of a set, or of the next set that has good ones only, converted but not cropped, and its
        index: a picture of its own would not belong to the others."""
        n = len(sets)
        for candidate in (number % n for number in range(index, index + n)):
            numbers = sets.pictures(torch.tensor([candidate]), seed, epoch)[0].tolist()
            images = [self._good_or_none(number) for number in numbers]
            if all(image is not None for image in images):
                return images, candidate
            self._check(len(self.source))
        raise ValueError(too_many_bad(self.bad.values(), len(self.bad), len(self.source)))

    def name(self, index: int) -> str:
        """The source's name for a picture, for messages."""
        try:
            return self.source.picture(index)[1]
        except BadImageError as error:
            return str(error)

    def faults(self, indices: Iterable[int]) -> list[str]:
        """What is wrong with those of `indices` that are bad. The ones that were met in passing, in search of a
        replacement, stay out: counted as well, a row of neighbouring bad files would look like a bad set."""
        return [self.bad[index] for index in indices if index in self.bad]

    def decode_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pictures, uint8 (n, channels, height, width), and the indices that were used, int64 (n,)."""
        images, used = [], []
        for index in range(len(self.source)):
            image, candidate = self.good_one(index)
            images.append(image if isinstance(image, torch.Tensor) else to_uint8_tensor(image))
            used.append(candidate)
            if images[-1].shape != images[0].shape:
                raise ValueError(
                    f"The pictures of {self.source.name} have several sizes, {tuple(images[0].shape)} and "
                    f"{tuple(images[-1].shape)}, and cannot be held as one tensor: use ImageDataset."
                )
        return torch.stack(images), torch.tensor(used)

    def _good_or_none(self, index: int) -> Image.Image | torch.Tensor | None:
        if index in self.bad:
            return None
        try:
            image = decode_picture(*self.source.picture(index), self.processor.num_channels, self.processor.shrink)
        except BadImageError as error:
            self.bad[index] = str(error)
            return None
        self.any_good = True
        return image

    def _check(self, n: int) -> None:
        """Raises as soon as it is certain that too many are bad. If there was no good one yet, a look around decides:
        the beginning may be one damaged folder of many."""
        suspicious = not self.any_good and len(self.bad) == SUSPICIOUS
        if suspicious and all(self._good_or_none(index) is None for index in range(0, n, max(1, n // SUSPICIOUS))):
            raise ValueError(too_many_bad(self.bad.values(), len(self.bad), len(self.bad)))
        if len(self.bad) > self.max_bad_share * n:
            raise ValueError(too_many_bad(self.bad.values(), len(self.bad), n))


class BadImageLog:
    """Counts bad pictures in the main process, from the batches of all workers.

    Args:
        max_bad_share: the largest share of bad ones among the pictures seen.
        num_pictures: length of the source, if it is known.
    """

    def __init__(self, max_bad_share: float = 0.1, num_pictures: int | None = None):
        self.max_bad_share = max_bad_share
        self.min_seen = MIN_SEEN if num_pictures is None else min(MIN_SEEN, num_pictures)
        self.seen = 0
        self.bad_seen = 0
        self.faults: dict[str, None] = {}  # each once, in the order in which they turned up

    def add(self, batch: dict) -> None:
        """Takes note of a batch; each bad picture is logged once.

        Raises:
            ValueError: if too many of the pictures seen so far are bad.
        """
        self.seen += len(batch["indices"])
        for fault in batch["bad"]:
            if fault not in self.faults:
                logger.warning("Bad picture, another takes its place: %s", fault)
                self.faults[fault] = None
        self.bad_seen += len(batch["bad"])
        if self.seen >= self.min_seen and self.bad_seen > self.max_bad_share * self.seen:
            raise ValueError(too_many_bad(self.faults, self.bad_seen, self.seen))

    def state_dict(self) -> dict:
        """What was counted, for a checkpoint; of the JSON types."""
        return {"seen": self.seen, "bad_seen": self.bad_seen, "faults": list(self.faults)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on counting where `state_dict()` was taken."""
        self.seen, self.bad_seen = state["seen"], state["bad_seen"]
        self.faults = dict.fromkeys(state["faults"])


def decode_picture(
    content: Content | BadImageError, name: str, num_channels: int, shrink: Shrink | None = None
) -> Image.Image | torch.Tensor:
    """A Pillow picture or a uint8 tensor (channels, height, width) with the right channels.

    `shrink`: see `open_image`.

    Raises:
        BadImageError: for anything else, with the name; the given one, if that is the content.
    """
    if isinstance(content, BadImageError):
        raise content
    try:
        image = content if isinstance(content, np.ndarray) else open_image(content, name, shrink)
        return to_channels(image, num_channels)
    except BadImageError as error:
        message = str(error)
        raise BadImageError(message if message.startswith(name) else f"{name}: {message}") from error


def too_many_bad(faults: Iterable[str], bad: int, seen: int) -> str:
    """The message that ends a run because `bad` of the `seen` pictures are bad, in the way that `faults` tell."""
    return (
        f"{bad} of {seen} pictures are bad, for example {'; '.join(list(faults)[:3])}. Repair or remove them, "
        "check num_channels, or raise max_bad_share."
    )
