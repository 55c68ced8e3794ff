"""MaskLLM: learnt masks that keep n of each m consecutive weights, 2 of 4 for the hardware.

Each group of weights has a categorical distribution over the patterns that keep n of m; a Gumbel softmax draws from it
in training, ever more sharply, and the weights stay frozen. A mask of another method can be where it starts.

Gongfan Fang, Hongxu Yin, Saurav Muralidharan, Greg Heinrich, Jeff Pool, Jan Kautz, Pavlo Molchanov and Xinchao Wang,
"MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models", NeurIPS 2024, arXiv 2409.17481. Reference
implementation: https://github.com/NVlabs/MaskLLM (`learnable_sparsity/differentiable_mask.py`, `pretrain_maskllm.py`,
`tasks/pruning/sparsity/core.py`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_masked.modeling.parts.bits import unpack_bits
from hf_masked.modeling.registry import register_tuner
from hf_masked.modeling.weight_masking.peft_bridge import (
    TunerConfig,
    WeightMaskLayer,
    WeightMaskTuner,
    check_choice,
    check_range,
    mask_layers,
    mask_layers_of,
    register_with_peft,
)

# 4 of 8: more would be more logits than a table of patterns is good for.
MOST_PATTERNS = 70

PRIORS = ("magnitude", "wanda", "sparsegpt")


@dataclass
class MaskLLMConfig(TunerConfig):
    """Config of MaskLLM.

    Args:
        target_modules: names or a pattern of the linear layers to mask; by default "all-linear", which leaves out the
            output head.
        exclude_modules: names or a pattern of layers that stay whole.
        layers_to_transform: numbers of the blocks to mask, with `target_modules` as names.
        layers_pattern: what the blocks' list is called, where it is not found by itself.
        modules_to_save: modules that are trained as usual and saved beside the masks.
        n: how many of each group are kept.
        m: weights of a group, consecutive inputs of one output.
        init_std: standard deviation of the logits at the start.
        prior: None, or "magnitude": the n largest of each group are the likelier ones from the start (section 3.3).
            What needs data, "wanda" and "sparsegpt", is `initialize_prior`'s.
        prior_strength: how much likelier, in standard deviations of the layer's logits.
        temperature: of the Gumbel softmax at the start and at the end of the training.
        logit_scale: what multiplies the logits, likewise.
        hard: draw single patterns in training, with a straight-through gradient, instead of mixtures.
        weight_norm_reg: what the squared norm of the kept weights is rewarded with, fading to 0 (equation 11). It is a
            sum over all layers: for a small model 0 is a fair start.
    """

    tuner_name: ClassVar[str] = "maskllm"
    paper_title: ClassVar[str] = "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models"
    paper_year: ClassVar[int] = 2024
    arxiv_id: ClassVar[str] = "2409.17481"
    reference_repository: ClassVar[str] = "https://github.com/NVlabs/MaskLLM"
    masks: ClassVar[str] = "two of each four weights"
    predicts: ClassVar[str] = "the task, from a frozen model"
    backbones: ClassVar[tuple[str, ...]] = ("any with linear layers",)

    target_modules: list[str] | str | None = "all-linear"
    n: int = 2
    m: int = 4
    init_std: float = 0.01
    prior: str | None = None
    prior_strength: float = 3.0
    temperature: tuple[float, float] | list[float] = (4.0, 0.05)
    logit_scale: tuple[float, float] | list[float] = (100.0, 500.0)
    hard: bool = False
    weight_norm_reg: float = 1e-5

    def check(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"n={self.n} of m={self.m} cannot be kept; n must lie between 0 and m.")
        if math.comb(self.m, self.n) > MOST_PATTERNS:
            raise ValueError(
                f"{self.n} of {self.m} are {math.comb(self.m, self.n)} patterns, more than {MOST_PATTERNS}; take "
                "smaller groups, as 2 of 4."
            )
        check_range(self, "init_std", 0, math.inf, "()")
        check_range(self, "prior_strength", 0, math.inf, "[)")
        check_range(self, "weight_norm_reg", 0, math.inf, "[)")
        check_choice(self, "prior", (None, "magnitude"))
        for name in ("temperature", "logit_scale"):
            ends = getattr(self, name)
            if len(ends) != 2 or min(ends) <= 0:
                raise ValueError(f"{name} is {ends}; expected two positive numbers, at the start and at the end.")
            # What JSON makes of a tuple.
            setattr(self, name, list(ends))

    def patterns(self, device=None) -> torch.Tensor:
        """float (patterns, m): all that keep n of m, as 1100, 1010, 1001, 0110, 0101, 0011."""
        kept = torch.tensor(list(combinations(range(self.m), self.n)), device=device)
        return torch.zeros(len(kept), self.m, device=device).scatter_(1, kept, 1.0)


class MaskLLMLayer(WeightMaskLayer):
    """A linear layer under n:m masks. Scores are the logits, (out * in / m, patterns)."""

    prefix = "maskllm_"
    # Set before each step: where the training is, see `MaskLLMTuner`.
    progress: float = 0.0
    # Squared norm of the kept weights in the last training forward.
    kept_norm: torch.Tensor | None = None

    def add_adapter(self, adapter_name, config, tuner):
        columns = self.matrix.shape[1]
        if columns % config.m:
            raise ValueError(
                f"A layer with {columns} inputs cannot be cut into groups of m={config.m}; name it in exclude_modules."
            )
        super().add_adapter(adapter_name, config, tuner)
        if config.prior and adapter_name in self.scores:
            self.add_prior(adapter_name, keep_largest(self.matrix.abs(), config))

    def initial_scores(self, config):
        weight = self.base_layer.weight
        shape = weight.numel() // config.m, math.comb(config.m, config.n)
        return torch.empty(shape, device=weight.device).normal_(std=config.init_std)

    @torch.no_grad()
    def add_prior(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Makes the patterns of a mask, bool (out, in), the likelier ones (equation 10)."""
        config, logits = self.settings[adapter_name], self.scores[adapter_name]
        overlap = mask.reshape(-1, config.m).to(logits) @ config.patterns(logits.device).T  # (groups, patterns)
        logits += (overlap - config.n / 2) * logits.std() * config.prior_strength

    def scores_of_units(self, units, config):
        patterns = config.patterns(units.device)
        overlap = units.reshape(-1, config.m).float() @ patterns.T
        return (overlap - config.n / 2) * config.init_std * max(config.prior_strength, 1.0)

    def training_mask(self, adapter_name):
        config, logits = self.settings[adapter_name], self.scores[adapter_name]
        temperature, scale = (
            start + (end - start) * self.progress for start, end in (config.temperature, config.logit_scale)
        )
        drawn = F.gumbel_softmax(logits * scale, tau=temperature, hard=config.hard)  # (groups, patterns)
        return (drawn @ config.patterns(logits.device)).view(self.matrix.shape)  # (out, in)

    def hard_units(self, scores, config):
        kept = config.patterns(scores.device)[scores.argmax(dim=-1)]
        return kept.bool().view(self.matrix.shape)

    def changed_parameters(self, adapter_names, final=False):
        changed = super().changed_parameters(adapter_names, final)
        self.kept_norm = changed["weight"].float().square().sum() if self.training and not final else None
        return changed


