"""Stereo pairs with disparities: made here, or from folders, and the data set that training reads."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from hf_masked.data.keyed import KeyedDataset
from hf_masked.processing.decoding import BadImageError, open_image, to_channels, to_uint8_tensor
from hf_masked.processing.image_processing import CROP
from hf_masked.processing.stereo import StereoImageProcessor, read_disparity

SYNTHETIC = "synthetic_stereo"

# Pairs per split of `load_stereo`, and what separates their draws.
SPLITS = {"train": (10_000, 0), "test": (64, 1), "validation": (64, 2)}

LAYERS = (4, 10)  # surfaces before the background, fewest and most
PHOTOGRAPH_SHARE = 0.5  # of the surfaces show a part of a photograph, the others noise
OCTAVES = (2, 4, 8, 16, 32)  # sides of the blobs of noise, in pixels


@dataclass
class StereoSample:
    """A rectified pair.

    Args:
        left, right: uint8 (channels, height, width).
        disparity: float32 (height, width) of the left picture, in pixels; 0 = unknown.
        name: for messages.
    """

    left: torch.Tensor
    right: torch.Tensor
    disparity: torch.Tensor
    name: str


class SyntheticStereo:
    """Pairs that are made, with exact disparities: planes in space, one behind the other, with photographs or noise on
    them, seen by two cameras. The sample of an index is a function of (seed, index).

    A surface has the disparity a + b x + c y at the left pixel (x, y), its own outline and its own texture, both given
    in the left camera's pixels. Each camera sees at each of its pixels the nearest surface there, that of the largest
    disparity, so that the right one misses what the left one sees beside an edge, and the other way round. The
    disparity is known there too.

    Args:
        length: samples.
        size: (height, width).
        max_disparity: all disparities lie above 0 and below this.
        slant: how far a plane may lean: share of the largest disparity by which it may differ from its mean within the
            picture. With 0 disparities are piecewise constant.
        noise: largest standard deviation of the noise of the cameras, in grey levels, drawn for each pair; the right
            camera's exposure differs by as many percent.
        seed: of all draws.
        num_channels: 3, or 1 for gray pictures; more repeat.
        photographs: uint8 (height, width, 3) arrays to cut textures from; scikit-learn's two by default.

    Raises:
        ValueError: for a largest disparity below 2.
    """

    name = "synthetic stereo pairs"

    def __init__(
        self,
        length: int,
        size: tuple[int, int] = (256, 512),
        max_disparity: int = 192,
        slant: float = 0.2,
        noise: float = 3.0,
        seed: int = 0,
        num_channels: int = 3,
        photographs: list[np.ndarray] | None = None,
    ):
        if max_disparity < 2:
            raise ValueError(f"max_disparity is {max_disparity}; it must be at least 2, for example 192.")
        self.length, self.size, self.max_disparity = length, tuple(size), max_disparity
        self.slant, self.noise, self.seed, self.num_channels = slant, noise, seed, num_channels
        photographs = _sample_photographs() if photographs is None else photographs
        self._photographs = [torch.from_numpy(np.array(p)).permute(2, 0, 1).float() / 255 for p in photographs]

    def __len__(self) -> int:
        return self.length

    def sample(self, index: int) -> StereoSample:
        """The pair of an index."""
        random = np.random.default_rng([self.seed, index])
        height, width = self.size
        surfaces = [self._surface(random, background=True)]
        surfaces += [self._surface(random) for _ in range(random.integers(LAYERS[0], LAYERS[1] + 1))]
        y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
        left, disparity = _seen(surfaces, [x] * len(surfaces), y)
        # The left column of each surface that the right camera has at column x: x_left - a - b x_left - c y = x.
        columns = [(x + s.offset + s.down * y) / (1 - s.across) for s in surfaces]
        right, _ = _seen(surfaces, columns, y)
        views = self._exposed(random, left, right)
        return StereoSample(*views, disparity, f"pair {index} of {self.name}")

    def _surface(self, random: np.random.Generator, background: bool = False) -> "_Surface":
        height, width = self.size
        largest = self.max_disparity - 1.0
        # The mean's distribution favours far surfaces, as the world does; the background is among the farthest.
        mean = largest * (0.02 + (0.3 if background else 0.9) * random.random() ** 1.5)
        lean = min(self.slant * largest, 0.9 * mean, largest - mean) * random.random()
        angle = 2 * np.pi * random.random()
        shares = np.array([np.cos(angle), np.sin(angle)])
        across, down = lean * shares / np.abs(shares).sum() / (np.array([width, height]) / 2)
        across = float(np.clip(across, -0.5, 0.5))  # a surface that turns away further would hide itself
        centre = random.random(2) * [width, height]
        radii = (0.06 + 0.3 * random.random(2)) * min(height, width)
        return _Surface(
            offset=float(mean - across * width / 2 - down * height / 2),
            across=across,
            down=float(down),
            texture=self._texture(random),
            outline=None if background else (*centre, *radii, np.pi * random.random(), random.choice([1, 2, 8])),
        )

    def _texture(self, random: np.random.Generator) -> torch.Tensor:
        """float (3, height, width) in [0, 1], wide enough for all that the right camera sees."""
        height, width = self.size[0], self.size[1] + 2 * self.max_disparity
        if random.random() < PHOTOGRAPH_SHARE:
            photograph = self._photographs[random.integers(len(self._photographs))]
            share = 0.3 + 0.7 * random.random()
            sides = [max(2, int(share * side)) for side in photograph.shape[1:]]
            top, left = (int(random.integers(photograph.shape[1 + i] - sides[i] + 1)) for i in range(2))
            part = photograph[:, top : top + sides[0], left : left + sides[1]]
            part = part[random.permutation(3)]
            part = part.flip(-1) if random.random() < 0.5 else part
            texture = F.interpolate(part[None], size=(height, width), mode="bilinear", align_corners=False)[0]
            return texture ** float(0.6 + 1.0 * random.random())
        texture = torch.from_numpy(random.random((3, 1, 1), dtype=np.float32)).expand(3, height, width).clone()
        for side in OCTAVES:
            shape = (1, int(random.choice([1, 3])), height // side + 2, width // side + 2)
            noise = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
            noise = F.interpolate(noise, size=(height, width), mode="bilinear", align_corners=False)[0]
            texture += 0.15 * float(random.random()) * noise
        return texture.clamp(0, 1)

    def _exposed(self, random: np.random.Generator, *views: torch.Tensor) -> list[torch.Tensor]:
        """uint8 views as two cameras would take them, each with noise of its own."""
        deviation = self.noise * random.random()
        gains = (1.0, 1 + self.noise * (2 * random.random() - 1) / 100)
        taken = []
        for view, gain in zip(views, gains, strict=True):
            noise = torch.from_numpy(random.standard_normal(view.shape, dtype=np.float32))
            view = (255 * gain * view + deviation * noise).round().clamp(0, 255).to(torch.uint8)
            taken.append(to_num_channels(view, self.num_channels))
        return taken


@dataclass
class _Surface:
    """A plane: its disparity is offset + across x + down y; outline: (x, y, radius, radius, angle, exponent)."""

    offset: float
    across: float
    down: float
    texture: torch.Tensor
    outline: tuple | None

    def covers(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """bool: whether the surface is there at left pixels (x, y); a superellipse, turned."""
        if self.outline is None:
            return torch.ones_like(x, dtype=torch.bool)
        centre_x, centre_y, radius_1, radius_2, angle, exponent = map(float, self.outline)
        along = (x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)
        aside = (y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)
        return (along / radius_1).abs() ** exponent + (aside / radius_2).abs() ** exponent < 1


def _seen(surfaces: list[_Surface], columns: list[torch.Tensor], y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a camera sees: colours (3, height, width) and disparities (height, width).

    Args:
        surfaces: the first one is everywhere.
        columns: of each surface the left column at each of the camera's pixels.
        y: rows.
    """
    nearest = torch.full_like(y, -torch.inf)
    colours = y.new_zeros(3, *y.shape)
    for surface, x in zip(surfaces, columns, strict=True):
        disparity = surface.offset + surface.across * x + surface.down * y
        there = surface.covers(x, y) & (disparity > nearest)
        nearest = torch.where(there, disparity, nearest)
        colours = torch.where(there, _sampled(surface.texture, x, y), colours)
    return colours, nearest


