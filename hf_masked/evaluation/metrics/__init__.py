"""The evaluations of this package as modules of the `evaluate` library, loaded from the package without a network."""

from pathlib import Path

METRICS = (
    "knn_accuracy",
    "linear_probe_accuracy",
    "few_label_accuracy",
    "retrieval",
    "label_propagation",
    "one_shot_accuracy",
    "stereo",
)


def load_metric(name: str, **kwargs):
    """An `evaluate.EvaluationModule` of this package.

    Args:
        name: one of `METRICS`.
        kwargs: of `evaluate.load`.

    Raises:
        ValueError: for another name.
    """
    import evaluate

    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}; known are {', '.join(METRICS)}.")
    return evaluate.load(str(Path(__file__).parent / f"{name}.py"), **kwargs)
