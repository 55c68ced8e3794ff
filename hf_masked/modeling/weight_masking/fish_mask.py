"""FISH Mask: before training, choose the few weights with the most Fisher information, and train only these.

The mask is on updates, not on values: what is not chosen keeps its pretrained value. A task costs its chosen weights'
positions and differences.

Yi-Lin Sung, Varun Nair and Colin Raffel, "Training Neural Networks with Fixed Sparse Masks", NeurIPS 2021, arXiv
2111.09839. Reference implementation: https://github.com/varunnair18/FISH
(`transformers/examples/text-classification/run_glue_sparse_update.py`, `run_glue_asgd.py`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import nn

from hf_masked.modeling.registry import register_tuner
from hf_masked.modeling.weight_masking.peft_bridge import (
    BufferDict,
    Tuner,
    TunerConfig,
    TunerLayer,
    check_choice,
    check_range,
    register_with_peft,
)

FISHERS = ("empirical", "expected")
SCORES = ("square", "absolute")
SELECTIONS = ("fisher", "magnitude", "random", "bias")


@dataclass
class FishMaskConfig(TunerConfig):
    """Config of the FISH Mask.

    Args:
        target_modules: names or a pattern of the modules whose weights may be chosen; by default all that hold weights
            and no further modules: linear layers, convolutions, norms, embeddings.
        exclude_modules: names or a pattern of modules that stay as they are.
        layers_to_transform: numbers of the blocks, with `target_modules` as names.
        layers_pattern: what the blocks' list is called, where it is not found by itself.
        modules_to_save: modules that are trained as a whole and saved beside the differences, as the classifier.
        keep_ratio: share of all weights that is trained, 0.5 % in most of the paper (section 3.1).
        num_samples: examples that the information is estimated from (section 2.2; 1024 on GLUE).
        fisher: "empirical", with the labels, or "expected", over the model's own predictions (equations 3 and 4).
        score: gradients "square", which is Fisher information, or "absolute".
        selection: by "fisher"; or, to compare with, by "magnitude", at "random", or all biases, "bias" (BitFit).
        count_head_in_budget: whether `modules_to_save` count as trained weights, as in the paper.
    """

    tuner_name: ClassVar[str] = "fish_mask"
    paper_title: ClassVar[str] = "Training Neural Networks with Fixed Sparse Masks"
    paper_year: ClassVar[int] = 2021
    arxiv_id: ClassVar[str] = "2111.09839"
    reference_repository: ClassVar[str] = "https://github.com/varunnair18/FISH"
    masks: ClassVar[str] = "updates of all but the most informative weights"
    predicts: ClassVar[str] = "the task, with few weights trained"
    backbones: ClassVar[tuple[str, ...]] = ("any",)

    keep_ratio: float = 0.005
    num_samples: int = 1024
    fisher: str = "empirical"
    score: str = "square"
    selection: str = "fisher"
    count_head_in_budget: bool = True

    def check(self) -> None:
        check_range(self, "keep_ratio", 0, 1, "(]")
        check_choice(self, "fisher", FISHERS)
        check_choice(self, "score", SCORES)
        check_choice(self, "selection", SELECTIONS)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; the information is estimated from at least one.")


class FishMaskLayer(TunerLayer):
    """A module some of whose weights have a trained difference.

    Of each adapter it has `fish_mask_indices`, int32 (chosen,), ascending places in all parameters of the module put
    behind each other, and `fish_mask_values`, float32 (chosen,), the differences there.
    """

    adapter_layer_names = ("fish_mask_values",)
    other_param_names = ("fish_mask_indices",)

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.fish_mask_values = nn.ParameterDict({})
        self.fish_mask_indices = BufferDict({}, persistent=True)
        # Weights that belong to another layer, as a tied output head's: {name here: (layer, name there)}.
        self.tied: dict[str, tuple[FishMaskLayer, str]] | None = None
        # What stood where merged adapters have written, to restore it to the bit.
        self.replaced: dict[str, torch.Tensor] = {}

    def add_adapter(self, adapter_name, config, tuner):
        if self.tied is None:
            self.tied = tuner.owners(self.base_layer)
        self.choose(adapter_name, torch.zeros(0, dtype=torch.int32, device=next(self.base_layer.parameters()).device))

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Weights that this layer's differences are of, in the order of the indices."""
        return {name: weight for name, weight in self.base_layer.named_parameters() if name not in self.tied}

    def choose(self, adapter_name: str, indices: torch.Tensor) -> None:
        """Says which weights an adapter trains, int32 (chosen,); their differences start at zero."""
        trained = adapter_name not in self.fish_mask_values or self.fish_mask_values[adapter_name].requires_grad
        self.fish_mask_indices[adapter_name] = indices
        values = torch.zeros(len(indices), device=indices.device)
        self.fish_mask_values[adapter_name] = nn.Parameter(values, requires_grad=trained)

    def changed_parameters(self, adapter_names, final=False):
        changed = self._own_changed(adapter_names)
        for name, (layer, name_there) in self.tied.items():
            theirs = layer._own_changed([adapter for adapter in adapter_names if layer.holds(adapter)])
            changed |= {name: theirs[name_there]} if theirs else {}
        return changed

    def _own_changed(self, adapter_names):
        chosen = [name for name in adapter_names if len(self.fish_mask_indices[name])]
        own = self.own_parameters()
        if not chosen or not own:
            return {}
        flat = torch.cat([weight.detach().flatten() for weight in own.values()])
        for name in chosen:
            flat.index_add_(0, self.fish_mask_indices[name], self.fish_mask_values[name].to(flat.dtype))
        parts = flat.split([weight.numel() for weight in own.values()])
        return {name: part.view_as(own[name]) for name, part in zip(own, parts, strict=True)}

    def before_merge(self, adapter_name):
        own = [weight.detach().flatten() for weight in self.own_parameters().values()]
        if own:
            self.replaced[adapter_name] = torch.cat(own)[self.fish_mask_indices[adapter_name]]

    def merged_parameters(self, adapter_name):
        # Weights of another layer are merged there, once.
        return self._own_changed([adapter_name])

    @torch.no_grad()
    def unmerge(self):
        """Takes the differences out again, which restores the weights to the bit."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            indices, old = self.fish_mask_indices[name], self.replaced.pop(name, None)
            start = 0
            for weight in self.own_parameters().values():
                here = (indices >= start) & (indices < start + weight.numel())
                weight.view(-1)[indices[here] - start] = old[here]
                start += weight.numel()

    @torch.no_grad()
    def prepare_loading(self, adapter_name, config, state_dict, prefix):
        """Makes room for as many differences as were saved."""
        indices = state_dict.get(f"{prefix}fish_mask_indices.{adapter_name}")
        if indices is not None and len(indices) != len(self.fish_mask_indices[adapter_name]):
            device = self.fish_mask_indices[adapter_name].device
            self.choose(adapter_name, torch.zeros(len(indices), dtype=torch.int32, device=device))


class FishMaskTuner(Tuner):
    """PEFT's tuner of the FISH Mask. `initialize_fish_mask` chooses the weights, after wrapping."""

    prefix = "fish_mask_"
    tuner_layer_cls = FishMaskLayer

    def owners(self, base_layer: nn.Module) -> dict[str, tuple[FishMaskLayer, str]]:
        """Of a module's weights those that another layer has already, with that layer and the name there."""
        layers = [module for module in self.model.modules() if isinstance(module, FishMaskLayer)]
        taken = {id(weight): (layer, name) for layer in layers for name, weight in layer.own_parameters().items()}
        return {n: taken[id(weight)] for n, weight in base_layer.named_parameters() if id(weight) in taken}

    def check_target(self, name, module):
        if next(module.children(), None) is not None or next(module.parameters(), None) is None:
            raise ValueError(
                f"{name} is a {type(module).__name__} with modules inside or without weights; name modules that hold "
                "weights and nothing else in target_modules, or leave it out for all of them."
            )

    def _prepare_adapter_config(self, peft_config, model_config):
        if peft_config.target_modules is None:
            peft_config.target_modules = set(_leaves(self.model))
        return peft_config


