"""What the training program knows of each modality: one file each, chosen by the config's `modality`.

A file here is imported when a method of its modality is trained, and offers `MODALITY`, a `Modality`.
"""

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image
from transformers import PreTrainedModel, TrainerCallback

from hf_masked.data.keyed import KeyedDataset
from hf_masked.modeling.base import VariantConfig

# `VariantConfig.modality` -> the file in this folder.
FILES = {"graph": "graph", "image": "image", "points": "points", "text": "text", "video": "video"}


class Modality(ABC):
    """Everything between a data set's name and the batches of `PreTrainer` that differs between modalities."""

    @abstractmethod
    def open(self, data, split: str, config: VariantConfig, processor):
        """One split of the data set.

        Args:
            data: `DataArguments`.
            split: its name.
            config: of the model.
            processor: of the model.

        Returns:
            The source: has a `name` to tell people.

        Raises:
            ValueError: where there is no such data set or split, or it is of another modality.
        """

    @abstractmethod
    def training_set(self, source, processor, args, data, config: VariantConfig) -> KeyedDataset:
        """The samples that a run learns from.

        Args:
            source: of `open`.
            processor: of the model.
            args: `PreTrainingArguments`.
            data: `DataArguments`.
            config: of the model.

        Raises:
            ValueError: where the source cannot give such samples.
        """

    def shown(self, source, processor, data, config: VariantConfig, count: int):
        """Some samples, prepared without randomness, for `picture`; None where nothing can be drawn."""
        return None

    def from_files(self, paths: list[Path], processor, config: VariantConfig, count: int):
        """The same of files, or folders of them, that a user names, for `hf-masked visualize`.

        Raises:
            ValueError: for paths that are not there or hold nothing readable, and where nothing can be drawn.
        """
        raise ValueError(f"hf-masked visualize draws nothing of {config.modality}.")

    def picture(self, model: PreTrainedModel, processor, samples) -> Image.Image:
        """What the model masks and predicts of the samples of `shown` or `from_files`."""
        raise NotImplementedError(f"Nothing is drawn of {type(self).__name__}.")

    def observers(self, trainer, source, data, config: VariantConfig) -> list[TrainerCallback]:
        """Callbacks that judge the model, while it trains, as makes sense in this modality alone.

        Args:
            trainer: to log with.
            source: of the training split.
            data: `DataArguments`.
            config: of the model.
        """
        return []

    def labelled(self, source, processor, config: VariantConfig, limit: int | None = None, seed: int = 0):
        """(samples, classes) for probes of the frozen encoder: what `features` takes and int64 (n,); None where there
        are no classes, or none could be judged."""
        return None

    def features(self, model: PreTrainedModel, processor, samples, device: torch.device) -> torch.Tensor:
        """Float32 (n, width) on the CPU: one vector of the frozen encoder per sample of `labelled`."""
        raise NotImplementedError(f"There are no probes of {type(self).__name__}.")


def modality_of(config: VariantConfig | type[VariantConfig]) -> Modality:
    """The modality of a config.

    Raises:
        ValueError: for one that the training program does not know.
    """
    if config.modality not in FILES:
        raise ValueError(
            f"{config.model_type} learns from {config.modality}; train.py knows {', '.join(sorted(FILES))}. Train it "
            "with transformers' Trainer, as its page in model_cards/ shows."
        )
    return import_module(f"{__name__}.{FILES[config.modality]}").MODALITY


__all__ = ["FILES", "Modality", "modality_of"]
