"""Killed, stopped, out of disk, not finite: the program's runs go on as if nothing had been. See `nursery.py`."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForPreTraining, TrainerState, ViTModel

import hf_masked  # noqa: F401 (registers the methods)
from hf_masked.training.saving import UNFINISHED, checkpoints_in

ROOT = Path(__file__).parents[2]

VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 8}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
DECODER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# Method and settings of a run with each kind of encoder. Swin has drop path, and ResNet the statistics of batch norm.
RUNS = {
    "vit": ("mae", {"backbone_config": VIT | {"patch_size": 2, "intermediate_size": 32}}
            | {f"decoder_{name}": value for name, value in DECODER.items()}),
    "swin": ("simmim", {"backbone_config": SWIN | {"patch_size": 1}}),
    "resnet": ("simsiam", {"backbone_config": RESNET | {"layer_type": "basic", "image_size": 8}}
               | {"projection_dim": 8, "predictor_hidden_dim": 4}),
}  # fmt: skip

STEPS, EVERY = 12, 3
FLAGS = [
    *("--dataset_name", "digits", "--processor.size", "8", "--max_steps", str(STEPS), "--learning_rate", "1e-2"),
    *("--save_strategy", "steps", "--save_steps", str(EVERY), "--save_total_limit", "2", "--logging_steps", "5"),
    *("--per_device_train_batch_size", "16", "--probe_every_epochs", "0", "--picture_every_epochs", "0"),
    *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
]

# What a whole checkpoint consists of.
CHECKPOINT = {
    "config.json", "model.safetensors", "preprocessor_config.json", "training_args.bin", "optimizer.pt",
    "scheduler.pt", "rng_state.pth", "counts_0.json", "trainer_state.json",
}  # fmt: skip


def arguments(run: str, output: Path, *flags: str) -> list[str]:
    method, config = RUNS[run]
    settings = [word for name, value in config.items() for word in (f"--model.{name}", json.dumps(value))]
    return ["--method", method, *settings, *FLAGS, *flags, "--output_dir", str(output)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`program(arguments, **request)`: a run of `train.py` in a fork of the nursery, see there."""
    folder = tmp_path_factory.mktemp("nursery")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.training.nursery", str(folder / "log")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    def ask(words: list[str], **request) -> dict:
        process.stdin.write(json.dumps(request | {"arguments": words}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait()


@pytest.fixture(scope="module")
def uninterrupted(program, tmp_path_factory):
    """`uninterrupted(run)`: folder of a run that nothing happened to, and its seconds."""
    made: dict[str, tuple[Path, float]] = {}

    def make(run: str) -> tuple[Path, float]:
        if run not in made:
            output = tmp_path_factory.mktemp(run) / "run"
            answer = program(arguments(run, output))
            assert answer["status"] == 0, answer["output"]
            made[run] = output, answer["seconds"]
        return made[run]

    return make


def assert_nothing_torn(output: Path, reference: Path) -> None:
    """All that stands under its name is whole, whatever just happened."""
    for checkpoint in checkpoints_in(output):
        assert {path.name for path in checkpoint.iterdir()} == CHECKPOINT
        load_file(checkpoint / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        assert checkpoint.name == f"checkpoint-{state.global_step}"
    for folder in (".", "encoder"):
        weights = output / folder / "model.safetensors"
        if weights.exists():
            assert weights.read_bytes() == (reference / folder / "model.safetensors").read_bytes()
            assert (output / folder / "config.json").read_text() == (reference / folder / "config.json").read_text()
            assert (output / folder / "preprocessor_config.json").exists()
    if (output / "run.json").exists():
        assert json.loads((output / "run.json").read_text())["steps"] == STEPS
        assert (output / "README.md").exists()


def assert_equal_runs(output: Path, reference: Path) -> None:
    """Weights and optimizer are the same to the bit, the same files are there, and nothing else is."""
    assert_nothing_torn(output, reference)
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (output, reference)]
    kept = [{path for path in found if not path.parts[0].startswith("checkpoint-")} for found in files]
    assert kept[0] == kept[1]
    last = f"checkpoint-{STEPS}"
    assert checkpoints_in(output)[-1].name == last
    states = [torch.load(folder / last / "optimizer.pt")["state"] for folder in (output, reference)]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][number][name])
    measured = [json.loads((folder / "run.json").read_text())["measured"] for folder in (output, reference)]
    # Their values are means since the last line of the log, or since the resume.
    parts = [name for name in measured[1] if name.startswith("loss_")]
    assert parts and all(math.isfinite(measured[0][name]) for name in parts)


