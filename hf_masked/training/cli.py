"""The training program behind `train.py`."""

import itertools
import json
import logging
import os
import sys
from pathlib import Path

from transformers import AutoImageProcessor, PreTrainedModel, TrainerState, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_masked
from hf_masked.extras import MissingPackageError
from hf_masked.modeling.registry import Variant, get_variant
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.callbacks import OnlineProbeCallback, PictureCallback
from hf_masked.training.cards import hub_id, used_settings
from hf_masked.training.checkpoints import load_weights
from hf_masked.training.faults import NonFiniteError
from hf_masked.training.hub import HubError
from hf_masked.training.launch import LaunchError, check_launch, follow_launcher, use_all_cores
from hf_masked.training.modalities import Modality, modality_of
from hf_masked.training.recipes import DataArguments, MethodArguments, RecipeError, parse
from hf_masked.training.saving import SavingError, checkpoints_in
from hf_masked.training.trainer import PreTrainer

logger = logging.getLogger(__name__)

# Values of --resume_from_checkpoint that name no checkpoint.
ANEW = ("no", "false", "False")
GO_ON = (None, "true", "True", "auto")

# Pictures drawn by the picture callback.
PICTURES = 8


def main(arguments: list[str] | None = None) -> PreTrainer:
    """Runs the program.

    A mistake of the user's or a failure of the Hub ends it with one line and status 2, a full disk or a loss that is
    not finite with one line and status 1, SIGTERM and SIGINT with a checkpoint and status 128 + the signal's number
    (so that what follows in a script does not take the run for complete).
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    try:
        return train(*parse(sys.argv[1:] if arguments is None else arguments))
    except (RecipeError, LaunchError, HubError, ValueError, MissingPackageError, SavingError, NonFiniteError) as error:
        if os.environ.get("HF_MASKED_TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"train.py: {error}", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, SavingError | NonFiniteError) else 2) from error


def train(method: MethodArguments, data: DataArguments, args: PreTrainingArguments) -> PreTrainer:
    """Pretrains, saves the model, its processor and the plain encoder, and returns the trainer.

    Where the same run has been completed before, it only loads what that one saved.
    """
    use_all_cores()
    follow_launcher()
    set_seed(args.seed)
    variant = get_variant(method.method)
    if variant.kind != "model":
        raise RecipeError(
            f"{variant.name} is a {variant.kind}, which train.py does not train: model_cards/{variant.name}.md shows "
            "how to use it."
        )
    model = make_model(variant, method)
    modality = modality_of(model.config)
    processor = make_processor(variant, model, method)
    source = modality.open(data, data.train_split, model.config, processor)
    trainer = PreTrainer(
        model=model,
        args=args,
        processing_class=processor,
        train_dataset=modality.training_set(source, processor, args, data, model.config),
        facts=describe_source(method, data, args, source.name),
    )
    check_launch(trainer.accelerator)
    if args.resume_from_checkpoint in ANEW and args.should_save:
        set_aside(Path(args.output_dir))
    if is_complete(trainer):
        load_complete(trainer)
        if args.push_to_hub:
            finish(trainer)
        return trainer
    if not data.streaming:
        add_observers(trainer, modality, source, data)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args))
    finish(trainer)
    return trainer


def make_model(variant: Variant, method: MethodArguments) -> PreTrainedModel:
    """The model of a method, new or around a pretrained encoder."""
    if method.from_backbone:
        return variant.pretraining.from_backbone(method.from_backbone, **method.model)
    return variant.pretraining(variant.config(**method.model))


def make_processor(variant: Variant, model: PreTrainedModel, method: MethodArguments):
    """The variant's processor, fitted to the config and to a pretrained encoder's normalisation, then the recipe's."""
    settings = model.config.processor_settings()
    if method.from_backbone:
        if model.config.modality == "image":
            settings |= _normalization_of(method.from_backbone)
        elif model.config.modality == "text":
            settings["tokenizer"] = method.from_backbone
    processor = getattr(hf_masked, model.config.processor)(**(settings | method.processor))
    if model.teachers():  # which undo this normalisation, to make their own
        model.config.image_mean, model.config.image_std = processor.image_mean, processor.image_std
    return processor


def _normalization_of(checkpoint: str) -> dict:
    try:
        stock = AutoImageProcessor.from_pretrained(checkpoint)
    except (OSError, ValueError):
        logger.warning("%s has no image processor: pictures are normalised with the default mean.", checkpoint)
        return {}
    return {"image_mean": list(stock.image_mean), "image_std": list(stock.image_std)}


