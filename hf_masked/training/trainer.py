"""`PreTrainer`: transformers' Trainer, with what pretraining adds and nothing of any method.

The plain Trainer works too, because every model's `forward` returns its loss. This one adds the processor's second
half on the device, parameter groups, the scaled learning rate, the named parts of the loss and the speed in the log,
loads checkpoints the way `from_pretrained` does, and stands its ground when things go wrong: see `faults.py` and
`saving.py`.
"""

import json
import logging
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_masked.data import (
    BadImageLog,
    KeyedDataset,
    KeyedSampler,
    StreamingImageDataset,
    collate_samples,
)
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.callbacks import EpochCallback, TrainingProgressCallback
from hf_masked.training.checkpoints import FaithfulCheckpointsMixin
from hf_masked.training.faults import NonFiniteGuard, StopSignals, leave_signals_to_parent
from hf_masked.training.hub import HubMixin
from hf_masked.training.optimization import (
    LARS,
    cycle_length,
    multistep_schedule,
    parameter_groups,
    repeated_schedule,
    scaled_learning_rate,
    spare_constant_rates,
)
from hf_masked.training.saving import WholeCheckpointsMixin
from hf_masked.training.streams import Passes, ResumableStreamsMixin
from hf_masked.training.throughput import STARVING, ThroughputMeter

logger = logging.getLogger(__name__)


