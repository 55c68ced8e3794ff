"""`hf-masked` from the outside."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModel, AutoModelForPreTraining, ViTConfig, pipeline

from hf_masked import (
    CATALOGUE,
    MAEConfig,
    MAEForPreTraining,
    MAEModel,
    MaskedImageProcessor,
    PSMNetForStereoMatching,
    StereoImageProcessor,
)
from hf_masked.cli import main
from hf_masked.data import stereo
from hf_masked.modeling.siamese.psmnet import tiny_config
from hf_masked.processing.masks import MASKS
from hf_masked.training.cards import write_card
from tests.evaluation.test_label_propagation import moving_squares


def run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["hf-masked", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


def refused(monkeypatch, capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny MAE for the digits, as training leaves it."""
    backbone_config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=2,
        num_channels=1,
    )  # fmt: skip
    model = MAEForPreTraining(MAEConfig(backbone_config=backbone_config, decoder_hidden_size=32))
    model.save_pretrained(tmp_path / "mae")
    MaskedImageProcessor(**model.config.processor_settings(), crop_fraction=1.0).save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


@pytest.fixture
def photos(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 20), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_list_has_every_method_on_one_line(monkeypatch, capsys):
    run(monkeypatch, "list")
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 + len(CATALOGUE)
    for name, variant in CATALOGUE.items():
        line = next(line for line in lines if line.startswith(name))
        assert str(variant.config.paper_year) in line and variant.config.predicts in line


def test_list_shows_the_kinds_of_masks(monkeypatch, capsys):
    run(monkeypatch, "list", "--masks")
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["mask", *MASKS]
    assert all(len(line.split()) > 3 for line in lines[1:])


def test_info_says_where_a_method_comes_from(monkeypatch, capsys):
    for name, variant in CATALOGUE.items():
        run(monkeypatch, "info", name)
        text = capsys.readouterr().out
        assert variant.config.paper_title in text and all(kind.__name__ in text for kind in variant.classes)


def test_unknown_method_is_named(monkeypatch, capsys):
    line = refused(monkeypatch, capsys, "info", "mea")
    assert line.startswith("hf-masked: ") and "'mea'" in line and "mae" in line


