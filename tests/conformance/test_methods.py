"""What every method does that helps a supervised learner, with stock classifiers and the ordinary Trainer."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, Trainer, TrainerCallback, TrainingArguments

from hf_masked.modeling.registry import CATALOGUE
from hf_masked.training.regularized import RegularizedMixin, RegularizedTrainer
from tests.modeling.masked_supervision.classifiers import batch, classifier, samples

ROOT = Path(__file__).parents[2]
METHODS = [variant for variant in CATALOGUE.values() if variant.kind == "method"]
KINDS = ("vit", "swin", "resnet")


@pytest.fixture(params=METHODS, ids=[variant.name for variant in METHODS])
def method(request):
    return request.param


def trainer_of(method, folder, kind: str = "vit", **settings) -> RegularizedTrainer:
    defaults = {
        "use_cpu": True, "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "report_to": "none",
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    regularizer = None if method is None else method.method(method.tiny_config())
    args = TrainingArguments(output_dir=str(folder), **(defaults | settings))
    return RegularizedTrainer(classifier(kind), args, train_dataset=samples(16), regularizer=regularizer)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(found: dict, expected: dict, same: bool = True) -> None:
    assert all(torch.equal(value, expected[name]) for name, value in found.items()) == same


def test_facts_stand_on_the_config(method):
    config = method.config
    assert config.paper_title and 1990 < config.paper_year < 2030 and len(config.arxiv_id.split(".")) == 2
    assert config.arxiv_id in sys.modules[config.__module__].__doc__
    assert config.masks and config.predicts and config.backbones and config.__doc__ and method.method.__doc__
    card = (ROOT / "model_cards" / f"{method.name}.md").read_text()
    assert config.paper_title in card and config.arxiv_id in card
    assert json.loads(json.dumps(method.tiny_config().to_dict()))["method"] == method.name


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_a_stock_classifier_otherwise_than_without_it(method, kind, tmp_path):
    plain, helped = trainer_of(None, tmp_path / "plain", kind), trainer_of(method, tmp_path / "helped", kind)
    for trainer in (plain, helped):
        assert math.isfinite(trainer.train().training_loss)
    assert type(helped.model) is type(plain.model) and weights(helped).keys() == weights(plain).keys()
    assert_same(weights(helped), weights(plain), same=False)
    assert {"loss", "loss_main"} <= helped.state.log_history[0].keys()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in helped.model.modules())


def test_a_run_follows_its_seed(method, tmp_path):
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        trainer = trainer_of(method, tmp_path / str(number), seed=seed, data_seed=0)
        torch.manual_seed(number)  # which nothing may read
        trainer.train()
        runs.append(weights(trainer))
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2], same=False)


def test_resumed_equals_uninterrupted(method, tmp_path):
    # A ViT, whose encoder the stock Trainer would lose.
    whole = trainer_of(method, tmp_path / "whole", save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer_of(method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights(resumed), weights(whole))


def test_evaluation_sees_nothing_of_it(method, tmp_path):
    plain, helped = trainer_of(None, tmp_path / "plain"), trainer_of(method, tmp_path / "helped")
    found = [trainer.evaluate(samples(8, seed=1))["eval_loss"] for trainer in (plain, helped)]
    assert found[0] == found[1]


def test_accumulated_batches_are_averaged(method, tmp_path):
    batches, found = [], {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    trainer = trainer_of(method, tmp_path, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0.0)
    trainer.add_callback(Gradients())
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *args: batches.append(dict(inputs)) or step(model, inputs, *args)
    trainer.train()
    one_by_one = trainer_of(method, tmp_path)
    one_by_one.current_gradient_accumulation_steps = 1
    for inputs in batches:
        one_by_one.training_step(one_by_one.model, inputs)
    assert len(batches) == 2
    for name, parameter in one_by_one.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad / 2, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"label_smoothing_factor": 0.1}]
)
def test_settings_of_the_trainer_hold(method, settings, tmp_path):
    expected, trainer = trainer_of(method, tmp_path / "plain"), trainer_of(method, tmp_path / "set", **settings)
    expected.train()
    trainer.train()
    exact = settings == {"gradient_checkpointing": True}
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, weights(expected)[name], rtol=0, atol=1e-5 if exact else 0.2)
    assert_same(weights(trainer), weights(expected), same=False) if not exact else None


PLAIN = """
import sys
sys.modules["hf_masked"] = None
from transformers import AutoModelForImageClassification
for folder in sys.argv[1:]:
    model, report = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
"""


def test_what_is_saved_is_a_stock_classifier(tmp_path):
    folders = []
    for method in METHODS:
        trainer = trainer_of(method, tmp_path / method.name)
        trainer.train()
        trainer.save_model()
        folders.append(str(tmp_path / method.name))
        loaded = AutoModelForImageClassification.from_pretrained(folders[-1])
        pictures = batch()["pixel_values"]
        assert torch.equal(loaded.eval()(pictures).logits, trainer.model.eval()(pictures).logits)
    subprocess.run([sys.executable, "-c", PLAIN, *folders], check=True, cwd=tmp_path)


def test_a_batch_without_labels_is_named(method, tmp_path):
    trainer = trainer_of(method, tmp_path)
    trainer.train_dataset = [{"pixel_values": sample["pixel_values"]} for sample in samples(8)]
    with pytest.raises(ValueError, match=f"{method.method.__name__} helps a supervised learner"):
        trainer.train()


def test_settings_that_would_switch_it_off_are_refused(method, tmp_path):
    with pytest.raises(ValueError, match=f"{method.method.__name__} hooks into the forward pass.*torch_compile"):
        trainer_of(method, tmp_path, torch_compile=True)


def test_it_is_a_mixin_of_any_trainer(method, tmp_path):
    class Doubled(RegularizedMixin, Trainer):
        def _prepare_inputs(self, inputs):
            self.prepared = super()._prepare_inputs(inputs)
            return self.prepared

    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    regularizer = method.method(method.tiny_config())
    trainer = Doubled(classifier("vit"), args, train_dataset=samples(8), regularizer=regularizer)
    trainer.train()
    assert "pixel_values" in trainer.prepared
