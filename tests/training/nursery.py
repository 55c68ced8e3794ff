"""Runs of the training program that come to harm, each in a fork of one process that has imported everything.

Started as a program by the fixture `nursery` of `test_faults.py`: it reads requests, one line of JSON each, and
answers likewise. Request: `arguments` of the program; `harms`, {name in HARMS: its arguments}; `signal` to send
`after` so many seconds. Answer: `status` (negative: the signal that ended it), `output`, `seconds`.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

import datasets  # noqa: F401 (imported before forking)
import kornia  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import safetensors.torch
import torch
import transformers.modeling_utils

import hf_masked  # noqa: F401
from hf_masked.data import load_images
from hf_masked.training.cli import main
from hf_masked.training.trainer import PreTrainer

TIMEOUT = 240


def killed_at(event: int, folder: str, count_file: str | None = None) -> None:
    """SIGKILL at the n-th thing that is done to files in `folder`: opening one for writing, renaming, deleting, making
    a folder; weights and tensors are torn in the middle. `count_file` gets the number of such things."""
    seen = 0

    def is_the_end() -> bool:
        nonlocal seen
        seen += 1
        if count_file:
            with open(count_file, "w") as file:
                file.write(str(seen))
        return seen == event

    def watch(name, arguments):
        if name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            happens = True
        else:
            happens = name == "open" and bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        # `dir_fd` names of `shutil.rmtree` are relative.
        here = happens and (str(arguments[0]).startswith(folder) or "/" not in str(arguments[0]))
        if here and arguments[0] != count_file and is_the_end():
            os.kill(os.getpid(), signal.SIGKILL)

    def torn(save):
        def write(value, path, *args, **kwargs):
            result = save(value, path, *args, **kwargs)
            if str(path).startswith(folder) and is_the_end():
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return write

    torch.save = torn(torch.save)
    transformers.modeling_utils.safe_save_file = torn(safetensors.torch.save_file)
    sys.addaudithook(watch)


def small_files(limit: int) -> None:
    """No file may grow beyond so many bytes: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def signal_in_step(step: int, number: int = signal.SIGTERM, again: bool = False) -> None:
    """The process sends a signal to its group of processes in the middle of a step, or two of them."""
    inner = PreTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            for _ in range(1 + again):
                os.killpg(0, number)
        return inner(self, *args, **kwargs)

    PreTrainer.training_step = training_step


def bad_samples(index: int) -> None:
    """Whatever batch holds the sample becomes NaN."""
    inner = PreTrainer._prepare_inputs

    def _prepare_inputs(self, inputs):
        found = bool((inputs["indices"] == index).any())
        inputs = inner(self, inputs)
        if found:
            inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], torch.nan)
        return inputs

    PreTrainer._prepare_inputs = _prepare_inputs


HARMS = {harm.__name__: harm for harm in (killed_at, small_files, signal_in_step, bad_samples)}


def run_child(arguments: list[str], harms: dict[str, dict], log: str) -> None:
    os.setpgrp()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    status = 0
    try:
        for name, settings in harms.items():
            HARMS[name](**settings)
        main(arguments)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def answer(request: dict, log: str) -> dict:
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        run_child(request["arguments"], request.get("harms", {}), log)
    sent = "signal" not in request
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        seconds = time.monotonic() - started
        if not sent and seconds > request["after"]:
            os.kill(pid, request["signal"])
            sent = True
        if seconds > TIMEOUT:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.002)
    return {
        "status": os.waitstatus_to_exitcode(done[1]),
        "output": Path(log).read_text(),
        "seconds": time.monotonic() - started,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    load_images("digits")  # into the cache of its module
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), sys.argv[1])), flush=True)
