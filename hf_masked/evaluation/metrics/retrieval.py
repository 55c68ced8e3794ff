"""Recall@k and mean average precision as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.retrieval import retrieval

_CITATION = """@article{jegou2011product,
  title={Product Quantization for Nearest Neighbor Search},
  author={J{\\'e}gou, Herv{\\'e} and Douze, Matthijs and Schmid, Cordelia},
  journal={TPAMI}, year={2011}}"""

_INPUTS = """Args:
    features: float vectors of the queries.
    references: their classes.
    gallery_features, gallery_labels: the same of the pictures that are ranked; by default the queries themselves.
    ks: numbers of neighbours.
Returns:
    recall@k: share of the queries with a picture of their class among the k nearest, for each of `ks`.
    mean_average_precision: mean over the queries of the precision at the ranks of their class."""


class Retrieval(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Retrieval of pictures of the same class by the cosine similarity of their features.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"features": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, features, references, gallery_features=None, gallery_labels=None, ks=(1, 5, 10)):
        gallery = [None if part is None else torch.as_tensor(part) for part in (gallery_features, gallery_labels)]
        return retrieval(torch.tensor(features), torch.tensor(references), *gallery, ks)
