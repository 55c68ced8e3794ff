"""Uniform numbers that depend on named things, never on the order in which they are asked for.

What is drawn for one sample (its crop, its augmentation, its mask) is a function of the run's seed, the epoch, the
sample's index and the view. The number of workers, the number of processes, the order of the batches and a resume in
the middle of an epoch therefore change nothing.

A *draw* is the one thing that mask and view functions ask for: a callable `draw(n)` that returns float32
`(batch, n)` in [0, 1), fresh numbers at each call. `keyed_draw` makes it from keys, `torch_draw` from a generator.
"""

from collections.abc import Callable, Sequence

import torch

Draw = Callable[[int], torch.Tensor]

# Constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_WORD = 1 << 64


def _signed(value: int) -> int:
    """The two's complement int64 of an unsigned 64-bit number (torch has no full uint64 arithmetic)."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's shift of int64 copies the sign bit in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer on int64; products wrap modulo 2**64."""
    value = (value ^ _shift_right(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MIX_2)
    return value ^ _shift_right(value, 31)


def sample_keys(
    seed: int,
    epoch: int | torch.Tensor,
    indices: torch.Tensor | Sequence[int],
    view: int | torch.Tensor = 0,
    purpose: int = 0,
) -> torch.Tensor:
    """Keys of samples.

    Args:
        seed: the run's seed.
        epoch: the pass over the data, from 0; or int64 (batch,), one for each sample.
        indices: (batch,) the samples' positions in the data set.
        view: which view of the sample, from 0; or int64 that broadcasts with the rest, for several at once.
        purpose: separates draws made at different places (a crop in a worker, a mask on the device).

    Returns:
        int64 (batch,), or what the arguments broadcast to, on the device of `indices`.
    """
    keys = torch.as_tensor(indices, dtype=torch.int64)
    for number in (seed, epoch, view, purpose):
        step = number * _signed(_GAMMA) if isinstance(number, torch.Tensor) else _signed(number * _GAMMA)
        keys = _mix(keys + step + _signed(_GAMMA))
    return keys


def keyed_draw(keys: torch.Tensor) -> Draw:
    """A draw whose row i depends on `keys[i]` alone: the same on every device and in every batch.

    Args:
        keys: int64 (batch,), see `sample_keys`.
    """
    position = 0

    def draw(n: int) -> torch.Tensor:
        nonlocal position
        counters = torch.arange(position + 1, position + n + 1, device=keys.device) * _signed(_GAMMA)
        position += n
        # The top 24 bits, which a float32 holds exactly.
        return _shift_right(_mix(keys[:, None] + counters), 40).float() * 2.0**-24

    return draw


def torch_draw(batch: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None) -> Draw:
    """A draw from torch's generator: the given one, or the global one of `device`."""
    return lambda n: torch.rand(batch, n, device=device, generator=generator)


def model_draw(
    batch: int,
    device: torch.device | str,
    training: bool,
    generator: torch.Generator | None = None,
    noise: torch.Tensor | None = None,
) -> Draw:
    """What a model that is called directly draws from: `noise` where it is given; torch's generator in training, or
    whenever one is given; a fixed key per row of the batch in eval, so that an evaluation repeats its figure."""
    if noise is not None:
        return given_draw(noise)
    if training or generator is not None:
        return torch_draw(batch, device, generator)
    return keyed_draw(sample_keys(0, 0, torch.arange(batch, device=device)))


def given_draw(noise: torch.Tensor) -> Draw:
    """A draw that hands out the columns of `noise`, float (batch, n), in order.

    Raises:
        ValueError: when more numbers are asked for than `noise` has.
    """
    position = 0

    def draw(n: int) -> torch.Tensor:
        nonlocal position
        if position + n > noise.shape[1]:
            raise ValueError(
                f"`noise` has shape {tuple(noise.shape)}, but {position + n} numbers per sample are needed: pass "
                f"noise of shape ({noise.shape[0]}, {position + n})."
            )
        position += n
        return noise[:, position - n : position]

    return draw