class PreTrainer(HubMixin, FaithfulCheckpointsMixin, WholeCheckpointsMixin, ResumableStreamsMixin, Trainer):
    """Trains a `...ForPreTraining` model on raw samples.

    Args:
        model: of the catalogue, or any model whose `forward` returns a loss.
        args: `PreTrainingArguments`.
        processing_class: the processor, whose `finish_training` makes the model's inputs on the device.
        train_dataset: of `hf_masked.data`; other data sets work as in the plain Trainer.
        facts: what the card should say of the run beyond what the trainer knows, see `hub.HubMixin`.

    Raises:
        NonFiniteError, SavingError: from `train`, see there.
        SystemExit: from `train`, with 128 + the signal's number, after SIGTERM or SIGINT has ended it.
    """

    args: PreTrainingArguments

    def __init__(self, model=None, args: PreTrainingArguments | None = None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        if self.args.base_learning_rate is not None:
            self.args.learning_rate = scaled_learning_rate(
                self.args.base_learning_rate, self.effective_batch_size, self.args.base_batch_size
            )
            if hasattr(self.model, "learning_rate_factor"):
                self.args.learning_rate *= self.model.learning_rate_factor()
        # The launch may choose the precision as well as the arguments.
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
        if self.accelerator.is_fsdp2 and dtype != torch.float32:
            # Accelerate's would round the loss and sum the gradients of all processes in half precision.
            plugin = self.accelerator.state.fsdp_plugin
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )
        self.throughput = ThroughputMeter(
            self.args.device,
            dtype,
            self.args.world_size,
            unit=self._unit(),
        )
        self.bad_images = BadImageLog(self.args.max_bad_share)
        self._stepped = False
        self._start_means()
        self.guard, self.stop_signals = NonFiniteGuard(self), StopSignals()
        for callback in (TrainingProgressCallback(), self.stop_signals, self.guard):  # the guard looks before a save
            self.add_callback(callback)
        if getattr(self.model, "sync_batch_norm", False) and self.args.world_size > 1:
            self._synchronise_batch_norm()

    def _unit(self) -> str:
        """What the log counts per second."""
        if self.model.main_input_name != "pixel_values":
            return "samples"
        return "videos" if "video" in self.model.input_modalities else "images"

    def _synchronise_batch_norm(self) -> None:
        """Batch statistics over all processes, where torch can."""
        if self.args.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        else:
            logger.warning(
                "%s needs batch statistics over all %d processes, which torch has on GPUs only: each process "
                "normalises over its own %d samples, and the result differs from one process with the whole batch.",
                type(self.model).__name__,
                self.args.world_size,
                self.args.train_batch_size,
            )

    def train(self, *args, **kwargs):
        self._stepped = False
        with self.stop_signals:
            output = super().train(*args, **kwargs)
        if number := self.stop_signals.received:
            if self.is_world_process_zero():
                print(
                    f"{signal.Signals(number).name}: stopped after step {self.state.global_step} and saved "
                    f"checkpoint-{self.state.global_step}; the same command goes on from there."
                )
            raise SystemExit(128 + number)
        return output

    def _run_epoch(self, *args, **kwargs):
        # Resumed from its last checkpoint, the Trainer would make one step too many.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            self._stepped = True
            super()._run_epoch(*args, **kwargs)

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step, over all processes."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def get_train_dataloader(self) -> DataLoader:
        dataset, args = self.train_dataset, self.args
        settings = {
            "batch_size": self._train_batch_size,
            "collate_fn": collate_samples,
            "drop_last": args.dataloader_drop_last,
            "num_workers": args.dataloader_num_workers,
            "pin_memory": args.dataloader_pin_memory,
            "persistent_workers": args.dataloader_persistent_workers,
            "prefetch_factor": args.dataloader_prefetch_factor,
            "worker_init_fn": leave_signals_to_parent,
        }
        if isinstance(dataset, StreamingImageDataset):
            # It splits itself over the processes, so Accelerate must not. With a generator of its own the loader takes
            # nothing from the global one, so that a resumed run draws what an uninterrupted one draws.
            return Passes(DataLoader(dataset, generator=torch.Generator(), **settings))
        if not isinstance(dataset, KeyedDataset):
            return super().get_train_dataloader()
        if dataset.resident:
            settings |= dict.fromkeys(("pin_memory", "persistent_workers"), False)
            settings |= {"num_workers": 0, "prefetch_factor": None}
        if args.dataloader_drop_last and len(dataset) < self._train_batch_size * args.world_size:
            raise ValueError(
                f"The data set has {len(dataset)} samples, fewer than one batch of "
                f"{self._train_batch_size * args.world_size} over all processes: lower per_device_train_batch_size."
            )
        sampler = KeyedSampler(len(dataset), args.seed)
        self.remove_callback(EpochCallback)
        self.add_callback(EpochCallback(sampler))
        return self.accelerator.prepare(DataLoader(dataset, sampler=sampler, **settings))

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
            if self.args.lars:
                optimizer_class = LARS
            elif self.args.coupled_weight_decay:
                optimizer_class = torch.optim.Adam
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            cycles = self._learning_rate_cycles()
            schedule = self._schedule(cycle_length(cycles, num_training_steps), optimizer)
            self.lr_scheduler = spare_constant_rates(repeated_schedule(schedule, cycles, num_training_steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _learning_rate_cycles(self) -> int:
        if self.args.lr_cycles is not None:
            return self.args.lr_cycles
        return self.model.learning_rate_cycles() if hasattr(self.model, "learning_rate_cycles") else 1

    def _schedule(self, num_training_steps: int, optimizer):
        if not self.args.lr_milestones:
            return super().create_scheduler(num_training_steps, optimizer)
        return multistep_schedule(
            self.optimizer if optimizer is None else optimizer,
            self.args.get_warmup_steps(num_training_steps),
            [round(share * num_training_steps) for share in sorted(self.args.lr_milestones)],
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        started = time.perf_counter()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.throughput.waited += time.perf_counter() - started
        return batches

    def _prepare_inputs(self, inputs):
        """Raw batches of our data sets become the model's inputs; others pass as they are."""
        inputs = super()._prepare_inputs(inputs)
        raw_name = getattr(self.processing_class, "raw_name", None)
        if raw_name not in inputs:
            return inputs
        self.bad_images.add(inputs)
        self.guard.note(inputs["epoch"], inputs["indices"])
        finished = self.processing_class.finish_training(
            inputs[raw_name], inputs["indices"], self.args.seed, inputs["epoch"]
        )
        if "labels" in inputs and getattr(self.model, "uses_classes", False):
            finished["classes"] = inputs["labels"]
        if "targets" in inputs:  # what a supervised method predicts
            finished["labels"] = inputs["targets"]
        return finished

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if model.training:
            if not self.throughput.flops_per_sample:
                self.throughput.calibrate(self.model, inputs)
            self.throughput.samples += self.args.world_size * len(inputs[self.model.main_input_name])
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            loss, finite = self.guard.watch(loss)
            self._add_figures(outputs, finite)
        return (loss, outputs) if return_outputs else loss

    def _add_figures(self, outputs, finite: torch.Tensor) -> None:
        figures = {f"loss_{name}": value for name, value in (outputs.get("losses") or {}).items()}
        figures |= {name: outputs[name] for name in getattr(self.model, "logged_outputs", ())}
        for name, value in figures.items():
            self._figures[name] = self._figures.get(name, 0.0) + torch.where(finite, value.detach(), 0.0)
        self._finite_batches += finite
        self._batches += 1

    def training_step(self, *args, **kwargs):
        # What is summed up for the log; the guard has kept the rest from the weights.
        return super().training_step(*args, **kwargs).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.judge(model, grad_norm)
        return grad_norm

    def _save_rng_state(self, output_dir: str) -> None:
        """Saves what each process keeps for itself: besides the generators' states, what it has counted."""
        super()._save_rng_state(output_dir)
        counts = {"bad_images": self.bad_images.state_dict(), "skipped_updates": self.guard.skipped}
        self._counts_file(output_dir).write_text(json.dumps(counts))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None and self._counts_file(checkpoint).is_file():
            counts = json.loads(self._counts_file(checkpoint).read_text())
            self.bad_images.load_state_dict(counts["bad_images"])
            self.guard.skipped = counts["skipped_updates"]

    def _counts_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"counts_{self.args.process_index}.json"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and not self._stepped:
            return
        if "loss" in logs:
            logs = self._mean_figures(logs) | self.throughput.report()
            if self.guard.skipped:
                logs["skipped_updates"] = self.guard.skipped
            if logs["data_wait_%"] > 100 * STARVING:
                logger.warning(
                    "The device waits for data %.0f %% of the time: raise --dataloader_num_workers, store smaller "
                    "pictures, or keep a small data set on the device with --resident_data true.",
                    logs["data_wait_%"],
                )
        super().log(logs, start_time)

    def _mean_figures(self, logs: dict[str, float]) -> dict[str, float]:
        """The line of the log with the parts of the loss and the logged outputs, averaged over the processes and over
        those batches since the last line that had a finite loss; the loss likewise."""
        sums = torch.stack([self._finite_batches, *self._figures.values()]).float()
        finite, *figures = self.accelerator.reduce(sums, "mean").tolist()
        means = [round(figure / finite, 5) if finite else math.nan for figure in figures]
        if finite < self._batches:
            logs = logs | {"loss": logs["loss"] * self._batches / finite if finite else math.nan}
        logs = logs | dict(zip(self._figures, means, strict=True))
        self._start_means()
        return logs

    def _start_means(self) -> None:
        self._figures: dict[str, torch.Tensor] = {}
        self._batches = 0
        self._finite_batches = torch.zeros((), device=self.args.device)
