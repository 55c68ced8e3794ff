"""Trains every variant in two processes, replicated (DDP) and sharded (FSDP2). Started by torchrun.

What it leaves in the folder that is its argument, per variant: `<name>/<kind>/` of a run of `STEPS` steps with a
checkpoint half-way, `<name>/fsdp resumed/` of one that went on from there.
"""

import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from hf_masked.training.launch import check_launch
from tests.conformance.cases import MODELS
from tests.conformance.test_training import trainer_of
from tests.modeling.parts.tiny_twin import TINY_TWIN

STEPS = 4
VARIANTS = {variant.name: variant for variant in [*MODELS, TINY_TWIN]}
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
    }


def shard_on_cpu() -> None:
    """From here on Accelerate shards when it is asked to; by itself it does so on accelerators only."""
    start = PartialState.__init__

    def start_as_gpu(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = start_as_gpu
    os.environ.update(FSDP)


def run(kind: str, folder: Path) -> None:
    for name, variant in VARIANTS.items():
        if {kind, "ddp"} & variant.pretraining.declined_checks.keys():
            continue
        trainer = trainer_of(variant, folder / name / kind, **settings(processes=2))
        check_launch(trainer.accelerator)
        trainer.train()
        trainer.save_model()
        if kind == "fsdp":
            resumed = trainer_of(variant, folder / name / "fsdp resumed", **settings(processes=2))
            resumed.train(resume_from_checkpoint=str(folder / name / kind / f"checkpoint-{STEPS // 2}"))
            resumed.save_model()


if __name__ == "__main__":
    run("ddp", Path(sys.argv[1]))
    shard_on_cpu()
    run("fsdp", Path(sys.argv[1]))
