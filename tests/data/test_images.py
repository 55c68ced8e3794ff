"""Torch data sets: the same draws whatever the workers and the order, bad pictures, samplers, streams."""

import io
import logging
import multiprocessing
import os
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from PIL import Image
from torch.utils.data import DataLoader

import hf_masked.data.images as images_module
from hf_masked.data import (
    BadImageLog,
    ImageDataset,
    KeyedSampler,
    ResidentImageDataset,
    StreamingImageDataset,
    StreamPosition,
    collate_samples,
    labelled_tensors,
    load_images,
)
from hf_masked.data.sources import ArraySource, ImageSource
from hf_masked.processing.image_processing import MaskedImageProcessor

CIFAR10 = Path(__file__).parents[3] / "shared/data/cifar10"


@pytest.fixture(autouse=True)
def local_cache(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    # datasets waits for its reading threads at the end of a shuffled stream.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    datasets.disable_progress_bars()


@pytest.fixture
def processor():
    return make_processor()


def make_processor(num_channels=3, size=8):
    return MaskedImageProcessor(
        size=size, num_channels=num_channels, image_mean=0.5, image_std=0.5, mask_unit=4, crop_fraction=1.0
    )


def noise(n=40, channels=3, size=12, seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    return ArraySource("noise", images, np.arange(n) % 4)


class CountingSource(ImageSource):
    """Encoded pictures in memory; None stands for a bad one. Counts what it is asked for."""

    name = "counting"

    def __init__(self, values, labels=None):
        self.values = values
        self.asked = []
        self._labels = labels

    def __len__(self):
        return len(self.values)

    def picture(self, index):
        self.asked.append(index)
        value = self.values[index]
        return (b"" if value is None else encoded(value)), f"picture {index}"

    def labels(self):
        return self._labels


def encoded(value):
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def png_of_size(width, height):
    """The beginning of a PNG file: enough to tell its size, and nothing to decode."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def loader(dataset, seed=0, batch_size=8, num_workers=0, **options):
    sampler = KeyedSampler(len(dataset), seed)
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate_samples, **options
    )


def by_index(batches):
    return {
        index: pixels
        for batch in batches
        for index, pixels in zip(batch["indices"].tolist(), batch["pixels"], strict=True)
    }


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]


def test_batches_do_not_depend_on_workers(processor):
    dataset = ImageDataset(CountingSource([None, *range(1, 24)]), processor, max_bad_share=0.1)
    alone, together = list(loader(dataset)), list(loader(dataset, num_workers=2))
    assert len(alone) == len(together) == 3
    for first, second in zip(alone, together, strict=True):
        assert_equal(first, second)


def test_crops_depend_on_epoch_and_index_alone(processor):
    dataset = ImageDataset(noise(), processor, seed=3)
    keys = [(1, index) for index in range(40)]
    whole = dataset.__getitems__(keys)
    part = dataset.__getitems__([keys[17], keys[2]])
    assert torch.equal(part["pixels"], whole["pixels"][[17, 2]])
    assert part["labels"].tolist() == [17 % 4, 2]
    assert part["epoch"] == 1
    other_epoch = dataset.__getitems__([(2, 17), (2, 2)])["pixels"]
    assert not torch.equal(part["pixels"], other_epoch)
    mixed = dataset.__getitems__([(2, 17), (1, 2)])["pixels"]
    assert torch.equal(mixed, torch.stack([other_epoch[0], part["pixels"][1]]))
    other_seed = ImageDataset(noise(), processor, seed=4).__getitems__(keys)["pixels"]
    assert not torch.equal(other_seed, whole["pixels"])
    centre = ImageDataset(noise(), processor, training=False)
    assert torch.equal(centre.__getitems__([(0, 5)])["pixels"], centre.__getitems__([(1, 5)])["pixels"])


def test_resident_pictures_get_the_same_crops(processor):
    source = noise()
    keys = [(0, index) for index in (5, 0, 39)]
    first = ImageDataset(source, processor).__getitems__(keys)
    second = ResidentImageDataset(source, processor).__getitems__(keys)
    assert (first.pop("pixels").int() - second.pop("pixels").int()).abs().max() <= 1
    assert_equal(first, second)


def test_encoded_pictures_can_be_resident(processor):
    source = CountingSource([10, None, 30, 40], labels=torch.tensor([0, 1, 2, 3]))
    dataset = ResidentImageDataset(source, processor, training=False, max_bad_share=0.25)
    batch = dataset.__getitems__([(0, 0), (0, 1), (0, 3)])
    assert batch["pixels"][:, 0, 0, 0].tolist() == [10, 30, 40]
    assert batch["indices"].tolist() == [0, 2, 3]
    assert batch["labels"].tolist() == [0, 2, 3]
    assert len(batch["bad"]) == 1
    with pytest.raises(ValueError, match=r"several sizes.*use ImageDataset"):
        ResidentImageDataset(TwoSizes([1, 2]), processor)


class TwoSizes(CountingSource):
    def picture(self, index):
        return Image.new("RGB", (10 + index, 10)), f"picture {index}"


def test_gray_resident_pictures_serve_any_number_of_channels(processor):
    assert ResidentImageDataset(noise(channels=1), processor).__getitems__([(0, 0)])["pixels"].shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="4 channels, the processor 3"):
        ResidentImageDataset(noise(channels=4), processor)


def write_bad_folder(folder):
    """60 plain pictures and one of each kind of trouble; returns the names of those that cannot be used."""
    for number in range(60):
        Image.new("RGB", (14, 12), (number, 0, 0)).save(folder / f"{number:02}.png")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole, "JPEG")
    (folder / "20_truncated.jpg").write_bytes(whole.getvalue()[:1500])
    (folder / "21_empty.jpg").write_bytes(b"")
    (folder / "22_text.png").write_text("no picture")
    (folder / "23_huge.png").write_bytes(png_of_size(20_000, 20_000))
    Image.new("RGB", (1, 1)).save(folder / "30_one.png")
    Image.new("CMYK", (9, 9)).save(folder / "31_cmyk.jpg")
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(folder / "32_16_bit.png")
    Image.new("P", (9, 9)).save(folder / "33_palette.png")
    Image.new("LA", (9, 9)).save(folder / "34_transparent.png")
    return {"20_truncated.jpg", "21_empty.jpg", "22_text.png", "23_huge.png"}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_pictures_are_replaced_counted_and_named(tmp_path, processor, caplog, num_workers):
    expected = write_bad_folder(tmp_path)
    source = load_images(str(tmp_path))
    assert len(source) == 69
    names = [os.path.basename(source.picture(index)[1]) for index in range(69)]
    dataset = ImageDataset(source, processor)
    log = BadImageLog(num_pictures=len(source))
    with caplog.at_level(logging.WARNING, "hf_masked"):
        batches = list(loader(dataset, num_workers=num_workers))
        for batch in batches:
            log.add(batch)
    assert sum(len(batch["pixels"]) for batch in batches) == 69
    used = torch.cat([batch["indices"] for batch in batches])
    assert {names[index] for index in used} == set(names) - expected
    assert {os.path.basename(fault.split(": ")[0]) for fault in log.faults} == expected
    assert log.bad_seen == 4
    assert sum("Bad picture" in record.message for record in caplog.records) == 4
    huge = next(fault for fault in log.faults if "huge" in fault)
    assert "pixels" in huge


def test_a_replacement_is_cropped_by_its_own_key(processor):
    images = [noise().picture(index)[0] for index in range(4)]

    class Source(ImageSource):
        name = "arrays"

        def __len__(self):
            return 4

        def picture(self, index):
            return (images[index] if index else b""), f"picture {index}"

    batch = ImageDataset(Source(), processor, max_bad_share=0.5).__getitems__([(0, 0), (0, 1), (0, 3)])
    assert batch["indices"].tolist() == [1, 1, 3]
    assert torch.equal(batch["pixels"][0], batch["pixels"][1])
    assert [fault.split(":")[0] for fault in batch["bad"]] == ["picture 0"]


def test_too_many_bad_pictures_end_the_run(processor):
    half = CountingSource([None, 1] * 10)
    with pytest.raises(ValueError, match=r"3 of 20 pictures are bad, for example picture \d+: .*max_bad_share"):
        ImageDataset(half, processor).__getitems__([(0, index) for index in range(20)])
    ImageDataset(half, processor, max_bad_share=0.5).__getitems__([(0, index) for index in range(20)])
    with pytest.raises(ValueError, match="pictures are bad"):
        ImageDataset(CountingSource([None] * 3), processor, max_bad_share=1.0).__getitems__([(0, 0)])


def test_nothing_good_in_sight_ends_the_run_early(processor):
    source = CountingSource([None] * 100_000)
    with pytest.raises(ValueError, match="are bad"):
        ImageDataset(source, processor).__getitems__([(0, 0)])
    assert len(source.asked) < 300


def test_one_damaged_stretch_does_not_end_the_run(processor):
    source = CountingSource([None] * 150 + [1] * 9_850)
    dataset = ImageDataset(source, processor)
    log = BadImageLog(num_pictures=len(source))
    for start in range(0, 10_000, 100):
        keys = [(0, (start + 37 * index) % 10_000) for index in range(100)]
        log.add({"indices": torch.zeros(100), "bad": dataset.__getitems__(keys)["bad"]})
    assert 0 < log.bad_seen < 1000


def test_the_log_waits_until_it_has_seen_enough(caplog):
    log = BadImageLog(max_bad_share=0.1, num_pictures=50)
    batch = {"indices": torch.zeros(10), "bad": ["a: cut", "b: cut"]}
    with caplog.at_level(logging.WARNING, "hf_masked"):
        for _ in range(4):
            log.add(batch)
    assert len(caplog.records) == 2
    with pytest.raises(ValueError, match="10 of 50 pictures are bad, for example a: cut; b: cut"):
        log.add(batch)


def test_a_wrong_number_of_channels_is_named():
    source = CountingSource([1] * 20)
    with pytest.raises(ValueError, match=r"picture 0: .*13 channels.*num_channels"):
        ImageDataset(source, make_processor(num_channels=13)).__getitems__([(0, 0)])


def test_sampler_is_a_function_of_seed_and_epoch():
    sampler, again = KeyedSampler(50, seed=1), KeyedSampler(50, seed=1)
    first = list(sampler)
    assert len(sampler) == 50
    assert sorted(first) == [(0, index) for index in range(50)]
    assert first == list(again) == list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in first] != [index for _, index in second]
    assert list(KeyedSampler(50, seed=2)) != first
    assert list(KeyedSampler(3, shuffle=False)) == [(0, 0), (0, 1), (0, 2)]


def prepared(dataset, process=0, processes=1, **options):
    return prepare_data_loader(
        loader(dataset, **options), num_processes=processes, process_index=process, put_on_device=False
    )


def test_accelerate_moves_the_epoch_and_skips_without_decoding(processor):
    source = CountingSource(list(range(24)))
    data = prepared(ImageDataset(source, processor), batch_size=4)
    data.set_epoch(2)
    whole = list(data)
    assert {int(batch["epoch"]) for batch in whole} == {2}
    source.asked.clear()
    rest = skip_first_batches(prepared(ImageDataset(source, processor), batch_size=4), 4)
    rest.set_epoch(2)
    rest = list(rest)
    assert len(source.asked) == 8
    for first, second in zip(whole[4:], rest, strict=True):
        assert_equal(first, second)


def test_two_processes_share_the_epoch(processor):
    dataset = ImageDataset(CountingSource(list(range(24))), processor)
    alone = prepared(dataset, batch_size=4)
    alone.set_epoch(1)
    whole = list(alone)
    parts = []
    for process in range(2):
        data = prepared(dataset, process, 2, batch_size=4)
        assert isinstance(data.batch_sampler, BatchSamplerShard)
        data.set_epoch(1)
        parts.append(list(data))
    for place, batch in enumerate(whole):
        assert_equal(batch, parts[place % 2][place // 2])


def test_resuming_in_two_processes_needs_the_epoch_on_the_sampler(processor):
    """accelerate's `set_epoch` does not reach a sampler below two wrappers: the trainer sets it."""
    source = CountingSource(list(range(24)))
    for process in range(2):
        data = prepared(ImageDataset(source, processor), process, 2, batch_size=4)
        data.set_epoch(1)
        whole = list(data)
        fresh = loader(ImageDataset(source, processor), batch_size=4)
        data = prepare_data_loader(fresh, num_processes=2, process_index=process, put_on_device=False)
        rest = skip_first_batches(data, 1)
        rest.set_epoch(1)
        assert fresh.sampler.epoch == 0
        fresh.sampler.set_epoch(1)
        source.asked.clear()
        rest = list(rest)
        assert len(source.asked) == 8
        for first, second in zip(whole[1:], rest, strict=True):
            assert_equal(first, second)


def write_parquet(folder, files=1, rows=30, bad=()):
    import pyarrow as pa
    import pyarrow.parquet

    for number in range(files):
        values = range(number * rows, (number + 1) * rows)
        pictures = [b"" if value in bad else encoded(value) for value in values]
        table = pa.table({"image": pictures, "label": list(values)})
        pyarrow.parquet.write_table(table, folder / f"{number}.parquet")
    return str(folder)


def streamed(source, processor, num_workers=0, epoch=0, **options):
    dataset = StreamingImageDataset(source, processor, buffer_size=8, **options)
    dataset.set_epoch(epoch)
    return list(DataLoader(dataset, 4, num_workers=num_workers, collate_fn=collate_samples))


def values_of(batches):
    return [value for batch in batches for value in batch["labels"].tolist()]


@pytest.mark.parametrize("files", [1, 3])
def test_a_streamed_epoch_has_each_sample_once(tmp_path, processor, files):
    source = load_images(write_parquet(tmp_path, files), streaming=True)
    for num_workers in (0, 2):
        batches = streamed(source, processor, num_workers)
        assert sorted(values_of(batches)) == list(range(30 * files))
        assert len({index for batch in batches for index in batch["indices"].tolist()}) == 30 * files
        for batch in batches:
            assert batch["pixels"][:, 0, 0, 0].tolist() == batch["labels"].tolist()
            assert batch["epoch"].shape == ()
    ranks = [values_of(streamed(source, processor, 2, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(30 * files))
    if files == 1:
        assert abs(len(ranks[0]) - len(ranks[1])) <= 2


def test_a_stream_is_a_function_of_seed_and_epoch(tmp_path, processor):
    source = load_images(write_parquet(tmp_path), streaming=True)
    first = streamed(source, processor)
    assert values_of(first) == values_of(streamed(source, processor))
    assert values_of(first) != values_of(streamed(source, processor, epoch=1))
    assert values_of(first) != values_of(streamed(source, processor, seed=1))
    assert values_of(streamed(source, processor, training=False)) == list(range(30))
    # One file: workers share single pictures, and a picture's index, so its crop, is its place in the stream.
    alone, together = by_index(first), by_index(streamed(source, processor, num_workers=2))
    assert alone.keys() == together.keys()
    assert all(torch.equal(pixels, together[index]) for index, pixels in alone.items())


def test_persistent_workers_see_a_new_epoch(tmp_path, processor):
    dataset = StreamingImageDataset(load_images(write_parquet(tmp_path), streaming=True), processor)
    data = DataLoader(dataset, 4, num_workers=1, persistent_workers=True, collate_fn=collate_samples)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert {int(batch["epoch"]) for batch in data} == {epoch}


def write_tar(folder, files=1, rows=30):
    for number in range(files):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for value in range(number * rows, (number + 1) * rows):
                for suffix, content in (("png", encoded(value)), ("cls", str(value).encode())):
                    member = tarfile.TarInfo(f"{value:04}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(folder)


def write_folder(folder, files=1, rows=30):
    """Classes are named like the values, so that labels are values in all three forms."""
    for value in range(files * rows):
        (folder / f"{value:04}").mkdir()
        (folder / f"{value:04}" / "picture.png").write_bytes(encoded(value))
    return str(folder)


@pytest.mark.parametrize(
    ("write", "num_workers", "world_size"),
    [(write_parquet, 0, 1), (write_parquet, 2, 2), (write_tar, 2, 1), (write_folder, 2, 1)],
)
def test_a_stream_goes_on_with_the_next_sample_without_decoding(
    tmp_path, processor, monkeypatch, write, num_workers, world_size
):
    decoded = multiprocessing.Value("i", 0)
    decode = images_module.decode_picture

    def counted(*arguments):
        with decoded.get_lock():
            decoded.value += 1
        return decode(*arguments)

    monkeypatch.setattr(images_module, "decode_picture", counted)
    source = load_images(write(tmp_path, files=3), streaming=True)

    def read(rank, position, count):
        dataset = StreamingImageDataset(source, processor, buffer_size=8, rank=rank, world_size=world_size)
        dataset.position = position
        dataset.set_epoch(1)
        batches = []
        for batch in islice(DataLoader(dataset, 4, num_workers=num_workers, collate_fn=collate_samples), count):
            dataset.note(batch, num_workers)
            batches.append(batch)
        return batches, dataset.position

    seen = []
    for rank in range(world_size):
        whole, _ = read(rank, StreamPosition(1), None)
        seen += values_of(whole)
        # Behind the end of the smaller part, too, where two workers share three files.
        for used in (3, 18 // world_size):
            _, position = read(rank, StreamPosition(1), used)
            decoded.value = 0
            rest, _ = read(rank, position, None)
            assert decoded.value == sum(len(batch["indices"]) for batch in whole[used:])
            for expected, batch in zip(whole[used:], rest, strict=True):
                assert_equal(expected, batch)
    assert sorted(seen) == list(range(90))
    assert seen != list(range(90))


def test_bad_pictures_in_a_stream_are_left_out_and_named(tmp_path, processor):
    source = load_images(write_parquet(tmp_path, bad=(0, 7, 29)), streaming=True)
    batches = streamed(source, processor, training=False)
    assert values_of(batches) == [value for value in range(30) if value not in (0, 7, 29)]
    assert [fault.split(" of part")[0] for batch in batches for fault in batch["bad"]] == [
        "picture 0",
        "picture 7",
        "picture 29",
    ]
    (tmp_path / "all").mkdir()
    nothing = load_images(write_parquet(tmp_path / "all", bad=range(30)), streaming=True)
    with pytest.raises(ValueError, match="30 of 30 pictures are bad"):
        streamed(nothing, processor)


def test_a_streamed_folder(tmp_path, processor):
    for value in range(10):
        (tmp_path / "ab"[value % 2]).mkdir(exist_ok=True)
        Image.new("L", (9, 9), value).save(tmp_path / "ab"[value % 2] / f"{value}.png")
    source = load_images(str(tmp_path), streaming=True)
    assert source.class_names == ["a", "b"]
    for num_workers in (0, 2):
        batches = streamed(source, processor, num_workers)
        pixels = [value for batch in batches for value in batch["pixels"][:, 0, 0, 0].tolist()]
        assert sorted(pixels) == list(range(10))
        assert [value % 2 for value in pixels] == values_of(batches)


def test_labelled_tensors_are_balanced_fixed_and_good(processor):
    labels = torch.tensor([0] * 6 + [1] * 3 + [-1])
    source = CountingSource([*range(9), 9], labels)
    pixels, chosen = labelled_tensors(source, processor, limit=4)
    assert chosen.bincount().tolist() == [2, 2]
    assert all(labels[value] == label for value, label in zip(pixels[:, 0, 0, 0].tolist(), chosen, strict=True))
    assert torch.equal(pixels, labelled_tensors(source, processor, limit=4)[0])
    assert labelled_tensors(source, processor, limit=8)[1].bincount().tolist() == [5, 3]
    assert labelled_tensors(source, processor)[1].tolist() == labels[:9].tolist()
    half_bad = CountingSource([None if index % 3 == 0 else index for index in range(9)], labels[:9])
    pixels, chosen = labelled_tensors(half_bad, processor, limit=5)
    assert len(pixels) == len(chosen) == 5
    with pytest.raises(ValueError, match="no labels: set label_column"):
        labelled_tensors(CountingSource([1]), processor)
    with pytest.raises(ValueError, match="no good picture"):
        labelled_tensors(CountingSource([None], torch.tensor([0])), processor)


def test_labelled_tensors_of_pictures_in_memory(processor):
    pixels, labels = labelled_tensors(noise(channels=1), processor, limit=8)
    assert pixels.shape == (8, 3, 8, 8)
    assert pixels.dtype == torch.uint8
    assert labels.bincount().tolist() == [2, 2, 2, 2]


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"{CIFAR10} is absent")
def test_cifar10():
    source = load_images(str(CIFAR10), split="test")
    assert len(source) == 10_000
    assert source.class_names[0] == "airplane"
    pixels, labels = labelled_tensors(source, make_processor(size=32), limit=100)
    assert pixels.shape == (100, 3, 32, 32)
    assert labels.bincount().tolist() == [10] * 10
    batch = next(iter(loader(ImageDataset(source, make_processor(size=16)))))
    assert batch["pixels"].shape == (8, 3, 16, 16)
    assert torch.equal(source.labels()[batch["indices"]], batch["labels"])
