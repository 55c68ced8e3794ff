"""One-shot accuracy as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.one_shot import one_shot_accuracy

_CITATION = """@article{lake2015human,
  title={Human-level concept learning through probabilistic program induction},
  author={Lake, Brenden M. and Salakhutdinov, Ruslan and Tenenbaum, Joshua B.},
  journal={Science}, year={2015}}"""

_INPUTS = """Args:
    predictions: for each question, the scores of its classes; higher is better.
    references: place of the right class.
Returns:
    accuracy: share of the questions whose right class has the highest score; ties count in part.
    standard_error: of the accuracy, over the questions.
    chance: the accuracy of guessing."""


class OneShotAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy of N-way one-shot classification by scores of query and support pictures.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return one_shot_accuracy(torch.tensor(predictions), torch.tensor(references))
