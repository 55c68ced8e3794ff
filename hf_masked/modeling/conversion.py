"""Official checkpoints into this package's layout."""

import argparse
from collections import OrderedDict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_masked.modeling.base import VariantConfig
from hf_masked.modeling.registry import Variant

# Classes of training checkpoints' settings that are let through. yacs's is a dict with attributes, and of those torch
# fills OrderedDict alone.
SETTINGS = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]

# The names under which training checkpoints hold the weights.
WEIGHTS = ("model", "state_dict", "model_state", "module", "base_model")


def read_official(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an official `.pth` file, read with `weights_only=True`.

    Training checkpoints hold the weights under one of `WEIGHTS`, beside an optimizer and settings: an argparse
    Namespace (MAE) or a yacs CfgNode (SimMIM), the classes that are let through. Among SparK's weights stands a
    dictionary of settings, "config".

    Raises:
        ValueError: if the file holds no weights, or objects that are not loaded for safety.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        with torch.serialization.safe_globals(SETTINGS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a file of weights: {str(error).splitlines()[0]}") from error
    for key in WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = {name: value for name, value in content[key].items() if name != "config"}
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f"{path} holds no dictionary of tensors, at the top or under one of {', '.join(map(repr, WEIGHTS))}."
        )
    return content


def convert(variant: Variant, path: str | Path, config: VariantConfig | None = None) -> PreTrainedModel:
    """A model of this package with the weights of an official checkpoint.

    Args:
        variant: of the catalogue.
        path: the official file.
        config: where the checkpoint's shapes do not tell it.

    Returns:
        The pretraining model; or the encoder, where the file holds no more than that; or the task head that fits, of
        those without an Auto class.

    Raises:
        ValueError: if the variant has no official weights, or any weight is missing, left over or of another shape.
    """
    if variant.convert is None or variant.official_config is None:
        raise ValueError(f"{variant.name} has no official weights to convert.")
    official = read_official(path)
    config = config or variant.official_config(official)
    weights = variant.convert(official, config)
    reports = []
    for model_class in (variant.pretraining, variant.model, *variant.other_heads):
        model = model_class(config)
        expected = model.state_dict()
        problems = {
            "missing": sorted(expected.keys() - weights.keys()),
            "left over": sorted(weights.keys() - expected.keys()),
            "of another shape": sorted(
                name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape
            ),
        }
        if not any(problems.values()):
            model.load_state_dict(weights)
            return model
        listed = "; ".join(f"{kind}: {', '.join(names[:3])}, ..." for kind, names in problems.items() if names)
        reports.append(f"{model_class.__name__} ({listed})")
    raise ValueError(f"{path} fits neither {' nor '.join(reports)}.")
