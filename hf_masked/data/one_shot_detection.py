"""Samples of one-shot detection: a picture, a query of one class that it holds, and all boxes of that class."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch.utils.data import Dataset

from hf_masked.processing.one_shot_detection import OneShotDetectionProcessor
from hf_masked.randomness import keyed_draw, sample_keys

# Separates what is drawn here from the draws of processors and sets.
DETECTION = -3

# `utils/utils.py` of cjvargasc/JNN_detection: how far each side of the crop may move, tries until a box is left, and
# the distortion of colours.
JITTER, TRIES, HUE, SATURATION, EXPOSURE = 0.3, 5, 0.1, 1.5, 1.5

# Boxes stay within the picture by this share of its sides.
EDGE = 0.001


class OneShotDetectionData(Dataset):
    """A map-style data set for transformers' Trainer, whose every sample is a function of (seed, epoch, index).

    A sample: a class, each as often as any other; one picture and one box of it, the query; another picture with that
    class, the target, and all its boxes of the class. An epoch has as many samples as there are pictures.

    Args:
        pictures: Pillow pictures or paths.
        boxes: for each, float (n, 4), (left, top, right, bottom) as shares of its width and height.
        classes: for each, int64 (n,).
        processor: makes the inputs.
        seen_classes: those that are drawn; by default all.
        seed: the run's.
        training: with the paper's augmentation of the target: a crop with moved sides, flips, colours.

    Raises:
        ValueError: where pictures, boxes and classes do not belong together, or no class is in two pictures.
    """

    def __init__(
        self,
        pictures: Sequence,
        boxes: Sequence[torch.Tensor],
        classes: Sequence[torch.Tensor],
        processor: OneShotDetectionProcessor,
        seen_classes: Sequence[int] | None = None,
        seed: int = 0,
        training: bool = True,
    ):
        if not len(pictures) == len(boxes) == len(classes) or any(map(_unequal, boxes, classes)):
            raise ValueError(
                f"There are {len(pictures)} pictures, boxes for {len(boxes)} and classes for {len(classes)}; expected "
                "boxes (n, 4) and classes (n,) for each."
            )
        self.pictures, self.boxes, self.classes = pictures, boxes, classes
        self.processor = processor
        self.seed, self.epoch, self.training = seed, 0, training
        holders: dict[int, list[int]] = {}
        for number, found in enumerate(classes):
            for label in found.unique().tolist():
                holders.setdefault(label, []).append(number)
        chosen = holders.keys() if seen_classes is None else set(seen_classes)
        self._holders = [holders[label] for label in sorted(chosen & holders.keys()) if len(holders[label]) > 1]
        self._labels = [label for label in sorted(chosen & holders.keys()) if len(holders[label]) > 1]
        if not self._labels:
            raise ValueError("No class is in two pictures, one for the query and one for the target.")
        self._most = max(int((found == label).sum()) for found in classes for label in self._labels)

    def __len__(self) -> int:
        return len(self.pictures)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the draws of the next pass; the Trainer calls it."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """A sample.

        Returns:
            pixel_values, query_pixel_values: of the processor.
            boxes: float32 (most, 4), filled up with zeros.
            num_boxes: int64 (), how many count.
            classes: int64 (), the class, for evaluation.
        """
        numbers = keyed_draw(sample_keys(self.seed, self.epoch, torch.tensor([index]), purpose=DETECTION))

        def draw(n: int) -> int:
            return int(numbers(1).double() * n)

        number = draw(len(self._labels))
        label, holders = self._labels[number], self._holders[number]
        first = draw(len(holders))
        second = (first + 1 + draw(len(holders) - 1)) % len(holders)
        queries = self._boxes_of(holders[first], label)
        query = _crop(_opened(self.pictures[holders[first]]), queries[draw(len(queries))])
        target, boxes = _opened(self.pictures[holders[second]]), self._boxes_of(holders[second], label)
        if self.training:
            target, boxes = augment(target, boxes, lambda n: numbers(n)[0].tolist())
        inputs = self.processor(target, query)
        padded = torch.zeros(self._most, 4)
        padded[: len(boxes)] = boxes.clamp(EDGE, 1 - EDGE)
        return {
            **{name: value[0] for name, value in inputs.items()},
            "boxes": padded,
            "num_boxes": torch.tensor(len(boxes)),
            "classes": torch.tensor(label),
        }

    def _boxes_of(self, picture: int, label: int) -> torch.Tensor:
        return self.boxes[picture][self.classes[picture] == label].float()


def augment(picture: Image.Image, boxes: torch.Tensor, draw) -> tuple[Image.Image, torch.Tensor]:
    """The paper's augmentation (`utils/utils.py`).

    Args:
        picture: the target.
        boxes: float (n, 4), as shares of its sides.
        draw: `draw(n)` gives n uniform numbers in [0, 1).

    Returns:
        A crop whose sides have moved by up to 0.3 of the picture's (black where it leaves the picture), perhaps
        mirrored, with other colours; and the boxes of which something is left. Where five crops in turn leave no box,
        the picture stays whole.
    """
    width, height = picture.size
    for _ in range(TRIES):
        left, top, right, bottom = (JITTER * (2 * number - 1) for number in draw(4))
        right, bottom = 1 - right, 1 - bottom
        edges = [round(left * width), round(top * height), round(right * width), round(bottom * height)]
        flip = draw(1)[0] < 0.5
        sides = torch.tensor([width, height, width, height])
        start = torch.tensor([edges[0], edges[1]] * 2)
        size = torch.tensor([edges[2] - edges[0], edges[3] - edges[1]] * 2)
        moved = ((boxes * sides - start) / size).clamp(0, 1)
        moved = moved[(moved[:, 2:] - moved[:, :2] > EDGE).all(dim=1)]
        if len(moved):
            picture, boxes = picture.crop(edges), moved
            if flip:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                boxes = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
            break
    return (_distort(picture, draw), boxes) if picture.mode == "RGB" else (picture, boxes)


def _distort(picture: Image.Image, draw) -> Image.Image:
    turn, *others = draw(5)
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point(lambda i: (i + HUE * (2 * turn - 1) * 255) % 256)
    factors = []
    for largest, amount, up in ((SATURATION, *others[:2]), (EXPOSURE, *others[2:])):
        factor = 1 + (largest - 1) * amount
        factors.append(factor if up < 0.5 else 1 / factor)
    saturation = saturation.point(lambda i: min(i * factors[0], 255))
    value = value.point(lambda i: min(i * factors[1], 255))
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _crop(picture: Image.Image, box: torch.Tensor) -> Image.Image:
    width, height = picture.size
    left, top, right, bottom = (box * torch.tensor([width, height, width, height])).round().int().tolist()
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _opened(picture) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.open(picture).convert("RGB")


def _unequal(boxes: torch.Tensor, classes: torch.Tensor) -> bool:
    return boxes.shape != (len(classes), 4)
