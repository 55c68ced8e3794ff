"""Every model trains as transformers' tools promise: Trainer, resume, two processes, export."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.export import export_encoder
from hf_masked.training.trainer import PreTrainer
from tests.conformance.cases import (
    MODELS,
    examples_of,
    gradients,
    plain_samples,
    processor_of,
    skip_if_declined,
    tiny_model,
    training_data,
    training_inputs,
)

ROOT = Path(__file__).parents[2]


def trainer_of(variant, output: Path, **settings) -> PreTrainer:
    model = tiny_model(variant)
    processor = processor_of(variant, model.config)
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    args = PreTrainingArguments(output_dir=str(output), **(defaults | settings))
    data = training_data(variant, processor, 32)
    return PreTrainer(model=model, args=args, processing_class=processor, train_dataset=data)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(variant, tmp_path):
    whole = trainer_of(variant, tmp_path / "whole")
    whole.train()
    expected = weights(whole)
    # A fresh model and process state, as after a crash, from the checkpoint in the middle of the first epoch.
    torch.manual_seed(123)
    resumed = trainer_of(variant, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_log_names_the_parts_of_the_loss_and_the_speed(variant, tmp_path):
    trainer = trainer_of(variant, tmp_path)
    trainer.train()
    line = trainer.state.log_history[0]
    parts = tiny_model(variant)(**training_inputs(variant, trainer.model.config)).losses
    assert {f"loss_{name}" for name in parts} <= line.keys()
    assert {f"{trainer.throughput.unit}/s", "data_wait_%", "matmul_rate_%"} <= line.keys()
    assert trainer.model.training_progress == 1.0


def test_gradient_accumulation_equals_one_large_batch(variant, tmp_path):
    skip_if_declined(variant, "accumulation")
    small = trainer_of(variant, tmp_path / "small", gradient_accumulation_steps=2)
    large = trainer_of(variant, tmp_path / "large")
    large.args.per_device_train_batch_size = 8
    large._train_batch_size = 8
    for trainer in (small, large):
        trainer.args.max_steps = 2
        trainer.train()
    for (name, a), b in zip(weights(small).items(), weights(large).values(), strict=True):
        # Adam divides by the gradient's size, so a tiny gradient's rounding may turn a whole step.
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4, msg=name)


def test_plain_trainer_works(variant, tmp_path):
    model = tiny_model(variant)
    samples, collator = plain_samples(variant, model.config, 8)
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    data = {"train_dataset": samples, "eval_dataset": samples, "data_collator": collator}
    trainer = Trainer(model=model, args=args, **data)
    # A loss that never was one would be 0; cosines may be negative.
    for loss in (trainer.train().training_loss, trainer.evaluate()["eval_loss"]):
        assert math.isfinite(loss) and loss != 0


DISTRIBUTED = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from hf_masked.training.launch import disconnect
from tests.conformance.cases import MODELS, gradients, tiny_model, training_inputs

def gradients_of(variant, rank):
    model = DistributedDataParallel(tiny_model(variant).train())
    inputs = training_inputs(variant, model.module.config, batch=8)
    mine = {name: value[4 * rank : 4 * rank + 4] for name, value in inputs.items()}
    model(**mine).loss.backward()
    return gradients(model.module)

dist.init_process_group("gloo")
rank = dist.get_rank()
variants = [variant for variant in MODELS if "ddp" not in variant.pretraining.declined_checks]
found = {variant.name: gradients_of(variant, rank) for variant in variants}
if rank == 0:
    torch.save(found, sys.argv[1])
disconnect()
"""


@pytest.fixture(scope="module")
def two_process_gradients(tmp_path_factory):
    """Gradients of all variants from one pair of processes."""
    folder = tmp_path_factory.mktemp("ddp")
    script = folder / "ddp.py"
    script.write_text(DISTRIBUTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    subprocess.run(
        [*command, str(folder / "gradients.pt")],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return torch.load(folder / "gradients.pt")


@pytest.mark.xdist_group("two processes")
def test_two_processes_equal_one(variant, two_process_gradients):
    skip_if_declined(variant, "ddp")
    model = tiny_model(variant).train()
    model(**training_inputs(variant, model.config, batch=8)).loss.backward()
    found = two_process_gradients[variant.name]
    assert found.keys() == gradients(model).keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


PLAIN = """
import json, sys, torch
sys.modules["hf_masked"] = None  # as where it is not installed
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForVideoClassification, Trainer, TrainingArguments

found = {}
for name, folder in json.load(open(sys.argv[1])).items():
    encoder = AutoModel.from_pretrained(folder)
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        found[name] = encoder.eval()(**inputs).last_hidden_state
    if set(inputs) != {"pixel_values"}:
        continue
    processor = AutoImageProcessor.from_pretrained(folder)
    clips = inputs["pixel_values"].ndim == 5
    head = AutoModelForVideoClassification if clips else AutoModelForImageClassification
    classifier = head.from_pretrained(folder, num_labels=3)
    samples = [{"pixel_values": picture, "labels": i} for i, picture in enumerate(inputs["pixel_values"])]
    args = TrainingArguments(output_dir=folder + "/out", use_cpu=True, max_steps=1, report_to="none",
                             save_strategy="no", disable_tqdm=True)
    Trainer(model=classifier, args=args, train_dataset=samples).train()
torch.save(found, sys.argv[2])
"""


def encoder_inputs(variant, processor) -> dict[str, torch.Tensor]:
    """Inputs of the plain encoder."""
    torch.manual_seed(0)
    return examples_of(variant).encoder_inputs(processor)


@pytest.fixture(scope="module")
def plain_features(tmp_path_factory):
    """Features of all variants' exported encoders, from one interpreter that cannot import hf_masked."""
    folder = tmp_path_factory.mktemp("plain")
    folders = {}
    for variant in MODELS:
        if "export" in variant.pretraining.declined_checks:
            continue
        model = tiny_model(variant)
        processor = processor_of(variant, model.config)
        export_encoder(model, processor, folder / variant.name)
        torch.save(encoder_inputs(variant, processor), folder / variant.name / "inputs.pt")
        folders[variant.name] = str(folder / variant.name)
    (folder / "folders.json").write_text(json.dumps(folders))
    (folder / "plain.py").write_text(PLAIN)
    arguments = [str(folder / name) for name in ("plain.py", "folders.json", "features.pt")]
    subprocess.run([sys.executable, *arguments], check=True, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return torch.load(folder / "features.pt")


@pytest.mark.xdist_group("plain interpreter")
def test_exported_encoder_works_without_hf_masked(variant, plain_features):
    skip_if_declined(variant, "export")
    model = tiny_model(variant).eval()
    processor = processor_of(variant, model.config)
    with torch.no_grad():
        expected = model.backbone(**encoder_inputs(variant, processor)).last_hidden_state
    torch.testing.assert_close(plain_features[variant.name], expected, rtol=1e-5, atol=1e-5)
