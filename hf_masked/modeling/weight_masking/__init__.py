"""Masks on the weights of a frozen model, as PEFT tuners; importing it makes them known to PEFT, which it needs."""

from hf_masked.modeling.weight_masking.fish_mask import *  # noqa: F403
from hf_masked.modeling.weight_masking.fish_mask import __all__ as _fish_mask
from hf_masked.modeling.weight_masking.masking_lm import *  # noqa: F403
from hf_masked.modeling.weight_masking.masking_lm import __all__ as _masking_lm
from hf_masked.modeling.weight_masking.maskllm import *  # noqa: F403
from hf_masked.modeling.weight_masking.maskllm import __all__ as _maskllm
from hf_masked.modeling.weight_masking.peft_bridge import harden_masks, read_masks, sparsity

__all__ = ["harden_masks", "read_masks", "sparsity", *_fish_mask, *_masking_lm, *_maskllm]
