"""What was asked for against what came of it."""

import subprocess
import sys
from pathlib import Path
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


# A wrapped model in a circle of references, as a trainer holds it; prints how many of gloo's threads are alive.
CONNECTED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from hf_masked.training.launch import disconnect

def gloo_threads():
    return sum("gloo" in (task / "comm").read_text() for task in Path("/proc/self/task").iterdir())

def train():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    model.owner = model

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
train()
before = gloo_threads()
disconnect()
print(before, gloo_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_disconnecting_ends_the_threads_between_processes(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", CONNECTED, str(tmp_path / "store")], capture_output=True, text=True, check=True
    )
    before, after = map(int, run.stdout.split())
    assert before > 0 and after == 0
