"""Where pictures come from: columns, splits, folders, small sets, and what is said when something is wrong."""

import gzip
import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from hf_masked.data import load_images, small_sets
from hf_masked.processing.decoding import open_image


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    datasets.disable_progress_bars()


def picture(value=0, size=(10, 8), mode="RGB"):
    return Image.fromarray(np.full((*size[::-1], 3), value, np.uint8)).convert(mode)


def encoded(value=0):
    buffer = io.BytesIO()
    picture(value).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, names):
    for value, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(value).save(folder / name)
    return folder


def write_table(path, columns):
    import pyarrow as pa
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.table(columns), path)
    return str(path)


def value_of(source, index):
    return np.asarray(open_image(*source.picture(index))).ravel()[0]


def test_folder_of_images_with_classes(tmp_path):
    folder = write_folder(tmp_path, ["cat/0.png", "cat/1.png", "dog/2.png"])
    source = load_images(str(folder))
    assert len(source) == 3
    assert source.class_names == ["cat", "dog"]
    assert source.labels().tolist() == [0, 0, 1]
    assert source.as_tensor() is None
    assert source.picture(2)[1].endswith("dog/2.png")
    assert value_of(source, 1) == 1


def test_flat_folder_has_no_labels(tmp_path):
    source = load_images(str(write_folder(tmp_path, ["0.png", "1.png"])))
    assert source.labels() is None
    assert source.class_names is None


def test_class_and_file_names_that_sound_like_splits_lose_nothing(tmp_path):
    folder = write_folder(tmp_path, ["bus/test 1.png", "train/train_0.png", "train/2.png"])
    source = load_images(str(folder))
    assert len(source) == 3
    assert source.class_names == ["bus", "train"]


def test_folder_with_splits(tmp_path):
    folder = write_folder(tmp_path, ["train/a/0.png", "train/b/1.png", "test/a/2.png", "test/b/3.png"])
    assert len(load_images(str(folder))) == 2
    test = load_images(str(folder), split="test")
    assert [value_of(test, index) for index in range(2)] == [2, 3]
    assert test.labels().tolist() == [0, 1]


def test_split_folders_without_classes_have_no_labels(tmp_path):
    folder = write_folder(tmp_path, ["Training/0.png", "Val/1.png", ".hidden/2.png"])
    source = load_images(str(folder), split="validation")
    assert [value_of(source, 0)] == [1]
    assert source.labels() is None
    with pytest.raises(ValueError, match="no split 'test', but train and validation"):
        load_images(str(folder), split="test")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path, ["store/0.png", "photos/cat/1.png"])
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "store")
    (tmp_path / "photos" / "cat" / "up").symlink_to(tmp_path / "photos")
    source = load_images(str(tmp_path / "photos"))
    assert len(source) == 2
    assert source.class_names == ["cat", "dog"]


def test_slices_and_metadata_are_read_by_datasets(tmp_path):
    folder = write_folder(tmp_path, ["a/0.png", "a/1.png", "b/2.png", "b/3.png"])
    assert len(load_images(str(folder), split="train[:50%]")) == 2
    write_folder(tmp_path / "described", ["0.png", "1.png"])
    (tmp_path / "described" / "metadata.csv").write_text("file_name,label\n0.png,7\n1.png,5\n")
    assert load_images(str(tmp_path / "described")).labels().tolist() == [7, 5]


def test_parquet_with_any_column_names_and_string_labels(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"scan": [encoded(5), encoded(6)], "target": ["b", "a"]})
    for source in (load_images(path), load_images(str(tmp_path)), load_images(str(tmp_path / "*.parquet"))):
        assert value_of(source, 1) == 6
        assert source.labels().tolist() == [1, 0]
        assert source.class_names == ["a", "b"]
    source = load_images(path, image_column="scan", label_column="target", split="train[1:]")
    assert len(source) == 1
    assert source.picture(0)[1].startswith("row 0 of ")


@pytest.mark.parametrize("channels", [1, 3, 13])
@pytest.mark.parametrize("declared", [True, False])
def test_parquet_of_arrays(tmp_path, channels, declared):
    from datasets import Array3D, Dataset, Features

    arrays = np.random.default_rng(0).integers(0, 256, (4, channels, 6, 5), dtype=np.uint8)
    features = Features({"bands": Array3D((channels, 6, 5), "uint8")}) if declared else None
    path = str(tmp_path / "x.parquet")
    Dataset.from_dict({"bands": list(arrays)}, features=features).to_parquet(path)
    for source in (load_images(path), load_images(path, streaming=True)):
        if hasattr(source, "samples"):
            contents = [content for content, _, _ in source.samples()]
        else:
            contents = [source.picture(index)[0] for index in range(4)]
        assert all(content.dtype == np.uint8 for content in contents)
        assert np.array_equal(np.stack(contents), arrays)


