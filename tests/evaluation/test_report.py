import json

import pytest
import torch
from transformers import ViTConfig, ViTModel

from hf_masked.evaluation import METRICS, load_metric
from hf_masked.evaluation.features import ImageSettings
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.evaluation.linear_probe import linear_probe
from hf_masked.evaluation.report import evaluate_encoder, evaluate_raw_pixels, write_report

SETTINGS = ImageSettings((0.5,), (0.5,), (8, 8))
CONFIG = ViTConfig(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    image_size=8,
    patch_size=4,
    num_channels=1,
)


def split(count, seed):
    """Pictures whose class is the brighter half: uint8 (count, 1, 8, 8), int64 (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = torch.randint(100, (count, 1, 8, 8), generator=generator)
    images[labels == 0, :, :4] += 100
    images[labels == 1, :, 4:] += 100
    return images.to(torch.uint8), labels


def test_everything_about_an_encoder(tmp_path):
    torch.manual_seed(0)
    train, test = split(60, 0), split(20, 1)
    results = evaluate_encoder(
        ViTModel(CONFIG),
        SETTINGS,
        train,
        test,
        linear=("logistic",),
        finetune=(0.2, 20),
        finetune_options={"steps": 2, "batch_size": 4},
    )
    assert set(results) == {
        "knn",
        "linear_logistic",
        "features",
        "finetune_0.2",
        "finetune_20",
    }
    assert all(figures["seconds"] > 0 for figures in results.values())
    assert results["finetune_0.2"]["labels"] == 12 and results["finetune_20"]["labels"] == 20
    assert results["features"].keys() == {"effective_rank", "feature_spread", "seconds"}
    write_report(tmp_path / "deep" / "report.json", results, checkpoint="here", dataset="halves", seed=0)
    report = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert report["results"] == results and report["dataset"] == "halves"
    assert report["versions"]["torch"] == torch.__version__ and report["hardware"]["cpu_count"] >= 1


def test_raw_pixels():
    results = evaluate_raw_pixels(split(60, 0), split(20, 1), linear=("logistic",))
    assert results["knn"]["accuracy"] > 0.9 and results["linear_logistic"]["accuracy"] > 0.9


def test_metrics_load_from_the_package(offline):
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(40, 4, generator=generator), torch.randn(15, 4, generator=generator)
    labels, test_labels = (torch.randint(3, (n,), generator=generator) for n in (40, 15))
    known = {"features": test, "references": test_labels, "train_features": train, "train_labels": labels}
    expected = weighted_knn(train, labels, test, test_labels, k=5)
    assert load_metric("knn_accuracy").compute(**known, k=5) == {"accuracy": expected}
    figures = load_metric("linear_probe_accuracy").compute(**known, head="logistic", C=0.1)
    assert figures == linear_probe(train, labels, test, test_labels, head="logistic", C=0.1)


def test_few_label_metric(offline):
    train, test = split(20, 0), split(6, 1)
    figures = load_metric("few_label_accuracy").compute(
        images=test[0],
        references=test[1],
        encoder=CONFIG,
        train_images=train[0],
        train_labels=train[1],
        share_or_count=4,
        settings=SETTINGS,
        steps=1,
        batch_size=2,
    )
    assert figures["labels"] == 4 and 0 <= figures["accuracy"] <= 1


def test_unknown_metric():
    with pytest.raises(ValueError, match=METRICS[0]):
        load_metric("accuracy")
