"""`PreTrainer`: transformers' Trainer, with what pretraining adds and nothing of any method.

The plain Trainer works too, because every model's `forward` returns its loss. This one adds the processor's second
half on the device, parameter groups, the scaled learning rate, the named parts of the loss and the speed in the log,
and loads checkpoints the way `from_pretrained` does.
"""

import logging
import time

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_masked.data import (
    BadImageLog,
    ImageDataset,
    KeyedSampler,
    ResidentImageDataset,
    StreamingImageDataset,
    collate_images,
)
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.callbacks import EpochCallback, TrainingProgressCallback
from hf_masked.training.checkpoints import FaithfulCheckpointsMixin
from hf_masked.training.hub import HubMixin
from hf_masked.training.optimization import parameter_groups, scaled_learning_rate
from hf_masked.training.throughput import STARVING, ThroughputMeter

logger = logging.getLogger(__name__)


class PreTrainer(HubMixin, FaithfulCheckpointsMixin, Trainer):
    """Trains a `...ForPreTraining` model on raw pictures.

    Args:
        model: of the catalogue, or any model whose `forward` returns a loss.
        args: `PreTrainingArguments`.
        processing_class: the image processor, whose `finish_training` makes the model's inputs on the device.
        train_dataset: of `hf_masked.data`; other data sets work as in the plain Trainer.
        facts: what the card should say of the run beyond what the trainer knows, see `hub.HubMixin`.
    """

    args: PreTrainingArguments

    def __init__(self, model=None, args: PreTrainingArguments | None = None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        if self.args.base_learning_rate is not None:
            self.args.learning_rate = scaled_learning_rate(
                self.args.base_learning_rate, self.effective_batch_size, self.args.base_batch_size
            )
        # The launch may choose the precision as well as the arguments.
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        self.throughput = ThroughputMeter(self.args.device, dtype, self.args.world_size)
        self.bad_images = BadImageLog(self.args.max_bad_share)
        self._loss_parts: dict[str, torch.Tensor] = {}
        self._loss_parts_steps = 0
        self.add_callback(TrainingProgressCallback())

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        settings = {
            "batch_size": self._train_batch_size,
            "collate_fn": collate_images,
            "drop_last": args.dataloader_drop_last,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
        }
        if isinstance(dataset, StreamingImageDataset):
            self._follow_epochs(dataset)
            # It splits itself over the processes, so Accelerate must not.
            return DataLoader(dataset, **settings)
        if not isinstance(dataset, ImageDataset | ResidentImageDataset):
            return super().get_train_dataloader()
        if isinstance(dataset, ResidentImageDataset):
            settings |= dict.fromkeys(("pin_memory", "persistent_workers"), False)
            settings |= {"num_workers": 0, "prefetch_factor": None}
        if args.dataloader_drop_last and len(dataset) < self._train_batch_size * args.world_size:
            raise ValueError(
                f"The data set has {len(dataset)} pictures, fewer than one batch of "
                f"{self._train_batch_size * args.world_size} over all processes: lower per_device_train_batch_size."
            )
        sampler = KeyedSampler(len(dataset), args.seed)
        self._follow_epochs(sampler)
        return self.accelerator.prepare(DataLoader(dataset, sampler=sampler, **settings))

    def _follow_epochs(self, follower) -> None:
        self.remove_callback(EpochCallback)
        self.add_callback(EpochCallback(follower))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                layer_decay=self.args.layer_decay,
            )
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        started = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.throughput.waited += time.perf_counter() - started
        return batches

    def _prepare_inputs(self, inputs):
        """Raw batches of our data sets become the model's inputs; others pass as they are."""
        inputs = super()._prepare_inputs(inputs)
        if "pixels" not in inputs:
            return inputs
        self.bad_images.add(inputs)
        return self.processing_class.finish_training(
            inputs["pixels"], inputs["indices"], self.args.seed, inputs["epoch"]
        )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training:
            if not self.throughput.flops_per_sample:
                self.throughput.calibrate(self.model, inputs)
            self.throughput.samples += self.args.world_size * len(inputs[self.model.main_input_name])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._add_loss_parts(outputs.get("losses") or {})
        return (loss, outputs) if return_outputs else loss

    def _add_loss_parts(self, parts: dict[str, torch.Tensor]) -> None:
        for name, value in parts.items():
            self._loss_parts[name] = self._loss_parts.get(name, 0.0) + value.detach()
        self._loss_parts_steps += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self._mean_loss_parts() | self.throughput.report()
            if logs["data_wait_%"] > 100 * STARVING:
                logger.warning(
                    "The device waits for data %.0f %% of the time: raise --dataloader_num_workers, store smaller "
                    "pictures, or keep a small data set on the device with --resident_data true.",
                    logs["data_wait_%"],
                )
        super().log(logs, start_time)

    def _mean_loss_parts(self) -> dict[str, float]:
        """The parts of the loss, averaged over the steps since the last line and over the processes."""
        means = {}
        for name, value in self._loss_parts.items():
            mean = self.accelerator.gather(value / self._loss_parts_steps).mean().item()
            means[f"loss_{name}"] = round(mean, 5)
        self._loss_parts, self._loss_parts_steps = {}, 0
        return means
