"""What the conformance tests need of a variant, made from the catalogue alone."""

import copy

import pytest
import torch

import hf_masked
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


def pictures(processor, count: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 pictures of the processor's size."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, processor.num_channels, processor.size["height"], processor.size["width"])
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def training_inputs(variant: Variant, config, batch: int = 4, seed: int = 0) -> dict:
    """Inputs as the trainer makes them: everything that is drawn is drawn by the processor."""
    processor, indices = processor_of(variant, config), torch.arange(batch)
    pixels = processor.prepare_training(pictures(processor, batch, seed), indices, seed, 0)
    return processor.finish_training(pixels, indices, seed, 0)


def variation(variant: Variant, **backbone_settings):
    """The tiny config with other settings of its backbone, and of its teacher where it has one: those they have."""
    config = variant.tiny_config()
    settings = copy.deepcopy(config.to_dict())
    for part in ("backbone_config", "teacher_config"):
        if stock := getattr(config, part, None):
            settings[part] |= {name: value for name, value in backbone_settings.items() if hasattr(stock, name)}
    return type(config)(**settings)


def tiny_teacher(config) -> dict:
    """The settings of a config that name its teacher, where it has one."""
    return {name: value for name, value in vars(config).items() if name in ("teacher", "teacher_config")}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
