"""MaskSub: each batch goes through the classifier a second time, half of it masked, and there learns from what it
answered to the whole.

Byeongho Heo et al., "Masking meets Supervision: A Strong Learning Alliance", CVPR 2025, arXiv 2306.11339 (earlier:
"Augmenting Sub-model to Improve Main Model").
Reference implementation: https://github.com/naver-ai/augsub (`deit/engine.py`, `resnet_rsb/train.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_masked.modeling.registry import register_method
from hf_masked.modeling.regularizers import Pass, Regularizer, RegularizerConfig, binary_cross_entropy
from hf_masked.processing.masks.random import random_mask
from hf_masked.randomness import Draw, keyed_draw

MODES = ("auto", "drop_tokens", "pixels", "input_ids")
TARGETS = ("auto", "softmax", "sigmoid")

# Classifiers of tokens that stand by themselves, and the number of those that are no patches.
TOKENS = {
    "vit": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
}


@dataclass
class MaskSubConfig(RegularizerConfig):
    """Config of MaskSub.

    Args:
        mask_ratio: share of the input that the second pass does not see.
        mode: "drop_tokens", a share of the patch tokens after their embedding (ViT, DeiT, DINOv2); "pixels", squares
            of the normalised picture set to zero (any other image classifier); "input_ids", a mask token in place of
            a share of a text's tokens; "auto" chooses by the type of the model.
        pixel_patch_size: side of the squares in pixels.
        mask_token_id: of the tokenizer, for texts.
        special_token_ids: of the tokenizer; these are never masked, nor is padding.
        target: what the second pass learns: "softmax" or "sigmoid" of the first one's logits; "auto" is the softmax,
            and the sigmoid for several labels each.
        freeze_batch_norm_in_sub: the masked pass leaves the running statistics of batch norm alone; in the reference
            it updates them.
    """

    method_name: ClassVar[str] = "masksub"
    paper_title: ClassVar[str] = "Masking meets Supervision: A Strong Learning Alliance"
    paper_year: ClassVar[int] = 2023
    arxiv_id: ClassVar[str] = "2306.11339"
    reference_repository: ClassVar[str] = "https://github.com/naver-ai/augsub"
    masks: ClassVar[str] = "half of the input of a second pass"
    predicts: ClassVar[str] = "the class (supervised), and from the masked input what was predicted from the whole"
    backbones: ClassVar[tuple[str, ...]] = ("any image or text classifier",)

    mask_ratio: float = 0.5
    mode: str = "auto"
    pixel_patch_size: int = 32
    mask_token_id: int | None = None
    special_token_ids: list[int] | tuple[int, ...] = ()
    target: str = "auto"
    freeze_batch_norm_in_sub: bool = False

    def check(self) -> None:
        if not 0.0 <= self.mask_ratio < 1.0:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; it must lie in [0, 1), for example 0.5.")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; it must be one of {', '.join(TARGETS)}.")
        if self.pixel_patch_size < 1:
            raise ValueError(f"pixel_patch_size is {self.pixel_patch_size}; it must be at least 1, for example 32.")
        if self.mode == "input_ids" and self.mask_token_id is None:
            raise ValueError("mode='input_ids' needs mask_token_id and special_token_ids, the tokenizer's.")


class MaskSub(Regularizer):
    """Half of the loss is the main pass's, half that of the masked pass, whose target is the main pass's prediction.

    Each pass is backpropagated by itself, so that memory is that of one.
    """

    config: MaskSubConfig

    def passes(self, model, inputs, targets, criterion, keys):
        main = Pass(inputs, targets, criterion, weight=0.5)
        yield main
        predicted = self._prediction(main.logits, criterion)
        inputs, context = self._masked(model, inputs, keyed_draw(keys))
        yield Pass(inputs, predicted, criterion, weight=0.5, name="sub", context=context)

    def _prediction(self, logits: torch.Tensor, criterion) -> torch.Tensor:
        """float32 (batch, classes), without gradient."""
        logits, target = logits.detach().float(), self.config.target
        sigmoid = target == "sigmoid" or (target == "auto" and criterion is binary_cross_entropy)
        return logits.sigmoid() if sigmoid else logits.softmax(dim=1)

    def _masked(self, model, inputs: dict, draw: Draw):
        """The inputs of the masked pass, and the context that masks inside the model."""
        mode, context = mode_of(model, self.config), frozen_batch_norm(model, self.config.freeze_batch_norm_in_sub)
        if mode == "drop_tokens":
            return inputs, dropped_tokens(model, draw, self.config.mask_ratio, context)
        if mode == "pixels":
            masked = mask_squares(inputs["pixel_values"], draw, self.config.mask_ratio, self.config.pixel_patch_size)
            return inputs | {"pixel_values": masked}, context
        kept = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        masked = mask_input_ids(inputs["input_ids"], kept, draw, self.config)
        return inputs | {"input_ids": masked}, context


def mode_of(model: PreTrainedModel, config: MaskSubConfig) -> str:
    """ "auto" by the type of the model.

    Raises:
        ValueError: for tokens of a model whose tokens do not stand by themselves, or texts without a mask token.
    """
    kind = model.config.model_type
    if config.mode == "drop_tokens" and kind not in TOKENS:
        raise ValueError(f"Tokens of a {kind} cannot be dropped ({', '.join(TOKENS)} can): use mode='pixels'.")
    if config.mode != "auto":
        return config.mode
    if kind in TOKENS:
        return "drop_tokens"
    if model.main_input_name == "pixel_values":
        return "pixels"
    raise ValueError(f"A {kind} reads texts: set mode='input_ids', mask_token_id and special_token_ids.")


@contextmanager
def dropped_tokens(model: PreTrainedModel, draw: Draw, ratio: float, inner) -> Iterator[None]:
    """Inside the block the layers see `int(units * (1 - ratio))` random patch tokens of each sample, and all others
    that are no patches."""
    prefix = TOKENS[model.config.model_type](model.config)

    def hook(module, arguments, embedded):  # (batch, prefix + units, hidden)
        units = embedded.shape[1] - prefix
        kept = draw(units).to(embedded.device).argsort(dim=1)[:, : int(units * (1 - ratio))]  # (batch, kept)
        patches = embedded[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, embedded.shape[-1]))
        return torch.cat([embedded[:, :prefix], patches], dim=1)

    handle = model.base_model.embeddings.register_forward_hook(hook)
    try:
        with inner:
            yield
    finally:
        handle.remove()


@contextmanager
def frozen_batch_norm(model: nn.Module, frozen: bool) -> Iterator[None]:
    """Inside the block batch norm normalises as before and, where asked for, leaves its running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    spared = [norm for norm in norms if frozen and norm.track_running_stats]
    for norm in spared:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in spared:
            norm.track_running_stats = True


