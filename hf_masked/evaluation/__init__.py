"""Judging encoders: kNN, linear probes, fine-tuning, diagnostics; for any transformers encoder."""

from hf_masked.evaluation.metrics import METRICS, load_metric

__all__ = ["METRICS", "load_metric"]
