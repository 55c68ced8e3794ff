"""The contrastive losses against plain loops, and against google-research/simclr's `objective.py` in numpy."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_masked.modeling.parts.losses import info_nce, nt_xent


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_is_the_papers_written_as_a_loop():
    q, k, queue = unit(5, 8), unit(5, 8, seed=1), unit(12, 8, seed=2)
    loss, logits = info_nce(q, k, queue, 0.2)
    by_hand = []
    for query, key in zip(q, k, strict=True):
        positive = math.exp(query @ key / 0.2)
        by_hand.append(-math.log(positive / (positive + sum(math.exp(query @ other / 0.2) for other in queue))))
    assert loss.item() == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert logits.shape == (5, 13)
    torch.testing.assert_close(logits[:, 0], (q * k).sum(dim=1) / 0.2)


def naive_nt_xent(first, second, temperature: float) -> float:
    """SimCLR's algorithm 1: the mean over 2 N views of the loss of each."""
    views = [*first, *second]
    n, losses = len(first), []
    for i, view in enumerate(views):
        scores = {j: math.exp(view @ other / temperature) for j, other in enumerate(views) if j != i}
        losses.append(-math.log(scores[(i + n) % (2 * n)] / sum(scores.values())))
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_twice_the_mean_of_a_double_loop(temperature):
    """Section 11: equals the 2N-mean times 2, and matches a naive double loop."""
    first, second = unit(6, 8), unit(6, 8, seed=1)
    loss, _ = nt_xent(first, second, temperature)
    assert loss.item() == pytest.approx(2 * naive_nt_xent(first.double(), second.double(), temperature), rel=1e-5)


def objective(hidden: np.ndarray, temperature: float) -> tuple[float, np.ndarray]:
    """`add_contrastive_loss` on one replica: views concatenated, self-similarities lowered by 1e9."""
    hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
    a, b = np.split(hidden, 2)
    n = len(a)
    lowered = 1e9 * np.eye(n)
    ab, ba = a @ b.T / temperature, b @ a.T / temperature
    aa, bb = a @ a.T / temperature - lowered, b @ b.T / temperature - lowered

    def cross_entropy(logits):
        top = logits.max(axis=1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        return (log_sum - logits[np.arange(n), np.arange(n)]).mean()

    return cross_entropy(np.concatenate([ab, aa], 1)) + cross_entropy(np.concatenate([ba, bb], 1)), ab


def test_nt_xent_is_the_objective_of_the_reference():
    hidden = np.random.default_rng(0).normal(size=(16, 8))
    first, second = F.normalize(torch.from_numpy(hidden).float(), dim=1).chunk(2)
    loss, logits = nt_xent(first, second, 0.1)
    expected, expected_logits = objective(hidden, 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(logits.numpy(), expected_logits, rtol=1e-4, atol=1e-5)


def test_nt_xent_of_identical_separated_views_tends_to_zero():
    """Section 11: identical views of one-hot features, as the temperature falls."""
    views = torch.eye(8)
    losses = [nt_xent(views, views, temperature)[0].item() for temperature in (1.0, 0.3, 0.1, 0.05)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 1 and losses[-1] < 1e-6


def test_nt_xent_with_anchors_of_its_own():
    """An anchor is compared with what its view is compared with, and not with that view."""
    first, second, anchors = unit(6, 8), unit(6, 8, seed=1), (unit(6, 8, seed=2), unit(6, 8, seed=3))
    loss, _ = nt_xent(first, second, 0.2, anchors)
    by_hand = 0.0
    for anchor, own, other in ((anchors[0], first, second), (anchors[1], second, first)):
        for i in range(6):
            views = [*other, *(view for j, view in enumerate(own) if j != i)]
            scores = torch.stack([anchor[i] @ view / 0.2 for view in views])
            by_hand += F.cross_entropy(scores, torch.tensor(i)).item() / 6
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    plain, _ = nt_xent(first, second, 0.2)
    torch.testing.assert_close(nt_xent(first, second, 0.2, (first, second))[0], plain)


def test_losses_are_single_precision_under_autocast():
    first, second = unit(6, 64), unit(6, 64, seed=1)
    expected = nt_xent(first, second, 0.1)[0], info_nce(first, second, unit(9, 64, seed=2), 0.1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nt_xent(first, second, 0.1)[0], info_nce(first, second, unit(9, 64, seed=2), 0.1)[0]
    assert found == expected


def test_one_picture_alone_has_no_negatives():
    view = unit(1, 8).requires_grad_()
    loss, _ = nt_xent(view, unit(1, 8, seed=1), 0.1)
    loss.backward()
    assert loss == 0 and (view.grad == 0).all()