def mask_squares(pixel_values: torch.Tensor, draw: Draw, ratio: float, side: int) -> torch.Tensor:
    """Pictures (batch, channels, height, width) with a share of their squares set to zero: the mean colour, where they
    are normalised. The squares at the right and lower border may be cut."""
    height, width = pixel_values.shape[-2:]
    grid = -(-height // side), -(-width // side)
    removed = random_mask(draw, grid, ratio).unflatten(1, grid).to(pixel_values.device)  # (batch, rows, columns)
    removed = removed.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)[:, :height, :width]
    return pixel_values.masked_fill(removed.unsqueeze(1), 0.0)


def mask_input_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, draw: Draw, config: MaskSubConfig
) -> torch.Tensor:
    """int64 (batch, tokens) with the mask token in place of a share of each text's own tokens, rounded down; special
    ones and padding stay."""
    special = torch.isin(input_ids, torch.tensor(list(config.special_token_ids), device=input_ids.device))
    own = attention_mask.bool() & ~special
    noise = draw(input_ids.shape[1]).to(input_ids.device).masked_fill(~own, torch.inf)
    ranks = noise.argsort(dim=1).argsort(dim=1)
    masked = ranks < (own.sum(dim=1, keepdim=True) * config.mask_ratio).long()
    return input_ids.masked_fill(masked & own, config.mask_token_id)


register_method(config=MaskSubConfig, method=MaskSub, tiny_config=lambda: MaskSubConfig(pixel_patch_size=8))

__all__ = ["MaskSub", "MaskSubConfig"]
