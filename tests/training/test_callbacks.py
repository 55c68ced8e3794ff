"""Intervals, the collapse alarm, pictures."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import TrainerControl, TrainerState

from hf_masked import MAEForPreTraining, MaskedImageProcessor
from hf_masked.modeling.masked_image.mae import tiny_config
from hf_masked.training.callbacks import EpochIntervalCallback, OnlineProbeCallback, PictureCallback
from hf_masked.training.modalities.image import MODALITY
from hf_masked.training.throughput import ThroughputMeter
from hf_masked.training.visualization import embedding_plot, loss_curve, picture_grid


class Recorder(EpochIntervalCallback):
    def __init__(self, every_epochs):
        super().__init__(every_epochs)
        self.steps = []

    def act(self, state, model):
        self.steps.append(state.global_step)


@pytest.mark.parametrize(
    ("every", "start", "expected"),
    [(1.0, 0, [10, 20, 25]), (0.5, 0, [5, 10, 15, 20, 25]), (2.0, 0, [20, 25]), (0.0, 0, []), (1.0, 12, [20, 25])],
)
def test_interval_callbacks_act_on_time_and_not_again_after_a_resume(every, start, expected):
    callback = Recorder(every)
    state = TrainerState(max_steps=25, global_step=start, epoch=start / 10)
    control = TrainerControl(should_log=True)
    callback.on_train_begin(None, state, control)
    for step in range(start + 1, 26):
        state.global_step, state.epoch = step, step / 10
        callback.on_step_end(None, state, control)
    assert callback.steps == expected


def test_what_a_callback_logs_does_not_take_the_place_of_the_steps_own_line():
    callback, control = EpochIntervalCallback(1.0), TrainerControl(should_log=True)
    callback.act = lambda state, model: setattr(control, "should_log", False)  # as `Trainer.log` does
    callback.on_step_end(None, TrainerState(max_steps=9, global_step=1, epoch=1.0), control)
    assert control.should_log


def trainer_stub(tmp_path):
    config = tiny_config()
    logged = {}
    return config, SimpleNamespace(
        accelerator=Accelerator(cpu=True),
        processing_class=MaskedImageProcessor(**config.processor_settings()),
        log=logged.update,
        logged=logged,
        throughput=ThroughputMeter(torch.device("cpu"), torch.float32),
        args=SimpleNamespace(output_dir=str(tmp_path), device=torch.device("cpu")),
        is_world_process_zero=lambda: True,
        callback_handler=SimpleNamespace(callbacks=[]),
    )


def labelled(count: int, seed: int):
    """Two classes that differ in brightness."""
    labels = torch.arange(count) % 2
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(100, (count, 3, 32, 32), generator=generator) + 120 * labels[:, None, None, None]
    return images.to(torch.uint8), labels


def test_online_probe_logs_and_leaves_the_model_as_it_was(tmp_path):
    config, trainer = trainer_stub(tmp_path)
    model = MAEForPreTraining(config).train()
    callback = OnlineProbeCallback(trainer, MODALITY, labelled(40, 0), labelled(20, 1), linear=True)
    callback.act(TrainerState(), model)
    assert trainer.logged["knn_accuracy"] == 1.0 and trainer.logged["linear_accuracy"] > 0.8
    assert {"effective_rank", "feature_spread"} <= trainer.logged.keys()
    assert model.training


def test_collapse_is_called_out(tmp_path, caplog):
    config, trainer = trainer_stub(tmp_path)
    model = MAEForPreTraining(config)
    with torch.no_grad():
        model.backbone.layernorm.weight.zero_()
        model.backbone.layernorm.bias.fill_(1.0)
    OnlineProbeCallback(trainer, MODALITY, labelled(40, 0), labelled(20, 1)).act(TrainerState(), model)
    assert "collapsed" in caplog.text and trainer.logged["feature_spread"] < 0.01


def test_pictures_go_to_disk_and_to_the_tracker(tmp_path):
    config, trainer = trainer_stub(tmp_path)
    written = []
    writer = SimpleNamespace(add_image=lambda name, array, step, dataformats: written.append((array.ndim, step)))
    trainer.callback_handler.callbacks.append(SimpleNamespace(tb_writer=writer))
    PictureCallback(trainer, MODALITY, labelled(3, 0)[0]).act(TrainerState(global_step=7), MAEForPreTraining(config))
    picture = Image.open(tmp_path / "pictures" / "step-000007.png")
    assert picture.width > 200 and written == [(3, 7)]


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_grid_draws_any_channels_and_rectangles(channels):
    grid = picture_grid({"a": torch.rand(2, channels, 64, 32), "b": torch.rand(2, channels, 64, 32)})
    assert grid.mode == "RGB" and grid.height > grid.width


def test_plots_are_written(tmp_path):
    history = [{"epoch": 1, "loss": 0.9}, {"epoch": 1, "knn_accuracy": 0.5}, {"epoch": 2, "loss": 0.8}]
    assert loss_curve(history, tmp_path / "loss.png").stat().st_size > 1000
    path = embedding_plot(torch.randn(60, 8), torch.arange(60) % 3, tmp_path / "embedding.png", ["x", "y", "z"])
    assert path.stat().st_size > 1000
