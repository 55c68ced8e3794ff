"""Weights and inputs for parity tests: numbers that follow from a name and a shape alone, on every platform.

The reference was run with the weights that `filled` gives for its own parameter names, so that no weights are stored
and our conversion of its names is tested along the way. Changing anything here invalidates the stored values.
"""

import hashlib
import math

import numpy as np
import torch


def filled(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """float32 values for parameters: name -> shape in, name -> tensor out.

    Matrices and kernels are uniform with standard deviation 1 / sqrt(fan-in), one-dimensional weights (norms) lie
    within 0.1 of 1, biases and tokens within 0.2 of 0.
    """
    return {name: _parameter(name, tuple(shape)) for name, shape in shapes.items()}


def filled_pixels(shape: tuple[int, ...], name: str = "pixels") -> torch.Tensor:
    """float32 in [-2, 2), about what normalised pixels span."""
    return _tensor(2 * _uniform(name, shape))


def filled_noise(batch: int, units: int, name: str = "noise") -> torch.Tensor:
    """float32 (batch, units) in (0, 1), distinct within a row."""
    ranks = _bits(name, (batch, units)).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return _tensor((ranks + 0.5) / units)


def _parameter(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    numbers = _uniform(name, shape)
    if not name.endswith("weight"):
        return _tensor(0.2 * numbers)
    if len(shape) == 1:
        return _tensor(1 + 0.1 * numbers)
    return _tensor(math.sqrt(3 / math.prod(shape[1:])) * numbers)


def _bits(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """uint64: SplitMix64's stream, started at the first eight bytes of the name's SHA-256."""
    start = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    value = start + np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (value ^ (value >> np.uint64(31))).reshape(shape)


def _uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64 in [-1, 1), multiples of 2**-23."""
    return (_bits(name, shape) >> np.uint64(40)) * 2.0**-23 - 1


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32))
