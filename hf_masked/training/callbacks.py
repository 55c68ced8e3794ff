"""Callbacks of a pretraining run: progress for methods that change over time, online probes, pictures."""

import logging
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_masked.evaluation.diagnostics import effective_rank, feature_spread
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.evaluation.linear_probe import linear_probe
from hf_masked.training.modalities import Modality

logger = logging.getLogger(__name__)

# A feature spread below this share of an isotropic one, which is 1, is called a collapse.
COLLAPSED = 0.05


class TrainingProgressCallback(TrainerCallback):
    """Tells the model how far training has come, `model.training_progress` from 0 to 1, calls its `on_progress` before
    each step of the optimizer, and moves its momentum twins after it."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._set(model, state)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        # Not at the end of the step before: probes and checkpoints there see what that step has left.
        if hasattr(model, "on_progress"):
            model.on_progress(optimizer)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        # With fp16, Accelerate's optimizer skips steps whose gradients overflow.
        if hasattr(model, "update_twins") and not getattr(optimizer, "step_was_skipped", False):
            model.update_twins()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._set(model, state)

    @staticmethod
    def _set(model, state):
        if hasattr(model, "training_progress"):
            model.training_progress = state.global_step / max(1, state.max_steps)


class EpochCallback(TrainerCallback):
    """Tells a sampler which epoch begins.

    Accelerate's loaders do so too, but not in several processes after a resume in the middle of an epoch.

    Args:
        sampler: has `set_epoch`.
    """

    def __init__(self, sampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch or 0))


class EpochIntervalCallback(TrainerCallback):
    """Base: calls `act(state, model)` every so many epochs and at the end of training.

    What it takes does not count in the speed of the run of its `trainer`, where it has one.

    Args:
        every_epochs: may be a fraction; 0 for never.
    """

    trainer = None

    def __init__(self, every_epochs: float):
        self.every_epochs = every_epochs
        self._done = 0

    def on_train_begin(self, args, state, control, **kwargs):
        # After a resume nothing that was done already is done again.
        self._done = self._due(state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.every_epochs and (self._due(state) > self._done or state.global_step == state.max_steps):
            self._done = self._due(state)
            should_log = control.should_log
            with self.trainer.throughput.paused() if self.trainer else nullcontext():
                self.act(state, model)
            control.should_log = should_log  # a line that `act` logs would take the place of the step's own

    def _due(self, state) -> int:
        return int((state.epoch or 0.0) / self.every_epochs + 1e-6) if self.every_epochs else 0

    def act(self, state, model) -> None:
        raise NotImplementedError


class OnlineProbeCallback(EpochIntervalCallback):
    """Judges the frozen encoder while it trains: kNN, effective rank, feature spread, and a linear probe if asked.

    Args:
        trainer: to log with and to share the work over processes with.
        modality: makes the features.
        train: samples and their classes, of `modality.labelled`.
        test: likewise.
        linear: also train a linear probe.
    """

    def __init__(self, trainer, modality: Modality, train, test, every_epochs: float = 1.0, linear: bool = False):
        super().__init__(every_epochs)
        self.trainer = trainer
        self.modality = modality
        self.train = train
        self.test = test
        self.linear = linear

    def act(self, state, model) -> None:
        (train_features, train_labels), (test_features, test_labels) = (
            self._features(model, *split) for split in (self.train, self.test)
        )
        figures = {
            "knn_accuracy": weighted_knn(train_features, train_labels, test_features, test_labels),
            "effective_rank": effective_rank(test_features),
            "feature_spread": feature_spread(test_features),
        }
        if self.linear:
            figures["linear_accuracy"] = linear_probe(train_features, train_labels, test_features, test_labels)[
                "accuracy"
            ]
        if figures["feature_spread"] < COLLAPSED:
            logger.warning(
                "The features have collapsed: their spread is %.4f of an isotropic one's. Every picture is encoded "
                "almost alike; check the learning rate, the loss and the targets.",
                figures["feature_spread"],
            )
        self.trainer.log({name: round(float(value), 4) for name, value in figures.items()})

    def _features(self, model, samples, labels):
        """Features and labels of one split, each process having encoded its share."""
        accelerator, processor = self.trainer.accelerator, self.trainer.processing_class
        # Equal shares, so that they can be gathered; at most a handful of samples is left out.
        usable = len(labels) - len(labels) % accelerator.num_processes
        mine = samples[accelerator.process_index : usable : accelerator.num_processes]
        features = self.modality.features(model, processor, mine, accelerator.device)
        gathered = accelerator.gather(features.to(accelerator.device)).cpu()
        order = torch.arange(usable).view(-1, accelerator.num_processes).T.flatten()
        return gathered, labels[order]


class PictureCallback(EpochIntervalCallback):
    """Draws what is masked and what is predicted, to `<output_dir>/pictures/` and to TensorBoard where it is on.

    Args:
        trainer: whose processor and output folder are used.
        modality: draws.
        samples: of `modality.shown`.
    """

    def __init__(self, trainer, modality: Modality, samples: torch.Tensor, every_epochs: float = 5.0):
        super().__init__(every_epochs)
        self.trainer = trainer
        self.modality = modality
        self.samples = samples

    def act(self, state, model) -> None:
        # Every process of a sharded model takes part in its forward pass; one writes.
        was_training = model.training
        model.eval()
        samples = self.samples.to(self.trainer.args.device)
        picture = self.modality.picture(model, self.trainer.processing_class, samples)
        model.train(was_training)
        if not self.trainer.is_world_process_zero():
            return
        path = Path(self.trainer.args.output_dir) / "pictures" / f"step-{state.global_step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self._to_tensorboard(picture, state.global_step)

    def _to_tensorboard(self, picture, step: int) -> None:
        import numpy as np

        for callback in self.trainer.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                writer.add_image("pictures", np.asarray(picture), step, dataformats="HWC")
