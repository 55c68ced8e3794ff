"""Masks of coloured noise: spectra, clumps, counts, and that no place is preferred (ColorMAE's spec, section 11)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from hf_masked.processing.masks import color_mask
from hf_masked.processing.masks.color import COLORS, noise_bank
from hf_masked.randomness import given_draw, keyed_draw, sample_keys, torch_draw

SMALL = {"bank_size": 16, "field_size": 32}


def draw_for(batch: int, seed: int = 0):
    return keyed_draw(sample_keys(seed, 0, range(batch)))


def bank_of(color: str, bank_size: int = 64, field_size: int = 64, seed: int = 0) -> torch.Tensor:
    return noise_bank(color, 1.0, 0.5, 2.0, bank_size, field_size, seed, "cpu")


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(("grid", "ratio"), [((14, 14), 0.75), ((8, 8), 0.6), ((7, 14), 0.9), ((3, 5), 0.0)])
def test_count_is_exact(color, grid, ratio):
    masks = color_mask(draw_for(64), grid, ratio, color=color, **SMALL)
    units = grid[0] * grid[1]
    assert masks.dtype == torch.bool and masks.shape == (64, units)
    assert masks.sum(dim=1).unique().tolist() == [units - int(units * (1 - ratio))]


def power(color: str) -> torch.Tensor:
    """Mean periodogram of the fields below, in and above the middle band, each relative to white noise's."""
    fields = bank_of(color)
    spectrum = torch.fft.fft2(fields - fields.mean(dim=(1, 2), keepdim=True)).abs().square().mean(dim=0)
    frequency = torch.fft.fftfreq(64)
    radius = (frequency[:, None].square() + frequency[None, :].square()).sqrt()
    bands = [(radius > 0) & (radius < 0.06), (radius > 0.12) & (radius < 0.25), radius > 0.45]
    means = torch.stack([spectrum[band].mean() for band in bands])
    return means / means.sum()


def test_spectra_are_those_of_the_colours():
    low, middle, high = power("red")
    assert low > 2 * middle and middle > 10 * high
    low, middle, high = power("blue")
    assert high > 1.2 * middle and middle > 10 * low
    low, middle, high = power("green")
    assert middle > 3 * low and middle > 3 * high
    low, middle, high = power("purple")
    assert low > 5 * middle and high > 5 * middle


def visible_grids(color: str, batch: int = 2000) -> torch.Tensor:
    """float (batch, 14, 14), 1 = visible."""
    return (~color_mask(draw_for(batch), (14, 14), 0.75, color=color)).view(-1, 14, 14).float()


def neighbours(visible: torch.Tensor) -> float:
    """Mean number of visible ones among the four neighbours of a visible unit."""
    pairs = (visible[:, 1:] * visible[:, :-1]).sum() + (visible[:, :, 1:] * visible[:, :, :-1]).sum()
    return (2 * pairs / visible.sum()).item()


def test_clumps_are_those_of_the_colours():
    red, green, white, blue = (neighbours(visible_grids(color)) for color in ("red", "green", "white", "blue"))
    assert red > 1.3 * green and green > 1.3 * white and white > 1.3 * blue
    # Of 2 * 13 * 14 pairs of neighbours, each is visible with probability 49 * 48 / (196 * 195).
    assert white == pytest.approx(2 * 2 * 13 * 14 * 48 / (196 * 195), rel=0.03)


def largest_cluster(visible: torch.Tensor) -> float:
    """Mean size of the largest connected cluster: labels spread to neighbours until nothing changes."""
    labels = torch.arange(1, 197).view(1, 14, 14) * visible
    cross = torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()
    while True:
        patches = F.unfold(labels.unsqueeze(1), 3, padding=1)[:, cross.flatten()]
        spread = patches.amax(dim=1).view_as(labels) * visible
        if torch.equal(spread, labels):
            break
        labels = spread
    sizes = F.one_hot(labels.long().flatten(1), 197).sum(dim=1)[:, 1:]
    return sizes.amax(dim=1).float().mean().item()


def test_greens_clusters_are_smaller_than_reds():
    assert largest_cluster(visible_grids("green", 200)) < 0.7 * largest_cluster(visible_grids("red", 200))


@pytest.mark.parametrize("color", COLORS)
def test_every_place_is_visible_as_often(color):
    frequency = visible_grids(color, 10_000).mean(dim=0)
    assert (frequency - 0.25).abs().max() < 0.02


@pytest.mark.parametrize("color", COLORS)
def test_masks_follow_from_their_keys(color):
    masks = color_mask(draw_for(200), (14, 14), 0.75, color=color)
    assert masks.unique(dim=0).shape[0] >= 199
    assert torch.equal(color_mask(draw_for(200), (14, 14), 0.75, color=color), masks)
    assert not torch.equal(color_mask(draw_for(200, seed=1), (14, 14), 0.75, color=color), masks)
    keys = sample_keys(0, 0, [42, 7])
    assert torch.equal(color_mask(keyed_draw(keys), (14, 14), 0.75, color=color), masks[[42, 7]])


def test_the_largest_values_of_the_window_stay_visible():
    bank = noise_bank("green", 1.0, 0.5, 2.0, *SMALL.values(), 0, "cpu")
    # Field 5, from row 30 on, which goes round, and from column 2 on; up side down.
    numbers = torch.tensor([[5.5 / 16, 30.5 / 32, 2.5 / 32, 0.1, 0.9]])
    mask = color_mask(given_draw(numbers), (4, 6), 0.75, **SMALL)
    window = torch.stack([bank[5, row, 2:8] for row in (1, 0, 31, 30)]).flatten()
    assert (~mask[0]).nonzero().flatten().tolist() == window.topk(6).indices.sort().values.tolist()


def test_bank_is_made_once_and_depends_on_its_seed():
    bank = bank_of("green", 16, 32)
    assert bank_of("green", 16, 32) is bank
    assert bank.shape == (16, 32, 32) and bank.dtype == torch.float32
    assert (bank.amin(dim=(1, 2)) == 0).all() and (bank.amax(dim=(1, 2)) == 1).all()
    assert not torch.equal(bank_of("green", 16, 32, seed=1), bank)
    assert torch.equal(bank_of("green", 4, 32), bank[:4]), "a field does not depend on how many there are"


def test_compiled_graphs_hold_the_bank_and_do_not_filter():
    counter = CompileCounter()
    compiled = torch.compile(lambda: color_mask(torch_draw(4), (8, 8), 0.75, **SMALL), backend=counter, fullgraph=True)
    for _ in range(3):
        assert (compiled().sum(dim=1) == 48).all()
    noise_bank.cache_clear()
    compiled()
    assert counter.frame_count == 1 and noise_bank.cache_info().misses == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"color": "pink"}, ["'pink'", "green"]),
        ({"sigma_low": 3.0}, ["sigma_low=3.0", "sigma_high=2.0"]),
        ({"sigma": 0.0}, ["sigma=0.0", "positive"]),
        ({"field_size": 8}, ["10 x 4", "8 x 8", "10 or more"]),
    ],
)
def test_options_that_do_not_fit_say_so(options, words):
    with pytest.raises(ValueError) as error:
        color_mask(draw_for(1), (10, 4), 0.5, **options)
    assert all(word in str(error.value) for word in words), error.value
