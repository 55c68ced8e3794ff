"""Masked modelling of video."""

from hf_masked.modeling.masked_video.mae_st import (
    MAESTConfig,
    MAESTForPreTraining,
    MAESTForVideoClassification,
    MAESTModel,
)

__all__ = ["MAESTConfig", "MAESTForPreTraining", "MAESTForVideoClassification", "MAESTModel"]
