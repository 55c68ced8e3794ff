"""One-shot classification: which of several classes, each known from one picture, does a query show?"""

import torch
from torch.nn import functional as F


def one_shot_questions(
    features: torch.Tensor, labels: torch.Tensor, ways: int = 20, questions: int = 1000, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Questions for `one_shot_accuracy` from the features of any encoder, scored by cosine similarity.

    A question draws so many classes, one picture of each, and as the query another picture of one of them.

    Args:
        features: float (n, width).
        labels: int64 (n,), their classes.
        ways: classes per question.
        questions: how many.
        seed: of the draws.

    Returns:
        scores: float32 (questions, ways); references: int64 (questions,), the right class's place.

    Raises:
        ValueError: where fewer classes than `ways` have two pictures.
    """
    classes, counts = labels.unique(return_counts=True)
    classes = classes[counts > 1]
    if not 2 <= ways <= len(classes):
        raise ValueError(f"ways is {ways}; {len(classes)} classes have two pictures or more: choose 2 to that number.")
    members = [(labels == label).nonzero().flatten() for label in classes]
    generator = torch.Generator().manual_seed(seed)
    features = F.normalize(features.float(), dim=1)
    scores, references = torch.empty(questions, ways), torch.empty(questions, dtype=torch.int64)
    for question in range(questions):
        chosen = torch.randperm(len(classes), generator=generator)[:ways].tolist()
        asked = int(torch.randint(ways, (), generator=generator))
        # Two of each class, in random order: the first is shown, the asked class's second is the query.
        drawn = [members[c][torch.randperm(len(members[c]), generator=generator)[:2]] for c in chosen]
        shown = torch.stack([pair[0] for pair in drawn])
        scores[question] = features[shown] @ features[drawn[asked][1]]
        references[question] = asked
    return scores, references


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
