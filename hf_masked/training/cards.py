"""Model cards: the method's page from `model_cards/`, and what was really run and measured with this checkpoint.

What stands between two markers in a checkpoint's README.md is ours and is written anew whenever something new is known
(an evaluation, the repository's name); the rest can be edited.
"""

import json
import logging
import os
import re
from dataclasses import fields
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard
from transformers import AutoConfig, TrainingArguments
from transformers.utils import cached_file

import hf_masked
from hf_masked.evaluation.report import PACKAGES, hardware
from hf_masked.modeling.base import VariantConfig
from hf_masked.modeling.registry import PREFIX, Variant, variant_of
from hf_masked.training.recipes import DataArguments, MethodArguments
from hf_masked.training.saving import write_whole

logger = logging.getLogger(__name__)

TEMPLATES = Path(hf_masked.__file__).parent / "model_cards"
BEGIN = "<!-- this checkpoint: {method} {name} -->"
END = "<!-- end of this checkpoint -->"
OURS = re.compile(
    r"<!-- this checkpoint: (?P<method>\w+) (?P<name>.*?) -->.*?<!-- end of this checkpoint -->", re.DOTALL
)

HUB_ID = re.compile(r"[\w-]+/[\w.-]+")

# Settings of the machine, of saving and of looking on, which leave the weights as they are.
HOUSEKEEPING = re.compile(
    "output_dir|use_cpu|debug|accelerator_config|disable_tqdm|run_name|do_|ddp_|fsdp|deepspeed|resident_data|"
    "(hub|push|save|load|logging|log|report|dataloader|probe|picture|resume|eval|project|trackio|data_cache)_.*"
)


def used_settings(method: MethodArguments, data: DataArguments, args: TrainingArguments) -> dict:
    """A recipe with which `train.py` repeats the run: what differs from the defaults, without housekeeping."""
    recipe = {"method": method.method}
    if method.from_backbone:
        recipe["from_backbone"] = method.from_backbone
    return recipe | {
        "model": method.model,
        "processor": method.processor,
        "data": _changed(data),
        "optimization": _changed(args) | {"seed": args.seed},
    }


def describe_run(trainer, facts: dict) -> dict:
    """What was really run and measured.

    Args:
        trainer: after training.
        facts: what the trainer cannot know: "dataset" (its name), "dataset_id" (its name on the Hub), "test_split",
            "recipe", "from_backbone".
    """
    last = {}
    for line in trainer.state.log_history:
        last |= line
    dataset = trainer.train_dataset
    return {
        "method": variant_of(trainer.model).name,
        "samples": len(dataset) if hasattr(dataset, "__len__") else None,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "batch_size": trainer.effective_batch_size,
        "learning_rate": trainer.args.learning_rate,
        "measured": last,
        "probe_samples": trainer.args.probe_samples,
        "hardware": hardware(),
        "processes": trainer.args.world_size,
        "versions": {name.replace("-", "_"): version(name) for name in PACKAGES},
        **facts,
    }


def hub_id(name: str) -> str | None:
    """The name, if it is "owner/name" on the Hub and not a file, folder, URL or built-in data set."""
    return name if HUB_ID.fullmatch(name) and not os.path.exists(name) else None


def licence_id(licence: str | None) -> str | None:
    """The Hub's word for a licence: "CC BY-NC 4.0" is "cc-by-nc-4.0"."""
    return licence and licence.lower().replace(" ", "-")


def licence_of(checkpoint: str | None) -> str | None:
    """The licence in the card of a folder or Hub id; None where there is no card or it says nothing."""
    try:
        card = cached_file(checkpoint, "README.md") if checkpoint else None
    except OSError:
        return None
    return ModelCard.load(card).data.get("license") if card else None


def method_card(variant: Variant) -> ModelCard:
    """The method's page; for methods of other packages, which bring none, the paper's facts."""
    path = TEMPLATES / f"{variant.name}.md"
    if path.exists():
        return ModelCard.load(path)
    config = variant.config
    return ModelCard(
        f"---\nlibrary_name: hf_masked\ntags: [self-supervised-learning, {variant.name}]\n---\n\n# {variant.name}\n\n"
        f"{config.paper_title} ({config.paper_year}), arXiv {config.arxiv_id}. Predicts {config.predicts}.\n"
    )


