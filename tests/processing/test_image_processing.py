"""MaskedImageProcessor: two halves that make one whole, the same numbers for the same keys, clear refusals."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked.processing.decoding import open_image
from hf_masked.processing.image_processing import AUGMENT, CROP, MASK, MaskedImageProcessor
from hf_masked.randomness import sample_keys

STRONG = {"jitter_probability": 0.8, "brightness": 0.4, "hue": 0.1, "blur_probability": 0.5, "blur_sigma": (0.1, 1.0)}
SMALL = {"size": 32, "mask_unit": 8}


def smooth(height: int, width: int, channels: int = 3) -> np.ndarray:
    """A picture without edges: (height, width, channels) or, for one channel, (height, width)."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(5 * rows + i) + np.cos(7 * columns - i * rows) for i in range(channels)]
    return (60 * np.stack(waves, axis=-1) + 127).astype(np.uint8).squeeze()


def pictures(count: int = 4) -> list[Image.Image]:
    return [Image.fromarray(smooth(40 + 7 * i, 60 - 5 * i)) for i in range(count)]


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("channels", [1, 3, 4, 13])
@pytest.mark.parametrize("size", [(32, 32), (224, 112)])
@pytest.mark.parametrize("training", [False, True])
def test_shapes_types_and_counts(channels, size, training):
    processor = MaskedImageProcessor(size=size, num_channels=channels, mask_unit=(16, 8), photometric=STRONG)
    images = [torch.from_numpy(smooth(50, 70, channels)), smooth(70, 50, channels)]
    inputs = processor(images, training=training)
    units = (size[0] // 16) * (size[1] // 8)
    assert inputs["pixel_values"].shape == (2, channels, *size)
    assert inputs["pixel_values"].dtype == torch.float32 and inputs["bool_masked_pos"].dtype == torch.bool
    assert inputs["bool_masked_pos"].shape == (2, units)
    assert inputs["bool_masked_pos"].sum(dim=1).tolist() == [units - units // 4] * 2
    assert (inputs["pixel_values"] - inputs["pixel_values"].mean()).abs().max() > 0.1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pillow_picture_and_its_array_agree(channels):
    # Opaque, because Pillow weighs colours by opacity.
    array = smooth(48, 48, channels)
    if channels == 4:
        array[..., 3] = 255
    processor = MaskedImageProcessor(num_channels=channels, image_mean=0.0, image_std=1 / 255, **SMALL)
    for seed in range(5):
        first, second = (
            processor(content, training=True, seed=seed)["pixel_values"] for content in (array, Image.fromarray(array))
        )
        assert (first - second).abs().max() <= 1.01


def test_one_picture_a_list_and_a_batch_are_alike():
    processor, array = MaskedImageProcessor(**SMALL), smooth(48, 48)
    batch = torch.from_numpy(array).permute(2, 0, 1)[None]
    inputs = [processor(content, seed=0) for content in (array, [array], batch, batch.numpy(), tuple(batch))]
    assert all(equal(inputs[0], other) for other in inputs[1:])


def test_files_are_opened(tmp_path):
    array = smooth(48, 48)
    Image.fromarray(array).save(tmp_path / "a.png")
    processor = MaskedImageProcessor(**SMALL)
    from_file = processor(str(tmp_path / "a.png"), seed=0)["pixel_values"]
    assert torch.equal(from_file, processor(Image.fromarray(array), seed=0)["pixel_values"])


def test_files_and_open_pictures_are_upright_and_keep_16_bits(tmp_path):
    array = np.array([[0, 65_535]] * 2, dtype=np.uint16).repeat(20, axis=0).repeat(20, axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.fromarray(array).save(tmp_path / "a.png", exif=exif)
    processor = MaskedImageProcessor(num_channels=1, image_mean=0.0, image_std=1.0, crop_fraction=1.0, **SMALL)
    for content in (str(tmp_path / "a.png"), tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        values = processor(content)["pixel_values"][0, 0]
        assert values[:12].max() < 0.1 and values[-12:].min() > 0.9


@pytest.mark.parametrize("training", [False, True])
def test_halves_make_the_whole(training):
    processor = MaskedImageProcessor(photometric=STRONG, **SMALL)
    keys = [sample_keys(5, 0, range(4), purpose=purpose) for purpose in (CROP, AUGMENT, MASK)]
    pixels = processor.prepare(pictures(), keys[0] if training else None)
    assert pixels.dtype == torch.uint8 and pixels.shape == (4, 3, 32, 32)
    halves = processor.finish(pixels, keys[1] if training else None, keys[2])
    assert equal(halves, processor(pictures(), training=training, seed=5))


def test_finish_training_is_finish_with_the_runs_keys():
    processor = MaskedImageProcessor(photometric=STRONG, **SMALL)
    pixels, indices = processor.prepare(pictures()), torch.tensor([9, 4, 7, 1])
    expected = processor.finish(
        pixels, sample_keys(3, 2, indices, purpose=AUGMENT), sample_keys(3, 2, indices, purpose=MASK)
    )
    assert equal(processor.finish_training(pixels, indices, seed=3, epochs=2), expected)
    assert equal(processor.finish_training(pixels, indices, seed=3, epochs=torch.full((4,), 2)), expected)


def test_resident_pictures_come_out_as_from_workers():
    processor = MaskedImageProcessor(**SMALL)
    arrays = [smooth(48, 40) // (i + 1) for i in range(3)]
    resident = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    for keys in (None, sample_keys(0, 1, range(3), purpose=CROP)):
        workers = processor.prepare([Image.fromarray(array) for array in arrays], keys)
        assert (processor.prepare_resident(resident, keys).int() - workers.int()).abs().max() <= 1


def test_seed_decides_everything_in_training():
    processor = MaskedImageProcessor(photometric=STRONG, **SMALL)
    inputs = processor(pictures(), training=True, seed=1)
    assert equal(inputs, processor(pictures(), training=True, seed=1))
    other = processor(pictures(), training=True, seed=2)
    assert not torch.equal(inputs["bool_masked_pos"], other["bool_masked_pos"])
    assert ((inputs["pixel_values"] - other["pixel_values"]).abs().amax(dim=(1, 2, 3)) > 0.01).all()


def test_torchs_generator_decides_without_a_seed():
    processor, masks = MaskedImageProcessor(**SMALL), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(processor(pictures())["bool_masked_pos"])
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_a_sample_does_not_depend_on_its_batch():
    processor = MaskedImageProcessor(photometric=STRONG, **SMALL)
    keys = [sample_keys(0, 0, range(4), purpose=purpose) for purpose in (CROP, AUGMENT, MASK)]

    def of(samples: slice) -> dict:
        pixels = processor.prepare(pictures()[samples], keys[0][samples])
        return processor.finish(pixels, keys[1][samples], keys[2][samples])

    for name, value in of(slice(2, 4)).items():
        torch.testing.assert_close(value, of(slice(0, 4))[name][2:], rtol=0, atol=1e-5)


def test_flip_mirrors_the_picture():
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    keys = sample_keys(0, 0, range(3))
    never, always = (
        MaskedImageProcessor(flip_probability=p, **SMALL).finish(pixels, keys)["pixel_values"] for p in (0.0, 1.0)
    )
    assert torch.equal(never.flip(-1), always) and not torch.equal(never, always)


def test_half_of_the_pictures_are_flipped():
    pixels = torch.arange(32, dtype=torch.uint8).expand(1000, 3, 32, 32)
    values = MaskedImageProcessor(**SMALL).finish(pixels, sample_keys(0, 0, range(1000)))["pixel_values"]
    flipped = (values[:, 0, 0, 0] > values[:, 0, 0, -1]).float().mean().item()
    assert flipped == pytest.approx(0.5, abs=5 * (0.25 / 1000) ** 0.5)


def test_values_are_normalised_per_channel_and_back():
    processor = MaskedImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0], mask_kind=None, **SMALL)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    values = processor.finish(pixels)["pixel_values"]
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 1.0), (0.3, 2.0))):
        torch.testing.assert_close(values[:, channel], (pixels[:, channel] / 255 - mean) / std)
    torch.testing.assert_close(processor.denormalize(values), pixels / 255)


