"""Everything that touches PEFT's internals: configs, layers and tuners that the papers' files build on.

A tuner of this package is a `PeftConfig`, a layer that holds a module of the frozen model as `base_layer` and calls it
with other weights, and a `BaseTuner`. `get_peft_model`, several adapters, saving, loading, merging and switching off
are PEFT's own. What PEFT has no public way for, and what this file therefore relies on: the closed enum `PeftType`;
`BaseTuner._create_and_replace`, `_prepare_adapter_config`, `_replace_module`, `_post_injection_hook`,
`_unload_and_optionally_merge` and `_remap_adapter_state_dict_for_load`; the names in `adapter_layer_names` and
`other_param_names` and what reads them; `BufferDict`. `tests/modeling/weight_masking/test_peft_bridge.py` says which
of them a new PEFT has moved.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_masked.modeling.parts.bits import pack_bits, packed_size, unpack_bits

try:
    from peft import PeftConfig
    from peft.tuners._buffer_dict import BufferDict
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import register_peft_method
    from peft.utils.peft_types import PeftType
except ModuleNotFoundError as error:
    if error.name != "peft":
        raise
    raise ImportError("Masks on weights need PEFT: pip install 'hf-masked[peft]'.") from error

logger = logging.getLogger(__name__)

CANNOT_UNMERGE = (
    "A mask that has been multiplied into the weights cannot be taken out: what it set to zero is lost. Load the base "
    "model again, or merge a copy: copy.deepcopy(model).merge_and_unload()."
)


@dataclass
class TunerConfig(PeftConfig):
    """Base of the tuners' configs. The class attributes are the facts that catalogue, cards and command line read."""

    # Name in the catalogue, of PEFT's type (in capitals) and, with "_" behind it, of the parameters.
    tuner_name: ClassVar[str]
    paper_title: ClassVar[str]
    paper_year: ClassVar[int]
    arxiv_id: ClassVar[str]
    reference_repository: ClassVar[str | None] = None
    weights_licence: ClassVar[str | None] = None
    modality: ClassVar[str] = "any"
    masks: ClassVar[str]
    predicts: ClassVar[str]
    backbones: ClassVar[tuple[str, ...]]

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = peft_type(self.tuner_name)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self.check()

    def check(self) -> None:
        """Raises a ValueError for values that do not fit together."""


def check_choice(config: TunerConfig, name: str, choices: tuple) -> None:
    if getattr(config, name) not in choices:
        raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(map(str, choices))}.")


def check_range(config: TunerConfig, name: str, low: float, high: float, closed: str = "[]") -> None:
    """Checks that a number lies between two; a round bracket in `closed` excludes that end."""
    value = getattr(config, name)
    above = value >= low if closed[0] == "[" else value > low
    below = value <= high if closed[1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} is {value}; it must lie in {closed[0]}{low}, {high}{closed[1]}.")


class TunerLayer(nn.Module, BaseTunerLayer):
    """A module of the frozen model, called with other weights.

    Subclasses name their containers, `{adapter: tensor}`, in `adapter_layer_names` (what is trained) and
    `other_param_names`, and say in `changed_parameters` what the weights are.

    Args:
        base_layer: the module.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self.merged_adapters = []

    def add_adapter(self, adapter_name: str, config: TunerConfig, tuner: "Tuner") -> None:
        """Makes the tensors of a new adapter."""
        raise NotImplementedError

    def holds(self, adapter_name: str) -> bool:
        """Whether the layer has tensors of an adapter."""
        return adapter_name in self._get_available_adapters()

    def changed_parameters(self, adapter_names: list[str], final: bool = False) -> dict[str, torch.Tensor]:
        """Weights under adapters, {name within the base layer: tensor}; what is not named stays as it is.

        Args:
            adapter_names: adapters that the layer holds.
            final: as in evaluation, whatever the mode of the layer is.
        """
        raise NotImplementedError

    def forward(self, *args, **kwargs):
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        names = [] if self.merged else [name for name in self.active_adapters if self.holds(name)]
        changed = self.changed_parameters(names) if names else {}
        return functional_call(self.base_layer, changed, args, kwargs) if changed else self.base_layer(*args, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes adapters, by default the active ones, into the base layer's weights, one after the other.

        Raises:
            ValueError: with `safe_merge`, if the new weights are not finite; then the layer stays as it is.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if not self.holds(name):
                continue
            changed = self.merged_parameters(name)
            if safe_merge and not all(tensor.isfinite().all() for tensor in changed.values()):
                raise ValueError(f"The adapter {name!r} makes weights that are not finite; the layer stays as it is.")
            self.before_merge(name)
            for parameter, tensor in changed.items():
                # In place, so that tied weights stay tied.
                self.base_layer.get_parameter(parameter).copy_(tensor)
            self.merged_adapters.append(name)

    def merged_parameters(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The weights that merging writes."""
        return self.changed_parameters([adapter_name], final=True)

    def before_merge(self, adapter_name: str) -> None:
        """Keeps what `unmerge` needs, if it is possible at all."""

    def unmerge(self) -> None:
        if self.merged:
            raise RuntimeError(CANNOT_UNMERGE)


