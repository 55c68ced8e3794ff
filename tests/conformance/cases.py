"""What the conformance tests need of a variant, made from the catalogue alone."""

import copy
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from transformers import AutoImageProcessor

import hf_masked
from hf_masked.data import KeyedDataset
from hf_masked.modeling.base import VariantConfig
from hf_masked.modeling.registry import CATALOGUE, Variant

MODELS = [variant for variant in CATALOGUE.values() if variant.kind == "model"]


def skip_if_declined(variant: Variant, check: str) -> None:
    """Skips a check that the class declines, with the class's reason."""
    if check in variant.pretraining.declined_checks:
        pytest.skip(f"{variant.name} declines {check}: {variant.pretraining.declined_checks[check]}")


def tiny_model(variant: Variant, config=None, seed: int = 0):
    torch.manual_seed(seed)
    return variant.pretraining(config or variant.tiny_config())


def processor_of(variant: Variant, config):
    return getattr(hf_masked, config.processor)(**config.processor_settings())


def saved_processor(variant: Variant, folder):
    """The processor that was saved in a folder or repository, as users get it."""
    if variant.config.modality == "image":
        return AutoImageProcessor.from_pretrained(folder)
    return getattr(hf_masked, variant.config.processor).from_pretrained(folder)


def skip_unless_pictures(variant: Variant) -> None:
    """Skips a check of what only pictures have."""
    if variant.config.modality != "image":
        pytest.skip(f"{variant.name} learns from {variant.config.modality}, and the check is of pictures.")


def examples_of(variant: Variant):
    """The file in `examples/` of the variant's modality: makes data that the suite trains on."""
    return import_module(f"tests.conformance.examples.{variant.config.modality}")


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> KeyedDataset:
    """A data set of so many random samples, as the variant learns from."""
    return examples_of(variant).training_data(variant, processor, count, seed)


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor."""
    return examples_of(variant).users_samples(variant, processor, count)


def training_inputs(variant: Variant, config, batch: int = 4, seed: int = 0) -> dict:
    """Inputs as the trainer makes them: everything that is drawn is drawn by the processor."""
    processor = processor_of(variant, config)
    data = training_data(variant, processor, max(batch, 8), seed)
    drawn = data.__getitems__([(0, index) for index in range(batch)])
    inputs = processor.finish_training(drawn[processor.raw_name], drawn["indices"], seed, 0)
    if variant.pretraining.uses_classes:
        inputs |= {"classes": drawn["labels"]}
    return inputs | ({"labels": drawn["targets"]} if "targets" in drawn else {})


def plain_samples(variant: Variant, config, count: int) -> tuple[list[dict], Callable | None]:
    """So many samples as the plain Trainer takes them, and its collator; None for transformers' own."""
    if hasattr(examples_of(variant), "plain_samples"):
        return examples_of(variant).plain_samples(variant, processor_of(variant, config), count)
    inputs = training_inputs(variant, config, batch=count)
    return [{name: value[i] for name, value in inputs.items()} for i in range(count)], None


def variation(variant: Variant, **backbone_settings):
    """The tiny config with other settings of its backbone, its teacher and its tokenizer: those they have."""
    config = variant.tiny_config()
    return type(config)(**_varied(config, backbone_settings))


def _varied(config, backbone_settings: dict) -> dict:
    settings = copy.deepcopy(config.to_dict())
    for part in ("backbone_config", "teacher_config", "tokenizer_config"):
        stock = getattr(config, part, None)
        # Students bring their pictures to a stock teacher's size themselves.
        names = backbone_settings.keys()
        if part == "teacher_config":
            names &= {"num_channels"}
        if isinstance(stock, VariantConfig):
            settings[part] = _varied(stock, backbone_settings)
        elif stock:
            settings[part] |= {name: backbone_settings[name] for name in names if hasattr(stock, name)}
    return settings


def tiny_teacher(config) -> dict:
    """The settings of a config that name its teacher or tokenizer, where it has one."""
    names = ("teacher", "teacher_config", "tokenizer", "tokenizer_config")
    return {name: value for name, value in vars(config).items() if name in names}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
