"""Masked modelling of point clouds."""

from hf_masked.modeling.masked_points.point_mae import PointMAEConfig, PointMAEForPreTraining, PointMAEModel
from hf_masked.modeling.masked_points.point_mae_encoder import (
    PointMAEEncoder,
    PointMAEEncoderConfig,
    PointMAEForPointCloudClassification,
)

__all__ = [
    "PointMAEConfig",
    "PointMAEEncoder",
    "PointMAEEncoderConfig",
    "PointMAEForPointCloudClassification",
    "PointMAEForPreTraining",
    "PointMAEModel",
]
