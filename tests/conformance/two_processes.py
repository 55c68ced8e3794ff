"""Trains every variant in two processes, replicated (DDP) and sharded (FSDP2), by torchrun.

What it leaves in the folder that is its argument, per variant: `<name>/ddp` and `<name>/fsdp`, runs of `STEPS` steps,
the second with a checkpoint half-way, and `<name>/resumed`, sharded, which went on from there. The loss of a model
that is sharded in bfloat16, in `bf16.pt`, and what `train.py` leaves of a sharded run, in `program`.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from hf_masked.training import throughput
from hf_masked.training.cli import main as program
from hf_masked.training.launch import disconnect
from tests.conformance.cases import MODELS, training_inputs
from tests.conformance.test_training import trainer_of
from tests.modeling.parts.tiny_twin import TINY_BATCH_NORM_TWIN, TINY_TWIN
from tests.training.test_program import TINY

STEPS = 4
# The gradient of attention's key biases is zero but for rounding, of which Adam's own epsilon would make whole steps.
ADAM = {"adam_epsilon": 1e-6}
VARIANTS = {variant.name: variant for variant in [*MODELS, TINY_TWIN, TINY_BATCH_NORM_TWIN]}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def settings(processes: int) -> dict:
    """Of one of so many processes: the batch of them all is 8."""
    return {
        "per_device_train_batch_size": 8 // processes,
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "learning_rate": 1e-4,
        **ADAM,
    }


def program_flags(processes: int) -> list[str]:
    observers = ["--probe_every_epochs", "0.05", "--picture_every_epochs", "9"]
    adam = ["--adam_epsilon", str(ADAM["adam_epsilon"])]
    return [*TINY, "--per_device_train_batch_size", str(16 // processes), *observers, *adam]


def shard_on_cpu() -> None:
    """From here on Accelerate shards with FSDP2, which by itself it does on accelerators only."""
    start = PartialState.__init__

    def start_as_gpu(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpu
    os.environ.update(FSDP)


def train(variant, kind: str, folder: Path, checkpoint: Path | None = None, **others):
    trainer = trainer_of(variant, folder / variant.name / kind, **settings(processes=2) | others)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return trainer


def in_half_precision(folder: Path) -> None:
    """Leaves the loss of a sharded model in bfloat16, as the model gives it."""
    trainer = train(TINY_TWIN, "bf16", folder, bf16=True, save_strategy="no")
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.model(**training_inputs(TINY_TWIN, trainer.model.config)).loss
    if trainer.is_world_process_zero():
        torch.save(loss, folder / "bf16.pt")


def main(folder: Path) -> None:
    for variant in VARIANTS.values():
        if not {"ddp", "fsdp"} <= variant.pretraining.declined_checks.keys():
            train(variant, "ddp", folder, save_strategy="no").save_model()
    shard_on_cpu()
    for variant in VARIANTS.values():
        if "fsdp" not in variant.pretraining.declined_checks:
            train(variant, "fsdp", folder)
            halfway = folder / variant.name / "fsdp" / f"checkpoint-{STEPS // 2}"
            train(variant, "resumed", folder, halfway, save_strategy="no").save_model()
    in_half_precision(folder)
    program([*program_flags(processes=2), "--output_dir", str(folder / "program")])


if __name__ == "__main__":
    throughput.matmul_rate = lambda device, dtype: 1e9  # it takes its time and is measured elsewhere
    main(Path(sys.argv[1]))
    disconnect()