class Tuner(BaseTuner):
    """Base of the tuners: wraps the modules that the config targets."""

    tuner_layer_cls: type[TunerLayer]
    # Modules that are wrapped if the config names none, {type of the model: names}.
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}
    # Share of the training that is done, 0 to 1, and batches per step; `MaskCallback` sets them.
    training_progress: float | None = None
    accumulation_steps: int = 1

    def check_target(self, name: str, module: nn.Module) -> None:
        """Raises a ValueError for a module that cannot be wrapped."""

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.add_adapter(adapter_name, config, self)
            return
        self.check_target(current_key, target)
        layer = self.tuner_layer_cls(target)
        layer.add_adapter(adapter_name, config, self)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls) and module.holds(adapter_name):
                module.prepare_loading(adapter_name, config, renamed, f"{name}.")
        return renamed


class WeightMaskLayer(TunerLayer):
    """A linear layer whose weight is multiplied by a mask.

    While an adapter is trained its mask follows from real scores. Once it is hardened, or loaded for inference, it is
    bits and has no scores: (ceil(units / 8),) uint8.

    Subclasses have a `prefix`, `scores_of_units`, `training_mask` and `hard_units`.
    """

    prefix: ClassVar[str]

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        setattr(self, self.adapter_layer_names[0], nn.ParameterDict({}))
        setattr(self, self.other_param_names[0], BufferDict({}, persistent=True))
        self.settings: dict[str, TunerConfig] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = (f"{cls.prefix}scores",)
        cls.other_param_names = (f"{cls.prefix}bits", "settings")

    @property
    def scores(self) -> nn.ParameterDict:
        return getattr(self, self.adapter_layer_names[0])

    @property
    def bits(self) -> BufferDict:
        return getattr(self, self.other_param_names[0])

    @property
    def trains(self) -> bool:
        """Whether scores of an active adapter make the mask."""
        return not self.disable_adapters and any(name in self.scores for name in self.active_adapters)

    @property
    def matrix(self) -> torch.Tensor:
        """The frozen weight as (out, in); GPT-2's `Conv1D` stores it the other way round."""
        weight = self.base_layer.weight.detach()
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def unit_shape(self, config: TunerConfig) -> tuple[int, ...]:
        """Shape of what has one bit each."""
        return tuple(self.matrix.shape)

    def initial_scores(self, config: TunerConfig) -> torch.Tensor:
        """Scores of a new adapter, from torch's generator."""
        raise NotImplementedError

    def scores_of_units(self, units: torch.Tensor, config: TunerConfig) -> torch.Tensor:
        """Scores to go on training from, whose hard mask is the given one: bool (*units) in."""
        raise NotImplementedError

    def training_mask(self, adapter_name: str) -> torch.Tensor:
        """float (*units), with a gradient to the scores."""
        raise NotImplementedError

    def hard_units(self, scores: torch.Tensor, config: TunerConfig) -> torch.Tensor:
        """bool (*units), True = kept."""
        raise NotImplementedError

    def add_adapter(self, adapter_name: str, config: TunerConfig, tuner: Tuner) -> None:
        self.settings[adapter_name] = config
        if config.inference_mode:
            # The saved bits come here. No room for scores: a task costs what its file costs.
            self.bits[adapter_name] = torch.zeros(
                packed_size(self.unit_shape(config)), dtype=torch.uint8, device=self.base_layer.weight.device
            )
        else:
            self.scores[adapter_name] = nn.Parameter(self.initial_scores(config))

    def _get_available_adapters(self) -> set[str]:
        # PEFT looks into modules only; BufferDict is one, but not of those that it looks into.
        return {*self.scores.keys(), *self.bits.keys()}

    def units(self, adapter_name: str) -> torch.Tensor:
        """The mask as in evaluation: bool (*units), True = kept."""
        config = self.settings[adapter_name]
        if adapter_name in self.bits:
            return unpack_bits(self.bits[adapter_name], self.unit_shape(config))
        return self.hard_units(self.scores[adapter_name].detach(), config)

    def mask(self, adapter_name: str, final: bool = False) -> torch.Tensor:
        """Mask of the weight, broadcasts to (out, in): float in [0, 1] while scores are trained, else bool."""
        trained = self.training and not final and adapter_name in self.scores
        return self.spread(self.training_mask(adapter_name) if trained else self.units(adapter_name))

    def spread(self, units: torch.Tensor) -> torch.Tensor:
        """What is of the units' shape, such that it broadcasts to (out, in)."""
        return units

    def changed_parameters(self, adapter_names, final=False):
        weight = self.matrix
        for name in adapter_names:
            weight = weight * self.mask(name, final).to(weight.dtype)
        return {"weight": weight.T if isinstance(self.base_layer, Conv1D) else weight}

    @torch.no_grad()
    def harden(self, adapter_name: str) -> None:
        """Replaces scores by bits."""
        if adapter_name in self.scores:
            self.bits[adapter_name] = pack_bits(self.units(adapter_name))
            del self.scores[adapter_name]

    @torch.no_grad()
    def set_units(self, adapter_name: str, units: torch.Tensor) -> None:
        """Makes a mask an adapter's: bool (*units)."""
        config = self.settings[adapter_name]
        if units.shape != self.unit_shape(config):
            raise ValueError(f"A mask of shape {tuple(units.shape)} was given; expected {self.unit_shape(config)}.")
        units = units.to(self.base_layer.weight.device)
        if adapter_name in self.scores:
            self.scores[adapter_name].copy_(self.scores_of_units(units, config))
        else:
            self.bits[adapter_name] = pack_bits(units)

    @torch.no_grad()
    def prepare_loading(self, adapter_name: str, config: TunerConfig, state_dict: dict, prefix: str) -> None:
        """Turns saved bits into scores, or saved scores into bits, if the layer has the other."""
        scores = f"{prefix}{self.adapter_layer_names[0]}"
        bits = f"{prefix}{self.other_param_names[0]}"
        # PEFT has given the adapter's name only to keys that the model has.
        if adapter_name in self.scores and bits in state_dict:
            units = unpack_bits(state_dict.pop(bits), self.unit_shape(config))
            state_dict[f"{scores}.{adapter_name}"] = self.scores_of_units(units, config)
            logger.warning_once(
                f"The adapter {adapter_name!r} was saved as bits. Training goes on from this mask, with new scores."
            )
        elif adapter_name in self.bits and scores in state_dict:
            state_dict[f"{bits}.{adapter_name}"] = pack_bits(self.hard_units(state_dict.pop(scores), config))


