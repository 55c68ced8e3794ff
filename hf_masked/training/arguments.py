"""`PreTrainingArguments`: transformers' TrainingArguments and the few settings that pretraining adds."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class PreTrainingArguments(TrainingArguments):
    """Settings of a pretraining run; everything of TrainingArguments is there too.

    Raises:
        ValueError: for settings that contradict each other.
    """

    base_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate for `base_batch_size` samples per step; scaled linearly to the effective batch "
            "(per device x devices x accumulation). Replaces `learning_rate`."
        },
    )
    base_batch_size: int = field(default=256, metadata={"help": "The batch that `base_learning_rate` is meant for."})
    lr_milestones: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the training after which the learning rate is divided by 10, warm-up before them and "
            "nothing else. Replaces `lr_scheduler_type`."
        },
    )
    lr_cycles: int | None = field(
        default=None,
        metadata={
            "help": "How many times the learning rate's schedule, warm-up included, runs through in the training; by "
            "default once per stage of the method. `warmup_steps` then counts in one of them, as a share too."
        },
    )
    lars: bool = field(
        default=False,
        metadata={
            "help": "Scale the learning rate of each matrix and kernel to its norm and leave the other parameters out "
            "(LARS), for large batches; with `optim: sgd` and, in `optim_args`, its momentum."
        },
    )
    coupled_weight_decay: bool = field(
        default=False,
        metadata={
            "help": "Add the weight decay to the gradients, as Adam did before AdamW; with `optim: adamw_torch`."
        },
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "Factor of the learning rate per layer, from the top down; none by default."}
    )
    probe_every_epochs: float = field(
        default=1.0,
        metadata={
            "help": "Online kNN and feature statistics every so many epochs, where there are labels; 0 = never."
        },
    )
    probe_samples: int = field(
        default=5000, metadata={"help": "Labelled pictures that the online probe takes from the training split."}
    )
    probe_linear: bool = field(default=False, metadata={"help": "Also train a linear probe online."})
    picture_every_epochs: float = field(
        default=5.0,
        metadata={"help": "Write pictures of what is masked and predicted every so many epochs; 0 = never."},
    )
    resident_data: bool | None = field(
        default=None,
        metadata={
            "help": "Keep the data set as uint8 on the device. By default whatever is in memory already "
            "(Fashion-MNIST, digits)."
        },
    )
    max_bad_share: float = field(
        default=0.1, metadata={"help": "Share of unreadable pictures above which the run stops with an error."}
    )
    nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What a loss or gradients that are not finite do: 'stop' the run with the samples' names, or "
            "'skip' the step and go on. The weights are spared either way.",
            "choices": ["stop", "skip"],
        },
    )
    nonfinite_check_steps: int = field(
        default=10, metadata={"help": "Look every so many steps whether the last ones were finite."}
    )
    dataloader_num_workers: int = field(default=2, metadata={"help": "Processes that read pictures."})
    # Pretraining drops the last, smaller batch: every step then has the same shape and the same weight.
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Drop the last, incomplete batch."})
    # Every trainable parameter gets a gradient (the conformance suite tests it): no search for unused ones.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Let DDP look for parameters without gradient at each step."}
    )
    # The filter reads the loss from the device at every step.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave NaN and inf out of the logged loss."})
    # Raw batches hold keys and indices that no `forward` names.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that `forward` does not take."})

    def __post_init__(self):
        # Without this, several processes on a machine without accelerators would not be connected.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.base_learning_rate is not None and self.base_learning_rate <= 0:
            raise ValueError(f"base_learning_rate is {self.base_learning_rate}; it must be positive.")
        if self.lr_milestones and not 0 < min(self.lr_milestones) <= max(self.lr_milestones) < 1:
            raise ValueError(f"lr_milestones are {self.lr_milestones}; shares of the training lie between 0 and 1.")
        if self.lr_cycles is not None and self.lr_cycles < 1:
            raise ValueError(f"lr_cycles is {self.lr_cycles}; it must be at least 1.")
        if self.lars and self.optim != "sgd":
            raise ValueError(f"lars=True scales the steps of SGD, and optim is {self.optim!r}: set optim=sgd.")
        if self.coupled_weight_decay and self.optim not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"coupled_weight_decay=True makes Adam of AdamW, and optim is {self.optim!r}: set optim=adamw_torch."
            )
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}; it must be 'stop' or 'skip'.")
        if self.nonfinite_check_steps < 1:
            raise ValueError(f"nonfinite_check_steps is {self.nonfinite_check_steps}; it must be at least 1.")
        for name in ("probe_every_epochs", "picture_every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (never) or positive.")

    def __getstate__(self) -> dict:
        # The Trainer pickles its arguments beside every checkpoint, and checkpoints are pushed.
        return self.__dict__ | {"hub_token": None}