def test_evaluation_is_resize_and_centre_crop():
    """The usual recipe: short side to 256, bicubic, centre crop 224."""
    for height, width in ((375, 500), (600, 400), (256, 256)):
        image = Image.fromarray(smooth(height, width))
        scale = 256 / min(height, width)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
        usual = np.asarray(resized.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1).astype(int)
        difference = np.abs(MaskedImageProcessor().prepare([image])[0].numpy() - usual)
        assert difference.mean() < 1 and difference.max() <= 4


def test_training_crops_are_of_the_set_size():
    """A picture whose colours tell the place: the crop's span is its share of the side."""
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    processor = MaskedImageProcessor(
        num_channels=1, crop_scale=(0.25, 0.25), crop_ratio=(1.0, 1.0), flip_probability=0.0, **SMALL
    )
    crops = processor.prepare([ramp] * 200, sample_keys(0, 0, range(200))).int()
    span = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert (span - 124).abs().max() <= 4  # 128 pixels wide, seen at the centres of 32 columns
    assert crops[:, 0, 0, 0].min() < 10 and crops[:, 0, 0, 0].max() > 118


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": (224, 112), "mask_unit": (16, 8), "mask_kind": "grid", "mask_options": {"regular": True}},
        {"num_channels": 13, "image_mean": 0.4, "image_std": list(range(1, 14)), "size": {"height": 32, "width": 64}},
        {"photometric": STRONG, "crop_scale": (0.5, 0.9), "crop_ratio": (1.0, 1.0), "flip_probability": 0.0},
        {"mask_kind": None, "size": 30, "resample": 2, "crop_fraction": 1.0},
        {"mask_kind": "model", **SMALL},
    ],
)
def test_saved_processor_comes_back(settings, tmp_path):
    processor = MaskedImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    loaded = MaskedImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    images = [smooth(50, 60, processor.num_channels)]
    assert equal(loaded(images, training=True, seed=0), processor(images, training=True, seed=0))