def add_observers(trainer: PreTrainer, modality: Modality, source, data: DataArguments) -> None:
    """Adds the online probe, where there are labels, and the pictures."""
    args, processor, config = trainer.args, trainer.processing_class, trainer.model.config
    for observer in modality.observers(trainer, source, data, config):
        trainer.add_callback(observer)
    try:
        test_source = modality.open(data, data.test_split, config, processor)
    except ValueError as error:
        logger.warning("No online probe: %s", error)
        test_source = None
    if args.picture_every_epochs:
        samples = modality.shown(test_source or source, processor, data, config, PICTURES)
        if samples is not None:
            trainer.add_callback(PictureCallback(trainer, modality, samples, args.picture_every_epochs))
    if args.probe_every_epochs and test_source is not None:
        chosen = {"limit": args.probe_samples, "seed": args.seed}
        train = modality.labelled(source, processor, config, **chosen)
        if train is None:
            return
        test = modality.labelled(test_source, processor, config, **chosen)
        if test is None:
            raise ValueError(f"{test_source.name} has no labels: set label_column to the column that holds them.")
        trainer.add_callback(
            OnlineProbeCallback(
                trainer,
                modality,
                train=train,
                test=test,
                every_epochs=args.probe_every_epochs,
                linear=args.probe_linear,
            )
        )


def checkpoint_to_resume(args: PreTrainingArguments) -> str | None:
    """The checkpoint that was asked for, or the last one in the output folder: the same command goes on.

    `--resume_from_checkpoint no` starts anew.
    """
    if args.resume_from_checkpoint in ANEW:
        return None
    if args.resume_from_checkpoint not in GO_ON:
        return args.resume_from_checkpoint
    last = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if last:
        print(f"Resuming from {last} (start anew with --resume_from_checkpoint no).")
    return last


def set_aside(output: Path) -> None:
    """Moves the checkpoints of an earlier run to `earlier-1`, ...: a new run would go on from them after a fault."""
    (output / "run.json").unlink(missing_ok=True)
    checkpoints = checkpoints_in(output)
    if checkpoints:
        folder = next(path for n in itertools.count(1) if not (path := output / f"earlier-{n}").exists())
        folder.mkdir()
        for checkpoint in checkpoints:
            checkpoint.rename(folder / checkpoint.name)
        print(f"The checkpoints of an earlier run are in {folder} now.")


def is_complete(trainer: PreTrainer) -> bool:
    """Whether an earlier run has made all the steps that are asked for and written everything; `run.json` is last."""
    args = trainer.args
    run = Path(args.output_dir) / "run.json"
    if args.resume_from_checkpoint not in GO_ON or not run.is_file():
        return False
    *_, max_steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    return json.loads(run.read_text())["steps"] >= max_steps


def load_complete(trainer: PreTrainer) -> None:
    """Gives the trainer the weights and the history of the complete run in its output folder."""
    output = trainer.args.output_dir
    load_weights(trainer.model, output)
    trainer.state = TrainerState.load_from_json(os.path.join(output, "trainer_state.json"))
    if trainer.is_world_process_zero():
        print(
            f"{output} is complete, with {trainer.state.global_step} steps; nothing is trained. Raise --max_steps or "
            "--num_train_epochs to go on, or start anew with --resume_from_checkpoint no or another --output_dir."
        )


def describe_source(method: MethodArguments, data: DataArguments, args: PreTrainingArguments, name: str) -> dict:
    """What the card says of the run beyond what the trainer knows."""
    return {
        "dataset": name,
        "dataset_id": hub_id(data.dataset_name),
        "test_split": data.test_split,
        "from_backbone": method.from_backbone,
        "recipe": used_settings(method, data, args),
    }


def finish(trainer: PreTrainer) -> None:
    """Writes everything that a run leaves, and pushes it where that was asked for."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    else:
        trainer.save_release()
    if trainer.is_world_process_zero():
        output = Path(trainer.args.output_dir)
        pushed = f" Pushed to {trainer.hub_model_id}." if trainer.args.push_to_hub else ""
        print(
            f"Wrote {output} (model, README.md), {output / 'encoder'} (plain encoder), {output / 'pictures'} "
            f"(pictures, loss curve).{pushed}"
        )
