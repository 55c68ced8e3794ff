"""One-shot classification: which of several classes, each known from one picture, does a query show?"""

import torch


def one_shot_accuracy(scores: torch.Tensor, references: torch.Tensor) -> dict[str, float]:
    """Share of the questions whose right class has the highest score.

    Args:
        scores: float (questions, ways), how well each query goes with the one picture of each class; higher is better.
            For distances hand over their negatives.
        references: int64 (questions,), the right class's place among the ways.

    Returns:
        "accuracy"; "standard_error" of it, over the questions; "chance", the accuracy of guessing. Where several
        classes share the highest score, one of them is guessed: the right one counts as that share of a hit.

    Raises:
        ValueError: for other shapes, references that are no place, or scores that are not finite.
    """
    if scores.ndim != 2 or references.shape != scores.shape[:1] or len(references) == 0:
        raise ValueError(
            f"`scores` has shape {tuple(scores.shape)} and `references` {tuple(references.shape)}; expected "
            "(questions, ways) and (questions,), one question at least."
        )
    questions, ways = scores.shape
    if references.min() < 0 or references.max() >= ways:
        raise ValueError(f"`references` holds {references.unique().tolist()}; expected places in 0 to {ways - 1}.")
    if not scores.isfinite().all():
        raise ValueError("`scores` holds values that are not finite: the right class cannot be ranked.")
    best = scores == scores.amax(dim=1, keepdim=True)
    hits = best[torch.arange(questions), references] / best.sum(dim=1).double()
    return {
        "accuracy": float(hits.mean()),
        "standard_error": float(hits.std(correction=0) / questions**0.5),
        "chance": 1 / ways,
    }