KILLS = [3, pytest.param(20, marks=pytest.mark.slow)]


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("run", RUNS)
def test_kills_at_random_moments_change_nothing(run, kills, program, uninterrupted, tmp_path):
    reference, seconds = uninterrupted(run)
    output, moments = tmp_path / "run", random.Random(kills)
    while kills:
        answer = program(arguments(run, output), signal=signal.SIGKILL, after=moments.uniform(0.1, seconds))
        if answer["status"] == 0:  # it was through before
            assert_equal_runs(output, reference)
            shutil.rmtree(output)
            continue
        assert answer["status"] == -signal.SIGKILL, answer["output"]
        kills -= 1
        assert_nothing_torn(output, reference)
    answer = program(arguments(run, output))
    assert answer["status"] == 0, answer["output"]
    assert_equal_runs(output, reference)


def events_of(program, run: str, output: Path) -> int:
    """How many things such a run does to its files."""
    count = output.parent / "count"
    harm = {"event": 0, "folder": str(output), "count_file": str(count)}
    assert program(arguments(run, output), harms={"killed_at": harm})["status"] == 0
    shutil.rmtree(output)
    return int(count.read_text())


@pytest.mark.parametrize("share", [0.04, pytest.param(0.3, marks=pytest.mark.slow)])
def test_kills_at_each_touch_of_a_file_change_nothing(share, program, uninterrupted, tmp_path):
    """In the middle of the weights, between two files, before and after a renaming, while deleting, exporting."""
    reference, _ = uninterrupted("vit")
    output = tmp_path / "run"
    events = range(1, events_of(program, "vit", output) + 1)
    for event in random.Random(0).sample(events, round(share * len(events))):
        harm = {"event": event, "folder": str(output)}
        answer = program(arguments("vit", output), harms={"killed_at": harm})
        assert answer["status"] == -signal.SIGKILL, answer["output"]
        assert_nothing_torn(output, reference)
        answer = program(arguments("vit", output))
        assert answer["status"] == 0, answer["output"]
        assert_equal_runs(output, reference)
        shutil.rmtree(output)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_complete_run_is_left_alone_and_says_so(program, uninterrupted):
    output, _ = uninterrupted("vit")
    before = contents(output)
    answer = program(arguments("vit", output))
    assert answer["status"] == 0 and f"{output} is complete, with {STEPS} steps" in answer["output"]
    assert contents(output) == before


def test_a_lost_export_is_made_again_without_training(program, uninterrupted, tmp_path):
    reference, _ = uninterrupted("vit")
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    for name in ("run.json", "model.safetensors", "encoder/config.json"):
        (output / name).unlink()
    assert program(arguments("vit", output))["status"] == 0
    assert_equal_runs(output, reference)
    measured = [json.loads((folder / "run.json").read_text())["measured"] for folder in (output, reference)]
    assert measured[0]["loss"] == measured[1]["loss"] and measured[0].get("train_loss") != 0.0


def test_a_complete_run_goes_on_when_more_steps_are_asked_for(program, uninterrupted, tmp_path):
    reference, _ = uninterrupted("vit")
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    answer = program(arguments("vit", output, "--max_steps", "14"))
    assert f"Resuming from {output}/checkpoint-12" in answer["output"]
    assert json.loads((output / "run.json").read_text())["steps"] == 14
    ours = AutoModelForPreTraining.from_pretrained(output)
    plain = ViTModel.from_pretrained(output / "encoder", add_pooling_layer=False)
    assert torch.equal(ours.backbone.layernorm.weight, plain.layernorm.weight)
    before = ViTModel.from_pretrained(reference / "encoder", add_pooling_layer=False)
    assert not torch.equal(before.layernorm.weight, plain.layernorm.weight)


def test_a_run_that_starts_anew_is_not_taken_for_the_earlier_one(program, uninterrupted, tmp_path):
    reference, _ = uninterrupted("vit")
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    anew = [*arguments("vit", output), "--resume_from_checkpoint", "no"]
    answer = program(anew, harms={"signal_in_step": {"step": 4}})
    assert answer["status"] == 128 + signal.SIGTERM, answer["output"]
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-3", "checkpoint-4"]
    assert [path.name for path in checkpoints_in(output / "earlier-1")] == ["checkpoint-9", "checkpoint-12"]
    answer = program(arguments("vit", output))
    assert f"Resuming from {output}/checkpoint-4" in answer["output"]
    shutil.rmtree(output / "earlier-1")
    assert_equal_runs(output, reference)


