"""The momentum twin: what it averages and when, that it is saved, frozen, resumed and never left behind unnoticed."""

import copy
import math

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_masked.modeling.parts.momentum import MomentumTwin, cosine_momentum
from hf_masked.training.callbacks import TrainingProgressCallback
from tests.conformance import test_models, test_training
from tests.conformance.cases import tiny_model, training_inputs
from tests.conformance.test_training import trainer_of
from tests.modeling.parts.tiny_twin import TINY_BATCH_NORM_TWIN, TINY_TWIN, TinyTwinForPreTraining


class Online(nn.Module):
    """Two modules that share a weight, and one that is not copied."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.encoder[0].weight
        self.predictor = nn.Linear(4, 4)


def moved(module: nn.Module) -> None:
    """Changes every parameter, as an optimizer's step does, and batch norm's statistics."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            tensor.add_(torch.randn_like(tensor))


def assert_same(twin: nn.Module, online: nn.Module) -> None:
    expected = online.state_dict()
    for name, value in twin.state_dict().items():
        assert torch.equal(value, expected[name]), name


def inputs_of(model, seed: int = 0) -> dict:
    return training_inputs(TINY_TWIN, model.config, batch=4, seed=seed)


def test_update_is_the_average_of_the_parameters():
    online = Online()
    twin = MomentumTwin(online, ("encoder", "head"), momentum=0.9)
    assert set(dict(twin.named_children())) == {"encoder", "head"}
    before = copy.deepcopy(twin)
    moved(online)
    twin.update(online, 0.0)
    for name in ("encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "head.bias"):
        expected = 0.9 * before.get_parameter(name) + 0.1 * online.get_parameter(name)
        torch.testing.assert_close(twin.get_parameter(name), expected)
    assert twin.head.weight is twin.encoder[0].weight, "what the modules share is shared, and averaged once"


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_limits_of_the_momentum(momentum):
    online = Online()
    twin = MomentumTwin(online, ("encoder", "head"), momentum=momentum)
    before = copy.deepcopy(twin)
    moved(online)
    twin.update(online, 0.0)
    for (name, value), old in zip(twin.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(value, old if momentum else online.get_parameter(name)), name


def test_twin_is_a_copy_that_never_trains():
    online = Online()
    twin = MomentumTwin(online, ("encoder",), momentum=0.9)
    storages = {tensor.data_ptr() for tensor in online.state_dict().values()}
    assert not storages & {tensor.data_ptr() for tensor in twin.state_dict().values()}
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert online.encoder[0].weight.requires_grad


@pytest.mark.parametrize("eval_mode", [False, True])
def test_batch_norm_follows_the_mode(eval_mode):
    online = Online()
    twin = MomentumTwin(online, ("encoder",), momentum=0.9, eval_mode=eval_mode)
    online.eval()
    twin.train()
    assert twin.encoder[1].training is not eval_mode
    own = twin.encoder[1].running_mean.clone()
    moved(online)
    twin.update(online, 0.0)
    expected = online.encoder[1].running_mean if eval_mode else own
    assert torch.equal(twin.encoder[1].running_mean, expected)


def test_cosine_rises_from_the_base_to_one():
    momentum = cosine_momentum(0.996)
    assert momentum(0.0) == pytest.approx(0.996, abs=1e-12) and momentum(1.0) == 1.0
    assert momentum(0.5) == pytest.approx(0.998)
    values = [momentum(step / 10) for step in range(11)]
    assert values == sorted(values)
    # BYOL's formula, with k steps done of K.
    assert momentum(0.25) == pytest.approx(1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, cosine_momentum(2.0)])
def test_momentum_outside_its_range_is_refused(momentum):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        MomentumTwin(Online(), ("encoder",), momentum=momentum)


def test_new_models_begin_with_an_exact_twin():
    model = tiny_model(TINY_TWIN)
    assert_same(model.twin, model)
    assert not any(parameter.requires_grad for parameter in model.twin.parameters())


def test_twin_is_saved_and_stays_frozen(tmp_path):
    model = tiny_model(TINY_TWIN)
    moved(model)
    model.save_pretrained(tmp_path)
    loaded = TinyTwinForPreTraining.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert not any(parameter.requires_grad for parameter in loaded.twin.parameters())
    assert not torch.equal(loaded.twin.projector[0].weight, loaded.projector[0].weight)


def test_checkpoint_without_a_twin_gives_an_exact_one(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(TINY_TWIN)
    moved(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("twin.")}
    save_file(tensors, file, metadata={"format": "pt"})
    loaded, report = TinyTwinForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] and all(name.startswith("twin.") for name in report["missing_keys"])
    assert torch.equal(loaded.projector[0].weight, model.projector[0].weight)
    assert_same(loaded.twin, loaded)


def test_pretrained_encoder_is_copied_too(tmp_path):
    backbone = tiny_model(TINY_TWIN, seed=1).backbone
    model = TinyTwinForPreTraining.from_backbone(backbone)
    assert_same(model.twin.backbone, backbone)


@pytest.mark.parametrize(
    "check",
    [
        test_models.test_weights_buffers_and_freezing_survive_a_round_trip,
        test_models.test_every_trainable_parameter_gets_a_gradient,
        test_models.test_gradient_checkpointing_changes_nothing,
        test_training.test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit,
        test_training.test_gradient_accumulation_equals_one_large_batch,
    ],
)
def test_conformance_holds_with_a_twin(check, tmp_path):
    arguments = {"tmp_path": tmp_path} if "tmp_path" in check.__code__.co_varnames else {}
    check(TINY_TWIN, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_autocast(dtype):
    test_models.test_half_precision_autocast(TINY_TWIN, dtype)
    model = tiny_model(TINY_TWIN).train()
    with torch.autocast("cpu", dtype=dtype):
        first = model(**inputs_of(model)).loss
        moved(model)
        model.twin.reset(model)
        # Autocast keeps no casts of frozen weights, which the update changes under it.
        second = model(**inputs_of(model)).loss
    assert first != second


def test_compiles_and_sees_each_update():
    test_models.test_compiles_to_one_graph_without_recompiling(TINY_TWIN)
    model = tiny_model(TINY_TWIN).train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**inputs_of(model))
    moved(model)
    model.update_twins()
    torch.testing.assert_close(compiled(**inputs_of(model)).loss, model(**inputs_of(model)).loss)


def test_batch_norm_statistics_are_resumed_too(tmp_path):
    test_training.test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(TINY_BATCH_NORM_TWIN, tmp_path)


class Recorder(TrainingProgressCallback):
    """Computes the twin by hand from the weights after each step of the optimizer."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self.expected = copy.deepcopy(dict(model.twin.named_parameters()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        momentum = cosine_momentum(0.9)((state.global_step - 1) / state.max_steps)
        for name, value in self.expected.items():
            value.lerp_(model.get_parameter(name).detach(), 1 - momentum)
            torch.testing.assert_close(model.twin.get_parameter(name), value, msg=f"{name}, {state.global_step}")
        super().on_step_end(args, state, control, model=model, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_updates_once_after_each_step_of_the_optimizer(accumulation, tmp_path):
    trainer = trainer_of(TINY_TWIN, tmp_path, max_steps=3, gradient_accumulation_steps=accumulation)
    trainer.remove_callback(TrainingProgressCallback)
    trainer.add_callback(recorder := Recorder())
    trainer.train()
    assert recorder.expected.keys() == dict(trainer.model.twin.named_parameters()).keys()


def test_skipped_steps_do_not_move_the_twin():
    """With fp16 Accelerate skips steps whose gradients overflow, and tells callbacks nothing of it."""
    model = tiny_model(TINY_TWIN)
    moved(model)
    scaler = torch.amp.GradScaler("cpu")
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.projector.parameters(), lr=0.1), scaler=scaler)
    before = copy.deepcopy(model.twin.state_dict())
    for gradient, skipped in ((float("inf"), True), (1.0, False)):
        scaler.scale(torch.zeros(()))
        for parameter in model.projector.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        assert optimizer.step_was_skipped is skipped
        TrainingProgressCallback().on_optimizer_step(None, None, None, model=model, optimizer=optimizer)
        moves = any(not torch.equal(value, before[name]) for name, value in model.twin.state_dict().items())
        assert moves is not skipped


def plain_trainer(tmp_path, callbacks=(), **settings) -> Trainer:
    model = tiny_model(TINY_TWIN)
    samples = [{name: value[i] for name, value in inputs_of(model).items()} for i in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=4, per_device_train_batch_size=2, report_to="none",
        disable_tqdm=True, save_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(model=model, args=args, train_dataset=samples, callbacks=list(callbacks))


@pytest.mark.parametrize("settings", [{}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_plain_trainer_is_told_once_that_the_twin_stands_still(settings, tmp_path, caplog):
    trainer = plain_trainer(tmp_path, **settings)
    trainer.train()
    assert caplog.text.count("twin stands still") == 1
    assert not torch.equal(trainer.model.twin.projector[0].weight, trainer.model.projector[0].weight)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}])
def test_nobody_is_told_when_it_moves(settings, tmp_path, caplog):
    trainer = plain_trainer(tmp_path, [TrainingProgressCallback()], **settings)
    trainer.train()
    trainer_of(TINY_TWIN, tmp_path / "ours", max_steps=4, **settings).train()
    assert "stands still" not in caplog.text