def _leaves(model: nn.Module) -> Iterator[str]:
    """Names of the modules that hold weights and no further modules, wrapped ones included."""
    wrapped = [f"{name}." for name, module in model.named_modules() if isinstance(module, FishMaskLayer)]
    for name, module in model.named_modules():
        leaf = next(module.children(), None) is None and next(module.parameters(), None) is not None
        if (leaf or isinstance(module, FishMaskLayer)) and not any(map(name.startswith, wrapped)):
            yield name


def compute_fisher(
    model: nn.Module,
    batches: Iterable[dict],
    num_samples: int = 1024,
    fisher: str = "empirical",
    score: str = "square",
) -> dict[str, torch.Tensor]:
    """The diagonal of the Fisher information, summed over single examples (equations 3 and 4).

    The square of a batch's mean gradient would be something else: batches are taken apart.

    Args:
        model: `model(**inputs)` has a `loss` ("empirical") or `logits` (batch, classes) ("expected"). It is used in
            evaluation mode.
        batches: of inputs, dicts whose tensors have the batch as their first axis; labels among them if "empirical".
        num_samples: examples to take at most.
        fisher: "empirical" or "expected".
        score: "square", or "absolute" values in its place.

    Returns:
        {name: float32} of the parameters that need a gradient, each of the parameter's shape. Those that no gradient
        reaches are zero.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    measure = torch.square if score == "square" else torch.abs
    was_training = model.training
    model.eval()
    try:
        for example in islice(single_examples(batches), num_samples):
            outputs = model(**example)
            for share, loss in _losses(outputs, fisher):
                found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        sums[name] += share * measure(gradient.float())
    finally:
        model.train(was_training)
    return sums


def _losses(outputs, fisher: str) -> Iterator[tuple[float, torch.Tensor]]:
    """Shares and losses whose squared gradients make an example's information."""
    if fisher == "empirical":
        if outputs.loss is None:
            raise ValueError("The model gave no loss: give labels with the inputs, or take fisher='expected'.")
        yield 1.0, outputs.loss
        return
    log_probabilities = outputs.logits.flatten(0, -2).log_softmax(dim=-1)  # (1, classes)
    for row in log_probabilities:
        for log_probability in row:
            yield float(log_probability.exp()), -log_probability


