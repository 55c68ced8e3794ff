"""Callbacks of the ordinary Trainer for masks on weights; they need PEFT."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import TrainerCallback

from hf_masked.modeling.weight_masking import compute_fisher, harden_masks, read_masks, select_topk
from hf_masked.modeling.weight_masking.fish_mask import FISHERS, SCORES
from hf_masked.modeling.weight_masking.peft_bridge import WeightMaskTuner


class MaskCallback(TrainerCallback):
    """Tells masks how far the training is, logs what they drop, and makes bits of the scores at the end.

    The log gets `sparsity`, the share of weights that is dropped, and `flips`, the share of bits that differ from
    those at the start. Checkpoints during the training hold scores, with which a run is resumed.

    Args:
        harden: make bits of the scores at the end, so that `save_pretrained` writes bits. Set it to False to train on.
    """

    def __init__(self, harden: bool = True):
        self.harden = harden
        self.start: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = read_masks(model)
        tuner(model).accumulation_steps = args.gradient_accumulation_steps

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        tuner(model).training_progress = state.global_step / max(1, state.max_steps)

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or not self.start:
            return
        masks = read_masks(model)
        total = sum(mask.numel() for mask in masks.values())
        measured = {
            "sparsity": 1 - sum(int(mask.sum()) for mask in masks.values()) / total,
            "flips": sum(int((mask != self.start[name]).sum()) for name, mask in masks.items()) / total,
        }
        logs |= measured
        # The Trainer has written its own copy already.
        state.log_history[-1] |= measured

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.harden:
            harden_masks(model)


def tuner(model: nn.Module) -> WeightMaskTuner:
    """The tuner inside a model that may be wrapped.

    Raises:
        ValueError: if there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, WeightMaskTuner)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no masks on its weights; wrap it with get_peft_model.")
    return found


class FishGradientCallback(TrainerCallback):
    """FISH Mask on an ordinary model, without PEFT: gradients of weights that are not chosen are set to zero.

    For training from scratch, or where the mask is to be drawn anew; for a frozen base, `FishMaskConfig` makes files
    as small as the mask. Weight decay would move all weights and is refused.

    Args:
        batches: inputs with labels, gone through anew for each mask; see `compute_fisher`.
        keep_ratio: share of all weights that is trained.
        always: parts of names of parameters that are trained in any case and count in the budget, as "classifier".
        num_samples, fisher, score: see `compute_fisher`.
        refresh_every: steps after which the mask is drawn anew; None keeps the first.
    """

    def __init__(
        self,
        batches: Iterable[dict],
        keep_ratio: float = 0.005,
        always: tuple[str, ...] = ("classifier",),
        num_samples: int = 1024,
        fisher: str = "empirical",
        score: str = "square",
        refresh_every: int | None = None,
    ):
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio is {keep_ratio}; it must lie in (0, 1].")
        if fisher not in FISHERS or score not in SCORES:
            raise ValueError(f"fisher={fisher!r}, score={score!r}; expected one of {FISHERS} and one of {SCORES}.")
        self.batches, self.keep_ratio, self.always = batches, keep_ratio, always
        self.information = {"num_samples": num_samples, "fisher": fisher, "score": score}
        self.refresh_every = refresh_every
        self.masks: dict[str, torch.Tensor] = {}
        self.hooks: list = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.weight_decay:
            raise ValueError(
                f"weight_decay={args.weight_decay} would move the weights that are not chosen; set it to 0."
            )
        self.choose(model)
        self.hooks = [
            weight.register_hook(lambda gradient, name=name: gradient * self.masks[name].to(gradient))
            for name, weight in model.named_parameters()
            if weight.requires_grad
        ]

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.refresh_every and state.global_step and state.global_step % self.refresh_every == 0:
            self.choose(model)

    def on_train_end(self, args, state, control, **kwargs):
        for hook in self.hooks:
            hook.remove()

    def choose(self, model: nn.Module) -> None:
        """Draws the masks, {name: bool, True = trained}."""
        # The masks on gradients must not hide what is measured.
        self.masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in model.named_parameters()}
        scores = compute_fisher(model, self.batches, **self.information)
        whole = [name for name in scores if any(part in name for part in self.always)]
        kept = {name: torch.ones_like(scores.pop(name), dtype=torch.bool) for name in whole}
        total = sum(weight.numel() for weight in model.parameters())
        count = int(total * self.keep_ratio) - sum(mask.numel() for mask in kept.values())
        self.masks = select_topk(scores, count) | kept
