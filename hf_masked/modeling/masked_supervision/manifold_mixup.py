"""Manifold Mixup: at a random layer the hidden states of each sample are mixed with those of another one, and the
targets with the same weight.

Vikas Verma et al., "Manifold Mixup: Better Representations by Interpolating Hidden States", ICML 2019,
arXiv 1806.05236.
Reference implementation: https://github.com/vikasverma1077/manifold_mixup (`supervised/`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hf_masked.modeling.registry import register_method
from hf_masked.modeling.regularizers import Pass, Regularizer, RegularizerConfig

INPUT = "input"
LOSSES = ("cross_entropy", "bce_softmax")

# Modules whose outputs may be mixed, by type of the model: stages of convolutional nets and of Swin, blocks of others.
LAYERS = {
    "resnet": "resnet.encoder.stages",
    "regnet": "regnet.encoder.stages",
    "convnext": "convnext.encoder.stages",
    "convnextv2": "convnextv2.encoder.stages",
    "swin": "swin.encoder.layers",
    "swinv2": "swinv2.encoder.layers",
}


@dataclass
class ManifoldMixupConfig(RegularizerConfig):
    """Config of Manifold Mixup.

    Args:
        alpha: of the Beta distribution of the weights: 2 in the paper, 0.2 for Tiny ImageNet; 0 mixes nothing.
        layers: names of modules whose output may be mixed, "input" for the pictures: ["input"] is Mixup. "auto": the
            input and the first half of the stages of a convolutional net or Swin, or the first third of the blocks of
            a Transformer.
        loss: "cross_entropy", the paper's formula, or "bce_softmax", the binary cross-entropy of the softmax that the
            reference's code has.
    """

    method_name: ClassVar[str] = "manifold_mixup"
    paper_title: ClassVar[str] = "Manifold Mixup: Better Representations by Interpolating Hidden States"
    paper_year: ClassVar[int] = 2018
    arxiv_id: ClassVar[str] = "1806.05236"
    reference_repository: ClassVar[str] = "https://github.com/vikasverma1077/manifold_mixup"
    masks: ClassVar[str] = "nothing: hidden states of pairs of pictures are mixed"
    predicts: ClassVar[str] = "the mixed classes (supervised)"
    backbones: ClassVar[tuple[str, ...]] = ("any image classifier",)

    alpha: float = 2.0
    layers: str | list[str] = "auto"
    loss: str = "cross_entropy"

    def check(self) -> None:
        if self.alpha < 0:
            raise ValueError(f"alpha is {self.alpha}; it must be 0 or more, for example 2.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; it must be one of {', '.join(LOSSES)}.")
        if (isinstance(self.layers, str) and self.layers != "auto") or not self.layers:
            raise ValueError(
                f"layers is {self.layers!r}; it must be 'auto' or a list of names, for example ['input']."
            )


@dataclass
class Mix:
    """What is drawn for a batch.

    Args:
        layer: name of the module, or "input".
        weight: of a sample itself, in [0, 1]; the other one has the rest.
        partners: int64 (batch,), the other one of each sample.
    """

    layer: str
    weight: float
    partners: torch.Tensor

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Mixed along the batch, the first axis."""
        return self.weight * values + (1 - self.weight) * values[self.partners]


def draw_mix(config: ManifoldMixupConfig, layers: list[str], keys: torch.Tensor) -> Mix:
    """One layer, one weight and one permutation for the batch of these keys, a function of the first of them."""
    generator = np.random.default_rng(int(keys[0]) % 2**63)
    layer = layers[generator.integers(len(layers))]
    weight = float(generator.beta(config.alpha, config.alpha)) if config.alpha else 1.0
    partners = torch.from_numpy(generator.permutation(len(keys)))
    return Mix(layer, weight, partners.to(keys.device))


def eligible_layers(model: PreTrainedModel, config: ManifoldMixupConfig) -> list[str]:
    """Names of the modules whose output may be mixed, and "input".

    Raises:
        ValueError: for names that the model does not have, or a model whose blocks "auto" does not find.
    """
    if config.layers != "auto":
        known = dict(model.named_modules())
        unknown = [name for name in config.layers if name != INPUT and name not in known]
        if unknown:
            raise ValueError(f"{type(model).__name__} has no modules {unknown}; `model.named_modules()` lists them.")
        return list(config.layers)
    stages = LAYERS.get(model.config.model_type)
    if stages:
        count = len(model.get_submodule(stages))
        return [INPUT, *(f"{stages}.{stage}" for stage in range(max(1, count // 2)))]
    depth = getattr(model.config, "num_hidden_layers", 0)
    blocks = next(
        (n for n, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth), None
    )
    if blocks is None:
        raise ValueError(f"Where the blocks of a {model.config.model_type} stand is not known: name them in layers.")
    return [INPUT, *(f"{blocks}.{block}" for block in range(max(1, depth // 3)))]


@contextmanager
def mixed_states(model: nn.Module, mix: Mix) -> Iterator[None]:
    """Inside the block the module `mix.layer` hands on its output, or the first of its outputs, mixed."""
    if mix.layer == INPUT:
        yield
        return

    def hook(module, arguments, output):
        if isinstance(output, tuple):
            return (mix.of(output[0]), *output[1:])
        return mix.of(output)

    handle = model.get_submodule(mix.layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def bce_softmax(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of the softmax, mean over batch and classes (`supervised/main.py`)."""
    # Not torch's function, which autocast refuses on GPUs; its logarithms stop at -100 too.
    yes = logits.float().log_softmax(dim=1)
    no = torch.log1p(-yes.exp()).clamp(min=-100)
    return -(targets * yes.clamp(min=-100) + (1 - targets) * no).mean()


class ManifoldMixup(Regularizer):
    """Mixes hidden states and targets; `last` is what was drawn for the last batch."""

    config: ManifoldMixupConfig
    last: Mix | None = None

    def passes(self, model, inputs, targets, criterion, keys):
        mix = self.last = draw_mix(self.config, eligible_layers(model, self.config), keys)
        if mix.layer == INPUT:
            inputs = inputs | {"pixel_values": mix.of(inputs["pixel_values"])}
        if self.config.loss == "bce_softmax":
            criterion = bce_softmax
        yield Pass(inputs, mix.of(targets), criterion, context=mixed_states(model, mix))


register_method(config=ManifoldMixupConfig, method=ManifoldMixup, tiny_config=ManifoldMixupConfig)

__all__ = ["ManifoldMixup", "ManifoldMixupConfig"]
