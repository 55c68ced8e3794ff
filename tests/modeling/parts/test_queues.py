"""The queue of keys. What it holds with several processes, `test_contrast_of_two.py` shows."""

import pytest
import torch
from torch.nn import functional as F

from hf_masked.modeling.parts.queues import FeatureQueue


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_begins_with_random_unit_vectors():
    queue = FeatureQueue(64, 4)
    torch.testing.assert_close(queue.vectors.norm(dim=1), torch.ones(64))
    assert effective_spread(queue.vectors) and queue.pointer == 0
    assert not list(queue.parameters()) and queue.state_dict().keys() == {"vectors", "pointer"}


def effective_spread(vectors: torch.Tensor) -> bool:
    return bool((vectors.std(dim=0) > 0.3).all())


@pytest.mark.parametrize("batch", [1, 4, 6, 12])
def test_first_in_first_out(batch):
    """Written as a list: after ceil(K / B) steps all rows are new, in their order, and the pointer wraps."""
    queue = FeatureQueue(12, 4)
    expected = list(queue.vectors.clone())
    for step in range(2 * 12 // batch + 1):
        queue.enqueue(keys(batch, step))
        expected = expected[batch:] + list(keys(batch, step))
        oldest_first = queue.vectors.roll(-int(queue.pointer), dims=0)
        assert torch.equal(oldest_first, torch.stack(expected))
        assert queue.pointer == batch * (step + 1) % 12


def test_what_was_read_stays_as_it_was_for_the_backward_pass():
    queue, query = FeatureQueue(8, 4), keys(2, 1).requires_grad_()
    read = queue()
    before = read.clone()
    logits = query @ read.T
    queue.enqueue(keys(8))
    assert torch.equal(read, before) and not torch.equal(queue(), before)
    logits.sum().backward()
    torch.testing.assert_close(query.grad, before.sum(dim=0).expand(2, -1))


def test_saved_and_restored_in_the_middle():
    queue, other = FeatureQueue(12, 4), FeatureQueue(12, 4)
    queue.enqueue(keys(4))
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(keys(4, 1))
    assert torch.equal(queue.vectors, other.vectors) and other.pointer == 8


@pytest.mark.parametrize(("batch", "remedy"), [(5, "choose 10"), (24, "choose 24")])
def test_a_batch_that_does_not_divide_is_named(batch, remedy):
    with pytest.raises(ValueError, match=f"queue_size is 12; .*here {batch}: {remedy}"):
        FeatureQueue(12, 4).enqueue(keys(batch))
