"""Does a recipe of point clouds learn? The pretrained encoder beside the same network with its initial weights.

    python benchmarks/points.py recipes/point_mae_synthetic_shapes.yaml      # writes benchmarks/results/points_*.json

Both are frozen and judged on the recipe's test split: nearest neighbours with all training labels, and logistic
regression with all of them and with ten per class. Further flags go to the training program.
"""

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import environment, write_result
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.evaluation.linear_probe import linear_probe
from hf_masked.modeling.registry import get_variant
from hf_masked.training.cli import make_model, train
from hf_masked.training.modalities import modality_of
from hf_masked.training.recipes import parse

# Labels per class of the probe with few.
FEW = 10


def few_labels(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the first `count` samples of each class."""
    return torch.cat([(labels == label).nonzero().flatten()[:count] for label in labels.unique()])


def judged(model, modality, processor, splits: list) -> dict[str, float]:
    """Accuracies of a frozen encoder."""
    device = torch.device("cpu")
    (train_features, train_labels), (test_features, test_labels) = (
        (modality.features(model, processor, samples, device), labels) for samples, labels in splits
    )
    few = few_labels(train_labels, FEW)
    test = (test_features, test_labels)
    return {
        "knn": weighted_knn(train_features, train_labels, *test),
        "linear": linear_probe(train_features, train_labels, *test, head="logistic")["accuracy"],
        f"linear_{FEW}_per_class": linear_probe(train_features[few], train_labels[few], *test, head="logistic")[
            "accuracy"
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seed", type=int, default=0)
    args, flags = parser.parse_known_args()
    name = f"points_{Path(args.recipe).stem}"
    output = ["--output_dir", f"runs/{name}", "--resume_from_checkpoint", "no"]
    method, data, training = parse(["--config", args.recipe, "--seed", str(args.seed), *output, *flags])
    training.probe_every_epochs = 0
    set_seed(args.seed)
    untrained = make_model(get_variant(method.method), method)
    started = time.perf_counter()
    trainer = train(copy.deepcopy(method), data, training)
    seconds = time.perf_counter() - started
    config, processor = trainer.model.config, trainer.processing_class
    modality = modality_of(config)
    sources = [modality.open(data, split, config, processor) for split in (data.train_split, data.test_split)]
    splits = [modality.labelled(source, processor, config) for source in sources]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = {
        "recipe": args.recipe,
        "flags": flags,
        "seed": args.seed,
        "dataset": sources[0].name,
        "steps": trainer.state.global_step,
        "pretraining_seconds": seconds,
        "first_loss": losses[0],
        "final_loss": losses[-1],
        "rows": {
            title: judged(model, modality, processor, splits)
            for title, model in (("pretrained", trainer.model), ("untrained", untrained))
        },
        "environment": environment(torch.device("cpu")),
    }
    write_result(name, result)
    print(json.dumps(result["rows"], indent=2))


if __name__ == "__main__":
    main()