def official_checkpoint(model: MAEForPreTraining, decoder: bool) -> dict:
    """The official layout of a model's weights, by the names of `models_mae.py`."""
    ours = model.state_dict()
    official = {
        "cls_token": ours["backbone.embeddings.cls_token"],
        "pos_embed": ours["backbone.embeddings.position_embeddings"],
    }
    renaming = {
        "patch_embed.proj": "backbone.embeddings.patch_embeddings.projection",
        "norm": "backbone.layernorm",
    }
    for i in range(model.config.backbone_config.num_hidden_layers):
        layer = f"backbone.layers.{i}"
        renaming |= {
            f"blocks.{i}.norm1": f"{layer}.layernorm_before",
            f"blocks.{i}.norm2": f"{layer}.layernorm_after",
            f"blocks.{i}.attn.proj": f"{layer}.attention.o_proj",
            f"blocks.{i}.mlp.fc1": f"{layer}.mlp.fc1",
            f"blocks.{i}.mlp.fc2": f"{layer}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            parts = [ours[f"{layer}.attention.{part}_proj.{kind}"] for part in "qkv"]
            official[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    if decoder:
        official |= {
            "mask_token": ours["decoder.mask_token"],
            "decoder_pos_embed": ours["decoder.position_embeddings"],
        }
        renaming |= {"decoder_embed": "decoder.embedding", "decoder_norm": "decoder.norm"}
        renaming |= {"decoder_pred": "decoder.head"}
        for i in range(model.config.decoder_num_hidden_layers):
            layer = f"decoder.layers.{i}"
            renaming |= {
                f"decoder_blocks.{i}.norm1": f"{layer}.attention_norm",
                f"decoder_blocks.{i}.norm2": f"{layer}.feed_forward_norm",
                f"decoder_blocks.{i}.attn.qkv": f"{layer}.attention.qkv",
                f"decoder_blocks.{i}.attn.proj": f"{layer}.attention.projection",
                f"decoder_blocks.{i}.mlp.fc1": f"{layer}.feed_forward.0",
                f"decoder_blocks.{i}.mlp.fc2": f"{layer}.feed_forward.2",
            }
    for there, here in renaming.items():
        for kind in ("weight", "bias"):
            official[f"{there}.{kind}"] = ours[f"{here}.{kind}"]
    return official


@pytest.fixture
def wide_model():
    """As wide as a released model, so that the number of heads is known, and one block deep."""
    backbone_config = ViTConfig(num_hidden_layers=1, image_size=32, layer_norm_eps=1e-6)
    return MAEForPreTraining(MAEConfig(backbone_config=backbone_config, decoder_num_hidden_layers=1))


@pytest.mark.parametrize("decoder", [True, False])
def test_official_files_convert(monkeypatch, tmp_path, wide_model, decoder):
    official = {"model": official_checkpoint(wide_model, decoder), "args": argparse.Namespace(lr=1.0), "epoch": 3}
    torch.save(official, tmp_path / "official.pth")
    run(monkeypatch, "convert", "mae", tmp_path / "official.pth", tmp_path / "out")
    kind, auto_class = (MAEForPreTraining, AutoModelForPreTraining) if decoder else (MAEModel, AutoModel)
    converted = auto_class.from_pretrained(tmp_path / "out")
    assert type(converted) is kind and converted.config.backbone_config.num_attention_heads == 12
    for name, value in converted.state_dict().items():
        assert torch.equal(value, wide_model.state_dict()[name]), name
    assert (tmp_path / "out" / "preprocessor_config.json").exists()
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "cc-by-nc-4.0", "that of the weights"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("norm.weight"), ["missing", "layernorm.weight"]),
        (lambda w: w.update(surprise=torch.zeros(1)), ["left over", "surprise"]),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), ["another shape", "layernorm.weight"]),
    ],
)
def test_conversion_is_strict(monkeypatch, capsys, tmp_path, wide_model, change, words):
    weights = official_checkpoint(wide_model, decoder=True)
    change(weights)
    torch.save({"model": weights}, tmp_path / "official.pth")
    line = refused(monkeypatch, capsys, "convert", "mae", tmp_path / "official.pth", tmp_path / "out")
    assert all(word in line for word in words), line


class Unsafe:
    """Anything but tensors and an argparse Namespace."""


def test_pickled_objects_are_not_loaded(monkeypatch, capsys, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Unsafe()}, tmp_path / "official.pth")
    line = refused(monkeypatch, capsys, "convert", "mae", tmp_path / "official.pth", tmp_path / "out")
    assert "official.pth cannot be read" in line


def test_export_folds_gray_encoders_for_pipelines(monkeypatch, checkpoint, tmp_path):
    run(monkeypatch, "export", checkpoint, tmp_path / "plain", "--rgb")
    features = pipeline("image-feature-extraction", model=str(tmp_path / "plain"))(Image.new("L", (9, 9), 77))
    assert torch.tensor(features).shape == (1, 17, 32)


def test_evaluate_writes_figures_with_their_origin(monkeypatch, checkpoint, capsys):
    arguments = ("--dataset-name", "digits", "--linear", "logistic", "--limit", 400, "--retrieval")
    run(monkeypatch, "evaluate", checkpoint, *arguments)
    report = json.loads((checkpoint / "evaluation.json").read_text())
    # Far above chance, which is 0.1: even features of an untrained encoder say something about digits.
    assert report["results"]["knn"]["accuracy"] > 0.25 and report["results"]["linear_logistic"]["accuracy"] > 0.25
    assert "torch" in report["versions"] and "igits" in report["dataset"]
    assert 0.11 < report["results"]["retrieval"]["mean_average_precision"] < 1
    assert "retrieval" in capsys.readouterr().out


def test_evaluate_brings_its_figures_into_the_card(monkeypatch, checkpoint):
    write_card(checkpoint)
    run(monkeypatch, "evaluate", checkpoint, "--dataset-name", "digits", "--linear", "logistic", "--limit", 200)
    report = json.loads((checkpoint / "evaluation.json").read_text())
    results = {result.metric_name: result for result in ModelCard.load(checkpoint / "README.md").data.eval_results}
    assert results["kNN accuracy"].metric_value == round(report["results"]["knn"]["accuracy"], 4)
    assert results["linear probe accuracy (logistic head)"].dataset_split == "test"


