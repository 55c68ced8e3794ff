"""A switch of any Trainer for methods that help a supervised learner: Cutout, Manifold Mixup, MaskSub.

    class MyTrainer(RegularizedMixin, Trainer): ...
    RegularizedTrainer(model, args, ..., regularizer=Cutout(CutoutConfig(length=8)))

The model stays the stock classifier that it is, and evaluation sees nothing of the method.
"""

import torch
from transformers import Trainer

from hf_masked.modeling.regularizers import Pass, Regularizer, criterion_of, soft_targets
from hf_masked.randomness import sample_keys
from hf_masked.training.checkpoints import FaithfulCheckpointsMixin

# Separates what is drawn here from the draws of processors.
REGULARIZE = 7


class RegularizedMixin:
    """Put before `Trainer` among the base classes.

    What is drawn for a sample is a function of (run seed, epoch, sample), where a subclass knows the samples
    (`sample_indices`); else of (run seed, step, rank) and the place in the batch.

    Args:
        regularizer: the method, or None for ordinary training.

    Raises:
        ValueError: with `torch_compile`, DeepSpeed, or several GPUs in one process.
    """

    _pass: Pass | None = None

    def __init__(self, *args, regularizer: Regularizer | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.regularizer = regularizer
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._batches_of_step = (-1, 0)
        if regularizer is not None:
            # The losses are means of batches: the Trainer must average them over those it accumulates.
            self.model_accepts_loss_kwargs = False
            self.loss_is_scaled_for_ga = False
            self._check_settings()

    def _check_settings(self) -> None:
        unfit = {"torch_compile": self.args.torch_compile, "deepspeed": self.args.deepspeed is not None}
        for name in (name for name, is_set in unfit.items() if is_set):
            raise ValueError(
                f"{type(self.regularizer).__name__} hooks into the forward pass and may make several in a step, which "
                f"{name} does not follow: leave it out."
            )
        if self.args.n_gpu > 1:
            raise ValueError(f"One process has {self.args.n_gpu} GPUs: start one process for each (torchrun).")

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.regularizer is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = dict(self._prepare_inputs(inputs))
        if "labels" not in inputs:
            name = type(self.regularizer).__name__
            raise ValueError(f"{name} helps a supervised learner, and the batch has no `labels`.")
        classifier = self.accelerator.unwrap_model(model)
        labels = inputs.pop("labels")
        targets = soft_targets(labels, classifier.config.num_labels, self.args.label_smoothing_factor)
        keys = self._keys(len(labels)).to(labels.device)
        total = torch.zeros((), device=labels.device)
        passes = self.regularizer.passes(classifier, inputs, targets, criterion_of(classifier), keys)
        for self._pass in passes:
            # Around the backward pass too: gradient checkpointing runs layers again there.
            with self._pass.context:
                total = total + super().training_step(model, dict(self._pass.inputs), num_items_in_batch)
        self._pass = None
        return total

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if self._pass is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        outputs = model(**inputs)
        self._pass.logits = outputs.logits
        loss = self._pass.criterion(outputs.logits, self._pass.targets)
        self._parts.setdefault(f"loss_{self._pass.name}", []).append(loss.detach())
        loss = self._pass.weight * loss
        return (loss, outputs) if return_outputs else loss

    def sample_indices(self) -> torch.Tensor | None:
        """int64 (batch,), the samples of the batch that is trained on, where they are known."""
        return None

    def _keys(self, batch: int) -> torch.Tensor:
        indices = self.sample_indices()
        if indices is not None:
            return sample_keys(self.args.seed, int(self.state.epoch or 0), indices, purpose=REGULARIZE)
        # The batches that a step accumulates count on.
        step, count = self._batches_of_step
        count = count + 1 if step == self.state.global_step else 0
        self._batches_of_step = (self.state.global_step, count)
        place = (count * self.args.world_size + self.args.process_index) * batch + torch.arange(batch)
        return sample_keys(self.args.seed, self.state.global_step, place, purpose=REGULARIZE)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            logs = logs | {name: torch.stack(values).mean().item() for name, values in self._parts.items()}
            self._parts = {}
        super().log(logs, start_time)


class RegularizedTrainer(RegularizedMixin, FaithfulCheckpointsMixin, Trainer):
    """transformers' Trainer with the argument `regularizer`, which resumes with the weights of its checkpoint."""
