"""All evaluations of one encoder, and their record as JSON."""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from hf_masked.evaluation.diagnostics import effective_rank, feature_spread
from hf_masked.evaluation.features import ImageSettings, extract_features, raw_pixels
from hf_masked.evaluation.finetune import few_label_subset
from hf_masked.evaluation.finetune import finetune as finetune_encoder
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.evaluation.linear_probe import linear_probe
from hf_masked.evaluation.one_shot import one_shot_accuracy, one_shot_questions
from hf_masked.evaluation.retrieval import retrieval

PACKAGES = ("hf-masked", "torch", "transformers", "accelerate", "scikit-learn", "numpy")

Split = tuple[torch.Tensor, torch.Tensor]


def evaluate_encoder(
    encoder: PreTrainedModel,
    settings: ImageSettings,
    train: Split,
    test: Split,
    *,
    knn: bool = True,
    linear: tuple[str, ...] = ("batchnorm",),
    retrieve: bool = False,
    one_shot: int = 0,
    finetune: tuple[float | int, ...] = (0.01,),
    pooling: str = "auto",
    seed: int = 0,
    finetune_options: dict | None = None,
) -> dict[str, dict]:
    """kNN, linear probes and diagnostics of the frozen encoder, then few-label fine-tuning.

    Args:
        encoder: a stock transformers encoder (or a model of this package, for all but fine-tuning its backbone).
        settings: mean, standard deviation and size of the input.
        train: uint8 (n, channels, height, width) and int64 (n,).
        test: likewise.
        knn: whether to run weighted kNN.
        linear: heads of linear probes, see `linear_probe`.
        retrieve: whether to rank the test pictures by their nearness to each other, see `retrieval`.
        one_shot: ways of one-shot questions about the test pictures, see `one_shot_questions`; 0 for none.
        finetune: shares (float) or numbers (int) of labels to fine-tune with.
        pooling: see `extract_features`.
        seed: of probes, subsets and fine-tuning.
        finetune_options: further arguments of `finetune`.

    Returns:
        Per evaluation ("knn", "linear_batchnorm", "retrieval", "one_shot", "finetune_0.01", ..., "features") a dict of
        its figures with the "seconds" it took.
    """
    results = {}
    if knn or linear or retrieve or one_shot:
        features = _timed(_frozen_features, encoder, settings, train[0], test[0], pooling)
        train_features, test_features = features.pop("train"), features.pop("test")
        results |= evaluate_features(
            train_features,
            train[1],
            test_features,
            test[1],
            knn=knn,
            linear=linear,
            retrieve=retrieve,
            one_shot=one_shot,
            seed=seed,
        )
        results["features"] = features
    for labels in finetune:
        chosen = few_label_subset(train[1], labels, seed)
        backbone = getattr(encoder, "backbone", encoder)
        options = {"settings": settings, "seed": seed} | (finetune_options or {})
        results[f"finetune_{labels}"] = finetune_encoder(
            backbone, train[0][chosen], train[1][chosen], *test, **options
        )
    return results


def evaluate_features(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    knn: bool = True,
    linear: tuple[str, ...] = ("batchnorm",),
    retrieve: bool = False,
    one_shot: int = 0,
    seed: int = 0,
) -> dict[str, dict]:
    """The part of `evaluate_encoder` that needs features only: float (n, width), int64 (n,), (m, width), (m,)."""
    data = train_features, train_labels, test_features, test_labels
    results = {}
    if knn:
        results["knn"] = _timed(lambda: {"accuracy": weighted_knn(*data)})
    for head in linear:
        results[f"linear_{head}"] = _timed(linear_probe, *data, head=head, seed=seed)
    if retrieve:
        results["retrieval"] = _timed(retrieval, test_features, test_labels)
    if one_shot:
        questions = one_shot_questions(test_features, test_labels, ways=one_shot, seed=seed)
        results["one_shot"] = _timed(one_shot_accuracy, *questions)
    return results


def evaluate_raw_pixels(train: Split, test: Split, **options) -> dict[str, dict]:
    """The baseline without an encoder; the arguments are those of `evaluate_features`."""
    return evaluate_features(raw_pixels(train[0]), train[1], raw_pixels(test[0]), test[1], **options)


def write_report(path: str | Path, results: dict, *, checkpoint: str, dataset: str, **facts) -> dict:
    """Writes results as JSON, with what is needed to compare them: versions, hardware, data set.

    Args:
        path: of the file; folders are made.
        results: of `evaluate_encoder`.
        checkpoint: what was evaluated.
        dataset: on what.
        facts: anything else that JSON can hold, for example `seed`.

    Returns:
        What was written.
    """
    report = {
        "checkpoint": checkpoint,
        "dataset": dataset,
        **facts,
        "results": results,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware(),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(report, indent=2) + "\n")
    return report


def hardware() -> dict[str, str | int]:
    """Accelerator or processor, cores and threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor_name()
    return {"device": device, "cpu_count": os.cpu_count() or 0, "torch_threads": torch.get_num_threads()}


def _processor_name() -> str:
    """The CPU's model, which Python itself does not tell on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _frozen_features(encoder, settings, train_images, test_images, pooling) -> dict:
    train, test = (
        extract_features(encoder, images, mean=settings.mean, std=settings.std, size=settings.size, pooling=pooling)
        for images in (train_images, test_images)
    )
    return {
        "train": train,
        "test": test,
        "effective_rank": effective_rank(test),
        "feature_spread": feature_spread(test),
    }


def _timed(function, *args, **kwargs) -> dict:
    started = time.perf_counter()
    figures = function(*args, **kwargs)
    return figures | {"seconds": time.perf_counter() - started}
