"""Weighted nearest-neighbour accuracy as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.knn import weighted_knn

_CITATION = """@inproceedings{wu2018unsupervised,
  title={Unsupervised Feature Learning via Non-Parametric Instance Discrimination},
  author={Wu, Zhirong and Xiong, Yuanjun and Yu, Stella X. and Lin, Dahua},
  booktitle={CVPR}, year={2018}}"""

_INPUTS = """Args:
    features: float vectors of the test pictures.
    references: their classes, from 0.
    train_features, train_labels: the same of the pictures that vote.
    k: number of neighbours.
    temperature: votes weigh exp(cosine similarity / temperature).
Returns:
    accuracy: share of the test pictures whose class got the most votes."""


class KNNAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of a weighted nearest-neighbour classifier on frozen features.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"features": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, features, references, train_features, train_labels, k=20, temperature=0.07):
        train_features, train_labels = torch.as_tensor(train_features), torch.as_tensor(train_labels)
        accuracy = weighted_knn(
            train_features, train_labels, torch.tensor(features), torch.tensor(references), k, temperature
        )
        return {"accuracy": accuracy}
