"""What was asked for against what came of it."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from hf_masked.training import launch
from hf_masked.training.launch import LaunchError, check_launch


def accelerator(processes: int, kind: DistributedType = DistributedType.NO):
    return SimpleNamespace(num_processes=processes, distributed_type=kind)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "_accelerate_launcher", lambda: None)


def test_what_fits_passes():
    check_launch(accelerator(1))
    check_launch(accelerator(2, DistributedType.MULTI_GPU))


def test_unconnected_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="2 processes were started, this one sees 1"):
        check_launch(accelerator(1))


@pytest.mark.parametrize("arguments", [["--num_processes", "4", "--cpu"], ["--num-processes=4"]])
def test_missing_processes_are_refused(monkeypatch, arguments):
    monkeypatch.setattr(launch, "_accelerate_launcher", lambda: ({}, [*arguments, "train.py", "--seed", "1"]))
    with pytest.raises(LaunchError, match="asked for 4 processes and started 1"):
        check_launch(accelerator(1))
    check_launch(accelerator(4, DistributedType.MULTI_CPU))


def test_processes_of_a_config_file_count(monkeypatch, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\n")
    monkeypatch.setattr(launch, "_accelerate_launcher", lambda: ({}, ["--config_file", str(config), "train.py"]))
    with pytest.raises(LaunchError, match="asked for 3"):
        check_launch(accelerator(1))


def test_fsdp_that_became_ddp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(LaunchError, match="FSDP was asked for"):
        check_launch(accelerator(2, DistributedType.MULTI_CPU))
    check_launch(accelerator(2, DistributedType.FSDP))


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, ["train.py"], 6),
        ({"OMP_NUM_THREADS": "1"}, ["train.py"], 1),
        ({}, ["--num_cpu_threads_per_process", "1", "train.py"], 1),
    ],
)
def test_a_plain_launch_on_cpu_gets_all_cores(monkeypatch, environment, arguments, expected):
    threads = [1]
    monkeypatch.setattr(launch, "_accelerate_launcher", lambda: (environment, arguments))
    monkeypatch.setattr(launch.torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 12)
    monkeypatch.setattr(launch.torch, "set_num_threads", lambda count: threads.append(count))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch.use_all_cores()
    assert threads[-1] == expected
