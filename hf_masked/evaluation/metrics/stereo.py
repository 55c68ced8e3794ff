"""Errors of disparities as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from hf_masked.evaluation.stereo import stereo_errors

_CITATION = """@inproceedings{menze2015object,
  title={Object Scene Flow for Autonomous Vehicles},
  author={Menze, Moritz and Geiger, Andreas},
  booktitle={CVPR}, year={2015}}"""

_INPUTS = """Args:
    predictions: disparities in pixels, a map of rows for each pair.
    references: the true ones, 0 = unknown.
    max_disparity: truths of this and more are left out.
Returns:
    end_point_error: mean absolute error in pixels over all valid pixels of all pairs.
    bad_pixel_rate: share of them that are off by more than 3 pixels.
    d1_error: share of them that are off by more than 3 pixels and by more than 5 % of the truth."""


class Stereo(evaluate.Metric):
    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
        return evaluate.MetricInfo(
            description="Errors of stereo matching: end-point error, 3-pixel error, KITTI 2015's D1.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(self, predictions, references, max_disparity=None):
        found, truth = (
            torch.cat([torch.as_tensor(pair).flatten() for pair in maps]) for maps in (predictions, references)
        )
        return stereo_errors(found, truth, max_disparity)
