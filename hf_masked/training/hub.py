"""The Hub: a run, a model or a folder goes up, complete or not at all.

A push is one commit, so a repository never holds half of one. Whatever fails, what is on this machine stays, and the
error is one line that says how to push again.
"""

import json
import logging
import shlex
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from transformers import AutoModel, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

import hf_masked
from hf_masked.modeling.base import VariantModel
from hf_masked.modeling.registry import PREFIX, variant_of
from hf_masked.training.cards import describe_run, licence_of, write_card
from hf_masked.training.export import export_encoder
from hf_masked.training.saving import UNFINISHED, write_whole
from hf_masked.training.visualization import loss_curve

logger = logging.getLogger(__name__)

# Other checkpoints, unfinished things, and pickles: optimizers, random states, the Trainer's arguments.
NOT_PUBLISHED = [f"*{PREFIX_CHECKPOINT_DIR}-*", f"*{UNFINISHED}*", "_*", "*.pt", "*.pth", "*.bin", "*.distcp"]
# What each process of a run keeps in a checkpoint.
NOT_PUBLISHED += ["counts_*.json", "stream_*.json"]


class HubError(OSError):
    """The Hub refused or failed; the message is one line with the remedy."""


def open_repository(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """Makes a repository, or finds that it is there and may be written.

    Args:
        repo_id: "name", which stands for the user's own, or "owner/name".
        token: by default the one that `hf auth login` stored.
        private: whether a new repository is; by default what its owner has set.

    Returns:
        "owner/name".

    Raises:
        HubError: without a token, without the right to write, without connection.
    """
    try:
        repo_id = _api().create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        # Where the token may not create repositories, `create_repo` is content with one that can be read.
        _api().auth_check(repo_id, token=token, write=True)
    except Exception as error:
        remedy = _remedy(error) or "Check name and connection, or train without --push_to_hub and push afterwards. "
        raise HubError(
            f"{repo_id} cannot be written on the Hub ({_reason(error)}). {remedy}A folder is pushed without training "
            f"with `hf-masked push FOLDER {repo_id}`."
        ) from error
    return repo_id


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf_masked",
) -> CommitInfo:
    """Uploads a checkpoint's folder, less other checkpoints and pickles in it, in one commit.

    Args:
        folder: what to upload.
        repo_id, token, private: see `open_repository`.
        revision: a branch that exists; by default `main`.
        commit_message: of the commit.

    Raises:
        HubError: whatever failed, with the command that pushes again.
    """
    again = ["hf-masked", "push", str(folder), repo_id]
    again += ["--private"] * bool(private) + (["--revision", revision] if revision else [])
    with _push(repo_id, f"{folder} is complete. Push again, without training, with `{shlex.join(again)}`."):
        repo_id = _api().create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        return _api().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=NOT_PUBLISHED,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )


def push_model(
    model: VariantModel,
    repo_id: str,
    *,
    processor=None,
    tags: list[str] | None = None,
    max_shard_size: int | str = "50GB",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf_masked",
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """`model.push_to_hub`: weights, config, processor, plain encoder, and a card where the repository has none yet.

    Args:
        processor: by default the one beside the checkpoint that the model was loaded from, else one that fits its
            config.
        tags: added to the card's.
        max_shard_size: of one file of weights.
        commit_description: below the message.
        create_pr: open a pull request instead of committing to the branch.
        repo_id, token, private, revision, commit_message: see `push_folder`.

    Raises:
        HubError: whatever failed.
    """
    with _push(repo_id, "the model is as it was. Call push_to_hub again."), tempfile.TemporaryDirectory() as folder:
        repo_id = _api().create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        processor = processor or processor_of(model)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        processor.save_pretrained(folder)
        export_encoder(model, processor, Path(folder) / "encoder")
        where = {"revision": revision, "token": token}
        if _api().file_exists(repo_id, "README.md", **where):
            card = ModelCard.load(_api().hf_hub_download(repo_id, "README.md", **where))
        else:
            card = ModelCard.load(write_card(folder, repo_id, licence_of(model.name_or_path)))
        card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(tags or [])]))
        card.save(Path(folder) / "README.md")
        return _api().upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            create_pr=create_pr,
            **where,
        )