def _sampled(texture: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Colours of a texture at (x, y), bilinear; beyond its sides it is mirrored."""
    sides = torch.tensor([texture.shape[2] - 1, texture.shape[1] - 1])
    grid = 2 * torch.stack([x, y], dim=-1) / sides - 1
    return F.grid_sample(texture[None], grid[None], padding_mode="reflection", align_corners=True)[0]


def to_num_channels(picture: torch.Tensor, num_channels: int) -> torch.Tensor:
    """uint8 (3, height, width) with other channels: the mean for one, repeated for more than three."""
    if num_channels == 1:
        return picture.float().mean(dim=0, keepdim=True).to(torch.uint8)
    return picture[torch.arange(num_channels) % 3]


def _sample_photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


class StereoFolder:
    """Pairs in a folder: `left/`, `right/` and `disparity/`, or these under the name of the split, with files of equal
    names but for the ending; disparities as `read_disparity` reads them.

    Args:
        folder: as said.
        split: "train", "test" or "validation", looked for inside.
        disparity_scale: see `read_disparity`.
        num_channels: of the pictures.

    Raises:
        ValueError: for a folder without them, or a picture without its partners.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", disparity_scale: float = 256.0, num_channels: int = 3
    ):
        folder = Path(folder)
        parts = folder / split
        if not parts.is_dir() and split == "train":
            parts = folder
        self.name, self.disparity_scale, self.num_channels = str(folder), disparity_scale, num_channels
        files = [
            {path.stem: path for path in sorted((parts / part).glob("*.*"))} for part in ("left", "right", "disparity")
        ]
        if not files[0]:
            raise ValueError(
                f"There are no pictures in {parts / 'left'}: stereo pairs stand in left/, right/ and disparity/ of a "
                f"folder, or of its folder {split}/. --dataset_name {SYNTHETIC} makes pairs."
            )
        alone = [stem for stem in files[0] if stem not in files[1] or stem not in files[2]]
        if alone:
            raise ValueError(f"{parts} has no right picture or no disparity for {', '.join(alone[:3])}.")
        self._files = [tuple(part[stem] for part in files) for stem in files[0]]

    def __len__(self) -> int:
        return len(self._files)

    def sample(self, index: int) -> StereoSample:
        """The pair of an index.

        Raises:
            BadImageError: for files that cannot be read.
        """
        *pictures, disparity = self._files[index]
        views = [to_channels(open_image(path, str(path)), self.num_channels) for path in pictures]
        views = [to_uint8_tensor(view) if isinstance(view, Image.Image) else view for view in views]
        return StereoSample(*views, read_disparity(disparity, self.disparity_scale), str(pictures[0]))


