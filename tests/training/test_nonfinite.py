"""The guard against losses and gradients that are not finite, on a model small enough to see each step."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import SequentialSampler, default_collate
from transformers import TrainerCallback

from hf_masked.training import faults
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.faults import NonFiniteError
from hf_masked.training.optimization import LARS
from hf_masked.training.trainer import PreTrainer


class Model(nn.Module):
    """A layer and a batch norm; `poison` of a sample is added to the loss, `steepness` multiplies its gradients."""

    main_input_name = "x"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, poison, steepness, return_loss=True):
        hidden = self.norm(self.layer(x))
        hidden = hidden.detach() + steepness[:, None] * (hidden - hidden.detach())
        fit = (hidden - x).square().mean()
        return {"loss": fit + poison.sum(), "losses": {"fit": fit.detach()}}


def samples(count: int = 24, **changes) -> list[dict]:
    """Samples of which number `changes["at"]` has the other changed values."""
    generator = torch.Generator().manual_seed(0)
    made = [
        {"x": torch.randn(4, generator=generator), "poison": torch.tensor(0.0), "steepness": torch.tensor(1.0)}
        for _ in range(count)
    ]
    at = changes.pop("at", None)
    if at is not None:
        made[at] |= changes
    return made


class Recorder(TrainerCallback):
    """The model after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.states.append({name: value.clone() for name, value in model.state_dict().items()})


class InOrder(PreTrainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def trainer_of(data, folder: Path, optimizer=None, **settings) -> tuple[PreTrainer, Recorder]:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.05, "weight_decay": 0.1,
        "lr_scheduler_type": "constant", "logging_steps": 6, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "dataloader_num_workers": 0, "nonfinite": "skip",
    } | settings  # fmt: skip
    model, recorder = Model(), Recorder()
    trainer = InOrder(
        model=model,
        args=PreTrainingArguments(str(folder), **settings),
        train_dataset=data,
        optimizers=(optimizer(model.parameters()) if optimizer else None, None),
        callbacks=[recorder],
    )
    trainer.throughput.flops_per_sample = 1.0  # nothing to be measured
    return trainer, recorder


NAN, INF = torch.tensor(torch.nan), torch.tensor(torch.inf)
# All in the batch of step 3: a bad loss of finite gradients, a finite loss of bad ones, and a picture that is bad.
FAULTS = {
    "loss nan": {"poison": NAN},
    "loss inf": {"poison": INF},
    "gradient": {"steepness": torch.tensor(3e38)},
    "sample": {"x": torch.full((4,), torch.nan)},
}
OPTIMIZERS = {
    "adamw_torch_fused": None,
    "adamw_torch": None,
    "sgd": None,
    "adafactor": None,
    "lars": lambda parameters: LARS(parameters, lr=0.05, weight_decay=0.1),
    "sgd fused": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, fused=True),
}


@pytest.fixture
def like_an_accelerator(monkeypatch):
    """The guard takes the tensors for a device's."""
    monkeypatch.setattr(faults, "_reading_is_free", lambda value: False)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("like_an_accelerator")
def test_a_bad_step_leaves_no_trace(optimizer, fault, tmp_path):
    settings = {"optim": optimizer} if OPTIMIZERS[optimizer] is None else {}
    bad, seen = trainer_of(samples(at=9, **FAULTS[fault]), tmp_path, OPTIMIZERS[optimizer], **settings)
    bad.train()
    for name, value in seen.states[2].items():
        assert torch.equal(value, seen.states[1][name]), name
    assert not torch.equal(seen.states[3]["layer.weight"], seen.states[2]["layer.weight"])
    # It is as if the batch had not been there: neither moments nor counts of steps remember it.
    data, settings = samples(), settings | {"max_steps": 5}
    without, expected = trainer_of(data[:8] + data[12:], tmp_path, OPTIMIZERS[optimizer], **settings)
    without.train()
    for name, value in expected.states[-1].items():
        assert torch.equal(value, seen.states[-1][name]), name
    assert bad.state.log_history[0]["skipped_updates"] == bad.guard.skipped == 1


