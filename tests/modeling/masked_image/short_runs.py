"""Seconds of training on Fashion-MNIST, for the slow tests of what a method learns."""

import torch

from hf_masked import MaskedImageProcessor
from hf_masked.data import labelled_tensors, load_images
from hf_masked.evaluation.knn import weighted_knn

PROCESSOR = MaskedImageProcessor(size=32, num_channels=1, image_mean=0.286, image_std=0.353, crop_fraction=1.0)


def fashion(train: int, test: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two splits, each normalised pictures of 32 pixels and labels."""
    splits = []
    for split, limit in (("train", train), ("test", test)):
        images, labels = labelled_tensors(load_images("fashion_mnist", split), PROCESSOR, limit=limit)
        splits.append((PROCESSOR.finish(images)["pixel_values"], labels))
    return splits


def pretrain(model, pictures: torch.Tensor, steps: int, batch: int = 64, learning_rate: float = 1e-3):
    """AdamW with a cosine on random batches; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        model(pictures[chosen], generator=generator).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def knn(model, splits, layer: int = -1) -> float:
    """kNN accuracy of the mean of the patch tokens after a layer, counted as `hidden_states` are."""
    features = []
    for pictures, labels in splits:
        hidden = [
            model.backbone(part, output_hidden_states=True).hidden_states[layer][:, 1:].mean(dim=1)
            for part in pictures.split(256)
        ]
        features += [torch.cat(hidden), labels]
    return weighted_knn(*features)
