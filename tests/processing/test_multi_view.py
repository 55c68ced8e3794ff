"""MultiViewImageProcessor: views with draws of their own, outermost after the batch, one view without training."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked.data import ImageDataset, ResidentImageDataset, StreamingImageDataset, labelled_tensors
from hf_masked.data.sources import ArraySource
from hf_masked.processing.image_processing import AUGMENT, CROP, MaskedImageProcessor
from hf_masked.processing.multi_view import MultiViewImageProcessor
from hf_masked.processing.photometric import MOCO_V2
from hf_masked.randomness import sample_keys

SMALL = {"size": 16, "image_mean": 0.5, "image_std": 0.5}


def arrays(count: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, channels, 20, 24), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_views_are_outermost_after_the_batch(channels, views):
    processor = MultiViewImageProcessor(size=(16, 8), num_views=views, num_channels=channels)
    values = processor(list(arrays(channels=channels)), training=True, seed=0)["pixel_values"]
    assert values.shape == (4, views, channels, 16, 8) and values.dtype == torch.float32
    assert processor(list(arrays(channels=channels)))["pixel_values"].shape == (4, channels, 16, 8)


def test_each_view_is_the_crop_and_augmentation_of_its_own_keys():
    processor = MultiViewImageProcessor(photometric={"blur_probability": 0.5}, **SMALL)
    single = MaskedImageProcessor(photometric={"blur_probability": 0.5}, mask_kind=None, **SMALL)
    indices, images = torch.tensor([7, 3, 5, 0]), list(arrays())
    pixels = processor.prepare_training(images, indices, seed=2, epochs=1)
    values = processor.finish_training(pixels, indices, seed=2, epochs=1)["pixel_values"]
    assert pixels.shape == (4, 2, 3, 16, 16) and pixels.dtype == torch.uint8
    for view in range(2):
        crops = single.prepare(images, sample_keys(2, 1, indices, view, CROP))
        assert torch.equal(pixels[:, view], crops)
        expected = single.finish(crops, sample_keys(2, 1, indices, view, AUGMENT))["pixel_values"]
        torch.testing.assert_close(values[:, view], expected)
    assert (pixels[:, 0].int() - pixels[:, 1].int()).abs().flatten(1).max(dim=1).values.min() > 0


def test_resident_pictures_come_out_as_from_workers():
    processor = MultiViewImageProcessor(**SMALL)
    indices = torch.arange(4)
    pictures = [Image.fromarray(array.transpose(1, 2, 0)) for array in arrays()]
    workers = processor.prepare_training(pictures, indices, 0, 0)
    resident = processor.prepare_training(torch.from_numpy(arrays()), indices, 0, 0)
    assert (workers.int() - resident.int()).abs().max() <= 1


def test_halves_make_the_whole_and_the_seed_decides():
    processor = MultiViewImageProcessor(**SMALL)
    images, indices = list(arrays()), range(4)
    whole = processor(images, training=True, seed=5)["pixel_values"]
    halves = processor.finish_training(processor.prepare_training(images, indices, 5, 0), indices, 5, 0)
    assert torch.equal(whole, halves["pixel_values"])
    assert not torch.equal(whole, processor(images, training=True, seed=6)["pixel_values"])


def test_a_view_does_not_depend_on_its_batch():
    processor = MultiViewImageProcessor(**SMALL)
    images, indices = torch.from_numpy(arrays()), torch.arange(4)

    def of(part: slice) -> torch.Tensor:
        pixels = processor.prepare_training(images[part], indices[part], 0, 0)
        return processor.finish_training(pixels, indices[part], 0, 0)["pixel_values"]

    torch.testing.assert_close(of(slice(2, 4)), of(slice(0, 4))[2:], rtol=0, atol=1e-5)


def test_photometric_settings_may_differ_between_views():
    processor = MultiViewImageProcessor(
        photometric=[None, {"solarize_probability": 1.0}], flip_probability=0.0, **SMALL | {"image_mean": 0.0}
    )
    bright = torch.full((3, 2, 3, 16, 16), 204, dtype=torch.uint8)  # 0.8 of 255
    values = processor.finish_training(bright, torch.arange(3), 0, 0)["pixel_values"] * 0.5
    assert values[:, 0].unique().item() == pytest.approx(0.8) and values[:, 1].unique().item() == pytest.approx(0.2)


def test_moco_v2_is_the_default_and_none_stays_none(tmp_path):
    processor = MultiViewImageProcessor(**SMALL)
    assert {name: processor.photometric[name] for name in MOCO_V2} == MOCO_V2
    for photometric in (None, [{"hue": 0.1}, None]):
        saved = MultiViewImageProcessor(photometric=photometric, num_views=2, **SMALL)
        saved.save_pretrained(tmp_path)
        loaded = MultiViewImageProcessor.from_pretrained(tmp_path)
        assert loaded.photometric == saved.photometric and loaded.num_views == 2
        images = list(arrays())
        first, second = (p(images, training=True, seed=0)["pixel_values"] for p in (saved, loaded))
        assert torch.equal(first, second)


def test_denormalize_is_the_inverse_for_views():
    processor = MultiViewImageProcessor(photometric=None, flip_probability=0.0, **SMALL)
    pixels = torch.from_numpy(arrays(2)[:, None].repeat(2, axis=1))
    values = processor.finish(pixels)["pixel_values"]
    torch.testing.assert_close(processor.denormalize(values), pixels / 255)


def test_data_sets_hand_out_the_same_views():
    processor = MultiViewImageProcessor(**SMALL)
    source = ArraySource("noise", arrays(8), np.arange(8) % 2)
    keys = [(epoch, index) for epoch, index in zip([0, 0, 1, 1], [5, 2, 5, 7], strict=True)]
    read, resident = (
        kind(source, processor, seed=3).__getitems__(keys) for kind in (ImageDataset, ResidentImageDataset)
    )
    assert read["pixels"].shape == (4, 2, 3, 16, 16)
    assert (read["pixels"].int() - resident["pixels"].int()).abs().max() <= 1
    assert not torch.equal(read["pixels"][0], read["pixels"][2]), "another epoch has other crops"
    evaluation = ImageDataset(source, processor, training=False).__getitems__(keys)["pixels"]
    assert evaluation.shape == (4, 3, 16, 16)
    assert labelled_tensors(source, processor)[0].shape == (8, 3, 16, 16)


def test_streams_hand_out_views(tmp_path):
    import datasets

    from hf_masked.data.sources import StreamingImageSource

    images = [Image.fromarray(array.transpose(1, 2, 0)) for array in arrays(5)]
    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.Dataset.from_dict({"image": images}, features=features).to_iterable_dataset()
    source = StreamingImageSource(stream, "stream")
    samples = list(StreamingImageDataset(source, MultiViewImageProcessor(**SMALL)))
    assert len(samples) == 5 and all(sample["pixels"].shape == (2, 3, 16, 16) for sample in samples)


def test_pictures_are_shown_as_fixed_views():
    processor = MultiViewImageProcessor(**SMALL)
    pixels = processor.prepare(list(arrays()))
    first, second = processor.picture_inputs(pixels), processor.picture_inputs(pixels)
    assert first.shape == (4, 2, 3, 16, 16) and torch.equal(first, second)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_views": 0}, "num_views is 0"),
        ({"num_views": 2, "photometric": [None]}, "settings for 1 views and num_views is 2"),
        ({"photometric": [None, {"hue": 0.7}]}, "photometric.hue is 0.7"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiViewImageProcessor(**settings)


def pictures(count: int) -> list[Image.Image]:
    """Of several sizes, each pixel's value telling where it is: red its column, green its row."""
    made = []
    for number in range(count):
        height, width = 40 + 3 * number, 60 - 5 * number
        rows, columns = np.mgrid[:height, :width]
        made.append(Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)))
    return made


