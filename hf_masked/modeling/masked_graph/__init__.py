"""Masked modelling of graphs, and the linear baseline that a method must beat."""

from hf_masked.modeling.masked_graph.bandana import (
    BandanaConfig,
    BandanaEncoder,
    BandanaEncoderConfig,
    BandanaForNodeClassification,
    BandanaForPreTraining,
    BandanaModel,
)
from hf_masked.modeling.masked_graph.sgc import (
    SGCConfig,
    SGCFilter,
    SGCFilterConfig,
    SGCForNodeClassification,
    SGCModel,
)

__all__ = [
    "BandanaConfig",
    "BandanaEncoder",
    "BandanaEncoderConfig",
    "BandanaForNodeClassification",
    "BandanaForPreTraining",
    "BandanaModel",
    "SGCConfig",
    "SGCFilter",
    "SGCFilterConfig",
    "SGCForNodeClassification",
    "SGCModel",
]