def write_card(
    folder: str | Path, repo_id: str | None = None, licence: str | None = None, run: dict | None = None
) -> Path:
    """Writes or refreshes README.md of a checkpoint, from `config.json`, `run.json`, `evaluation.json` and pictures.

    A README.md without our markers is somebody's own and stays as it is.

    Args:
        folder: a checkpoint of a method of the catalogue.
        repo_id: where it is published; by default the text speaks of the folder.
        licence: of the weights, where it is not the method card's.
        run: what `describe_run` says, where `run.json` is not there yet.

    Returns:
        The README's path.
    """
    folder = Path(folder)
    path = folder / "README.md"
    written = OURS.search(path.read_text()) if path.exists() else None
    if path.exists() and not written:
        logger.warning("%s was not written by hf_masked and stays as it is.", path)
        return path
    config = AutoConfig.from_pretrained(folder)
    variant = variant_of(config)
    name = repo_id or (written["name"] if written else str(folder))
    run = _read(folder / "run.json") if run is None else run
    evaluation = _read(folder / "evaluation.json")
    section = _section(folder, name, variant, config, run, evaluation)
    if written and written["method"] == variant.name:
        card = ModelCard.load(path)
        card.text = OURS.sub(lambda _: section, card.text)
    else:
        card = method_card(variant)
        title, _, rest = card.text.lstrip().partition("\n")
        card.text = f"\n{title}\n\n{section}\n\n## The method\n\n{rest.lstrip()}"
        _fill_origin(card, run, licence)
    results = _probe_results(run) + _evaluation_results(evaluation)
    card.data.model_name, card.data.eval_results = (Path(name).name, results) if results else (None, None)
    write_whole(path, str(card))
    return path


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def _changed(arguments) -> dict:
    """Plain settings of a dataclass of arguments that are not at their defaults."""
    derived = {"learning_rate"} if getattr(arguments, "base_learning_rate", None) else set()
    changed = {}
    for setting in fields(arguments):
        value = getattr(arguments, setting.name)
        value = value.value if isinstance(value, Enum) else value
        default = setting.default.value if isinstance(setting.default, Enum) else setting.default
        if not isinstance(value, str | int | float) or value == default or (value is False and default is None):
            continue
        if not HOUSEKEEPING.fullmatch(setting.name) and setting.name not in derived:
            changed[setting.name] = value
    return changed


def _fill_origin(card: ModelCard, run: dict, licence: str | None) -> None:
    """Data set, base model and licence: that of the weights that these were made from, if there are such."""
    if run.get("dataset_id"):
        card.data.datasets = [run["dataset_id"]]
    backbone = run.get("from_backbone")
    if backbone:
        card.data.license = licence_of(backbone)
        card.data.base_model = hub_id(backbone)
    if licence:
        card.data.license = licence


def _probe_results(run: dict) -> list[EvalResult]:
    """The online probe's last figures."""
    names = {"knn_accuracy": "kNN accuracy", "linear_accuracy": "linear probe accuracy"}
    measured = run.get("measured", {})
    return [
        _result(
            run, f"{name} while training (at most {run['probe_samples']} labels)", measured[key], run.get("test_split")
        )
        for key, name in names.items()
        if key in measured
    ]


def _evaluation_results(evaluation: dict) -> list[EvalResult]:
    """The figures of `hf-masked evaluate`."""
    return [
        _result(evaluation, _evaluation_name(measure), figures["accuracy"], evaluation.get("test_split"))
        for measure, figures in evaluation.get("results", {}).items()
        if "accuracy" in figures
    ]


def _evaluation_name(measure: str) -> str:
    kind, _, detail = measure.partition("_")
    if kind == "linear":
        return f"linear probe accuracy ({detail} head)"
    if kind == "finetune":
        return (
            f"accuracy fine-tuned with {float(detail):.0%} of the labels"
            if "." in detail
            else (f"accuracy fine-tuned with {detail} labels")
        )
    return "kNN accuracy"


