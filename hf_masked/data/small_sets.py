"""Small sets of real pictures that need no account and little time: Fashion-MNIST and scikit-learn's digits.

The same Fashion-MNIST comes from the first of: the Hub, Debian's package where it is installed, Debian's package
unpacked into the cache (neither of the two needs root).
"""

import gzip
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

logger = logging.getLogger(__name__)

CLOTHES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
DIGITS = [str(digit) for digit in range(10)]
SPLITS = ("train", "test")

HUB_ID = "zalando-datasets/fashion_mnist"
HUB_TIMEOUT = 3.0  # seconds
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PREFIXES = {"train": "train", "test": "t10k"}
APT_TIMEOUT = 300.0  # seconds
# Without these an unreachable mirror costs minutes.
APT_OPTIONS = ["-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10", "-o", "Acquire::Retries=1"]

Pictures = tuple[str, np.ndarray, np.ndarray, list[str]]  # name, uint8 (n, height, width), int64 (n,), class names


def fashion_mnist(split: str) -> Pictures:
    """Fashion-MNIST: 60,000 + 10,000 gray pictures of clothes, 28 x 28; the digits, with a line that says so, where it
    cannot be had.

    Raises:
        ValueError: for a split other than "train" and "test".
    """
    _check_split("fashion_mnist", split)
    found = _from_hub(split) or _from_debian(split)
    if found is not None:
        return *found, CLOTHES
    print(
        f"Fashion-MNIST cannot be had here (no connection to the Hub, no Debian package {DEBIAN_PACKAGE}): "
        "scikit-learn's digits, 8 x 8 pixels, take its place.",
        flush=True,
    )
    return digits(split)


def digits(split: str) -> Pictures:
    """scikit-learn's handwritten digits: 1,437 + 360 gray pictures, 8 x 8, split by class in a fixed way.

    Raises:
        ValueError: for a split other than "train" and "test".
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    _check_split("digits", split)
    bunch = load_digits()
    parts = train_test_split(np.arange(len(bunch.target)), test_size=0.2, stratify=bunch.target, random_state=0)
    rows = parts[SPLITS.index(split)]
    images = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
    return "scikit-learn's digits", images, bunch.target[rows].astype(np.int64), DIGITS


def read_idx(path: Path) -> np.ndarray:
    """Reads a gzipped IDX file of unsigned bytes, the format of MNIST.

    Raises:
        ValueError: if it is something else, or cut short.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}): fetch it again.") from error
    axes = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = np.frombuffer(content[4 : 4 + 4 * axes], dtype=">u4")
    values = np.frombuffer(content[4 + 4 * axes :], dtype=np.uint8)
    if not axes or len(shape) != axes or values.size != shape.prod():
        raise ValueError(f"{path} is no whole IDX file of unsigned bytes: fetch it again.")
    return values.reshape(shape)


def cache_folder() -> Path:
    """Where fetched data stays between runs: HF_MASKED_CACHE, or ~/.cache/hf_masked."""
    return Path(os.environ.get("HF_MASKED_CACHE", "~/.cache/hf_masked")).expanduser()


def _check_split(name: str, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"{name} has no split {split!r}; it has train and test: choose one of them.")


def _from_hub(split: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    stored = cache_folder() / "fashion_mnist" / f"hub_{split}.npz"
    if not stored.exists() and not (_hub_answers() and _store_hub_copy(split, stored)):
        return None
    with np.load(stored) as arrays:
        return f"Fashion-MNIST (the Hub's {HUB_ID})", arrays["images"], arrays["labels"]


def _hub_answers() -> bool:
    """Whether one question is answered soon; the Hub's offline switches are heeded."""
    from datasets import config
    from huggingface_hub import HfApi

    if config.HF_HUB_OFFLINE:
        return False
    try:
        HfApi().dataset_info(HUB_ID, timeout=HUB_TIMEOUT)
    # No name server, no route, a proxy's refusal, a mirror without this set: all mean the next source.
    except Exception as error:
        logger.info("The Hub does not answer: %s", error)
        return False
    return True


def _store_hub_copy(split: str, target: Path) -> bool:
    """Decodes the Hub's PNG files once, so that later runs read arrays."""
    from datasets import load_dataset

    try:
        rows = load_dataset(HUB_ID, split=split)
    # As above: a connection may also break later on.
    except Exception as error:
        logger.warning("Fashion-MNIST could not be fetched from the Hub: %s", error)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        images = np.stack([np.asarray(image) for image in rows["image"]])
        np.savez(part, images=images, labels=np.asarray(rows["label"][:], dtype=np.int64))
        part.replace(target)
    return True


def _from_debian(split: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    folder = _debian_folder()
    if folder is None:
        return None
    prefix = DEBIAN_PREFIXES[split]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64)
    return f"Fashion-MNIST (Debian's {DEBIAN_PACKAGE})", images, labels


def _debian_folder() -> Path | None:
    if DEBIAN_FOLDER.is_dir():
        return DEBIAN_FOLDER
    unpacked = cache_folder() / "fashion_mnist" / "debian"
    if unpacked.is_dir() or _unpack_package(unpacked):
        return unpacked / DEBIAN_FOLDER.relative_to("/")
    return None


def _unpack_package(target: Path) -> bool:
    """Downloads and unpacks Debian's package with apt-get and dpkg, as any user; False where that cannot be done."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        folder = Path(name)
        try:
            _download_package(folder)
            _run("dpkg", "-x", str(next(folder.glob("*.deb"))), "unpacked", cwd=folder)
        except (OSError, subprocess.SubprocessError, StopIteration) as error:
            logger.info("Debian's %s could not be fetched: %s", DEBIAN_PACKAGE, error)
            return False
        if not target.exists():  # another process may have been quicker
            (folder / "unpacked").rename(target)
    return True


def _download_package(folder: Path) -> None:
    try:
        _run("apt-get", *APT_OPTIONS, "download", DEBIAN_PACKAGE, cwd=folder)
    except subprocess.CalledProcessError:
        # A container's lists of packages are often empty. A set of lists in a folder of our own needs no root.
        (folder / "state/lists/partial").mkdir(parents=True)
        (folder / "cache/archives/partial").mkdir(parents=True)
        own_lists = [*APT_OPTIONS, "-o", f"Dir::State={folder}/state", "-o", f"Dir::Cache={folder}/cache"]
        own_lists += ["-o", "Dir::State::status=/var/lib/dpkg/status"]
        _run("apt-get", *own_lists, "update", cwd=folder)
        _run("apt-get", *own_lists, "download", DEBIAN_PACKAGE, cwd=folder)


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=APT_TIMEOUT)