def test_webdataset(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for index in range(3):
            for suffix, content in (("png", encoded(index)), ("cls", str(index).encode())):
                member = tarfile.TarInfo(f"{index:03}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    source = load_images(str(tmp_path))
    assert [value_of(source, index) for index in range(3)] == [0, 1, 2]
    assert source.labels().tolist() == [0, 1, 2]


def test_wrong_names_are_answered_in_one_line(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"scan": [encoded()], "depth": [encoded()], "label": [0.5]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no pictures")
    cases = [
        (path, {"image_column": "photo"}, ["'photo'", "scan, depth, label"]),
        (path, {}, ["scan, depth", "image_column"]),
        (path, {"image_column": "scan", "label_column": "class"}, ["'class'", "scan, depth, label"]),
        (path, {"image_column": "scan", "label_column": "label"}, ["'label'", "integers or strings"]),
        (path, {"split": "nope"}, ["'nope'", "train"]),
        (path, {"split": "nope", "streaming": True}, ["'nope'", "train"]),
        (str(tmp_path / "empty"), {}, ["empty", "no pictures", "Parquet"]),
        (str(tmp_path / "absent"), {}, ["absent", "check the path"]),
        (str(tmp_path / "notes.txt"), {}, ["notes.txt", "Parquet"]),
        ("someone/absent", {}, ["'someone/absent'", "folder or file"]),
        ("digits", {"split": "validation"}, ["'validation'", "train and test"]),
        ("digits", {"streaming": True}, ["streaming=False"]),
    ]
    for name, options, expected in cases:
        with pytest.raises(ValueError) as caught:
            load_images(name, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in expected), message


def test_no_column_of_pictures(tmp_path):
    path = write_table(tmp_path / "x.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match="none looks like pictures: set image_column to one of text, label"):
        load_images(path)


def test_digits_are_split_by_class():
    train, test = load_images("digits"), load_images("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.as_tensor().shape == (1437, 1, 8, 8)
    assert train.as_tensor().dtype == torch.uint8
    assert train.as_tensor().max() == 255
    assert (test.labels().bincount() - 36).abs().max() <= 1
    assert torch.equal(test.as_tensor(), load_images("digits", split="test").as_tensor())
    assert len(train.class_names) == 10


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def test_fashion_mnist_from_the_debian_package(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    labels = np.arange(6, dtype=np.uint8)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr(small_sets, "DEBIAN_FOLDER", tmp_path)
    monkeypatch.setenv("HF_MASKED_CACHE", str(tmp_path / "cache"))
    source = load_images("fashion_mnist", split="test")
    assert "Debian" in source.name
    assert np.array_equal(source.as_tensor()[:, 0].numpy(), images)
    assert source.labels().tolist() == list(range(6))
    assert source.class_names[9] == "Ankle boot"


def test_fashion_mnist_from_the_hub_is_decoded_once(tmp_path, monkeypatch):
    import datasets

    rows = datasets.Dataset.from_dict(
        {"image": [picture(7, (28, 28), "L")], "label": [3]},
        datasets.Features(image=datasets.Image(), label=datasets.Value("int64")),
    )
    monkeypatch.setenv("HF_MASKED_CACHE", str(tmp_path))
    monkeypatch.setattr(small_sets, "_hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    first = load_images("fashion_mnist")
    monkeypatch.setattr(small_sets, "_hub_answers", lambda: pytest.fail("asked again"))
    second = load_images("fashion_mnist")
    assert first.as_tensor().unique().tolist() == [7]
    assert torch.equal(first.as_tensor(), second.as_tensor())
    assert second.labels().tolist() == [3]
    assert "Hub" in second.name


def no_package(*command, cwd):
    raise subprocess.CalledProcessError(100, command)


def test_digits_stand_in_where_nothing_else_is_to_be_had(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_MASKED_CACHE", str(tmp_path))
    monkeypatch.setattr(small_sets, "DEBIAN_FOLDER", tmp_path / "absent")
    monkeypatch.setattr(small_sets, "_run", no_package)
    source = load_images("fashion_mnist")
    assert source.name == "scikit-learn's digits"
    assert "digits" in capsys.readouterr().out
    assert list(tmp_path.glob("fashion_mnist/*")) == []


def test_damaged_idx_files_are_refused(tmp_path):
    whole = tmp_path / "whole.gz"
    write_idx(whole, np.zeros((3, 4), np.uint8))
    assert small_sets.read_idx(whole).shape == (3, 4)
    (tmp_path / "cut.gz").write_bytes(whole.read_bytes()[:-9])
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"something else"))
    (tmp_path / "plain.gz").write_bytes(b"something else")
    for name in ("cut.gz", "other.gz", "plain.gz"):
        with pytest.raises(ValueError, match=name):
            small_sets.read_idx(tmp_path / name)


def test_neither_the_package_nor_a_folder_of_images_needs_datasets(tmp_path):
    """A large folder starts with its names alone; to open one of these files would wait for ever."""
    for number in range(3):
        os.mkfifo(tmp_path / f"{number}.jpg")
    code = (
        "import sys, hf_masked.data as data; source = data.load_images(sys.argv[1]); "
        "sys.exit(len(source) != 3 or 'datasets' in sys.modules or 'sklearn' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=120).returncode == 0
