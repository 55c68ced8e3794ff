"""Linear-probe accuracy as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.linear_probe import linear_probe

_CITATION = """@inproceedings{he2022masked,
  title={Masked Autoencoders Are Scalable Vision Learners},
  author={He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle={CVPR}, year={2022}}"""

_INPUTS = """Args:
    features: float vectors of the test pictures.
    references: their classes, from 0.
    train_features, train_labels: the same of the pictures that the probe is trained on.
    head: "batchnorm" (MAE's, trained until it has converged), "reference" (MAE's, with its program's settings) or
        "logistic" (scikit-learn's logistic regression).
    seed: of initial weights and order.
    options: further arguments of the head.
Returns:
    accuracy, train_accuracy: shares of the pictures."""


class LinearProbeAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of a linear classifier that is trained on frozen features.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"features": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, features, references, train_features, train_labels, head="batchnorm", seed=0, **options):
        train_features, train_labels = torch.as_tensor(train_features), torch.as_tensor(train_labels)
        features, references = torch.tensor(features), torch.tensor(references)
        return linear_probe(train_features, train_labels, features, references, head, seed, **options)