def complete_folder(folder: str | Path, repo_id: str) -> None:
    """Adds to a checkpoint of ours what it may lack before it is published: the plain encoder, and the card's text.

    Other checkpoints, a fine-tuned classifier for example, stay as they are.

    Raises:
        ValueError: if the folder holds no checkpoint.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no checkpoint (no config.json): give the output folder of a run.")
    config = json.loads((folder / "config.json").read_text())
    if not config.get("model_type", "").startswith(PREFIX):
        return
    if not (folder / "encoder" / "config.json").exists():
        model = AutoModel.from_pretrained(folder)
        export_encoder(model, processor_of(model), folder / "encoder")
    write_card(folder, repo_id)


def processor_of(model: VariantModel):
    """The processor beside the checkpoint that a model was loaded from; without one, one that fits its config."""
    kind = getattr(hf_masked, model.config.processor)
    if model.name_or_path:
        try:
            return kind.from_pretrained(model.name_or_path)
        except OSError:
            logger.warning("%s has no processor: the model's config makes one.", model.name_or_path)
    return kind(**model.config.processor_settings())


class HubMixin:
    """Put before `Trainer` among the base classes: what it pushes is complete, and a failure says what to do.

    `push_to_hub`, `hub_model_id`, `hub_strategy` and their like mean what they mean in TrainingArguments.
    With `push_to_hub` the repository is made, or found writable, before training starts. Pushes in the middle of
    training run beside it, and when one fails a warning says so.

    Args:
        facts: of the run, for `run.json` and the card, which the trainer cannot know: see `describe_run`.
    """

    def __init__(self, *args, facts: dict | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.facts = facts or {}
        if self.args.push_to_hub:
            self.add_callback(CheckpointPushCallback(self))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).resolve().name
            private = self.args.hub_private_repo if private is None else private
            self.hub_model_id = open_repository(name, token or self.args.hub_token, private)
            self.push_in_progress = None

    def save_release(self) -> None:
        """Writes to `output_dir` what is published: model, processor, plain encoder, loss curve, `run.json`, card."""
        if self.is_fsdp_enabled:
            # Checkpoints may be sharded, what a run leaves is whole.
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(_internal_call=True)
        self.save_state()
        if self.is_world_process_zero():
            output = Path(self.args.output_dir)
            # Read back from the file: the weights in memory may be shards.
            model = variant_of(self.model).pretraining.from_pretrained(output)
            export_encoder(model, self.processing_class, output / "encoder")
            loss_curve(self.state.log_history, output / "pictures" / "loss.png")
            self.create_model_card()

    def create_model_card(self, **kwargs) -> None:
        """Writes README.md and `run.json`; for models of other packages the Trainer's card, with its arguments."""
        if not isinstance(self.model, VariantModel):
            super().create_model_card(**kwargs)
        elif self.is_world_process_zero():
            output = Path(self.args.output_dir)
            run = describe_run(self, self.facts)
            write_card(output, self.hub_model_id or self.args.hub_model_id, run=run)
            # The last file of a run: where it stands, everything does.
            write_whole(output / "run.json", json.dumps(run, indent=2) + "\n")

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> CommitInfo | Future | None:
        """`save_release`, then the upload, from one process.

        Args:
            blocking: wait for the upload; otherwise a `Future` is returned.
            commit_message, token, revision, private: see `push_folder`; by default those of the arguments.
            kwargs: of the Trainer's own card, for models of other packages, which are pushed as the Trainer does it.

        Raises:
            HubError: whatever failed, with the command that pushes again.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        if not isinstance(self.model, VariantModel):
            return super().push_to_hub(commit_message, blocking, token, revision, **kwargs)
        if kwargs:
            raise TypeError(f"The card is made from the run and takes no {', '.join(kwargs)}: edit README.md instead.")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_release()
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        settings = {
            "token": token or self.args.hub_token,
            "private": self.args.hub_private_repo if private is None else private,
            "revision": revision or self.args.hub_revision,
            "commit_message": commit_message,
        }
        if blocking:
            return push_folder(self.args.output_dir, self.hub_model_id, **settings)
        return _api().run_as_future(push_folder, self.args.output_dir, self.hub_model_id, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: the Trainer calls this while it still saves; `CheckpointPushCallback` pushes afterwards."""

    def push_checkpoint(self, folder: Path) -> None:
        """What `hub_strategy` asks for once a checkpoint is written: its model, and the checkpoint itself."""
        args = self.args
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if args.hub_strategy == HubStrategy.END or (busy and not args.hub_always_push):
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        message = f"Training in progress, step {self.state.global_step}"
        settings = {"repo_id": self.hub_model_id, "token": args.hub_token, "revision": args.hub_revision}
        jobs = [
            _api().upload_folder(
                folder_path=folder,
                ignore_patterns=NOT_PUBLISHED,
                commit_message=message,
                run_as_future=True,
                **settings,
            )
        ]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else folder.name
            jobs.append(
                _api().upload_folder(
                    folder_path=folder,
                    path_in_repo=place,
                    commit_message=f"{message}, checkpoint",
                    run_as_future=True,
                    **settings,
                )
            )
        for job in jobs:
            job.add_done_callback(_warn_of_failure)
        self.push_in_progress = PushInProgress([*(self.push_in_progress.jobs if busy else []), *jobs])


class CheckpointPushCallback(TrainerCallback):
    """Pushes each checkpoint of a trainer once it stands under its name."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.trainer.push_checkpoint(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


@cache
def _api() -> HfApi:
    """One client, whose pushes beside training follow each other."""
    return HfApi(library_name="hf_masked", library_version=hf_masked.__version__)


@contextmanager
def _push(repo_id: str, what_is_left: str) -> Iterator[None]:
    """Turns whatever goes wrong on the way to the Hub into one line."""
    try:
        yield
    except Exception as error:
        raise HubError(
            f"The push to {repo_id} failed ({_reason(error)}). {_remedy(error)}Nothing is lost: {what_is_left}"
        ) from error


def _warn_of_failure(job: Future) -> None:
    if not job.cancelled() and job.exception():
        logger.warning(
            "A push of a checkpoint failed (%s). Training goes on, and its end pushes everything.",
            _reason(job.exception()),
        )


def _reason(error: BaseException) -> str:
    """What the Hub or its client says, on one line that is not too long."""
    if isinstance(error, HfHubHTTPError) and error.server_message:
        return f"HTTP {error.response.status_code}: {error.server_message}"
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]} ..."


def _remedy(error: Exception) -> str:
    """What to do about a missing or too weak token; nothing for other errors."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401 or isinstance(error, LocalTokenNotFoundError):
        return "Log in with a token that may write: `hf auth login`. "
    if status == 403:
        return "Log in with a token that may write there (`hf auth login`), or choose another owner. "
    return ""
