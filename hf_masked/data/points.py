"""Point clouds: folders of files, sub-folders being classes; shapes that are made here; and the data set of a run."""

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from hf_masked.data.folders import SPLIT_FOLDERS, files_below, has_splits
from hf_masked.data.keyed import KeyedDataset

SYNTHETIC = "synthetic_shapes"

# Shapes per split of `load_points`, and what separates their draws.
SPLITS = {"train": (2000, 0), "test": (400, 1), "validation": (400, 2)}

ARRAYS = (".npy", ".npz", ".xyz")
MESHES = (".ply", ".off", ".obj")

# Points taken from the surface of a mesh, from which a run draws its own.
SURFACE_POINTS = 8192


class BadCloudError(ValueError):
    """A file that holds no usable cloud. The message names the file and the reason."""


class PointSource(ABC):
    """Labelled or unlabelled clouds, by index."""

    name: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def cloud(self, index: int) -> np.ndarray:
        """float32 (points, 3).

        Raises:
            BadCloudError: for a file that cannot be used.
        """

    @abstractmethod
    def sample_name(self, index: int) -> str:
        """What people call a cloud."""

    def labels(self) -> torch.Tensor | None:
        """int64 (n,), or None."""
        return None


class FolderOfClouds(PointSource):
    """Files below a folder; where they stand in sub-folders, the first ones' names are the classes.

    Args:
        folder: of `.npy`, `.npz`, `.xyz`, `.ply`, `.off` or `.obj` files.
        name: for people.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, folder: Path, name: str):
        self.folder = folder
        self.name = name
        self._files = [file for file in files_below(folder) if Path(file).suffix.lower() in (*ARRAYS, *MESHES)]
        if not self._files:
            raise ValueError(
                f"The folder '{folder}' holds no point clouds: put {', '.join((*ARRAYS, *MESHES))} files there "
                "(sub-folders are classes)."
            )
        kinds = [Path(file).parts[0] if len(Path(file).parts) > 1 else None for file in self._files]
        self.class_names = sorted({kind for kind in kinds if kind is not None})
        self._labels = None
        if self.class_names and None not in kinds:
            numbers = {kind: number for number, kind in enumerate(self.class_names)}
            self._labels = torch.tensor([numbers[kind] for kind in kinds])

    def __len__(self) -> int:
        return len(self._files)

    def cloud(self, index: int) -> np.ndarray:
        return read_cloud(self.folder / self._files[index], seed=index)

    def sample_name(self, index: int) -> str:
        return str(self.folder / self._files[index])

    def labels(self) -> torch.Tensor | None:
        return self._labels


class SyntheticShapes(PointSource):
    """Made shapes of eight classes, no scans: points on spheres, cubes, cylinders, cones, tori, ellipsoids, pyramids
    and helices, each axis stretched by 0.7 to 1.3, turned about z, with noise. The shape of an index is a function of
    (seed, index), and its class is index modulo 8.

    Args:
        length: shapes.
        seed: of them.
        num_points: of each.
        noise: standard deviation of the noise, before the cloud is scaled.
    """

    class_names = ("sphere", "cube", "cylinder", "cone", "torus", "ellipsoid", "pyramid", "helix")

    def __init__(self, length: int, seed: int = 0, num_points: int = 2048, noise: float = 0.02):
        self.length = length
        self.seed = seed
        self.num_points = num_points
        self.noise = noise
        self.name = f"synthetic shapes (made here, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return self.length

    def cloud(self, index: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, index))
        shape = self.class_names[index % len(self.class_names)]
        points = SHAPES[shape](generator, self.num_points) * generator.uniform(0.7, 1.3, 3)
        angle = generator.uniform(0, 2 * math.pi)
        cosine, sine = math.cos(angle), math.sin(angle)
        points = points @ np.array([[cosine, sine, 0], [-sine, cosine, 0], [0, 0, 1]])
        return (points + self.noise * generator.standard_normal(points.shape)).astype(np.float32)

    def sample_name(self, index: int) -> str:
        return f"{self.class_names[index % len(self.class_names)]} {index}"

    def labels(self) -> torch.Tensor:
        return torch.arange(self.length) % len(self.class_names)


def _sphere(generator, n: int) -> np.ndarray:
    points = generator.standard_normal((n, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _cube(generator, n: int) -> np.ndarray:
    points = generator.uniform(-1, 1, (n, 3))
    points[np.arange(n), generator.integers(3, size=n)] = generator.choice((-1.0, 1.0), n)
    return 0.7 * points


def _cylinder(generator, n: int) -> np.ndarray:
    angle, height = generator.uniform(0, 2 * math.pi, n), generator.uniform(-1, 1, n)
    # Side and lids by their areas: 4 pi r and 2 pi r^2.
    radius = np.full(n, 0.6)
    lid = generator.random(n) < 0.6 / 2.6
    radius[lid] *= np.sqrt(generator.random(lid.sum()))
    height[lid] = np.sign(height[lid])
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)


def _cone(generator, n: int) -> np.ndarray:
    angle, depth = generator.uniform(0, 2 * math.pi, n), np.sqrt(generator.random(n))
    base = generator.random(n) < 0.3
    height = np.where(base, -1.0, 1 - 2 * depth)
    return np.stack([0.8 * depth * np.cos(angle), 0.8 * depth * np.sin(angle), height], axis=1)


def _torus(generator, n: int) -> np.ndarray:
    around, tube = generator.uniform(0, 2 * math.pi, (2, n))
    radius = 0.8 + 0.25 * np.cos(tube)
    return np.stack([radius * np.cos(around), radius * np.sin(around), 0.25 * np.sin(tube)], axis=1)


def _ellipsoid(generator, n: int) -> np.ndarray:
    return _sphere(generator, n) * np.array([1.0, 0.6, 0.35])


def _pyramid(generator, n: int) -> np.ndarray:
    depth = np.sqrt(generator.random(n))
    square = generator.uniform(-1, 1, (n, 2))
    base = generator.random(n) < 0.35
    side = ~base
    square[side, generator.integers(2, size=side.sum())] = generator.choice((-1.0, 1.0), side.sum())
    square[side] *= depth[side, None]
    return np.column_stack([0.8 * square, np.where(base, -1.0, 1 - 2 * depth)])


def _helix(generator, n: int) -> np.ndarray:
    along = generator.random(n)
    angle = 6 * math.pi * along
    return np.stack([0.7 * np.cos(angle), 0.7 * np.sin(angle), 2 * along - 1], axis=1)


SHAPES = {
    "sphere": _sphere,
    "cube": _cube,
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "ellipsoid": _ellipsoid,
    "pyramid": _pyramid,
    "helix": _helix,
}


def load_points(dataset_name: str, split: str = "train") -> PointSource:
    """One split of a set of clouds.

    Args:
        dataset_name: "synthetic_shapes", or a folder of files; where its sub-folders are called "train" and "test" or
            the like, they are splits, otherwise it is all "train".
        split: "train", "test" or "validation".

    Raises:
        ValueError: where there is no such set or split.
    """
    if dataset_name == SYNTHETIC:
        if split not in SPLITS:
            raise ValueError(f"{SYNTHETIC} has no split {split!r}; it has {', '.join(SPLITS)}: choose one of them.")
        length, seed = SPLITS[split]
        return SyntheticShapes(length, seed)
    folder = Path(dataset_name).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {dataset_name!r}: name {SYNTHETIC}, or a folder of {', '.join((*ARRAYS, *MESHES))} "
            "files."
        )
    if has_splits(folder):
        found = {SPLIT_FOLDERS[child.name.lower()]: child for child in sorted(folder.iterdir()) if child.is_dir()}
    else:
        found = {"train": folder}
    if split not in found:
        raise ValueError(f"{dataset_name} has no split {split!r}; it has {', '.join(found)}: choose one of them.")
    return FolderOfClouds(found[split], f"{dataset_name} ({split})")


def read_cloud(path: str | os.PathLike, seed: int = 0) -> np.ndarray:
    """A cloud from a file.

    Args:
        path: `.npy`; `.npz`, its array "points", or its only one; `.xyz`, lines of numbers of which the first three
            are x, y, z; `.ply`, `.off` or `.obj`, through trimesh: the points of a cloud, or `SURFACE_POINTS` drawn
            from the surface of a mesh.
        seed: of that draw.

    Returns:
        float32 (points, 3).

    Raises:
        BadCloudError: for a file that holds no points.
        ImportError: for a mesh without trimesh.
    """
    path = Path(path)
    reader = _read_mesh if path.suffix.lower() in MESHES else _read_array
    try:
        points = np.asarray(reader(path, seed), dtype=np.float32)
    except ImportError:
        raise
    except Exception as error:  # the readers raise many kinds of errors on damaged files
        raise BadCloudError(f"{path}: {type(error).__name__}: {error}") from error
    if points.ndim != 2 or points.shape[1] < 3 or len(points) == 0:
        raise BadCloudError(f"{path}: an array of shape {points.shape}; a cloud is (points, 3)")
    if not np.isfinite(points[:, :3]).all():
        raise BadCloudError(f"{path}: coordinates that are not finite")
    return points[:, :3]


def _read_array(path: Path, seed: int) -> np.ndarray:
    suffix = path.suffix.lower()
    if suffix == ".xyz":
        return np.loadtxt(path, dtype=np.float32, ndmin=2)
    with open(path, "rb") as file:
        content = np.load(file, allow_pickle=False)
        if suffix == ".npy":
            return content
        names = content.files
        if "points" not in names and len(names) != 1:
            raise ValueError(f"the arrays {', '.join(names)}, none of them called 'points'")
        return content["points" if "points" in names else names[0]]


def _read_mesh(path: Path, seed: int) -> np.ndarray:
    try:
        import trimesh
    except ImportError as error:
        raise ImportError(
            f"{path} needs trimesh to be read: pip install 'hf-masked[points]', or store clouds as .npy."
        ) from error
    # Scenes of several meshes as one.
    geometry = trimesh.load(path, force=None)
    if isinstance(geometry, trimesh.Scene):
        geometry = geometry.to_geometry()
    if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
        return trimesh.sample.sample_surface(geometry, SURFACE_POINTS, seed=seed)[0]
    return geometry.vertices


class PointCloudDataset(KeyedDataset):
    """Clouds read when they are asked for. A bad one is replaced by the next good one.

    Args:
        source: the clouds.
        processor: a `PointCloudProcessor`.
        seed: the run's seed.
        training: points drawn by sample and epoch, instead of always the same.
        max_bad_share: more bad clouds than this share of the source end the run.
    """

    def __init__(
        self, source: PointSource, processor, seed: int = 0, training: bool = True, max_bad_share: float = 0.1
    ):
        self.source = source
        self.processor = processor
        self.seed = seed
        self.training = training
        self.max_bad_share = max_bad_share
        self._labels = source.labels()
        self._bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int, epoch: int = 0) -> str:
        return self.source.sample_name(index)

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """See `KeyedDataset`; `raw_points` are float32 (batch, num_points, 3).

        Raises:
            ValueError: if more than `max_bad_share` of the clouds turn out bad.
        """
        epochs, asked = zip(*keys, strict=True)
        clouds, used = zip(*(self._good(index) for index in asked), strict=True)
        indices, epochs = torch.tensor(used), torch.tensor(epochs)
        if self.training:
            points = self.processor.prepare_training(list(clouds), indices, self.seed, epochs)
        else:
            points = self.processor.prepare(list(clouds))
        bad = [self._bad[index] for index in asked if index in self._bad]
        batch = {self.processor.raw_name: points, "indices": indices, "epoch": epochs[0], "bad": bad}
        return batch if self._labels is None else {**batch, "labels": self._labels[indices]}

    def _good(self, index: int) -> tuple[np.ndarray, int]:
        """The first good cloud from `index` on, and its index."""
        for place in range(index, index + len(self)):
            candidate = place % len(self)
            if candidate in self._bad:
                continue
            try:
                return self.source.cloud(candidate), candidate
            except BadCloudError as error:
                self._bad[candidate] = str(error)
            if len(self._bad) > max(1, self.max_bad_share * len(self)):
                break
        raise ValueError(
            f"{len(self._bad)} of {len(self)} clouds of {self.source.name} are bad, for example "
            f"{next(iter(self._bad.values()))}: remove or mend them, or raise max_bad_share."
        )


__all__ = ["FolderOfClouds", "PointCloudDataset", "PointSource", "SyntheticShapes", "load_points", "read_cloud"]
