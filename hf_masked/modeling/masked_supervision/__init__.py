"""Masks and mixes as a supervised learner's helper: one file per paper."""

from hf_masked.modeling.masked_supervision.cutout import *  # noqa: F403
from hf_masked.modeling.masked_supervision.cutout import __all__ as _cutout
from hf_masked.modeling.masked_supervision.manifold_mixup import *  # noqa: F403
from hf_masked.modeling.masked_supervision.manifold_mixup import __all__ as _manifold_mixup
from hf_masked.modeling.masked_supervision.masksub import *  # noqa: F403
from hf_masked.modeling.masked_supervision.masksub import __all__ as _masksub

__all__ = [*_cutout, *_manifold_mixup, *_masksub]
