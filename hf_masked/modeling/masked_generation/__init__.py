"""Masked modelling that generates: pictures and texts, token by token."""

from hf_masked.modeling.masked_generation.genmd4 import GenMD4Config, GenMD4ForPreTraining, GenMD4Model
from hf_masked.modeling.masked_generation.md4 import MD4Config, MD4ForPreTraining, MD4Model
from hf_masked.modeling.masked_generation.md4_networks import (
    MD4Transformer,
    MD4TransformerConfig,
    MD4UNet,
    MD4UNetConfig,
)

__all__ = [
    "GenMD4Config",
    "GenMD4ForPreTraining",
    "GenMD4Model",
    "MD4Config",
    "MD4ForPreTraining",
    "MD4Model",
    "MD4Transformer",
    "MD4TransformerConfig",
    "MD4UNet",
    "MD4UNetConfig",
]
