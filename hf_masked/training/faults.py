"""What ends a long run before its time: losses that are not finite, and signals."""

import json
import logging
import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from hf_masked.training.saving import write_whole

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """The loss or the gradients were not finite; the message is one line and names the file with the samples."""


class NonFiniteGuard(TrainerCallback):
    """Keeps losses and gradients that are not finite away from the weights, and remembers the samples.

    Each step is judged on the device, by the norm of its gradients; the host looks every `nonfinite_check_steps`
    steps and whenever something is logged or saved. A loss that is not finite makes all its gradients so: through
    DDP's sum every process then judges alike. The update of such a step is skipped, and the buffers (statistics of
    batch norm, queues) are put back to what they were before its forward passes.

    On accelerators fused optimizers skip by themselves (`found_inf`, as for gradient scaling), for others the host
    reads the judgement at each step; on CPU that costs nothing. With fp16 an overflow of the gradients is the
    scaler's business, and only the loss is judged.

    Args:
        trainer: whose settings, processes, optimizer and data set are used.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.skipped = 0  # updates, in the whole run
        self._samples: dict = {}
        self._batches: list[dict] = []
        self._judgements: dict[int, torch.Tensor] = {}
        self._buffers: list[torch.Tensor] = []
        self._buffers_before: list[torch.Tensor] = []

    def note(self, epoch: torch.Tensor, indices: torch.Tensor) -> None:
        """Takes note of the samples that the next loss is made of."""
        self._samples = {"epoch": epoch, "indices": indices}

    def watch(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, with gradients that are all NaN if it is not finite, and whether it is, bool ()."""
        finite = torch.isfinite(loss.detach()).all()
        batch = {"step": self.trainer.state.global_step + 1, "loss": loss.detach(), "finite": finite}
        self._batches.append(batch | self._samples)
        self._samples = {}
        return loss * torch.where(finite, 1.0, torch.nan).to(loss.dtype), finite

    def judge(self, model: nn.Module, grad_norm: torch.Tensor | float) -> None:
        """Decides about an update before it is made.

        Args:
            model: that is trained.
            grad_norm: of all its gradients, the same on all processes.
        """
        step = self.trainer.state.global_step + 1
        if getattr(self.trainer.accelerator, "scaler", None) is None:
            grad_norm = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else torch.as_tensor(grad_norm)
            bad = ~torch.isfinite(grad_norm)
            self._skip_if(bad, model)
        else:
            bad = ~torch.stack([batch["finite"] for batch in self._batches if batch["step"] == step]).all()
        for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
            buffer.copy_(torch.where(bad, before, buffer))
        self._judgements[step] = bad

    def _skip_if(self, bad: torch.Tensor, model: nn.Module) -> None:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        if getattr(optimizer, "_step_supports_amp_scaling", False) and not _reading_is_free(bad):
            optimizer.found_inf = bad.to(torch.float32)
        elif bad.item():
            model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._buffers = list(model.buffers())
        self._buffers_before = [torch.empty_like(buffer) for buffer in self._buffers]

    def on_step_begin(self, args, state, control, **kwargs):
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)

    def on_step_end(self, args, state, control, **kwargs):
        due = state.global_step % args.nonfinite_check_steps == 0
        if due or control.should_log or control.should_save or control.should_training_stop:
            self.check()

    def on_epoch_end(self, args, state, control, **kwargs):
        self.check()

    def check(self) -> None:
        """Looks at the steps since the last call.

        Raises:
            NonFiniteError: if one of them was bad and `nonfinite` is "stop".
        """
        judgements = self._judgements
        if not judgements:
            return
        bad = torch.stack(list(judgements.values())).to(torch.int32)
        bad = self.trainer.accelerator.reduce(bad, "sum").tolist()
        if any(bad):
            self._act([step for step, count in zip(judgements, bad, strict=True) if count])
        self._batches, self._judgements = [], {}

    def _act(self, bad_steps: list[int]) -> None:
        self.skipped += len(bad_steps)
        path = self._write_report(bad_steps)
        message = (
            f"The loss or the gradients were not finite in step{'s' * (len(bad_steps) > 1)} "
            f"{', '.join(map(str, bad_steps))}; the weights were spared. {path} names the samples of the last steps."
        )
        if self.trainer.args.nonfinite == "stop":
            raise NonFiniteError(
                f"{message} Look at those, lower the learning rate, clip gradients (--max_grad_norm 1), train in fp32 "
                "instead of half precision, or leave such steps out with --nonfinite skip."
            )
        logger.warning("%s %d updates were left out so far.", message, self.skipped)

    def _write_report(self, bad_steps: list[int]) -> Path:
        args = self.trainer.args
        name = "nonfinite.json" if args.world_size == 1 else f"nonfinite_rank{args.process_index}.json"
        path = Path(args.output_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = [self._described(batch) for batch in self._batches]
        write_whole(path, json.dumps({"bad_steps": bad_steps, "batches": batches}, indent=1) + "\n")
        return path

    def _described(self, batch: dict) -> dict:
        name = getattr(self.trainer.train_dataset, "name", None)
        found = {"step": batch["step"], "loss": str(batch["loss"].tolist())}
        if "indices" in batch:
            found |= {"epoch": int(batch["epoch"]), "indices": batch["indices"].tolist()}
            found |= {"names": [name(index, found["epoch"]) for index in found["indices"]]} if name else {}
        return found


def _reading_is_free(value: torch.Tensor) -> bool:
    return value.device.type == "cpu"


class StopSignals(TrainerCallback):
    """Ends training after the current step, with a checkpoint, when SIGTERM or SIGINT comes; a context manager.

    One process of several may be the only one to get the signal: at the end of each step they ask each other, and
    read the answer at the end of the next, so that nobody waits. A second SIGINT interrupts at once.

    Attributes:
        received: the signal's number, once training ends because of it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: int | None = None
        self._pending = 0
        self._handlers: dict = {}
        self._group = None
        self._question = None

    def __enter__(self):
        self.received, self._pending, self._question = None, 0, None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._handlers = {number: signal.signal(number, self._take) for number in self.SIGNALS}
        return self

    def __exit__(self, error_type, *_):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if error_type is None and self._question is not None:
            self._question[0].wait()
        if error_type is None and self._pending and not self.received:
            signal.raise_signal(self._pending)  # too late for a step of training

    def _take(self, number, frame):
        if self._pending and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._pending = self._pending or number

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and self._group is None:
            # Its own group, on the hosts: neither the devices nor the gradients' sums are waited for.
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        number = self._pending if args.world_size == 1 else self._agreed()
        if number:
            self.received = number
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received:  # this is the end of no epoch
            control.should_save = control.should_evaluate = control.should_log = False

    def _agreed(self) -> int:
        """The signal that one of the processes had received at the end of the step before, or 0."""
        question, mine = self._question, torch.tensor(self._pending)
        self._question = dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=self._group, async_op=True), mine
        if question is None:
            return 0
        work, answer = question
        work.wait()
        return int(answer)


def leave_signals_to_parent(worker: int = 0) -> None:
    """`worker_init_fn` of loaders: what is sent to the whole group of processes ends no worker; its parent does.

    Otherwise the main process loses its workers, and with them the step and the checkpoint that it is busy with.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