class MaskLLMTuner(WeightMaskTuner):
    """PEFT's tuner of MaskLLM. `MaskCallback` tells it the progress of the training, on which all schedules hang."""

    prefix = "maskllm_"
    tuner_layer_cls = MaskLLMLayer

    def needs_progress(self):
        return True

    def before_forward(self, model, inputs):
        super().before_forward(model, inputs)
        for layer in mask_layers_of(model):
            layer.progress, layer.kept_norm = self.training_progress or 0.0, None

    def penalty(self) -> torch.Tensor | None:
        """Minus the squared norm of the kept weights, times what is left of its weight."""
        config = self.peft_config[self.active_adapters[0]]
        weight = config.weight_norm_reg * (1 - (self.training_progress or 0.0))
        norms = [layer.kept_norm for layer in mask_layers_of(self.model) if layer.kept_norm is not None]
        return -weight * sum(norms) if norms and weight else None


def keep_largest(scores: torch.Tensor, config: MaskLLMConfig) -> torch.Tensor:
    """The n largest of each group of m: float (out, in) -> bool (out, in). This is one-shot pruning."""
    groups = scores.reshape(-1, config.m)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(config.n, dim=1).indices, True)
    return kept.view(scores.shape)


@torch.no_grad()
def initialize_prior(
    model: nn.Module, batches: Iterable[dict], criterion: str = "sparsegpt", adapter_name: str | None = None
) -> dict[str, torch.Tensor]:
    """Starts the masks at those of one-shot pruning, which needs data (section 3.3).

    Args:
        model: from `get_peft_model`, untrained.
        batches: inputs of the model.
        criterion: "magnitude"; "wanda", magnitude times the norm of the input (arXiv 2306.11695); or "sparsegpt",
            squared magnitude over the squared diagonal of the factor of the inverse Hessian (arXiv 2301.00774),
            without its update of the weights.
        adapter_name: by default the active adapter.

    Returns:
        The masks, {name of the weight: bool (out, in)}.

    Raises:
        ValueError: for an unknown criterion, or if there are no logits to shift or no batches.
    """
    if criterion not in PRIORS:
        raise ValueError(f"criterion is {criterion!r}; it must be one of {', '.join(PRIORS)}.")
    layers = list(mask_layers(model, adapter_name))
    if not layers or not all(adapter in layer.scores for _, layer, adapter in layers):
        raise ValueError("The model has no MaskLLM logits to start at a prior; wrap it with inference_mode=False.")
    moments = _input_moments(model, [layer for _, layer, _ in layers], batches, full=criterion == "sparsegpt")
    masks = {}
    for (name, layer, adapter), moment in zip(layers, moments, strict=True):
        mask = keep_largest(_importance(layer.matrix.float(), moment, criterion), layer.settings[adapter])
        layer.add_prior(adapter, mask)
        masks[f"{name}.weight"] = mask
    return masks


