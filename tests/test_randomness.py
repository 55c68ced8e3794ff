"""Keyed draws: a sample's numbers follow from its keys alone, and look random."""

import pytest
import torch

from hf_masked.randomness import _mix, given_draw, keyed_draw, model_draw, sample_keys, torch_draw

WORD = 1 << 64


def splitmix_finalizer(value: int) -> int:
    """SplitMix64's finalizer on Python's integers."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % WORD
    return value ^ (value >> 31)


def numbers_of(n: int = 8, samples=range(1000), seed: int = 0, epoch: int = 0, **keys) -> torch.Tensor:
    return keyed_draw(sample_keys(seed, epoch, samples, **keys))(n)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].item()


def test_mix_is_the_finalizer_of_splitmix64():
    values = [0, 1, 2, 0x9E3779B97F4A7C15, WORD // 2, WORD - 1, 0x0123456789ABCDEF]
    signed = torch.tensor([value - WORD if value >= WORD // 2 else value for value in values])
    assert [value % WORD for value in _mix(signed).tolist()] == [splitmix_finalizer(value) for value in values]


def test_stream_is_splitmix64_started_at_the_key():
    key, gamma = 12345, 0x9E3779B97F4A7C15
    expected = [(splitmix_finalizer((key + i * gamma) % WORD) >> 40) / 2**24 for i in range(1, 6)]
    assert keyed_draw(torch.tensor([key]))(5).tolist() == [expected]


def test_stream_has_not_changed():
    """Seeded runs of earlier versions must come out the same."""
    draw = keyed_draw(sample_keys(7, torch.tensor([0, 3]), [11, 12], view=1, purpose=2))
    assert draw(3).tolist() == [
        [0.4631187319755554, 0.9657306671142578, 0.18940377235412598],
        [0.3186861276626587, 0.5190209746360779, 0.7754750847816467],
    ]


def test_numbers_are_uniform():
    numbers = numbers_of(1000)
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    # chi-squared with 99 degrees of freedom: mean 99, standard deviation 14
    assert ((counts - 10_000).square() / 10_000).sum() < 99 + 5 * 14


@pytest.mark.parametrize("seed", [0, 1, 123_456_789])
def test_consecutive_samples_and_numbers_are_uncorrelated(seed):
    numbers = numbers_of(100, range(2000), seed=seed)  # standard error of each correlation: 0.0022
    assert abs(correlation(numbers[1:], numbers[:-1])) < 0.012
    assert abs(correlation(numbers[:, 1:], numbers[:, :-1])) < 0.012
    assert abs(correlation(numbers[1:, 1:], numbers[:-1, :-1])) < 0.012


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"purpose": 1}])
def test_each_key_changes_all_numbers(change):
    first, second = numbers_of(100), numbers_of(100, **change)
    assert (first == second).float().mean() < 1e-4
    assert abs(correlation(first, second)) < 0.016  # five standard errors


def test_keys_do_not_trade_places():
    """Epoch 1 of view 0 is not epoch 0 of view 1, and so on."""
    keys = [
        sample_keys(seed, epoch, range(20), view, purpose)
        for seed in range(4)
        for epoch in range(4)
        for view in range(4)
        for purpose in range(4)
    ]
    assert torch.cat(keys).unique().numel() == 4**4 * 20


def test_batch_and_order_do_not_matter():
    whole = numbers_of(samples=[5, 6, 7, 8])
    assert torch.equal(numbers_of(samples=[8, 5]), whole[[3, 0]])
    assert torch.equal(numbers_of(samples=torch.tensor([6])), whole[1:2])


def test_two_calls_continue_one_stream():
    draw, whole = keyed_draw(sample_keys(0, 0, range(4))), numbers_of(8, range(4))
    assert torch.equal(torch.cat([draw(3), draw(5)], dim=1), whole)


def test_epochs_may_differ_within_a_batch():
    mixed = sample_keys(3, torch.tensor([0, 1]), [9, 9])
    assert mixed.tolist() == [sample_keys(3, epoch, [9]).item() for epoch in (0, 1)]


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 + 5, 10**30])
def test_any_integer_is_a_seed(seed):
    assert torch.equal(numbers_of(seed=seed), numbers_of(seed=seed % WORD))


def test_torch_draw_follows_its_generator():
    first, second = (torch_draw(2, generator=torch.Generator().manual_seed(1))(3) for _ in range(2))
    assert torch.equal(first, second)


def test_model_draw_repeats_itself_in_eval_only():
    assert torch.equal(model_draw(2, "cpu", training=False)(3), model_draw(2, "cpu", training=False)(3))
    assert not torch.equal(model_draw(2, "cpu", training=True)(3), model_draw(2, "cpu", training=True)(3))
    generator = torch.Generator().manual_seed(1)
    first, second = (model_draw(2, "cpu", training=False, generator=generator)(3) for _ in range(2))
    assert not torch.equal(first, second)


def test_given_draw_hands_out_its_columns_and_no_more():
    noise = torch.rand(2, 5)
    draw = given_draw(noise)
    assert torch.equal(torch.cat([draw(2), draw(3)], dim=1), noise)
    with pytest.raises(ValueError, match=r"shape \(2, 5\).*\(2, 6\)"):
        draw(1)
