import math

import pytest
import torch

from hf_masked.evaluation.diagnostics import effective_rank, feature_spread
from hf_masked.evaluation.knn import weighted_knn
from hf_masked.evaluation.linear_probe import linear_probe


def test_knn_against_a_hand_computed_vote():
    # Cosine similarities of the test vector (1, 0) with the four training vectors: 1, 0.8, 0.8, 0.6.
    train = torch.tensor([[2.0, 0.0], [0.8, 0.6], [4.0, -3.0], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1, 1])
    test = torch.tensor([[3.0, 0.0]])
    # Class 1 wins with 2 exp(0.8 / T) > exp(1 / T), that is for T > 0.2 / log 2 = 0.2885.
    accuracies = [weighted_knn(train, labels, test, torch.tensor([1]), k=3, temperature=t) for t in (0.28, 0.3)]
    assert accuracies == [0.0, 1.0]
    # With all four, class 1 has 2 exp(0.8 / T) + exp(0.6 / T).
    limit = 0.2 / math.log(1 + math.sqrt(2))
    accuracies = [
        weighted_knn(train, labels, test, torch.tensor([1]), k=4, temperature=limit + d) for d in (-0.01, 0.01)
    ]
    assert accuracies == [0.0, 1.0]
    assert weighted_knn(train, labels, test, torch.tensor([0]), k=1) == 1.0


def test_knn_does_not_depend_on_the_chunk():
    generator = torch.Generator().manual_seed(0)
    train, test = torch.randn(60, 4, generator=generator), torch.randn(31, 4, generator=generator)
    labels, test_labels = (torch.randint(3, (n,), generator=generator) for n in (60, 31))
    assert len({weighted_knn(train, labels, test, test_labels, k=5, chunk_size=size) for size in (7, 31, 512)}) == 1


def test_knn_refuses_too_many_neighbours():
    with pytest.raises(ValueError, match="k is 20"):
        weighted_knn(torch.ones(3, 2), torch.zeros(3).long(), torch.ones(1, 2), torch.zeros(1).long())


def clusters(generator, count, noise):
    centres = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    labels = torch.randint(3, (count,), generator=generator)
    return centres[labels] * 100 + 50 + noise * 100 * torch.randn(count, 4, generator=generator), labels


@pytest.mark.parametrize(("head", "options"), [("batchnorm", {"steps": 300, "batch_size": 64}), ("logistic", {})])
def test_linear_probe_separates_what_is_separable(head, options):
    generator = torch.Generator().manual_seed(0)
    train, test = clusters(generator, 300, 0.1), clusters(generator, 100, 0.1)
    first = linear_probe(*train, *test, head=head, **options)
    assert first["accuracy"] >= 0.98 and first["train_accuracy"] >= 0.98
    assert linear_probe(*train, *test, head=head, **options) == first
    noise = torch.randn(300, 4, generator=generator), torch.randn(100, 4, generator=generator)
    by_chance = linear_probe(noise[0], train[1], noise[1], test[1], head=head, **options)
    assert by_chance["accuracy"] < 0.6


def test_reference_head_has_the_settings_of_maes_program():
    """`main_linprobe.py`: 90 epochs, 10 of them warm-up, learning rate 0.1 x batch / 256."""
    generator = torch.Generator().manual_seed(0)
    train, test = clusters(generator, 300, 0.5), clusters(generator, 100, 0.5)
    settings = {"steps": 90 * 4, "warmup": 10 / 90, "batch_size": 64, "learning_rate": 0.1 * 64 / 256}
    assert linear_probe(*train, *test, head="reference", batch_size=64) == linear_probe(*train, *test, **settings)


def test_batch_norm_head_draws_from_its_seed_only():
    train = clusters(torch.Generator().manual_seed(0), 60, 1.0)
    state = torch.get_rng_state()
    linear_probe(*train, *train, steps=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_linear_probe_knows_its_heads():
    with pytest.raises(ValueError, match="batchnorm, reference, logistic"):
        linear_probe(torch.ones(2, 2), torch.zeros(2), torch.ones(2, 2), torch.zeros(2), head="mlp")


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(4000, 16, generator=generator)
    assert effective_rank(isotropic) == pytest.approx(16, rel=0.01)
    assert effective_rank(isotropic[:, :1] * torch.randn(1, 16, generator=generator)) == pytest.approx(1, abs=1e-3)
    # Singular values 3 and 1: exp(-(3/4 log 3/4 + 1/4 log 1/4)).
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(1.7548, abs=1e-3)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-3)


def test_feature_spread():
    generator = torch.Generator().manual_seed(0)
    assert feature_spread(torch.randn(4000, 16, generator=generator)) == pytest.approx(1, abs=0.02)
    assert feature_spread(torch.randn(1, 16, generator=generator).expand(8, -1)) == pytest.approx(0, abs=1e-6)
