"""The cache: the same pictures, smaller; labels and splits; bad pictures; half-written ones."""

import io
import multiprocessing
import pickle
import signal
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_masked.cli import main
from hf_masked.data import ImageDataset, KeyedSampler, collate_samples, labelled_tensors, load_images
from hf_masked.data.cached import CachedSource, write_cache
from hf_masked.data.sources import ArraySource, ImageSource
from hf_masked.processing.image_processing import MaskedImageProcessor


def photograph(value, size=(60, 40)):
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]))
    return Image.fromarray(np.stack([ramp + value, ramp * 2, np.full_like(ramp, value)], axis=-1).astype(np.uint8))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-masked", "cache", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return stop.code


@pytest.fixture
def folder(tmp_path):
    for split, values in (("train", range(8)), ("test", range(8, 12))):
        for value in values:
            path = tmp_path / "photos" / split / "ab"[value % 2] / f"{value:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(value, (60, 40) if value % 3 else (30, 20)).save(path)
    (tmp_path / "photos" / "train" / "a" / "99.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def test_one_command_keeps_splits_labels_and_pictures(folder, tmp_path, monkeypatch, capsys):
    options = ["--size", 32, "--num-workers", 2, "--max-bad-share", 0.2]
    assert not run(monkeypatch, folder, tmp_path / "cache", *options)
    said = capsys.readouterr().out
    assert "train: 8 pictures, 1 bad ones left out" in said and "test: 4 pictures\n" in said
    for split, count in (("train", 8), ("test", 4)):
        source, original = load_images(str(tmp_path / "cache"), split), load_images(str(folder), split)
        assert len(source) == count
        assert source.class_names == ["a", "b"]
        good = [index for index in range(len(original)) if not original.picture(index)[1].endswith("99.png")]
        assert torch.equal(source.labels(), original.labels()[good])
        for index, place in enumerate(good):
            expected = Image.open(original.picture(place)[0])
            if expected.height > 32:
                expected = expected.resize((48, 32), Image.Resampling.BICUBIC)
            difference = np.asarray(source.picture(index)[0]).astype(int) - np.asarray(expected)
            assert np.abs(difference).max() <= 1
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_images(str(tmp_path / "cache"), "validation")


def test_crops_come_from_the_cache_as_from_the_pictures(tmp_path):
    """Nothing is made smaller here, so that both give the same pixels, whichever way they are read."""
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 24, 36), dtype=np.uint8)
    source = ArraySource("noise", images, np.arange(12))
    write_cache({"train": source}, tmp_path / "cache", size=24)
    processor = MaskedImageProcessor(size=16)
    cached = ImageDataset(CachedSource(tmp_path / "cache", "train"), processor)

    def batches(dataset, num_workers):
        sampler = KeyedSampler(len(dataset))
        return list(DataLoader(dataset, 4, sampler=sampler, num_workers=num_workers, collate_fn=collate_samples))

    for first, second, third in zip(
        batches(ImageDataset(source, processor), 0), batches(cached, 0), batches(cached, 2), strict=True
    ):
        assert (first["pixels"].int() - second["pixels"].int()).abs().max() <= 1
        assert torch.equal(second["pixels"], third["pixels"])
        assert torch.equal(first["labels"], second["labels"])
    assert labelled_tensors(cached._pictures.source, processor)[0].shape == (12, 3, 16, 16)


@pytest.mark.parametrize("num_channels", [1, 4, 13])
def test_any_number_of_channels(tmp_path, num_channels):
    images = np.random.default_rng(0).integers(0, 256, (3, num_channels, 40, 20), dtype=np.uint8)
    write_cache({"train": ArraySource("bands", images)}, tmp_path / "cache", size=10, num_channels=num_channels)
    source = load_images(str(tmp_path / "cache"))
    processor = MaskedImageProcessor(size=10, num_channels=num_channels, mask_kind=None)
    assert source.labels() is None
    batch = ImageDataset(source, processor).__getitems__([(0, 0), (0, 2)])
    assert batch["pixels"].shape == (2, num_channels, 10, 10)
    mean = images.mean(axis=(2, 3))[[0, 2]]
    assert np.abs(batch["pixels"].float().mean(dim=(2, 3)).numpy() - mean).max() < 20


def test_workers_that_are_spawned_map_the_file(tmp_path):
    images = np.zeros((50, 3, 32, 32), dtype=np.uint8)
    write_cache({"train": ArraySource("zeros", images)}, tmp_path / "cache")
    source = CachedSource(tmp_path / "cache", "train")
    copy = pickle.dumps(source)
    assert len(copy) < 2000
    assert np.array_equal(np.asarray(pickle.loads(copy).picture(49)[0]), images[49].transpose(1, 2, 0))


def test_too_many_bad_pictures_and_existing_folders_are_refused(folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, folder, tmp_path / "cache", "--num-workers", 0) == 2
    assert "1 of 9 pictures are bad" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert run(monkeypatch, folder, folder) == 2
    assert "exists: remove it" in capsys.readouterr().err
    assert run(monkeypatch, folder, tmp_path / "cache", "--split", "validation") == 2
    assert "no split 'validation', but test and train" in capsys.readouterr().err


def test_a_file_that_was_cut_short_is_refused(tmp_path):
    write_cache({"train": ArraySource("zeros", np.zeros((4, 3, 8, 8), np.uint8))}, tmp_path / "cache")
    path = tmp_path / "cache" / "train" / "pixels.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="767 bytes, not 768: make the cache anew"):
        load_images(str(tmp_path / "cache"))


class SlowSource(ImageSource):
    name = "slow"

    def __len__(self):
        return 1000

    def picture(self, index):
        time.sleep(0.01)
        buffer = io.BytesIO()
        photograph(index).save(buffer, "PNG")
        return buffer.getvalue(), str(index)


def test_a_killed_command_leaves_no_cache_and_the_next_one_makes_it(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=write_cache, args=({"train": SlowSource()}, tmp_path / "cache")
    )
    process.start()
    pixels = tmp_path / "cache.partial" / "train" / "pixels.bin"
    while process.is_alive() and not (pixels.exists() and pixels.stat().st_size):
        time.sleep(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert pixels.exists() and not (tmp_path / "cache").exists()
    write_cache({"train": ArraySource("zeros", np.zeros((4, 3, 8, 8), np.uint8))}, tmp_path / "cache")
    assert len(load_images(str(tmp_path / "cache"))) == 4
    assert not (tmp_path / "cache.partial").exists()
