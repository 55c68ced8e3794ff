"""Tiny stock classifiers of 32 x 32 pictures, and batches for them."""

import torch
from transformers import (
    BertConfig,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.models.auto import AutoModelForImageClassification, AutoModelForSequenceClassification

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
CONFIGS = {
    "vit": lambda: ViTConfig(**VIT),
    "deit": lambda: DeiTConfig(**VIT),
    "dinov2": lambda: Dinov2Config(**VIT, drop_path_rate=0.0),
    "swin": lambda: SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, drop_path_rate=0.0
    ),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
}
CLASSES = 3


def classifier(kind: str, seed: int = 0, **settings) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = CONFIGS[kind]()
    for name, value in {"num_labels": CLASSES, "architectures": [], **settings}.items():
        setattr(config, name, value)
    return AutoModelForImageClassification.from_config(config).train()


def text_classifier(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return AutoModelForSequenceClassification.from_config(config).train()


def batch(size: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "labels": torch.arange(size) % CLASSES,
    }


def samples(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    whole = batch(count, seed)
    return [{name: values[i] for name, values in whole.items()} for i in range(count)]
