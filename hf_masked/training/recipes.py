"""Recipes: YAML files whose settings flags override.

A recipe names the method, then holds blocks: `model` (arguments of the method's config), `processor` (arguments of its
processor) and any other block (`data`, `optimization`, `evaluation`, `efficiency`, ...) of flat settings, grouped for
the reader. On the command line `--learning_rate 1e-3` overrides a flat setting and `--model.mask_ratio 0.6` or
`--processor.crop_scale "[0.5, 1]"` one inside a block.
"""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from hf_masked.training.arguments import PreTrainingArguments

HELP = (
    "Pretrains a method of the catalogue. `--config RECIPE.yaml` reads a recipe; flags override it, whatever their "
    "order. `--model.mask_ratio 0.6` sets an argument of the method's config, `--model.backbone_config.hidden_size "
    "192` one of its encoder's, `--processor.crop_scale '[0.5, 1]'` one of its image processor. All arguments of "
    "transformers' TrainingArguments are flags too; `--push_to_hub --hub_model_id OWNER/NAME` uploads what is written "
    "(after a failure: `hf-masked push`). The same command goes on where a run was interrupted; "
    "`--resume_from_checkpoint no` starts anew."
)

# Blocks that are dictionaries of one argument, not groups of flat settings.
NESTED = ("model", "processor")


class RecipeError(ValueError):
    """A recipe or flag that cannot be understood; the message is one line."""


@dataclass
class MethodArguments:
    """What is trained."""

    method: str = field(metadata={"help": "Name of the method, see `hf-masked list`."})
    from_backbone: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a transformers encoder to start from."}
    )
    model: dict | str | None = field(default=None, metadata={"help": "Arguments of the method's config, as JSON."})
    processor: dict | str | None = field(default=None, metadata={"help": "Arguments of its processor, as JSON."})

    def __post_init__(self):
        self.model = _mapping(self.model)
        self.processor = _mapping(self.processor)


@dataclass
class DataArguments:
    """What it is trained on."""

    dataset_name: str = field(
        metadata={
            "help": "Hub id, folder of images, Parquet or tar files, their folder or URL, a cache of "
            "`hf-masked cache`, `fashion_mnist`, or `digits`; for stereo matching a folder of pairs, or "
            "`synthetic_stereo`; a graph as .npz file, `cora`, `citeseer`, `pubmed` or `karate_club`."
        }
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; its labels are not used."})
    test_split: str = field(default="test", metadata={"help": "Labelled split that the online probe is scored on."})
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the pictures, where it is unclear; several, with commas between them, for pairs."
        },
    )
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels, where it is unclear."})
    frame_gap: list[int] | None = field(
        default=None,
        metadata={
            "help": "For methods that learn from frames of clips: the smallest gap between two frames, and one more "
            "than the largest; 4 48 by default."
        },
    )
    held_out_edges: list[float] | None = field(
        default=None,
        metadata={
            "help": "For methods that learn from graphs: shares of the edges that are held out for validation and for "
            "testing; 0.05 0.1 by default."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set while training, without a copy; needs --max_steps."}
    )
    data_cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and tables are kept."})


Parsed = tuple[MethodArguments, DataArguments, PreTrainingArguments]


def parse(arguments: list[str]) -> Parsed:
    """Reads `--config recipe.yaml` and flags, flags last.

    Raises:
        RecipeError: for a missing file, an unknown setting, or one without a value.
    """
    arguments = list(arguments)
    settings: dict = {}
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise RecipeError("--config needs the path of a recipe, for example recipes/mae_fashion_mnist.yaml.")
        settings = read_recipe(arguments[place + 1])
        del arguments[place : place + 2]
    arguments = _take_dotted(arguments, settings)
    parser = HfArgumentParser(
        (MethodArguments, DataArguments, PreTrainingArguments), prog="train.py", description=HELP
    )
    if {"-h", "--help"} & set(arguments):
        parser.parse_args(["--help"])
    _check_names(settings, arguments)
    for required in ("method", "dataset_name"):
        if required not in settings and f"--{required}" not in arguments:
            raise RecipeError(f"Say --{required}, in the recipe or as a flag (`python train.py --help` lists all).")
    return parser.parse_args_into_dataclasses(_as_flags(settings) + arguments)


def read_recipe(path: str | Path) -> dict:
    """A recipe as flat settings, with `model` and `processor` as dictionaries.

    Raises:
        RecipeError: if there is no such file, or it is no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"There is no recipe {path}; `ls recipes` shows those that come with the repository.")
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise RecipeError(f"The recipe {path} is no mapping of settings to values.")
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict) and name not in NESTED and name not in _known_names():
            flat |= value
        else:
            flat[name] = value
    return flat


def _known_names() -> set[str]:
    return {f.name for kind in (MethodArguments, DataArguments, PreTrainingArguments) for f in fields(kind) if f.init}


def _check_names(settings: dict, arguments: list[str]) -> None:
    flags = [word[2:].split("=")[0].replace("-", "_") for word in arguments if word.startswith("--")]
    known = _known_names()
    for name in [*settings, *flags]:
        if name not in known and name.removeprefix("no_") not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `python train.py --help` lists all settings."
            raise RecipeError(f"Unknown setting {name!r}.{hint}")


def _take_dotted(arguments: list[str], settings: dict) -> list[str]:
    """Moves `--model.a.b value` and `--processor.a value` from the flags into the nested settings."""
    rest = []
    words = iter(arguments)
    for word in words:
        flag, _, value = word.removeprefix("--").partition("=")
        block, _, inner = flag.partition(".")
        if not word.startswith("--") or block not in NESTED or not inner:
            rest.append(word)
            continue
        value = value or next(words, None)
        if value is None:
            raise RecipeError(f"{word} needs a value.")
        target = settings.setdefault(block, {})
        *parents, last = inner.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = yaml.safe_load(value)
    return rest


def _as_flags(settings: dict) -> list[str]:
    """Settings as the command line would give them, so that later flags override them."""
    words = []
    for name, value in settings.items():
        if value is None:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif isinstance(value, list):
            words += map(str, value)
        else:
            words.append(str(value))
    return words


def _mapping(value: dict | str | None) -> dict:
    return json.loads(value) if isinstance(value, str) else dict(value or {})