def test_what_is_no_checkpoint_is_not_pushed(monkeypatch, capsys, tmp_path):
    line = refused(monkeypatch, capsys, "push", tmp_path, "me/nothing")
    assert str(tmp_path) in line and "config.json" in line


def test_evaluate_takes_any_transformers_encoder(monkeypatch, checkpoint, tmp_path):
    run(monkeypatch, "export", checkpoint, tmp_path / "plain")
    arguments = ["--dataset-name", "digits", "--limit", "200", "--linear", "logistic"]
    run(monkeypatch, "evaluate", checkpoint, *arguments, "--output", tmp_path / "ours.json")
    run(monkeypatch, "evaluate", tmp_path / "plain", *arguments, "--output", tmp_path / "theirs.json")
    ours, theirs = (json.loads((tmp_path / f"{name}.json").read_text())["results"] for name in ("ours", "theirs"))
    assert ours["knn"]["accuracy"] == theirs["knn"]["accuracy"]


def test_evaluate_judges_what_belongs_to_pairs(monkeypatch, checkpoint, tmp_path, capsys):
    out = tmp_path / "found.json"
    arguments = ["--dataset-name", "digits", "--no-knn", "--linear", "logistic", "--limit", "100", "--one-shot", "5"]
    run(monkeypatch, "evaluate", checkpoint, *arguments, "--output", out)
    assert json.loads(out.read_text())["results"]["one_shot"]["chance"] == 0.2
    moving_squares(tmp_path / "clips")
    run(monkeypatch, "evaluate", checkpoint, "--propagation", "--dataset-name", tmp_path / "clips", "--output", out)
    assert json.loads(out.read_text())["results"]["label_propagation"]["objects"] == 2
    torch.manual_seed(0)
    PSMNetForStereoMatching(tiny_config()).save_pretrained(tmp_path / "psmnet")
    StereoImageProcessor(size=(16, 32)).save_pretrained(tmp_path / "psmnet")
    monkeypatch.setattr(stereo, "SPLITS", {"test": (2, 1)})
    run(monkeypatch, "evaluate", tmp_path / "psmnet", "--dataset-name", "synthetic_stereo", "--output", out)
    assert json.loads(out.read_text())["results"]["stereo"]["pairs"] == 2


def test_finetune_leaves_a_classifier_for_pipelines(monkeypatch, checkpoint, tmp_path):
    arguments = ["--dataset-name", "digits", "--labels", "200", "--steps", "3", "--batch-size", "8"]
    run(monkeypatch, "finetune", checkpoint, tmp_path / "classifier", *arguments)
    found = pipeline("image-classification", model=str(tmp_path / "classifier"))(Image.new("L", (9, 9), 77))
    assert {answer["label"] for answer in found} <= {str(digit) for digit in range(10)}


def test_visualize_draws_and_names_what_it_left_out(monkeypatch, checkpoint, photos, tmp_path, caplog):
    run(monkeypatch, "visualize", checkpoint, photos, "--output", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width > 200
    assert "broken.png" in caplog.text


def test_visualize_draws_the_nearest_neighbours(monkeypatch, checkpoint, tmp_path, capsys):
    for label, gray in (("dark", 20), ("light", 200)):
        (tmp_path / "sets" / label).mkdir(parents=True)
        for number in range(3):
            Image.new("L", (20, 20), gray + number).save(tmp_path / "sets" / label / f"{number}.png")
    out = tmp_path / "out.png"
    run(monkeypatch, "visualize", checkpoint, tmp_path / "sets", "--nearest", "2", "--rows", "2", "--output", out)
    one_row = Image.open(out).height
    run(monkeypatch, "visualize", checkpoint, tmp_path / "sets", "--nearest", "2", "--rows", "4", "--output", out)
    assert Image.open(out).height > 1.5 * one_row
    words = refused(monkeypatch, capsys, "visualize", checkpoint, tmp_path / "sets", "--nearest", "6")
    assert "6 neighbours are asked for, and there are 5 other pictures" in words


def test_visualize_without_pictures_says_so(monkeypatch, checkpoint, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no readable picture" in refused(monkeypatch, capsys, "visualize", checkpoint, tmp_path / "empty")
    assert "nowhere" in refused(monkeypatch, capsys, "visualize", checkpoint, tmp_path / "nowhere")