def test_means_follow_the_channels():
    assert MaskedImageProcessor().image_mean == [0.485, 0.456, 0.406]
    assert MaskedImageProcessor(num_channels=4, image_mean=0.2).image_mean == [0.2] * 4
    assert MaskedImageProcessor(num_channels=13).image_std == [0.5] * 13


def test_numpy_arrays_on_request():
    inputs = MaskedImageProcessor(**SMALL)(pictures(), return_tensors="np")
    assert isinstance(inputs["pixel_values"], np.ndarray) and inputs["bool_masked_pos"].dtype == bool


def test_no_mask_without_a_kind():
    assert list(MaskedImageProcessor(mask_kind=None, size=30)(pictures())) == ["pixel_values"]


def test_models_that_choose_their_masks_get_numbers_of_each_sample():
    processor = MaskedImageProcessor(mask_kind="model", **SMALL)
    inputs = processor(pictures(), training=True, seed=3)
    assert set(inputs) == {"pixel_values", "noise"} and inputs["noise"].shape == (4, 16)
    # The mask that MAE would get of the same numbers.
    masks = MaskedImageProcessor(**SMALL)(pictures(), training=True, seed=3)["bool_masked_pos"]
    assert torch.equal(inputs["noise"].argsort(dim=1).argsort(dim=1) >= 4, masks)
    keys = sample_keys(0, 0, [5, 2, 7], purpose=MASK)
    pixels = processor.prepare(pictures(3))
    together = processor.finish(pixels, mask_keys=keys)["noise"]
    assert torch.equal(together[1:2], processor.finish(pixels[1:2], mask_keys=keys[1:2])["noise"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 100}, "mask unit of 16 x 16 .* 100 x 100.*multiple"),
        ({"size": (32, 24), "mask_unit": (8, 16)}, "8 x 16 .* 32 x 24"),
        ({"size": {"shortest_edge": 224}}, "size is .*'height' and 'width'"),
        ({"size": 0}, "size"),
        ({"mask_unit": 0}, "mask"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1\.0"),
        ({"mask_ratio": -0.1}, r"mask_ratio is -0\.1"),
        ({"mask_kind": "blocks"}, "'blocks'; known are block, .*random"),
        ({"image_mean": [0.5, 0.5]}, "image_mean has 2 values for num_channels=3"),
        ({"num_channels": 1, "image_std": [0.1, 0.2, 0.3]}, "image_std has 3 values for num_channels=1"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale is"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale is"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio is"),
        ({"crop_fraction": 1.2}, r"crop_fraction is 1\.2"),
        ({"flip_probability": 1.5}, r"flip_probability is 1\.5"),
        ({"photometric": {"hue": 0.7}}, r"photometric\.hue is 0\.7"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MaskedImageProcessor(**settings)


def test_unfit_mask_options_are_named_at_once():
    """Not in the first batch of a run."""
    with pytest.raises(ValueError, match="window of 3"):
        MaskedImageProcessor(mask_kind="grid", mask_options={"window": 3})


def test_unknown_arguments_are_named():
    with pytest.raises(TypeError, match="do_resize"):
        MaskedImageProcessor(**SMALL)(pictures(), do_resize=False)


@pytest.mark.parametrize("content", [np.zeros((9, 9, 3)), np.zeros((9, 9, 2), np.uint8)])
def test_unfit_pictures_are_refused(content):
    with pytest.raises(ValueError, match="an array of"):
        MaskedImageProcessor(**SMALL)(content)


def test_cut_file_is_refused_by_name(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(smooth(200, 200)).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:-500])
    with pytest.raises(ValueError, match=r"cut\.jpg.*truncated"):
        MaskedImageProcessor(**SMALL)(str(tmp_path / "cut.jpg"))


def test_large_jpegs_are_decoded_no_larger_than_the_smallest_crop_needs():
    ramp = np.add.outer(np.arange(1500), np.arange(2000)) * (255 / 3500)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp] * 3, axis=-1).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    processor = MaskedImageProcessor(size=64, crop_scale=(0.2, 1.0))
    whole = open_image(buffer.getvalue(), "ramp")
    small = open_image(buffer.getvalue(), "ramp", processor.shrink)
    assert small.size == (250, 188)
    keys = sample_keys(0, 0, range(64))
    boxes = processor._boxes(torch.full((64,), 188), torch.full((64,), 250), keys)
    assert boxes[:, 2:].min() >= 64
    first, second = (processor.prepare([image] * 64, keys).int() for image in (whole, small))
    # Sizes are rounded, so that here and there a crop just fits in one and not in the other, where the next is taken.
    assert ((first - second).abs().amax(dim=(1, 2, 3)) <= 4).float().mean() > 0.9
    for settings in ({"size": 1000}, {"size": 64, "crop_scale": (0.001, 1.0)}, {"size": 64, "crop_fraction": 0.04}):
        shrink = MaskedImageProcessor(**settings, mask_kind=None).shrink
        assert open_image(buffer.getvalue(), "ramp", shrink).width == 2000
