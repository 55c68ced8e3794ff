"""The catalogue: every variant on one line, read by the Auto classes, the command line, the docs and the tests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from hf_masked.modeling.base import VariantConfig, VariantModel
from hf_masked.modeling.regularizers import Regularizer, RegularizerConfig

if TYPE_CHECKING:
    from torch import nn

    from hf_masked.modeling.weight_masking.peft_bridge import Tuner, TunerConfig, TunerLayer

PREFIX = "hf_masked_"

# Families that need another package, and its extra: imported when they are asked for.
LATER = {"hf_masked.modeling.weight_masking": "peft"}


@dataclass(frozen=True)
class Variant:
    """One entry of the catalogue.

    Args:
        config: its config class, which holds the paper's facts.
        pretraining: the class with the loss, `...ForPreTraining`.
        model: the class that returns features.
        tiny_config: makes a config of some ten thousand parameters, for tests and docs.
        heads: task heads, {Auto class: model class}.
        other_heads: task heads for which there is no Auto class.
        convert: `convert(official state dict, config) -> our state dict`, where official weights exist.
        official_config: `official_config(official state dict) -> config`.
        example_inputs: `example_inputs(config, batch) -> inputs of forward`, where the modality's default will not do.
        kind: how it is judged (the design's section 5): "model", or "procedure" with tests of its own.
    """

    config: type[VariantConfig]
    pretraining: type[VariantModel]
    model: type[VariantModel]
    tiny_config: Callable[[], VariantConfig]
    heads: dict[type, type[VariantModel]] = field(default_factory=dict)
    other_heads: tuple[type[VariantModel], ...] = ()
    convert: Callable[[dict, VariantConfig], dict] | None = None
    official_config: Callable[[dict], VariantConfig] | None = None
    example_inputs: Callable[[VariantConfig, int], dict[str, torch.Tensor]] | None = None
    kind: str = "model"

    @property
    def name(self) -> str:
        return self.config.model_type.removeprefix(PREFIX)

    @property
    def family(self) -> str:
        """The folder its file stands in."""
        return self.config.__module__.split(".")[-2]

    @property
    def classes(self) -> tuple[type, ...]:
        return self.config, self.model, self.pretraining, *self.heads.values()

    @property
    def declined_checks(self) -> dict[str, str]:
        return self.pretraining.declined_checks

    @property
    def processor(self) -> str:
        return self.config.processor

    def inputs(self, config: VariantConfig, batch: int = 2) -> dict[str, torch.Tensor]:
        """Example inputs of `forward`, from torch's generator."""
        return (self.example_inputs or _image_inputs)(config, batch)


@dataclass(frozen=True)
class TunerVariant:
    """An entry of the kind "tuner": masks on the weights of a frozen model, through PEFT.

    Args:
        config: its `PeftConfig`, which holds the paper's facts.
        tuner: its `BaseTuner`.
        layer: its `BaseTunerLayer`.
        tiny_config: makes a config that fits a small BERT, for tests and docs.
        initialize: `initialize(peft_model, batches)`, what has to be done between `get_peft_model` and training.
        declined_checks: conformance checks that cannot apply, {name: reason}.
    """

    config: "type[TunerConfig]"
    tuner: "type[Tuner]"
    layer: "type[TunerLayer]"
    tiny_config: "Callable[[], TunerConfig]"
    initialize: "Callable[[nn.Module, list[dict]], object] | None" = None
    declined_checks: dict[str, str] = field(default_factory=dict)
    kind: str = field(default="tuner", init=False)
    convert: None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.config.tuner_name

    @property
    def family(self) -> str:
        """The folder its file stands in."""
        return self.config.__module__.split(".")[-2]

    @property
    def classes(self) -> tuple[type, ...]:
        return self.config, self.tuner

    @property
    def processor(self) -> str:
        return "the frozen model's own"


@dataclass(frozen=True)
class MethodVariant:
    """An entry of the kind "method": a mask or a mix that helps a supervised learner.

    Args:
        config: its `RegularizerConfig`, which holds the paper's facts.
        method: its `Regularizer`.
        tiny_config: makes a config that fits pictures of 32 pixels, for tests.
        declined_checks: conformance checks that cannot apply, {name: reason}.
    """

    config: type[RegularizerConfig]
    method: type[Regularizer]
    tiny_config: Callable[[], RegularizerConfig]
    declined_checks: dict[str, str] = field(default_factory=dict)
    kind: str = field(default="method", init=False)
    convert: None = field(default=None, init=False)

    @property
    def name(self) -> str:
        return self.config.method_name

    @property
    def family(self) -> str:
        """The folder its file stands in."""
        return self.config.__module__.split(".")[-2]

    @property
    def classes(self) -> tuple[type, ...]:
        return self.config, self.method

    @property
    def processor(self) -> str:
        return "the classifier's own"


CATALOGUE: dict[str, Variant | TunerVariant | MethodVariant] = {}


def register_variant(**arguments) -> Variant:
    """Enters a variant into the catalogue and the Auto classes; the arguments are those of `Variant`.

    Raises:
        ValueError: for a `model_type` without the prefix, a name that is taken, or an unknown kind.
    """
    variant = Variant(**arguments)
    if not variant.config.model_type.startswith(PREFIX):
        raise ValueError(f"model_type {variant.config.model_type!r} must begin with {PREFIX!r}.")
    if variant.kind not in ("model", "procedure"):
        raise ValueError(
            f"kind is {variant.kind!r}; it must be 'model' or 'procedure' (methods enter by register_method, tuners "
            "by register_tuner)."
        )
    _check_free(variant.name)
    AutoConfig.register(variant.config.model_type, variant.config)
    heads = {AutoModel: variant.model, AutoModelForPreTraining: variant.pretraining, **variant.heads}
    for auto_class, model_class in heads.items():
        auto_class.register(variant.config, model_class)
    CATALOGUE[variant.name] = variant
    return variant


def register_tuner(**arguments) -> TunerVariant:
    """Enters a tuner into the catalogue; the arguments are those of `TunerVariant`.

    Raises:
        ValueError: for a name that is taken.
    """
    variant = TunerVariant(**arguments)
    _check_free(variant.name)
    CATALOGUE[variant.name] = variant
    return variant


def register_method(**arguments) -> MethodVariant:
    """Enters a method into the catalogue; the arguments are those of `MethodVariant`.

    Raises:
        ValueError: for a name that is taken.
    """
    variant = MethodVariant(**arguments)
    _check_free(variant.name)
    CATALOGUE[variant.name] = variant
    return variant


def _check_free(name: str) -> None:
    if name in CATALOGUE:
        raise ValueError(f"A variant named {name!r} is registered already, by {CATALOGUE[name].config}.")


def load_later_families() -> dict[str, str]:
    """Imports the families that need another package, which enters their methods into the catalogue.

    Returns:
        Those whose package is not installed, {family: extra}.
    """
    missing = {}
    for module, extra in LATER.items():
        if find_spec(extra) is None:
            missing[module.rsplit(".", 1)[-1]] = extra
        else:
            import_module(module)
    return missing


def get_variant(name: str) -> Variant | TunerVariant | MethodVariant:
    """The variant of a name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    missing = {} if name in CATALOGUE else load_later_families()
    if name not in CATALOGUE:
        hint = "".join(
            f" Methods of {family} are known after pip install 'hf-masked[{extra}]'."
            for family, extra in missing.items()
        )
        raise ValueError(
            f"Unknown method {name!r}; known are {', '.join(sorted(CATALOGUE))} (`hf-masked list`).{hint}"
        )
    return CATALOGUE[name]


def variant_of(model_or_config) -> Variant:
    """The variant that a model or config belongs to."""
    config = getattr(model_or_config, "config", model_or_config)
    return get_variant(config.model_type.removeprefix(PREFIX))


def _image_inputs(config: VariantConfig, batch: int) -> dict[str, torch.Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(batch, config.num_channels, height, width)}


__all__ = [
    "CATALOGUE",
    "MethodVariant",
    "TunerVariant",
    "Variant",
    "get_variant",
    "load_later_families",
    "register_method",
    "register_tuner",
    "register_variant",
    "variant_of",
]
