"""The momentum twin: a copy of modules that follows them slowly and makes their targets (BYOL, MoCo, HPM, ...)."""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

logger = logging.getLogger(__name__)


class StandstillWatch:
    """Warns once where weights change and what should follow them is never updated.

    It reads a value from the device until one or the other is known, which is after the optimizer's first step.

    Args:
        follower: what it is called.
    """

    def __init__(self, follower: str):
        self.follower = follower
        self._watching = True
        self._first_seen: torch.Tensor | None = None

    def stop(self) -> None:
        """It has been updated."""
        self._watching, self._first_seen = False, None

    def forget(self) -> None:
        """What the weights were is no longer of interest."""
        self._first_seen = None

    def look_at(self, parameter: nn.Parameter) -> None:
        if not self._watching:
            return
        # Of a sharded parameter this process's share.
        weights = (parameter.to_local() if hasattr(parameter, "to_local") else parameter).detach()
        seen = self._first_seen
        if seen is None or (seen.shape, seen.dtype, seen.device) != (weights.shape, weights.dtype, weights.device):
            self._first_seen = weights.clone()
        elif not torch.equal(weights, seen):
            self._watching = False
            logger.warning(
                "The weights have changed and the %s stands still: nothing calls `update_twins()` after the "
                "optimizer's steps. Use `PreTrainer`, or add `TrainingProgressCallback()` of "
                "`hf_masked.training.callbacks` to the Trainer's callbacks.",
                self.follower,
            )


class MomentumTwin(nn.Module):
    """Frozen copies of some modules of a model; their parameters are moving averages of the model's own.

    Its children bear the names of the modules they copy. A model writes

        self.twin = MomentumTwin(self, ("backbone", "projector"), momentum=cosine_momentum(0.996))

    before `post_init()` and runs `self.twin.backbone(...)` under `torch.no_grad()`. `VariantModel` does the rest: the
    twin begins as the exact copy, also where a checkpoint holds none, stays frozen after loading, is saved with the
    model, and is moved by `update_twins()`, which `TrainingProgressCallback` calls after each optimizer step.

    The average is kept in the parameters' own type. Under autocast that is float32; with weights in bfloat16, steps
    smaller than a 256th of a weight are lost.

    Args:
        online: the model.
        names: its submodules to copy, direct children.
        momentum: m in `twin <- m * twin + (1 - m) * online`, in [0, 1], or a function of the training progress.
        eval_mode: the twin stays in eval mode, whatever the model's, and its buffers (batch norm's running statistics)
            are copied with each update. Without it the twin follows the model's mode and keeps its own running
            statistics, as in BYOL and MoCo.

    Raises:
        ValueError: for a momentum outside [0, 1].
    """

    def __init__(
        self,
        online: nn.Module,
        names: Sequence[str],
        momentum: float | Callable[[float], float],
        eval_mode: bool = False,
    ):
        super().__init__()
        self.momentum = momentum
        self.eval_mode = eval_mode
        self._watch = StandstillWatch("momentum twin")
        self.momentum_at(0.0)
        # Copied together, so that what the modules share stays shared.
        for name, module in copy.deepcopy({name: online.get_submodule(name) for name in names}).items():
            self.add_module(name, module)
        self.requires_grad_(False)
        self.train(online.training)

    def train(self, mode: bool = True):
        return super().train(mode and not self.eval_mode)

    def momentum_at(self, progress: float) -> float:
        """m at a point of training, from 0 (begin) to 1 (end)."""
        momentum = self.momentum(progress) if callable(self.momentum) else self.momentum
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"The momentum of a twin is {momentum} at progress {progress}; it must be in [0, 1].")
        return momentum

    @torch.no_grad()
    def update(self, online: nn.Module, progress: float) -> None:
        """One step of the average, after a step of the optimizer.

        Args:
            online: the model that holds the copied modules.
            progress: of training, 0 to 1.
        """
        torch._foreach_lerp_(*self._pairs(online, "parameters"), 1.0 - self.momentum_at(progress))
        if self.eval_mode:
            self._copy(online, "buffers")
        self._watch.stop()

    def wait(self) -> None:
        """Stays as it is in one step, where twins take turns, which is no standstill."""
        self._watch.stop()

    @torch.no_grad()
    def reset(self, online: nn.Module) -> None:
        """Makes the twin equal to `online` again."""
        self._copy(online, "parameters")
        self._copy(online, "buffers")
        self._watch.forget()

    def watch(self, online: nn.Module) -> None:
        """Warns once if the online weights have changed since the first call and the twin has never been updated."""
        parameter = next((p for p in self._pairs(online, "parameters")[1] if p.requires_grad), None)
        if parameter is not None:
            self._watch.look_at(parameter)

    def _copy(self, online: nn.Module, kind: str) -> None:
        for mine, theirs in zip(*self._pairs(online, kind), strict=True):
            mine.copy_(theirs)

    def _pairs(self, online: nn.Module, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The twin's tensors and the online ones, "parameters" or "buffers", each pair once.

        They are looked up each time: FSDP puts other tensors into the modules.
        """
        pairs = {}
        for name, module in self.named_children():
            theirs = getattr(online.get_submodule(name), kind)()
            pairs |= zip(getattr(module, kind)(), theirs, strict=True)
        return list(pairs.keys()), list(pairs.values())


def cosine_momentum(base: float) -> Callable[[float], float]:
    """A momentum that rises from `base` to 1 over training along half a cosine (BYOL, arXiv 2006.07733, section 3.2).

    The update after step k + 1 of K has the progress k / K.
    """
    return partial(_cosine_momentum, base)


def _cosine_momentum(base: float, progress: float) -> float:
    return 1.0 - (1.0 - base) * (math.cos(math.pi * progress) + 1.0) / 2.0