@pytest.mark.parametrize(
    ("run", "number", "flags"),
    [
        ("vit", signal.SIGTERM, ()),
        ("swin", signal.SIGINT, ()),
        ("resnet", signal.SIGTERM, ("--save_strategy", "epoch")),
        # The signal goes to the workers as well.
        ("vit", signal.SIGTERM, ("--resident_data", "false", "--dataloader_num_workers", "2")),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(run, number, flags, program, uninterrupted, tmp_path):
    reference, _ = uninterrupted(run)
    output = tmp_path / "run"
    answer = program(arguments(run, output, *flags), harms={"signal_in_step": {"step": 5, "number": number}})
    assert answer["status"] == 128 + number, answer["output"]
    assert f"{number.name}: stopped after step 5 and saved checkpoint-5; the same command goes on" in answer["output"]
    assert "Traceback" not in answer["output"]
    assert_nothing_torn(output, reference)
    if "--resident_data" not in flags:  # decoded pictures are not cropped to the same bit as resident ones
        assert program(arguments(run, output))["status"] == 0
        assert_equal_runs(output, reference)


def test_a_second_interrupt_ends_at_once(program, tmp_path):
    harm = {"step": 5, "number": signal.SIGINT, "again": True}
    answer = program(arguments("vit", tmp_path / "run"), harms={"signal_in_step": harm})
    assert answer["status"] not in (0, 128 + signal.SIGINT) and "KeyboardInterrupt" in answer["output"]
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-3"]


def the_line(answer: dict) -> str:
    """The one line with which the program ends."""
    lines = [line for line in answer["output"].splitlines() if line.startswith("train.py: ")]
    assert answer["status"] == 1 and len(lines) == 1 and "Traceback" not in answer["output"], answer["output"]
    return lines[0]


@pytest.mark.parametrize("limit", [5_000, 60_000])  # less than the weights; less than the optimizer's state
def test_files_that_cannot_grow_stop_the_run_and_harm_nothing(limit, program, uninterrupted, tmp_path):
    reference, _ = uninterrupted("vit")
    output = tmp_path / "run"
    assert program(arguments("vit", output), harms={"signal_in_step": {"step": 4}})["status"] == 143
    last = output / "checkpoint-4"
    assert (last / "optimizer.pt").stat().st_size > 60_000 > (last / "model.safetensors").stat().st_size > 5_000
    line = the_line(program(arguments("vit", output), harms={"small_files": {"limit": limit}}))
    assert "checkpoint-6 could not be written" in line and "MiB are free" in line and "checkpoint-4" in line
    assert not (output / UNFINISHED).exists()
    assert [path.name for path in checkpoints_in(output)] == ["checkpoint-3", "checkpoint-4"]
    assert program(arguments("vit", output))["status"] == 0
    assert_equal_runs(output, reference)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(program, uninterrupted, tmp_path):
    reference, _ = uninterrupted("vit")
    size = sum(path.stat().st_size for path in (reference / f"checkpoint-{STEPS}").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(2.7 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs rights; the test above has the same by other means")
    try:
        flags = ("--save_total_limit", "3")
        line = the_line(program(arguments("vit", disk / "run", *flags)))
        assert "checkpoint-9 could not be written" in line and "checkpoint-6" in line
        assert_nothing_torn(disk / "run", reference)
        assert [path.name for path in checkpoints_in(disk / "run")] == ["checkpoint-3", "checkpoint-6"]
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert program(arguments("vit", disk / "run", *flags))["status"] == 0
        assert_equal_runs(disk / "run", reference)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_samples(program, tmp_path):
    output = tmp_path / "run"
    flags = ["--nonfinite_check_steps", "4", "--logging_steps", "80", "--save_steps", "100"]
    harm = {"bad_samples": {"index": 3}}
    first = program(arguments("vit", output, *flags, "--max_steps", "200"), harms=harm)
    line = the_line(first)
    report = json.loads((output / "nonfinite.json").read_text())
    (bad,) = report["bad_steps"]
    assert f"step {bad}" in line and "nonfinite.json" in line and "--nonfinite skip" in line
    steps = [batch["step"] for batch in report["batches"]]
    assert bad in steps and steps == list(range(steps[0], steps[0] + 4)) and steps[-1] % 4 == 0
    for batch in report["batches"]:
        assert (3 in batch["indices"]) == (batch["step"] == bad) == (batch["loss"] == "nan")
        assert [int(name.split()[1]) for name in batch["names"]] == batch["indices"]
        assert len(batch["indices"]) == 16
    assert not checkpoints_in(output)
    # The same command goes on if it is told to.
    again = program(arguments("vit", output, *flags, "--max_steps", "120", "--nonfinite", "skip"), harms=harm)
    assert again["status"] == 0, again["output"]
    assert all(torch.isfinite(value).all() for value in load_file(output / "model.safetensors").values())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[0]["skipped_updates"] == 1 and 0 < history[0]["loss"] < 10


@pytest.mark.slow
def test_the_end_of_the_launcher_is_noticed(tmp_path):
    """`accelerate launch` of one process passes no signal on; its training must not run on alone."""
    output = tmp_path / "run"
    words = [*FLAGS, "--max_steps", "100000", "--save_strategy", "no", "--output_dir", str(output)]
    settings = [f"--model.{name}={json.dumps(value)}" for name, value in RUNS["vit"][1].items()]
    with open(tmp_path / "log", "w+") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "train.py", "--method", "mae",
             *settings, *words],
            cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        wait_for(lambda: "'loss'" in (tmp_path / "log").read_text())
        launcher.terminate()
        launcher.wait()
        wait_for(lambda: "SIGTERM: stopped after step" in (tmp_path / "log").read_text())
    assert len(checkpoints_in(output)) == 1


def wait_for(condition, seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "waited in vain"
        time.sleep(0.1)
