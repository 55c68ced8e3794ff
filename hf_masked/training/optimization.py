"""What optimizers are given: parameter groups, learning rates that scale with the batch, and LARS."""

import math
import re
from bisect import bisect_right
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

# A block of a transformers vision model, as its parameters' names show it: `layers.3.` (ViT, DeiT, BEiT),
# `encoder.layer.3.` (DINOv2), or a stage's block: `encoder.layers.1.blocks.3.` (Swin), `encoder.stages.1.layers.3.`
# (ResNet, ConvNeXt). Groups: the first and, where there are stages, the second number.
_BLOCK = re.compile(r"(?:^|\.)(?:layers?|blocks|stages)\.(\d+)\.(?:(?:blocks|layers)\.(\d+)\.)?")


def scaled_learning_rate(base: float, effective_batch: int, reference: int = 256) -> float:
    """The linear scaling rule, `base * effective_batch / reference` (Goyal et al., arXiv 1706.02677).

    Args:
        base: the learning rate per `reference` samples.
        effective_batch: samples per optimizer step: batch per device x devices x accumulated batches.
    """
    return base * effective_batch / reference


def multistep_schedule(
    optimizer: torch.optim.Optimizer, warmup_steps: int, milestones: list[int], factor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up from 0, then the full learning rate, times `factor` from each milestone on.

    transformers has no such schedule.

    Args:
        warmup_steps: optimizer steps.
        milestones: optimizer steps, ascending.
    """

    def scale(step: int) -> float:
        return step / warmup_steps if step < warmup_steps else factor ** bisect_right(milestones, step)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def repeated_schedule(scheduler: LRScheduler, cycles: int, num_training_steps: int) -> LRScheduler:
    """Runs a schedule through several times, warm-up included, in equal parts of the training.

    Args:
        scheduler: the schedule of one part, of `cycle_length` steps.
        cycles: number of parts.
        num_training_steps: of the whole training; part k begins at its step ceil(k * num_training_steps / cycles).

    Raises:
        ValueError: for a schedule that is no function of the step.
    """
    if cycles == 1:
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{type(scheduler).__name__} cannot be run through {cycles} times: choose an lr_scheduler_type such as "
            "cosine or linear, or lr_cycles=1."
        )

    def repeated(schedule):
        def scale(step: int) -> float:
            cycle = min(step * cycles // num_training_steps, cycles - 1)
            return schedule(step - math.ceil(cycle * num_training_steps / cycles))

        return scale

    return LambdaLR(scheduler.optimizer, [repeated(schedule) for schedule in scheduler.lr_lambdas])


def cycle_length(cycles: int, num_training_steps: int) -> int:
    """Steps of one of `cycles` equal parts of the training, of the longest where they are not quite equal."""
    return math.ceil(num_training_steps / cycles)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rate: float | None = None,
    layer_decay: float | None = None,
    no_weight_decay: Iterable[str] = (),
) -> list[dict]:
    """Groups of the trainable parameters for an optimizer.

    No weight decay on parameters of one dimension (norms, biases) unless `model.decay_everything`, nor on the names in
    `no_weight_decay` and in `model.no_weight_decay()`, where that exists. Tokens and position tables have three
    dimensions and decay unless they are named, as in the reference code of MAE (`util/lr_decay.py`).

    With `layer_decay` d and L blocks, block j (from 0) has the learning rate times d^(L - j), what comes before the
    blocks times d^(L + 1), what comes after them times 1 (BEiT, arXiv 2106.08254; MAE, appendix A.1). Stages are
    flattened into one row of blocks; a stage's downsampling goes with the block beside it.

    What `model.constant_learning_rate()` names has groups of its own, marked for `spare_constant_rates`. Where
    `model.parameter_factors()` exists, it multiplies the learning rate and the weight decay of what it names, and says
    that these decay, whatever their dimensions.

    Args:
        model: any model; for `layer_decay`, one whose blocks bear the names of transformers' vision models.
        weight_decay: of the parameters that decay.
        learning_rate: sets "lr" in each group; by default the optimizer's own holds.
        layer_decay: d above, in (0, 1]; None for one learning rate.
        no_weight_decay: names, ends of names after a dot, or globs.

    Returns:
        A list of {"params", "weight_decay", "constant_lr"} and, with `learning_rate`, "lr", in the order of the
        model's parameters.

    Raises:
        ValueError: for `layer_decay` or a model's factors without `learning_rate`, or for `layer_decay` on a model
            without recognisable blocks.
    """
    factors = model.parameter_factors() if hasattr(model, "parameter_factors") else {}
    if learning_rate is None and (layer_decay is not None or factors):
        raise ValueError(
            "layer_decay and the model's `parameter_factors` need learning_rate: each group's rate is learning_rate "
            "times its scale."
        )
    exempt = {*no_weight_decay, *(model.no_weight_decay() if hasattr(model, "no_weight_decay") else ())}
    constant = model.constant_learning_rate() if hasattr(model, "constant_learning_rate") else set()
    decay_everything = getattr(model, "decay_everything", False)
    names = [name for name, _ in model.named_parameters()]
    scales = dict.fromkeys(names, 1.0) if layer_decay is None else layer_scales(names, layer_decay)
    groups: dict[tuple[float, float, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own_factors = next((factors[pattern] for pattern in factors if _named(name, {pattern})), None)
        decays = (decay_everything or parameter.ndim > 1) and not _named(name, exempt)
        rate, decay = own_factors or (1.0, float(decays))
        is_constant = _named(name, constant)
        group = groups.setdefault(
            (rate * scales[name], decay, is_constant),
            {"params": [], "weight_decay": weight_decay * decay, "constant_lr": is_constant},
        )
        if learning_rate is not None:
            group["lr"] = learning_rate * rate * scales[name]
        group["params"].append(parameter)
    return list(groups.values())


def spare_constant_rates(scheduler: LRScheduler) -> LRScheduler:
    """The same schedule, except that groups marked "constant_lr" keep their initial rate from the first step on.

    Raises:
        ValueError: for such groups under a schedule that is no function of the step.
    """
    optimizer = scheduler.optimizer
    if not any(group.get("constant_lr") for group in optimizer.param_groups):
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"{type(scheduler).__name__} cannot leave a group's learning rate constant: choose an lr_scheduler_type "
            "such as cosine or linear, or switch the model's constant rates off."
        )
    return LambdaLR(
        optimizer,
        [
            _always if group.get("constant_lr") else schedule
            for group, schedule in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True)
        ],
    )


def _always(step: int) -> float:
    return 1.0


def layer_scales(names: list[str], layer_decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate under layer-wise decay, see `parameter_groups`.

    Args:
        names: the names of all parameters, in the model's order.
        layer_decay: the factor from one block to the next, towards the input.

    Raises:
        ValueError: for names without recognisable blocks.
    """
    blocks = _blocks(names)
    if not blocks:
        raise ValueError(
            "layer_decay needs a model whose blocks are named as in transformers' vision models "
            f"(layers.0, encoder.layer.0, encoder.stages.0.layers.0, ...); its parameters are {', '.join(names[:3])}, "
            "... Set layer_decay=None."
        )
    numbers = {block: number for number, block in enumerate(sorted(set(blocks.values())), start=1)}
    last = len(numbers) + 1
    layers = {name: numbers[blocks[name]] if name in blocks else 0 if "embed" in name else last for name in names}
    return {name: layer_decay ** (last - layer) for name, layer in layers.items()}


def _blocks(names: list[str]) -> dict[str, tuple[int, int]]:
    """(stage, block) of each parameter that belongs to one; models without stages have the stage 0 only."""
    found = {name: match for name in names if (match := _BLOCK.search(name))}
    if not any(match[2] for match in found.values()):
        return {name: (0, int(match[1])) for name, match in found.items()}
    blocks, neighbour = {}, (-1, 0)
    for name, match in found.items():
        stage = int(match[1])
        if match[2] is not None:
            neighbour = (stage, int(match[2]))
        elif neighbour[0] != stage:
            neighbour = (stage, 0)
        # Outside the blocks, Swin's downsampling follows the stage's last one, ConvNeXt's precedes the first.
        blocks[name] = neighbour
    return blocks


def _named(name: str, patterns: set[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern) for pattern in patterns)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg, arXiv 1708.03888), in the form of MoCo v3 and MAE.

    The gradient (plus weight decay) of a parameter of two or more dimensions is scaled to `trust_coefficient` times
    the parameter's norm; one-dimensional parameters are neither scaled nor decayed. Then SGD with momentum.

    Args:
        params: parameters or groups.
        lr: learning rate.
        weight_decay, momentum, trust_coefficient: as above.
    """

    def __init__(
        self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, trust_coefficient: float = 0.001
    ):
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                update = _trusted_gradient(parameter, group["weight_decay"], group["trust_coefficient"])
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.add_(state["momentum_buffer"], alpha=-group["lr"])
        return loss


def _trusted_gradient(parameter: torch.Tensor, weight_decay: float, trust_coefficient: float) -> torch.Tensor:
    if parameter.ndim <= 1:
        return parameter.grad
    gradient = parameter.grad + weight_decay * parameter
    norm, gradient_norm = parameter.norm(), gradient.norm()
    # Zero weights or a zero gradient would stop the parameter for good, or divide by zero.
    scale = torch.where((norm > 0) & (gradient_norm > 0), trust_coefficient * norm / gradient_norm, 1.0)
    return gradient * scale
