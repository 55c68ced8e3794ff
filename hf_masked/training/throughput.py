"""How fast a run is, how long it waits for data, and how much of the machine's matrix rate it achieves."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# Backward takes about twice the operations of forward: once for the inputs' gradients, once for the weights'.
TRAINING_TO_FORWARD = 3

# Above this share of a log interval spent waiting for data the device starves.
STARVING = 0.2


class ThroughputMeter:
    """Counts samples, seconds of waiting and operations between two lines of the log.

    Args:
        device: where the model trains.
        dtype: of its matrix products (autocast's, where it is on).
        processes: that train together; `samples` counts those of all.
        unit: what a sample is called in the log.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, processes: int = 1, unit: str = "images"):
        self.device = device
        self.dtype = dtype
        self.processes = processes
        self.unit = unit
        self.flops_per_sample = 0.0
        self.peak_rate = 0.0
        self.reset()

    def reset(self) -> None:
        self.samples = 0
        self.waited = 0.0
        self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside counts for nothing."""
        started = time.perf_counter()
        yield
        self.started += time.perf_counter() - started

    def calibrate(self, model: torch.nn.Module, inputs: dict) -> None:
        """Counts the model's operations per sample and measures the device's matrix rate, once per run."""
        batch = len(inputs[model.main_input_name])
        self.flops_per_sample = TRAINING_TO_FORWARD * forward_flops(model, inputs) / batch
        self.peak_rate = matmul_rate(self.device, self.dtype)
        self.reset()

    def report(self) -> dict[str, float]:
        """Figures since the last call: samples per second, the shares in percent."""
        seconds = time.perf_counter() - self.started
        figures = {
            f"{self.unit}/s": round(self.samples / seconds, 1),
            "data_wait_%": round(100 * self.waited / seconds, 1),
        }
        if self.peak_rate:
            achieved = self.flops_per_sample * self.samples / seconds
            figures["matmul_rate_%"] = round(100 * achieved / (self.processes * self.peak_rate), 1)
        self.reset()
        return figures


@torch.no_grad()
def forward_flops(model: torch.nn.Module, inputs: dict) -> int:
    """Floating point operations of one forward pass, counted on the operators that run; nothing else changes.

    Args:
        model: is put into eval mode for the count and back again; the random state is restored.
        inputs: of its `forward`.
    """
    was_training = model.training
    model.eval()
    # Only the written-out attention is counted on every device.
    with (
        torch.random.fork_rng(devices=_rng_devices(inputs)),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(**inputs)
    model.train(was_training)
    return counter.get_total_flops()


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The rate of large matrix products on this device, in operations per second: the best of several runs."""
    size = 8192 if device.type == "cuda" else 1024
    # Zeros would run faster on some chips; the generator is a private one.
    generator = torch.Generator(device=device).manual_seed(0)
    left = torch.randn(size, size, device=device, generator=generator).to(dtype)
    right = torch.randn(size, size, device=device, generator=generator).to(dtype)
    best, ends = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _rng_devices(inputs: dict) -> list[torch.device]:
    devices = {value.device for value in inputs.values() if isinstance(value, torch.Tensor)}
    return [device for device in devices if device.type == "cuda"]
