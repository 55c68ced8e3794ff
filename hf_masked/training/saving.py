"""Saving so that whatever stands under its name is whole.

The Trainer writes straight into `checkpoint-N`: a process that is killed meanwhile, or a disk that is full, leaves a
torn folder there, which the next start takes for the last checkpoint (seen in transformers 5.17 and 5.23). Here
everything is written under another name, brought to the disk, and then renamed.
"""

import os
import re
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer import TRAINER_STATE_NAME

# The folder, beside or inside the final one, of what is not whole yet. Whatever is left there can go.
UNFINISHED = "unfinished"


class SavingError(RuntimeError):
    """Something could not be written; the message is one line and says what stays and how to go on."""


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, in the order of their steps."""
    found = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(folder).glob("checkpoint-*")}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """A folder to write a model into, whose files move to `folder` once the block has ended without an error.

    The old weights go first and the new ones come last: weights never stand beside the config of others.

    Yields:
        `<folder>/unfinished`, empty.

    Raises:
        SavingError: where the files cannot be written.
    """
    folder = Path(folder)
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        to_disk(unfinished)
        for path in sorted(folder.glob("*.safetensors*"), key=_is_index, reverse=True):
            path.unlink()
        for path in sorted(unfinished.iterdir(), key=lambda path: (".safetensors" in path.name, _is_index(path))):
            publish(path, folder / path.name)
    except Exception as error:
        raise_if_disk_failed(error, folder, "The model")
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file that is never seen half."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{UNFINISHED}")
    unfinished.write_text(text)
    to_disk(unfinished)
    os.replace(unfinished, path)
    _sync(path.parent)


def remove_whole(folder: Path) -> None:
    """Deletes a folder; killed meanwhile, it leaves nothing under the folder's name."""
    unfinished = folder.parent / UNFINISHED
    unfinished.mkdir(exist_ok=True)
    os.rename(folder, unfinished / f"old-{folder.name}")
    shutil.rmtree(unfinished)


def publish(path: Path, name: Path) -> None:
    """Gives a finished file or folder its name; a folder that has it already goes first."""
    if path.is_dir() and name.exists():
        os.rename(name, path.with_name(f"old-{path.name}"))
    os.replace(path, name)
    _sync(name.parent)


def to_disk(path: Path) -> None:
    """Returns when a file, or a folder with all that it holds, would survive a power cut."""
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        _sync(inner)


class WholeCheckpointsMixin:
    """Put before `Trainer` among the base classes: checkpoints and saved models are whole or not there at all.

    Older checkpoints are deleted (`save_total_limit`) once the new one stands. Several processes write to one file
    system, as the Trainer's defaults have it.

    Raises:
        SavingError: where a checkpoint cannot be written. The earlier ones stay, what was written of it is removed.
    """

    _checkpoint_in_progress = False

    def train(self, *args, **kwargs):
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._checkpoint_in_progress else folder

    def _save_checkpoint(self, model, trial) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        unfinished = folder.parent / UNFINISHED / folder.name
        self._checkpoint_in_progress = True
        try:
            super()._save_checkpoint(model, trial)
            self._name_best_checkpoint(unfinished, folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                to_disk(unfinished)
                publish(unfinished, folder)
        except Exception as error:
            raise_if_disk_failed(error, folder.parent, folder.name)
            raise
        finally:
            self._checkpoint_in_progress = False
            if self.args.should_save:
                shutil.rmtree(unfinished.parent, ignore_errors=True)
        if self.args.should_save:
            self._delete_old_checkpoints(folder.parent)
        self.accelerator.wait_for_everyone()

    def _name_best_checkpoint(self, unfinished: Path, folder: Path) -> None:
        """Where the one that is being written is the best, the state says so under the name that it will have."""
        if self.state.best_model_checkpoint == str(unfinished):
            self.state.best_model_checkpoint = str(folder)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))

    def _delete_old_checkpoints(self, run: Path) -> None:
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        *older, last = checkpoints_in(run)
        kept = {last, Path(self.state.best_model_checkpoint or last)}
        older = [path for path in older if path not in kept]
        for checkpoint in older[: max(0, len(older) + len(kept) - max(limit, len(kept)))]:
            remove_whole(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self._checkpoint_in_progress or not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(str(folder), state_dict)


def raise_if_disk_failed(error: Exception, run: Path, what: str) -> None:
    """Raises a SavingError for an error of the file system, with what the user needs to know."""
    if not isinstance(error, OSError | SafetensorError) and not _is_of_torch_save(error):
        return
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
    earlier = checkpoints_in(run)
    raise SavingError(
        f"{what} could not be written to {run}: {' '.join(str(error).split()).rstrip('.')}. "
        f"{_megabytes(shutil.disk_usage(run).free)} are free there"
        + (f", the last checkpoint took {_megabytes(_size(earlier[-1]))}" if earlier else "")
        + ". Make room or raise the quota, then give the same command again: it goes on from "
        + (f"{earlier[-1].name}." if earlier else "the start, as there is no checkpoint yet.")
    ) from error


def _is_of_torch_save(error: Exception) -> bool:
    """torch's writer makes plain RuntimeErrors of what the file system says, with texts that change."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return isinstance(error, RuntimeError) and any(
        frame.f_globals.get("__name__") == "torch.serialization" for frame in frames
    )


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*"))


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
