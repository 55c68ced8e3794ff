"""Loading checkpoints the way `from_pretrained` does, into new models and into models that are being trained.

Since transformers 5 the names of parameters in memory differ from those on disk; `save_pretrained` and
`from_pretrained` translate, `Trainer` does not when it resumes or picks the best model: it warns of missing keys and
goes on from the initial weights (seen in 5.17 and 5.23; upstream issue 43701).
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import is_sagemaker_mp_enabled
from transformers.utils import logging as transformers_logging


def load_with_report(model_class, path: str, **kwargs) -> tuple[PreTrainedModel, dict[str, set]]:
    """`model_class.from_pretrained(path, **kwargs)` and what did not fit, for the caller to judge.

    Returns:
        The model, and the sets "missing_keys" (in the model, not in the file), "unexpected_keys" (in the file, not in
        the model) and "mismatched_keys" (name, shape in the file, shape in the model).
    """
    with _without_warnings():
        return model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)


def load_weights(model: PreTrainedModel, checkpoint: str) -> None:
    """Copies a checkpoint's parameters and persistent buffers into `model`, in place.

    What optimizers and wrappers hold of the model stays valid, and every `requires_grad` stays as it is.

    Raises:
        ValueError: when a tensor of the model is missing in the checkpoint, of another shape there, or when the
            checkpoint holds tensors that the model has not.
    """
    loaded, report = load_with_report(type(model), checkpoint, config=copy.deepcopy(model.config))
    target = model.state_dict()
    source = {name: value for name, value in loaded.state_dict().items() if name not in report["missing_keys"]}
    problems = {
        "missing": target.keys() - source.keys(),
        "unexpected": report["unexpected_keys"] | (source.keys() - target.keys()),
        "of another shape": {name for name, *_ in report["mismatched_keys"]},
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_listed(names)}" for kind, names in problems.items() if names)
        raise ValueError(
            f"The checkpoint {checkpoint} does not fit {type(model).__name__} ({listed}). Resume with the "
            "configuration that the checkpoint was written with, or start a new run from its weights."
        )
    with torch.no_grad():
        for name, value in target.items():
            value.copy_(source[name])


class FaithfulCheckpointsMixin:
    """Put before `Trainer` among the base classes: resuming and `load_best_model_at_end` load what was saved.

    DDP and compiled models are unwrapped. FSDP, DeepSpeed, SageMaker's model parallelism, PEFT and models that are
    not `PreTrainedModel`s load as the Trainer loads them. With FSDP nothing is lost by that: Accelerate writes files
    of its own beside `model.safetensors`, with the names that the parameters have in memory, and reads those.

    Raises:
        ValueError: when a checkpoint and the model differ, see `load_weights`.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        plain_model = self._plain_model(model)
        if plain_model is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(plain_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        plain_model = self._plain_model()
        if plain_model is None:
            super()._load_best_model()
        else:
            load_weights(plain_model, self.state.best_model_checkpoint)

    def _plain_model(self, model: nn.Module | None = None) -> PreTrainedModel | None:
        """The unwrapped model where `load_weights` can fill it, else None."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_sagemaker_mp_enabled():
            return None
        model = self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)
        has_adapters = getattr(model, "_hf_peft_config_loaded", False)
        return model if isinstance(model, PreTrainedModel) and not has_adapters else None


def _listed(names: set[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@contextmanager
def _without_warnings():
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
