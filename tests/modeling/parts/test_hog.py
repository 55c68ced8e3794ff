"""Histograms of oriented gradients: what they are, written as loops, and what they must not change with."""

import math

import pytest
import torch

from hf_masked.modeling.parts.hog import (
    cells_to_units,
    gradient_histograms,
    hog,
    hog_glyphs,
    pooled_histograms,
    units_to_cells,
)


def loops(picture: torch.Tensor, cell: int, bins: int) -> torch.Tensor:
    """The definition, pixel by pixel: (channels, height, width) to (channels, bins, rows, columns)."""
    channels, height, width = picture.shape
    result = torch.zeros(channels, bins, height // cell, width // cell, dtype=torch.float64)

    def at(channel, row, column):
        row, column = (abs(row), abs(column))
        row = 2 * (height - 1) - row if row >= height else row
        column = 2 * (width - 1) - column if column >= width else column
        return picture[channel, row, column].item()

    for channel in range(channels):
        for row in range(height):
            for column in range(width):
                x = y = 0.0
                for offset, weight in ((-1, 1), (0, 2), (1, 1)):
                    x += weight * (at(channel, row + offset, column - 1) - at(channel, row + offset, column + 1))
                    y += weight * (at(channel, row - 1, column + offset) - at(channel, row + 1, column + offset))
                number = math.floor(math.atan2(x, y) / math.pi * bins) % bins
                result[channel, number, row // cell, column // cell] += math.hypot(x, y)
    return result / result.norm(dim=1, keepdim=True).clamp(min=1e-12)


@pytest.mark.parametrize(("cell", "bins"), [(8, 9), (4, 18), (1, 9)])
def test_is_the_definition_written_as_loops(cell, bins):
    picture = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    ours = hog(picture.unsqueeze(0), (cell, cell), bins)[0]
    torch.testing.assert_close(ours.double(), loops(picture.double(), cell, bins), rtol=0, atol=1e-6)


def test_edges_fall_into_one_bin_each():
    upright = torch.zeros(1, 3, 32, 32)
    upright[..., 12:] = 1.0
    for picture, number in ((upright, 4), (upright.mT, 0)):
        cells = hog(picture, (8, 8))
        filled = cells.sum(dim=2) > 0
        assert filled.any() and torch.equal(cells[:, :, number] == 1, filled), "all of the mass in one bin"
        assert filled.sum() == 3 * 4, "the cells along the edge, and no others"


def test_half_a_turn_mirrors_the_cells_and_keeps_their_histograms():
    picture = torch.randn(2, 3, 32, 24)
    torch.testing.assert_close(hog(picture.flip(2, 3), (8, 8)), hog(picture, (8, 8)).flip(3, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.81025, 1e4])
def test_flat_regions_are_exactly_zero(value):
    """A rounding error would be blown up to a histogram of length 1."""
    cells = hog(torch.full((1, 2, 16, 16), value), (4, 4))
    assert torch.equal(cells, torch.zeros(1, 2, 9, 4, 4))


def test_every_histogram_has_length_one_or_zero():
    picture = torch.randn(2, 3, 32, 32)
    picture[:, :, :16] = 0.3
    lengths = hog(picture, (8, 8)).norm(dim=2)
    assert lengths[:, :, 0].abs().max() == 0
    torch.testing.assert_close(lengths[:, :, 1:], torch.ones(2, 3, 3, 4))


def test_neither_contrast_nor_brightness_matters():
    # Powers of two, so that the pictures themselves are exact.
    picture = torch.randint(256, (2, 3, 32, 32)) / 256
    expected = hog(picture, (8, 8))
    torch.testing.assert_close(hog(4 * picture, (8, 8)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(hog(picture + 2, (8, 8)), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(hog(picture.square(), (8, 8)), expected, atol=1e-2)


def test_half_precision_and_autocast_compute_in_float32():
    picture = torch.randn(1, 3, 16, 16).bfloat16()
    expected = hog(picture.float(), (8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hog(picture, (8, 8))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_bias_counts_as_gradient_everywhere():
    flat = torch.zeros(1, 1, 8, 8)
    cells = gradient_histograms(flat, (8, 8), 9, gradient_bias=torch.tensor([0.5, 0.0]))
    assert cells.flatten().tolist() == [0, 0, 0, 0, 0.5, 0, 0, 0, 0]


def test_larger_cells_are_means_of_smaller_ones():
    picture = torch.randn(2, 3, 32, 16)
    pooled = pooled_histograms(gradient_histograms(picture, (2, 4)), 4)
    torch.testing.assert_close(pooled, gradient_histograms(picture, (8, 16)))


def test_order_within_a_unit_is_channel_bin_row_column():
    cells = torch.randn(2, 3, 9, 4, 8)
    units = cells_to_units(cells, (2, 4))
    assert units.shape == (2, 4, 3 * 9 * 2 * 4)
    # Unit 3 is the one at the lower right.
    assert torch.equal(units[:, 3].unflatten(1, (3, 9, 2, 4)), cells[..., 2:, 4:])
    assert torch.equal(units_to_cells(units, (2, 2), 3, (2, 4)), cells)
    assert torch.equal(units_to_cells(cells_to_units(cells), (4, 8), 3), cells)


@pytest.mark.parametrize("turned", [False, True])
def test_glyphs_run_along_the_edge(turned):
    picture = torch.zeros(1, 1, 9, 9)
    picture[..., 4:] = 1.0
    picture = picture.mT if turned else picture
    drawn = hog_glyphs(hog(picture, (9, 9)), (9, 9), picture)
    assert drawn.shape == picture.shape and drawn.min() == 0 and drawn.max() <= 1
    drawn = drawn[0, 0].T if turned else drawn[0, 0]
    # The line is bright from end to end in the middle column, and dark away from it.
    assert drawn[:, 4].min() > 0.4 and drawn[:, :2].max() == 0 and drawn[:, 7:].max() == 0


def test_glyphs_follow_slanted_edges():
    rows, columns = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    ramp = (2 * columns + rows)[None, None]  # the edge runs steeply from the lower left to the upper right
    drawn = hog_glyphs(hog(ramp, (9, 9)), (9, 9), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2))[0, 0]
    up_right, up_left = drawn[1, 6] + drawn[7, 2], drawn[1, 2] + drawn[7, 6]
    assert up_right > up_left
