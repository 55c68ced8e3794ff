"""What the conformance tests need of a variant, made from the catalogue alone."""

import copy

import pytest
import torch

import hf_masked
from hf_masked.data import ResidentImageDataset, StereoDataset, SyntheticStereo
from hf_masked.data.sets import make_sets
from hf_masked.data.sources import ArraySource
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


def pictures(processor, count: int, seed: int = 0) -> torch.Tensor:
    """Random uint8 pictures of the processor's size."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, processor.num_channels, processor.size["height"], processor.size["width"])
    return torch.randint(256, size, dtype=torch.uint8, generator=generator)


def training_data(variant: Variant, processor, count: int, seed: int = 0) -> ResidentImageDataset | StereoDataset:
    """A data set of so many random pictures of four classes, in the samples that the variant learns from."""
    if variant.config.sample == "stereo":
        return StereoDataset(stereo_pairs(variant, processor, count, seed), processor, seed)
    # Rows of as many pictures as the method takes, clips of more frames than it takes.
    per_row = {"row": getattr(processor, "num_views", 1), "frames": 4}.get(variant.config.sample, 1)
    labels = torch.arange(per_row * count) % 4
    images = pictures(processor, per_row * count, seed)
    source = ArraySource("random pictures", images.numpy(), labels.numpy(), pictures_per_row=per_row)
    return ResidentImageDataset(source, processor, seed, sets=make_sets(variant.config.sample, source))


def stereo_pairs(variant: Variant, processor, count: int, seed: int = 0) -> SyntheticStereo:
    size = (processor.size["height"], processor.size["width"])
    largest = variant.tiny_config().max_disparity
    return SyntheticStereo(count, size, largest, seed=seed, num_channels=processor.num_channels)


def users_samples(variant: Variant, processor, count: int) -> dict:
    """What a user hands the processor: pictures; pairs of frames; for stereo matching pairs and their disparities."""
    if variant.config.sample == "frames":  # whose processor makes nothing of one picture
        pairs = pictures(processor, 2 * count).unflatten(0, (count, 2))
        return {"images": [list(pair.numpy()) for pair in pairs]}
    if variant.config.sample != "stereo":
        return {"images": [picture.numpy() for picture in pictures(processor, count)]}
    pairs = stereo_pairs(variant, processor, count)
    samples = [pairs.sample(index) for index in range(count)]
    return {
        "images": [[sample.left, sample.right] for sample in samples],
        "disparities": [sample.disparity for sample in samples],
    }


def training_inputs(variant: Variant, config, batch: int = 4, seed: int = 0) -> dict:
    """Inputs as the trainer makes them: everything that is drawn is drawn by the processor."""
    processor = processor_of(variant, config)
    data = training_data(variant, processor, max(batch, 8), seed)
    drawn = data.__getitems__([(0, index) for index in range(batch)])
    inputs = processor.finish_training(drawn["pixels"], drawn["indices"], seed, 0)
    if variant.pretraining.uses_classes:
        inputs |= {"classes": drawn["labels"]}
    return inputs | ({"labels": drawn["targets"]} if "targets" in drawn else {})


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
