"""Runs on streams: pass after pass, and after an interruption on with the next sample, without decoding used ones."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_masked.data import StreamingImageDataset, StreamPosition

FILE = "stream_{rank}.json"


class Passes:
    """A loader's passes over its stream, one after the other without end.

    To the Trainer it is one epoch: processes whose shares of the stream differ by a batch would otherwise reach its
    end at different steps, and wait for each other for ever.

    Args:
        loader: of a `StreamingImageDataset`.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[dict]:
        """Batches.

        Raises:
            ValueError: if a pass has none.
        """
        first = self.dataset.position
        for epoch in count(first.epoch):
            self.dataset.set_epoch(epoch)
            batch = None
            for batch in self.loader:
                yield batch
            # A run may have been interrupted right at the end of a pass.
            if batch is None and not (epoch == first.epoch and first.places):
                raise ValueError(
                    f"{self.dataset.source.name} has no batch of {self.loader.batch_size} pictures for each worker of "
                    "each process: lower per_device_train_batch_size or dataloader_num_workers."
                )


class ResumableStreamsMixin:
    """Put before `Trainer` among the base classes: a checkpoint says where the training set's stream stands.

    The Trainer itself would read, and decode, as many batches as were used, counted from the first pass.
    """

    def _inner_training_loop(self, *arguments, resume_from_checkpoint: str | None = None, **kwargs):
        kwargs["resume_from_checkpoint"] = resume_from_checkpoint
        dataset, args = self.train_dataset, self.args
        if not isinstance(dataset, StreamingImageDataset):
            return super()._inner_training_loop(*arguments, **kwargs)
        dataset.position = StreamPosition()
        if resume_from_checkpoint is not None and not args.ignore_data_skip:
            dataset.position = self._load_position(Path(resume_from_checkpoint))
        self.remove_callback(RunShareCallback)
        self.add_callback(RunShareCallback())
        # The stream skips, so the Trainer must not.
        asked, args.ignore_data_skip = args.ignore_data_skip, True
        try:
            return super()._inner_training_loop(*arguments, **kwargs)
        finally:
            args.ignore_data_skip = asked

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if isinstance(self.train_dataset, StreamingImageDataset):
            for batch in batches:
                self.train_dataset.note(batch, self.args.dataloader_num_workers)
        return batches, num_items

    def _save_rng_state(self, output_dir: str) -> None:
        # Like the random state each process has its own.
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, StreamingImageDataset):
            state = self._split() | asdict(self.train_dataset.position)
            (Path(output_dir) / FILE.format(rank=self.args.process_index)).write_text(json.dumps(state) + "\n")

    def _load_position(self, checkpoint: Path) -> StreamPosition:
        # A process more than before has no file; that of the first tells how many there were.
        paths = [checkpoint / FILE.format(rank=rank) for rank in (self.args.process_index, 0)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise ValueError(
                f"{checkpoint} does not say where the stream stands ({paths[0].name} is missing): begin the data anew "
                "with --ignore_data_skip true."
            )
        state = json.loads(path.read_text())
        for name, now in self._split().items():
            if state[name] != now:
                raise ValueError(
                    f"{checkpoint} was written with {name}={state[name]}, this run has {now}, and a stream goes on "
                    f"where it stood only with the same: use {state[name]}, or begin the data anew with "
                    "--ignore_data_skip true."
                )
        places = {int(part): place for part, place in state["places"].items()}
        return StreamPosition(state["epoch"], places, state["next_worker"])

    def _split(self) -> dict[str, int]:
        """What the stream is shared out over."""
        return {"num_processes": self.args.world_size, "dataloader_num_workers": self.args.dataloader_num_workers}


class RunShareCallback(TrainerCallback):
    """Keeps `state.epoch` at the share of the run that is done, where the Trainer would count from the last resume."""

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = state.global_step / state.max_steps
