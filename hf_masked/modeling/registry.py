"""The catalogue: every variant on one line, read by the Auto classes, the command line, the docs and the tests."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from hf_masked.modeling.base import VariantConfig, VariantModel

PREFIX = "hf_masked_"

# How a variant is judged, see the design's section 5.
KINDS = ("model", "method", "tuner", "procedure")


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
        kind: "model", "method", "tuner" or "procedure".
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

    def inputs(self, config: VariantConfig, batch: int = 2) -> dict[str, torch.Tensor]:
        """Example inputs of `forward`, from torch's generator."""
        return (self.example_inputs or _image_inputs)(config, batch)


CATALOGUE: dict[str, Variant] = {}


def register_variant(**arguments) -> Variant:
    """Enters a variant into the catalogue and the Auto classes; the arguments are those of `Variant`.

    Raises:
        ValueError: for a `model_type` without the prefix, a name that is taken, or an unknown kind.
    """
    variant = Variant(**arguments)
    if not variant.config.model_type.startswith(PREFIX):
        raise ValueError(f"model_type {variant.config.model_type!r} must begin with {PREFIX!r}.")
    if variant.name in CATALOGUE:
        raise ValueError(
            f"A variant named {variant.name!r} is registered already, by {CATALOGUE[variant.name].config}."
        )
    if variant.kind not in KINDS:
        raise ValueError(f"kind is {variant.kind!r}; it must be one of {', '.join(KINDS)}.")
    AutoConfig.register(variant.config.model_type, variant.config)
    heads = {AutoModel: variant.model, AutoModelForPreTraining: variant.pretraining, **variant.heads}
    for auto_class, model_class in heads.items():
        auto_class.register(variant.config, model_class)
    CATALOGUE[variant.name] = variant
    return variant


def get_variant(name: str) -> Variant:
    """The variant of a name.

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in CATALOGUE:
        raise ValueError(f"Unknown method {name!r}; known are {', '.join(sorted(CATALOGUE))} (`hf-masked list`).")
    return CATALOGUE[name]


def variant_of(model_or_config) -> Variant:
    """The variant that a model or config belongs to."""
    config = getattr(model_or_config, "config", model_or_config)
    return get_variant(config.model_type.removeprefix(PREFIX))


def _image_inputs(config: VariantConfig, batch: int) -> dict[str, torch.Tensor]:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(batch, config.num_channels, height, width)}


__all__ = ["CATALOGUE", "Variant", "get_variant", "register_variant", "variant_of"]
