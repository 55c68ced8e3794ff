"""Pairs in, pairs of one cut out; predictions back at the pictures' size; files of disparities."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_masked import PSMNetForStereoMatching
from hf_masked.modeling.siamese.psmnet import tiny_config
from hf_masked.processing.decoding import BadImageError
from hf_masked.processing.stereo import StereoImageProcessor, read_disparity


def pairs(count: int = 2, height: int = 40, width: int = 70, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, 2, 3, height, width), dtype=torch.uint8, generator=generator)
    return [list(pair) for pair in pixels]


def test_views_and_disparity_are_the_pixels_of_the_box():
    processor, images = StereoImageProcessor(size=(24, 32)), pairs()
    disparities = [pair[0].float().sum(dim=0) for pair in images]
    batch = processor(images, disparities=disparities, training=True, seed=3, return_boxes=True)
    assert batch["pixel_values"].shape == (2, 2, 3, 24, 32) and batch["labels"].shape == (2, 24, 32)
    values = (255 * processor.denormalize(batch["pixel_values"])).round().to(torch.uint8)
    assert len(set(map(tuple, batch["boxes"].tolist()))) == 2
    for pair, (top, left, height, width), views, labels in zip(
        images, batch["boxes"].tolist(), values, batch["labels"], strict=True
    ):
        assert 0 <= top <= 16 and 0 <= left <= 38
        for picture, view in zip(pair, views, strict=True):
            assert torch.equal(picture[:, top : top + height, left : left + width], view)
        assert torch.equal(pair[0].float().sum(dim=0)[top : top + height, left : left + width], labels)
    again = processor(images, training=True, seed=3)
    assert torch.equal(again["pixel_values"], batch["pixel_values"])


def test_crops_reach_every_place():
    processor, images = StereoImageProcessor(size=(38, 68)), pairs(count=64)
    boxes = processor(images, training=True, seed=0, return_boxes=True)["boxes"]
    assert set(boxes[:, 0].tolist()) == set(boxes[:, 1].tolist()) == {0, 1, 2}


def test_padding_is_at_the_top_and_on_the_right():
    processor, images = StereoImageProcessor(), pairs(count=1)
    batch = processor(images[0], disparities=[torch.ones(40, 70)], return_boxes=True)
    assert batch["pixel_values"].shape == (1, 2, 3, 48, 80) and batch["boxes"].tolist() == [[-8, 0, 48, 80]]
    values = (255 * processor.denormalize(batch["pixel_values"])).round().to(torch.uint8)[0]
    assert torch.equal(values[:, :, 8:, :70], torch.stack(images[0]))
    padding = torch.cat([batch["pixel_values"][0, :, :, :8].flatten(), batch["pixel_values"][0, ..., 70:].flatten()])
    assert padding.abs().max() < 0.01
    assert batch["labels"].sum() == 40 * 70 and batch["labels"][0, 8:, :70].all()


def test_pictures_smaller_than_the_crop_are_padded():
    processor = StereoImageProcessor(size=(64, 64))
    batch = processor(pairs(), disparities=[torch.ones(40, 70)] * 2, training=True, seed=0, return_boxes=True)
    assert batch["boxes"][:, 0].tolist() == [-24, -24]
    assert torch.equal(batch["labels"].sum(dim=(1, 2)), torch.full((2,), 40.0 * 64))


def test_prediction_has_the_pictures_size():
    # Section 11: the padding's round trip, on a 250 x 330 picture.
    model, processor = PSMNetForStereoMatching(tiny_config()).eval(), StereoImageProcessor()
    with torch.no_grad():
        outputs = model(processor(pairs(1, 250, 330))["pixel_values"])
    assert outputs.predicted_disparity.shape == (1, 256, 336)
    found = processor.post_process_stereo_matching(outputs, target_sizes=[(250, 330)])[0]["predicted_disparity"]
    assert torch.equal(found, outputs.predicted_disparity[0, 6:, :330])


def test_post_processing_takes_the_padding_off_and_gives_depth():
    processor, outputs = StereoImageProcessor(), SimpleNamespace(predicted_disparity=torch.full((2, 16, 32), 4.0))
    whole = processor.post_process_stereo_matching(outputs)
    assert whole[1]["predicted_disparity"].shape == (16, 32) and "predicted_depth" not in whole[0]
    found = processor.post_process_stereo_matching(outputs, torch.tensor([[10, 20]] * 2), 800.0, 0.5)
    assert torch.equal(found[0]["predicted_depth"], torch.full((10, 20), 100.0))
    with pytest.raises(ValueError, match="both focal_length"):
        processor.post_process_stereo_matching(outputs, focal_length=800.0)
    with pytest.raises(ValueError, match="1 target sizes and 2 predictions"):
        processor.post_process_stereo_matching(outputs, [(16, 32)])
    with pytest.raises(ValueError, match="before padding"):
        processor.post_process_stereo_matching(outputs, [(17, 32)] * 2)


def test_files_and_pictures_are_taken(tmp_path):
    left, right = (Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pairs(1)[0])
    left.save(tmp_path / "left.png")
    right.save(tmp_path / "right.png")
    Image.fromarray(np.full((40, 70), 512, dtype=np.uint16)).save(tmp_path / "disparity.png")
    processor = StereoImageProcessor()
    files = [str(tmp_path / "left.png"), str(tmp_path / "right.png")]
    batch = processor([files], disparities=[str(tmp_path / "disparity.png")])
    assert torch.equal(batch["pixel_values"], processor([left, right])["pixel_values"])
    assert batch["labels"].max() == 2.0 and processor.picture_size(files[0]) == (40, 70)


def test_what_is_no_pair_is_refused():
    processor, (pair, _) = StereoImageProcessor(), pairs()
    with pytest.raises(ValueError, match=r"pair, \(left, right\)"):
        processor([[pair[0], pair[1], pair[0]]])
    with pytest.raises(ValueError, match="rectified pairs have one size"):
        processor([pair[0], pair[1][:, :20]])
    for settings in ({"flip_probability": 0.5}, {"crop_scale": (0.2, 1.0)}, {"photometric": {"brightness": 0.4}}):
        with pytest.raises(ValueError, match="neither resizes, mirrors nor recolours"):
            StereoImageProcessor(**settings)


def test_it_survives_a_round_trip(tmp_path):
    processor = StereoImageProcessor(size=(32, 64), pad_multiple=32)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is StereoImageProcessor and loaded.to_dict() == processor.to_dict()


def test_disparity_files(tmp_path):
    values = np.array([[0, 256, 300], [65535, 1, 512]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "kitti.png")
    torch.testing.assert_close(read_disparity(tmp_path / "kitti.png"), torch.from_numpy(values.astype("f4")) / 256)
    Image.fromarray(np.array([[0, 10]], dtype=np.uint8)).save(tmp_path / "middlebury.png")
    assert read_disparity(tmp_path / "middlebury.png", scale=4).tolist() == [[0.0, 2.5]]
    # Rows from the bottom to the top; infinite where nothing is known; Scene Flow has negative ones too.
    body = struct.pack("<6f", 4.0, 5.0, 6.0, -1.5, float("inf"), 3.0)
    assert read_disparity(b"Pf\n3 2\n-1.0\n" + body).tolist() == [[1.5, 0.0, 3.0], [4.0, 5.0, 6.0]]
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    for content in (b"Pf\n3 2\n-1.0\n" + body[:-4], b"Pf\n3\n", b"nothing", (tmp_path / "colour.png").read_bytes()):
        with pytest.raises(BadImageError):
            read_disparity(content)
