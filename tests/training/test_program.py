"""`train.py` from end to end, on scikit-learn's digits: files, resume, processes, mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, ViTConfig, ViTModel

import hf_masked.cli
from hf_masked.training.cli import add_observers, main

ROOT = Path(__file__).parents[2]

TINY = [
    *("--config", str(ROOT / "recipes" / "mae_fashion_mnist.yaml"), "--dataset_name", "digits"),
    *("--model.backbone_config.image_size", "8", "--processor.size", "8", "--processor.crop_fraction", "1.0"),
    *("--model.backbone_config.hidden_size", "32", "--model.backbone_config.num_hidden_layers", "1"),
    *("--model.backbone_config.intermediate_size", "64", "--model.decoder_num_hidden_layers", "1"),
    *("--max_steps", "6", "--per_device_train_batch_size", "16", "--logging_steps", "2", "--save_strategy", "no"),
    *("--disable_tqdm", "true", "--probe_samples", "200", "--probe_every_epochs", "0", "--picture_every_epochs", "0"),
]


def refused(arguments: list[str], capsys) -> str:
    """The one line with which the program refuses."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


def test_a_run_leaves_everything_that_it_promises(tmp_path):
    trainer = main(
        [*TINY, "--output_dir", str(tmp_path), "--probe_every_epochs", "0.05", "--picture_every_epochs", "9"]
    )
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {
        "model.safetensors", "config.json", "preprocessor_config.json", "run.json", "trainer_state.json",
        "README.md", "encoder/model.safetensors", "encoder/config.json", "encoder/preprocessor_config.json",
        "pictures/step-000006.png", "pictures/loss.png",
    } <= names  # fmt: skip
    history = trainer.state.log_history
    assert sum("knn_accuracy" in line for line in history) >= 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["method"] == "mae" and run["steps"] == 6 and run["samples"] == len(trainer.train_dataset)
    plain = ViTModel.from_pretrained(tmp_path / "encoder", add_pooling_layer=False)
    ours = AutoModelForPreTraining.from_pretrained(tmp_path)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, ours.backbone.state_dict()[name]), name


def test_base_learning_rate_scales_with_the_effective_batch(tmp_path):
    flags = ["--gradient_accumulation_steps", "2", "--base_learning_rate", "1e-3", "--max_steps", "2"]
    trainer = main([*TINY, *flags, "--output_dir", str(tmp_path)])
    assert trainer.args.learning_rate == pytest.approx(1e-3 * 32 / 256)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.05, 0.0}


def test_the_same_command_goes_on_where_it_was_interrupted(tmp_path, capsys):
    saving = ["--save_strategy", "steps", "--save_steps", "4"]
    whole = main([*TINY, *saving, "--output_dir", str(tmp_path / "whole")])
    main([*TINY, *saving, "--max_steps", "6", "--output_dir", str(tmp_path / "again")])
    # What an interruption after step 4 leaves.
    for name in ("model.safetensors", "run.json"):
        (tmp_path / "again" / name).unlink()
    for path in (tmp_path / "again" / "checkpoint-6").iterdir():
        path.unlink()
    (tmp_path / "again" / "checkpoint-6").rmdir()
    capsys.readouterr()
    again = main([*TINY, *saving, "--output_dir", str(tmp_path / "again")])
    assert "Resuming from" in capsys.readouterr().out
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_workers_do_not_change_the_run(tmp_path):
    losses = []
    for workers in ("0", "2"):
        flags = [
            "--resident_data",
            "false",
            "--dataloader_num_workers",
            workers,
            "--output_dir",
            str(tmp_path / workers),
        ]
        losses.append([line.get("loss") for line in main([*TINY, *flags]).state.log_history])
    assert losses[0] == losses[1]


def test_resident_and_decoded_data_see_the_same_crops(tmp_path):
    losses = []
    for resident in ("true", "false"):
        trainer = main([*TINY, "--resident_data", resident, "--output_dir", str(tmp_path / resident)])
        losses.append(torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line]))
    # Pillow rounds between its two passes, the device's matrices do too, in the other order at times.
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)


