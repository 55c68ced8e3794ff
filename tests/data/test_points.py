"""Point clouds from files and made ones."""

import numpy as np
import pytest
import torch

from hf_masked import PointCloudProcessor
from hf_masked.data.points import PointCloudDataset, SyntheticShapes, load_points, read_cloud

TRIANGLE = "OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n"


@pytest.fixture
def folder(tmp_path):
    points = np.arange(12, dtype=np.float32).reshape(4, 3)
    for kind in ("chair", "lamp"):
        (tmp_path / kind).mkdir()
    np.save(tmp_path / "chair" / "a.npy", points)
    np.savez(tmp_path / "chair" / "b.npz", points=points, other=points[:1])
    np.savetxt(tmp_path / "lamp" / "c.xyz", points)
    return tmp_path


def test_files_of_each_kind_are_read(folder):
    source = load_points(str(folder))
    assert source.class_names == ["chair", "lamp"] and source.labels().tolist() == [0, 0, 1]
    for index in range(3):
        np.testing.assert_array_equal(source.cloud(index), np.arange(12).reshape(4, 3))


def test_meshes_are_sampled_and_need_trimesh(tmp_path, monkeypatch):
    pytest.importorskip("trimesh")
    path = tmp_path / "triangle.off"
    path.write_text(TRIANGLE)
    points = read_cloud(path, seed=3)
    assert points.shape == (8192, 3) and (points[:, 2] == 0).all() and points.min() >= 0
    np.testing.assert_array_equal(points, read_cloud(path, seed=3))
    monkeypatch.setitem(__import__("sys").modules, "trimesh", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-masked\[points\]'"):
        read_cloud(path)


def test_bad_clouds_are_replaced_and_named(folder):
    (folder / "chair" / "a.npy").write_bytes(b"nothing")
    dataset = PointCloudDataset(load_points(str(folder)), PointCloudProcessor(num_points=8, num_groups=4))
    batch = dataset.__getitems__([(0, 0), (0, 2)])
    assert batch["indices"].tolist() == [1, 2] and "a.npy" in batch["bad"][0]
    (folder / "chair" / "b.npz").write_bytes(b"nothing")
    fresh = PointCloudDataset(load_points(str(folder)), PointCloudProcessor(num_points=8, num_groups=4))
    with pytest.raises(ValueError, match="2 of 3 clouds"):
        fresh.__getitems__([(0, 0)])


def test_made_shapes_are_functions_of_their_index():
    source = SyntheticShapes(16, seed=1, num_points=64)
    np.testing.assert_array_equal(source.cloud(5), SyntheticShapes(16, seed=1, num_points=64).cloud(5))
    assert not np.array_equal(source.cloud(5), SyntheticShapes(16, seed=2, num_points=64).cloud(5))
    assert source.labels().tolist() == [*range(8), *range(8)]
    clouds = torch.tensor(np.stack([source.cloud(index) for index in range(16)]))
    assert clouds.isfinite().all() and clouds.abs().max() < 2.5


def test_unknown_sets_and_splits_are_named(folder):
    with pytest.raises(ValueError, match="no split 'test'"):
        load_points(str(folder), "test")
    with pytest.raises(ValueError, match="synthetic_shapes"):
        load_points("nowhere")
