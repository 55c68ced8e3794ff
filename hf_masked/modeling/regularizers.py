"""What methods share that change how a classifier is trained and nothing of the classifier: masks and mixes as a
supervised learner's helper.

A method says in which passes a batch goes through the classifier, and what it should answer in each;
`hf_masked.training.regularized` is the Trainer that does so. What is left is the stock classifier.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class RegularizerConfig:
    """Base of the methods' configs. The class attributes are the facts that catalogue, cards and command line read."""

    method_name: ClassVar[str]
    paper_title: ClassVar[str]
    paper_year: ClassVar[int]
    arxiv_id: ClassVar[str]
    reference_repository: ClassVar[str | None] = None
    weights_licence: ClassVar[str | None] = None
    modality: ClassVar[str] = "image"
    masks: ClassVar[str]
    predicts: ClassVar[str]
    backbones: ClassVar[tuple[str, ...]]

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raises a ValueError for values that do not fit together."""

    def to_dict(self) -> dict:
        return {"method": self.method_name, **asdict(self)}


@dataclass
class Pass:
    """One pass of a batch through the classifier.

    Args:
        inputs: of the classifier, without labels.
        targets: float32 (batch, classes), what it should answer.
        criterion: (logits, targets) -> scalar.
        weight: of the loss.
        name: of the loss in the log.
        context: entered around the forward and backward pass.
        logits: float (batch, classes), what it answered, once it has.
    """

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    criterion: Criterion
    weight: float = 1.0
    name: str = "main"
    context: AbstractContextManager = field(default_factory=nullcontext)
    logits: torch.Tensor | None = None


class Regularizer(ABC):
    """A method that helps a supervised learner.

    Args:
        config: its settings.
    """

    def __init__(self, config: RegularizerConfig):
        self.config = config

    @abstractmethod
    def passes(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        targets: torch.Tensor,
        criterion: Criterion,
        keys: torch.Tensor,
    ) -> Iterator[Pass]:
        """The passes of a batch, one after the other: when the next one is asked for, the last has its logits.

        Args:
            model: the classifier, in training mode.
            inputs: of its `forward`, without labels.
            targets: float32 (batch, classes).
            criterion: of the classifier's own task.
            keys: int64 (batch,), from which everything is drawn, see `hf_masked.randomness`.
        """


def soft_targets(labels: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """float32 (batch, classes) of int64 (batch,) classes; what is soft already stays, smoothed alike."""
    targets = labels.float() if labels.is_floating_point() else F.one_hot(labels, num_classes).float()
    return targets * (1 - smoothing) + smoothing / num_classes


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over the batch; the logits are taken to float32."""
    return F.cross_entropy(logits.float(), targets)


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over batch and classes of each class's own yes or no."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets)


def criterion_of(model: PreTrainedModel) -> Criterion:
    """The loss of a classifier's own task, for soft targets."""
    multiple = model.config.problem_type == "multi_label_classification"
    return binary_cross_entropy if multiple else cross_entropy


def check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1].")


__all__ = [
    "Criterion",
    "Pass",
    "Regularizer",
    "RegularizerConfig",
    "binary_cross_entropy",
    "criterion_of",
    "cross_entropy",
    "soft_targets",
]
