"""Do masks and mixes help a supervised learner with few labels?

    python benchmarks/regularizers.py            # all methods, writes benchmarks/results/regularizers_cpu.json

A small ResNet learns Fashion-MNIST from 2,000 labelled pictures, from scratch, with each method of the kind "method"
and without. It is judged on the 10,000 test pictures as they are, with a gray square of 10 pixels at a random place,
and with half of their squares of 7 pixels gray. Each finished run is written at once; what is there is not run again.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, ResNetConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import RESULTS, environment, write_result
from hf_masked import CutoutConfig, ManifoldMixupConfig, MaskedImageProcessor, MaskSubConfig
from hf_masked.data import labelled_tensors, load_images
from hf_masked.evaluation.features import ImageSettings, to_model_input
from hf_masked.evaluation.finetune import few_label_subset, finetune
from hf_masked.modeling.masked_supervision.cutout import cutout_mask
from hf_masked.modeling.masked_supervision.masksub import mask_squares
from hf_masked.modeling.registry import CATALOGUE
from hf_masked.randomness import keyed_draw, sample_keys

NAME = "regularizers_cpu"
LABELS, STEPS, BATCH = 2000, 1000, 64
SETTINGS = ImageSettings(mean=(0.2860,), std=(0.3530,), size=(28, 28))
# For 28 pixels: squares of half the side, and a quarter of it.
CONFIGS = {
    "cutout": CutoutConfig(length=14),
    "manifold_mixup": ManifoldMixupConfig(alpha=2.0),
    "masksub": MaskSubConfig(pixel_patch_size=7),
}


def encoder_config() -> ResNetConfig:
    return ResNetConfig(
        num_channels=1, embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic"
    )


def run(name: str | None, seed: int, train, test) -> dict[str, float]:
    """Figures of one classifier, trained with the method of that name, or with none."""
    variant = None if name is None else CATALOGUE[name]
    chosen = few_label_subset(train[1], LABELS, seed)
    with tempfile.TemporaryDirectory() as folder:
        figures = finetune(
            encoder_config(),
            train[0][chosen],
            train[1][chosen],
            *test,
            settings=SETTINGS,
            steps=STEPS,
            batch_size=BATCH,
            base_learning_rate=8e-3,
            layer_decay=None,
            regularizer=None if variant is None else variant.method(CONFIGS[name]),
            seed=seed,
            output_dir=folder,
        )
        # Saved with three channels, for pipelines.
        classifier = AutoModelForImageClassification.from_pretrained(folder).eval()
    return {"accuracy": figures["accuracy"], "seconds": figures["seconds"]} | judged(classifier, *test)


@torch.no_grad()
def judged(classifier, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Accuracies under what is hidden, and the mean negative log-likelihood of the whole pictures."""
    keys = sample_keys(0, 0, torch.arange(len(images)))
    removed = cutout_mask(keyed_draw(keys), SETTINGS.size, CutoutConfig(length=10, contained=True))
    hits, likelihoods = {"with a square": 0, "half masked": 0}, 0.0
    for place in torch.arange(len(images)).split(500):
        pictures = to_model_input(images[place], SETTINGS.mean * 3, SETTINGS.std * 3, None, 3)
        likelihoods += F.cross_entropy(classifier(pictures).logits, labels[place], reduction="sum").item()
        views = {
            "with a square": pictures.masked_fill(removed[place].unsqueeze(1), 0.0),
            "half masked": mask_squares(pictures, keyed_draw(keys[place]), 0.5, 7),
        }
        for name, view in views.items():
            hits[name] += int((classifier(view).logits.argmax(dim=1) == labels[place]).sum())
    return {name: count / len(images) for name, count in hits.items()} | {"nll": likelihoods / len(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    processor = MaskedImageProcessor(size=28, num_channels=1, crop_fraction=1.0, mask_kind=None)
    train, test = (labelled_tensors(load_images("fashion_mnist", split), processor) for split in ("train", "test"))
    methods = [name for name, variant in CATALOGUE.items() if variant.kind == "method"]
    for seed in args.seeds:
        for name in [None, *methods]:
            row = result["rows"].setdefault(name or "none", {})
            if str(seed) not in row:
                row[str(seed)] = run(name, seed, train, test)
                facts = {"labels": LABELS, "steps": STEPS, "batch_size": BATCH, "settings": settings()}
                write_result(NAME, result | facts | {"environment": environment(torch.device("cpu"))})
    for name, row in result["rows"].items():
        means = {figure: statistics.mean(r[figure] for r in row.values()) for figure in next(iter(row.values()))}
        print(f"{name:16}" + "  ".join(f"{figure} {value:.3f}" for figure, value in means.items()))


def settings() -> dict[str, dict]:
    return {name: config.to_dict() for name, config in CONFIGS.items()}


if __name__ == "__main__":
    main()