def replayed(picture: Image.Image, box, flipped, size: int) -> torch.Tensor:
    top, left, height, width = box.tolist()
    crop = picture.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
    return pixels.flip(-1) if flipped else pixels


def test_returned_boxes_replay_the_views():
    processor = MultiViewImageProcessor(16, num_views=3, photometric=None, image_mean=0.0, image_std=1.0)
    images = pictures(4)
    made = processor(images, training=True, seed=3, return_boxes=True)
    assert made["boxes"].shape == (4, 3, 4) and made["flipped"].shape == (4, 3)
    assert made["flipped"].any() and not made["flipped"].all()
    for sample in range(4):
        for view in range(3):
            expected = replayed(images[sample], made["boxes"][sample, view], made["flipped"][sample, view], 16)
            assert (made["pixel_values"][sample, view] - expected).abs().max() <= 2 / 255


def test_returned_boxes_replay_single_pictures_with_and_without_training():
    processor = MaskedImageProcessor(size=16, mask_kind=None, image_mean=0.0, image_std=1.0)
    images = pictures(4)
    for training in (True, False):
        made = processor(images, training=training, seed=3, return_boxes=True)
        assert made["boxes"].shape == (4, 4) and bool(made["flipped"].any()) == training
        for image, box, flipped, values in zip(
            images, made["boxes"], made["flipped"], made["pixel_values"], strict=True
        ):
            assert (values - replayed(image, box, flipped, 16)).abs().max() <= 2 / 255


def test_each_picture_of_a_set_gives_one_view():
    processor = MultiViewImageProcessor(16, photometric=None, image_mean=0.0, image_std=1.0)
    images = pictures(6)
    pairs = [images[:2], images[2:4], images[4:]]
    made = processor(pairs, training=True, seed=3, return_boxes=True)
    assert made["pixel_values"].shape == (3, 2, 3, 16, 16)
    for pair, boxes, flips, values in zip(pairs, made["boxes"], made["flipped"], made["pixel_values"], strict=True):
        for image, box, flipped, view in zip(pair, boxes, flips, values, strict=True):
            assert (view - replayed(image, box, flipped, 16)).abs().max() <= 2 / 255
    assert processor(pairs)["pixel_values"].shape == (3, 2, 3, 16, 16)
    with pytest.raises(ValueError, match="3 pictures and num_views is 2"):
        processor([images[:3]], training=True)


def test_resident_sets_come_out_as_lists_of_pictures():
    processor = MultiViewImageProcessor(**SMALL)
    sets = torch.from_numpy(arrays(6)).unflatten(0, (3, 2))
    listed = [list(pair) for pair in sets]
    for made in ("training", "evaluation"):
        arguments = (torch.arange(3), 1, 2) if made == "training" else ()
        resident, lists = (processor.prepare_training, processor.prepare_training) if arguments else (
            processor.prepare_resident, processor.prepare
        )  # fmt: skip
        difference = resident(sets, *arguments).int() - lists(listed, *arguments).int()
        assert difference.shape == (3, 2, 3, 16, 16) and difference.abs().max() <= 1
