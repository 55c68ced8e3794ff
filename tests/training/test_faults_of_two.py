"""Faults that strike one of two connected processes: both decide alike."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

# A bad sample in the second process's share, then a signal to the second process alone, then the same command again.
PROGRAM = """
import os, signal, sys
import torch, torch.distributed as dist
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.registry import get_variant
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.launch import disconnect
from hf_masked.training.trainer import PreTrainer
from tests.conformance.cases import processor_of, tiny_model
from tests.conformance.examples.image import pictures

variant = get_variant("mae")
inner = PreTrainer._prepare_inputs


def trainer_of(name, **settings):
    model = tiny_model(variant)
    processor = processor_of(variant, model.config)
    source = ArraySource("random pictures", pictures(processor, 64).numpy())
    args = PreTrainingArguments(
        output_dir=f"{sys.argv[1]}/{name}", use_cpu=True, per_device_train_batch_size=4, max_steps=8,
        learning_rate=1e-3, save_strategy="steps", save_steps=4, logging_steps=8, report_to="none",
        disable_tqdm=True, **settings,
    )
    data = ResidentImageDataset(source, processor)
    return PreTrainer(model=model, args=args, processing_class=processor, train_dataset=data)


def fault(step, strike):
    def _prepare_inputs(self, inputs):
        inputs = inner(self, inputs)
        if self.state.global_step + 1 == step and self.args.process_index == 1:
            strike(inputs)
        return inputs
    PreTrainer._prepare_inputs = _prepare_inputs


def status(trainer, **settings):
    try:
        trainer.train(**settings)
        return 0
    except SystemExit as stop:
        return stop.code


def same_on_both(trainer):
    for value in trainer.model.state_dict().values():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value.contiguous())
        assert torch.equal(*both)


fault(3, lambda inputs: inputs["pixel_values"].fill_(torch.nan))
trainer = trainer_of("nan", nonfinite="skip", nonfinite_check_steps=2)
assert status(trainer) == 0 and trainer.guard.skipped == 1
assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
same_on_both(trainer)

PreTrainer._prepare_inputs = inner
trainer = trainer_of("whole")
assert status(trainer) == 0

fault(5, lambda inputs: os.kill(os.getpid(), signal.SIGTERM))
stopped = trainer_of("stopped")
assert status(stopped) == 128 + signal.SIGTERM, "not stopped"
assert stopped.state.global_step == 6  # asked at the end of step 5, known at the end of step 6
PreTrainer._prepare_inputs = inner
again = trainer_of("stopped")
assert status(again, resume_from_checkpoint=f"{sys.argv[1]}/stopped/checkpoint-6") == 0
same_on_both(again)
dist.barrier()
del trainer, stopped, again  # which hold the group
disconnect()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    (folder / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run(
        [*command, str(folder / "program.py"), str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, run.stdout


def test_a_bad_sample_of_one_process_is_skipped_by_both(outputs):
    folder, _ = outputs
    reports = [json.loads((folder / "nan" / f"nonfinite_rank{rank}.json").read_text()) for rank in range(2)]
    losses = [[batch["loss"] for batch in report["batches"]] for report in reports]
    assert [report["bad_steps"] for report in reports] == [[3], [3]]
    assert [batch["step"] for batch in reports[0]["batches"]] == [3, 4]
    assert losses[1][0] == "nan" and "nan" not in losses[0] + losses[1][1:]


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(outputs):
    folder, printed = outputs
    assert printed.count("SIGTERM: stopped after step 6") == 1
    files = {path.name for path in (folder / "stopped" / "checkpoint-6").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "counts_0.json", "counts_1.json", "trainer_state.json"} <= files
    whole, stopped = (load_file(folder / name / "checkpoint-8" / "model.safetensors") for name in ("whole", "stopped"))
    for name, value in whole.items():
        torch.testing.assert_close(stopped[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert not list(folder.glob("*/unfinished"))