def test_starts_from_a_transformers_encoder(tmp_path):
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    flags = ["--method", "mae", "--dataset_name", "digits", "--from_backbone", str(tmp_path / "vit")]
    flags += ["--max_steps", "1", "--learning_rate", "0", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    trainer = main([*flags, "--model.decoder_num_hidden_layers", "1", "--disable_tqdm", "true"])
    start = load_file(tmp_path / "vit" / "model.safetensors")
    end = load_file(tmp_path / "out" / "encoder" / "model.safetensors")
    assert trainer.train_dataset.processor.size == {"height": 8, "width": 8}
    for name, value in end.items():
        assert torch.equal(value, start[name]), name


@pytest.mark.parametrize("flags", [["--bf16", "true"], ["--gradient_checkpointing", "true"]])
def test_efficiency_flags_run(flags, tmp_path):
    trainer = main([*TINY, *flags, "--output_dir", str(tmp_path)])
    assert all(np.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


@pytest.mark.slow
def test_compiled_run_equals_the_eager_one(tmp_path):
    """The real compiler, forward and backward, in the Trainer."""
    eager = main([*TINY, "--output_dir", str(tmp_path / "eager")])
    compiled = main([*TINY, "--torch_compile", "true", "--output_dir", str(tmp_path / "compiled")])
    for a, b in zip(eager.state.log_history, compiled.state.log_history, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)


def test_folder_with_bad_pictures_trains_and_names_them(tmp_path, caplog):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i:02}.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "cut.jpg").write_bytes((folder / "00.jpg").read_bytes()[:300])
    (folder / "text.png").write_text("not a picture")
    Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8), "CMYK").save(folder / "cmyk.jpg")
    flags = ["--dataset_name", str(folder), "--max_steps", "8", "--output_dir", str(tmp_path / "out")]
    trainer = main([*TINY, *flags])
    faults = " ".join(trainer.bad_images.faults)
    assert all(name in faults for name in ("empty.jpg", "cut.jpg", "text.png")) and "cmyk" not in faults
    assert "empty.jpg" in caplog.text
    assert trainer.state.global_step == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "mea"], ["'mea'", "mae"]),
        (["--model.mask_ratio", "1.0"], ["1.0", "[0, 1)"]),
        (["--model.backbone_config.patch_size", "3"], ["8 x 8", "3 x 3"]),
        (["--processor.size", "10"], ["10 x 10", "4 x 4"]),
        (["--train_split", "training"], ["training", "train"]),
        (["--per_device_train_batch_size", "5000"], ["5000", "per_device_train_batch_size"]),
        (["--dataset_name", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--from_backbone", "/no/encoder"], ["/no/encoder"]),
    ],
)
def test_mistakes_end_with_one_line(flags, words, tmp_path, capsys):
    line = refused([*TINY, *flags, "--output_dir", str(tmp_path)], capsys)
    assert line.startswith("train.py: ") and all(word in line for word in words), line


def test_an_empty_folder_and_a_wrong_column_are_named(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    flags = [*TINY, "--dataset_name", str(photos), "--output_dir", str(tmp_path)]
    assert "photos" in refused(flags, capsys)
    Image.new("L", (20, 20)).save(photos / "gray.png")
    line = refused([*flags, "--image_column", "picture"], capsys)
    assert "'picture'" in line and "image" in line


PROBING = ["--probe_every_epochs", "0.05"]


def launch(arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, str(ROOT / "train.py"), *TINY, *PROBING]
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return subprocess.run(
        [*command, "--output_dir", str(folder)], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_through_accelerate_equal_one_with_twice_the_batch(tmp_path):
    config = str(ROOT / "accelerate_configs" / "cpu_2.yaml")
    run = launch(["--config_file", config], tmp_path / "two")
    assert run.returncode == 0, run.stderr[-3000:]
    one = main([*TINY, *PROBING, "--per_device_train_batch_size", "32", "--output_dir", str(tmp_path / "one")])
    two = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    for a, b in zip(one.state.log_history, two, strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["loss_reconstruction"] == pytest.approx(b["loss_reconstruction"], rel=1e-3)
    # The probe is shared out over the processes; a neighbour or two may change places.
    accuracies = [
        [line["knn_accuracy"] for line in log if "knn_accuracy" in line] for log in (one.state.log_history, two)
    ]
    assert accuracies[0] and accuracies[0] == pytest.approx(accuracies[1], abs=0.02)


def test_a_launch_that_starts_one_process_for_two_is_stopped(tmp_path):
    run = launch(["--cpu", "--num_processes", "2"], tmp_path)
    assert run.returncode != 0
    line = next(line for line in run.stderr.splitlines() if line.startswith("train.py: "))
    assert "asked for 2 processes and started 1" in line and "cpu_2.yaml" in line


def test_a_cache_made_by_one_command_is_trained_on_streamed_or_not(tmp_path, monkeypatch):
    photos = tmp_path / "photos"
    photos.mkdir()
    for value in range(40):
        Image.linear_gradient("L").rotate(value * 9).resize((30, 20)).save(photos / f"{value:02}.png")
    arguments = ["hf-masked", "cache", str(photos), str(tmp_path / "cache"), "--size", "16", "--num-channels", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        hf_masked.cli.main()
    assert not stop.value.code
    for streaming in ("false", "true"):
        flags = ["--dataset_name", str(tmp_path / "cache"), "--streaming", streaming]
        trainer = main([*TINY, *flags, "--output_dir", str(tmp_path / streaming)])
        assert trainer.state.global_step == 6
        assert trainer.train_dataset.processor.num_channels == 1


def test_a_test_split_without_labels_is_named_before_training():
    names = {"train": SimpleNamespace(name="seen"), "test": SimpleNamespace(name="unseen")}
    modality = SimpleNamespace(
        open=lambda data, split, config, processor: names[split],
        observers=lambda *arguments: [],
        labelled=lambda source, *arguments, **chosen: ([], []) if source.name == "seen" else None,
    )
    args = SimpleNamespace(picture_every_epochs=0, probe_every_epochs=1, probe_samples=10, seed=0)
    trainer = SimpleNamespace(args=args, processing_class=None, model=SimpleNamespace(config=None))
    with pytest.raises(ValueError, match="unseen has no labels: set label_column"):
        add_observers(trainer, modality, names["train"], SimpleNamespace(test_split="test"))