def test_without_a_fault_the_guard_changes_no_bit(tmp_path, monkeypatch):
    guarded, seen = trainer_of(samples(), tmp_path)
    guarded.train()
    plain, expected = trainer_of(samples(), tmp_path)
    monkeypatch.setattr(plain.guard, "watch", lambda loss: (loss, torch.tensor(True)))
    monkeypatch.setattr(plain.guard, "judge", lambda *_: None)
    plain.train()
    for name, value in expected.states[-1].items():
        assert torch.equal(value, seen.states[-1][name]), name
    assert guarded.guard.skipped == 0 and not (tmp_path / "nonfinite.json").exists()
    assert "skipped_updates" not in guarded.state.log_history[0]


def test_on_cpu_the_step_is_skipped_as_well(tmp_path):
    bad, seen = trainer_of(samples(at=9, poison=NAN), tmp_path)
    bad.train()
    assert not hasattr(bad.optimizer.optimizer, "found_inf")
    for name, value in seen.states[2].items():
        assert torch.equal(value, seen.states[1][name]), name


def test_one_bad_batch_of_several_spoils_the_update(tmp_path):
    bad, seen = trainer_of(
        samples(at=9, poison=NAN), tmp_path, gradient_accumulation_steps=2, max_steps=3, logging_steps=3
    )
    bad.train()
    for name, value in seen.states[1].items():
        assert torch.equal(value, seen.states[0][name]), name
    assert not torch.equal(seen.states[2]["layer.weight"], seen.states[1]["layer.weight"])


def test_the_log_is_the_mean_of_the_finite_losses(tmp_path):
    losses = []
    for data, name in ((samples(at=9, poison=NAN), "bad"), (samples(), "good")):
        trainer, _ = trainer_of(data, tmp_path / name, logging_steps=1, learning_rate=0.0)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    bad, good = losses
    assert bad[2] != bad[2] and bad[:2] + bad[3:] == good[:2] + good[3:]
    trainer, _ = trainer_of(samples(at=9, poison=NAN), tmp_path, learning_rate=0.0)
    trainer.train()
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(sum(good[:2] + good[3:]) / 5, rel=1e-4)
    assert line["loss_fit"] == pytest.approx(line["loss"], rel=1e-3)


def test_the_run_stops_before_it_saves_and_within_the_steps_it_was_given(tmp_path):
    for every, save, stopped_at in ((4, 100, 4), (5, 100, 5), (100, 3, 3), (100, 100, 6)):
        folder = tmp_path / f"{every}-{save}"
        trainer, _ = trainer_of(
            samples(at=9, poison=NAN), folder, nonfinite="stop", nonfinite_check_steps=every, logging_steps=100,
            save_strategy="steps", save_steps=save,
        )  # fmt: skip
        with pytest.raises(NonFiniteError, match=r"step 3; .*nonfinite.json .*--nonfinite skip"):
            trainer.train()
        assert trainer.state.global_step == stopped_at and not list(folder.glob("checkpoint-*"))
        report = json.loads((folder / "nonfinite.json").read_text())
        assert report["bad_steps"] == [3] and report["batches"][2]["loss"] == "nan"


def test_the_count_survives_a_resume(tmp_path):
    first, _ = trainer_of(samples(at=9, poison=NAN), tmp_path, save_strategy="steps", save_steps=4)
    first.train()
    again, _ = trainer_of(samples(at=9, poison=NAN), tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.guard.skipped == 1


class NoReading(TorchDispatchMode):
    """Lets nothing of the device be read by the host."""

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return function(*arguments, **(settings or {}))


@pytest.mark.usefixtures("like_an_accelerator")
def test_the_host_does_not_wait_for_the_device(tmp_path):
    trainer, _ = trainer_of(samples(at=9, poison=NAN), tmp_path)
    trainer.train()  # makes the optimizer
    guard, batch = trainer.guard, default_collate(samples(4))
    loss = trainer.model(**batch)["loss"]
    trainer.optimizer.zero_grad()
    with NoReading():
        guard.on_step_begin(trainer.args, trainer.state, trainer.control)
        loss, _ = guard.watch(loss)
        loss.backward()
        guard.judge(trainer.model, torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0))
        trainer.optimizer.step()
    with pytest.raises(AssertionError, match="waits"), NoReading():
        loss.item()


@pytest.mark.parametrize("setting", [{"nonfinite": "ignore"}, {"nonfinite_check_steps": 0}])
def test_settings_are_checked(setting, tmp_path):
    with pytest.raises(ValueError, match=next(iter(setting))):
        PreTrainingArguments(str(tmp_path), **setting)
