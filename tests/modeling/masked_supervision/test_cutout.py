"""Cutout against its reference, and every check of its spec (section 11)."""

import json
from pathlib import Path

import pytest
import torch

from hf_masked import Cutout, CutoutConfig
from hf_masked.modeling.masked_supervision.cutout import cutout_mask
from hf_masked.randomness import keyed_draw, sample_keys
from tests.parity.fill import filled_pixels

PARITY = json.loads((Path(__file__).parents[2] / "parity" / "cutout.json").read_text())["runs"]


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return sample_keys(seed, 0, torch.arange(count))


@pytest.mark.parametrize("name", PARITY)
def test_same_squares_as_the_reference(name):
    run = PARITY[name]
    size = run["height"], run["width"]
    # Numbers whose whole part, scaled to the side, is the reference's centre.
    numbers = [(torch.tensor(hole) + 0.5) / torch.tensor(size) for hole in zip(*run["centres"], strict=True)]
    answers = iter([torch.zeros(len(run["centres"]), 1), *numbers])
    config = CutoutConfig(length=run["length"], num_holes=run["num_holes"])
    removed = cutout_mask(lambda n: next(answers), size, config)
    expected = torch.tensor([[[int(bit) for bit in row] for row in picture] for picture in run["removed"]]).bool()
    assert torch.equal(removed, expected)
    pixels = filled_pixels((len(removed), 3, *size), f"{name}.pixels")
    cut = pixels.masked_fill(removed.unsqueeze(1), 0.0)
    assert cut.double().sum(dim=(1, 2, 3)).tolist() == pytest.approx(run["sums"], rel=1e-6)


@pytest.mark.parametrize(("side", "length"), [(32, 16), (32, 8), (32, 20), (28, 14)])
def test_removed_area_is_the_formulas(side, length):
    removed = cutout_mask(keyed_draw(keys(20_000)), (side, side), CutoutConfig(length=length))
    area = removed.sum(dim=(1, 2)).float()
    assert area.mean() == pytest.approx((length - length**2 / (4 * side)) ** 2, rel=0.01)
    assert area.min() == (length // 2) ** 2 and area.max() == length**2


def test_what_is_removed_is_a_rectangle_of_all_channels_and_the_rest_stays():
    pixels = torch.randn(50, 3, 20, 31)
    before = pixels.clone()
    cut, removed = Cutout(CutoutConfig(length=8, fill_value=-2.0))(pixels, keys(50))
    assert torch.equal(pixels, before)
    assert torch.equal(cut, torch.where(removed.unsqueeze(1), torch.tensor(-2.0), pixels))
    rows, columns = removed.any(dim=2), removed.any(dim=1)
    assert torch.equal(removed, rows.unsqueeze(2) & columns.unsqueeze(1))
    for side in (rows, columns):
        assert ((side.int().diff(dim=1) == 1).sum(dim=1) <= 1).all() and side.sum(dim=1).max() <= 8
    assert len({picture.numpy().tobytes() for picture in removed}) > 25


@pytest.mark.parametrize(("settings", "share"), [({"length": 0}, 0), ({"probability": 0.0}, 0), ({"length": 64}, 1)])
def test_limits(settings, share):
    assert cutout_mask(keyed_draw(keys(9)), (32, 32), CutoutConfig(**settings)).float().mean() == share


def test_probability_and_holes():
    some = cutout_mask(keyed_draw(keys(2000)), (32, 32), CutoutConfig(length=8, probability=0.3))
    assert some.any(dim=(1, 2)).float().mean() == pytest.approx(0.3, abs=0.04)
    one, three = (
        cutout_mask(keyed_draw(keys(500)), (32, 32), CutoutConfig(length=8, num_holes=n)).float().mean()
        for n in (1, 3)
    )
    assert 2 * one < three < 3 * one, "squares overlap now and then"


def test_squares_follow_their_keys():
    config = CutoutConfig(length=8)
    first = cutout_mask(keyed_draw(keys(8)), (32, 32), config)
    assert torch.equal(first, cutout_mask(keyed_draw(keys(8)), (32, 32), config))
    assert torch.equal(first[3:4], cutout_mask(keyed_draw(keys(8)[3:4]), (32, 32), config)), "not of the batch"
    assert not torch.equal(first, cutout_mask(keyed_draw(keys(8, seed=1)), (32, 32), config))


def test_the_border_is_removed_less_often():
    length, side = 8, 32
    removed = cutout_mask(keyed_draw(keys(40_000)), (side, side), CutoutConfig(length=length))
    # Along one axis: whether the row is touched at all.
    share = removed.any(dim=2).float().mean(dim=0)
    central = length / side
    assert share[16] == pytest.approx(central, rel=0.05)
    assert share[0] == pytest.approx(central * (length / 2 + 1) / length, rel=0.05)
    assert share[-1] == pytest.approx(central / 2, rel=0.05)
    inside = cutout_mask(keyed_draw(keys(20_000)), (side, side), CutoutConfig(length=length, contained=True))
    assert (inside.sum(dim=(1, 2)) == length**2).all()
    assert inside.any(dim=2).float().mean(dim=0)[0] < share[-1]


def test_settings_that_do_not_fit_say_so():
    for settings, words in (({"length": 7}, "length is 7"), ({"probability": 1.5}, "probability is 1.5"),
                            ({"num_holes": -1}, "num_holes is -1")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            CutoutConfig(**settings)
    with pytest.raises(ValueError, match="40 pixels is not contained in 32 x 32"):
        cutout_mask(keyed_draw(keys(2)), (32, 32), CutoutConfig(length=40, contained=True))