def _input_moments(model, layers, batches, full: bool) -> list[torch.Tensor]:
    """Sums over all inputs x of a layer: x x^T, (in, in), or only its diagonal, (in,)."""
    sums = [torch.zeros((), device=layer.matrix.device) for layer in layers]

    def counted(place):
        def hook(module, inputs):
            rows = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[place] = sums[place] + (rows.T @ rows if full else rows.square().sum(dim=0))

        return hook

    hooks = [layer.register_forward_pre_hook(counted(place)) for place, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            for batch in batches:
                model(**batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if any(moment.dim() == 0 for moment in sums):
        raise ValueError("Some masked layers saw no input: give at least one batch that goes through all of them.")
    return sums


def _importance(weight: torch.Tensor, moment: torch.Tensor, criterion: str) -> torch.Tensor:
    """Of each weight: (out, in)."""
    if criterion == "magnitude":
        return weight.abs()
    if criterion == "wanda":
        return weight.abs() * moment.sqrt()
    dead = moment.diagonal() == 0
    hessian = moment + torch.diag(dead.to(moment))
    # 1 % of the mean on the diagonal, as in SparseGPT.
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse).diagonal()
    return weight.masked_fill(dead, 0).square() / factor.square()


def load_npz_masks(model: nn.Module, path: str | Path, adapter_name: str | None = None) -> None:
    """Reads the masks that the authors publish: a NumPy archive with `numpy.packbits` of each `<weight's name>.mask`.

    Raises:
        ValueError: if a masked layer has no entry, or one of another size.
    """
    with np.load(path) as archive:
        for name, layer, adapter in mask_layers(model, adapter_name):
            key = f"{name}.weight.mask"
            if key not in archive:
                raise ValueError(f"{path} has no {key!r}; mask only layers that it names: target_modules.")
            shape = tuple(layer.matrix.shape)
            if len(archive[key]) != math.ceil(math.prod(shape) / 8):
                raise ValueError(f"{key} has {len(archive[key])} bytes, which do not fit a weight of shape {shape}.")
            layer.set_units(adapter, unpack_bits(torch.from_numpy(archive[key]), shape))


def tiny_config() -> MaskLLMConfig:
    return MaskLLMConfig(target_modules=["query", "key", "value", "dense"], weight_norm_reg=1e-4)


register_with_peft(MaskLLMConfig, MaskLLMTuner)
register_tuner(config=MaskLLMConfig, tuner=MaskLLMTuner, layer=MaskLLMLayer, tiny_config=tiny_config)

__all__ = ["MaskLLMConfig", "MaskLLMTuner", "initialize_prior", "load_npz_masks"]