class WeightMaskTuner(Tuner):
    """Base of the tuners that multiply weights by masks."""

    tuner_layer_cls: type[WeightMaskLayer]

    def check_target(self, name, module):
        if not isinstance(module, nn.Linear | Conv1D):
            raise ValueError(
                f"{name} is a {type(module).__name__}; only linear layers can be masked. Name others in "
                "target_modules, or this one in exclude_modules."
            )

    # Hooks on the frozen model: PEFT calls that model, and not its tuner, where the config has no task type.
    hooks: tuple = ()

    def _post_injection_hook(self, model, config, adapter_name):
        if not self.hooks:
            self.hooks = (
                model.register_forward_pre_hook(self.before_forward),
                model.register_forward_hook(self.after_forward, with_kwargs=True),
            )

    def _unload_and_optionally_merge(self, *args, **kwargs):
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self.hooks:
            hook.remove()
        return model

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss in training, if anything."""
        return None

    def needs_progress(self) -> bool:
        """Whether the active adapter changes with the progress of the training."""
        return False

    def is_training(self) -> bool:
        return self.model.training and any(layer.trains for layer in mask_layers_of(self.model))

    def before_forward(self, model: nn.Module, inputs: tuple) -> None:
        if self.training_progress is None and self.is_training() and self.needs_progress():
            logger.warning_once(
                "Nothing tells the masks how far the training is, so their schedules stand at the start. Give the "
                "Trainer callbacks=[MaskCallback()], from hf_masked.training.mask_callbacks."
            )

    def after_forward(self, model: nn.Module, inputs: tuple, named_inputs: dict, outputs):
        penalty = self.penalty() if self.is_training() else None
        if penalty is None or getattr(outputs, "loss", True) is None:
            return outputs
        if not hasattr(outputs, "loss"):
            logger.warning_once(
                "The model returns no loss that the mask's own could be added to: call it with labels and "
                "return_dict=True, or add model.base_model.penalty() to your loss."
            )
            return outputs
        # The Trainer divides by the accumulated batches itself unless it hands the model their number of items.
        share = self.accumulation_steps if named_inputs.get("num_items_in_batch") is not None else 1
        outputs.loss = outputs.loss + penalty / share
        return outputs


def mask_layers_of(model: nn.Module) -> Iterator[WeightMaskLayer]:
    return (module for module in model.modules() if isinstance(module, WeightMaskLayer))


def mask_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, WeightMaskLayer, str]]:
    """Masked layers under an adapter, by default the first active one: name in the base model, layer, adapter."""
    for name, module in model.named_modules():
        if isinstance(module, WeightMaskLayer):
            adapter = adapter_name or module.active_adapters[0]
            if module.holds(adapter):
                yield name.removeprefix("base_model.model."), module, adapter


def harden_masks(model: nn.Module, adapter_name: str | None = None) -> None:
    """Replaces scores by bits, which is the end of an adapter's training: `save_pretrained` then writes only bits.

    Args:
        model: from `get_peft_model`.
        adapter_name: by default the active adapter.

    Raises:
        ValueError: if the model has no such masks.
    """
    layers = list(mask_layers(model, adapter_name))
    if not layers:
        raise ValueError(f"The model has no masks of an adapter {adapter_name!r}; nothing to harden.")
    for _, layer, adapter in layers:
        layer.harden(adapter)


def read_masks(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """Masks as in evaluation, {name of the weight: bool (out, in), True = kept}."""
    return {
        f"{name}.weight": layer.mask(adapter, final=True).expand(layer.matrix.shape)
        for name, layer, adapter in mask_layers(model, adapter_name)
    }


def sparsity(model: nn.Module, adapter_name: str | None = None) -> float:
    """Share of the masked layers' weights that is set to zero."""
    masks = read_masks(model, adapter_name).values()
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def peft_type(name: str) -> PeftType:
    """PEFT's type of a tuner, which is added to the closed enum if it is not there."""
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        member._sort_order_ = len(PeftType.__members__)
        # The attribute first: an enum refuses to set those that it knows as members.
        setattr(PeftType, value, member)
        PeftType._member_names_.append(value)
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
    return PeftType[value]


def register_with_peft(config: type[TunerConfig], tuner: type[Tuner]) -> None:
    """Makes a tuner known to `get_peft_model` and `PeftModel.from_pretrained`."""
    peft_type(config.tuner_name)
    register_peft_method(name=config.tuner_name, config_cls=config, model_cls=tuner, prefix=f"{config.tuner_name}_")
