"""CropPairImageProcessor: where the views come from, tested by replay of the boxes; flips, masks, keys."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked import CropPairImageProcessor
from hf_masked.data import ImageDataset, ResidentImageDataset
from hf_masked.data.sources import ArraySource
from hf_masked.processing import views
from hf_masked.processing.crop_pairs import STRATEGIES
from hf_masked.processing.image_processing import BICUBIC
from hf_masked.randomness import given_draw, keyed_draw, sample_keys

SMALL = {"size": 32, "mask_unit": 8, "mask_ratio": 0.9, "image_mean": 0.0, "image_std": 1.0}
CROPS = [strategy for strategy in STRATEGIES if strategy != "frames"]


def pictures(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(256, (count, 3, 40, 56), dtype=torch.uint8, generator=generator))


def replayed(image: torch.Tensor, box, flipped) -> torch.Tensor:
    """What the box says, uint8 (channels, 32, 32)."""
    crop = views.crop_and_resize(image, tuple(box.tolist()), (32, 32), BICUBIC)
    return crop.flip(-1) if flipped else crop


def made(strategy: str, images: list, **settings):
    processor = CropPairImageProcessor(strategy=strategy, **SMALL | settings)
    return processor(images, training=True, seed=3, return_boxes=True)


def bytes_of(values: torch.Tensor) -> torch.Tensor:
    return (values * 255).round().to(torch.uint8)


@pytest.mark.parametrize("strategy", ["global_to_local", "local_to_global"])
def test_the_local_view_is_a_crop_of_the_resized_global_one(strategy):
    images = pictures()
    batch = made(strategy, images)
    whole, part = (0, 1) if strategy == "global_to_local" else (1, 0)
    for number, image in enumerate(images):
        found, boxes, flipped = (batch[name][number] for name in ("pixel_values", "boxes", "flipped"))
        assert torch.equal(bytes_of(found[whole]), replayed(image, boxes[whole], flipped[whole]))
        unflipped = replayed(image, boxes[whole], flipped=False)
        assert torch.equal(bytes_of(found[part]), replayed(unflipped, boxes[part], flipped[part]))
        top, left, height, width = boxes[part].tolist()
        assert min(top, left) >= 0 and top + height <= 32 and left + width <= 32
        assert 0.25 <= height * width / 32**2 <= 0.65, "0.3 to 0.6, and what rounding adds"


def test_random_views_are_two_crops_of_the_picture():
    images = pictures()
    batch = made("random_views", images)
    for number, image in enumerate(images):
        for view in range(2):
            expected = replayed(image, batch["boxes"][number, view], batch["flipped"][number, view])
            assert torch.equal(bytes_of(batch["pixel_values"][number, view]), expected)
    assert (batch["boxes"][:, 0] != batch["boxes"][:, 1]).any(dim=1).all()


def test_same_views_are_one_view_twice_photometric_changes_included():
    batch = made("same_views", pictures(), photometric={"jitter_probability": 1.0, "brightness": 0.4})
    assert torch.equal(batch["pixel_values"][:, 0], batch["pixel_values"][:, 1])
    assert torch.equal(batch["boxes"][:, 0], batch["boxes"][:, 1])


def test_frames_share_crop_and_flip():
    images = pictures(16)
    pairs = [list(pair) for pair in zip(images[::2], images[1::2], strict=True)]
    batch = made("frames", pairs, crop_scale=(0.5, 1.0))
    assert batch["pixel_values"].shape == (8, 2, 3, 32, 32)
    assert torch.equal(batch["boxes"][:, 0], batch["boxes"][:, 1])
    assert (
        torch.equal(batch["flipped"][:, 0], batch["flipped"][:, 1]) and len(set(batch["flipped"][:, 0].tolist())) == 2
    )
    for number, pair in enumerate(pairs):
        for view, image in enumerate(pair):
            expected = replayed(image, batch["boxes"][number, view], batch["flipped"][number, view])
            assert torch.equal(bytes_of(batch["pixel_values"][number, view]), expected)


@pytest.mark.parametrize("strategy", ["global_to_local", "local_to_global", "random_views"])
def test_views_of_crops_are_flipped_independently(strategy):
    processor = CropPairImageProcessor(strategy=strategy, **SMALL)
    flipped = processor(pictures(1) * 400, training=True, seed=0, return_boxes=True)["flipped"].float()
    assert flipped.mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.08)
    assert (flipped[:, 0] == flipped[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_boxes_are_clamped_and_never_drawn_again():
    """`RRC.get_params` of the reference, written out for numbers that are given."""
    numbers = torch.tensor([[0.99, 0.0, 0.5, 0.999], [0.99, 0.999999, 0.5, 0.0], [0.0, 0.5, 0.999, 0.5]])
    heights, widths = torch.tensor([30, 30, 40]), torch.tensor([60, 60, 40])
    boxes = views.clamped_crop_boxes(given_draw(numbers), heights, widths, (0.25, 1.0))
    for box, (area, ratio, top, left), height, width in zip(
        boxes.tolist(), numbers.tolist(), heights.tolist(), widths.tolist(), strict=True
    ):
        target = height * width * (0.25 + 0.75 * area)
        aspect = np.exp(np.log(3 / 4) + ratio * (np.log(4 / 3) - np.log(3 / 4)))
        w, h = min(round((target * aspect) ** 0.5), width), min(round((target / aspect) ** 0.5), height)
        assert box == [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
    assert boxes[0, 2] == 30, "49 rows were asked for"


def test_areas_are_uniform_where_nothing_is_clamped():
    draw = keyed_draw(sample_keys(0, 0, torch.arange(4000)))
    side = torch.full((4000,), 1000)
    top, left, height, width = views.clamped_crop_boxes(draw, side, side, (0.3, 0.6)).unbind(dim=1)
    area = height * width / 1e6
    quantiles = torch.quantile(area, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.33, 0.45, 0.57]), atol=0.01, rtol=0)
    assert (top + height <= 1000).all() and (left + width <= 1000).all()
    assert (width / height).log().mean().abs() < 0.01


def test_the_mask_is_the_second_views_with_exactly_two_of_196_patches():
    processor = CropPairImageProcessor()
    batch = processor(pictures(6), training=True, seed=0)
    assert batch["bool_masked_pos"].shape == (6, 196) and ((~batch["bool_masked_pos"]).sum(dim=1) == 2).all()
    assert len({tuple(mask.tolist()) for mask in batch["bool_masked_pos"]}) == 6
    keys = processor.keys_for(range(6), 0, 0, 2)[:, 1]
    noise = keyed_draw(keys)(196)
    assert torch.equal(
        (~batch["bool_masked_pos"]).nonzero()[:, 1], noise.topk(2, largest=False).indices.sort().values.flatten()
    )


def test_without_training_a_picture_comes_alone_and_unmasked_and_frames_stay_pairs():
    single = CropPairImageProcessor(**SMALL)(pictures(3))
    assert set(single) == {"pixel_values"} and single["pixel_values"].shape == (3, 3, 32, 32)
    images = pictures(4)
    pairs = CropPairImageProcessor(strategy="frames", **SMALL)([images[:2], images[2:]])
    assert pairs["pixel_values"].shape == (2, 2, 3, 32, 32) and pairs["bool_masked_pos"].shape == (2, 16)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resident_pictures_come_out_as_from_workers(strategy):
    processor = CropPairImageProcessor(strategy=strategy, **SMALL)
    images = torch.stack(pictures(8))
    images = images.unflatten(0, (4, 2)) if strategy == "frames" else images[:4]
    as_list = [list(pair) for pair in images] if strategy == "frames" else list(images)
    workers = processor.prepare_training(as_list, range(4), 0, 0)
    resident = processor.prepare_training(images, range(4), 0, 0)
    assert workers.shape == resident.shape == (4, 2, 3, 32, 32)
    # Rounding of the global view is resized once more in the local one.
    assert (workers.int() - resident.int()).abs().max() <= 2


@pytest.mark.parametrize("strategy", CROPS)
def test_a_pair_does_not_depend_on_its_batch(strategy):
    processor = CropPairImageProcessor(strategy=strategy, **SMALL)
    source = ArraySource("noise", torch.stack(pictures()).numpy())
    keys = [(epoch, index) for epoch, index in zip([0, 0, 1], [5, 2, 5], strict=True)]
    for kind in (ImageDataset, ResidentImageDataset):
        together = kind(source, processor, seed=3).__getitems__(keys)
        alone = kind(source, processor, seed=3).__getitems__(keys[:1])
        assert torch.equal(together["pixels"][0], alone["pixels"][0])
        assert not torch.equal(together["pixels"][0], together["pixels"][2]), "another epoch has other crops"
    finished = [processor.finish_training(b["pixels"], b["indices"], 3, b["epoch"]) for b in (together, alone)]
    assert torch.equal(finished[0]["bool_masked_pos"][0], finished[1]["bool_masked_pos"][0])


def test_pictures_for_people_are_pairs():
    processor = CropPairImageProcessor(**SMALL)
    prepared = processor.prepare([Image.new("RGB", (50, 40), "red"), Image.new("RGB", (40, 50), "blue")])
    inputs = processor.picture_inputs(prepared)
    assert inputs.shape == (2, 2, 3, 32, 32) and torch.equal(inputs, processor.picture_inputs(prepared))


def test_settings_survive_saving(tmp_path):
    processor = CropPairImageProcessor(
        strategy="local_to_global", local_crop_scale=(0.2, 0.3), photometric=[{"hue": 0.1}, None], **SMALL
    )
    processor.save_pretrained(tmp_path)
    assert CropPairImageProcessor.from_pretrained(tmp_path).to_dict() == processor.to_dict()


def test_wrong_settings_and_samples_are_named():
    with pytest.raises(ValueError, match=r"'crops'; it must be one of global_to_local"):
        CropPairImageProcessor(strategy="crops")
    with pytest.raises(ValueError, match="num_views is 3"):
        CropPairImageProcessor(num_views=3)
    with pytest.raises(ValueError, match="local_crop_scale"):
        CropPairImageProcessor(local_crop_scale=(0.6, 0.3))
    with pytest.raises(ValueError, match="random_views, frames"):
        CropPairImageProcessor(**SMALL)([pictures(2)], training=True)
    with pytest.raises(ValueError, match="takes pairs of pictures"):
        CropPairImageProcessor(strategy="frames", **SMALL)(pictures(2), training=True)
