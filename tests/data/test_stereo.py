"""Pairs that are made obey the geometry that they claim; folders; the data set of training."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked.data import StereoDataset, SyntheticStereo
from hf_masked.data import stereo as data
from hf_masked.data.stereo import StereoFolder, load_stereo
from hf_masked.modeling.parts.stereo import warp_to_left
from hf_masked.processing.stereo import StereoImageProcessor

SIZE = (48, 96)


def small_set(**settings) -> SyntheticStereo:
    return SyntheticStereo(**{"length": 6, "size": SIZE, "max_disparity": 24} | settings)


def both_views(index: int, monkeypatch, **settings):
    """Colours and disparities that the left and the right camera see, before exposure."""
    seen, see = [], data._seen
    monkeypatch.setattr(data, "_seen", lambda *arguments: seen.append(see(*arguments)) or seen[-1])
    sample = small_set(noise=0.0, **settings).sample(index)
    return sample, *seen


def test_a_sample_is_a_function_of_seed_and_index():
    first, again, other, later = (
        small_set(seed=seed).sample(index) for seed, index in ((0, 3), (0, 3), (1, 3), (0, 4))
    )
    for name in ("left", "right", "disparity"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
        assert not torch.equal(getattr(first, name), getattr(later, name))
    assert first.left.dtype == torch.uint8 and first.left.shape == (3, *SIZE)


@pytest.mark.parametrize("slant", [0.0, 0.3])
@pytest.mark.parametrize("index", range(3))
def test_what_both_cameras_see_lies_at_the_disparity(index, slant, monkeypatch):
    sample, (left, disparity), (right, seen_right) = both_views(index, monkeypatch, slant=slant)
    assert torch.equal(sample.disparity, disparity)
    moved = warp_to_left(right[None], disparity[None])[0]
    behind = warp_to_left(seen_right[None, None], disparity[None])[0, 0]
    inside = torch.arange(SIZE[1]) - disparity >= 0
    visible = inside & ((behind - disparity).abs() < 0.05)
    assert 0.5 < visible.float().mean() < 1
    errors = (moved - left).abs().mean(dim=0)
    assert errors[visible].median() < 0.02 < errors[inside & ~visible].median()
    # What hides a pixel from the right camera is nearer; a quarter of a pixel is the interpolation's.
    assert (behind[inside] >= disparity[inside] - 0.25).float().mean() > 0.97


def test_disparities_stay_in_their_range_and_use_it():
    found = torch.stack([small_set(length=30).sample(index).disparity for index in range(30)])
    assert found.min() > 0 and found.max() < 24
    assert found.max() > 12 and found.std() > 2


def test_without_slant_disparities_are_piecewise_constant():
    disparity = small_set(slant=0.0).sample(0).disparity
    assert 2 <= len(disparity.unique()) <= data.LAYERS[1] + 1


def test_exposure_differs_between_the_cameras():
    clean, noisy = (small_set(noise=noise).sample(0).left.float() for noise in (0.0, 8.0))
    assert 0 < (clean - noisy).abs().mean() < 8


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    assert small_set(num_channels=channels).sample(0).left.shape == (channels, *SIZE)


def test_too_small_disparities_are_refused():
    with pytest.raises(ValueError, match="max_disparity is 1"):
        small_set(max_disparity=1)


def write_folder(folder, count: int = 3):
    for part in ("left", "right", "disparity"):
        (folder / "train" / part).mkdir(parents=True)
    samples = [small_set().sample(index) for index in range(count)]
    for index, sample in enumerate(samples):
        for part in ("left", "right"):
            picture = Image.fromarray(getattr(sample, part).permute(1, 2, 0).numpy())
            picture.save(folder / "train" / part / f"{index:03d}.png")
        values = (256 * sample.disparity).round().numpy().astype(np.uint16)
        Image.fromarray(values).save(folder / "train" / "disparity" / f"{index:03d}.png")
    return samples


def test_folders_give_what_was_written(tmp_path):
    samples = write_folder(tmp_path)
    source = load_stereo(str(tmp_path), "train", SIZE, 24)
    assert len(source) == 3
    for index, sample in enumerate(samples):
        read = source.sample(index)
        assert torch.equal(read.left, sample.left) and torch.equal(read.right, sample.right)
        torch.testing.assert_close(read.disparity, sample.disparity, rtol=0, atol=1 / 512)
    with pytest.raises(ValueError, match="There are no pictures"):
        StereoFolder(tmp_path, "test")
    (tmp_path / "train" / "right" / "001.png").unlink()
    with pytest.raises(ValueError, match="no disparity for 001"):
        StereoFolder(tmp_path)


def test_splits_of_synthetic_pairs_differ():
    train, test = (load_stereo("synthetic_stereo", split, SIZE, 24) for split in ("train", "test"))
    assert not torch.equal(train.sample(0).left, test.sample(0).left)
    with pytest.raises(ValueError, match="no split 'validate'"):
        load_stereo("synthetic_stereo", "validate", SIZE, 24)


def test_dataset_cuts_pair_and_disparity_at_one_place_by_epoch_and_index():
    source, processor = small_set(), StereoImageProcessor(size=(32, 48))
    dataset = StereoDataset(source, processor, seed=5)
    batch = dataset.__getitems__([(0, 2), (1, 2), (0, 4)])
    assert batch["pixels"].shape == (3, 2, 3, 32, 48) and batch["targets"].shape == (3, 32, 48)
    again = dataset.__getitems__([(0, 4), (1, 2)])
    assert torch.equal(batch["pixels"][[2, 1]], again["pixels"])
    assert torch.equal(batch["targets"][[2, 1]], again["targets"])
    assert not torch.equal(batch["pixels"][0], batch["pixels"][1])
    for row, index in enumerate((2, 2, 4)):
        sample = source.sample(index)
        places = [
            (top, left)
            for top in range(SIZE[0] - 31)
            for left in range(SIZE[1] - 47)
            if torch.equal(sample.left[:, top : top + 32, left : left + 48], batch["pixels"][row, 0])
        ]
        assert len(places) == 1
        top, left = places[0]
        window = (slice(top, top + 32), slice(left, left + 48))
        assert torch.equal(sample.right[:, *window], batch["pixels"][row, 1])
        assert torch.equal(sample.disparity[window], batch["targets"][row])


def test_a_pair_that_cannot_be_read_is_replaced_and_named(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "left" / "001.png").write_bytes(b"no picture")
    dataset = StereoDataset(StereoFolder(tmp_path), StereoImageProcessor(size=(32, 48)))
    batch = dataset.__getitems__([(0, 0), (0, 1)])
    assert batch["indices"].tolist() == [0, 2] and len(batch["bad"]) == 1 and "001.png" in batch["bad"][0]
    for path in (tmp_path / "train" / "left").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="No pair of"):
        dataset.__getitems__([(0, 0)])
