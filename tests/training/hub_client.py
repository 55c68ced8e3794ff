"""What `test_hub.py` does with the Hub, in one process whose Hub is the loopback server.

`python -m tests.training.hub_client FOLDER` writes what it saw to FOLDER/seen.json.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import shlex
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import get_session
from transformers import AutoImageProcessor, AutoModelForPreTraining, ViTMAEConfig, ViTMAEForPreTraining

from hf_masked.cli import main as hf_masked_main
from hf_masked.training.arguments import PreTrainingArguments
from hf_masked.training.cli import main
from hf_masked.training.trainer import PreTrainer
from tests.training.test_program import TINY

FOLDER = Path(sys.argv[1])
RUN = FOLDER / "run"
SHORT = [*TINY, "--max_steps", "2", "--logging_steps", "1", "--push_to_hub", "true"]


def control(**settings) -> None:
    get_session().post(f"{os.environ['HF_ENDPOINT']}/control", json=settings)


def requests() -> list[str]:
    return get_session().get(f"{os.environ['HF_ENDPOINT']}/requests").json()


def files_of(repo_id: str) -> list[str] | None:
    api = HfApi()
    return api.list_repo_files(repo_id) if api.repo_exists(repo_id) else None


def fingerprint(folder: Path) -> dict[str, str]:
    """What the files hold, but for the card, which names the repository."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def outcome(program, *arguments) -> dict:
    """Exit status and last line of errors."""
    errors = io.StringIO()
    status = 0
    with contextlib.redirect_stderr(errors):
        try:
            program(*arguments)
        except SystemExit as stop:
            status = stop.code or 0
    return {"status": status, "line": (errors.getvalue().strip().splitlines() or [""])[-1]}


def shell(command: str) -> None:
    """A command line that begins with `hf-masked`."""
    with patch.object(sys, "argv", shlex.split(command)):
        try:
            hf_masked_main()
        except SystemExit as stop:
            if stop.code:
                raise


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def whole_push() -> dict:
    watching = ["--probe_every_epochs", "1", "--picture_every_epochs", "1", "--probe_linear", "true"]
    trainer = main([*SHORT, *watching, "--hub_model_id", "me/run", "--output_dir", str(RUN)])
    loaded = AutoModelForPreTraining.from_pretrained("me/run")
    processor = AutoImageProcessor.from_pretrained("me/run")
    return {
        "same weights": same_weights(trainer.model, loaded),
        "same class": type(loaded) is type(trainer.model),
        "same processor": processor.to_dict() == trainer.processing_class.to_dict(),
    }


def pushes_that_fail() -> dict:
    """A push for each request of a good one, at which the Hub goes away, in each way; then the push again."""
    control()
    shell(f"hf-masked push {RUN} me/good")
    good = requests()
    before = fingerprint(RUN)
    attempts = []
    for failure in ("error", "drop", "lost"):
        for number in range(1, len(good) + 1):
            repo_id = f"me/{failure}-{number}"
            control(faulty=[number, 999], failure=failure)
            attempt = outcome(shell, f"hf-masked push {RUN} {repo_id}")
            control()
            attempt |= {"repo": repo_id, "there": files_of(repo_id), "kept": fingerprint(RUN) == before}
            attempt["again"] = outcome(shell, attempt["line"].split("`")[-2])["status"]
            attempts.append(attempt | {"in the end": files_of(repo_id)})
    return {"requests": good, "files": files_of("me/good"), "attempts": attempts}


def run_whose_push_fails() -> dict:
    output = FOLDER / "broken"
    control(faulty=[3, 999])  # after the checks at the start
    found = outcome(main, [*SHORT, "--hub_model_id", "me/broken", "--output_dir", str(output)])
    control()
    AutoModelForPreTraining.from_pretrained(output)
    shell(found["line"].split("`")[-2])
    return found | {"kept": sorted(fingerprint(output)), "in the end": files_of("me/broken")}


def pushes_while_training() -> dict:
    """Of each checkpoint; the first push fails, all its repetitions included."""
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("hf_masked").addHandler(handler)
    strategies = {"every_save": [3, 8], "checkpoint": [0, 0]}
    found = {}
    for strategy, faulty in strategies.items():
        control(faulty=faulty)
        saving = ["--save_strategy", "steps", "--save_steps", "1", "--hub_strategy", strategy]
        saving += ["--hub_always_push", "true", "--hub_token", "hf_writer", "--hub_model_id", f"me/{strategy}"]
        main([*SHORT, *saving, "--output_dir", str(FOLDER / strategy)])
        found[strategy] = files_of(f"me/{strategy}")
        found[f"commits of {strategy}"] = sum("/commit/" in request for request in requests())
    logging.getLogger("hf_masked").removeHandler(handler)
    arguments = torch.load(FOLDER / "checkpoint" / "training_args.bin", weights_only=False)
    return found | {"warnings": warnings, "token": arguments.hub_token}


def without_rights() -> dict:
    """No token, one that may not write, and one that may only read what is there."""
    found = {}
    for name, token, repo_id in (
        ("no token", "", "me/new"),
        ("other owner", "hf_writer", "you/new"),
        ("read only", "hf_reader", "me/run"),
    ):
        output = FOLDER / name
        with patch.dict(os.environ, HF_TOKEN=token):
            found[name] = outcome(main, [*SHORT, "--hub_model_id", repo_id, "--output_dir", str(output)])
            push = outcome(shell, f"hf-masked push {RUN} {repo_id}")
        found[name] |= {"trained": (output / "model.safetensors").exists(), "push": push}
    return found


def model_push() -> dict:
    model = AutoModelForPreTraining.from_pretrained(RUN)
    model.push_to_hub("me/model", tags=["from-python"])
    again = AutoModelForPreTraining.from_pretrained("me/model")
    again.push_to_hub("me/run")
    control(faulty=[2, 999])
    try:
        model.push_to_hub("me/other")
    except OSError as error:
        line = str(error)
    control()
    processors = [AutoImageProcessor.from_pretrained(name).to_dict() for name in (RUN, "me/model")]
    return {
        "same weights": same_weights(model, again),
        "same processor": processors[0] == processors[1],
        "files": files_of("me/model"),
        "line": line,
    }


def trainer_of_another_packages_model() -> dict:
    """A model that is not of the catalogue, pushed as the plain Trainer pushes it."""
    config = ViTMAEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
    )  # fmt: skip
    args = PreTrainingArguments(str(FOLDER / "stock"), report_to="none", hub_model_id="me/stock")
    PreTrainer(model=ViTMAEForPreTraining(config), args=args).push_to_hub(tags=["stock"])
    return {"files": files_of("me/stock")}


if __name__ == "__main__":
    # The client waits between its attempts; the tests do not.
    with patch("huggingface_hub.utils._http.time.sleep"):
        seen = {
            scene.__name__: scene()
            for scene in (
                whole_push,
                pushes_that_fail,
                run_whose_push_fails,
                pushes_while_training,
                without_rights,
                model_push,
                trainer_of_another_packages_model,
            )
        }
    (FOLDER / "seen.json").write_text(json.dumps(seen))
