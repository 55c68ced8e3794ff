"""J and F of propagated masks as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.label_propagation import segmentation_measures

_CITATION = """@inproceedings{perazzi2016benchmark,
  title={A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation},
  author={Perazzi, Federico and Pont-Tuset, Jordi and McWilliams, Brian and Van Gool, Luc and Gross, Markus and
    Sorkine-Hornung, Alexander},
  booktitle={CVPR}, year={2016}}"""

_INPUTS = """Args:
    predictions: masks, one a frame: rows of labels, 0 for the background.
    references: likewise; leave out a clip's first frame, which is given.
Returns:
    j: intersection over union, the mean over objects and frames.
    f: harmonic mean of precision and recall of the contours, likewise.
    j_and_f: their mean."""


class LabelPropagation(evaluate.Metric):
    def _info(self):
        mask = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="How well masks that were propagated from frame to frame fit the true ones.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": mask, "references": mask}),
        )

    def _compute(self, predictions, references):
        return segmentation_measures(torch.tensor(predictions), torch.tensor(references))