def _result(origin: dict, name: str, value: float, split: str | None) -> EvalResult:
    dataset = origin.get("dataset") or "unnamed"
    return EvalResult(
        task_type="image-classification",
        dataset_type=origin.get("dataset_id") or re.sub(r"[^\w.-]+", "-", dataset.lower()).strip("-"),
        dataset_name=dataset,
        dataset_split=split,
        metric_type="accuracy",
        metric_name=name,
        metric_value=round(value, 4),
    )


def _section(folder: Path, name: str, variant: Variant, config: VariantConfig, run: dict, evaluation: dict) -> str:
    """What stands between the markers."""
    model_class = (config.architectures or [variant.pretraining.__name__])[0]
    stock, kind = ("AutoTokenizer", "tokenizer") if config.modality == "text" else ("AutoImageProcessor", "processor")
    parts = [
        BEGIN.format(method=variant.name, name=name),
        "## This checkpoint",
        _summary(variant, run),
        "```python\n"
        f"from transformers import {', '.join(sorted(['AutoModel', stock]))}\n\n"
        f"{_origin(config.plain_model_type)}\n"
        f'encoder = AutoModel.from_pretrained("{name}", subfolder="encoder")\n'
        f'{kind} = {stock}.from_pretrained("{name}", subfolder="encoder")\n\n'
        f"from hf_masked import {model_class}  # the whole model\n\n"
        f'model = {model_class}.from_pretrained("{name}")\n'
        "```",
        _figures(run, evaluation),
        _settings(run),
        "\n".join(f"![{path.stem}](pictures/{path.name})" for path in _pictures(folder)),
        END,
    ]
    return "\n\n".join(part for part in parts if part)


def _origin(model_type: str) -> str:
    """What an encoder of this type needs."""
    if model_type.startswith(PREFIX):
        return "import hf_masked  # the encoder is the method's own"
    return f"# A plain {model_type} encoder of transformers; hf_masked is not needed."


def _summary(variant: Variant, run: dict) -> str:
    if not run:
        return f"Weights of {variant.name}; this card's writer knows nothing of how they were trained."
    start = f", from the encoder {run['from_backbone']}," if run.get("from_backbone") else ""
    pictures = f" ({run['samples']:,} pictures, without their labels)" if run["samples"] else ""
    machine = run["hardware"]
    return (
        f"Pretrained{start} on {run.get('dataset') or 'a data set without a name'}{pictures}: {run['epochs']:.4g} "
        f"epochs, {run['steps']:,} steps of {run['batch_size']:,}, learning rate {run['learning_rate']:.4g}. "
        f"Machine: {machine['device']}, {run['processes']} process{'es' if run['processes'] > 1 else ''} with "
        f"{machine['torch_threads']} CPU threads. Software: "
        + ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        + "."
    )


def _figures(run: dict, evaluation: dict) -> str:
    """All that was measured, as a table; losses first."""
    measured = run.get("measured", {})
    rows = [
        (f"last {name.replace('_', ' ', 1)}", measured[name]) for name in sorted(measured) if name.startswith("loss")
    ]
    rows += [(result.metric_name, result.metric_value) for result in _probe_results(run)]
    names = {"effective_rank": "effective rank of the features", "feature_spread": "feature spread (1 is isotropic)"}
    rows += [(title, measured[name]) for name, title in names.items() if name in measured]
    rows += [
        (f"{result.metric_name}, {result.dataset_name}", result.metric_value)
        for result in _evaluation_results(evaluation)
    ]
    if not rows:
        return ""
    return "| measured | |\n|---|---|\n" + "\n".join(f"| {name} | {value:.4g} |" for name, value in rows)


def _settings(run: dict) -> str:
    if not run.get("recipe"):
        return ""
    recipe = yaml.safe_dump(run["recipe"], sort_keys=False, allow_unicode=True)
    return f"The settings, with which `train.py --config` repeats the run:\n\n```yaml\n{recipe}```"


def _pictures(folder: Path) -> list[Path]:
    """The last drawing and the loss curve."""
    pictures = folder / "pictures"
    drawings = sorted(pictures.glob("step-*.png"))[-1:]
    return drawings + [path for path in [pictures / "loss.png"] if path.exists()]
