"""Crops: where they lie, and that the device's resize is Pillow's."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked.processing.views import (
    center_crop_boxes,
    crop_and_resize,
    crop_and_resize_batch,
    random_resized_crop_boxes,
)
from hf_masked.randomness import keyed_draw, sample_keys

BICUBIC = Image.Resampling.BICUBIC


def random_boxes(batch: int, height: int, width: int, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), seed=0) -> torch.Tensor:
    draw = keyed_draw(sample_keys(seed, 0, range(batch)))
    return random_resized_crop_boxes(
        draw, torch.full((batch,), height), torch.full((batch,), width), scale=scale, ratio=ratio
    )


def published_box(rng: random.Random, height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop with Python's own numbers."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.randint(0, height - box_height), rng.randint(0, width - box_width)
            return top, left, box_height, box_width
    box_width, box_height = width, height
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@pytest.mark.parametrize("size", [(224, 224), (375, 500), (500, 30), (1, 1), (1, 300), (3, 2), (20_000, 8_000)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (2.0, 3.0), (0.1, 0.2)])
def test_boxes_lie_inside_the_picture(size, ratio):
    top, left, height, width = random_boxes(2000, *size, ratio=ratio).unbind(dim=1)
    assert min(top.min(), left.min()) >= 0 and min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0] and (left + width).max() <= size[1]


@pytest.mark.parametrize("size", [(375, 500), (224, 224), (60, 400)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.5, 0.6)])
def test_boxes_are_distributed_as_torchvisions(size, scale):
    ratio = (3 / 4, 4 / 3)
    ours = random_boxes(5000, *size, scale=scale).double()
    rng = random.Random(0)
    theirs = torch.tensor([published_box(rng, *size, scale, ratio) for _ in range(5000)]).double()
    for describe in (
        lambda box: box[:, 2] * box[:, 3] / (size[0] * size[1]),
        lambda box: (box[:, 3] / box[:, 2]).log(),
        lambda box: box[:, 0] / size[0],
        lambda box: box[:, 1] / size[1],
    ):
        # Kolmogorov-Smirnov: 1.95 sqrt(2 / n) is passed by chance once in a thousand
        assert largest_distance(describe(ours), describe(theirs)) < 1.95 * math.sqrt(2 / 5000)


def largest_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Between two empirical distribution functions."""
    points = torch.cat([first, second]).unique()
    at = [torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (first, second)]
    return (at[0] - at[1]).abs().max().item()


@pytest.mark.parametrize(("size", "box"), [((10, 1000), [0, 493, 10, 13]), ((1000, 30), [480, 0, 40, 30])])
def test_extreme_pictures_get_the_central_box(size, box):
    assert random_boxes(3, *size, scale=(0.9, 1.0)).tolist() == [box] * 3
    assert list(published_box(random.Random(0), *size, (0.9, 1.0), (3 / 4, 4 / 3))) == box


def test_boxes_do_not_depend_on_the_batch():
    heights, widths = torch.tensor([30, 400, 90]), torch.tensor([50, 20, 90])
    keys = sample_keys(0, 0, range(3))
    together = random_resized_crop_boxes(keyed_draw(keys), heights, widths, (0.2, 1.0))
    alone = [
        random_resized_crop_boxes(keyed_draw(keys[i : i + 1]), heights[i : i + 1], widths[i : i + 1], (0.2, 1.0))
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("size", "aspect", "fraction", "box"),
    [
        ((256, 256), 1.0, 0.875, [16, 16, 224, 224]),
        ((300, 500), 1.0, 1.0, [0, 100, 300, 300]),
        ((300, 500), 0.5, 1.0, [0, 175, 300, 150]),
        ((300, 100), 2.0, 0.5, [138, 25, 25, 50]),
        ((1, 1), 3.0, 0.875, [0, 0, 1, 1]),
    ],
)
def test_central_box(size, aspect, fraction, box):
    boxes = center_crop_boxes(torch.tensor([size[0]]), torch.tensor([size[1]]), aspect, fraction)
    assert boxes.tolist() == [box]


def noise(height: int, width: int, low: int = 0, high: int = 256, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (height, width, channels), dtype=np.uint8)


def as_batch(array: np.ndarray, batch: int) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1).expand(batch, -1, -1, -1)


def as_pillow(array: np.ndarray, boxes: torch.Tensor, size: tuple[int, int], resample: int = BICUBIC) -> torch.Tensor:
    crops = []
    for top, left, height, width in boxes.tolist():
        crop = Image.fromarray(array).crop((left, top, left + width, top + height))
        crops.append(np.array(crop.resize((size[1], size[0]), resample)))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("resample", Image.Resampling)
def test_worker_resize_is_pillows(resample):
    array = noise(60, 90, low=90, high=166)
    boxes = random_boxes(12, 60, 90, scale=(0.05, 1.0))
    image, tensor = Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)
    expected = as_pillow(array, boxes, (32, 24), resample)
    for kind in (image, tensor) if resample in (2, 3) else (image,):
        ours = torch.stack([crop_and_resize(kind, box, (32, 24), resample) for box in boxes.tolist()])
        assert ours.dtype == torch.uint8
        assert (ours.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("source", [(28, 28), (40, 50), (120, 90), (17, 200)])
@pytest.mark.parametrize("target", [(8, 8), (32, 32), (24, 40), (97, 61), (5, 90)])
def test_device_resize_is_pillows(source, target):
    # Values that no overshoot takes out of the range, where the order of the passes would show.
    array = noise(*source, low=90, high=166)
    boxes = random_boxes(12, *source, scale=(0.02, 1.0))
    ours = crop_and_resize_batch(as_batch(array, 12), boxes, target)
    difference = (ours.int() - as_pillow(array, boxes, target).int()).abs()
    assert ours.shape == (12, 3, *target) and ours.dtype == torch.uint8
    assert difference.max() <= 2 and (difference > 1).float().mean() < 1e-3


@pytest.mark.parametrize("target", [8, 28, 64])
def test_device_resize_is_pillows_for_the_harshest_squares(target):
    array = noise(28, 28) // 128 * 255  # black and white
    boxes = random_boxes(12, 28, 28, scale=(0.2, 1.0), ratio=(1.0, 1.0))
    ours = crop_and_resize_batch(as_batch(array, 12), boxes, (target, target))
    assert (ours.int() - as_pillow(array, boxes, (target, target)).int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_box_of_the_targets_size_comes_back_untouched(channels):
    array = noise(20, 30, channels=channels)
    batch = as_batch(array, 2)
    crops = crop_and_resize_batch(batch, torch.tensor([[3, 7, 12, 16], [0, 0, 12, 16]]), (12, 16))
    assert torch.equal(crops, torch.stack([batch[0, :, 3:15, 7:23], batch[0, :, :12, :16]]))


def test_pillow_crop_of_the_targets_size_comes_back_untouched():
    array = noise(20, 30)
    crop = crop_and_resize(Image.fromarray(array), (3, 7, 12, 16), (12, 16), BICUBIC)
    assert np.array_equal(crop.permute(1, 2, 0), array[3:15, 7:23])


def test_each_picture_gets_its_own_box():
    batch = torch.from_numpy(noise(16, 16, channels=6)).permute(2, 0, 1).view(2, 3, 16, 16)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 2, 10, 12]])
    together = crop_and_resize_batch(batch, boxes, (8, 8))
    for i in range(2):
        assert torch.equal(together[i : i + 1], crop_and_resize_batch(batch[i : i + 1], boxes[i : i + 1], (8, 8)))
