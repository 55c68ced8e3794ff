"""What PreTrainer reads from a model: decay, constant rates, batch norm over processes, figures for the log."""

import logging

import pytest
import torch
from torch import nn

from hf_masked import MultiViewImageProcessor, SimSiamForPreTraining
from hf_masked.data import ResidentImageDataset
from hf_masked.data.sources import ArraySource
from hf_masked.modeling.siamese.simsiam import tiny_config
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.callbacks import OnlineProbeCallback, PictureCallback
from hf_masked.training.modalities.image import MODALITY
from hf_masked.training.optimization import LARS
from hf_masked.training.trainer import PreTrainer


def simsiam_trainer(output, steps: int = 4, lars: bool = False, **config) -> PreTrainer:
    torch.manual_seed(0)
    settings = tiny_config()
    for name, value in config.items():
        setattr(settings, name, value)
    model = SimSiamForPreTraining(settings)
    processor = MultiViewImageProcessor(**settings.processor_settings())
    pictures = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    args = PreTrainingArguments(
        output_dir=str(output),
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=0.1,
        weight_decay=1e-2,
        optim="sgd",
        optim_args="momentum=0.9",
        lars=lars,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    dataset = ResidentImageDataset(ArraySource("noise", pictures.numpy()), processor)
    return PreTrainer(model=model, args=args, processing_class=processor, train_dataset=dataset)


@pytest.mark.parametrize("fix_predictor_lr", [True, False])
def test_sgd_with_momentum_decay_on_all_and_constant_rates(tmp_path, fix_predictor_lr):
    trainer = simsiam_trainer(tmp_path, fix_predictor_lr=fix_predictor_lr)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    groups = optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.9}
    assert {group["weight_decay"] for group in groups} == {1e-2}
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.0, 0.1] if fix_predictor_lr else [0.0])
    if fix_predictor_lr:
        predictor = {id(p) for p in trainer.model.predictor.parameters()}
        assert {id(p) for group in groups if group["lr"] > 0.05 for p in group["params"]} == predictor


def test_lars_in_place_of_sgd(tmp_path):
    trainer = simsiam_trainer(tmp_path, lars=True)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, LARS)
    assert {(group["momentum"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.9, 1e-2)}
    with pytest.raises(ValueError, match="set optim=sgd"):
        PreTrainingArguments(output_dir=str(tmp_path), use_cpu=True, lars=True, optim="adamw_torch")


def test_log_has_the_collapse_monitor(tmp_path):
    trainer = simsiam_trainer(tmp_path)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 4
    for line in lines:
        assert 0 < line["z_std"] < 2 / 32**0.5
        assert line["loss"] == pytest.approx((line["loss_from_first"] + line["loss_from_second"]) / 2, abs=1e-4)


def test_probe_and_pictures_of_a_convolutional_siamese_model(tmp_path):
    trainer = simsiam_trainer(tmp_path)
    images = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(40) % 2
    trainer.add_callback(OnlineProbeCallback(trainer, MODALITY, (images, labels), (images, labels), linear=True))
    trainer.add_callback(PictureCallback(trainer, MODALITY, images[:2]))
    trainer.train()
    figures = {key: value for line in trainer.state.log_history for key, value in line.items()}
    assert 1 <= figures["effective_rank"] <= 16 and figures["feature_spread"] > 0
    assert 0.5 <= figures["knn_accuracy"] <= 1
    assert (tmp_path / "pictures" / "step-000004.png").exists()


def test_a_collapsed_encoder_sets_off_the_alarm(tmp_path, caplog):
    trainer = simsiam_trainer(tmp_path)
    with torch.no_grad():  # a constant map, whatever the picture
        last = trainer.model.backbone.encoder.stages[-1].layers[-1]
        for norm in (last.layer[-1].normalization, last.shortcut.normalization):
            norm.weight.zero_()
            norm.bias.fill_(1.0)
    images, labels = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8), torch.arange(40) % 2
    with caplog.at_level(logging.WARNING):
        OnlineProbeCallback(trainer, MODALITY, (images, labels), (images, labels)).act(trainer.state, trainer.model)
    assert "collapsed" in caplog.text


def test_batch_norm_is_synchronised_where_torch_can(tmp_path, caplog, monkeypatch):
    trainer = simsiam_trainer(tmp_path)
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in trainer.model.modules())
    with caplog.at_level(logging.WARNING):
        trainer._synchronise_batch_norm()
    assert "torch has on GPUs only" in caplog.text
    before = trainer.model.state_dict()
    monkeypatch.setattr(PreTrainingArguments, "device", torch.device("cuda"))
    trainer._synchronise_batch_norm()
    kinds = {type(module) for module in trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm}
    after = trainer.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
