"""Accuracy after fine-tuning with a few labels, as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.finetune import few_label_subset, finetune

_INPUTS = """Args:
    images: the test pictures, uint8 (channels, height, width).
    references: their classes, from 0.
    encoder: a checkpoint (folder or Hub id), a stock transformers encoder, or its config for training from scratch.
    train_images: uint8 (n, channels, height, width), of which a balanced subset is used.
    train_labels: int64 (n,).
    share_or_count: a share of the labels (float), or their number (int).
    seed: of the subset and of training.
    options: further arguments of `hf_masked.evaluation.finetune.finetune`.
Returns:
    accuracy, labels, steps, seconds."""


class FewLabelAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of an encoder that is fine-tuned with a balanced few of the labels.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "images": datasets.Sequence(datasets.Sequence(datasets.Sequence(datasets.Value("uint8")))),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(
        self, images, references, encoder, train_images, train_labels, share_or_count=0.01, seed=0, **options
    ):
        chosen = few_label_subset(train_labels, share_or_count, seed)
        images, references = torch.tensor(images, dtype=torch.uint8), torch.tensor(references)
        return finetune(encoder, train_images[chosen], train_labels[chosen], images, references, seed=seed, **options)