def single_examples(batches: Iterable[dict]) -> Iterator[dict]:
    """Batches of one."""
    for batch in batches:
        size = max(len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())
        for row in range(size):
            yield {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) and value.dim() else value
                for name, value in batch.items()
            }


def select_topk(scores: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """The largest scores of all tensors together: bool masks with exactly `count` True; of equal ones the first.

    Raises:
        ValueError: if there are fewer scores, or none is to be chosen.
    """
    return deal_topk(scores, count, 1)[0]


def deal_topk(scores: dict[str, torch.Tensor], count: int, workers: int) -> list[dict[str, torch.Tensor]]:
    """Disjoint masks for several workers, which the best `workers * count` scores are dealt to in turns (section 3.2).

    Raises:
        ValueError: if there are fewer scores, or none is to be chosen.
    """
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    if not 0 < count * workers <= len(flat):
        raise ValueError(
            f"{count} weights for each of {workers} masks cannot be chosen from {len(flat)}; keep_ratio times all "
            "weights, less those of modules_to_save, must be between."
        )
    order = flat.sort(descending=True, stable=True).indices[: count * workers]
    masks = []
    for worker in range(workers):
        mask = torch.zeros_like(flat, dtype=torch.bool)
        mask[order[worker::workers]] = True
        parts = mask.split([score.numel() for score in scores.values()])
        masks.append({name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)})
    return masks