def load_stereo(
    name: str, split: str, size: tuple[int, int], max_disparity: int, num_channels: int = 3
) -> SyntheticStereo | StereoFolder:
    """A split of a data set of pairs.

    Args:
        name: "synthetic_stereo", or a folder, see `StereoFolder`.
        split: "train", "test" or "validation".
        size, max_disparity: of the pairs that are made.
        num_channels: of the pictures.

    Raises:
        ValueError: for neither, or another split.
    """
    if name != SYNTHETIC:
        return StereoFolder(name, split, num_channels=num_channels)
    if split not in SPLITS:
        raise ValueError(f"{SYNTHETIC} has no split {split!r}; it has {', '.join(SPLITS)}.")
    length, seed = SPLITS[split]
    return SyntheticStereo(length, size, max_disparity, seed=seed, num_channels=num_channels)


class StereoDataset(KeyedDataset):
    """Pairs and their disparities for `PreTrainer`, asked for as (epoch, index).

    A pair that cannot be read is replaced by the next one, and its name travels with the batch.

    Args:
        source: `SyntheticStereo` or `StereoFolder`.
        processor: `StereoImageProcessor`.
        seed: the run's seed.
        training: random crops, instead of padding.
    """

    def __init__(self, source, processor: StereoImageProcessor, seed: int = 0, training: bool = True):
        self.source, self.processor, self.seed, self.training = source, processor, seed, training

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int, epoch: int = 0) -> str:
        """What the source calls a pair."""
        return self.source.sample(index).name

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict:
        """A batch.

        Args:
            keys: (epoch, index) of each sample.

        Returns:
            pixels: uint8 (batch, 2, channels, height, width).
            targets: float32 (batch, height, width), the left disparities.
            indices: int64 (batch,), of the samples that were used.
            epoch: int64 (), of the first sample.
            bad: names and faults of the pairs that were asked for and cannot be read.
        """
        epochs, asked = zip(*keys, strict=True)
        samples, used, bad = zip(*(self._good_sample(index) for index in asked), strict=True)
        indices = torch.tensor(used)
        cuts = None
        if self.training:
            cuts = self.processor.keys_for(indices, self.seed, torch.tensor(epochs), CROP)
        return {
            "pixels": self.processor.prepare([(sample.left, sample.right) for sample in samples], cuts),
            "targets": self.processor.prepare_disparities([sample.disparity for sample in samples], cuts),
            "indices": indices,
            "epoch": torch.tensor(epochs[0]),
            "bad": [fault for faults in bad for fault in faults],
        }

    def _good_sample(self, index: int) -> tuple[StereoSample, int, list[str]]:
        faults: list[str] = []
        for candidate in (number % len(self) for number in range(index, index + len(self))):
            try:
                return self.source.sample(candidate), candidate, faults[:1]
            except BadImageError as error:
                faults.append(str(error))
        raise ValueError(f"No pair of {self.source.name} can be read, for example {faults[0]}.")


__all__ = ["StereoDataset", "StereoFolder", "StereoSample", "SyntheticStereo", "load_stereo"]
