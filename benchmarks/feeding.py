"""Photographs on disk to batches on the device: images per second of one core, of four ways.

    python benchmarks/feeding.py              # writes benchmarks/results/feeding_cpu.json
    python benchmarks/feeding.py --rounds 3 --no_write

The pictures are scikit-learn's two photographs, cropped and resized to 500 x 375 and saved as JPEGs. Each way makes
float batches of 3 x 224 x 224 of them:

    transformers      `ViTImageProcessorPil`: decode, resize, rescale, normalise (no random crop, no flip)
    Pillow + NumPy    decode, random resized crop, flip, normalise, picture by picture
    ours              `ImageDataset` (decode, crop, resize) and `finish_training` (flip, normalise, mask)
    ours, cached      the same from the cache that `hf-masked cache` makes, short side 256

All resize bicubically and run on one core, in one process, in turns; the figures to quote are the ratios.
"""

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import ViTImageProcessorPil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, interleaved_seconds, median_ratio, write_result
from hf_masked import MaskedImageProcessor
from hf_masked.data import ImageDataset, load_images
from hf_masked.data.cached import write_cache
from hf_masked.normalization import IMAGENET_MEAN, IMAGENET_STD

PICTURES, BATCH = 192, 64
SIZE, CACHED_SIZE = 224, 256
QUALITY = 90
ROUNDS = 9


def write_photographs(folder: Path) -> None:
    """The same JPEGs at each call: crops that are at least 500 x 375 pixels, resized to that."""
    photographs = [Image.fromarray(array) for array in load_sample_images().images]  # 640 x 427
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        photograph = photographs[number % len(photographs)]
        height = int(rng.integers(375, photograph.height + 1))
        width = height * 4 // 3
        left = int(rng.integers(0, photograph.width - width + 1))
        top = int(rng.integers(0, photograph.height - height + 1))
        box = (left, top, left + width, top + height)
        picture = photograph.resize((500, 375), Image.Resampling.BICUBIC, box=box)
        picture.save(folder / f"{number:03}.jpg", quality=QUALITY)


def batches_of(items: list) -> list[list]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def transformers_way(files: list[Path]):
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, resample=3, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )

    def run() -> None:
        for batch in batches_of(files):
            processor([Image.open(file).convert("RGB") for file in batch], return_tensors="pt")

    return run


def plain_way(files: list[Path]):
    rng = np.random.default_rng(0)
    mean, std = np.float32(IMAGENET_MEAN), np.float32(IMAGENET_STD)

    def view(file: Path) -> torch.Tensor:
        image = Image.open(file).convert("RGB")
        left, top, width, height = random_box(rng, *image.size)
        image = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, np.float32) / 255 - mean) / std
        return torch.from_numpy(pixels.transpose(2, 0, 1))

    def run() -> None:
        for batch in batches_of(files):
            torch.stack([view(file) for file in batch])

    return run


def random_box(rng: np.random.Generator, full_width: int, full_height: int) -> tuple[int, int, int, int]:
    while True:
        area = full_width * full_height * rng.uniform(0.2, 1.0)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if width <= full_width and height <= full_height:
            left, top = rng.integers(0, full_width - width + 1), rng.integers(0, full_height - height + 1)
            return int(left), int(top), width, height


def our_way(folder: Path):
    processor = MaskedImageProcessor(size=SIZE)
    dataset = ImageDataset(load_images(str(folder)), processor)
    epoch = 0

    def run() -> None:
        nonlocal epoch
        epoch += 1
        for indices in batches_of(list(range(len(dataset)))):
            batch = dataset.__getitems__([(epoch, index) for index in indices])
            processor.finish_training(batch["pixels"], batch["indices"], 0, batch["epoch"])

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--no_write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary) / "photographs", Path(temporary) / "cache"
        folder.mkdir()
        write_photographs(folder)
        write_cache({"train": load_images(str(folder))}, cache, CACHED_SIZE)
        files = sorted(folder.iterdir())
        kilobytes = statistics.mean(file.stat().st_size for file in files) / 1000
        ways = {
            "transformers": transformers_way(files),
            "Pillow + NumPy": plain_way(files),
            "ours": our_way(folder),
            "ours, cached": our_way(cache),
        }
        seconds = interleaved_seconds(ways, args.rounds, torch.device("cpu"))
    result = {
        "environment": environment(torch.device("cpu")) | {"pillow": PIL.__version__},
        "pictures": PICTURES,
        "mean_kilobytes": round(kilobytes, 1),
        "rounds": args.rounds,
        "ways": {},
    }
    print(f"{'':16}{'images/s':>10}{'x transformers':>16}{'x Pillow + NumPy':>18}")
    for name, times in seconds.items():
        # Time is the other way round: theirs over ours is how many times faster ours is.
        row = result["ways"][name] = {
            "images_per_second": PICTURES / statistics.median(times),
            "times_transformers": median_ratio(seconds["transformers"], times),
            "times_plain": median_ratio(seconds["Pillow + NumPy"], times),
        }
        print(f"{name:16}{row['images_per_second']:10.0f}{row['times_transformers']:16.2f}{row['times_plain']:18.2f}")
    if not args.no_write:
        print("wrote", write_result("feeding_cpu", result))


if __name__ == "__main__":
    main()
