"""Fine-tuning of any encoder into a plain transformers classifier, with all labels or a few."""

import copy
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_masked.evaluation.features import ImageSettings, evaluation_mode, load_encoder
from hf_masked.modeling.parts.backbones import without_mask_token
from hf_masked.modeling.parts.gray import fold_gray_to_rgb
from hf_masked.modeling.parts.pooling import interpolation_argument
from hf_masked.modeling.parts.relative_positions import TABLE, beit_for_finetuning
from hf_masked.modeling.regularizers import Regularizer
from hf_masked.processing.image_processing import AUGMENT, CROP, MaskedImageProcessor
from hf_masked.processing.stock import save_stock_processor
from hf_masked.randomness import keyed_draw, sample_keys
from hf_masked.training.checkpoints import FaithfulCheckpointsMixin, load_with_report
from hf_masked.training.optimization import parameter_groups, scaled_learning_rate
from hf_masked.training.regularized import RegularizedMixin


def finetune(
    encoder: str | PreTrainedModel | PreTrainedConfig,
    train_images: torch.Tensor,
    train_labels: torch.Tensor,
    test_images: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    settings: ImageSettings | None = None,
    steps: int = 400,
    batch_size: int = 32,
    base_learning_rate: float = 1.6e-2,
    layer_decay: float | None = 0.75,
    weight_decay: float = 0.05,
    warmup: float = 0.1,
    label_smoothing: float = 0.0,
    crop_scale: tuple[float, float] = (0.6, 1.0),
    flip_probability: float = 0.5,
    seed: int = 0,
    regularizer: Regularizer | None = None,
    label_names: list[str] | None = None,
    output_dir: str | None = None,
    training_arguments: dict | None = None,
    resume_from_checkpoint: str | bool | None = None,
) -> dict[str, float]:
    """Trains all weights of an encoder and a new linear head, then classifies the test pictures.

    AdamW with layer-wise decay of the learning rate, warm-up, half a cosine to 0, random resized crops and flips. The
    budget is a number of steps, so that fewer labels cost no less; the learning rate suits a few hundred steps. A
    BEiT takes the form in which its paper and SimMIM fine-tune it, see `beit_for_finetuning`.

    Args:
        encoder: a checkpoint (folder or Hub id, of this package or of transformers), a stock transformers encoder, or
            its config for the baseline from scratch.
        train_images: uint8 (n, channels, height, width).
        train_labels: int64 (n,), classes from 0.
        test_images: uint8 (m, channels, height, width).
        test_labels: int64 (m,).
        settings: mean, standard deviation and size of the input; by default the checkpoint's.
        steps: optimizer steps.
        batch_size: pictures per step and device.
        base_learning_rate: per 256 pictures.
        layer_decay: factor of the learning rate from block to block, towards the input; None for one rate.
        weight_decay: of all but norms and biases.
        warmup: share of the steps in which the learning rate rises.
        label_smoothing: share of the target spread over all classes.
        crop_scale: smallest and largest share of the area of the random crop.
        flip_probability: of the horizontal flip.
        seed: of the head, the order, the crops and the flips.
        regularizer: Cutout, Manifold Mixup, MaskSub, or None for ordinary training.
        label_names: of the classes; "LABEL_0", ... by default.
        output_dir: where to save the classifier and a stock image processor, which
            `pipeline("image-classification", model=output_dir)` serves without this package. A model of one channel
            is saved as one of three, see `fold_gray_to_rgb`.
        training_arguments: further arguments of `TrainingArguments`, for example `bf16` or `save_steps`.
        resume_from_checkpoint: as in `Trainer.train`.

    Returns:
        {"accuracy", "labels", "steps", "seconds"}.

    Raises:
        ValueError: for a config without settings, or an encoder whose weights do not all reach the classifier.
    """
    started = time.perf_counter()
    set_seed(seed)
    num_labels = int(max(train_labels.max(), test_labels.max())) + 1
    classifier, settings = _build(encoder, settings, label_names or [f"LABEL_{i}" for i in range(num_labels)])
    processor = MaskedImageProcessor(
        size=settings.size,
        num_channels=settings.num_channels,
        crop_scale=crop_scale,
        flip_probability=flip_probability,
        crop_fraction=1.0,
        image_mean=list(settings.mean),
        image_std=list(settings.std),
        mask_kind=None,
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = {
            "output_dir": scratch,
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "weight_decay": weight_decay,
            "lr_scheduler_type": "cosine",
            "warmup_steps": round(warmup * steps),
            "label_smoothing_factor": label_smoothing,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": seed,
        } | (training_arguments or {})
        trainer = FineTuner(
            model=classifier,
            args=TrainingArguments(remove_unused_columns=False, **arguments),
            images=train_images,
            labels=train_labels,
            processor=processor,
            base_learning_rate=base_learning_rate,
            layer_decay=layer_decay,
            regularizer=regularizer,
        )
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    predicted = classify(classifier, test_images, processor)
    if output_dir is not None and trainer.is_world_process_zero():
        save_classifier(classifier, processor, output_dir)
    return {
        "accuracy": float((predicted == test_labels.cpu()).float().mean()),
        "labels": len(train_labels),
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
    }


class FineTuner(RegularizedMixin, FaithfulCheckpointsMixin, Trainer):
    """Trains a classifier on pictures that live on the device as uint8.

    Args:
        images: uint8 (n, channels, height, width); one channel is repeated where the processor has three.
        labels: int64 (n,).
        processor: crops, flips and normalises, keyed by seed, epoch and picture.
        base_learning_rate: per 256 pictures.
        layer_decay: see `parameter_groups`.
        kwargs: of `RegularizedMixin` and of transformers' Trainer.
    """

    def __init__(
        self,
        *,
        images: torch.Tensor,
        labels: torch.Tensor,
        processor: MaskedImageProcessor,
        base_learning_rate: float,
        layer_decay: float | None,
        **kwargs,
    ):
        super().__init__(train_dataset=_Indices(labels), **kwargs)
        self.remove_callback(PrinterCallback)
        self.images = _with_channels(images, processor.num_channels).to(self.args.device)
        self.processor = processor
        self.layer_decay = layer_decay
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        self.args.learning_rate = scaled_learning_rate(base_learning_rate, batch)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            groups = parameter_groups(
                model, self.args.weight_decay, self.args.learning_rate, self.layer_decay, no_weight_decay=[TABLE]
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if "index" not in inputs:  # prepared already
            return inputs
        self._indices, epoch = inputs.pop("index"), int(self.state.epoch or 0)
        crop_keys, augment_keys = (
            sample_keys(self.args.seed, epoch, self._indices, purpose=purpose) for purpose in (CROP, AUGMENT)
        )
        pixels = self.processor.prepare_resident(self.images[self._indices], crop_keys)
        size = interpolation_argument(self.model, pixels.shape[-2:])
        return inputs | self.processor.finish(pixels, augment_keys) | size

    def sample_indices(self) -> torch.Tensor:
        return self._indices


@torch.inference_mode()
def classify(
    classifier: PreTrainedModel, images: torch.Tensor, processor: MaskedImageProcessor, batch_size: int = 256
) -> torch.Tensor:
    """Predicted classes of uint8 (n, channels, height, width), int64 (n,) on the CPU."""
    predictions = []
    with evaluation_mode(classifier):
        for batch in _with_channels(images, processor.num_channels).split(batch_size):
            pixels = processor.prepare_resident(batch.to(classifier.device))
            inputs = processor.finish(pixels) | interpolation_argument(classifier, pixels.shape[-2:])
            predictions.append(classifier(**inputs).logits.argmax(dim=1).cpu())
    return torch.cat(predictions)


def few_label_subset(labels: torch.Tensor, share_or_count: float | int, seed: int = 0) -> torch.Tensor:
    """Indices of a random subset with equally many pictures of each class.

    Args:
        labels: int64 (n,).
        share_or_count: a share of n (a float in (0, 1]), or the size of the subset (an int). What the number of
            classes does not divide goes, one each, to classes that the seed chooses.
        seed: of the choice.

    Returns:
        int64 (subset,), sorted.

    Raises:
        ValueError: when a class has fewer pictures than its part, or a class would get none.
    """
    count = round(share_or_count * len(labels)) if isinstance(share_or_count, float) else share_or_count
    classes = labels.unique()
    draw = keyed_draw(sample_keys(seed, 0, torch.arange(1)))
    favoured = draw(len(classes))[0].argsort()[: count % len(classes)]
    counts = torch.full((len(classes),), count // len(classes)).index_fill_(0, favoured, count // len(classes) + 1)
    order = draw(len(labels))[0].argsort()
    chosen = []
    for label, wanted in zip(classes.tolist(), counts.tolist(), strict=True):
        members = order[labels[order] == label]
        if not 1 <= wanted <= len(members):
            raise ValueError(
                f"A balanced subset of {count} takes {wanted} pictures of class {label}, which has {len(members)}: "
                f"ask for {len(classes)} to {len(classes) * int(torch.bincount(labels)[classes].min())}."
            )
        chosen.append(members[:wanted])
    return torch.cat(chosen).sort().values


def save_classifier(classifier: PreTrainedModel, processor: MaskedImageProcessor, output_dir: str) -> None:
    """Saves a classifier and a stock image processor for `pipeline("image-classification")`.

    A classifier of one channel is folded to three, in place, because pipelines give RGB.
    """
    mean, std = processor.image_mean, processor.image_std
    if processor.num_channels == 1:
        fold_gray_to_rgb(classifier)
        mean, std = mean * 3, std * 3
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    classifier.save_pretrained(output_dir)
    save_stock_processor(processor, output_dir, image_mean=mean, image_std=std, do_convert_rgb=len(mean) == 3)


def load_classifier(encoder_path: str, label_names: list[str]) -> PreTrainedModel:
    """A classifier whose encoder is that of a plain checkpoint, with a new head.

    Raises:
        ValueError: when weights of the encoder do not reach the classifier.
    """
    classifier, report = load_with_report(
        AutoModelForImageClassification, encoder_path, **_label_settings(label_names)
    )
    lost = {name for name in report["unexpected_keys"] if not _is_head(name)}
    new = {name for name in report["missing_keys"] if not _is_head(name)}
    changed = {name for name, *_ in report["mismatched_keys"] if not _is_head(name)}
    if lost or new or changed:
        raise ValueError(
            f"{encoder_path} does not fit {type(classifier).__name__}: weights without a place {sorted(lost)[:3]}, "
            f"places without a weight {sorted(new)[:3]}, of another shape {sorted(changed)[:3]}."
        )
    return classifier


class _Indices(Dataset):
    def __init__(self, labels: torch.Tensor):
        self.labels = labels.tolist()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"index": index, "labels": self.labels[index]}


def _build(encoder, settings, label_names) -> tuple[PreTrainedModel, ImageSettings]:
    if isinstance(encoder, PreTrainedConfig):
        if settings is None:
            raise ValueError("A config says nothing of mean, standard deviation and size: pass settings.")
        config = copy.deepcopy(encoder)
        for name, value in _label_settings(label_names).items():
            setattr(config, name, value)
        # AutoModelForImageClassification of transformers 5.23 iterates over it for DeiT, None or not.
        config.architectures = config.architectures or []
        return AutoModelForImageClassification.from_config(config), settings
    if not isinstance(encoder, PreTrainedModel):
        encoder, own_settings = load_encoder(encoder)
        settings = settings or own_settings
    if settings is None:
        raise ValueError("A model says nothing of mean, standard deviation and size: pass settings.")
    encoder = without_mask_token(encoder)
    if encoder.config.model_type == "beit":
        encoder = beit_for_finetuning(encoder)
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        return load_classifier(folder, label_names), settings


def _label_settings(label_names: list[str]) -> dict:
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def _is_head(name: str) -> bool:
    """The classifier, and the pooler before it, which encoders may come without."""
    return bool({"classifier", "pooler", "head"} & set(name.split(".")[:2]))


def _with_channels(images: torch.Tensor, num_channels: int) -> torch.Tensor:
    return images.expand(-1, num_channels, -1, -1) if images.shape[1] == 1 else images
