"""Does a recipe learn? Pretrains it with several seeds and judges each encoder beside an untrained one.

    python benchmarks/learning.py recipes/mae_fashion_mnist.yaml --seeds 0 1 2
    python benchmarks/learning.py recipes/mae_cifar10.yaml --seeds 0 --dataset_name ../shared/data/cifar10

Every seed draws its own initial weights, order, crops, masks, labels and heads. The rows: the pretrained encoder, the
same network with its initial weights ("untrained" when frozen, "from scratch" when fine-tuned), and raw pixels. Frozen
figures use all training labels, fine-tuning 1 % of them. Each finished seed is written at once; what is written is not
run again, and what was judged before (the same initial weights under another method) is not judged again, see
`runs/judged`. Further flags go to the training program.
"""

import argparse
import copy
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, environment, write_result
from hf_masked.data import labelled_tensors
from hf_masked.evaluation.features import ImageSettings
from hf_masked.evaluation.report import evaluate_encoder, evaluate_raw_pixels
from hf_masked.modeling.registry import get_variant
from hf_masked.training.cli import make_model, train
from hf_masked.training.modalities import modality_of
from hf_masked.training.recipes import parse

# Share of the labels that fine-tuning gets.
LABELS = 0.01

# Linear heads: trained until they have converged, and as MAE's own program sets it.
HEADS = ("batchnorm", "reference")

# Decaying the learning rate towards the input is for encoders that know something; from scratch one rate, at half the
# height, does better.
FROM_SCRATCH = {"layer_decay": None, "base_learning_rate": 8e-3}


def run_seed(recipe: str, seed: int, flags: list[str], output: str) -> dict:
    arguments = ["--config", recipe, "--seed", str(seed), "--output_dir", output, *flags]
    method, data, args = parse(arguments)
    # The probes are run once, at the end, and for all rows alike.
    args.probe_every_epochs = args.picture_every_epochs = 0
    set_seed(seed)
    untrained = make_model(get_variant(method.method), method).plain_backbone()
    started = time.perf_counter()
    trainer = train(copy.deepcopy(method), data, args)
    seconds = time.perf_counter() - started
    processor = trainer.processing_class
    splits = []
    for split in (data.train_split, data.test_split):
        source = modality_of(trainer.model.config).open(data, split, trainer.model.config, processor)
        splits.append(labelled_tensors(source, processor))
    settings = ImageSettings.of_processor(processor)
    rows = {
        name: judged(encoder, settings, splits, seed, options)
        for name, encoder, options in (
            ("pretrained", trainer.model.plain_backbone(), {}),
            ("untrained", untrained, FROM_SCRATCH),
            ("raw pixels", None, {}),
        )
    }
    return {
        "dataset": source.name,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "pretraining_seconds": seconds,
        "final_loss": [line["loss"] for line in trainer.state.log_history if "loss" in line][-1],
        "rows": rows,
    }


def judged(encoder, settings: ImageSettings, splits: list, seed: int, finetune_options: dict) -> dict:
    """All measures of an encoder, or of raw pixels for None; taken from `runs/judged` where it was judged before."""
    weights, form = ({}, None) if encoder is None else (encoder.state_dict(), encoder.config.to_diff_dict())
    digest = hashlib.sha256(repr((form, settings, seed, finetune_options, LABELS, HEADS)).encode())
    for images, labels in splits:
        digest.update(images.numpy().tobytes() + labels.numpy().tobytes())
    for name, tensor in weights.items():
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    path = Path("runs/judged") / f"{digest.hexdigest()[:32]}.json"
    if not path.exists():
        if encoder is None:
            figures = evaluate_raw_pixels(*splits, linear=HEADS, seed=seed)
        else:
            figures = evaluate_encoder(
                encoder,
                settings,
                *splits,
                linear=HEADS,
                finetune=(LABELS,),
                seed=seed,
                finetune_options=finetune_options,
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures))
    return json.loads(path.read_text())


def summary(seeds: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Per row and measure the mean accuracy and the range over the seeds."""
    rows: dict = {}
    for name in ("pretrained", "untrained", "raw pixels"):
        measures = next(iter(seeds.values()))["rows"][name]
        for measure in (m for m, figures in measures.items() if "accuracy" in figures):
            values = [run["rows"][name][measure]["accuracy"] for run in seeds.values()]
            rows.setdefault(name, {})[measure] = {
                "mean": statistics.mean(values),
                "lowest": min(values),
                "highest": max(values),
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", help="of the result; by default the recipe's")
    args, flags = parser.parse_known_args()
    name = f"learning_{args.name or Path(args.recipe).stem}"
    path = RESULTS / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else {"recipe": args.recipe, "flags": flags, "seeds": {}}
    for seed in args.seeds:
        if str(seed) in result["seeds"]:
            continue
        result["seeds"][str(seed)] = run_seed(args.recipe, seed, flags, f"runs/{name}/seed-{seed}")
        result |= {"environment": environment(torch.device("cpu")), "summary": summary(result["seeds"])}
        write_result(name, result)
    print(json.dumps(result["summary"], indent=2))


if __name__ == "__main__":
    main()