def initialize_fish_mask(
    model: nn.Module, batches: Iterable[dict] | None = None, adapter_name: str | None = None
) -> dict[str, torch.Tensor]:
    """Chooses the weights that an adapter trains; call it between `get_peft_model` and training.

    Args:
        model: from `get_peft_model`, with the adapter untrained.
        batches: a data loader or list of inputs with labels; may be left out unless the selection is "fisher".
        adapter_name: by default the active adapter.

    Returns:
        The masks, {name of the weight in the base model: bool, True = trained}.

    Raises:
        ValueError: if the budget is spent by `modules_to_save` alone, or data are missing.
    """
    name = adapter_name or model.active_adapters[0]
    config = model.peft_config[name]
    layers = {key: module for key, module in model.named_modules() if isinstance(module, FishMaskLayer)}
    weights = {
        f"{key}.base_layer.{own}": weight
        for key, layer in layers.items()
        if layer.holds(name)
        for own, weight in layer.own_parameters().items()
    }
    if config.selection == "bias":
        masks = {
            key: torch.full_like(weight, key.endswith("bias"), dtype=torch.bool) for key, weight in weights.items()
        }
    else:
        masks = select_topk(_selection_scores(model, weights, batches, config), _budget(model, weights, config))
    for key, layer in layers.items():
        if layer.holds(name):
            own = [masks[f"{key}.base_layer.{parameter}"].flatten() for parameter in layer.own_parameters()]
            if own:
                layer.choose(name, torch.cat(own).nonzero().flatten().int())
    return {key.removeprefix("base_model.model.").replace(".base_layer.", "."): mask for key, mask in masks.items()}


def _selection_scores(model, weights: dict, batches, config: FishMaskConfig) -> dict[str, torch.Tensor]:
    if config.selection == "random":
        return {name: torch.rand(weight.shape, device=weight.device) for name, weight in weights.items()}
    if config.selection == "magnitude":
        return {name: weight.detach().abs() for name, weight in weights.items()}
    if batches is None:
        raise ValueError("selection='fisher' needs data: initialize_fish_mask(model, batches).")
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        # Without adapters: differences of an earlier choice would hide the weights.
        with model.disable_adapter():
            for weight in weights.values():
                weight.requires_grad_(True)
            scores = compute_fisher(model, batches, config.num_samples, config.fisher, config.score)
        return {name: scores[name] for name in weights}
    finally:
        for parameter, flag in needed.items():
            parameter.requires_grad_(flag)


def _budget(model, weights: dict, config: FishMaskConfig) -> int:
    """How many weights of the backbone are trained: the budget less what is trained as a whole."""
    base = model.get_base_model()
    copies = {id(p) for n, p in base.named_parameters() if ".modules_to_save." in n or ".fish_mask_values." in n}
    total = sum(p.numel() for p in base.parameters() if id(p) not in copies)
    head = sum(p.numel() for n, p in base.named_parameters() if ".original_module." in n)
    count = int(total * config.keep_ratio) - (head if config.count_head_in_budget else 0)
    if count <= 0:
        raise ValueError(
            f"keep_ratio={config.keep_ratio} of {total} weights is {int(total * config.keep_ratio)}, and "
            f"modules_to_save alone have {head}: nothing is left for the backbone. Raise keep_ratio, or set "
            "count_head_in_budget=False."
        )
    # Not all weights are in modules that can be wrapped.
    return min(count, sum(weight.numel() for weight in weights.values()))


def tiny_config() -> FishMaskConfig:
    return FishMaskConfig(keep_ratio=0.05, num_samples=4, count_head_in_budget=False)


register_with_peft(FishMaskConfig, FishMaskTuner)
register_tuner(
    config=FishMaskConfig,
    tuner=FishMaskTuner,
    layer=FishMaskLayer,
    tiny_config=tiny_config,
    initialize=initialize_fish_mask,
)

__all__ = ["FishMaskConfig", "FishMaskTuner", "compute_fisher", "deal_topk", "initialize_fish_mask", "select_topk"]
