import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    DeiTConfig,
    Dinov2Config,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTModel,
    pipeline,
)

from hf_masked.evaluation.features import ImageSettings
from hf_masked.evaluation.finetune import few_label_subset, finetune, load_classifier
from hf_masked.modeling.parts.backbones import build_backbone
from hf_masked.modeling.parts.gray import fold_gray_to_rgb

SETTINGS = ImageSettings(mean=(0.3,), std=(0.35,), size=(8, 8))
GRAY_VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=8,
    patch_size=4,
    num_channels=1,
    initializer_range=0.1,
)
TINY = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_channels=1)
ENCODERS = {
    "vit": ViTConfig(**TINY, intermediate_size=16),
    "deit": DeiTConfig(**TINY, intermediate_size=16),
    "dinov2": Dinov2Config(**TINY, mlp_ratio=2),
    "beit": BeitConfig(**TINY, intermediate_size=16),
    "swin": SwinConfig(embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, image_size=8, patch_size=2),
    "resnet": RESNET,
}


@pytest.fixture(scope="module")
def digits():
    """Train and test pictures and labels, uint8 (n, 1, 8, 8)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy((data.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target).long()
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


@pytest.fixture(scope="module")
def served(digits, tmp_path_factory):
    """A folder with a classifier fine-tuned from scratch, and its figures."""
    folder = tmp_path_factory.mktemp("classifier")
    figures = finetune(
        GRAY_VIT,
        *digits,
        settings=SETTINGS,
        steps=120,
        batch_size=64,
        base_learning_rate=3e-2,
        layer_decay=None,
        crop_scale=(0.8, 1.0),
        flip_probability=0.0,
        label_names=[f"digit {i}" for i in range(10)],
        output_dir=str(folder),
    )
    return folder, figures


def test_it_learns(served):
    assert served[1]["accuracy"] > 0.8 and served[1]["steps"] == 120 and served[1]["labels"] == 1400


def test_the_classifier_is_served_by_a_pipeline(served, digits):
    folder, figures = served
    pictures = [Image.fromarray(image[0].numpy()) for image in digits[2]]
    answers = pipeline("image-classification", model=str(folder))(pictures, batch_size=64)
    names = [f"digit {label}" for label in digits[3].tolist()]
    accuracy = np.mean([answer[0]["label"] == name for answer, name in zip(answers, names, strict=True)])
    assert accuracy == pytest.approx(figures["accuracy"], abs=1e-6)


def test_nothing_saved_needs_this_package(served):
    texts = [file.read_text() for file in served[0].glob("*.json")]
    assert len(texts) == 2 and not any("hf_masked" in text for text in texts)
    assert json.loads((served[0] / "config.json").read_text())["architectures"] == ["ViTForImageClassification"]


@pytest.mark.parametrize("kind", ["beit", "swin"])
def test_encoders_with_mask_tokens_are_fine_tuned_without(kind, digits, tmp_path):
    """A BEiT in its papers' form as well: a table in every block, and the mean of the patches."""
    config = copy.deepcopy(ENCODERS[kind])
    if kind == "beit":
        config.use_shared_relative_position_bias, config.use_mean_pooling = True, False
    encoder = build_backbone(config, mask_token=True)
    settings = ImageSettings(mean=(0.5,) * 3, std=(0.5,) * 3, size=(8, 8))
    few = few_label_subset(digits[1], 20)
    data = digits[0][few], digits[1][few], digits[2][:10], digits[3][:10]
    finetune(encoder, *data, settings=settings, steps=1, output_dir=str(tmp_path))
    tuned = AutoModelForImageClassification.from_pretrained(tmp_path)
    names = {name for name, _ in tuned.named_parameters()}
    assert not any("mask_token" in name for name in names) and encoder.embeddings.mask_token is not None
    if kind == "beit":
        assert tuned.config.use_mean_pooling and "beit.pooler.layernorm.weight" in names
        assert "beit.layers.0.relative_position_bias.relative_position_bias_table" in names


def test_resume_is_exact(digits, tmp_path):
    options = {
        "settings": SETTINGS,
        "steps": 6,
        "batch_size": 16,
        "training_arguments": {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 3},
    }
    few = few_label_subset(digits[1], 40)
    data = digits[0][few], digits[1][few], digits[2][:10], digits[3][:10]
    finetune(GRAY_VIT, *data, output_dir=str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    finetune(GRAY_VIT, *data, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=checkpoint, **options)
    first, second = (
        AutoModelForImageClassification.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ENCODERS)
def test_every_weight_of_the_encoder_reaches_the_classifier(name, tmp_path):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(ENCODERS[name])
    encoder.save_pretrained(tmp_path)
    classifier = load_classifier(str(tmp_path), ["a", "b", "c"])
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"}
    copied = dict(getattr(classifier, classifier.base_model_prefix).named_parameters())
    for parameter, value in encoder.named_parameters():
        if not parameter.startswith("pooler"):
            assert torch.equal(copied[parameter], value), parameter


def test_an_encoder_that_does_not_fit_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    ViTModel(ENCODERS["vit"], add_pooling_layer=False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["strange.weight"] = weights.pop("layernorm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"strange\.weight.*layernorm\.weight"):
        load_classifier(str(tmp_path), ["a", "b"])


def test_a_config_needs_settings(digits):
    with pytest.raises(ValueError, match="pass settings"):
        finetune(GRAY_VIT, *digits)


def test_few_labels_are_balanced_and_seeded():
    labels = torch.arange(1000) % 10
    chosen = few_label_subset(labels, 0.05, seed=3)
    assert labels[chosen].bincount().tolist() == [5] * 10
    assert len(chosen.unique()) == 50
    assert torch.equal(chosen, few_label_subset(labels, 50, seed=3))
    assert not torch.equal(chosen, few_label_subset(labels, 50, seed=4))
    counts = labels[few_label_subset(labels, 53, seed=3)].bincount()
    assert counts.sum() == 53 and counts.min() == 5 and counts.max() == 6


def test_few_labels_of_a_small_class_are_refused():
    labels = torch.tensor([0] * 50 + [1] * 2)
    with pytest.raises(ValueError, match="class 1, which has 2"):
        few_label_subset(labels, 10)
    with pytest.raises(ValueError, match="takes 0 pictures"):
        few_label_subset(labels, 1)


@pytest.mark.parametrize("config", [GRAY_VIT, RESNET], ids=["vit", "resnet"])
def test_gray_folds_to_rgb_exactly(config, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(config.__class__(**config.to_dict())).eval()
    gray = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        before = model(gray).logits
        folded = fold_gray_to_rgb(model)
        after = folded(gray.expand(-1, 3, -1, -1)).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    folded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("num_channels", 3) == 3
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(gray.expand(-1, 3, -1, -1)).logits, after)
    with pytest.raises(ValueError, match="takes 3 channels"):
        fold_gray_to_rgb(folded)
