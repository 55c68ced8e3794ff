"""Does the run that was launched match the one that was asked for?

`accelerate launch` is silent when it is not: on CPU it starts one process where several were asked for, or several
that do not know of each other, or plain data parallelism for FSDP.
"""

import ctypes
import gc
import os
import signal
import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

# From linux/prctl.h.
PR_SET_PDEATHSIG = 1


class LaunchError(RuntimeError):
    """The launch and what came of it disagree; the message names the remedy in one line."""


def check_launch(accelerator: Accelerator) -> None:
    """Compares what was asked for with what Accelerate made of it.

    Raises:
        LaunchError: if processes are missing, are not connected, or do not shard although FSDP was asked for.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > accelerator.num_processes:
        raise LaunchError(
            f"{world_size} processes were started, this one sees {accelerator.num_processes}: they are not connected "
            "and would each train alone. Without GPUs launch with `--config_file accelerate_configs/cpu_2.yaml`."
        )
    asked = _processes_asked_of_accelerate()
    if asked > accelerator.num_processes:
        raise LaunchError(
            f"`accelerate launch` was asked for {asked} processes and started {accelerator.num_processes}: on CPU it "
            "needs a config with distributed_type MULTI_GPU and use_cpu: "
            "`accelerate launch --config_file accelerate_configs/cpu_2.yaml train.py ...`, or use torchrun."
        )
    fsdp_asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    if fsdp_asked and accelerator.distributed_type != DistributedType.FSDP:
        raise LaunchError(
            f"FSDP was asked for, but Accelerate made {accelerator.distributed_type.value} of it: it shards on "
            "accelerators only. Use `--config_file accelerate_configs/cpu_2.yaml` on CPU."
        )


def disconnect() -> None:
    """Leaves the other processes in order, as the last act of a program that trained with them.

    gloo's threads that still run while Python goes down can abort the process ("terminate called without an active
    exception"), and the launcher then ends the others, whatever they are still writing. The threads belong to the
    groups, and models and trainers, which stand in circles, hold those.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def use_all_cores() -> None:
    """Undoes the one thread that a plain `accelerate launch` gives each process on a machine without accelerators.

    Nothing happens where the number of threads was asked for, by flag or environment.
    """
    launcher = _accelerate_launcher()
    if launcher is None or torch.accelerator.is_available():
        return
    environment, arguments = launcher
    if "OMP_NUM_THREADS" not in environment and _parsed(arguments).num_cpu_threads_per_process is None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def follow_launcher() -> None:
    """Lets SIGTERM come to this process when `accelerate launch` ends before it, on Linux.

    It starts a single process and passes no signal on: ended alone, it would leave the training behind.
    """
    if sys.platform == "linux" and _accelerate_launcher() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _processes_asked_of_accelerate() -> int:
    """`num_processes` of the `accelerate launch` command that started this process; 1 if none did."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    launcher = _accelerate_launcher()
    if launcher is None:
        return 1
    parsed = _parsed(launcher[1])
    if parsed.num_processes is not None:
        return parsed.num_processes
    if parsed.config_file is not None or os.path.isfile(default_config_file):
        return load_config_from_file(parsed.config_file).num_processes or 1
    return 1


def _parsed(arguments: list[str]):
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser().parse_known_args(arguments)[0]


def _accelerate_launcher() -> tuple[dict[str, str], list[str]] | None:
    """The environment of the nearest ancestor that is `accelerate launch`, and the words that follow there."""
    import psutil

    for ancestor in psutil.Process().parents():
        try:
            words = ancestor.cmdline()
            for place, word in enumerate(words[:-1]):
                if os.path.basename(word) == "accelerate" and words[place + 1] == "launch":
                    return ancestor.environ(), words[place + 2 :]
                if word == "accelerate.commands.launch" or word.endswith("accelerate/commands/launch.py"):
                    return ancestor.environ(), words[place + 1 :]
        except psutil.Error:
            continue
    return None
