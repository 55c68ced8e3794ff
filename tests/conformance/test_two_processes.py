"""Two processes train what one trains, with the same batch: replicated (DDP), and sharded (FSDP2) and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTModel

from hf_masked.training.cli import main as program
from tests.conformance.cases import skip_if_declined, training_inputs
from tests.conformance.test_training import trainer_of
from tests.conformance.two_processes import STEPS, VARIANTS, program_flags, settings
from tests.modeling.parts.tiny_twin import TINY_TWIN

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.xdist_group("two processes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one pair of processes left of all variants, see `two_processes.py`."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    subprocess.run(
        [*command, "-m", "tests.conformance.two_processes", str(folder)],
        check=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return folder


@pytest.fixture(scope="module", params=VARIANTS)
def single(request, tmp_path_factory):
    """(variant, its model after the same run in one process)."""
    variant = VARIANTS[request.param]
    trainer = trainer_of(variant, tmp_path_factory.mktemp("single"), **settings(processes=1))
    trainer.train()
    return variant, trainer.model


def assert_equal(folder: Path, expected, tolerance: float = 2e-5) -> None:
    """A checkpoint's weights, loaded as any is, are those of the model."""
    model, report = type(expected).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    expected = expected.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_replicated_run_equals_one_process(single, folder):
    variant, model = single
    skip_if_declined(variant, "ddp")
    assert_equal(folder / variant.name / "ddp", model)


def test_sharded_run_equals_one_process_also_when_it_is_resumed(single, folder):
    variant, model = single
    skip_if_declined(variant, "fsdp")
    if "ddp" in variant.pretraining.declined_checks:
        # Two processes do not train what one does; the replicated two are the measure.
        model = type(model).from_pretrained(folder / variant.name / "ddp")
    assert_equal(folder / variant.name / "fsdp" / f"checkpoint-{STEPS}", model)
    assert_equal(folder / variant.name / "resumed", model)
    with pytest.raises(AssertionError):
        assert_equal(folder / variant.name / "fsdp" / f"checkpoint-{STEPS // 2}", model)


def test_loss_of_a_model_sharded_in_half_precision_is_not_rounded(folder, tmp_path):
    trainer = trainer_of(TINY_TWIN, tmp_path, **settings(processes=1))
    trainer.train()
    trainer.model.eval()
    loss = torch.load(folder / "bf16.pt")
    assert loss.dtype == torch.float32 and loss != loss.bfloat16()
    expected = trainer.model(**training_inputs(TINY_TWIN, trainer.model.config)).loss
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


def test_program_leaves_the_same_of_a_sharded_run(folder, tmp_path):
    trainer = program([*program_flags(processes=1), "--output_dir", str(tmp_path)])
    found = folder / "program"
    assert_equal(found, trainer.model)
    encoder = ViTModel.from_pretrained(found / "encoder", add_pooling_layer=False)
    for name, value in trainer.model.backbone.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], value, rtol=0, atol=2e-5, msg=name)
    assert (found / "pictures" / "step-000006.png").is_file()
    measured, expected = (json.loads((path / "run.json").read_text())["measured"] for path in (found, tmp_path))
    for figure in ("loss", "loss_reconstruction", "knn_accuracy", "feature_spread"):
        assert measured[figure] == pytest.approx(expected[figure], rel=0.02), figure
